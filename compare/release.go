// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"cmp"
	"time"
)

// hold takes a frame with data, SYN or FIN: what the SVM has confirmed already
// leaves at once, what is new is held, the rest is a duplicate (R4). It reports whether
// anything is held.
func (c *conn) hold(s *Segment) bool {
	var h piece
	h.fill(s, c.eventNo)
	if s.GSO != 0 {
		h.rest = c.keys.Sum(h.base, h.payload)
	}
	if s.Flags&SYN != 0 {
		// Data on a SYN (TCP Fast Open) waits for its repetition, which comes as
		// soon as the remote has acknowledged the SYN alone.
		h.syn, h.fin, h.end, h.rest = true, false, h.start+1, Sum{}
		h.flags &^= FIN | PSH
	}
	if (!c.floating || c.held.len() > 0) && (!near(h.start, c.svm.compared) || !near(h.end, c.svm.compared)) {
		c.drop(h.slot, ReasonStray)
		return false
	}
	if !h.syn && !c.pvm.add(h.dataEnd(), h.fin) {
		c.drop(h.slot, ReasonMalformed)
		return false
	}
	whole := h
	i, fresh := 0, true
	if !c.floating && before(h.start, c.svm.compared) {
		h.start = minSeq(h.end, c.svm.compared)
		fresh = h.start != h.end
	}
	if fresh {
		i, fresh = c.held.trim(&h)
	}
	if whole.fin {
		c.finAt, c.finAgain = cmp.Or(c.finAt, c.now), c.now
	}
	switch {
	case !c.floating && before(whole.start, c.svm.compared):
		c.repeat(&whole, !fresh)
	case !fresh:
		c.drop(h.slot, ReasonDuplicate)
	}
	if !fresh {
		return false
	}
	if h.start != whole.start || h.end != whole.end {
		h.rest = c.keys.Sum(h.start, h.bytes(h.start, h.dataEnd()))
	}
	c.held.insert(i, &h)
	if !h.syn {
		c.rstSent, c.svmRST.ok = false, false // it goes on after all
	}
	return true
}

// repeat sends what lies below the compared point of a frame that the PVM
// retransmits (R4), or drops it when it must not leave now. last: nothing else
// of the frame is kept.
func (c *conn) repeat(h *piece, last bool) {
	n := len(h.payload)
	if why := c.mayRepeat(h); why != ReasonNone {
		if last {
			c.drop(h.slot, why)
		}
		return
	}
	if c.sealed && (len(h.payload) != n || !c.whole(h, c.svm.compared)) {
		if last {
			c.drop(h.slot, ReasonSealed)
		}
		return
	}
	if c.synHeld() { // it ends with this: what waited for the SYN leaves, and the SVM may have waited for that
		c.moved()
	}
	c.send(h, minSeq(h.end, c.svm.compared), last)
}

func (c *conn) mayRepeat(h *piece) Reason {
	switch {
	case c.frozen:
		return ReasonFrozen
	case c.diverged:
		return ReasonDiverged
	case c.off(mutR4):
		return ReasonDuplicate
	case !c.acks.may(h.flags):
		return ReasonNoACK
	case !h.syn && c.synHeld():
		return ReasonDuplicate
	case h.syn && c.syn.met && !c.syn.svm:
		return ReasonDuplicate
	case h.syn && c.syn.met && !c.syn.svmSame:
		c.diverge(ReasonSYN, c.syn.differs)
		return ReasonSYN
	case h.syn && c.syn.met:
		return ReasonNone
	case !c.rooted && c.adopted && before(h.start, c.low):
		// The remote has it, and the PVM missed that ACK: the frame leaves without the
		// bytes, which nobody has compared, for the remote to repeat its ACK.
		h.payload, h.end, h.fin = nil, h.base, false
		return ReasonNone
	case !c.rooted && before(h.start, c.low):
		// The connection was met in mid-stream: nobody has compared this.
		c.diverge(ReasonUnknownPast, "")
		return ReasonUnknownPast
	case h.syn:
		return ReasonNone
	}
	// A guest may retransmit other bytes than before (its page cache changed under a
	// sendfile). Where the SVM's sums are still known they are checked again.
	to := minSeq(h.dataEnd(), c.svm.compared)
	from, ok := c.svm.find(h.start)
	end, okEnd := c.svm.find(to)
	if !ok || !okEnd || c.off(mutR1) {
		return ReasonNone
	}
	sum := h.rest
	if to != h.dataEnd() {
		sum = c.keys.Sum(h.start, h.bytes(h.start, to))
	}
	switch {
	case from.plus(sum) == end:
		return ReasonNone
	case to-h.start == 1:
		// The byte of a keep-alive is arbitrary (RFC 1122, 4.2.3.6): it leaves without.
		h.payload, h.end, h.fin = nil, h.base, false
		return ReasonNone
	}
	c.diverge(ReasonPayload, bytesOf(c, h.start, to))
	return ReasonPayload
}

// release sends what lies below the compared point. Of a frame that lies across
// it the verified part is cut off (R5): at a GSO boundary at once, elsewhere
// when nothing better came within CutDelay.
func (c *conn) release() {
	for c.held.len() > 0 {
		h := c.held.first()
		if !after(c.svm.compared, h.start) || !c.acks.may(h.flags) || c.sealed && !c.whole(h, c.svm.compared) || !h.syn && c.synHeld() {
			break
		}
		if !after(h.end, c.svm.compared) {
			c.send(h, h.end, true)
			c.held.left()
			c.cuts = 0
			continue
		}
		switch to := c.svm.compared; {
		case c.off(mutR5):
		case to == h.dataEnd():
			c.sendFront(h, to) // data need not wait for its FIN (R3)
		default:
			if h.gso > 0 {
				if to -= (to - h.base) % uint32(h.gso); after(to, h.start) {
					c.sendFront(h, to)
				}
			}
			if after(c.svm.compared, h.start) {
				delay := c.cfg.CutDelay
				if h.gso == 0 {
					delay = c.cfg.cutDelay(&c.svm.extent, c.svm.compared)
				}
				c.cuts.later(c.now, delay)
			}
		}
		return
	}
}

// cutSoon is how long a GSO frame waits for the digest record of its rest. Cut in two it
// costs twice as much to send, and P has to digest its front; the rest comes sooner, as a
// rule, or only after the remote has received the front.
const cutSoon = 100 * time.Microsecond

// atOnce is the delay of what is done as soon as the events that have come are taken in.
const atOnce = time.Nanosecond

// cutDelay is how long a frame waits for a common boundary until it is cut at pos, up to which
// the SVM's records reach.
func (c *Config) cutDelay(svm *extent, pos uint32) time.Duration {
	if svm.pauses(pos) {
		return atOnce
	}
	return c.CutDelay
}

// cutClock is when the first held frame is cut (R5); 0: never.
type cutClock int64

// later sets the time, unless it is earlier.
func (k *cutClock) later(now int64, delay time.Duration) {
	if at := now + int64(delay); *k == 0 || at < int64(*k) {
		*k = cutClock(at)
	}
}

// cut verifies and sends what can be of the first held frame (R5).
func (c *conn) cut() {
	c.cuts = 0
	if c.diverged || c.held.len() == 0 {
		return
	}
	waited := after(c.svm.compared, c.held.first().start) // below a boundary
	c.cutting = true
	c.advance()
	c.cutting = false
	if c.diverged {
		return
	}
	c.release()
	if c.held.len() > 0 {
		h := c.held.first()
		if (waited || h.gso == 0) && after(c.svm.compared, h.start) && c.acks.may(h.flags) && !c.off(mutR5) && !c.sealed && !c.synHeld() {
			c.sendFront(h, c.svm.compared)
		}
	}
	c.sendGrownACK(c.dataDue())
	c.retime()
}

func (c *conn) sendFront(h *piece, to uint32) {
	c.send(h, to, false)
	h.start = to
	c.cuts = 0
}

// dataDue reports whether what is held leaves soon: the SVM has sent it too.
func (c *conn) dataDue() bool { return c.held.len() > 0 && c.svm.ahead() }

// pureACK takes an ACK of the PVM that nothing else is in.
func (c *conn) pureACK(s *Segment, grew bool) {
	if s.Slot != NoSlot {
		c.drop(s.Slot, ReasonDuplicate)
	}
	c.pureUpTo = mark{true, s.Ack}
	if c.floating && c.svm.points.len() == 0 && (!c.placed || after(s.Seq, c.svm.compared)) {
		c.svm.expect(s.Seq)
		c.released, c.placed = s.Seq, true
		return
	}
	if c.frozen || c.diverged || !c.acks.may(ACK) {
		return
	}
	switch {
	case before(s.Seq, c.released) && near(s.Seq, c.released):
		// A keep-alive or window probe has nothing new (R4).
		c.sendACK(s.Seq)
	case grew || s.Ack != c.acks.pvm.ack:
	case after(c.acks.svm.ack, c.acks.pvm.ack), c.acks.news(s.Opts):
		// The PVM misses what the SVM has: its duplicate ACKs make the remote repeat it. Those for
		// what both miss leave when the SVM sends its own, and once more where the PVM names a block
		// after the SVM: a remote that knows SACK counts blocks.
		c.sendACK(c.released)
	}
}
