// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"sort"
	"time"
)

// piece is what is still to leave of a frame that the PVM sent: positions
// [start, end), of which the first may be a SYN and the last a FIN.
type piece struct {
	start, end uint32
	base       uint32 // position of payload[0]
	syn, fin   bool
	flags      Flags
	slot       Slot
	gso        uint16
	win, urg   uint16
	ack        uint32
	payload    []byte
	large      bool
	rest       Sum // of the data at and above the compared point
	at         int64
	no         uint64 // of the event: the order of capture
	opts       options
}

func (h *piece) fill(s *Segment, no uint64) {
	*h = piece{
		start: s.Seq, end: s.End(), base: s.PayloadStart(),
		fin: s.Flags&FIN != 0, flags: s.Flags,
		slot: s.Slot, large: s.Large, gso: s.GSO, win: s.Win, urg: s.Urg, ack: s.Ack,
		payload: s.Payload, rest: s.Sum, at: s.At, no: no,
	}
	h.opts.set(s.Opts)
}

// dataEnd is the position behind the data.
func (h *piece) dataEnd() uint32 {
	if h.fin {
		return h.end - 1
	}
	return h.end
}

// seq is the sequence number that the frame was captured with, frameEnd the position
// behind all of it.
func (h *piece) seq() uint32 {
	if h.syn {
		return h.base - 1
	}
	return h.base
}

func (h *piece) frameEnd() uint32 {
	end := h.base + uint32(len(h.payload))
	switch {
	case h.syn:
		return h.base
	case h.flags&FIN != 0:
		return end + 1
	}
	return end
}

func (h *piece) bytes(from, to uint32) []byte { return h.payload[from-h.base : to-h.base] }

// freePiece drops what is left of a held frame.
func (p *Primary) freePiece(c *conn, h *piece, why Reason) {
	p.unheld(c, h)
	p.drop(h.slot, why)
}

func (p *Primary) unheld(c *conn, h *piece) {
	p.took(c, h, -1)
	p.stats.HeldPackets--
	p.stats.HeldBytes -= len(h.payload)
}

func (p *Primary) nowHeld(c *conn, h *piece) {
	p.took(c, h, 1)
	p.stats.HeldPackets++
	p.stats.HeldBytes += len(h.payload)
}

// hold takes a frame with data, SYN or FIN: what the SVM has confirmed already
// leaves at once, what is new is held, the rest is a duplicate (R4).
func (p *Primary) hold(c *conn, s *Segment) {
	var h piece
	h.fill(s, p.eventNo)
	if s.Flags&SYN != 0 {
		// Data on a SYN (TCP Fast Open) waits for its repetition, which comes as
		// soon as the remote has acknowledged the SYN alone.
		h.syn, h.fin, h.end, h.rest = true, false, h.start+1, Sum{}
		h.flags &^= FIN | PSH
	}
	if (!c.floating || c.held.len() > 0) && (!near(h.start, c.compared) || !near(h.end, c.compared)) {
		p.drop(h.slot, ReasonStray)
		return
	}
	if !h.syn && !c.closeAt(&h) {
		p.drop(h.slot, ReasonMalformed)
		return
	}
	whole := h
	i, fresh := 0, true
	if !c.floating && before(h.start, c.compared) {
		h.start = minSeq(h.end, c.compared)
		fresh = h.start != h.end
	}
	if fresh {
		i, fresh = p.trim(c, &h)
	}
	switch {
	case !c.floating && before(whole.start, c.compared):
		p.repeat(c, &whole, !fresh)
	case !fresh:
		p.drop(h.slot, ReasonDuplicate)
	}
	if !fresh {
		return
	}
	if h.start != whole.start || h.end != whole.end {
		h.rest = p.keys.Sum(h.start, h.bytes(h.start, h.dataEnd()))
	}
	c.held.insert(i, h)
	p.nowHeld(c, &h)
	if !h.syn {
		c.rstSent, c.sRST.ok = false, false // it goes on after all
	}
	p.makeRoom(c, classOf(h.large))
}

// closeAt notes where the PVM's data and stream end, and refuses what
// contradicts an earlier FIN.
func (c *conn) closeAt(h *piece) bool {
	end := h.dataEnd()
	if c.pFIN.ok && (after(end, c.pFIN.pos) || h.fin && !c.pFIN.is(end)) {
		return false
	}
	if h.fin {
		if c.pvmSaid && before(end, c.pvmEnd) {
			return false
		}
		c.pFIN = mark{true, end}
	}
	if !c.pvmSaid || after(end, c.pvmEnd) {
		c.pvmSaid, c.pvmEnd = true, end
	}
	return true
}

// trim cuts h down to what is not held yet and gives its place. A held piece
// that h covers with room on its left is replaced by h, so that a frame always
// stays one piece.
func (p *Primary) trim(c *conn, h *piece) (at int, fresh bool) {
	held := c.held.view()
	n := len(held)
	if n == 0 || !before(h.start, held[n-1].end) {
		return n, true
	}
	i := sort.Search(n, func(i int) bool { return after(held[i].end, h.start) })
	for ; i < n && !after(held[i].start, h.start); i++ {
		if !after(h.end, held[i].end) {
			return 0, false
		}
		h.start = held[i].end
	}
	j := i
	for ; j < n && !after(held[j].end, h.end); j++ {
		p.freePiece(c, &held[j], ReasonDuplicate)
	}
	c.held.remove(i, j)
	if held = c.held.view(); i < len(held) && before(held[i].start, h.end) {
		h.end, h.fin = held[i].start, false
	}
	return i, true
}

// repeat sends what lies below the compared point of a frame that the PVM
// repeats (R4), or drops it when it must not leave now. last: nothing else
// of the frame is kept.
func (p *Primary) repeat(c *conn, h *piece, last bool) {
	said := len(h.payload)
	if why := p.mayRepeat(c, h); why != ReasonNone {
		if last {
			p.drop(h.slot, why)
		}
		return
	}
	if c.sealed && (len(h.payload) != said || !p.whole(c, h)) {
		if last {
			p.drop(h.slot, ReasonSealed)
		}
		return
	}
	p.send(c, h, minSeq(h.end, c.compared), last)
}

func (p *Primary) mayRepeat(c *conn, h *piece) Reason {
	switch {
	case p.frozen:
		return ReasonFrozen
	case c.diverged:
		return ReasonDiverged
	case p.off(mutR4):
		return ReasonDuplicate
	case !c.canACK(h.flags):
		return ReasonNoACK
	case !c.rooted && c.adopted && before(h.start, c.low):
		// The remote has it, and the PVM missed that ACK: ask without the bytes, which
		// nobody has compared.
		h.payload, h.end, h.fin = nil, h.base, false
		return ReasonNone
	case !c.rooted && before(h.start, c.low):
		// The connection was met in mid-stream: nobody has compared this.
		p.diverge(c, ReasonUnknownPast)
		return ReasonUnknownPast
	case h.syn:
		return ReasonNone
	}
	// A guest may repeat other bytes than it said (its page cache changed under a
	// sendfile). Where the SVM's sums are still known they are checked again.
	to := minSeq(h.dataEnd(), c.compared)
	from, ok := c.svm.find(h.start)
	end, okEnd := c.svm.find(to)
	if !ok || !okEnd || p.off(mutR1) {
		return ReasonNone
	}
	sum := h.rest
	if to != h.dataEnd() {
		sum = p.keys.Sum(h.start, h.bytes(h.start, to))
	}
	switch {
	case from.plus(sum) == end:
		return ReasonNone
	case to-h.start == 1:
		// The byte of a keep-alive is arbitrary (RFC 1122, 4.2.3.6): ask without it.
		h.payload, h.end, h.fin = nil, h.base, false
		return ReasonNone
	}
	p.diverge(c, ReasonPayload)
	return ReasonPayload
}

// release sends what lies below the compared point. Of a frame that lies across
// it the verified part is cut off (R5): at a GSO boundary at once, elsewhere
// when nothing better came within CutDelay.
func (p *Primary) release(c *conn) {
	for c.held.len() > 0 {
		h := &c.held.view()[0]
		if !after(c.compared, h.start) || !c.canACK(h.flags) || c.sealed && !p.whole(c, h) {
			break
		}
		if !after(h.end, c.compared) {
			p.send(c, h, h.end, true)
			p.unheld(c, h)
			c.held.drop(1)
			c.cutAt = 0
			continue
		}
		switch to := c.compared; {
		case p.off(mutR5):
		case to == h.dataEnd():
			p.sendFront(c, h, to) // data need not wait for its FIN (R3)
		default:
			if h.gso > 0 {
				if to -= (to - h.base) % uint32(h.gso); after(to, h.start) {
					p.sendFront(c, h, to)
				}
			}
			if after(c.compared, h.start) {
				p.cutLater(c, p.cfg.CutDelay)
			}
		}
		return
	}
}

// cutSoon is how long a GSO frame waits for the rest of what the SVM says of it. Cut in
// two it costs twice as much to send, and P has to sum its front up; the rest comes
// sooner, as a rule, or only after the remote has heard the front.
const cutSoon = 100 * time.Microsecond

// cutLater sets the time to cut the first held frame (R5), unless it is set.
func (p *Primary) cutLater(c *conn, delay time.Duration) {
	if c.cutAt == 0 {
		c.cutAt = p.now + int64(delay)
	}
}

// cut verifies and sends what can be of the first held frame (R5).
func (p *Primary) cut(c *conn) {
	c.cutAt = 0
	if c.diverged || c.held.len() == 0 {
		return
	}
	waited := after(c.compared, c.held.view()[0].start) // below a boundary
	c.cutting = true
	p.advance(c)
	c.cutting = false
	if c.diverged {
		return
	}
	p.release(c)
	if c.held.len() > 0 {
		h := &c.held.view()[0]
		if (waited || h.gso == 0) && after(c.compared, h.start) && c.canACK(h.flags) && !p.off(mutR5) && !c.sealed {
			p.sendFront(c, h, c.compared)
		}
	}
	p.acks(c)
	p.retime(c)
}

func (p *Primary) sendFront(c *conn, h *piece, to uint32) {
	p.send(c, h, to, false)
	h.start = to
	c.cutAt = 0
}

// send sends h up to position to. last: the slot is free then.
func (p *Primary) send(c *conn, h *piece, to uint32, last bool) {
	e := p.emit(OpSend, &c.tuple)
	e.Slot, e.Free = h.slot, last
	if end := maxSeq(h.start, to); after(end, c.released) {
		c.released = end
	}
	p.stats.ReleasedPackets++
	if c.sealed {
		e.Seq, e.Flags, e.To = h.seq(), h.flags, uint32(len(h.payload))
		p.stats.ReleasedBytes += uint64(e.To)
		p.asItWas(c, e, h.ack, h.win, h.urg, &h.opts)
		return
	}
	e.Seq, e.Ack, e.Flags = h.start, h.ack, h.flags // without the flag the ACK says nothing
	if !h.syn {
		e.From = h.start - h.base
		e.To = minSeq(to, h.dataEnd()) - h.base
	}
	if !h.fin || to != h.end {
		e.Flags &^= FIN
	}
	if e.From == e.To || e.To != uint32(len(h.payload)) {
		e.Flags &^= PSH
	}
	if e.From > 0 {
		e.Flags &^= c.once()
	}
	p.urgent(e, h.seq(), h.urg)
	o := h.opts
	switch {
	case h.flags&ACK != 0:
		o.keepSACK(&c.sSACK, c.s.ack)
		e.Ack, e.Win = p.acknowledge(c, h.flags)
	case c.sSYN:
		e.Win = min(h.win, c.sSYNWin)
	default:
		e.Win = h.win
	}
	c.stamp(&o)
	e.OptLen, e.Opts = o.n, o.b
	p.stats.ReleasedBytes += uint64(e.To - e.From)
}
