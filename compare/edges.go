// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"slices"
	"sort"
)

// point is a position of the SVM's stream whose digest is known: sum is that of
// everything from the connection's base up to pos.
type point struct {
	pos uint32
	sum Sum
}

// span says of the SVM's bytes from a position on what their digest is up to each of
// bounds, which are in order. It is loose while none of its positions is known to hang
// together with the compared point.
type span struct {
	from   uint32
	bounds []Bound
}

func (s *span) end() uint32 { return s.bounds[len(s.bounds)-1].Pos }

// pastPoints known positions below the compared point are kept: the SVM's
// retransmissions begin there, and the PVM's are checked against them.
const pastPoints = 16

// knowledge is what the SVM's records tell about its stream. Losing any of it is
// safe: what cannot be compared does not leave. points is sorted and, once the
// connection has a base, contains the compared point.
type knowledge struct {
	points deque[point]
	loose  []span
	nloose int // bounds in loose
}

// search gives the index of the first point at or behind pos.
func (k *knowledge) search(pos uint32) int {
	pts := k.points.view()
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

func (k *knowledge) find(pos uint32) (Sum, bool) {
	if i := k.search(pos); i < k.points.len() && k.points.view()[i].pos == pos {
		return k.points.view()[i].sum, true
	}
	return Sum{}, false
}

// last gives the last point at or before pos.
func (k *knowledge) last(pos uint32) (point, bool) {
	i := k.search(pos)
	if pts := k.points.view(); i < len(pts) && pts[i].pos == pos {
		return pts[i], true
	} else if i > 0 {
		return pts[i-1], true
	}
	return point{}, false
}

// end gives the last known position.
func (k *knowledge) end() (uint32, bool) {
	if pts := k.points.view(); len(pts) > 0 {
		return pts[len(pts)-1].pos, true
	}
	return 0, false
}

// forget drops everything.
func (p *Primary) forget(c *conn) {
	p.points -= c.svm.points.len() + c.svm.nloose
	c.svm.points.reset()
	clear(c.svm.loose)
	c.svm.loose, c.svm.nloose = c.svm.loose[:0], 0
}

// learn adds what a record or an answer tells, and what follows from it. s.bounds is
// the caller's.
func (p *Primary) learn(c *conn, s span) {
	if p.derive(c, &s) {
		p.relearn(c)
		return
	}
	s.bounds = slices.Clone(s.bounds)
	p.addLoose(c, s)
}

// addLoose keeps a span until what lies before it is known: records overtake each
// other, on S's CPUs and on the peer link. When there is no room the newest is
// forgotten, so that those that are kept have no hole; P asks for what is missing.
func (p *Primary) addLoose(c *conn, s span) {
	n := len(s.bounds)
	for i := range c.svm.loose {
		if l := &c.svm.loose[i]; l.from == s.from && slices.Equal(l.bounds, s.bounds) {
			return
		}
	}
	if c.svm.nloose+n > p.cfg.ConnPoints || p.points+n > p.cfg.MaxPoints {
		p.stats.Drops[ReasonForgotten]++
		return
	}
	c.svm.loose = append(c.svm.loose, s)
	c.svm.nloose += n
	p.points += n
}

// derive makes points of s's positions when one of them is a point.
func (p *Primary) derive(c *conn, s *span) bool {
	pts := c.svm.points.view()
	if len(pts) == 0 || after(s.from, pts[len(pts)-1].pos) || before(s.end(), pts[0].pos) {
		return false
	}
	base, ok := c.svm.find(s.from)
	for i := 0; !ok; i++ {
		if i == len(s.bounds) {
			return false
		}
		var sum Sum
		if sum, ok = c.svm.find(s.bounds[i].Pos); ok {
			base = sum.minus(s.bounds[i].Sum)
			p.addPoint(c, point{s.from, base})
		}
	}
	for _, b := range s.bounds {
		if sum, known := c.svm.find(b.Pos); !known {
			p.addPoint(c, point{b.Pos, base.plus(b.Sum)})
		} else if base.plus(b.Sum) != sum && !p.off(mutR1) {
			p.diverge(c, ReasonSVMChanged)
		}
	}
	return true
}

func (p *Primary) addPoint(c *conn, pt point) {
	if c.svm.points.len() >= p.cfg.ConnPoints || p.points >= p.cfg.MaxPoints {
		if !p.thin(c) {
			p.stats.Drops[ReasonForgotten]++
			return
		}
	}
	c.svm.points.insert(c.svm.search(pt.pos), pt)
	p.points++
}

// thin makes room by forgetting every other point between the compared point
// and the last one. Sums are counted from the base, so the others keep their
// meaning, and what the SVM said is still compared, in larger steps.
func (p *Primary) thin(c *conn) bool {
	pts := c.svm.points.view()
	n := 0
	for i, pt := range pts {
		if pt.pos == c.compared || i == len(pts)-1 || (after(pt.pos, c.compared) && i%2 == 0) {
			pts[n] = pt
			n++
		}
	}
	gone := len(pts) - n
	c.svm.points.remove(n, len(pts))
	p.points -= gone
	p.stats.Drops[ReasonForgotten] += uint64(gone)
	return gone > 0
}

// prune forgets points too far below the compared one.
func (p *Primary) prune(c *conn) {
	pts := c.svm.points.view()
	i := c.svm.search(c.compared)
	n := max(0, i-pastPoints)
	for n < i && !near(pts[n].pos, c.compared) {
		n++
	}
	c.svm.points.drop(n)
	p.points -= n
}

// root gives a floating connection its base: the first position that the PVM
// holds. While nothing has been verified a lower one may still come, when frames
// of several queues overtake each other.
func (p *Primary) root(c *conn) {
	if !c.floating || c.held.len() == 0 {
		return
	}
	base := c.held.view()[0].start
	if c.compared == base && c.svm.points.len() > 0 {
		return
	}
	p.rebase(c, base)
	c.low, c.released = base, base
}

// rebase makes pos the base. What is known stays so, from there or as a loose span.
func (p *Primary) rebase(c *conn, pos uint32) {
	if pts := c.svm.points.view(); len(pts) > 1 {
		known := span{from: pts[0].pos}
		for _, pt := range pts[1:] {
			known.bounds = append(known.bounds, Bound{pt.pos, pt.sum.minus(pts[0].sum)})
		}
		p.addLoose(c, known)
	}
	p.setBase(c, pos)
	p.relearn(c)
}

// setBase makes pos the compared point and the one that sums are counted from.
func (p *Primary) setBase(c *conn, pos uint32) {
	p.points += 1 - c.svm.points.len()
	c.svm.points.reset()
	c.svm.points.insert(0, point{pos: pos})
	c.compared, c.sum = pos, Sum{}
}

// relearn looks at the loose spans again after a point appeared.
func (p *Primary) relearn(c *conn) {
	// Each turn but the last resolves a span, so this ends.
	for n := -1; n != len(c.svm.loose); {
		n = len(c.svm.loose)
		c.svm.loose = slices.DeleteFunc(c.svm.loose, func(l span) bool {
			gone := !after(l.end(), c.compared) || p.derive(c, &l)
			if gone {
				c.svm.nloose -= len(l.bounds)
				p.points -= len(l.bounds)
			}
			return gone
		})
	}
}

// hole is what is not known of the SVM's stream, though what lies behind it is.
func (c *conn) hole() (from, to uint32, ok bool) {
	from, known := c.svm.end()
	for i := range c.svm.loose {
		if l := c.svm.loose[i].from; known && after(l, from) && (!ok || before(l, to)) {
			to, ok = l, true
		}
	}
	return from, to, ok
}
