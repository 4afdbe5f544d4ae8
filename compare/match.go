// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"math"
	"time"
)

// pump does all that c's state allows: match, release, acknowledge; then it sets
// the timers. c may be gone afterwards: alive tells.
func (p *Primary) pump(c *conn) (alive bool) {
	if !p.frozen && !c.diverged {
		p.root(c)
		p.checkFIN(c)
		p.advance(c)
	}
	if !p.frozen && !c.diverged {
		p.release(c)
		if p.matchRST(c) && !c.pvmSeen {
			p.remove(c, ReasonReset)
			return false
		}
		p.acks(c)
	}
	p.wait(c)
	return c.heapIdx >= 0
}

// advance moves the compared point as far as both sides agree.
func (p *Primary) advance(c *conn) {
	for i, moved := 0, true; moved && !c.diverged; {
		if c.synWait {
			moved = p.matchSYN(c)
		} else {
			moved = p.matchData(c, &i) || p.matchFIN(c)
		}
	}
}

// advanceTo notes that everything below pos agrees.
func (p *Primary) advanceTo(c *conn, pos uint32) {
	if c.floating {
		c.floating = false
		p.stats.Adopted++
	}
	c.compared = pos
	c.askAt, c.asks = 0, 0
	if !c.rooted && pos-c.low > reach {
		c.rooted = true // a repetition cannot reach below low any more
	}
	p.prune(c)
	p.moved(c)
}

// matchSYN: the SYN agrees when the SVM's has the same options and acknowledges
// the same (R3).
func (p *Primary) matchSYN(c *conn) bool {
	if !p.off(mutR3) {
		if !c.sSYN {
			return false
		}
		if !c.sSYNSame && c.sealed {
			p.diverge(c, ReasonSealed)
			return false
		}
		if !c.sSYNSame {
			p.diverge(c, ReasonSYN)
			return false
		}
	}
	c.synWait = false
	p.unlinkOpen(c)
	p.advanceTo(c, c.inc+1)
	return true
}

// matchData finds a position that both sides know the sum at and moves the
// compared point there (R1). *i is the first held piece that is not verified.
//
// Pieces add up, as long as there is no hole, until one ends at a known position; the
// ends of both guests' segments may never meet, so the first known position in a piece
// behind the first is as good: it costs P a sum over one segment of the SVM, and the
// pieces in front leave whole. A part of the first piece alone is verified only when
// the time to cut comes (R5): what completes it is mostly just behind.
func (p *Primary) matchData(c *conn, i *int) bool {
	last, ok := c.svm.end()
	if !ok || !after(last, c.compared) {
		return false
	}
	held := c.held.view()
	for *i < len(held) && !after(held[*i].end, c.compared) {
		*i++
	}
	at, sum := c.compared, c.sum
	var front point // the last one known in the first piece
	partial := false
	for j := *i; j < len(held); j++ {
		h := &held[j]
		end := h.dataEnd()
		if after(h.start, at) {
			break
		}
		pt, ok := c.svm.last(end)
		switch {
		case !ok || !after(pt.pos, at):
		case pt.pos == end:
			return p.matchAt(c, h, at, sum, pt)
		case j > *i:
			return p.matchAt(c, h, at, sum, c.svm.points.view()[c.svm.search(at+1)])
		default:
			front, partial = pt, true
		}
		if h.fin || !after(last, end) {
			break
		}
		at, sum = end, sum.plus(h.rest)
	}
	switch {
	case !partial:
	case c.cutting:
		return p.matchAt(c, &held[*i], c.compared, c.sum, front)
	case held[*i].gso > 0:
		p.cutLater(c, min(cutSoon, p.cfg.CutDelay))
	default:
		p.cutLater(c, p.cfg.CutDelay)
	}
	return false
}

// matchAt compares up to pt, a position in h, of which P knows the sum from at on; sum
// is that of what lies before.
func (p *Primary) matchAt(c *conn, h *piece, at uint32, sum Sum, pt point) bool {
	part, end := h.rest, h.dataEnd()
	switch {
	case pt.pos == end:
	case pt.pos-at < end-pt.pos:
		part = p.keys.Sum(at, h.bytes(at, pt.pos))
	default:
		part = part.minus(p.keys.Sum(pt.pos, h.bytes(pt.pos, end)))
	}
	if sum.plus(part) != pt.sum && !p.off(mutR1) {
		p.diverge(c, ReasonPayload)
		return false
	}
	h.rest = h.rest.minus(part)
	c.sum = pt.sum
	p.advanceTo(c, pt.pos)
	return true
}

// matchFIN: the FIN agrees when both closed at the same position (R3).
func (p *Primary) matchFIN(c *conn) bool {
	if !c.pFIN.is(c.compared) || !c.sFIN.is(c.compared) && !p.off(mutR3) || c.floating && c.held.len() == 0 {
		return false
	}
	p.advanceTo(c, c.compared+1)
	return true
}

// checkFIN: one side closed where the other goes on, or both at different
// positions (R3). This cannot heal.
func (p *Primary) checkFIN(c *conn) {
	if c.pFIN.ok && (c.sFIN.ok && c.sFIN.pos != c.pFIN.pos || c.svmSaid && after(c.svmEnd, c.pFIN.pos)) ||
		c.sFIN.ok && c.pvmSaid && after(c.pvmEnd, c.sFIN.pos) {
		p.diverge(c, ReasonFIN)
	}
}

// matchRST sends the PVM's RST when the SVM reset the connection too (R3). Where
// P does not know the connection, or the SVM does not, both must be the same.
func (p *Primary) matchRST(c *conn) bool {
	if !c.rstHeld || !c.sRST.ok {
		return false
	}
	h, r := &c.rst, &c.sRST
	same := h.start == r.seq && (h.flags&ACK == 0 || h.ack == r.ack) && (h.flags^r.flags)&0xff == 0 // of a record P has no more
	if !same && (!r.same || !c.pvmSeen) {
		return false
	}
	// The remote believes a RST only at the very position it expects (RFC 5961).
	p.sendRST(c, c.pvmSeen && r.same)
	for i := range c.held.view() {
		p.freePiece(c, &c.held.view()[i], ReasonReset)
	}
	c.held.reset()
	return true
}

// sendRST sends the RST held. atEnd: from the highest position released, if it is at the
// end of what the PVM has said. One from elsewhere answers a segment that was none of
// the connection's, and the remote must not believe it.
func (p *Primary) sendRST(c *conn, atEnd bool) {
	h := &c.rst
	e := p.emit(OpSend, &c.tuple)
	e.Slot, e.Free = h.slot, true
	e.Seq, e.Flags, e.Win = h.start, h.flags, h.win
	if atEnd && !c.sealed && after(h.start, c.released) && (!c.pvmSaid || !after(h.start, c.pvmNext())) {
		e.Seq = c.released
	}
	e.Ack = h.ack
	if h.flags&ACK != 0 && c.pvmSeen && c.canACK(ACK) && !c.sealed {
		m, _ := p.minimum(c, ACK)
		e.Ack = m.ack
	}
	p.urgent(e, h.start, h.urg)
	e.OptLen, e.Opts = h.opts.n, h.opts.b
	p.stats.ReleasedPackets++
	p.unheld(c, h)
	*h, c.rstHeld, c.rstSent = piece{}, false, true
}

// pvm takes in what the PVM said.
func (p *Primary) pvm(s *Segment) {
	if s.Datagram {
		p.pvmDatagram(s)
		return
	}
	if s.Slot == NoSlot && len(s.Payload) == 0 && (s.Len > 0 || s.Flags&(SYN|FIN|RST) != 0) {
		p.noRoom(s)
		return
	}
	if int64(len(s.Payload)) != int64(s.Len) || s.Slot == NoSlot && s.Len > 0 {
		p.drop(s.Slot, ReasonMalformed)
		return
	}
	if p.solo {
		p.pass(s)
		return
	}
	c := p.conns[s.Tuple]
	switch {
	case s.Flags&RST != 0:
		if c == nil {
			if c = p.create(&s.Tuple); c == nil {
				p.drop(s.Slot, ReasonTableFull)
				return
			}
		}
		c.last = p.now
		p.look(c, s)
		p.pvmRST(c, s)
		p.pump(c)
		return
	case s.Flags&SYN != 0:
		if c = p.pvmSYN(c, s); c == nil {
			return
		}
	case c == nil:
		if c = p.createEvicting(&s.Tuple); c == nil {
			p.tableFull(s)
			return
		}
	}
	p.look(c, s)
	c.last, c.pvmSeen = p.now, true
	if c.rstHeld && s.At-c.rst.at > int64(goesOn) {
		p.freeRST(c, ReasonSuperseded)
	}
	grew := p.pvmACK(c, s)
	if s.Len == 0 && s.Flags&(SYN|FIN) == 0 {
		p.pureACK(c, s, grew)
	} else {
		p.hold(c, s)
	}
	if s.Flags&SYN == 0 {
		c.established = true
		p.unlinkHalf(c)
	}
	p.pump(c)
}

// pvmSYN finds or makes the connection that a SYN of the PVM belongs to (R8). It
// gives nil when the frame was dropped.
func (p *Primary) pvmSYN(c *conn, s *Segment) *conn {
	passive := s.Flags&ACK != 0
	opened := false // by the SVM too
	switch {
	case c == nil:
		if c = p.createEvicting(&s.Tuple); c == nil {
			p.tableFull(s)
			return nil
		}
	case c.synSeen && c.inc == s.Seq && (!passive || c.synFlags&ACK == 0 || c.synAck == s.Ack):
		return c // a repetition, or the answer in a simultaneous open
	case !c.synSeen && c.pvmSeen && c.hasInc && c.inc == s.Seq:
		p.drop(s.Slot, ReasonDuplicate)
		return nil
	case passive && c.synFlags&ACK != 0 && c.synAck == s.Ack && after(c.released, c.inc) && !c.closed():
		// A guest that answers with SYN cookies forgets what it answered; the
		// remote does not, and keeps to the first answer.
		p.drop(s.Slot, ReasonSYNCookie)
		return nil
	default:
		opened = c.openOnSVM
		p.freeHeld(c, ReasonSuperseded)
		p.reset(c)
	}
	c.inc, c.hasInc, c.incKnown = s.Seq, true, true
	c.synSeen, c.synWait, c.synFlags, c.synAck, c.synAt = true, true, s.Flags, s.Ack, s.At
	c.synOpts.set(s.Opts)
	c.floating, c.rooted = false, true
	p.setBase(c, s.Seq+1)
	c.compared, c.released = s.Seq, s.Seq
	c.pvmSaid, c.pvmEnd = true, s.Seq+1
	// Scaling holds when both SYNs offer it: a SYN|ACK offers only what was offered.
	if scale, ok := wscale(s.Opts); !ok {
		c.scale = 0
	} else if passive {
		c.scale = int8(scale)
	}
	p.startAnnouncing(c, math.MaxInt)
	p.linkHalf(c)
	if !passive {
		p.pvmOpened(c, opened)
	}
	return c
}

// pvmRST takes a RST of the PVM.
func (p *Primary) pvmRST(c *conn, s *Segment) {
	p.freeRST(c, ReasonDuplicate)
	c.rst.fill(s, p.eventNo)
	c.rstHeld = true
	p.nowHeld(c, &c.rst)
}

// svm takes in a record.
func (p *Primary) svm(s *Segment) {
	if p.solo || !p.inEpoch(s) {
		return
	}
	if s.Datagram {
		p.svmDatagram(s)
		return
	}
	if s.Len > reach || s.Flags&(SYN|FIN) == SYN|FIN {
		p.stats.Drops[ReasonMalformed]++
		return
	}
	if s.Inherited && s.Flags&(SYN|ACK|RST) == SYN {
		p.svmOpened(s)
		return
	}
	c := p.conns[s.Tuple]
	if c == nil {
		// The SVM may be the first to speak on a connection that came with a
		// checkpoint. Late ACKs and FINs of connections that are over come here too,
		// so it is forgotten soon if the PVM says nothing.
		if s.Flags&SYN == 0 && (s.Flags&RST == 0 || s.Inherited) {
			c = p.create(&s.Tuple)
		}
		if c == nil {
			p.stats.Drops[ReasonStray]++
			return
		}
	}
	if s.Flags&RST != 0 {
		if r := (svmReset{true, false, s.Seq, s.Ack, s.Flags, p.now}); c.pvmSeen && p.accept(c, s) {
			r.same = true
			c.sRST = r
		} else if s.Inherited {
			c.sRST = r
		} else {
			p.stats.Drops[ReasonIncarnation]++
			return
		}
		c.last = p.now
		p.pump(c)
		return
	}
	if !p.accept(c, s) {
		p.stats.Drops[ReasonIncarnation]++
		return
	}
	c.last = p.now
	if c.sRST.ok && p.now-c.sRST.at > int64(goesOn) {
		c.sRST = svmReset{}
	}
	if s.Flags&SYN != 0 && c.synSeen {
		c.sSYN, c.sSYNWin = true, s.Win
		// When both ends open at once a SYN turns into a SYN|ACK.
		c.sSYNSame = sameOptions(s.Opts, c.synOpts.bytes()) && (c.synFlags&ACK == 0 || s.Flags&ACK != 0 && s.Ack == c.synAck)
	}
	if c.sSYN || !c.synWait {
		c.announcing, c.annAt = false, 0
	}
	had, next := c.s.ok, c.svmNext()
	dup := !p.svmACK(c, s) && had && s.Flags&(ACK|SYN|FIN) == ACK && s.Len == 0 &&
		s.Ack == c.s.ack && !before(s.Seq, next)
	p.repeated(c, s)
	if !p.svmData(c, s) {
		p.stats.Drops[ReasonStray]++
	}
	if p.pump(c) && dup && !p.frozen && !c.diverged {
		p.sendACK(c, c.released)
	}
}

// goesOn is how long after a RST a guest has to speak on the connection to show that it
// did not mean it; sooner, its segments may have overtaken each other. Linux up to 6.18
// answers with a RST now and then when a segment comes while a handshake ends (its
// lookup without locks finds neither of both sockets); the connection lives on.
const goesOn = 5 * time.Millisecond

// pvmNext is where the PVM's stream goes on.
func (c *conn) pvmNext() uint32 {
	if c.pFIN.ok {
		return c.pFIN.pos + 1
	}
	return c.pvmEnd
}

// svmNext is where the SVM's stream goes on as far as P knows. An ACK from below
// is a keep-alive or window probe, or old.
func (c *conn) svmNext() uint32 {
	switch {
	case c.sFIN.ok:
		return c.sFIN.pos + 1
	case c.svmSaid:
		return c.svmEnd
	}
	return c.compared
}

// svmData takes in the sums and the FIN of a record.
func (p *Primary) svmData(c *conn, s *Segment) bool {
	start := s.PayloadStart()
	end := start + s.Len
	if !c.floating && (!near(start, c.compared) || !near(end, c.compared)) {
		return false
	}
	if s.Len > 0 && !after(start, c.compared) && after(end, c.compared) {
		c.asks = 0 // S has a copy again, if it had lost the first
	}
	if s.Len > 0 || s.Flags&FIN != 0 {
		if !c.svmSaid || after(end, c.svmEnd) {
			c.svmSaid, c.svmEnd = true, end
		}
	}
	p.bounds = p.bounds[:0]
	for _, b := range s.Bounds {
		if b.Pos-start-1 < s.Len-1 {
			p.bounds = append(p.bounds, b)
		}
	}
	if s.Len > 0 {
		p.bounds = append(p.bounds, Bound{end, s.Sum})
		p.learn(c, span{start, p.bounds})
	}
	if s.Flags&FIN != 0 {
		if c.sFIN.ok && c.sFIN.pos != end {
			p.diverge(c, ReasonSVMChanged)
		}
		c.sFIN = mark{true, end}
	}
	return true
}

// answer takes in S's answer to an ask (R5).
func (p *Primary) answer(s *Segment) {
	if p.solo || !p.inEpoch(s) {
		return
	}
	c := p.conns[s.Tuple]
	switch {
	case c == nil || !near(s.Seq, c.compared) || s.Len > reach:
		p.stats.Drops[ReasonStray]++
	case !p.accept(c, s):
		p.stats.Drops[ReasonIncarnation]++
	default:
		if s.Len > 0 {
			p.learn(c, span{s.Seq, []Bound{{s.Seq + s.Len, s.Sum}}})
		}
		p.pump(c)
	}
}

// client notes what ends a connection from the remote's side.
func (p *Primary) client(s *Segment) {
	c := p.conns[s.Tuple]
	if c == nil {
		return
	}
	c.last = p.now
	switch {
	case s.Flags&RST != 0:
		c.clientRST = true
	case s.Flags&(SYN|ACK) == SYN|ACK && c.synSeen && c.scale == scaleUnknown && len(s.Opts) > 0:
		// The answer to an active open settles whether windows are scaled.
		c.scale = 0
		if _, ok := wscale(s.Opts); ok {
			scale, _ := wscale(c.synOpts.bytes())
			c.scale = int8(scale)
		}
	}
	if s.Flags&(FIN|SYN|RST) == FIN {
		c.cliFIN = mark{true, s.End()}
	}
	p.wait(c)
}
