// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"errors"
	"fmt"
)

// Assertions has each [Primary] made from then on look, after every event, at all that it
// knows, and panic where something does not hold that always has to. Tests and simulators
// turn it on. It is meant for few connections: each event costs a walk over all of them.
var Assertions bool

// check returns what does not hold of all that p knows.
func (p *Primary) check() error {
	err := errors.Join(p.conns.check(), p.datagrams.check())
	if n := len(p.conns.byTuple) + len(p.datagrams.flows); len(p.timers) != n {
		err = errors.Join(err, fmt.Errorf("%d timers of %d connections and flows", len(p.timers), n))
	}
	for i, t := range p.timers {
		if t.heapIdx != i || i > 0 && t.due < p.timers[(i-1)/2].due {
			err = errors.Join(err, fmt.Errorf("timer %d of the heap is out of place", i))
		}
	}
	return err
}

func (t *connTable) check() (err error) {
	var slots [slotClasses]slotUse
	points, opens, half := 0, 0, 0
	var led [leads]int
	for _, c := range t.byTuple {
		if e := c.check(); e != nil {
			err = errors.Join(err, fmt.Errorf("connection %v: %w", c.tuple, e))
		}
		for class, n := range c.held.holds {
			slots[class].held += n
			slots[class].holders += min(n, 1)
		}
		led[c.stall.led]++
		points += c.svm.points.len() + c.svm.nloose
		if c.open.in != nil {
			opens++
		}
		if c.half.in == &t.half {
			half++
		}
	}
	for class, u := range slots {
		if have := t.slots[class]; have.held != u.held || have.holders != u.holders {
			err = errors.Join(err, fmt.Errorf("class %d: %d slots of %d connections counted, %d of %d held", class, have.held, have.holders, u.held, u.holders))
		}
	}
	if led[leadPVM] != t.led[leadPVM] || led[leadSVM] != t.led[leadSVM] {
		err = errors.Join(err, fmt.Errorf("guests that lead: %v counted, %v there", t.led, led))
	}
	if points != t.points.used {
		err = errors.Join(err, fmt.Errorf("%d points counted, %d there", t.points.used, points))
	}
	if half != t.half.n || half+t.opening.n > t.cfg.MaxHalfOpen {
		err = errors.Join(err, fmt.Errorf("%d half-open connections listed, %d there", t.half.n, half))
	}
	for _, set := range t.opens {
		opens -= set.pvm.n + set.svm.n
	}
	if opens != 0 {
		err = errors.Join(err, fmt.Errorf("%d more active opens than in the table", opens))
	}
	return err
}

func (c *conn) check() error {
	err := errors.Join(c.acks.check(c.sealed), c.held.check(), c.svm.check())
	switch {
	case c.floating:
	case after(c.released, c.svm.compared):
		err = errors.Join(err, fmt.Errorf("released up to %d, compared up to %d", c.released, c.svm.compared))
	case !c.svm.based():
		err = errors.Join(err, fmt.Errorf("no sum is known at the compared point %d", c.svm.compared))
	}
	if c.half.in != nil && c.established {
		err = errors.Join(err, errors.New("half-open and established"))
	}
	return err
}

// check compares what was transmitted with what both guests acknowledged (R2). The window
// of a sealed frame is the PVM's, whatever the SVM's is.
func (a *ackState) check(sealed bool) error {
	if !a.sent.ok || !a.pvm.ok || !a.svm.ok || a.ahead {
		return nil
	}
	if m := minSeq(a.pvm.ack, a.svm.ack); after(a.sent.ack, m) {
		return fmt.Errorf("acknowledged %d to the remote, the guests %d and %d", a.sent.ack, a.pvm.ack, a.svm.ack)
	}
	if m := minSeq(a.pvm.edge, a.svm.edge); !sealed && after(a.sent.edge, m) {
		return fmt.Errorf("offered the remote a window up to %d, the guests up to %d and %d", a.sent.edge, a.pvm.edge, a.svm.edge)
	}
	return nil
}

func (q *heldQueue) check() (err error) {
	var holds [slotClasses]int
	count := func(h *piece) {
		if h.slot != NoSlot {
			holds[classOf(h.large)]++
		}
	}
	for i := range q.view() {
		h := &q.view()[i]
		count(h)
		if !before(h.start, h.end) || before(h.start, h.seq()) || after(h.end, h.frameEnd()) {
			err = errors.Join(err, fmt.Errorf("held %d to %d of a frame from %d to %d", h.start, h.end, h.seq(), h.frameEnd()))
		}
		if i > 0 && before(h.start, q.view()[i-1].end) {
			err = errors.Join(err, fmt.Errorf("held from %d, and up to %d before that", h.start, q.view()[i-1].end))
		}
	}
	if q.hasRST {
		count(&q.rst)
	}
	if holds != q.holds {
		err = errors.Join(err, fmt.Errorf("slots %v counted, %v held", q.holds, holds))
	}
	return err
}

// based reports whether the sum at the compared point is known, or, where that is a SYN or
// behind a FIN, beside it.
func (s *stream) based() bool {
	for _, pos := range [...]uint32{s.compared, s.compared + 1, s.compared - 1} {
		if _, ok := s.find(pos); ok {
			return true
		}
	}
	return false
}

func (s *stream) check() (err error) {
	pts := s.points.view()
	for i := range pts {
		if i > 0 && !before(pts[i-1].pos, pts[i].pos) {
			err = errors.Join(err, fmt.Errorf("point %d behind point %d", pts[i].pos, pts[i-1].pos))
		}
	}
	n := 0
	for i := range s.loose {
		n += len(s.loose[i].bounds)
	}
	if n != s.nloose || len(pts) > s.budget.perStream || n > s.budget.perStream {
		err = errors.Join(err, fmt.Errorf("%d points, %d loose, %d counted, at most %d", len(pts), n, s.nloose, s.budget.perStream))
	}
	return err
}

func (d *datagrams) check() (err error) {
	held, svm := 0, 0
	for _, f := range d.flows {
		held += f.held.len()
		svm += f.svm.len()
		if f.held.len()+f.svm.len() == 0 {
			err = errors.Join(err, fmt.Errorf("flow %v of nothing", f.tuple))
		}
		for _, r := range f.svm.view() {
			for _, g := range f.held.view() {
				if !g.confirmed && g.key == r.key {
					err = errors.Join(err, fmt.Errorf("flow %v: both guests transmitted %v", f.tuple, r.key))
				}
			}
		}
	}
	if held != d.held || svm != d.svm || held > d.cfg.MaxDatagrams || svm > d.cfg.MaxUnmatched {
		err = errors.Join(err, fmt.Errorf("datagrams: %d held and %d of the SVM alone, counted %d and %d", held, svm, d.held, d.svm))
	}
	return err
}
