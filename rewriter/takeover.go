// SPDX-License-Identifier: Apache-2.0

package rewriter

import (
	"iter"
	"maps"
)

// Takeover collects, from the secondary's tables, the connections that get the guard when
// it takes over (R22): all on which the PVM may have transmitted. K is the tables' key.
// The tables are added in any order; where several know a connection, the one that knows
// most of it counts.
type Takeover[K comparable] struct {
	guard uint32
	doubt State
	now   int64
	conns map[K]Conn
}

// NewTakeover begins at boottime now, in ns; guard is in timestamp ticks. doubt: a checkpoint may have been loaded since
// the offsets were made.
func NewTakeover[K comparable](guard uint32, doubt bool, now int64) *Takeover[K] {
	t := &Takeover[K]{guard: guard, now: now, conns: make(map[K]Conn)}
	if doubt {
		t.doubt = Doubtful
	}
	return t
}

// AddConn takes in a connection with an offset.
func (t *Takeover[K]) AddConn(key K, c Conn) { t.conns[key] = c }

// AddHalf takes in a half-open connection. One whose last ACK the SVM has not received
// is open to the remote; one that is no pair never left (R9).
func (t *Takeover[K]) AddHalf(key K, h *Half) {
	if h.State&Done != 0 || !h.known() || !h.usedPair() {
		return
	}
	if c, ok := t.conns[key]; !ok || c.State == Inherited {
		c = h.Conn()
		c.Last = t.now
		t.conns[key] = c
	}
}

// AddInherited takes in a connection without an offset: it came with a checkpoint, or the
// PVM's host had taken it over itself. isn is the guest's first sequence number, with which it may repeat
// its SYN|ACK; 0: not known, as the handshake is over.
func (t *Takeover[K]) AddInherited(key K, isn uint32) {
	if c, ok := t.conns[key]; !ok || c.State == Inherited && c.ISNSVM == 0 {
		t.conns[key] = Conn{State: Inherited, ISNSVM: isn, Last: t.now}
	}
}

// Guarded are the entries to write, each with the guard. Those that have one already,
// from a daemon before this one, are left out.
func (t *Takeover[K]) Guarded() iter.Seq2[K, Conn] {
	return func(yield func(K, Conn) bool) {
		for key, c := range maps.All(t.conns) {
			if c.State&Guarded != 0 {
				continue
			}
			c.Guard, c.State = t.guard, c.State|Guarded
			if c.State&Inherited == 0 {
				c.State |= t.doubt
			}
			if !yield(key, c) {
				return
			}
		}
	}
}
