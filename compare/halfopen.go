// SPDX-License-Identifier: Apache-2.0

package compare

// A flood of SYNs makes half-open connections, which nobody misses: they are kept
// in the order they were made, and the oldest makes room (R11). A remote that meant
// it goes on as a connection met in mid-stream.

// halfOpen lists connections with a SYN of the PVM that are not established.
type halfOpen struct {
	n              int
	oldest, newest *conn
}

// halfLink makes conn an element of that list.
type halfLink struct {
	in         bool
	prev, next *conn
}

func (p *Primary) linkHalf(c *conn) {
	h := &p.half
	c.half = halfLink{in: true, prev: h.newest}
	if h.newest != nil {
		h.newest.half.next = c
	} else {
		h.oldest = c
	}
	h.newest = c
	if h.n++; h.n > p.cfg.MaxHalfOpen && !p.off(mutR11) {
		p.evict()
	}
}

func (p *Primary) unlinkHalf(c *conn) {
	l, h := c.half, &p.half
	if !l.in {
		return
	}
	if l.prev != nil {
		l.prev.half.next = l.next
	} else {
		h.oldest = l.next
	}
	if l.next != nil {
		l.next.half.prev = l.prev
	} else {
		h.newest = l.prev
	}
	h.n--
	c.half = halfLink{}
}

// evict gives up the oldest half-open connection.
func (p *Primary) evict() {
	p.stats.Evicted++
	p.remove(p.half.oldest, ReasonHalfOpen)
}

// createEvicting is create, but a half-open connection makes room.
func (p *Primary) createEvicting(t *Tuple) *conn {
	if len(p.conns) >= p.cfg.MaxConnections && p.half.oldest != nil {
		p.evict()
	}
	return p.create(t)
}
