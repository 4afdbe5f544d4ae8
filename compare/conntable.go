// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"cmp"
	"slices"
)

// connTable holds the connections. It is bounded: a flood of SYNs makes half-open
// connections, which nobody misses, so they are kept in the order they were made, and the
// oldest makes room (R11). A remote that meant it goes on as a connection met in
// mid-stream.
type connTable struct {
	*core
	byTuple map[Tuple]*conn
	half    list[*conn] // with a SYN of the PVM, and not established
	opening list[*conn] // the kernel's since their SYN|ACK: whether they are established is not known
	owned   int         // the kernel owns
	spare   []*conn

	evictedAt int64 // when a half-open connection last made room, if ever
}

const maxSpare = 1024

// create adds a connection, or gives nil when the table is full.
func (t *connTable) create(tuple *Tuple) *conn {
	if len(t.byTuple) >= t.cfg.MaxConnections {
		return nil
	}
	var c *conn
	if n := len(t.spare); n > 0 {
		c = t.spare[n-1]
		t.spare = t.spare[:n-1]
	} else {
		c = new(conn)
		c.timer.conn = c
		c.core, c.held.core, c.svm.budget = t.core, t.core, &t.points
		c.open.of, c.half.of = c, c
	}
	c.tuple = *tuple
	t.reset(c)
	t.byTuple[c.tuple] = c
	t.timers.add(&c.timer)
	return c
}

// reset brings c to the state of a connection nothing is known of. Nothing may
// be held any more.
func (t *connTable) reset(c *conn) {
	c.svm.forget()
	t.opens.unlink(c)
	c.half.unlink()
	c.stall.stop()
	*c = conn{
		timer: c.timer, no: t.eventNo, born: t.now, last: t.now, open: c.open, half: c.half,
		sender:   sender{core: c.core, tuple: c.tuple, acks: ackState{marks: c.acks.marks[:0], scale: scaleUnknown}},
		held:     heldQueue{core: c.core, pieces: c.held.pieces},
		svm:      stream{budget: c.svm.budget, points: c.svm.points, loose: c.svm.loose},
		floating: true,
		stall:    stallClock{all: &t.led, usual: t.delaysOf(c.tuple.GuestPort)},
		owner:    ownership{known: c.owner.known},
	}
}

// remove ends c's tracking.
func (t *connTable) remove(c *conn, why Reason) {
	c.held.clear(why)
	c.svm.forget()
	t.opens.unlink(c)
	c.half.unlink()
	c.stall.stop()
	t.timers.remove(&c.timer)
	delete(t.byTuple, c.tuple)
	t.forget(c)
	if len(t.spare) < maxSpare {
		t.spare = append(t.spare, c)
	}
}

// halfOpened notes that c has a SYN of the PVM and is not established.
func (t *connTable) halfOpened(c *conn) {
	t.half.push(&c.half)
	t.makeHalfRoom(c)
}

// makeHalfRoom has the oldest half-open connection but c go if there are too many (R11), or else the kernel give back the
// oldest that may be.
func (t *connTable) makeHalfRoom(c *conn) {
	switch {
	case t.half.n+t.opening.n <= t.cfg.MaxHalfOpen || t.off(mutR11):
	case t.half.n > 0 && t.half.first.of != c:
		t.evict()
	case t.opening.n > 0:
		oldest := t.opening.first.of
		oldest.half.unlink()
		t.emit(OpTake, &oldest.tuple)
	}
}

// evict gives up the oldest half-open connection.
func (t *connTable) evict() {
	t.stats.Evicted++
	t.evictedAt = t.now
	t.remove(t.half.first.of, ReasonHalfOpen)
}

// flooded reports whether c is half-open and others had to make room since it was made. Then
// S's table has overflowed too, and has forgotten what the SVM answered.
func (t *connTable) flooded(c *conn) bool {
	return c.half.in == &t.half && t.stats.Evicted > 0 && t.evictedAt >= c.born
}

// createEvicting is create, but a half-open connection makes room.
func (t *connTable) createEvicting(tuple *Tuple) *conn {
	if len(t.byTuple) >= t.cfg.MaxConnections && t.half.first != nil {
		t.evict()
	}
	return t.create(tuple)
}

// all gives the connections in the order they were made.
func (t *connTable) all() []*conn {
	cs := make([]*conn, 0, len(t.byTuple))
	for _, k := range t.timers {
		if k.conn != nil {
			cs = append(cs, k.conn)
		}
	}
	slices.SortFunc(cs, func(a, b *conn) int { return cmp.Compare(a.no, b.no) })
	return cs
}
