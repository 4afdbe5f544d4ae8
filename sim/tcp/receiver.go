// SPDX-License-Identifier: Apache-2.0

package tcp

import "slices"

// block is what arrived behind a hole.
type block struct {
	from, to uint32
	data     []byte
}

// receiver is the state of what comes in.
type receiver struct {
	c *conn

	nxt   uint32 // next expected
	wup   uint32 // nxt when an ACK was last sent
	wnd   uint32 // advertised then
	scale uint8
	mss   int // estimate of the segments that the peer sends, for delayed ACKs

	buf  []byte // from off on: what can be read
	off  int
	room int // of buf

	ooo    []block // in order, disjoint, not adjacent
	blocks [4]span // as SACKed, the newest first
	sacks  int
	dup    bool // dupSpan goes out as D-SACK
	dupOf  span

	fin    bool // everything was received
	finSeq uint32
	finOOO bool // FIN was seen behind a hole, at finSeq

	urgent    bool
	urgentEnd uint32

	// Acknowledgment.
	ackPending bool // something is to be acknowledged, at once or later
	ackNow     bool
	pushed     int  // segments to be acknowledged behind which nothing may follow: small ones, or with PSH; 2 at most
	quick      int  // ACKs that are not delayed
	pingpong   bool // the connection is interactive: ACKs wait for data
	active     bool // data has come in
	lastDataAt int64
	echoCE     bool
}

func (r *receiver) init(cfg *Config) {
	r.room = cfg.RcvBuf
	r.wnd = uint32(min(r.room, 65535))
	if !cfg.NoScale {
		r.scale = cfg.WindowScale
	}
	r.mss = min(cfg.MSS, defaultMSS)
}

func (r *receiver) start(seq uint32) { r.nxt, r.wup = seq, seq }

func (r *receiver) unread() int { return len(r.buf) - r.off }

// window is what is left of the window that was advertised.
func (r *receiver) window() uint32 { return uint32(max(int32(r.wup+r.wnd-r.nxt), 0)) }

// selectWindow is the window that the free room allows, so that it is not silly (RFC 9293, 3.8.6.2.2).
func (r *receiver) selectWindow() uint32 {
	free := max(r.room-r.unread(), 0)
	if free < r.room>>4 || free < min(r.mss, r.room) {
		return 0
	}
	if r.scale > 0 {
		unit := 1 << r.scale
		return uint32((free + unit - 1) &^ (unit - 1))
	}
	// Whole segments, as long as the window is not far from what is free.
	if w := int(r.wnd); w > free-r.mss && w <= free {
		return r.wnd
	}
	return uint32(min(free-free%r.mss, 65535))
}

// advertise is the window field of a segment that is sent now. The window does not shrink.
func (r *receiver) advertise() uint16 {
	w := r.selectWindow()
	if now := r.window(); w < now {
		unit := uint32(1) << r.scale
		w = (now + unit - 1) &^ (unit - 1)
	}
	w = min(w, 65535<<r.scale)
	r.wnd, r.wup = w, r.nxt
	return uint16(w >> r.scale)
}

// take appends data that begins at or before nxt and ends behind it.
func (r *receiver) take(seq uint32, data []byte) {
	data = data[r.nxt-seq:]
	if r.off > 0 && len(r.buf)+len(data) > cap(r.buf) {
		n := copy(r.buf, r.buf[r.off:])
		r.buf, r.off = r.buf[:n], 0
	}
	r.buf = append(r.buf, data...)
	r.nxt += uint32(len(data))
}

// join takes what was out of order and is not any more.
func (r *receiver) join() {
	n := 0
	for ; n < len(r.ooo) && !after(r.ooo[n].from, r.nxt); n++ {
		b := &r.ooo[n]
		if r.finOOO && after(b.to, r.finSeq) { // nothing can be behind the FIN
			b.to = maxSeq(r.finSeq, b.from)
			b.data = b.data[:b.to-b.from]
		}
		if after(b.to, r.nxt) {
			r.take(b.from, b.data)
		} else if after(r.nxt, b.from) && !r.dup {
			r.dup, r.dupOf = true, span{b.from, b.to}
		}
	}
	if n == 0 {
		return
	}
	r.ooo = slices.Delete(r.ooo, 0, n)
	kept := 0
	for _, b := range r.blocks[:r.sacks] {
		if after(b.to, r.nxt) && after(b.from, r.nxt) {
			r.blocks[kept] = b
			kept++
		}
	}
	r.sacks = kept
}

// insert keeps data behind a hole. What of it, up to end, was there already is told by D-SACK.
func (r *receiver) insert(seq, end uint32, data []byte) {
	from, to := seq, seq+uint32(len(data))
	for _, b := range r.ooo {
		if r.finOOO && b.to == r.finSeq {
			b.to++
		}
		if b.to == from { // Linux appends to that block, and does not look further
			break
		}
		if before(from, b.to) && before(b.from, end) {
			r.setDup(maxSeq(from, b.from), minSeq(end, b.to))
			break
		}
	}
	// The blocks from i to j-1 touch or overlap it.
	i := 0
	for i < len(r.ooo) && before(r.ooo[i].to, from) {
		i++
	}
	j := i
	for j < len(r.ooo) && !after(r.ooo[j].from, to) {
		j++
	}
	if i == j {
		r.ooo = slices.Insert(r.ooo, i, block{from, to, slices.Clone(data)})
		r.reportBlock(span{from, to})
		return
	}
	merged := r.ooo[i]
	if b := merged; !before(from, b.from) && !after(to, b.to) {
		r.reportBlock(span{b.from, b.to})
		return
	}
	if before(from, merged.from) {
		front := slices.Clone(data[:min(uint32(len(data)), merged.from-from)])
		merged = block{from, merged.to, append(front, merged.data...)}
	}
	for k := i; k < j; k++ {
		b := &r.ooo[k]
		if after(b.from, merged.to) { // the hole between the last one and this is filled
			merged.data = append(merged.data, data[merged.to-from:b.from-from]...)
			merged.to = b.from
		}
		if after(b.to, merged.to) {
			merged.data = append(merged.data, b.data[merged.to-b.from:]...)
			merged.to = b.to
		}
	}
	if after(to, merged.to) {
		merged.data = append(merged.data, data[merged.to-from:]...)
		merged.to = to
	}
	r.ooo = slices.Replace(r.ooo, i, j, merged)
	r.reportBlock(span{merged.from, merged.to})
}

func (r *receiver) setDup(from, to uint32) { r.dup, r.dupOf = true, span{from, to} }

// reportBlock puts a block in front of the SACK blocks, in the place of those that it covers.
func (r *receiver) reportBlock(b span) {
	if r.finOOO && b.to == r.finSeq {
		b.to++
	}
	kept := [4]span{b}
	n := 1
	for _, o := range r.blocks[:r.sacks] {
		if n < len(kept) && (after(o.from, b.to) || before(o.to, b.from)) {
			kept[n] = o
			n++
		}
	}
	r.blocks, r.sacks = kept, n
}

// reportFIN reports a FIN without data behind a hole.
func (r *receiver) reportFIN() {
	b := span{r.finSeq, r.finSeq}
	if n := len(r.ooo); n > 0 && r.ooo[n-1].to == b.to {
		b.from = r.ooo[n-1].from
	}
	r.reportBlock(b)
}

// read copies what can be read to b.
func (r *receiver) read(b []byte) int {
	n := copy(b, r.buf[r.off:])
	r.off += n
	if r.off == len(r.buf) {
		r.buf, r.off = r.buf[:0], 0
	}
	return n
}
