// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"cmp"
	"maps"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"
)

// Config of a stack. Zero fields take defaults.
type Config struct {
	MAC, PeerMAC [6]byte    // own, and where everything is sent
	Addr         netip.Addr // IPv4 or IPv6; frames to others are ignored

	MSS          int   // bytes of a segment without options; 1460, with IPv6 1440
	WindowScale  uint8 // at most 14; 7
	NoScale      bool
	NoSACK       bool
	NoTimestamps bool
	ECN          bool
	AccECN       bool // with ECN, and a peer that has it as well
	SynCookies   bool // passive opens keep nothing before the handshake's last ACK
	FastOpen     bool // data in SYNs, both ways
	RcvBuf       int  // bytes, the largest window; 131072
	SndBuf       int  // bytes; 131072
	Backlog      int  // connections of a port that are not accepted yet, half-open ones too; 128

	Autocork bool // hold data back while the connection's earlier frames wait for Take
	NoNagle  bool // of new connections
	NoTLP    bool // no tail loss probes
	NoFRTO   bool // no detection of spurious timeouts by RFC 5682

	TickNS      int64         // of the timestamp clock; 1e6
	MinRTO      time.Duration // 200 ms
	DelayedACK  time.Duration // 40 ms
	TimeWait    time.Duration // and the longest FIN-WAIT-2 of a closed connection; 60 s
	Keepalive   time.Duration // idle time until the first probe; 0: none
	UserTimeout time.Duration // how long data may be unacknowledged; 0: 15 retransmissions

	Secret    uint64 // ISN = hash(secret, tuple) + now/64 ns
	RandomISN bool   // instead, as OpenBSD has it

	// How many bytes, or ticks, are left before the numbers of a new connection wrap, at most; 0: any number. From the same
	// ports later ones go on from there, as without.
	SeqWrap, TSWrap uint32
	// IPv6: each packet has a header with hop-by-hop or destination options, which are padding.
	HopOptions, DestOptions bool
}

func (c *Config) defaults() {
	if c.MSS == 0 {
		c.MSS = 1460
		if !c.Addr.Is4() {
			c.MSS = 1440
		}
	}
	c.MSS = max(c.MSS, minMSS)
	c.WindowScale = min(cmp.Or(c.WindowScale, 7), maxScale)
	c.RcvBuf, c.SndBuf = cmp.Or(c.RcvBuf, 128<<10), cmp.Or(c.SndBuf, 128<<10)
	c.Backlog = cmp.Or(c.Backlog, 128)
	c.TickNS = cmp.Or(c.TickNS, 1e6)
	c.MinRTO = cmp.Or(c.MinRTO, 200*time.Millisecond)
	c.DelayedACK = cmp.Or(c.DelayedACK, 40*time.Millisecond)
	c.TimeWait = cmp.Or(c.TimeWait, time.Minute)
}

// never is a deadline that does not come.
const never = math.MaxInt64

// Stack is a TCP/IP stack with one address.
type Stack struct {
	cfg    Config
	is4    bool
	addr4  [4]byte
	addr16 [16]byte
	rng    rand.PCG

	now     int64
	drawn   int64            // the tick of the newest initial number
	shifts  map[tuple]uint32 // what SeqWrap adds to a connection's initial number
	stamps  map[tuple]uint32 // TSWrap's tsOffset
	conns   []*conn          // by ID
	live    []*conn          // those that are not closed
	byTuple map[tuple]*conn
	ports   map[uint16]*listener

	due   int64 // what NextDeadline answers, unless stale
	stale bool
	out   [][]byte
	taken [][]byte // what the last Take returned, to be used again
	slab  []byte
	slabs int

	cookieKey uint64                // of SYN cookies; 0: not drawn yet
	cookies   map[netip.Addr][]byte // of peers, for fast open

	datagrams []datagram
	pongs     [][]byte // ICMP echo replies, from the identifier on
	bad       int
	ipID      uint16
}

// tuple names a connection.
type tuple struct {
	addr          netip.Addr
	remote, local uint16
}

// listener is a port that accepts connections.
type listener struct {
	pending int  // not accepted yet
	ready   []ID // established, in order
}

// New makes a stack. Two with the same config and seed do the same.
func New(cfg Config, seed uint64) *Stack {
	cfg.defaults()
	s := &Stack{
		cfg: cfg, is4: cfg.Addr.Is4(), addr16: cfg.Addr.As16(),
		cookies: make(map[netip.Addr][]byte),
		byTuple: make(map[tuple]*conn), ports: make(map[uint16]*listener),
		shifts: make(map[tuple]uint32), stamps: make(map[tuple]uint32),
		due: never,
	}
	if s.is4 {
		s.addr4 = cfg.Addr.As4()
	}
	s.rng = *rand.NewPCG(seed, seed^0x9e3779b97f4a7c15)
	s.ipID = uint16(s.rng.Uint64())
	return s
}

// Clone is a copy that shares nothing with s: with the same calls it does the same. Frames that wait for Take are copied, too.
func (s *Stack) Clone() *Stack {
	n := *s
	n.slab, n.slabs, n.taken = nil, 0, nil
	n.out = slices.Clone(s.out) // frames do not change
	n.datagrams, n.pongs = slices.Clone(s.datagrams), slices.Clone(s.pongs)
	n.ports = make(map[uint16]*listener, len(s.ports))
	for port, l := range s.ports {
		n.ports[port] = &listener{pending: l.pending, ready: slices.Clone(l.ready)}
	}
	n.cookies = maps.Clone(s.cookies) // a cookie does not change
	n.shifts, n.stamps = maps.Clone(s.shifts), maps.Clone(s.stamps)
	n.conns = slices.Clone(s.conns)
	room := make([]conn, len(s.live))
	for i, c := range s.conns {
		if c.state == Closed && c.rcv.unread() == 0 {
			continue // nothing of it changes any more
		}
		if len(room) == 0 {
			room = make([]conn, 1)
		}
		c.cloneInto(&room[0], &n)
		n.conns[i], room = &room[0], room[1:]
	}
	n.live = make([]*conn, len(s.live))
	for i, c := range s.live {
		n.live[i] = n.conns[c.id]
	}
	n.byTuple = make(map[tuple]*conn, len(s.byTuple))
	for t, c := range s.byTuple {
		n.byTuple[t] = n.conns[c.id]
	}
	return &n
}

// Input is a frame that arrived. The stack does not keep it.
func (s *Stack) Input(now int64, frame []byte) {
	s.now, s.stale = now, true
	var p packet
	if !s.parsePacket(frame, &p) {
		return
	}
	switch p.proto {
	case protoUDP:
		udpIn(s, &p)
		return
	case protoICMP, protoICMPv6:
		icmpIn(s, &p)
		return
	case protoTCP:
	default:
		return
	}
	if fold(sum(p.payload, p.pseudo)) != 0 {
		s.bad++
		return
	}
	var g segment
	if !g.parse(&p) {
		return
	}
	if c := s.byTuple[tuple{p.remote, g.from, g.to}]; c != nil {
		if !c.input(now, &g) {
			return
		}
		// A connection in TIME-WAIT made room for the SYN.
	}
	s.listen(now, p.remote, &g)
}

// Tick lets timers expire.
func (s *Stack) Tick(now int64) {
	s.now, s.stale = now, true
	for i := 0; i < len(s.live); {
		c := s.live[i]
		if c.deadline() <= now {
			c.expire(now)
		}
		if i < len(s.live) && s.live[i] == c {
			i++
		}
	}
}

// NextDeadline is when Tick is due, math.MaxInt64 if never.
func (s *Stack) NextDeadline() int64 {
	if s.stale {
		s.due, s.stale = never, false
		for _, c := range s.live {
			s.due = min(s.due, c.deadline())
		}
	}
	return s.due
}

// Take returns the frames to transmit since the last Take, in order. The frames are the
// caller's and do not change; the slice that holds them is used again by the next Take.
func (s *Stack) Take() [][]byte {
	s.taken, s.out = s.out, s.taken[:0]
	if s.cfg.Autocork && len(s.taken) > 0 {
		for _, c := range s.live {
			c.queued = false
			if c.corked {
				c.timers.uncork, s.stale = s.now, true
			}
		}
	}
	return s.taken
}

// BadChecksums is how many packets for this stack had a wrong checksum.
func (s *Stack) BadChecksums() int { return s.bad }

// hash is of the secret and a connection. Not for cryptography.
func (s *Stack) hash(t tuple, salt uint64) uint64 {
	a := t.addr.As16()
	x := s.cfg.Secret ^ salt
	for _, v := range [...]uint64{be.Uint64(a[:]), be.Uint64(a[8:]), be.Uint64(s.addr16[8:]), uint64(t.remote)<<16 | uint64(t.local)} {
		x = mix(x ^ v)
	}
	return x
}

// mix is SplitMix64's.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// initialNumber is the initial sequence number of a connection, as RFC 6528 has it, or at random.
func initialNumber(s *Stack, now int64, t tuple) uint32 {
	s.drawn = max(s.drawn+1, now>>6) // no host opens two connections in one tick of 64 ns
	isn := uint32(s.hash(t, 1)) + uint32(s.drawn)
	if s.cfg.RandomISN {
		isn = uint32(s.rng.Uint64())
	}
	if w := s.cfg.SeqWrap; w > 0 {
		if _, ok := s.shifts[t]; !ok {
			s.shifts[t] = ^(isn % w) - isn
		}
		isn += s.shifts[t]
	}
	return isn
}

// tsOffset is what a connection's timestamps are ahead of the clock.
func tsOffset(s *Stack, t tuple) uint32 {
	offset := uint32(s.hash(t, 2))
	if w := s.cfg.TSWrap; w > 0 {
		if _, ok := s.stamps[t]; !ok {
			s.stamps[t] = ^((offset + uint32(s.now>>6)) % w) - uint32(s.now/s.cfg.TickNS)
		}
		offset = s.stamps[t]
	}
	return offset
}

// add makes a connection.
func (s *Stack) add(t tuple) *conn {
	c := newConn(s, ID(len(s.conns)), t)
	s.conns = append(s.conns, c)
	s.live = append(s.live, c)
	s.byTuple[t] = c
	return c
}

// remove forgets a connection that has been closed, but for its state, its error and what can be read.
func (s *Stack) remove(c *conn) {
	if i := slices.Index(s.live, c); i >= 0 {
		s.live = slices.Delete(s.live, i, i+1)
	}
	if s.byTuple[c.tuple] == c {
		delete(s.byTuple, c.tuple)
	}
}

// refuse answers a segment that belongs to no connection.
func (s *Stack) refuse(r *route, g *segment) {
	if g.has(rst) {
		return
	}
	h := header{flags: rst, seq: g.ack}
	if !g.has(ack) {
		h = header{flags: rst | ack, ack: g.end}
	}
	s.transmit(r, g.to, g.from, h, nil, nil)
}
