// SPDX-License-Identifier: Apache-2.0

package compare

// advance moves the compared point as far as both sides agree.
func (c *conn) advance() {
	for i, moved := 0, true; moved && !c.diverged; {
		if c.syn.waiting {
			moved = c.matchSYN()
		} else {
			moved = c.matchData(&i) || c.matchFIN()
		}
	}
}

// advanceTo notes that everything below pos agrees, and has sum.
func (c *conn) advanceTo(pos uint32, sum Sum) {
	if c.floating {
		c.floating = false
		c.stats.Adopted++
	}
	c.svm.advance(pos, sum)
	c.asks.stop()
	if !c.rooted && pos-c.low > reach {
		c.rooted = true // a repetition cannot reach below low any more
	}
	c.moved()
}

// matchSYN: the SYN agrees when the SVM's has the same options and acknowledges
// the same (R3).
func (c *conn) matchSYN() bool {
	if !c.off(mutR3) {
		if !c.syn.svm {
			return false
		}
		if !c.syn.svmSame && c.sealed {
			c.diverge(ReasonSealed, c.syn.differs)
			return false
		}
		if !c.syn.svmSame {
			c.diverge(ReasonSYN, c.syn.differs)
			return false
		}
	}
	c.syn.matched()
	c.opens.unlink(c)
	c.advanceTo(c.inc.isn+1, c.svm.sum)
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
func (c *conn) matchData(i *int) bool {
	last, ok := c.svm.end()
	if !ok || !after(last, c.svm.compared) {
		return false
	}
	held := c.held.view()
	for *i < len(held) && !after(held[*i].end, c.svm.compared) {
		*i++
	}
	at, sum := c.svm.compared, c.svm.sum
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
			return c.matchAt(h, at, sum, pt)
		case j > *i:
			return c.matchAt(h, at, sum, c.svm.points.view()[c.svm.search(at+1)])
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
		return c.matchAt(&held[*i], c.svm.compared, c.svm.sum, front)
	case held[*i].gso > 0:
		c.cuts.later(c.now, min(cutSoon, c.cfg.CutDelay))
	default:
		c.cuts.later(c.now, c.cfg.cutDelay(&c.svm.extent, front.pos))
	}
	return false
}

// matchAt compares up to pt, a position in h, of which P knows the sum from at on; sum
// is that of what lies before.
func (c *conn) matchAt(h *piece, at uint32, sum Sum, pt point) bool {
	part, end := h.rest, h.dataEnd()
	switch {
	case pt.pos == end:
	case pt.pos-at < end-pt.pos:
		part = c.keys.Sum(at, h.bytes(at, pt.pos))
	default:
		part = part.minus(c.keys.Sum(pt.pos, h.bytes(pt.pos, end)))
	}
	if sum.plus(part) != pt.sum && !c.off(mutR1) {
		c.diverge(ReasonPayload, bytesOf(c, c.svm.compared, pt.pos))
		return false
	}
	h.rest = h.rest.minus(part)
	c.advanceTo(pt.pos, pt.sum)
	return true
}

// matchFIN: the FIN agrees when both closed at the same position (R3).
func (c *conn) matchFIN() bool {
	if !c.pvm.fin.is(c.svm.compared) || !c.svm.extent.fin.is(c.svm.compared) && !c.off(mutR3) || c.floating && c.held.len() == 0 {
		return false
	}
	c.advanceTo(c.svm.compared+1, c.svm.sum)
	return true
}

// checkFIN: one side closed where the other goes on, or both at different
// positions (R3). No later segment can change that.
func (c *conn) checkFIN() {
	if c.pvm.goesOn(&c.svm.extent) || c.svm.extent.goesOn(&c.pvm) {
		c.diverge(ReasonFIN, finOf(c))
	}
}

// matchRST sends the PVM's RST when the SVM reset the connection too (R3). Where
// P does not know the connection, or the SVM does not, both must be the same.
func (c *conn) matchRST() bool {
	if !c.held.hasRST || !c.svmRST.ok {
		return false
	}
	h, r := &c.held.rst, &c.svmRST
	same := h.start == r.seq && (h.flags&ACK == 0 || h.ack == r.ack) && (h.flags^r.flags)&0xff == 0 // of a record P has no more
	if !same && (!r.same || !c.pvmSeen || refusesSYN(h.flags, h.start)) {
		return false
	}
	// The remote believes a RST only at the very position it expects (RFC 5961).
	c.releaseRST(c.pvmSeen && r.same)
	if c.rstSent || !c.pvmSeen {
		c.held.clear(ReasonReset)
		return true
	}
	c.svmRST = svmReset{}
	return false
}

// releaseRST sends the RST held. atEnd: from the highest position released, if it is at
// the end of what the PVM has transmitted. One from elsewhere answers a segment that was
// none of the connection's: the remote must not believe it, and the connection goes on.
func (c *conn) releaseRST(atEnd bool) {
	h := c.held.takeRST()
	seq, refuses := h.start, refusesSYN(h.flags, h.start)
	beyond := c.pvm.known && after(seq, c.pvm.next(seq))
	c.rstSent = c.rstSent || !refuses && !(c.rooted && (beyond || !after(seq, c.inc.isn)))
	if atEnd && c.placed && !refuses && !c.sealed && after(seq, c.released) && !beyond {
		seq = c.released
	}
	c.sendRST(&h, seq, c.pvmSeen && !refuses)
}

// refusesSYN reports whether a RST answers a SYN that no connection is there for: it is of none, also if one has its ports.
func refusesSYN(f Flags, seq uint32) bool { return f&(RST|ACK) == RST|ACK && seq == 0 }

// sameBytes takes in whether what became known of the SVM's stream agrees with what was.
// An SVM that transmits other bytes at the same position is in doubt.
func (c *conn) sameBytes(same bool) {
	if !same && !c.off(mutR1) {
		c.diverge(ReasonSVMChanged, "")
	}
}

// root gives a floating connection its base: the first position that the PVM
// holds. While nothing has been verified a lower one may still come, when frames
// of several queues overtake each other.
func (c *conn) root() {
	if !c.floating || c.held.len() == 0 {
		return
	}
	base := c.held.first().start
	if c.svm.compared == base && c.svm.points.len() > 0 {
		return
	}
	c.sameBytes(c.svm.rebase(base))
	c.low, c.released, c.placed = base, base, true
}

// goOn: on a connection that P met in mid-stream both guests go on behind what P has seen of them. What lies between left
// before P met it, and once the remote has acknowledged that no guest sends it again. If one does, that is an unknown past.
func goOn(c *conn) {
	pos := c.pvmAt.pos
	if c.held.len() > 0 {
		pos = c.held.first().start
	}
	if c.syn.seen || c.floating || c.adopted || !c.pvmAt.ok || !c.svmAt.ok || !after(pos, c.svm.compared) || !near(pos, c.svm.compared) ||
		before(c.svmAt.pos, pos) || c.svm.sent(pos) {
		return
	}
	c.sameBytes(c.svm.rebase(pos))
	c.low, c.released, c.rooted = pos, pos, false
}

// svmData takes in the sums and the FIN of a record.
func (c *conn) svmData(s *Segment) bool {
	start := s.PayloadStart()
	end := start + s.Len
	if !c.floating && (!near(start, c.svm.compared) || !near(end, c.svm.compared)) {
		return false
	}
	if s.Len > 0 && !after(start, c.svm.compared) && after(end, c.svm.compared) {
		c.asks.n = 0 // S has a copy again, if it had lost the first
	}
	if s.Len > 0 || s.Flags&FIN != 0 {
		c.svm.extent.reach(end)
	}
	if s.Len > 0 && s.Flags&PSH != 0 {
		c.svm.extent.pushed = mark{true, end}
	}
	c.bounds = c.bounds[:0]
	for _, b := range s.Bounds {
		if b.Pos-start-1 < s.Len-1 {
			c.bounds = append(c.bounds, b)
		}
	}
	if s.Len > 0 {
		c.bounds = append(c.bounds, Bound{end, s.Sum})
		c.sameBytes(c.svm.learn(span{start, c.bounds}))
	}
	if s.Flags&FIN != 0 {
		if !c.svm.extent.close(end) {
			c.diverge(ReasonSVMChanged, "")
		}
	}
	return true
}
