// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"slices"
	"time"
)

// side is what one side acknowledged: the highest ACK, the right edge of the
// window, the newest raw window of unknown scale at that ACK, and the newest echo of the remote's
// timestamps that came with it.
type side struct {
	ok, echoes bool
	ack, edge  uint32
	win        uint16
	echo       uint32
}

// update takes an ACK in, with the options beside it, and reports whether ack, or the
// window, grew. An unknown scale counts as 0, which understates the edge.
func (d *side) update(ack uint32, win uint16, scale int8, opts []byte) (ackGrew, grew bool) {
	edge := ack + uint32(win)<<max(scale, 0)
	if scale != scaleUnknown {
		win >>= maxScale // a SYN's, which is not scaled: a window behind it may be, and is no larger then
	}
	switch {
	case !d.ok:
		*d = side{ok: true, ack: ack, edge: edge, win: win}
		ackGrew, grew = true, true
	case after(ack, d.ack):
		d.ack, d.win, ackGrew, grew = ack, win, true, true
	case ack == d.ack && win > d.win:
		d.win, grew = win, true
	}
	if after(edge, d.edge) {
		d.edge, grew = edge, true
	}
	if ts := tsOpt(opts); ts != nil {
		d.echoed(ack, be32(ts[6:]), ackGrew)
	}
	return ackGrew, grew
}

// echoed notes the echo that came with ack. fresh: it is the first with as much.
func (d *side) echoed(ack, echo uint32, fresh bool) {
	if ack == d.ack && (fresh || !d.echoes || after(echo, d.echo)) {
		d.echo, d.echoes = echo, true
	}
}

// outside reports whether seq of the remote lies outside of the window that was offered to it.
// scaled: the scale is known, so that the edge is not understated.
func (d *side) outside(seq uint32, scaled bool) bool {
	return d.ok && (before(seq, d.ack) || scaled && after(seq, d.edge))
}

// merge brings d up to o, where that acknowledged more.
func (d *side) merge(o side) {
	switch {
	case !d.ok:
		*d = o
	case after(o.ack, d.ack):
		d.ack, d.win, d.echo, d.echoes = o.ack, o.win, o.echo, o.echoes
	case o.ack == d.ack:
		d.win = max(d.win, o.win)
		if o.echoes {
			d.echoed(o.ack, o.echo, false)
		}
	}
	d.edge = maxSeq(d.edge, o.edge)
}

// ackMark is what the PVM had acknowledged at a time: see ackState.marks.
type ackMark struct {
	first, at int64
	side      side
}

const (
	// While frozen the PVM's ACKs are remembered over time, in steps of markStep,
	// because only the commit tells which of them the SVM has inherited.
	markStep = int64(500 * time.Microsecond)
	maxMarks = 64
)

const (
	scaleUnknown = -1
	maxScale     = 14 // RFC 7323
)

// ackState is what the guests acknowledged of the remote's stream, and what has been
// transmitted of it (R2): never more than both guests have. All three only grow, but
// for the SVM's, which is forgotten where it turns out to be of another incarnation, on a
// connection that was met in mid-stream, and begins anew at a commit.
type ackState struct {
	pvm, svm, sent side
	ahead          bool  // sent may be more than svm, because that was forgotten
	at             int64 // capture time of the newest of pvm
	pvmSACK        sackSet
	svmSACK        sackSet
	told           sackSet  // of both, what ACKs have told the remote
	blocks         [4]block // SACK blocks of the SVM's newest segment
	nblocks        int
	marks          []ackMark // pvm over time while frozen
	scale          int8      // window scale of the guests; scaleUnknown
}

// scaleOf gives the scale of a segment's window: windows of SYNs are never scaled.
func (a *ackState) scaleOf(f Flags) int8 {
	if f&SYN != 0 {
		return 0
	}
	return a.scale
}

// scaleBy settles the window scale from the guests' SYN: it offers one, or not, and the
// remote takes it up, or not. A SYN|ACK offers only what was offered.
func (a *ackState) scaleBy(syn []byte, taken bool) {
	a.scale = 0
	if scale, ok := wscale(syn); ok && taken {
		a.scale = int8(scale)
	}
}

// fromPVM takes the ACK of a PVM segment in and reports whether it brought news.
func (a *ackState) fromPVM(s *Segment, frozen bool) (grew bool) {
	if s.Flags&(ACK|RST) != ACK {
		return false
	}
	_, grew = a.pvm.update(s.Ack, s.Win, a.scaleOf(s.Flags), s.Opts)
	if grew {
		a.at = s.At
		if frozen {
			a.mark()
		}
	}
	var blocks [4]block
	a.pvmSACK.trim(a.pvm.ack)
	for _, b := range sackBlocks(blocks[:0], s.Opts) {
		a.pvmSACK.add(b, a.pvm.ack)
	}
	return grew
}

// fromSVM takes the ACK of a digest record in and reports whether the ACK, and whether
// anything, brought news.
func (a *ackState) fromSVM(s *Segment) (ackGrew, grew bool) {
	if s.Flags&(ACK|RST) != ACK {
		return false, false
	}
	ackGrew, grew = a.svm.update(s.Ack, s.Win, a.scaleOf(s.Flags), s.Opts)
	if a.ahead && !before(a.svm.ack, a.sent.ack) && !before(a.svm.edge, a.sent.edge) {
		a.ahead = false
	}
	if s.Ack == a.svm.ack {
		n := len(sackBlocks(a.blocks[:0], s.Opts))
		a.nblocks = min(n, len(a.blocks))
	}
	a.svmSACK.trim(a.svm.ack)
	for _, b := range a.blocks[:a.nblocks] {
		a.svmSACK.add(b, a.svm.ack)
	}
	return ackGrew, grew
}

// forgetSVM: what the SVM acknowledged was of another incarnation. What was transmitted
// by it stays.
func (a *ackState) forgetSVM() {
	a.setSVM(side{})
	a.ahead = a.sent.ok
}

// setSVM replaces what the SVM acknowledged.
func (a *ackState) setSVM(s side) { a.svm, a.svmSACK, a.nblocks, a.ahead = s, sackSet{}, 0, false }

// trustPVM lets what the PVM acknowledged count for both: there is no SVM any more.
func (a *ackState) trustPVM() { a.svm = a.pvm }

// svmBehind reports whether the SVM has acknowledged less than the PVM.
func (a *ackState) svmBehind() bool {
	return a.pvm.ok && (!a.svm.ok || after(a.pvm.ack, a.svm.ack))
}

// refuses reports whether neither guest takes a RST of the remote at seq (RFC 9293, 3.10.7.4): it is
// of the connection that used the ports before. syn is the connection's.
func (a *ackState) refuses(seq uint32, syn *handshake) bool {
	pvm, svm, scaled := a.pvm, a.svm, a.scale != scaleUnknown
	if !svm.ok && syn.seen && syn.flags&ACK != 0 { // it has yet to answer the same SYN
		svm = pvm
		svm.ack = syn.ack
	}
	return pvm.outside(seq, scaled) && svm.outside(seq, scaled)
}

// may reports whether a frame with flags f may leave: one that acknowledges may once
// both guests have acknowledged anything.
func (a *ackState) may(f Flags) bool { return f&ACK == 0 || a.pvm.ok && a.svm.ok }

// minimum is what may be acknowledged now (R2): the smaller of both sides, but
// nothing is taken back. The edge is the one that the window field can express.
// grown: it is more than what was sent last. pvmAlone counts the SVM as the PVM.
func (a *ackState) minimum(f Flags, pvmAlone bool) (m side, grown bool) {
	p, s := a.pvm, a.svm
	if pvmAlone {
		s = p
	}
	m = side{ok: true, ack: minSeq(p.ack, s.ack)}
	if a.sent.ok {
		m.ack = maxSeq(m.ack, a.sent.ack)
	}
	scale := a.scaleOf(f)
	if scale == scaleUnknown {
		// Smaller of two raw windows on top of the smaller ACK: below both edges
		// whatever the scale is.
		m.win = min(p.win, s.win)
		if a.sent.ok && a.sent.ack == m.ack {
			m.win = max(m.win, a.sent.win)
		}
		m.edge = m.ack + uint32(m.win)
		grown = !a.sent.ok || after(m.ack, a.sent.ack) || m.win > a.sent.win
		return m, grown
	}
	m.edge = minSeq(p.edge, s.edge)
	if a.sent.ok {
		m.edge = maxSeq(m.edge, a.sent.edge)
	}
	if !before(m.edge, m.ack) {
		m.win = uint16(min((m.edge-m.ack)>>scale, 0xffff))
	}
	m.edge = m.ack + uint32(m.win)<<scale
	// An edge that the field cannot show would make the same ACK again, which
	// the remote takes for a duplicate.
	grown = !a.sent.ok || after(m.ack, a.sent.ack) || after(m.edge, a.sent.edge)
	return m, grown
}

// transmit gives the ACK and window of a frame that leaves with flags f, and notes
// them as sent.
func (a *ackState) transmit(f Flags, pvmAlone bool) (ack uint32, win uint16) {
	m, _ := a.minimum(f, pvmAlone)
	edge := m.edge
	if a.sent.ok {
		edge = maxSeq(edge, a.sent.edge)
	}
	a.sent = m
	a.sent.edge = edge
	a.told.trim(m.ack)
	if a.scaleOf(f) != scaleUnknown {
		a.sent.win >>= maxScale
	}
	return m.ack, m.win
}

// slower is the side that has acknowledged less; of equal ones the one that did so last.
func (a *ackState) slower() *side {
	p, s := &a.pvm, &a.svm
	if before(s.ack, p.ack) || s.ack == p.ack && s.echoes && (!p.echoes || after(s.echo, p.echo)) {
		return s
	}
	return p
}

// common appends to dst the SACK blocks that both guests have: those of the side that
// lags, as far as the other one has them too. opts are those of the PVM's newest ACK.
func (a *ackState) common(dst []block, opts []byte) []block {
	var buf [4]block
	blocks, other, ack := a.blocks[:a.nblocks], &a.pvmSACK, a.pvm.ack
	if before(a.pvm.ack, a.svm.ack) {
		blocks, other, ack = sackBlocks(buf[:0], opts), &a.svmSACK, a.svm.ack
	}
	for _, b := range blocks {
		if b, ok := other.common(b, ack); ok && len(dst) < cap(dst) {
			dst = append(dst, b)
		}
	}
	return dst
}

// tell gives the SACK blocks of an ACK that leaves, as [ackState.common] does, and notes them.
func (a *ackState) tell(dst []block, opts []byte) []block {
	dst = a.common(dst, opts)
	for _, b := range dst {
		a.told.add(b, a.sent.ack)
	}
	return dst
}

// news reports whether both guests hold something above their ACKs that no ACK has told the remote.
func (a *ackState) news(opts []byte) bool {
	var buf [4]block
	return slices.ContainsFunc(a.common(buf[:0], opts), func(b block) bool { return !a.told.has(b, a.sent.ack) })
}

// mark remembers pvm. A step that the commit point lies in counts as behind it, so a
// step carries the time of its last ACK; the guest's stop makes the gap that the commit
// point lies in.
func (a *ackState) mark() {
	if n := len(a.marks); n > 0 && a.at-a.marks[n-1].first < markStep {
		a.marks[n-1].at, a.marks[n-1].side = a.at, a.pvm
		return
	} else if n == maxMarks {
		a.marks = append(a.marks[:1], a.marks[2:]...) // the first is from before the freeze
	}
	a.marks = append(a.marks, ackMark{a.at, a.at, a.pvm})
}

// freeze begins the marks.
func (a *ackState) freeze() {
	a.marks = a.marks[:0]
	if a.pvm.ok {
		a.mark()
	}
}

// commit makes the SVM's side what the PVM had acknowledged at the commit point, as far
// as it is certain (R8). What was sent is from before it; old reports whether a capture
// time is.
func (a *ackState) commit(old func(at int64) bool, held []piece) {
	s := a.sent
	if a.pvm.ok && old(a.at) {
		s.merge(a.pvm)
	}
	for _, m := range a.marks {
		if old(m.at) {
			s.merge(m.side)
		}
	}
	for i := range held {
		if h := &held[i]; h.flags&ACK != 0 && old(h.at) {
			var o side
			o.update(h.ack, h.win, a.scaleOf(h.flags), h.opts.bytes())
			s.merge(o)
		}
	}
	a.setSVM(s)
	a.marks = a.marks[:0]
}
