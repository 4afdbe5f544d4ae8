// SPDX-License-Identifier: Apache-2.0

package compare

// adopt recovers a connection of an earlier daemon (R23). What the remote has acknowledged
// had left, so both guests transmitted it: the comparison goes on from there. The PVM
// retransmits what was held, and what had left but is not acknowledged, unless the
// remote's ACK has come since. So the caller may be asked to adopt again, with a higher
// position (see OpAdopt).
func (p *Primary) adopt(s *Segment) {
	if p.solo || s.Datagram || p.off(mutR23) {
		return
	}
	c := p.conns.byTuple[s.Tuple]
	if c == nil {
		if c = p.conns.create(&s.Tuple); c == nil {
			p.stats.Drops[ReasonTableFull]++
			return
		}
	}
	switch {
	case c.floating && (c.held.len() == 0 || near(c.held.view()[0].start, s.Seq)):
		p.stats.Adopted++
		c.pvmSeen, c.established, c.adopted, c.floating = true, true, true, false
		c.released, c.placed = s.Seq, true
	case !c.adopted || !after(s.Seq, c.svm.compared) || !near(s.Seq, c.svm.compared):
		return
	}
	c.acked(s.Seq)
	p.pump(c)
}

// acked moves c's base up to una: nobody needs to compare what is below.
func (c *conn) acked(una uint32) {
	n, held := 0, c.held.view()
	for n < len(held) && !after(held[n].end, una) {
		n++
	}
	c.held.free(0, n, ReasonAcked)
	for i := range c.held.view() {
		h := &c.held.view()[i]
		if h.start = maxSeq(h.start, una); !h.syn {
			h.rest = c.keys.Sum(h.start, h.bytes(h.start, h.dataEnd()))
		}
	}
	c.sameBytes(c.svm.rebase(una))
	c.low, c.released = una, maxSeq(c.released, una)
	c.cuts = 0
	c.moved()
}
