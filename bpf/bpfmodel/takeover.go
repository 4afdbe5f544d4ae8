// SPDX-License-Identifier: Apache-2.0

package bpfmodel

import (
	"bytes"
	"cmp"
	"iter"
	"maps"
	"slices"
	"time"

	"github.com/lockstep-ft/lockstep/rewriter"
)

// Alone translates a segment to or from an SVM that has taken over, in place. again: it
// is a copy that is retransmitted, which has the PVM's numbers already and needs the guard
// only (R22). It reports whether the segment may go on.
func (t *Table) Alone(s *Segment, toGuest, again bool, now int64) bool {
	if toGuest {
		t.strip(s)
	}
	key, h := s.Tuple, s.TCP()
	c, ok := t.conn[key]
	if ok && !toGuest && h.Flags()&SYN != 0 && c.ISNSVM != h.Seq() {
		delete(t.conn, key) // another connection
		delete(t.edge, key)
		return true
	}
	if !ok {
		return true
	}
	goes := true
	if toGuest {
		s.enter(&c, t.edgeOf(key), now)
	} else {
		goes = s.leave(&c, t.edgeOf(key), again, now)
	}
	t.conn[key] = c
	return goes
}

// EdgeIn translates a segment for P's guest, in place, before anything else uses it.
func (t *Table) EdgeIn(s *Segment, now int64) {
	if c, ok := t.edge[s.Tuple]; ok && !t.Unedged {
		s.enter(&c, rewriter.Offset{}, now)
		t.edge[s.Tuple] = c
	}
}

// EdgeOut translates a segment of P's guest, in place, as it leaves the host, and reports whether it may.
func (t *Table) EdgeOut(s *Segment, now int64) (goes bool) {
	goes = true
	c, ok := t.edge[s.Tuple]
	switch {
	case !ok || t.Unedged:
	case s.TCP().Flags()&SYN != 0 && c.ISNSVM != s.TCP().Seq():
		delete(t.edge, s.Tuple) // another connection
	default:
		goes = s.leave(&c, rewriter.Offset{}, false, now)
		t.edge[s.Tuple] = c
	}
	return goes
}

// EdgeError does the same for an ICMP error.
func (t *Table) EdgeError(e *ICMPError, toGuest bool) {
	if c, ok := t.edge[e.tuple]; ok && !t.Unquoted && !t.Unedged {
		e.pass(&c, rewriter.Offset{}, toGuest)
	}
}

func (t *Table) edgeOf(key Tuple) rewriter.Offset {
	if t.Unedged {
		return rewriter.Offset{}
	}
	c := t.edge[key]
	return c.Offset()
}

// leave translates the guest's segment to the numbers that the remote knows, by c and the
// edge behind it. It reports whether it is known in which numbers it is.
func (s *Segment) leave(c *Conn, edge rewriter.Offset, again bool, now int64) bool {
	h := s.TCP()
	note(c, s, true, 0, now)
	if c.State&rewriter.Doubtful != 0 && !again && !c.Settle(h.Seq()) {
		return false
	}
	off := rewriter.Offset{Seq: edge.Seq, TS: edge.TS - c.Guard}
	if !again {
		off.Seq += c.Off
		off.TS += c.TSOff
	}
	if val, ok := h.Options().tsVal(); ok && c.Guard != 0 && c.TSFirst == 0 {
		c.TSFirst = max(val-off.TS, 1)
	}
	s.toPVM(off)
	return true
}

// enter translates the remote's segment to the guest's numbers, likewise. From an echo
// older than the guard that must not be subtracted: the guest would measure it as part of
// the round-trip time.
func (s *Segment) enter(c *Conn, edge rewriter.Offset, now int64) {
	h := s.TCP()
	note(c, s, false, edge.Seq, now)
	off := rewriter.Offset{Seq: c.Off + edge.Seq, TS: c.TSOff + edge.TS}
	if c.Guard != 0 {
		if ecr, ok := h.Options().tsEcr(); ok && c.TSFirst != 0 && !after(c.TSFirst, ecr) {
			c.State |= rewriter.Echoes
		}
		if c.State&rewriter.Echoes != 0 {
			off.TS -= c.Guard
		}
	}
	s.toSVM(off)
}

// TakeOver makes every connection that the PVM may have used one that is translated, with
// the guard in timestamp ticks (R22). doubt: a checkpoint may have been loaded since the offsets were made. Those without an offset do without when the table is
// full; false: another one found no room.
func (t *Table) TakeOver(guard uint32, doubt bool, now int64) bool {
	plan := rewriter.NewTakeover[Tuple](guard, doubt, now)
	for key, h := range t.half.All() {
		plan.AddHalf(key, &h.Half)
	}
	for key, c := range t.edge {
		plan.AddInherited(key, c.ISNSVM)
	}
	for key := range t.inher.All() {
		plan.AddInherited(key, 0)
	}
	for key, c := range t.conn {
		plan.AddConn(key, c)
	}
	all := true
	guarded := maps.Collect(plan.Guarded())
	for _, needed := range []bool{true, false} {
		for _, key := range sorted(guarded) {
			c := guarded[key]
			if needed != (c.State&rewriter.Inherited == 0) {
				continue
			}
			if _, ok := t.conn[key]; ok || len(t.conn) < t.max {
				t.conn[key] = c
			} else if needed {
				all = false
			}
		}
	}
	return all
}

// AddEdge adds a connection that was taken over: off is the guest's numbers minus those
// that the remote knows. false: the table is full.
func (t *Table) AddEdge(key Tuple, c Conn) bool {
	if _, ok := t.edge[key]; !ok && len(t.edge) >= t.max {
		return false
	}
	t.edge[key] = c
	return true
}

// Edges are the connections that were taken over, in the order of their tuples.
func (t *Table) Edges() iter.Seq2[Tuple, Conn] { return ordered(t.edge) }

// Promoted are the edges of the primary that a secondary becomes which took over.
func (t *Table) Promoted() iter.Seq2[Tuple, Conn] {
	return func(yield func(Tuple, Conn) bool) {
		for key, c := range ordered(t.conn) {
			edge := t.edge[key]
			if !yield(key, c.Behind(edge.Offset())) {
				return
			}
		}
	}
}

// SweepEdges is Sweep for the connections that were taken over.
func (t *Table) SweepEdges(now int64, linger, idle time.Duration) (removed int) {
	return sweep(t.edge, now, linger, idle)
}

// ordered are the entries of m in the order of their tuples, so that what is made of them
// is the same each time.
func ordered(m map[Tuple]Conn) iter.Seq2[Tuple, Conn] {
	return func(yield func(Tuple, Conn) bool) {
		for _, key := range sorted(m) {
			if !yield(key, m[key]) {
				return
			}
		}
	}
}

func sorted(m map[Tuple]Conn) []Tuple {
	return slices.SortedFunc(maps.Keys(m), compareTuples)
}

func compareTuples(a, b Tuple) int {
	return cmp.Or(
		bytes.Compare(a.Remote[:], b.Remote[:]), cmp.Compare(a.RemotePort, b.RemotePort),
		bytes.Compare(a.Guest[:], b.Guest[:]), cmp.Compare(a.GuestPort, b.GuestPort),
		cmp.Compare(a.VLAN, b.VLAN), cmp.Compare(a.VLAN2, b.VLAN2), cmp.Compare(a.Proto, b.Proto),
	)
}
