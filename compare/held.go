// SPDX-License-Identifier: Apache-2.0

package compare

import "sort"

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

// heldQueue holds what the PVM transmitted on one connection and has not left: pieces
// that are disjoint and in order, and a RST that waits for the SVM's. It keeps count of
// the slots that it uses, in the connection's share and in the pool of all.
type heldQueue struct {
	*core
	pieces deque[piece]
	rst    piece
	hasRST bool
	holds  [slotClasses]int // slots
}

func (q *heldQueue) len() int      { return q.pieces.len() }
func (q *heldQueue) view() []piece { return q.pieces.view() }

// partly reports whether the front of the first piece has left, up to released.
func (q *heldQueue) partly(released uint32) bool {
	if q.len() == 0 {
		return false
	}
	h := q.first()
	return !h.syn && h.start != h.base && h.start == released
}

// first is the piece that leaves first; there is one.
func (q *heldQueue) first() *piece { return &q.pieces.view()[0] }

// insert holds h, before piece i.
func (q *heldQueue) insert(i int, h *piece) {
	q.pieces.insert(i, *h)
	q.count(h, 1)
}

// setRST holds a RST, in the place of an older one.
func (q *heldQueue) setRST(s *Segment) {
	q.freeRST(ReasonDuplicate)
	q.rst.fill(s, q.eventNo)
	q.hasRST = true
	q.count(&q.rst, 1)
}

// left: the first piece has left.
func (q *heldQueue) left() {
	q.count(q.first(), -1)
	q.pieces.drop(1)
}

// takeRST gives the RST, which leaves.
func (q *heldQueue) takeRST() piece {
	h := q.rst
	q.count(&h, -1)
	q.rst, q.hasRST = piece{}, false
	return h
}

// free drops pieces [i, j).
func (q *heldQueue) free(i, j int, why Reason) {
	for k := range q.pieces.view()[i:j] {
		h := &q.pieces.view()[i+k]
		q.count(h, -1)
		q.drop(h.slot, why)
	}
	if i == 0 {
		q.pieces.drop(j)
	} else {
		q.pieces.remove(i, j)
	}
}

func (q *heldQueue) freeRST(why Reason) {
	if q.hasRST {
		h := q.takeRST()
		q.drop(h.slot, why)
	}
}

// clear drops all that is held.
func (q *heldQueue) clear(why Reason) {
	q.free(0, q.len(), why)
	q.pieces.reset()
	q.freeRST(why)
}

// take removes all pieces that leave, and gives them in order.
func (q *heldQueue) take(leaves func(*piece) bool) []piece {
	var out []piece
	kept := 0
	held := q.pieces.view()
	for i := range held {
		if leaves(&held[i]) {
			q.count(&held[i], -1)
			out = append(out, held[i])
			continue
		}
		held[kept] = held[i]
		kept++
	}
	q.pieces.remove(kept, len(held))
	return out
}

// trim cuts h down to what is not held yet and gives its place. A held piece
// that h covers with room on its left is replaced by h, so that a frame always
// stays one piece.
func (q *heldQueue) trim(h *piece) (at int, fresh bool) {
	held := q.view()
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
	for j < n && !after(held[j].end, h.end) {
		j++
	}
	q.free(i, j, ReasonDuplicate)
	if held = q.view(); i < len(held) && before(held[i].start, h.end) {
		h.end, h.fin = held[i].start, false
	}
	return i, true
}

// count keeps the counters of what is held: by n, 1 or -1, of h.
func (q *heldQueue) count(h *piece, n int) {
	q.countSlot(h, n)
	q.stats.HeldPackets += n
	q.stats.HeldBytes += n * len(h.payload)
}
