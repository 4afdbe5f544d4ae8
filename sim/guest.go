// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"

	"github.com/lockstep-ft/lockstep/sim/tcp"
)

// guest is what a QEMU runs: memory, CPU, and the state of its devices. A checkpoint copies it.
type guest struct {
	stack    *tcp.Stack
	conns    map[tcp.ID]*serving
	order    []tcp.ID      // of conns
	pending  []diskRequest // the disk's: not answered yet
	said     map[flow]*said
	leaves   bool // it powers off
	panicked bool // it does nothing any more
	messages messages

	announces int64 // how often it announces itself; 0: never

	clock, since int64 // the guest's clock was clock when the host's was since; it stands still while the guest does
}

// serving is what the service knows of a connection.
type serving struct {
	in      []byte
	out     []byte // not yet taken by the stack
	body    int    // bytes of a body that are to come
	echo    bool   // it is to be sent back
	waiting bool   // for the disk
	eof     bool   // the client sends no more
	closed  bool
	ending
}

// diskRequest is one of the guest's.
type diskRequest struct {
	conn  tcp.ID
	write bool
	key   uint32
	value uint32
	sent  bool // the device has it; after a restart of the guest it is sent again
}

const servicePort = 80

func newGuest(cfg tcp.Config, seed uint64, announces, hostClock int64) *guest {
	g := &guest{
		stack: tcp.New(cfg, seed), conns: make(map[tcp.ID]*serving), said: make(map[flow]*said), messages: newMessages(),
		announces: announces, since: hostClock,
	}
	g.stack.Listen(servicePort)
	return g
}

// clone is what a checkpoint does.
func (g *guest) clone() *guest {
	c := &guest{
		stack: g.stack.Clone(), conns: make(map[tcp.ID]*serving, len(g.conns)), order: slices.Clone(g.order),
		pending: slices.Clone(g.pending), said: make(map[flow]*said, len(g.said)), leaves: g.leaves, panicked: g.panicked, messages: g.messages.clone(), announces: g.announces, clock: g.clock, since: g.since,
	}
	for id, v := range g.conns {
		n := *v
		n.in, n.out = slices.Clone(v.in), slices.Clone(v.out)
		c.conns[id] = &n
	}
	for f, v := range g.said {
		c.said[f] = v.clone()
	}
	for i := range c.pending {
		c.pending[i].sent = false
	}
	return c
}

// time is the guest's clock when the host's is now.
func (g *guest) time(now int64) int64 { return g.clock + now - g.since }

// stop and start: the clock stands still meanwhile.
func (g *guest) stop(now int64)  { g.clock, g.since = g.time(now), now }
func (g *guest) start(now int64) { g.since = now }

// wakeAt is when the guest has something to do, on the host's clock; math.MaxInt64: never.
func (g *guest) wakeAt() int64 {
	d := g.stack.NextDeadline()
	for _, id := range g.order {
		if at := g.conns[id].sleep; at > 0 {
			d = min(d, at)
		}
	}
	if g.announces > 0 {
		d = min(d, g.messages.announceAt)
	}
	if d == math.MaxInt64 {
		return d
	}
	return g.since + d - g.clock
}

// serve has the service go on as far as it can. random is what no two guests share.
func (g *guest) serve(now int64, random func() uint32) {
	for {
		id, ok := g.stack.Accept(servicePort)
		if !ok {
			break
		}
		g.conns[id] = new(serving)
		g.order = append(g.order, id)
	}
	g.answerDatagrams(now)
	var buf [4096]byte
	for _, id := range g.order {
		c := g.conns[id]
		for !c.closed {
			if len(c.out) > 0 {
				// Each guest's scheduler interrupts its service somewhere else.
				some := len(c.out)
				if random()%16 == 0 {
					some = 1 + int(random())%some
				}
				c.out = c.out[g.write(now, id, c, some):]
			}
			if c.sleeps(now) || len(c.out) > 0 || c.waiting {
				break
			}
			n, eof := g.stack.Read(now, id, buf[:])
			c.in, c.eof = append(c.in, buf[:n]...), c.eof || eof
			if !g.request(now, id, c, random) && n == 0 {
				break
			}
		}
		if g.end(now, id, c); c.eof && len(c.in) == 0 && len(c.out) == 0 && !c.waiting && !c.closed && c.abort == 0 && c.sleep == 0 {
			c.closed = true
			g.stack.Close(now, id)
		}
	}
	g.order = slices.DeleteFunc(g.order, func(id tcp.ID) bool {
		gone := g.stack.State(id) == tcp.Closed
		if gone {
			delete(g.conns, id)
		}
		return gone
	})
}

// interrupted reports whether the service has something to write for which there is room.
func (g *guest) interrupted() bool {
	for _, id := range g.order {
		if c := g.conns[id]; len(c.out) > 0 && g.stack.Room(id) > 0 {
			return true
		}
	}
	return false
}

// request takes one request out of what has come, if it is there.
//
//	E n   n bytes follow, which go back
//	G n   n bytes of a pattern
//	P n   n bytes follow, which are read
//	S k v value v for key k: written to the disk
//	R k   the value of key k, from the disk
//	T     a number that no two guests share
//	Q     the end
//
// and what is in variants.go.
func (g *guest) request(now int64, id tcp.ID, c *serving, random func() uint32) bool {
	if c.body > 0 {
		n := min(c.body, len(c.in))
		if c.echo {
			c.out = append(c.out, c.in[:n]...)
		}
		c.in = c.in[n:]
		if c.body -= n; c.body == 0 && !c.echo && !c.half {
			c.out = append(c.out, "P\n"...)
		}
		return n > 0
	}
	end := bytes.IndexByte(c.in, '\n')
	if end < 0 {
		if c.eof {
			c.in = nil
		}
		return false
	}
	line := c.in[:end]
	c.in = c.in[end+1:]
	word := bytes.Fields(line)
	number := func(i int) int {
		if i >= len(word) {
			return 0
		}
		n, _ := strconv.Atoi(string(word[i])) // the client makes no mistakes
		return n
	}
	switch word[0][0] {
	case 'E':
		c.body, c.echo = number(1), true
	case 'P':
		c.body, c.echo = number(1), false
	case 'G':
		c.out = pattern(number(1)) // what was there before has been written
	case 'S':
		c.waiting = true
		g.pending = append(g.pending, diskRequest{conn: id, write: true, key: uint32(number(1)), value: uint32(number(2))})
	case 'R':
		c.waiting = true
		g.pending = append(g.pending, diskRequest{conn: id, key: uint32(number(1))})
	case 'T':
		c.out = fmt.Appendf(c.out, "T %08x\n", random())
	case 'Q':
		c.closed = true
		g.stack.Close(now, id)
	default:
		g.variant(now, id, c, word[0][0], number, random)
	}
	return true
}

// answered is what the disk answers: the request is at the front of pending.
func (g *guest) answered(r diskRequest, value uint32) {
	i := slices.IndexFunc(g.pending, func(x diskRequest) bool { return x.conn == r.conn })
	g.pending = slices.Delete(g.pending, i, i+1)
	c := g.conns[r.conn]
	if c == nil {
		return // the client has gone
	}
	c.waiting = false
	if r.write {
		c.out = fmt.Appendf(c.out, "S %d %d\n", r.key, r.value)
	} else {
		c.out = fmt.Appendf(c.out, "R %d %d\n", r.key, value)
	}
}

// pattern is n bytes, the same on both guests. They are not to be written to.
func pattern(n int) []byte { return patterns[:n:n] }

var patterns = func() []byte {
	b := make([]byte, 1<<20) // nobody asks for more
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}()

// flow names a connection of the guest's by the remote's port and address, and its own port.
type flow struct {
	remote     netip.Addr
	remotePort uint16
	guestPort  uint16
}

// String is as compare names it.
func (f flow) String() string {
	guest := guestAddr
	if f.remote.Is6() {
		guest = guestAddr6
	}
	return fmt.Sprintf("%v>%v", netip.AddrPortFrom(guest, f.guestPort), netip.AddrPortFrom(f.remote, f.remotePort))
}

// said is what a guest has sent on one incarnation of a connection, whatever became of it.
type said struct {
	isn       uint32
	syn       bool
	opened    uint32 // what its SYN|ACK acknowledges: which of the client's connections it is
	data      stream
	fin       bool
	rst       bool
	refused   bool // a segment behind its SYN|ACK, since there was no connection
	ack, edge uint32
	acked     bool
	again     bool // it has acknowledged less than before: another connection, of the same SYN cookie
	scale     uint8
	before    *said // on the incarnation before, which the other guest may be at still
}

// of is what was sent on the incarnation that a SYN|ACK began which acknowledges opened; nil: nothing.
// One that the guest began itself, by a SYN, is the newest.
func (v *said) of(opened uint32) *said {
	for v != nil && v.opened != opened && v.opened != 0 && opened != 0 {
		v = v.before
	}
	return v
}

func (v *said) clone() *said {
	c := *v
	c.data = v.data.clone()
	return &c
}

// note takes in a frame that the guest has sent.
func (g *guest) note(p *packet) {
	f := p.flow()
	v := g.said[f]
	if v == nil || p.syn() && v.isn != p.seq {
		v = &said{isn: p.seq - 1, before: v}
		if p.syn() {
			v.isn, v.syn, v.opened, v.scale = p.seq, true, p.opens(), p.scale()
		}
		g.said[f] = v
	}
	if p.rst() {
		v.rst, v.refused = true, v.refused || v.syn && !p.hasACK() && p.seq == v.isn+1 && v.data.len == 0
		return
	}
	if p.hasACK() {
		shift := v.scale
		if p.syn() {
			shift = 0
		}
		if edge := p.ack + uint32(p.win)<<shift; !v.acked || after(edge, v.edge) {
			v.edge = edge
		}
		v.again = v.again || v.acked && after(v.ack, p.ack)
		if !v.acked || after(p.ack, v.ack) {
			v.ack, v.acked = p.ack, true
		}
	}
	start := int(int32(p.seq - v.isn - 1))
	if p.syn() {
		start = 0
	}
	if start < 0 || start > v.data.len { // a keep-alive, or behind what was never seen
		return
	}
	if end := start + len(p.payload); end > v.data.len {
		v.data.append(p.payload[v.data.len-start:])
	}
	v.fin = v.fin || p.fin()
}

func after(a, b uint32) bool { return int32(a-b) > 0 }

// packet is a TCP segment as it is on the wire.
type packet struct {
	src, dst         netip.Addr
	srcPort, dstPort uint16
	seq, ack         uint32
	flags, tos       byte
	ae               bool // AccECN's third flag
	win, urgent      uint16
	opts, payload    []byte
}

// parse takes an Ethernet frame with IP and TCP apart; false: it is something else.
func parse(frame []byte) (p packet, ok bool) {
	var t []byte
	switch {
	case len(frame) >= 54 && frame[12] == 8 && frame[13] == 0 && frame[23] == 6:
		ip := frame[14:]
		total, hl := int(binary.BigEndian.Uint16(ip[2:])), int(ip[0]&15)*4
		if total > len(ip) || total < hl+20 {
			return p, false
		}
		p.src, p.dst, p.tos = netip.AddrFrom4([4]byte(ip[12:])), netip.AddrFrom4([4]byte(ip[16:])), ip[1]
		t = ip[hl:total]
	case len(frame) >= 74 && frame[12] == 0x86 && frame[13] == 0xdd:
		ip := frame[14:]
		p.src, p.dst, p.tos = netip.AddrFrom16([16]byte(ip[8:])), netip.AddrFrom16([16]byte(ip[24:])), ip[0]<<4|ip[1]>>4
		next := ip[6]
		for t = ip[40:]; next == 0 || next == 60; { // options
			next, t = t[0], t[8*(1+int(t[1])):]
		}
		if next != 6 {
			return p, false
		}
	default:
		return p, false
	}
	off := int(t[12]>>4) * 4
	if off < 20 || off > len(t) {
		return p, false
	}
	p.srcPort, p.dstPort = binary.BigEndian.Uint16(t), binary.BigEndian.Uint16(t[2:])
	p.seq, p.ack = binary.BigEndian.Uint32(t[4:]), binary.BigEndian.Uint32(t[8:])
	p.ae = t[12]&1 != 0
	p.flags, p.win, p.urgent = t[13], binary.BigEndian.Uint16(t[14:]), binary.BigEndian.Uint16(t[18:])
	p.opts, p.payload = t[20:off], t[off:]
	return p, true
}

// end is the position behind it.
func (p *packet) end() uint32 {
	return p.seq + uint32(len(p.payload)) + uint32(p.flags&1) + uint32(p.flags>>1&1)
}

func (p *packet) fin() bool    { return p.flags&1 != 0 }
func (p *packet) syn() bool    { return p.flags&2 != 0 }
func (p *packet) rst() bool    { return p.flags&4 != 0 }
func (p *packet) hasACK() bool { return p.flags&16 != 0 }

// opens is what a SYN|ACK acknowledges, and 0 for a SYN. 1 stands for an acknowledgment of 0.
func (p *packet) opens() uint32 {
	if p.hasACK() {
		return max(p.ack, 1)
	}
	return 0
}

// flow is that of a frame of the guest's.
func (p *packet) flow() flow { return flow{p.dst, p.dstPort, p.srcPort} }

// option is the value of a TCP option, nil if it is not there.
func (p *packet) option(kind byte) []byte {
	for o := p.opts; len(o) > 0 && o[0] != 0; {
		if o[0] == 1 {
			o = o[1:]
			continue
		}
		if len(o) < 2 || int(o[1]) < 2 || int(o[1]) > len(o) {
			return nil
		}
		if o[0] == kind {
			return o[2:o[1]]
		}
		o = o[o[1]:]
	}
	return nil
}

// scale is a SYN's window scale.
func (p *packet) scale() uint8 {
	if v := p.option(3); len(v) == 1 {
		return v[0]
	}
	return 0
}

// timestamp is the TSval, if there is one.
func (p *packet) timestamp() (uint32, bool) {
	if v := p.option(8); len(v) == 8 {
		return binary.BigEndian.Uint32(v), true
	}
	return 0, false
}

func (p packet) String() string {
	f := ""
	for i, c := range "FSRPAU" {
		if p.flags&(1<<i) != 0 {
			f += string(c)
		}
	}
	return fmt.Sprintf("%d>%d %s seq %d ack %d win %d len %d", p.srcPort, p.dstPort, f, p.seq, p.ack, p.win, len(p.payload))
}
