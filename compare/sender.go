// SPDX-License-Identifier: Apache-2.0

package compare

// template is the PVM's newest ACK, for frames that no slot is behind.
type template struct {
	ok, pure bool
	flags    Flags
	seq, ack uint32 // with the urgent pointer, the PVM's own
	win, urg uint16
	hdrLen   uint8
	hdr      [176]byte
	opts     options
}

// sender makes the frames of one connection that leave, in the PVM's name, and knows
// what has left.
type sender struct {
	*core
	tuple    Tuple
	inc      incarnation
	syn      handshake
	acks     ackState
	tmpl     template
	released uint32 // highest position sent, a FIN included
	placed   bool   // released holds: something has left, or had before P knew of the connection
	tsSent   uint32 // highest TSval sent
	tsKnown  bool
	accECN   bool    // AE was seen: with CWR and ECE it is a counter
	pureUpTo mark    // what the PVM's newest pure ACK acknowledges
	ackAt    int64   // when a grown ACK has waited long enough for data; 0: none waits
	lag      backoff // of the guest that has acknowledged less (R6)
	lagAt    uint32  // what both had when it began
	sealed   bool    // by a digest over the header: frames leave as they are
}

// look notes what a segment of the PVM shows of how its frames have to be treated.
// first: it may settle whether they are sealed.
func (t *sender) look(s *Segment, first bool) {
	t.accECN = t.accECN || s.Flags&AE != 0
	if first {
		t.sealed = sealed(s.Opts) && !t.off(mutSealed)
	}
}

// keep makes a segment of the PVM that acknowledges the template.
func (t *sender) keep(s *Segment) {
	m := &t.tmpl
	if s.Flags&(ACK|RST|SYN) != ACK || len(s.Header) == 0 || len(s.Header) > len(m.hdr) {
		return
	}
	// The IP header of a pure ACK differs from that of data (ECN), so the ones
	// that came with data serve only until there is a better one.
	pure := s.Len == 0 && s.Flags&FIN == 0
	if !pure && t.sealed {
		return
	}
	if pure || !m.pure {
		m.hdrLen = uint8(copy(m.hdr[:], s.Header))
	}
	m.flags, m.urg = s.Flags, s.Urg
	if !pure {
		m.flags &^= URG | t.once()
		m.urg = 0
	}
	m.opts.set(s.Opts)
	m.seq, m.ack, m.win = s.Seq, s.Ack, s.Win
	m.ok, m.pure = true, m.pure || pure
}

// keepSYN makes the PVM's SYN|ACK the template of a connection of which Step does not see the first segments (R27). Of its
// options an ACK has timestamps alone.
func (t *sender) keepSYN(s *Segment) {
	m := &t.tmpl
	if len(s.Header) > len(m.hdr) {
		return
	}
	var opts []byte
	if ts := tsOpt(s.Opts); ts != nil {
		opts = append([]byte{optNOP, optNOP}, ts...)
	}
	m.opts.set(opts)
	m.hdrLen = uint8(copy(m.hdr[:], s.Header))
	m.ok, m.flags, m.seq, m.ack, m.win = true, ACK, s.Seq+1, s.Ack, s.Win
}

// tsVal is the timestamp of the template, setTSVal a newer one; without timestamps there is none.
func (m *template) tsVal() uint32 {
	if ts := tsOpt(m.opts.bytes()); ts != nil {
		return be32(ts[2:])
	}
	return 0
}

func (m *template) setTSVal(v uint32) {
	if ts := tsOpt(m.opts.bytes()); ts != nil {
		putBE32(ts[2:], v)
	}
}

// ackFlags are kept in pure ACKs: what the PVM reports of congestion, which AccECN counts
// in all three bits, and the reserved bits.
const ackFlags = ECE | CWR | AE | 0xe00

// once are the flags that belong to one frame's first part alone. CWR does, unless it
// is a digit of AccECN's counter. Without AccECN AE is never set.
func (t *sender) once() Flags {
	if t.accECN {
		return 0
	}
	return CWR
}

// urgent has e point to where a frame with sequence number seq points. What was urgent
// before e is so no more.
func (t *sender) urgent(e *Effect, seq uint32, urg uint16) {
	e.Urg = urg
	if e.Flags&URG == 0 || e.Seq == seq || t.off(mutURG) {
		return
	}
	at := seq + uint32(urg) - e.Seq
	if at == 0 || at > 0xffff {
		e.Flags &^= URG
		at = 0
	}
	e.Urg = uint16(at)
}

// stamp keeps timestamps from going back: a frame that was held would leave
// behind younger ACKs, and the remote would drop it as an old duplicate (PAWS,
// RFC 7323, 5.3). What is echoed belongs to the ACK, so it is the echo of the side that
// let it grow: by an older one the remote would take its repetition, which the SVM
// had missed, for needless (RFC 3522), forget what else it holds for lost, and wait for
// its timer.
func (t *sender) stamp(o *options) {
	ts := tsOpt(o.bytes())
	if ts == nil {
		return
	}
	if d := t.acks.slower(); d.echoes {
		putBE32(ts[6:], d.echo)
	}
	val := be32(ts[2:])
	if t.tsKnown && before(val, t.tsSent) {
		putBE32(ts[2:], t.tsSent)
		return
	}
	t.tsSent, t.tsKnown = val, true
}

// acknowledge gives the ACK and window of a frame that leaves with flags f.
func (t *sender) acknowledge(f Flags) (ack uint32, win uint16) {
	ack, win = t.acks.transmit(f, t.off(mutR2))
	return ack, win
}

// send sends h up to position to. last: the slot is free then.
func (t *sender) send(h *piece, to uint32, last bool) {
	t.placed = true
	e := t.emit(OpSend, &t.tuple)
	e.Slot, e.Free = h.slot, last
	if end := maxSeq(h.start, to); after(end, t.released) {
		t.released = end
	}
	t.stats.ReleasedPackets++
	if last {
		t.heldSince(h.at)
	}
	if t.sealed {
		e.Seq, e.Flags, e.To = h.seq(), h.flags, uint32(len(h.payload))
		t.stats.ReleasedBytes += uint64(e.To)
		t.unchanged(e, h.ack, h.win, h.urg, &h.opts)
		return
	}
	e.Seq, e.Ack, e.Flags = h.start, h.ack, h.flags // without the flag the ACK means nothing
	if !h.syn {
		e.From = h.start - h.base
		e.To = minSeq(to, h.dataEnd()) - h.base
	}
	if !h.fin || to != h.end {
		e.Flags &^= FIN
	}
	if e.From == e.To || e.To != uint32(len(h.payload)) {
		e.Flags &^= PSH
	}
	if e.From > 0 {
		e.Flags &^= t.once()
	}
	t.urgent(e, h.seq(), h.urg)
	o := h.opts
	switch {
	case h.flags&ACK != 0:
		o.keepSACK(&t.acks.svmSACK, t.acks.svm.ack)
		e.Ack, e.Win = t.acknowledge(h.flags)
	case t.syn.svm:
		e.Win = min(h.win, t.syn.svmWin)
	default:
		e.Win = h.win
	}
	t.stamp(&o)
	e.OptLen, e.Opts = o.n, o.b
	t.stats.ReleasedBytes += uint64(e.To - e.From)
}

// sendRST sends a RST that was held, with sequence number seq. minimum: it acknowledges
// what may be acknowledged, not what the PVM did.
func (t *sender) sendRST(h *piece, seq uint32, minimum bool) {
	e := t.emit(OpSend, &t.tuple)
	e.Slot, e.Free = h.slot, true
	e.Seq, e.Ack, e.Flags, e.Win = seq, h.ack, h.flags, h.win
	if h.flags&ACK != 0 && minimum && t.acks.may(ACK) && !t.sealed {
		m, _ := t.acks.minimum(ACK, t.off(mutR2))
		e.Ack = m.ack
	}
	t.urgent(e, h.start, h.urg)
	e.OptLen, e.Opts = h.opts.n, h.opts.b
	t.stats.ReleasedPackets++
	t.heldSince(h.at)
}

// synHeld reports whether the PVM's SYN has not left, so that nothing else may. It may be compared
// already: one that found no slot is, when the SVM's comes, and leaves when it is repeated.
func (t *sender) synHeld() bool { return t.syn.waiting || t.syn.seen && !t.placed }

// sendACK sends the template with sequence number seq and what may be
// acknowledged now. Nothing is acknowledged ahead of the SYN, which may have found no slot: its
// repetition leaves.
func (t *sender) sendACK(seq uint32) {
	m := &t.tmpl
	if !m.ok || !t.placed || !t.acks.may(ACK) || t.syn.waiting {
		return
	}
	if t.sealed && (!m.pure || after(m.ack, t.acks.svm.ack)) {
		return
	}
	e := t.emit(OpSend, &t.tuple)
	e.HdrLen, e.Header = m.hdrLen, m.hdr
	t.stats.SentACKs++
	if t.sealed {
		e.Seq, e.Flags = m.seq, m.flags
		t.unchanged(e, m.ack, m.win, m.urg, &m.opts)
		return
	}
	e.Seq, e.Flags = seq, ACK|m.flags&(ackFlags|URG)
	e.Ack, e.Win = t.acknowledge(ACK)
	t.urgent(e, m.seq, m.urg)
	var blocks [4]block
	var o options
	o.ackOptions(m.opts.bytes(), t.acks.tell(blocks[:0], m.opts.bytes()))
	t.stamp(&o)
	e.OptLen, e.Opts = o.n, o.b
}

// sendGrownACK sends the template when what may be acknowledged has grown (R2). Where due says that
// data will leave soon, an ACK that the PVM has sent with data alone waits CutDelay for it: by
// itself it would have the remote send what it has been collecting (Nagle's algorithm) before
// the data comes, and then neither end would acknowledge the other's before its timer for
// delayed ACKs.
func (t *sender) sendGrownACK(due bool) {
	if t.syn.waiting || !t.placed || !t.acks.may(ACK) || !t.tmpl.ok {
		return
	}
	m, grown := t.acks.minimum(ACK, t.off(mutR2))
	if grown && due && !(t.pureUpTo.ok && !after(m.ack, t.pureUpTo.pos)) {
		if t.ackAt == 0 {
			t.ackAt = t.now + int64(t.cfg.CutDelay)
		}
		if t.now < t.ackAt {
			return
		}
	}
	if t.ackAt = 0; grown {
		t.sendACK(t.released)
	}
}

// unchanged fills in what a digest covers and nobody may change: e leaves as it was
// captured, with an ACK that the SVM has confirmed, or not at all.
func (t *sender) unchanged(e *Effect, ack uint32, win, urg uint16, o *options) {
	e.Ack, e.Win, e.Urg = ack, win, urg
	e.OptLen, e.Opts = o.n, o.b
	if e.Flags&ACK != 0 {
		t.acks.sent.update(ack, win, t.acks.scaleOf(e.Flags), nil)
	}
}

// whole reports whether all of the frame behind h may leave: all of it is compared, and
// the SVM has acknowledged what it acknowledges.
func (t *sender) whole(h *piece, compared uint32) bool {
	return !after(h.frameEnd(), compared) && (h.flags&ACK == 0 || t.off(mutR2) || !after(h.ack, t.acks.svm.ack))
}

// announce repeats the PVM's SYN to S until the SVM's is there (R9).
func (t *sender) announce() {
	if !t.syn.next(t.now) {
		return
	}
	t.stats.Announces++
	e := t.emit(OpAnnounce, &t.tuple)
	e.Seq, e.Ack, e.Flags, e.Inc = t.syn.isn, t.syn.ack, t.syn.flags, t.syn.isn
	e.OptLen, e.Opts = t.syn.opts.n, t.syn.opts.b
}

// askFor asks S for the sum over [from, to) of the SVM's stream.
func (t *sender) askFor(from, to uint32) {
	t.stats.Asks++
	e := t.emit(OpAsk, &t.tuple)
	e.Seq, e.To = from, to-from
	e.Inc, e.Inherited = t.inc.isn, t.inc.inherited || !t.inc.settled
}
