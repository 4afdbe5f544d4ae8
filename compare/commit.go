// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"cmp"
	"slices"
	"time"
)

const (
	// While frozen the PVM's ACKs are remembered over time, in steps of markStep,
	// because only the commit tells which of them the SVM has inherited.
	markStep = int64(500 * time.Microsecond)
	maxMarks = 64
)

// inEpoch reports whether a record is of this epoch. One of the next is kept for
// after the commit (R17), one of an older is dropped.
func (p *Primary) inEpoch(s *Segment) bool {
	switch d := int32(s.Epoch - p.epoch); {
	case d == 0:
		return true
	case d < 0:
		p.stats.Drops[ReasonOldEpoch]++
	case len(p.next) >= p.cfg.MaxNext, p.off(mutR17):
		p.stats.Drops[ReasonNextEpoch]++
	default:
		k := *s
		k.Opts = slices.Clone(s.Opts)
		k.Bounds = slices.Clone(s.Bounds)
		k.Header, k.Payload = nil, nil
		p.next = append(p.next, k)
	}
	return false
}

// mark remembers p while frozen. A step that the commit point lies in counts as
// behind it, so a step carries the time of its last ACK; the guest's stop makes
// the gap that the commit point lies in.
func (p *Primary) mark(c *conn) {
	if !p.frozen {
		return
	}
	if n := len(c.marks); n > 0 && c.pAt-c.marks[n-1].first < markStep {
		c.marks[n-1].at, c.marks[n-1].side = c.pAt, c.p
		return
	} else if n == maxMarks {
		c.marks = append(c.marks[:1], c.marks[2:]...) // the first is from before the freeze
	}
	c.marks = append(c.marks, ackMark{c.pAt, c.pAt, c.p})
}

// freeze: nothing leaves from now on (R13, R15).
func (p *Primary) freeze() {
	if p.frozen || p.off(mutR15) {
		return
	}
	p.frozen = true
	for _, t := range p.timers {
		c := t.conn
		if c == nil {
			continue
		}
		c.marks = c.marks[:0]
		if c.p.ok {
			c.marks = append(c.marks, ackMark{c.pAt, c.pAt, c.p})
		}
	}
}

// thaw: the checkpoint did not happen (R15).
func (p *Primary) thaw() {
	if !p.frozen {
		return
	}
	p.frozen = false
	var diverged *conn
	for _, c := range p.all() {
		if c.diverged && diverged == nil {
			diverged = c
		}
		p.restart(c)
	}
	for _, f := range p.allFlows() {
		p.restartFlow(f)
	}
	if diverged != nil {
		// What it was asked for is still needed.
		p.checkpoint(&diverged.tuple, diverged.why)
	}
}

// restart sets c going again after a freeze.
func (p *Primary) restart(c *conn) {
	c.progress = p.now
	if c.announcing {
		p.startAnnouncing(c, c.annLeft)
	}
	p.pump(c)
}

// all gives the connections in the order they were made.
func (p *Primary) all() []*conn {
	cs := make([]*conn, 0, len(p.conns))
	for _, t := range p.timers {
		if t.conn != nil {
			cs = append(cs, t.conn)
		}
	}
	slices.SortFunc(cs, func(a, b *conn) int { return cmp.Compare(a.no, b.no) })
	return cs
}

// leaving is a held frame that leaves at a commit: a piece of c or, where f is
// set, a datagram.
type leaving struct {
	no    uint64
	c     *conn
	piece piece
	rst   bool
	f     *dgramFlow
	dgram dgram
}

// commit begins epoch: the SVM has become a copy of the PVM as it was at at. What
// the PVM said before leaves (R14), everything else starts from there (R8).
func (p *Primary) commit(epoch uint32, at int64) {
	p.epoch, p.frozen = epoch, false
	cs := p.all()
	var out []leaving
	for _, c := range cs {
		out = p.commitConn(c, at, out)
	}
	fs := p.allFlows()
	for _, f := range fs {
		out = p.commitFlow(f, at, out)
	}
	p.leave(out)
	for _, c := range cs {
		if !c.pvmSeen {
			p.remove(c, ReasonExpired) // known from the old SVM alone
			continue
		}
		if !c.floating && !c.synWait {
			p.setBase(c, c.released)
			c.rooted, c.adopted = true, false
		}
		p.restart(c)
	}
	for _, f := range fs {
		p.restartFlow(f)
	}
	next := p.next
	p.next = nil
	for i := range next {
		p.eventNo++
		p.svm(&next[i])
	}
}

// before reports whether a capture time belongs to the old epoch.
func (p *Primary) before(t, at int64) bool { return t < at || p.off(mutR14) }

// commitConn brings c to its state at a commit and appends to out what leaves.
func (p *Primary) commitConn(c *conn, at int64, out []leaving) []leaving {
	c.s = p.inherit(c, at)
	c.sSACK, c.sBlockN = sackSet{}, 0
	fresh := c.synWait && !p.before(c.synAt, at) // opened in the new epoch
	held := c.held.view()
	young := 0
	for _, h := range held {
		switch {
		case p.before(h.at, at):
			out = append(out, leaving{no: h.no, c: c, piece: h})
		case p.cfg.KeepYoung:
			if !h.syn {
				h.rest = p.keys.Sum(h.start, h.bytes(h.start, h.dataEnd()))
			}
			held[young] = h
			young++
		default:
			if h.fin {
				c.pFIN = mark{}
			}
			p.freePiece(c, &h, ReasonYoung)
		}
	}
	c.held.remove(young, len(held))
	if c.rstHeld && p.before(c.rst.at, at) {
		out = append(out, leaving{no: c.rst.no, c: c, piece: c.rst, rst: true})
	} else {
		p.freeRST(c, ReasonYoung)
	}
	p.forget(c)
	p.unlinkOpen(c)
	c.diverged, c.why = false, ReasonNone
	c.sSYN, c.sSYNSame = false, false
	c.svmSaid, c.sFIN, c.sRST, c.openOnSVM = false, mark{}, svmReset{}, false
	c.cutAt, c.askAt, c.asks, c.query, c.waiting = 0, 0, 0, backoff{}, false
	c.marks = c.marks[:0]
	if fresh {
		p.setBase(c, c.inc+1)
		c.compared = c.inc
		if c.synFlags&ACK == 0 {
			p.linkOpen(c, false)
		}
		return out
	}
	c.synWait = false
	c.inherited, c.incKnown = true, c.incKnown || !c.floating
	// A connection in its handshake may need its offset announced again, but
	// nothing tells P when that is over.
	c.announcing, c.annLeft = c.synSeen && !c.established, announceAgain
	return out
}

// inherit is what the PVM had acknowledged at the commit point, as far as it is
// certain: A and E (R8). What was sent is from before, whatever is captured with a
// time before is too.
func (p *Primary) inherit(c *conn, at int64) side {
	s := c.out
	add := func(o side) {
		switch {
		case !s.ok:
			s = o
		case after(o.ack, s.ack):
			s.ack, s.win, s.echo, s.echoes = o.ack, o.win, o.echo, o.echoes
		case o.ack == s.ack:
			s.win = max(s.win, o.win)
			if o.echoes {
				s.echoed(o.ack, o.echo, false)
			}
		}
		s.edge = maxSeq(s.edge, o.edge)
	}
	if c.p.ok && p.before(c.pAt, at) {
		add(c.p)
	}
	for _, m := range c.marks {
		if p.before(m.at, at) {
			add(m.side)
		}
	}
	for i := range c.held.view() {
		if h := &c.held.view()[i]; h.flags&ACK != 0 && p.before(h.at, at) {
			var o side
			o.update(h.ack, h.win, c.synScale(h.flags), h.opts.bytes())
			add(o)
		}
	}
	return s
}

// leave sends frames in the order of their capture.
func (p *Primary) leave(out []leaving) {
	slices.SortStableFunc(out, func(a, b leaving) int { return cmp.Compare(a.no, b.no) })
	for i := range out {
		if f := out[i].f; f != nil {
			p.forward(f, &out[i].dgram)
			continue
		}
		c, h := out[i].c, &out[i].piece
		if out[i].rst {
			p.sendRST(c, c.pvmSeen)
			continue
		}
		if c.floating {
			c.floating, c.rooted = false, true
			c.released = h.start
		}
		p.send(c, h, h.end, true)
		p.unheld(c, h)
	}
}

// goSolo: the SVM is gone and the arbiter was won: what is held leaves, and what
// is still on its way (R15, R21).
func (p *Primary) goSolo() {
	p.solo, p.frozen = true, false
	cs := p.all()
	var out []leaving
	for _, c := range cs {
		c.s = c.p
		c.synWait = false
		for _, h := range c.held.view() {
			out = append(out, leaving{no: h.no, c: c, piece: h})
		}
		c.held.reset()
		if c.rstHeld {
			out = append(out, leaving{no: c.rst.no, c: c, piece: c.rst, rst: true})
		}
	}
	fs := p.allFlows()
	for _, f := range fs {
		for _, g := range f.held.view() {
			out = append(out, leaving{no: g.no, f: f, dgram: g})
		}
		f.held.reset()
	}
	p.leave(out)
	for _, f := range fs {
		p.removeFlow(f)
	}
	for _, c := range cs {
		p.acks(c)
		p.remove(c, ReasonExpired)
	}
	p.next = nil
}

// pass sends a frame that was captured before P went solo, as it is.
func (p *Primary) pass(s *Segment) {
	if s.Slot == NoSlot && (len(s.Header) == 0 || len(s.Header) > len(Effect{}.Header)) {
		return
	}
	e := p.emit(OpSend, &s.Tuple)
	e.Slot, e.Free = s.Slot, s.Slot != NoSlot
	e.To = s.Len
	e.Seq, e.Ack, e.Win, e.Urg, e.Flags = s.Seq, s.Ack, s.Win, s.Urg, s.Flags
	e.OptLen = uint8(copy(e.Opts[:], s.Opts))
	if s.Slot == NoSlot {
		e.HdrLen = uint8(copy(e.Header[:], s.Header))
	}
	p.stats.ReleasedPackets++
	p.stats.ReleasedBytes += uint64(s.Len)
}
