// SPDX-License-Identifier: Apache-2.0

package compare

// side is what one side acknowledged: the highest ACK, the right edge of the
// window, the newest raw window at that ACK, and the newest echo of the remote's
// timestamps that came with it.
type side struct {
	ok, echoes bool
	ack, edge  uint32
	win        uint16
	echo       uint32
}

// update takes an ACK in, with the options beside it, and reports whether ack, or the
// window, grew. An unknown scale counts as 0, which understates the edge.
func (d *side) update(ack uint32, win uint16, scale int8, opts []byte) (ackGrew, grew bool) {
	edge := ack + uint32(win)<<max(scale, 0)
	switch {
	case !d.ok:
		*d = side{ok: true, ack: ack, edge: edge, win: win}
		ackGrew, grew = true, true
	case after(ack, d.ack):
		d.ack, d.win, ackGrew, grew = ack, win, true, true
	case ack == d.ack && win > d.win:
		d.win, grew = win, true
	}
	if after(edge, d.edge) {
		d.edge, grew = edge, true
	}
	if ts := tsOpt(opts); ts != nil {
		d.echoed(ack, be32(ts[6:]), ackGrew)
	}
	return ackGrew, grew
}

// echoed notes the echo that came with ack. fresh: it is the first with as much.
func (d *side) echoed(ack, echo uint32, fresh bool) {
	if ack == d.ack && (fresh || !d.echoes || after(echo, d.echo)) {
		d.echo, d.echoes = echo, true
	}
}

// ackMark is what the PVM had acknowledged at a time (see conn.marks).
type ackMark struct {
	first, at int64
	side      side
}

// template is the PVM's newest ACK, for frames that no slot is behind.
type template struct {
	ok, pure bool
	flags    Flags
	seq, ack uint32 // with the urgent pointer, what it said itself
	win, urg uint16
	hdrLen   uint8
	hdr      [176]byte
	opts     options
}

func (t *template) set(c *conn, s *Segment) {
	if len(s.Header) == 0 || len(s.Header) > len(t.hdr) {
		return
	}
	// The IP header of a pure ACK differs from that of data (ECN), so the ones
	// that came with data serve only until there is a better one.
	pure := s.Len == 0 && s.Flags&FIN == 0
	if !pure && c.sealed {
		return
	}
	if pure || !t.pure {
		t.hdrLen = uint8(copy(t.hdr[:], s.Header))
	}
	t.flags, t.urg = s.Flags, s.Urg
	if !pure {
		t.flags &^= URG | c.once()
		t.urg = 0
	}
	t.opts.set(s.Opts)
	t.seq, t.ack, t.win = s.Seq, s.Ack, s.Win
	t.ok, t.pure = true, t.pure || pure
}

// ackFlags are kept in pure ACKs: what the PVM tells of congestion, which AccECN counts
// in all three bits, and the reserved bits.
const ackFlags = ECE | CWR | AE | 0xe00

// once are the flags that belong to one frame's first part alone. CWR does, unless it
// is a digit of AccECN's counter. Without AccECN AE is never set.
func (c *conn) once() Flags {
	if c.accECN {
		return 0
	}
	return CWR
}

// urgent has e point to where a frame with sequence number seq points. What was urgent
// before e is so no more.
func (p *Primary) urgent(e *Effect, seq uint32, urg uint16) {
	e.Urg = urg
	if e.Flags&URG == 0 || e.Seq == seq || p.off(mutURG) {
		return
	}
	at := seq + uint32(urg) - e.Seq
	if at == 0 || at > 0xffff {
		e.Flags &^= URG
		at = 0
	}
	e.Urg = uint16(at)
}

// synScale gives the scale of s's window: windows of SYNs are never scaled.
func (c *conn) synScale(f Flags) int8 {
	if f&SYN != 0 {
		return 0
	}
	return c.scale
}

// pvmACK takes the ACK of a PVM segment in and reports whether it brought news.
func (p *Primary) pvmACK(c *conn, s *Segment) (grew bool) {
	if s.Flags&(ACK|RST) != ACK {
		return false
	}
	_, grew = c.p.update(s.Ack, s.Win, c.synScale(s.Flags), s.Opts)
	if grew {
		c.pAt = s.At
		p.mark(c)
	}
	var blocks [4]block
	for _, b := range sackBlocks(blocks[:0], s.Opts) {
		c.pSACK.add(b, c.p.ack)
	}
	if s.Flags&SYN == 0 {
		c.tmpl.set(c, s)
	}
	return grew
}

// svmACK takes the ACK of a record in: A and E (R2). It reports whether the
// record brought news.
func (p *Primary) svmACK(c *conn, s *Segment) (grew bool) {
	if s.Flags&(ACK|RST) != ACK {
		return false
	}
	ackGrew, grew := c.s.update(s.Ack, s.Win, c.synScale(s.Flags), s.Opts)
	if ackGrew {
		p.moved(c)
	}
	if s.Ack == c.s.ack {
		n := len(sackBlocks(c.sBlocks[:0], s.Opts))
		c.sBlockN = min(n, len(c.sBlocks))
	}
	for _, b := range c.sBlocks[:c.sBlockN] {
		c.sSACK.add(b, c.s.ack)
	}
	return grew
}

// canACK: a frame that acknowledges may leave once the SVM has acknowledged
// anything.
func (c *conn) canACK(f Flags) bool { return f&ACK == 0 || c.p.ok && c.s.ok }

// minimum is what may be acknowledged now (R2): the smaller of both sides, but
// nothing is taken back. The edge is the one that the window field can say.
// grown: it is more than what was sent last.
func (p *Primary) minimum(c *conn, f Flags) (m side, grown bool) {
	a, b := c.p, c.s
	if p.off(mutR2) {
		b = a
	}
	m = side{ok: true, ack: minSeq(a.ack, b.ack)}
	if c.out.ok {
		m.ack = maxSeq(m.ack, c.out.ack)
	}
	scale := c.synScale(f)
	if scale == scaleUnknown {
		// Smaller of two raw windows on top of the smaller ACK: below both edges
		// whatever the scale is.
		m.win = min(a.win, b.win)
		if c.out.ok && c.out.ack == m.ack {
			m.win = max(m.win, c.out.win)
		}
		m.edge = m.ack + uint32(m.win)
		grown = !c.out.ok || after(m.ack, c.out.ack) || m.win > c.out.win
		return m, grown
	}
	m.edge = minSeq(a.edge, b.edge)
	if c.out.ok {
		m.edge = maxSeq(m.edge, c.out.edge)
	}
	if !before(m.edge, m.ack) {
		m.win = uint16(min((m.edge-m.ack)>>scale, 0xffff))
	}
	m.edge = m.ack + uint32(m.win)<<scale
	// An edge that the field cannot show would make the same ACK again, which
	// the remote takes for a duplicate.
	grown = !c.out.ok || after(m.ack, c.out.ack) || after(m.edge, c.out.edge)
	return m, grown
}

// slower is the side that has acknowledged less; of equal ones the one that did so last.
func (c *conn) slower() *side {
	if before(c.s.ack, c.p.ack) || c.s.ack == c.p.ack && c.s.echoes && (!c.p.echoes || after(c.s.echo, c.p.echo)) {
		return &c.s
	}
	return &c.p
}

// acknowledge gives the ACK and window of a frame that leaves with flags f.
func (p *Primary) acknowledge(c *conn, f Flags) (ack uint32, win uint16) {
	m, _ := p.minimum(c, f)
	edge := m.edge
	if c.out.ok {
		edge = maxSeq(edge, c.out.edge)
	}
	c.out = m
	c.out.edge = edge
	return m.ack, m.win
}

// sendACK sends the template with sequence number seq and what may be
// acknowledged now.
func (p *Primary) sendACK(c *conn, seq uint32) {
	if !c.tmpl.ok || !c.canACK(ACK) || c.synWait {
		return
	}
	t := &c.tmpl
	if c.sealed && (!t.pure || after(t.ack, c.s.ack)) {
		return
	}
	e := p.emit(OpSend, &c.tuple)
	e.HdrLen, e.Header = t.hdrLen, t.hdr
	p.stats.SentACKs++
	if c.sealed {
		e.Seq, e.Flags = t.seq, t.flags
		p.asItWas(c, e, t.ack, t.win, t.urg, &t.opts)
		return
	}
	e.Seq, e.Flags = seq, ACK|t.flags&(ackFlags|URG)
	e.Ack, e.Win = p.acknowledge(c, ACK)
	p.urgent(e, t.seq, t.urg)

	// SACK blocks that both have; those of the side that lags.
	var buf, have [4]block
	n := 0
	if before(c.p.ack, c.s.ack) {
		for _, b := range sackBlocks(buf[:0], t.opts.bytes()) {
			if b, ok := c.sSACK.common(b, c.s.ack); ok && n < len(have) {
				have[n] = b
				n++
			}
		}
	} else {
		for _, b := range c.sBlocks[:c.sBlockN] {
			if b, ok := c.pSACK.common(b, c.p.ack); ok {
				have[n] = b
				n++
			}
		}
	}
	var o options
	o.ackOptions(t.opts.bytes(), have[:n])
	c.stamp(&o)
	e.OptLen, e.Opts = o.n, o.b
}

// asItWas fills in what a digest covers and nobody may change: e leaves as it was
// captured, with an ACK that the SVM has confirmed, or not at all.
func (p *Primary) asItWas(c *conn, e *Effect, ack uint32, win, urg uint16, o *options) {
	e.Ack, e.Win, e.Urg = ack, win, urg
	e.OptLen, e.Opts = o.n, o.b
	if e.Flags&ACK != 0 {
		c.out.update(ack, win, c.synScale(e.Flags), nil)
	}
}

// whole reports whether all of the frame behind h may leave.
func (p *Primary) whole(c *conn, h *piece) bool {
	return !after(h.frameEnd(), c.compared) && (h.flags&ACK == 0 || p.off(mutR2) || !after(h.ack, c.s.ack))
}

// pureACK takes an ACK of the PVM that nothing else is in.
func (p *Primary) pureACK(c *conn, s *Segment, grew bool) {
	if s.Slot != NoSlot {
		p.drop(s.Slot, ReasonDuplicate)
	}
	if c.floating && c.svm.points.len() == 0 && (!c.established || after(s.Seq, c.compared)) {
		c.compared, c.released = s.Seq, s.Seq
		return
	}
	if p.frozen || c.diverged || c.synWait || !c.canACK(ACK) {
		return
	}
	switch {
	case before(s.Seq, c.released) && near(s.Seq, c.released):
		// A keep-alive or window probe says nothing new (R4).
		p.sendACK(c, s.Seq)
	case !grew && s.Ack == c.p.ack && after(c.s.ack, c.p.ack):
		// The PVM misses what the SVM has: its duplicate ACKs make the remote
		// repeat it. Those for what both miss leave when the SVM sends its own.
		p.sendACK(c, c.released)
	}
}

// acks sends the template when what may be acknowledged has grown (R2).
func (p *Primary) acks(c *conn) {
	if c.synWait || !c.canACK(ACK) || !c.tmpl.ok {
		return
	}
	if _, grown := p.minimum(c, ACK); grown {
		p.sendACK(c, c.released)
	}
}

// stamp keeps timestamps from going back: a frame that was held would leave
// behind younger ACKs, and the remote would drop it as an old duplicate (PAWS,
// RFC 7323, 5.3). What is echoed belongs to the ACK, so it is the echo of the side that
// let it grow: by an older one the remote would take its repetition, which the SVM
// had missed, for needless (RFC 3522), forget what else it holds for lost, and wait for
// its timer.
func (c *conn) stamp(o *options) {
	ts := tsOpt(o.bytes())
	if ts == nil {
		return
	}
	if d := c.slower(); d.echoes {
		putBE32(ts[6:], d.echo)
	}
	val := be32(ts[2:])
	if c.tsKnown && before(val, c.tsSent) {
		putBE32(ts[2:], c.tsSent)
		return
	}
	c.tsSent, c.tsKnown = val, true
}
