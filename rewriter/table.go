// SPDX-License-Identifier: Apache-2.0

// Package rewriter is the model of the kernel's TCP rewriter: what ls_sec_in and
// ls_sec_out do to the frames of the secondary host. It is pure, and the
// kernel's differential test is held against it.
//
// The guests choose their own ISNs and timestamps. The remote only ever sees the
// PVM's, so on S what the remote acknowledges is translated on the way in, and
// what the SVM says on the way out. The offset between the two is not guessed
// from traffic but announced by P (R9).
package rewriter

import (
	"iter"
	"maps"
	"time"
)

// Conn is a connection whose offset is known. It is never evicted (R11).
type Conn struct {
	Off    uint32 // ISN_SVM - ISN_PVM
	TSOff  uint32 // TSval_SVM - TSval_PVM
	Inc    uint32 // incarnation: ISN_PVM
	State  State
	CliAck uint32 // highest ack of the remote, PVM numbering
	ISNSVM uint32
	Last   int64 // boottime ns of the last segment
}

func (c *Conn) offset() offset { return offset{c.Off, c.TSOff} }

// Record is what P is told of a segment of the SVM, in PVM numbering, or, as an
// announcement, what S is told of the PVM's SYN.
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
	conn  map[Tuple]Conn
	half  halves
	max   int
	guess bool // R9 off: offsets guessed from the remote's acks; tests only
}

// New returns an empty table for at most maxConnections connections with an
// offset and maxHalf (at least 1) without.
func New(maxConnections, maxHalf int) *Table {
	t := &Table{max: maxConnections}
	t.half.max = max(maxHalf, 1)
	t.Reset()
	return t
}

// Reset forgets everything: a checkpoint has made the SVM's numbers the PVM's (R11).
func (t *Table) Reset() {
	t.conn = make(map[Tuple]Conn)
	t.half.reset(t.half.max)
}

// Sweep removes connections that were closed and silent for linger, and those
// that were silent for idle, and returns their number (R11).
func (t *Table) Sweep(now int64, linger, idle time.Duration) (removed int) {
	for key, c := range t.conn {
		limit := idle
		if c.State&Reset != 0 || c.State&(GuestFIN|RemoteFIN) == GuestFIN|RemoteFIN {
			limit = min(linger, idle)
		}
		if now-c.Last > int64(limit) {
			delete(t.conn, key)
			removed++
		}
	}
	return removed
}

// Conns are the connections with an offset.
func (t *Table) Conns() iter.Seq2[Tuple, Conn] { return maps.All(t.conn) }

// Halves are the connections without one, the latest used first.
func (t *Table) Halves() iter.Seq2[Tuple, Half] {
	return func(yield func(Tuple, Half) bool) {
		l := t.half.nodes
		for i := l[0].next; i != 0 && yield(l[i].key, l[i].Half); i = l[i].next {
		}
	}
}

// Inbound translates a mirrored segment for the SVM, in place.
func (t *Table) Inbound(s *Segment, now int64) Verdict {
	key, h := s.tuple(true), s.TCP()
	ack, flags := h.Ack(), h.Flags()
	var closing State
	if flags&FIN != 0 {
		closing |= RemoteFIN
	}
	if flags&RST != 0 {
		closing |= Reset
	}
	if c, ok := t.conn[key]; ok {
		c.State |= closing
		c.Last = now
		if flags&ACK != 0 {
			c.CliAck = latest(c.CliAck, ack)
		}
		t.conn[key] = c
		s.toSVM(c.offset())
		return Delivered
	}
	half := t.half.get(key)
	if half == nil {
		return Delivered
	}
	half.Last = now
	if t.guess && half.State&(HasPVM|Active) == 0 && flags&ACK != 0 {
		half.State |= HasPVM
		half.ISNPVM, half.CliPVM = ack-1, half.CliSVM
	}
	if !half.paired() {
		return Delivered
	}
	if half.State&Done == 0 && half.promotes(ack, flags) {
		if len(t.conn) >= t.max {
			return ConnFull
		}
		half.State |= Done
		c := half.conn(ack, now)
		c.State |= closing
		t.conn[key] = c
	}
	s.toSVM(half.offset())
	return Delivered
}

// promotes tells whether the remote's segment completes the handshake: it acks
// the guest's SYN, and is a SYN itself only when the guest opened.
func (h *Half) promotes(ack uint32, flags Flags) bool {
	const window = 1 << 30 // the largest TCP can have
	acked := ack - h.ISNPVM
	return flags&ACK != 0 && (flags&SYN == 0 || h.State&Active != 0) &&
		acked-1 < window
}

func (h *Half) conn(ack uint32, now int64) Conn {
	off := h.offset()
	c := Conn{
		Off: off.seq, TSOff: off.ts, Inc: h.ISNPVM, ISNSVM: h.ISNSVM,
		State: h.State & (HasPVM | HasSVM | Active), CliAck: ack, Last: now,
	}
	if h.State&(PVMTS|SVMTS) == PVMTS|SVMTS {
		c.State |= Timestamps
	}
	return c
}

// Outbound translates a segment of the SVM, in place, and fills *r with the
// record for P when sent.
func (t *Table) Outbound(s *Segment, now int64, r *Record) (v Verdict, sent bool) {
	key, h := s.tuple(false), s.TCP()
	flags := h.Flags()
	c, known := t.conn[key]
	if known && flags&SYN != 0 && h.Seq() != c.ISNSVM {
		delete(t.conn, key) // R8: the tuple is used again
		half := t.half.make(key)
		half.UsedPVM, half.UsedSVM = c.Inc, c.ISNSVM
		known = false
	}
	if known {
		if flags&FIN != 0 {
			c.State |= GuestFIN
		}
		if flags&RST != 0 {
			c.State |= Reset
		}
		c.Last = now
		t.conn[key] = c
		return r.fill(key, s, c.Inc, c.offset(), c.CliAck)
	}
	var half *Half
	if flags&SYN != 0 {
		half = t.half.make(key)
		half.learnSVM(h)
	} else if half = t.half.get(key); half == nil {
		r.inherit(key, s)
		return RecordOut, true
	}
	half.Last = now
	switch {
	case half.pair():
		return r.fill(key, s, half.ISNPVM, half.offset(), half.ISNPVM)
	case t.guess:
		r.inherit(key, s)
		return RecordOut, true
	case flags&(SYN|ACK) == SYN:
		r.inherit(key, s) // P sees which connection the SVM opened
		return Pending, true
	}
	return Pending, false
}

// learnSVM takes the SVM's part from its SYN or SYN|ACK. A repeated one leaves
// the timestamp alone: the offset was made with the first.
func (h *Half) learnSVM(tcp TCP) {
	flags := tcp.Flags()
	if h.State&HasSVM == 0 || h.ISNSVM != tcp.Seq() {
		h.State &^= Active | GuestFIN | RemoteFIN | Reset | SVMTS | Done
		h.State |= HasSVM
		h.ISNSVM, h.CliSVM = tcp.Seq(), 0
		if flags&ACK == 0 {
			h.State |= Active
		}
		var ok bool
		if h.TSSVM, ok = tcp.Options().timestamp(); ok {
			h.State |= SVMTS
		}
	}
	if flags&ACK != 0 { // a simultaneous open's second SYN, too
		h.State &^= Active
		h.CliSVM = tcp.Ack() - 1
	}
	h.Win, h.Flags = tcp.Win(), flags
	h.OptLen = uint8(copy(h.Opts[:], tcp.Options()))
	clear(h.Opts[h.OptLen:])
}

// learnPVM takes the PVM's part from an announcement.
func (h *Half) learnPVM(a *Record) {
	if h.State&HasPVM == 0 || h.ISNPVM != a.Seq {
		h.State &^= PVMActive | PVMTS
		h.State |= HasPVM
		h.ISNPVM, h.CliPVM = a.Seq, 0
		if a.Flags&ACK == 0 {
			h.State |= PVMActive
		}
		var ok bool
		if h.TSPVM, ok = Options(a.Opts[:a.OptLen]).timestamp(); ok {
			h.State |= PVMTS
		}
	}
	if a.Flags&ACK != 0 {
		h.State &^= PVMActive
		h.CliPVM = a.Ack - 1
	}
}

// Announce takes P's word for the PVM's SYN or SYN|ACK: a.Seq is its ISN. When
// the SVM's is known too, *r is the SVM's, for P, however often P asks (R9).
func (t *Table) Announce(a *Record, now int64, r *Record) (v Verdict, sent bool) {
	if c, ok := t.conn[a.Tuple]; t.guess || ok && c.Inc == a.Seq {
		return RecordIn, false
	}
	h := t.half.make(a.Tuple)
	h.learnPVM(a)
	h.Last = now
	if !h.pair() {
		return RecordIn, false
	}
	*r = Record{
		Tuple: a.Tuple, Inc: h.ISNPVM, Seq: h.ISNPVM, End: h.ISNPVM + 1,
		Win: h.Win, Flags: h.Flags, OptLen: h.OptLen, Opts: h.Opts,
	}
	if h.Flags&ACK != 0 {
		r.Ack = h.CliSVM + 1
	}
	return RecordOut, true
}

// fill translates s and makes r its record.
func (r *Record) fill(key Tuple, s *Segment, inc uint32, off offset, cliAck uint32) (Verdict, bool) {
	s.toPVM(off)
	r.take(key, s)
	r.Inc, r.CliAck = inc, cliAck
	return RecordOut, true
}

// inherit makes r the record of a segment without incarnation: the connection
// came with a checkpoint, and both guests number it alike.
func (r *Record) inherit(key Tuple, s *Segment) {
	r.take(key, s)
	r.Inherited = true
}

func (r *Record) take(key Tuple, s *Segment) {
	h := s.TCP()
	*r = Record{
		Tuple: key, Seq: h.Seq(), End: s.endSeq(), Ack: h.Ack(),
		Win: h.Win(), Flags: h.Flags(),
	}
	r.OptLen = uint8(copy(r.Opts[:], h.Options()))
}
