// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"slices"
	"sort"
)

// point is a position of the SVM's stream whose digest is known: sum is that of
// everything from the stream's base up to pos.
type point struct {
	pos uint32
	sum Sum
}

// span is what one digest record holds: the digests of the SVM's bytes from one position
// up to each of bounds, which are in order. It is loose while none of its positions
// is known to hang together with the compared point.
type span struct {
	from   uint32
	bounds []Bound
}

func (s *span) end() uint32 { return s.bounds[len(s.bounds)-1].Pos }

// pastPoints known positions below the compared point are kept: the SVM's
// retransmissions begin there, and the PVM's are checked against them.
const pastPoints = 16

// pointBudget bounds the points, those in loose spans included: of one stream, and of
// all streams that share it.
type pointBudget struct {
	perStream, max int
	used           int
	forgotten      uint64 // what was given up for want of room
}

// stream is what is known of the SVM's stream on one connection, from digest records.
// Losing any of it is safe: what cannot be compared does not leave. points is sorted and, once the
// stream has a base, contains the compared point, or, where that is a SYN or behind a
// FIN, the position beside it.
type stream struct {
	budget   *pointBudget
	points   deque[point]
	loose    []span
	nloose   int    // bounds in loose
	compared uint32 // below it both guests transmitted the same
	sum      Sum    // at compared, from the base
	extent   extent // how far the SVM has got, as far as is known
}

// extent is how far a guest has got with its stream.
type extent struct {
	known  bool   // end holds
	end    uint32 // highest end of its data
	pushed mark   // where its newest segment with PSH ends
	fin    mark
}

// reach notes that the guest has transmitted data up to end.
func (x *extent) reach(end uint32) {
	if !x.known || after(end, x.end) {
		x.known, x.end = true, end
	}
}

// close notes a FIN at pos, and reports false if there was one elsewhere.
func (x *extent) close(pos uint32) bool {
	same := !x.fin.ok || x.fin.pos == pos
	x.fin = mark{true, pos}
	return same
}

// pauses reports whether the guest had no more to send at pos. What it writes next may wait for the
// remote to acknowledge that (Nagle's algorithm, RFC 9293, 3.7.4).
func (x *extent) pauses(pos uint32) bool { return x.pushed.is(pos) && !x.beyond(pos) }

// beyond reports whether the guest has transmitted data beyond pos.
func (x *extent) beyond(pos uint32) bool { return x.known && after(x.end, pos) }

// next is where the stream goes on; without data and FIN at pos.
func (x *extent) next(pos uint32) uint32 {
	switch {
	case x.fin.ok:
		return x.fin.pos + 1
	case x.known:
		return x.end
	}
	return pos
}

// add takes in a frame whose data ends at end, and reports false for one that
// contradicts an earlier FIN or, with a FIN, earlier data.
func (x *extent) add(end uint32, fin bool) bool {
	if x.fin.ok && (after(end, x.fin.pos) || fin && !x.fin.is(end)) || fin && x.beyond(end) {
		return false
	}
	if fin {
		x.close(end)
	}
	x.reach(end)
	return true
}

// goesOn reports whether o closed at another position than x, or goes on where x closed.
func (x *extent) goesOn(o *extent) bool {
	return x.fin.ok && (o.fin.ok && o.fin.pos != x.fin.pos || o.beyond(x.fin.pos))
}

// search gives the index of the first point at or behind pos.
func (s *stream) search(pos uint32) int {
	pts := s.points.view()
	n := len(pts)
	if n == 0 || before(pts[n-1].pos, pos) {
		return n
	}
	// The last one is asked for most often: the SVM's stream goes on there.
	if n == 1 || before(pts[n-2].pos, pos) {
		return n - 1
	}
	return sort.Search(n, func(i int) bool { return !before(pts[i].pos, pos) })
}

// find returns the sum at pos, if it is known.
func (s *stream) find(pos uint32) (Sum, bool) {
	if i := s.search(pos); i < s.points.len() && s.points.view()[i].pos == pos {
		return s.points.view()[i].sum, true
	}
	return Sum{}, false
}

// last gives the last point at or before pos.
func (s *stream) last(pos uint32) (point, bool) {
	i := s.search(pos)
	if pts := s.points.view(); i < len(pts) && pts[i].pos == pos {
		return pts[i], true
	} else if i > 0 {
		return pts[i-1], true
	}
	return point{}, false
}

// end gives the last known position.
func (s *stream) end() (uint32, bool) {
	if pts := s.points.view(); len(pts) > 0 {
		return pts[len(pts)-1].pos, true
	}
	return 0, false
}

// ahead reports whether the SVM has transmitted data beyond the compared point.
func (s *stream) ahead() bool { return s.extent.beyond(s.compared) }

// sent reports whether anything is known of what the SVM transmitted between the compared point and pos.
func (s *stream) sent(pos uint32) bool {
	last, ok := s.end()
	return ok && after(last, s.compared) ||
		slices.ContainsFunc(s.loose, func(l span) bool { return before(l.from, pos) && after(l.end(), s.compared) })
}

// hole is what is not known of the stream, though what lies behind it is.
func (s *stream) hole() (from, to uint32, ok bool) {
	from, known := s.end()
	for i := range s.loose {
		if l := s.loose[i].from; known && after(l, from) && (!ok || before(l, to)) {
			to, ok = l, true
		}
	}
	return from, to, ok
}

// forget drops all points and spans.
func (s *stream) forget() {
	s.budget.used -= s.points.len() + s.nloose
	s.points.reset()
	clear(s.loose)
	s.loose, s.nloose = s.loose[:0], 0
}

// learn adds what a digest record or an answer holds, and what follows from it.
// l.bounds is the caller's. It reports false when the SVM transmitted other bytes at
// positions that were known.
func (s *stream) learn(l span) (same bool) {
	resolved, same := s.derive(&l)
	if resolved {
		return s.relearn() && same
	}
	l.bounds = slices.Clone(l.bounds)
	s.addLoose(l)
	return true
}

// addLoose keeps a span until what lies before it is known: records overtake each
// other, on S's CPUs and on the peer link. When there is no room the newest is
// forgotten, so that those that are kept have no hole; P asks for what is missing.
func (s *stream) addLoose(l span) {
	n := len(l.bounds)
	for i := range s.loose {
		if o := &s.loose[i]; o.from == l.from && slices.Equal(o.bounds, l.bounds) {
			return
		}
	}
	if s.nloose+n > s.budget.perStream || s.budget.used+n > s.budget.max {
		s.budget.forgotten++
		return
	}
	s.loose = append(s.loose, l)
	s.nloose += n
	s.budget.used += n
}

// derive makes points of l's positions when one of them is a point. same: what was
// known of the others agrees.
func (s *stream) derive(l *span) (resolved, same bool) {
	pts := s.points.view()
	if len(pts) == 0 || after(l.from, pts[len(pts)-1].pos) || before(l.end(), pts[0].pos) {
		return false, true
	}
	base, ok := s.find(l.from)
	for i := 0; !ok; i++ {
		if i == len(l.bounds) {
			return false, true
		}
		var sum Sum
		if sum, ok = s.find(l.bounds[i].Pos); ok {
			base = sum.minus(l.bounds[i].Sum)
			s.addPoint(point{l.from, base})
		}
	}
	same = true
	for _, b := range l.bounds {
		if sum, known := s.find(b.Pos); !known {
			s.addPoint(point{b.Pos, base.plus(b.Sum)})
		} else if base.plus(b.Sum) != sum {
			same = false
		}
	}
	return true, same
}

func (s *stream) addPoint(pt point) {
	if s.points.len() >= s.budget.perStream || s.budget.used >= s.budget.max {
		if !s.thin() {
			s.budget.forgotten++
			return
		}
	}
	s.points.insert(s.search(pt.pos), pt)
	s.budget.used++
}

// thin makes room by forgetting every other point between the compared point
// and the last one. Sums are counted from the base, so the others keep their
// meaning, and what the SVM transmitted is still compared, in larger steps.
func (s *stream) thin() bool {
	pts := s.points.view()
	n := 0
	for i, pt := range pts {
		if pt.pos == s.compared || i == len(pts)-1 || (after(pt.pos, s.compared) && i%2 == 0) {
			pts[n] = pt
			n++
		}
	}
	gone := len(pts) - n
	s.points.remove(n, len(pts))
	s.budget.used -= gone
	s.budget.forgotten += uint64(gone)
	return gone > 0
}

// begin makes the position behind a SYN the base, and the SYN the compared point.
func (s *stream) begin(isn uint32) {
	s.setBase(isn + 1)
	s.compared = isn
}

// expect makes pos the compared point of a stream without a base.
func (s *stream) expect(pos uint32) { s.compared = pos }

// advance moves the compared point to pos, where the sum is as given, and forgets points
// too far below it.
func (s *stream) advance(pos uint32, sum Sum) {
	s.compared, s.sum = pos, sum
	pts := s.points.view()
	i := s.search(pos)
	n := max(0, i-pastPoints)
	for n < i && !near(pts[n].pos, pos) {
		n++
	}
	s.points.drop(n)
	s.budget.used -= n
}

// rebase makes pos the base. What is known stays so, from there or as a loose span. It
// reports false when the loose spans contradict each other.
func (s *stream) rebase(pos uint32) (same bool) {
	if pts := s.points.view(); len(pts) > 1 {
		known := span{from: pts[0].pos}
		for _, pt := range pts[1:] {
			known.bounds = append(known.bounds, Bound{pt.pos, pt.sum.minus(pts[0].sum)})
		}
		s.addLoose(known)
	}
	s.setBase(pos)
	return s.relearn()
}

// setBase makes pos the compared point and the one that sums are counted from.
func (s *stream) setBase(pos uint32) {
	s.budget.used += 1 - s.points.len()
	s.points.reset()
	s.points.insert(0, point{pos: pos})
	s.compared, s.sum = pos, Sum{}
}

// relearn looks at the loose spans again after a point appeared.
func (s *stream) relearn() (same bool) {
	same = true
	// Each turn but the last resolves a span, so this ends.
	for n := -1; n != len(s.loose); {
		n = len(s.loose)
		s.loose = slices.DeleteFunc(s.loose, func(l span) bool {
			gone := !after(l.end(), s.compared)
			if !gone {
				var agrees bool
				gone, agrees = s.derive(&l)
				same = same && agrees
			}
			if gone {
				s.nloose -= len(l.bounds)
				s.budget.used -= len(l.bounds)
			}
			return gone
		})
	}
	return same
}
