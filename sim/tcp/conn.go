// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"errors"
	"slices"
)

// State of a connection.
type State uint8

// States.
const (
	Closed State = iota
	SynSent
	SynReceived
	Established
	FinWait1
	FinWait2
	CloseWait
	Closing
	LastAck
	TimeWait
)

func (s State) String() string {
	return [...]string{"closed", "syn-sent", "syn-received", "established", "fin-wait-1", "fin-wait-2", "close-wait", "closing", "last-ack", "time-wait"}[s]
}

// Errors of connections.
var (
	ErrReset   = errors.New("connection reset by peer")
	ErrRefused = errors.New("connection refused")
	ErrTimeout = errors.New("connection timed out")
	ErrAborted = errors.New("connection aborted by its own side")
	ErrInUse   = errors.New("the addresses and ports are those of another connection")
)

// conn is a connection.
type conn struct {
	s     *Stack
	id    ID
	tuple tuple
	route route
	state State
	err   error

	listener     bool // came in by a port of its own side, and was not accepted yet
	simultaneous bool // both sent SYNs
	orphan       bool // closed: nobody reads
	noDelay      bool
	cookie       bool   // made of a SYN cookie
	fast         bool   // in use before the handshake is over
	asksCookie   bool   // the peer wants to have one for fast open
	deferred     bool   // the SYN waits for data
	early        uint32 // bytes of data that the SYN had

	// What both agreed on.
	timestamps, sack, scaling, ecn bool
	iss, irs                       uint32
	mss                            int // bytes of a segment without options

	tsOffset      uint32
	tsRecent      uint32 // the peer's
	tsRecentAt    int64
	tsEcr         uint32 // of the segment at hand
	tsSeen        bool   // the segment at hand has timestamps
	ipID          uint16
	invalidAt     int64 // when an invalid segment was last answered
	invalidAnswer bool

	acc    accurate
	snd    sender
	rcv    receiver
	timers timers

	queued bool // a frame waits for Take
	corked bool // data waits for that
}

func newConn(s *Stack, id ID, t tuple) *conn {
	c := &conn{
		s: s, id: id, tuple: t, route: s.route(t.addr, protoTCP),
		timestamps: !s.cfg.NoTimestamps, sack: !s.cfg.NoSACK, scaling: !s.cfg.NoScale,
		noDelay: s.cfg.NoNagle, mss: s.cfg.MSS,
		tsOffset: tsOffset(s, t), ipID: uint16(s.rng.Uint64()),
	}
	c.bind()
	c.timers.clear()
	c.snd.init()
	c.rcv.init(&s.cfg)
	return c
}

// bind gives the parts of the connection their way to it.
func (c *conn) bind() { c.snd.c, c.snd.recovery.c, c.rcv.c = c, c, c }

func (c *conn) cloneInto(n *conn, s *Stack) {
	*n = *c
	n.s = s
	n.bind()
	n.snd.buf, n.snd.off = slices.Clone(c.snd.buf[c.snd.off:]), 0
	n.snd.segs, n.snd.first = slices.Clone(c.snd.segs[c.snd.first:]), 0
	n.rcv.buf, n.rcv.off = slices.Clone(c.rcv.buf[c.rcv.off:]), 0
	n.rcv.ooo = slices.Clone(c.rcv.ooo)
	for i := range n.rcv.ooo {
		n.rcv.ooo[i].data = slices.Clone(n.rcv.ooo[i].data)
	}
}

// tsNow is the timestamp clock.
func (c *conn) tsNow(now int64) uint32 { return c.tsOffset + uint32(now/c.s.cfg.TickNS) }

// end closes the connection at once. What has been received can still be read.
func (c *conn) end(err error) {
	c.abandon()
	c.state, c.err = Closed, err
	c.timers.clear()
	c.snd.buf, c.snd.segs, c.snd.off, c.snd.first = nil, nil, 0, 0
	c.rcv.ooo = nil
	if c.orphan {
		c.rcv.buf, c.rcv.off = nil, 0
	}
	c.s.stale = true
	c.s.remove(c)
}

// abandon gives up its place in the backlog, if it was not established yet.
func (c *conn) abandon() {
	if c.listener && c.state == SynReceived {
		c.listener = false
		c.s.ports[c.tuple.local].pending--
	}
}

// reset sends a RST, and closes the connection.
func (c *conn) reset(now int64, err error) {
	seq := c.snd.nxt
	if end := c.snd.una + c.snd.wnd; before(end, seq) { // the peer took part of its window back
		seq = end
	}
	c.segment(now, seq, rst|ack, nil)
	c.end(err)
}

// header makes the header of a segment that acknowledges what was received.
func (c *conn) header(seq uint32, flags uint8) header {
	h := header{seq: seq, flags: flags, ack: c.rcv.nxt, id: c.ipID}
	c.ipID++
	if flags&syn != 0 {
		h.wnd = uint16(min(c.rcv.wnd, 65535))
	} else {
		h.wnd = c.rcv.advertise()
	}
	return h
}

// segment sends a segment, which has all options that one with these flags has.
func (c *conn) segment(now int64, seq uint32, flags uint8, data []byte) {
	h := c.header(seq, flags)
	if flags&ack == 0 {
		h.ack = 0
	}
	var room [40]byte
	opts := room[:0]
	if flags&syn != 0 {
		opts = c.synOptions(opts, now)
	} else {
		if c.timestamps {
			opts = appendTimestamp(opts, c.tsNow(now), c.tsRecent)
		}
		if c.sack && c.rcv.sacks > 0 || c.rcv.dup {
			opts = c.rcv.appendBlocks(opts)
		}
		if c.acc.on && flags&rst == 0 && len(data) == 0 {
			opts = c.acc.option(opts, false)
		}
	}
	if c.ecn && flags&(syn|rst) == 0 {
		if c.acc.on {
			c.acc.header(&h)
		} else if c.rcv.echoCE {
			h.flags |= ece
		}
		if len(data) > 0 && !before(seq, c.snd.sentOnce) {
			h.tos = ecnECT0
			if c.snd.reduced && !c.acc.on {
				h.flags |= cwr
				c.snd.reduced = false
			}
		}
	}
	if flags&syn != 0 && c.s.cfg.AccECN {
		h.ae = flags&(ack|ece) == ece // a SYN's
	}
	if c.snd.urgent {
		c.snd.markUrgent(&h)
	}
	c.s.transmit(&c.route, c.tuple.local, c.tuple.remote, h, opts, data)
	c.queued = true
	if flags&ack != 0 {
		c.acknowledged()
	}
}

// markUrgent sets the urgent pointer, which counts from the segment's sequence number and is behind the urgent byte.
func (s *sender) markUrgent(h *header) {
	switch up := s.urgentEnd; {
	case !after(up, h.seq):
	case up-h.seq < 0x10000:
		h.flags, h.urg = h.flags|urg, uint16(up-h.seq)
	case after(h.seq+0xffff, s.nxt):
		h.flags, h.urg = h.flags|urg, 0xffff
	}
}

// invalidInterval is how often segments that are invalid are answered, ns.
const invalidInterval = 500e6

// challenge answers an invalid segment by an ACK (RFC 5961), at most twice a second.
func (c *conn) challenge(now int64) {
	if !c.limited(now) {
		c.sendACK(now)
	}
}

// repeated is challenge for a segment outside the window. One with data is always answered: it is no part of an ACK loop.
func (c *conn) repeated(now int64, g *segment) {
	if g.seq != g.end && !g.has(syn) {
		c.sendACK(now)
		return
	}
	c.challenge(now)
}

// limited reports whether an invalid segment is not answered.
func (c *conn) limited(now int64) bool {
	if c.invalidAnswer && now-c.invalidAt < invalidInterval {
		return true
	}
	c.invalidAt, c.invalidAnswer = now, true
	return false
}

// sendACK sends a segment without data.
func (c *conn) sendACK(now int64) { c.segment(now, c.acceptable(), ack, nil) }

// acceptable is the sequence number of a segment without data: the peer has to take it even if it has taken back part of its window.
func (c *conn) acceptable() uint32 {
	end := c.snd.una + c.snd.wnd
	if before(end, c.snd.nxt) && c.snd.nxt-end >= 1<<c.snd.scale {
		return end
	}
	return c.snd.nxt
}
