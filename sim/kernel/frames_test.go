// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/loader/core"
)

var (
	be = binary.BigEndian
	le = binary.LittleEndian
)

const (
	fin = 1 << iota
	syn
	rst
	psh
	ack
)

// flow is a connection between the guest and a remote.
type flow struct {
	v6           bool
	guest, rem   byte // last byte of the addresses
	gport, rport uint16
	vlans        []uint16 // in the bytes
	ext          bool     // IPv6: an extension header, IPv4: an option
}

func (f flow) addr(last byte) (a [16]byte) {
	if f.v6 {
		return [16]byte{0x20, 1, 0xd, 0xb8, 15: last}
	}
	return [16]byte{10: 0xff, 0xff, 192, 0, 2, last}
}

func (f flow) tuple() bpf.LockstepLsTuple {
	t := bpf.LockstepLsTuple{Guest: f.addr(f.guest), Remote: f.addr(f.rem), Gport: f.gport, Rport: f.rport, Proto: 6}
	if len(f.vlans) > 0 {
		t.Vlan = f.vlans[0]
	}
	if len(f.vlans) > 1 {
		t.Vlan2 = f.vlans[1]
	}
	return t
}

// ends are the addresses and ports of a frame's sender and receiver.
func (f flow) ends(toGuest bool) (src, dst [16]byte, sport, dport uint16) {
	src, dst, sport, dport = f.addr(f.guest), f.addr(f.rem), f.gport, f.rport
	if toGuest {
		return dst, src, dport, sport
	}
	return src, dst, sport, dport
}

// ip is a frame with the headers before an IP payload of proto, and the payload.
func (f flow) ip(toGuest bool, proto byte, payload []byte) []byte {
	src, dst, _, _ := f.ends(toGuest)
	frame := []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2}
	if toGuest {
		frame[5], frame[11] = 2, 1
	}
	for _, id := range f.vlans {
		frame = be.AppendUint16(append(frame, 0x81, 0), id|0x2000)
	}
	if f.v6 {
		next := proto
		var ext []byte
		if f.ext {
			next, ext = 60, []byte{proto, 0, 1, 4, 0, 0, 0, 0}
		}
		frame = append(frame, 0x86, 0xdd, 0x60, 0, 0, 0)
		frame = be.AppendUint16(frame, uint16(len(ext)+len(payload)))
		frame = append(append(append(frame, next, 64), src[:]...), dst[:]...)
		return append(append(frame, ext...), payload...)
	}
	ip := make([]byte, 20, 24)
	if f.ext {
		ip = append(ip, 1, 1, 1, 0)
	}
	ip[0], ip[8], ip[9] = 0x40|byte(len(ip)/4), 64, proto
	be.PutUint16(ip[2:], uint16(len(ip)+len(payload)))
	copy(ip[12:], src[12:])
	copy(ip[16:], dst[12:])
	be.PutUint16(ip[10:], ^core.Checksum(ip))
	return append(append(append(frame, 8, 0), ip...), payload...)
}

func (f flow) checksum(toGuest bool, proto byte, l4 []byte) uint16 {
	src, dst, _, _ := f.ends(toGuest)
	a, b := src[12:], dst[12:]
	if f.v6 {
		a, b = src[:], dst[:]
	}
	return ^core.Checksum(a, b, []byte{0, proto, byte(len(l4) >> 8), byte(len(l4))}, l4)
}

// seg is a TCP segment.
type seg struct {
	seq, ack uint32
	flags    uint8
	win      uint16
	opts     []byte
	payload  []byte
}

func (f flow) tcp(toGuest bool, s seg) []byte {
	_, _, sport, dport := f.ends(toGuest)
	opts := slices.Clone(s.opts)
	for len(opts)%4 != 0 {
		opts = append(opts, 0)
	}
	b := be.AppendUint16(be.AppendUint16(nil, sport), dport)
	b = be.AppendUint32(be.AppendUint32(b, s.seq), s.ack)
	b = be.AppendUint16(append(b, byte(5+len(opts)/4)<<4, s.flags), s.win)
	b = append(append(append(b, 0, 0, 0, 0), opts...), s.payload...)
	be.PutUint16(b[16:], f.checksum(toGuest, 6, b))
	return f.ip(toGuest, 6, b)
}

func (f flow) udp(toGuest bool, payload []byte) []byte {
	_, _, sport, dport := f.ends(toGuest)
	b := be.AppendUint16(be.AppendUint16(nil, sport), dport)
	b = append(be.AppendUint16(b, uint16(8+len(payload))), 0, 0)
	b = append(b, payload...)
	be.PutUint16(b[6:], f.checksum(toGuest, 17, b))
	return f.ip(toGuest, 17, b)
}

func tsOpt(val, ecr uint32) []byte {
	return be.AppendUint32(be.AppendUint32([]byte{1, 1, 8, 10}, val), ecr)
}

// traffic draws the frames of a few connections.
type traffic struct {
	*rand.Rand
	flows         []flow
	pvm, svm, cli []uint32 // ISNs
	stamps        []uint32
	errors        bool // more of ICMP's
}

func newTraffic(r *rand.Rand) *traffic {
	t := &traffic{Rand: r}
	for i := range 5 {
		f := flow{v6: r.IntN(2) == 0, guest: 1, rem: byte(2 + r.IntN(3)), gport: uint16(80 + i), rport: uint16(4000 + i), ext: r.IntN(4) == 0}
		for range r.IntN(5) - 2 {
			f.vlans = append(f.vlans, uint16(1+r.IntN(3)))
		}
		t.flows = append(t.flows, f)
	}
	for range 2 {
		t.pvm, t.svm, t.cli, t.stamps = append(t.pvm, t.edge()), append(t.svm, t.edge()), append(t.cli, t.edge()), append(t.stamps, t.edge())
	}
	return t
}

func pick[T any](t *rand.Rand, of ...T) T { return of[t.IntN(len(of))] }

// edge is a number that is as often close to a wrap as anywhere.
func (t *traffic) edge() uint32 {
	return pick(t.Rand, t.Uint32(), t.Uint32N(8), -t.Uint32N(3000), 1<<31-2+t.Uint32N(4))
}

func (t *traffic) near(of []uint32) uint32 {
	return pick(t.Rand, of...) + pick[uint32](t.Rand, 0, 1, 1, 1, 2, 1000, 1<<30, 1<<30+1, 1<<31)
}

func (t *traffic) bytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(t.Uint32())
	}
	return b
}

func (t *traffic) options() (o []byte) {
	ts := func() []byte { return tsOpt(t.near(t.stamps), pick(t.Rand, t.near(t.stamps), t.stamps[0])) }
	switch t.IntN(8) {
	case 0:
	case 1:
		o = append([]byte{2, 4, 5, 180}, ts()...)
	case 2:
		o = append(ts(), 1, 1, 5, 10)
		o = be.AppendUint32(be.AppendUint32(o, t.near(t.pvm)), t.near(t.svm))
	case 3:
		o = append([]byte{1, 30, 4, 7, 9}, ts()...) // MPTCP
	case 4:
		o = append(append([]byte{19, 18}, t.bytes(16)...), ts()...) // MD5
	case 5:
		o = t.bytes(t.IntN(41))
	default:
		o = ts()
	}
	return o
}

// segment is between the guest, whose ISN is one of isns, and the remote, which knows
// those of known.
func (t *traffic) segment(toGuest bool, isns, known []uint32) seg {
	s := seg{
		flags: pick(t.Rand, ack, ack|psh, ack|fin, ack, syn|ack, syn, rst, rst|ack, uint8(t.Uint32())), win: uint16(t.Uint32()), opts: t.options(),
	}
	if toGuest {
		s.seq, s.ack = t.near(t.cli), t.near(known)
	} else {
		s.seq, s.ack = t.near(isns), t.near(t.cli)
		if s.flags&syn != 0 && t.IntN(8) != 0 {
			s.seq, s.ack = pick(t.Rand, isns...), pick(t.Rand, t.cli...)+1
		}
	}
	switch t.IntN(8) {
	case 0:
		s.payload = t.bytes(1 + t.IntN(3000))
	case 1, 2, 3:
		s.payload = t.bytes(1 + t.IntN(9))
	}
	return s
}

// other is a frame that is not a plain TCP segment.
func (t *traffic) other(toGuest bool, isns, known []uint32) []byte {
	f := pick(t.Rand, t.flows...)
	switch t.IntN(11) {
	case 7, 8:
		return t.chained(toGuest, isns, known)
	case 0:
		f.gport, f.rport = pick[uint16](t.Rand, 53, 123, 9), pick[uint16](t.Rand, 5353, 7)
		return f.udp(toGuest, t.bytes(t.IntN(2500)))
	case 1:
		return f.ip(toGuest, pick[byte](t.Rand, 2, 47, 50, 132, 43, 44, 0, 60), t.bytes(8+t.IntN(60)))
	case 2: // a fragment
		b := f.ip(toGuest, 17, t.bytes(64))
		if !f.v6 {
			be.PutUint16(b[len(b)-64-14:], uint16(t.Uint32()))
		}
		return b
	case 3: // ARP
		src, dst, _, _ := f.ends(toGuest)
		switch t.IntN(5) {
		case 0: // a probe
			src = [16]byte{}
		case 1: // an announcement
			src = dst
		}
		b := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 2, 8, 6, 0, 1, 8, 0, 6, 4, 0, byte(1 + t.IntN(2)), 2, 0, 0, 0, 0, 2}, src[12:]...)
		b = append(append(b, 0, 0, 0, 0, 0, 0), dst[12:]...)
		return append(b, make([]byte, 20)...)
	case 4: // neighbour discovery and its like
		f.v6 = true
		b := append([]byte{pick[byte](t.Rand, 135, 135, 136, 133, 143, 128), 0, 0, 0, 0, 0, 0, 0}, t.bytes(24)...)
		return f.ip(toGuest, 58, b)
	case 5:
		b := f.ip(toGuest, 6, t.bytes(40))
		be.PutUint16(b[12:], pick(t.Rand, uint16(0x88cc), 0x8035, 0x22f0, 30, uint16(t.Uint32N(1500))))
		return b
	case 6:
		return f.ip(toGuest, 58-57*b2i(!f.v6), append([]byte{pick[byte](t.Rand, 8, 0, 128, 129), 0, 0, 0}, t.bytes(40)...))
	}
	return t.icmpError(toGuest, isns, known)
}

// chained is a segment behind IPv6 extension headers.
func (t *traffic) chained(toGuest bool, isns, known []uint32) []byte {
	f := pick(t.Rand, t.flows...)
	f.v6, f.ext, f.vlans = true, false, nil
	b := f.tcp(toGuest, t.segment(toGuest, isns, known))
	next := b[20]
	var chain []byte
	for range 1 + t.IntN(3) + 8*(t.IntN(9)/8) {
		kind := pick[byte](t.Rand, 0, 60, 60, 43, 44, 44)
		ext := []byte{next, 0, 0, 0, 0, 0, 0, 0}
		switch {
		case kind == 44 && t.IntN(3) == 0:
			be.PutUint16(ext[2:], 8*uint16(t.IntN(4))|uint16(t.IntN(2)))
		case kind != 44 && t.IntN(6) == 0:
			ext[1] = byte(t.IntN(20))
			ext = append(ext, make([]byte, 8*int(ext[1]))...)
		}
		next, chain = kind, append(ext, chain...)
	}
	b[20] = next
	b = slices.Insert(b, 54, chain...)
	be.PutUint16(b[18:], uint16(len(b)-54))
	return b
}

func b2i(b bool) byte {
	if b {
		return 1
	}
	return 0
}

// icmpError quotes a segment that went the other way, or a part of it.
func (t *traffic) icmpError(toGuest bool, isns, known []uint32) []byte {
	f := pick(t.Rand, t.flows...)
	plain := f
	plain.vlans = nil
	from := isns
	if toGuest {
		from = known
	}
	quoted := plain.tcp(!toGuest, t.segment(!toGuest, from, known))[14:]
	quoted = quoted[:t.IntN(len(quoted)+1)]
	if len(quoted) > 0 && t.IntN(10) == 0 {
		quoted[t.IntN(len(quoted))] ^= 1 << t.IntN(8)
	}
	proto, typ := byte(1), pick[byte](t.Rand, 3, 4, 5, 11, 12, 8)
	if f.v6 {
		proto, typ = 58, pick[byte](t.Rand, 1, 2, 3, 4, 127)
	}
	return f.ip(toGuest, proto, append([]byte{typ, 4, 0x12, 0x34, 0, 0, 5, 0xdc}, quoted...))
}

// frame is any of them, spoiled now and then. PROG_TEST_RUN wants an IP header whole.
func (t *traffic) frame(toGuest bool, isns, known []uint32) []byte {
	var b []byte
	if t.errors && t.IntN(3) == 0 {
		b = t.icmpError(toGuest, isns, known)
	} else if t.IntN(4) > 0 {
		b = pick(t.Rand, t.flows...).tcp(toGuest, t.segment(toGuest, isns, known))
	} else {
		b = t.other(toGuest, isns, known)
	}
	b = append(b, make([]byte, max(0, 60-len(b)))...)
	const shortest = 14 + 8 + 40
	switch t.IntN(25) {
	case 0:
		if len(b) > shortest {
			b = b[:shortest+t.IntN(len(b)-shortest)]
		}
	case 1:
		b[12+t.IntN(len(b)-12)] ^= 1 << t.IntN(8)
	}
	return b
}
