// SPDX-License-Identifier: Apache-2.0

package compare

import "sort"

// point is a position of the SVM's stream whose digest is known: sum is that of
// everything from the connection's base up to pos.
type point struct {
	pos uint32
	sum Sum
}

// edge says that the SVM's bytes in [from, to) have digest sum. An edge is loose
// while neither end is known to hang together with the compared point.
type edge struct {
	from, to uint32
	sum      Sum
}

const (
	// pastPoints known positions below the compared point are kept: the SVM's
	// retransmissions begin there, and the PVM's are checked against them.
	pastPoints = 16
	maxLoose   = 512
)

// knowledge is what the SVM's records tell about its stream. Losing any of it is
// safe: what cannot be compared does not leave. points is sorted and, once the
// connection has a base, contains the compared point.
type knowledge struct {
	points deque[point]
	loose  []edge
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
	p.points -= c.svm.points.len() + len(c.svm.loose)
	c.svm.points.reset()
	c.svm.loose = c.svm.loose[:0]
}

// learn adds an edge of the SVM's stream and what follows from it.
func (p *Primary) learn(c *conn, e edge) {
	if e.from == e.to {
		return
	}
	if !p.derive(c, e) {
		if p.addLoose(c, e); len(c.svm.loose) > maxLoose {
			p.unloose(c, 0)
			p.stats.Drops[ReasonForgotten]++
		}
		return
	}
	p.relearn(c)
}

func (p *Primary) addLoose(c *conn, e edge) {
	for _, l := range c.svm.loose {
		if l == e {
			return
		}
	}
	c.svm.loose = append(c.svm.loose, e)
	p.points++
}

func (p *Primary) unloose(c *conn, i int) {
	c.svm.loose = append(c.svm.loose[:i], c.svm.loose[i+1:]...)
	p.points--
}

// derive makes a point of e's unknown end when the other one is known.
func (p *Primary) derive(c *conn, e edge) bool {
	from, okFrom := c.svm.find(e.from)
	to, okTo := c.svm.find(e.to)
	switch {
	case okFrom && okTo:
		if from.plus(e.sum) != to && !p.off(mutR1) {
			p.diverge(c, ReasonSVMChanged)
		}
	case okFrom:
		p.addPoint(c, point{e.to, from.plus(e.sum)})
	case okTo:
		p.addPoint(c, point{e.from, to.minus(e.sum)})
	default:
		return false
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

// rebase makes pos the base. What is known stays so, from there or as loose edges.
func (p *Primary) rebase(c *conn, pos uint32) {
	pts := c.svm.points.view()
	for i := 1; i < len(pts); i++ {
		p.addLoose(c, edge{pts[i-1].pos, pts[i].pos, pts[i].sum.minus(pts[i-1].sum)})
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

// relearn looks at the loose edges again after a point appeared.
func (p *Primary) relearn(c *conn) {
	// Each turn but the last resolves an edge, so this ends.
	for n := -1; n != len(c.svm.loose); {
		n = len(c.svm.loose)
		for i := 0; i < len(c.svm.loose); {
			if l := c.svm.loose[i]; !after(l.to, c.compared) || p.derive(c, l) {
				p.unloose(c, i)
				continue
			}
			i++
		}
	}
}
