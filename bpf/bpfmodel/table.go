// SPDX-License-Identifier: Apache-2.0

// Package bpfmodel is the model of the kernel's TCP rewriter: what ls_sec_in,
// ls_sec_out and ls_sec_gate do to segments on the secondary host, and what all programs
// do on a host that took over (R22). It is pure, and what the kernel does is tested against
// it, here and in sim/kernel.
//
// The guests choose their own ISNs and timestamps. The remote only ever sees the
// PVM's, so on S what the remote acknowledges is translated on the way in, and
// what the SVM transmits on the way out. The offset between the two is not guessed
// from traffic but announced by P (R9).
package bpfmodel

import (
	"iter"
	"time"

	"github.com/lockstep-ft/lockstep/rewriter"
)

// Conn is an entry of ls_conn.
type Conn = rewriter.Conn

// Record is the digest record of a segment of the SVM, in PVM numbering, or, as an
// announcement, P's report of the PVM's SYN.
type Record struct {
	Tuple
	Inherited     bool // no incarnation, numbers untranslated
	Inc, Seq, End uint32
	Ack           uint32
	Win           uint16 // unscaled
	Flags         Flags
	OptLen        uint8
	Opts          [maxOpts]byte
	CliAck        uint32 // goes with S's copy only
}

func (r *Record) options() Options { return Options(r.Opts[:min(r.OptLen, maxOpts)]) }

// Verdict is what became of a frame, by the name the kernel counts it under.
type Verdict string

const (
	Delivered Verdict = "delivered"  // goes to the SVM
	RecordOut Verdict = "record_out" // a record goes to P
	RecordIn  Verdict = "record_in"  // announcement taken, nothing to answer
	Pending   Verdict = "pending"    // no record: the PVM's ISN is not known yet
	ConnFull  Verdict = "conn_full"  // dropped: a checkpoint is needed (R11)
)

// Table holds the connections of one guest NIC.
type Table struct {
	MPTCP bool // its option stays in SYNs

	// Rules that are off, as LS_MUTATE_R9, LS_MUTATE_QUOTE and LS_MUTATE_EDGE have it.
	Unannounced, Unquoted, Unedged bool

	conn  map[Tuple]Conn
	half  *LRU[Half]
	inher *LRU[uint32]   // highest ack of the remote of connections that came with a checkpoint; 0: none received
	edge  map[Tuple]Conn // connections that this host, or one before it, took over
	max   int
	guess bool // R9 off: offsets guessed from the remote's acks; tests only
}

// New returns an empty table for at most maxConnections connections with an
// offset, maxHalf without, and maxInherited that came with a checkpoint (at least 1 each).
func New(maxConnections, maxHalf, maxInherited int) *Table {
	t := &Table{max: maxConnections, half: NewLRU[Half](maxHalf), inher: NewLRU[uint32](maxInherited), edge: make(map[Tuple]Conn)}
	t.Reset()
	return t
}

// Reset forgets what the guests' numbers are: a checkpoint has made the SVM's the PVM's
// (R11). What was taken over stays.
func (t *Table) Reset() {
	t.conn = make(map[Tuple]Conn)
	t.half.Reset()
	t.inher.Reset()
}

// Sweep removes connections that were closed and silent for linger, and those
// that were silent for idle, and returns their number (R11).
func (t *Table) Sweep(now int64, linger, idle time.Duration) (removed int) {
	return sweep(t.conn, now, linger, idle)
}

func sweep(conns map[Tuple]Conn, now int64, linger, idle time.Duration) (removed int) {
	for key, c := range conns {
		if c.Ended(now, linger, idle) {
			delete(conns, key)
			removed++
		}
	}
	return removed
}

// Conns are the connections with an offset, in the order of their tuples.
func (t *Table) Conns() iter.Seq2[Tuple, Conn] { return ordered(t.conn) }

// Halves are the connections without one, the latest used first.
func (t *Table) Halves() iter.Seq2[Tuple, Half] { return t.half.All() }

// Inherited are the connections that came with a checkpoint and that the SVM has sent on
// since, with the highest ack of the remote; 0: none received.
func (t *Table) Inherited() iter.Seq2[Tuple, uint32] { return t.inher.All() }

// Inbound translates a mirrored segment for the SVM, in place.
func (t *Table) Inbound(s *Segment, now int64) Verdict {
	key, h := s.Tuple, s.TCP()
	if c, ok := t.touch(key, s, false, now); ok {
		s.toSVM(c.Offset())
		return Delivered
	}
	half := t.half.Get(key)
	if t.guess && half != nil && half.State&(rewriter.HasPVM|rewriter.Active) == 0 && h.Flags()&ACK != 0 {
		half.State |= rewriter.HasPVM
		half.ISNPVM, half.CliPVM = h.Ack()-1, half.CliSVM
	}
	if half == nil || !half.Paired() {
		if ack := t.inher.Get(key); ack != nil && h.Flags()&ACK != 0 && (*ack == 0 || after(h.Ack(), *ack)) {
			*ack = h.Ack()
		}
		return Delivered
	}
	off := half.Offset()
	off.TS = half.echo(h, off.TS)
	if half.acked(h) {
		delete(t.edge, key) // of an earlier connection
		if len(t.conn) >= t.max {
			return ConnFull
		}
		half.State |= rewriter.Done
		t.conn[key] = half.conn(h.Ack())
		t.touch(key, s, false, now)
	}
	s.toSVM(off)
	return Delivered
}

// Outbound translates a segment of the SVM, in place, and fills *r with the
// record for P when sent.
func (t *Table) Outbound(s *Segment, now int64, r *Record) (v Verdict, sent bool) {
	t.strip(s)
	key, h := s.Tuple, s.TCP()
	flags := h.Flags()
	if flags&(RST|ACK) == RST|ACK && h.Seq() == 0 {
		r.inherit(key, s) // refuses a SYN: of no incarnation, whatever the tables hold
		return RecordOut, true
	}
	if c, ok := t.conn[key]; ok && flags&SYN != 0 && c.ISNSVM != h.Seq() {
		delete(t.conn, key) // R8: the tuple is used again, and its last pair not made anew
		half := t.half.Make(key)
		half.UsedPVM, half.UsedSVM = c.Inc, c.ISNSVM
	}
	if c, ok := t.touch(key, s, true, now); ok {
		s.toPVM(c.Offset())
		r.take(key, s, c.Inc, c.CliAck)
		return RecordOut, true
	}
	half := t.half.Get(key)
	if flags&SYN != 0 {
		t.inher.Delete(key)
		half = t.half.Make(key)
		half.learnSVM(h, now)
		if t.Unannounced {
			half.State |= rewriter.HasPVM
			half.ISNPVM, half.UsedPVM, half.UsedSVM = h.Seq(), h.Seq(), h.Seq()
		}
		half.pair()
	} else if half == nil || half.State&rewriter.HasSVM == 0 && !t.guess {
		r.inherit(key, s)
		ack := t.inher.Get(key)
		if ack != nil && *ack != 0 {
			r.CliAck = *ack
		}
		if ack == nil && flags&RST == 0 {
			t.inher.Make(key)
		}
		return RecordOut, true
	}
	switch {
	case half.Paired():
		half.Last = now
		s.toPVM(half.Offset())
		r.take(key, s, half.ISNPVM, half.ISNPVM)
		return RecordOut, true
	case t.guess:
		r.inherit(key, s)
		return RecordOut, true
	case flags&(SYN|ACK) == SYN:
		r.inherit(key, s) // P sees which connection the SVM opened
		return Pending, true
	}
	return Pending, false
}

// touch notes a segment of either side in the connection, if there is one.
func (t *Table) touch(key Tuple, s *Segment, fromGuest bool, now int64) (Conn, bool) {
	c, ok := t.conn[key]
	if ok {
		note(&c, s, fromGuest, 0, now)
		t.conn[key] = c
	}
	return c, ok
}

// note notes a segment of either side. edge: what is added to the remote's acks behind an edge.
func note(c *Conn, s *Segment, fromGuest bool, edge uint32, now int64) {
	c.Last = now
	h := s.TCP()
	flags := h.Flags()
	switch {
	case flags&RST != 0:
		c.State |= rewriter.WasReset
	case flags&FIN != 0 && fromGuest:
		c.State |= rewriter.GuestFIN
	case flags&FIN != 0:
		c.State |= rewriter.RemoteFIN
	case fromGuest:
		c.State &^= rewriter.WasReset // it did not believe the RST: anybody may have sent it
	}
	switch {
	case fromGuest && (flags&(RST|FIN) == FIN || s.End > s.Pay && c.State&rewriter.GuestFIN != 0):
		c.State |= rewriter.Unacked
	case !fromGuest && flags&ACK != 0:
		c.State &^= rewriter.Unacked
	}
	if ack := h.Ack() + edge; !fromGuest && flags&ACK != 0 && after(ack, c.CliAck) {
		c.CliAck = ack
	}
}

func (t *Table) strip(s *Segment) {
	if !t.MPTCP {
		s.StripMPTCP()
	}
}

// Announce takes in the announcement of the PVM's SYN or SYN|ACK: a.Seq is its ISN. When
// the SVM's is known too, *r is the SVM's, for P, however often P asks (R9).
func (t *Table) Announce(a *Record, now int64, r *Record) (v Verdict, sent bool) {
	if c, ok := t.conn[a.Tuple]; t.guess || t.Unannounced || ok && c.Inc == a.Seq {
		return RecordIn, false
	}
	h := t.half.Make(a.Tuple)
	h.learnPVM(a, now)
	if !h.pair() {
		return RecordIn, false
	}
	h.record(a.Tuple, r)
	return RecordOut, true
}

// take makes r the record of s, which is in PVM numbering.
func (r *Record) take(key Tuple, s *Segment, inc, cliAck uint32) {
	h := s.TCP()
	*r = Record{
		Tuple: key, Inc: inc, Seq: h.Seq(), End: s.EndPos(), Ack: h.Ack(),
		Win: h.Win(), Flags: h.Flags(), CliAck: cliAck,
	}
	r.OptLen = uint8(copy(r.Opts[:], h.Options()))
}

// inherit makes r the record of a segment without incarnation: the connection
// came with a checkpoint, and both guests number it alike. What the remote has
// acked is not known: nothing.
func (r *Record) inherit(key Tuple, s *Segment) {
	r.take(key, s, 0, s.TCP().Seq()-ackSpan)
	r.Inherited = true
}
