// SPDX-License-Identifier: Apache-2.0

package compare

// A flood of SYNs makes half-open connections, which nobody misses: they are kept
// in the order they were made, and the oldest makes room (R11). A remote that meant
// it goes on as a connection met in mid-stream.

// halfOpened notes that c has a SYN of the PVM and is not established.
func (p *Primary) halfOpened(c *conn) {
	if p.half.push(&c.half); p.half.n > p.cfg.MaxHalfOpen {
		p.evict()
	}
}

// evict gives up the oldest half-open connection.
func (p *Primary) evict() {
	p.stats.Evicted++
	p.remove(p.half.first.of, ReasonHalfOpen)
}

// createEvicting is create, but a half-open connection makes room.
func (p *Primary) createEvicting(t *Tuple) *conn {
	if len(p.conns) >= p.cfg.MaxConnections && p.half.first != nil {
		p.evict()
	}
	return p.create(t)
}
