// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"cmp"
	"slices"
	"time"
)

// inEpoch reports whether a digest record is of this epoch. One of the next epoch is kept
// until the commit (R17), one of an earlier epoch is dropped.
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

// freeze: nothing leaves from now on (R13, R15).
func (p *Primary) freeze() {
	if p.frozen || p.off(mutR15) {
		return
	}
	p.frozen = true
	for _, t := range p.timers {
		if t.conn != nil {
			t.conn.acks.freeze()
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
	for _, c := range p.conns.all() {
		if c.diverged && diverged == nil {
			diverged = c
		}
		p.restart(c)
	}
	for _, f := range p.datagrams.all() {
		p.datagrams.restart(f)
	}
	if diverged != nil {
		// The reason for that checkpoint is still there.
		p.checkpoint(&diverged.tuple, diverged.why, "")
	}
}

// restart sets c going again after a freeze.
func (p *Primary) restart(c *conn) {
	c.stall.begin(p.now)
	if c.syn.announcing {
		c.syn.announce(p.now, c.syn.left)
	}
	p.pump(c)
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
// the PVM transmitted before leaves (R14), everything else starts from there (R8).
func (p *Primary) commit(epoch uint32, at int64) {
	p.epoch, p.frozen = epoch, false
	cs := p.conns.all()
	var out []leaving
	for _, c := range cs {
		out = c.commit(at, out)
	}
	fs := p.datagrams.all()
	for _, f := range fs {
		out = p.datagrams.commit(f, at, out)
	}
	p.stats.CommitWait = 0
	for i := range out {
		if l := &out[i]; !l.rst {
			p.stats.CommitWait = max(p.stats.CommitWait, time.Duration(at-max(l.piece.at, l.dgram.at)))
		}
	}
	p.leave(out)
	for _, c := range cs {
		if !c.pvmSeen {
			p.conns.remove(c, ReasonExpired) // known from the old SVM alone
			continue
		}
		if !c.floating && !c.syn.waiting {
			base := c.released
			if c.syn.seen && base == c.syn.isn {
				base++ // the SYN found no slot
			}
			c.svm.setBase(base)
			c.rooted, c.adopted = true, false
		}
		p.restart(c)
	}
	for _, f := range fs {
		p.datagrams.restart(f)
	}
	next := p.next
	p.next = nil
	for i := range next {
		p.eventNo++
		p.svm(&next[i])
	}
}

// commit brings c to its state at a commit and appends to out what leaves. What was
// captured behind the commit point starts afresh, with the SVM of the new epoch; dropped, it
// would cost its connection a retransmission timeout of the guest.
func (c *conn) commit(at int64, out []leaving) []leaving {
	old := func(t int64) bool { return c.before(t, at) }
	c.acks.commit(old, c.held.view())
	for _, h := range c.held.take(func(h *piece) bool { return old(h.at) }) {
		out = append(out, leaving{no: h.no, c: c, piece: h})
	}
	for i := range c.held.view() {
		if h := &c.held.view()[i]; !h.syn {
			h.rest = c.keys.Sum(h.start, h.bytes(h.start, h.dataEnd()))
		}
	}
	if c.held.hasRST && old(c.held.rst.at) {
		out = append(out, leaving{no: c.held.rst.no, c: c, rst: true}) // a young one waits for the SVM's: no guest repeats a RST
	}
	fresh := c.syn.waiting && !old(c.syn.at) // opened in the new epoch
	c.svm.forget()
	c.opens.unlink(c)
	c.diverged, c.why = false, ReasonNone
	c.syn.forgetSVM()
	c.svm.extent, c.svmRST, c.svmAt, c.openOnSVM = extent{}, svmReset{}, mark{}, false
	c.cuts, c.query = 0, backoff{}
	c.stall.stop()
	c.asks.stop()
	if fresh {
		c.svm.begin(c.inc.isn)
		if c.syn.flags&ACK == 0 {
			c.opens.link(c, false)
		}
		return out
	}
	c.inc.inherited, c.inc.settled = true, c.inc.settled || !c.floating
	c.forgotten = false
	c.syn.commit(c.established)
	return out
}

// leave sends frames in the order of their capture.
func (p *Primary) leave(out []leaving) {
	slices.SortStableFunc(out, func(a, b leaving) int { return cmp.Compare(a.no, b.no) })
	for i := range out {
		if f := out[i].f; f != nil {
			p.datagrams.forward(&f.tuple, &out[i].dgram)
			continue
		}
		c, h := out[i].c, &out[i].piece
		if out[i].rst {
			c.releaseRST(c.pvmSeen)
			continue
		}
		if c.floating {
			c.floating, c.rooted = false, true
			c.released = h.start
		}
		c.send(h, h.end, true)
	}
}

// goSolo: the SVM is gone and the arbiter was won: what is held leaves, and what
// is still on its way (R15, R21).
func (p *Primary) goSolo() {
	p.solo, p.frozen = true, false
	cs := p.conns.all()
	var out []leaving
	for _, c := range cs {
		c.acks.trustPVM()
		c.syn.matched()
		for _, h := range c.held.take(func(*piece) bool { return true }) {
			out = append(out, leaving{no: h.no, c: c, piece: h})
		}
		if c.held.hasRST {
			out = append(out, leaving{no: c.held.rst.no, c: c, rst: true})
		}
	}
	fs := p.datagrams.all()
	for _, f := range fs {
		for _, g := range p.datagrams.take(f) {
			out = append(out, leaving{no: g.no, f: f, dgram: g})
		}
	}
	p.leave(out)
	for _, f := range fs {
		p.datagrams.remove(f)
	}
	for _, c := range cs {
		c.sendGrownACK(false)
		p.conns.remove(c, ReasonExpired)
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
