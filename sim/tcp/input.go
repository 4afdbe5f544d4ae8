// SPDX-License-Identifier: Apache-2.0

package tcp

// input is a segment for the connection. It reports true if the connection made room for a
// new one, which the segment asks for.
func (c *conn) input(now int64, g *segment) bool {
	c.tsSeen, c.tsEcr = c.timestamps && g.timestamps, g.tsEcr
	c.timers.heard, c.timers.probes = now, 0
	switch c.state {
	case SynSent:
		c.inSynSent(now, g)
		return false
	case TimeWait:
		return c.inTimeWait(now, g)
	case SynReceived:
		if !c.simultaneous && !c.request(now, g) {
			return false
		}
	}
	if g.flags&(ack|rst|syn) == 0 || !c.valid(now, g) || !g.has(ack) {
		return false
	}
	if c.state == SynReceived {
		if !handshakeACK(c, g) {
			c.s.refuse(&c.route, g)
			return false
		}
		c.establish(now, g)
		if c.snd.closed {
			c.state = FinWait1
		}
	}
	if !c.snd.acks(now, g) || !c.afterACK(now, g) {
		return false
	}
	if c.ecn && len(g.data) > 0 {
		c.rcv.congestion(g)
	}
	c.rcv.dataIn(now, g)
	c.snd.output(now)
	c.rcv.maybeACK(now)
	return false
}

// congestion reads the ECN marks (RFC 3168).
func (r *receiver) congestion(g *segment) {
	if acc := &r.c.acc; acc.on {
		acc.in(g)
		return
	}
	if g.has(cwr) {
		r.echoCE = false
		r.quick = max(r.quick, 1)
	}
	if g.ce {
		if !r.echoCE {
			r.hurry(2)
		}
		r.echoCE = true
	}
}

// outdated reports whether the segment is older than one that was received (PAWS).
func (c *conn) outdated(g *segment) bool {
	const lifetime = 24 * 24 * 3600 * 1e9 // after which timestamps wrap
	return c.timestamps && g.timestamps && before(g.tsVal+1, c.tsRecent) && c.s.now-c.tsRecentAt < lifetime
}

// inWindow reports whether the segment has something in the window, or is what a peer sends that has nothing to send.
func (c *conn) inWindow(g *segment) bool {
	return !before(g.end, c.rcv.wup) && !after(g.seq, c.rcv.nxt+c.rcv.window())
}

// valid is Linux's tcp_validate_incoming: PAWS, sequence number, RST, SYN, in this order (RFC 9293, 5961).
func (c *conn) valid(now int64, g *segment) bool {
	if c.outdated(g) && !g.has(rst) && !c.reordered(g) {
		if g.has(syn) && c.crossing(g) {
			return true
		}
		c.rejected(now, g)
		return false
	}
	if !c.inWindow(g) {
		switch {
		case !g.has(rst):
			if g.has(syn) && c.crossing(g) {
				return true
			}
			c.rejected(now, g)
		case g.seq == c.rcv.nxt-1 && c.state >= CloseWait && c.state <= LastAck: // of a peer that lost its FIN's state
			c.peerReset()
		}
		return false
	}
	if g.has(rst) {
		exact := g.seq == c.rcv.nxt
		for _, b := range c.rcv.blocks[:c.rcv.sacks] {
			exact = exact || g.seq == b.to
		}
		if exact {
			c.peerReset()
		} else {
			c.challenge(now)
		}
		return false
	}
	if g.has(syn) && !c.crossing(g) {
		c.challenge(now)
		return false
	}
	// Only segments that the next ACK covers count (RFC 7323, 4.3).
	if c.timestamps && g.timestamps && !after(g.seq, c.rcv.wup) && !before(g.tsVal, c.tsRecent) {
		c.tsRecent, c.tsRecentAt = g.tsVal, now
	}
	return true
}

// crossing: the SYN|ACK of a peer that sent its SYN at the same time.
func (c *conn) crossing(g *segment) bool {
	return c.state == SynReceived && c.simultaneous && g.has(ack) &&
		g.seq+1 == g.end && g.end == c.rcv.nxt && g.ack == c.snd.nxt
}

// reordered: an ACK without news that was overtaken is no reason to answer (Linux's tcp_disordered_ack).
func (c *conn) reordered(g *segment) bool {
	return g.has(ack) && g.seq == c.rcv.nxt && g.end == g.seq && g.ack == c.snd.una &&
		uint32(g.wnd)<<c.snd.scale == c.snd.wnd && int64(c.tsRecent-g.tsVal)*c.s.cfg.TickNS <= c.snd.rto
}

// rejected answers a segment outside the window, with a D-SACK of what it repeats.
func (c *conn) rejected(now int64, g *segment) {
	if g.end != g.seq && before(g.seq, c.rcv.nxt) && !g.has(syn) {
		c.rcv.hurry(quickACKs)
		if c.sack {
			to := g.end
			if after(to, c.rcv.nxt) {
				to = c.rcv.nxt
			}
			c.rcv.setDup(g.seq, to)
		}
	}
	c.repeated(now, g)
}

func (c *conn) peerReset() {
	err := ErrReset
	if c.state == SynReceived && c.simultaneous {
		err = ErrRefused
	}
	c.end(err)
}

// dataIn takes data, the urgent pointer and FIN.
func (r *receiver) dataIn(now int64, g *segment) {
	c := r.c
	if g.end == g.seq {
		return
	}
	if g.has(syn) { // of a simultaneous open: it was received before, without ACK
		r.duplicate(g.seq, g.end)
		return
	}
	seq := g.seq
	end := seq + uint32(len(g.data))
	if r.fin { // a repeated FIN or older data, or data behind the FIN
		switch {
		case !before(seq, r.nxt):
		case after(end, r.nxt):
			c.s.refuse(&c.route, g)
			c.end(ErrReset)
		default:
			r.duplicate(seq, g.end)
		}
		return
	}
	if g.has(urg) {
		r.urgentIn(g, seq)
	}
	switch {
	case after(seq, r.nxt):
		r.outOfOrder(now, g, seq, end)
		return
	case !after(g.end, r.nxt):
		r.duplicate(seq, g.end)
		return
	case before(seq, r.nxt):
		if c.sack {
			r.setDup(seq, r.nxt)
		}
	}
	// A window probe, or so much that the window, which is told in units and does not shrink, is too large.
	if len(g.data) > 0 && (r.window() == 0 || r.unread() >= 2*r.room) {
		r.ackPending, r.ackNow = true, true
		r.quicken(quickACKs)
		return
	}
	if len(g.data) > 0 {
		r.received(now, g)
	}
	if after(end, r.nxt) {
		r.take(seq, g.data)
	}
	if g.has(fin) {
		c.finIn(now)
		return
	}
	if len(r.ooo) > 0 || r.finOOO {
		r.join()
		if r.finOOO && r.finSeq == r.nxt {
			r.ackNow = true
			c.finIn(now)
		} else if len(r.ooo) == 0 { // the last hole is filled
			r.ackNow = true
		}
	}
}

// outOfOrder keeps data, or a FIN, behind a hole, and has it SACKed at once.
func (r *receiver) outOfOrder(now int64, g *segment, seq, end uint32) {
	c := r.c
	r.ackPending, r.ackNow = true, true
	if !before(seq, r.nxt+r.window()) { // out of the window
		r.quicken(quickACKs)
		return
	}
	if len(g.data) > 0 {
		r.received(now, g)
		r.insert(seq, g.end, g.data)
	}
	if g.has(fin) && (!r.finOOO || before(end, r.finSeq)) {
		r.finOOO, r.finSeq = true, end
		r.reportFIN()
	}
	if !c.sack {
		r.sacks, r.dup = 0, false
	}
}

// duplicate is data that was received before.
func (r *receiver) duplicate(from, to uint32) {
	c := r.c
	if c.sack {
		r.setDup(from, to)
	}
	r.hurry(quickACKs)
	r.ackPending, r.ackNow = true, true
}

// urgentIn takes the urgent pointer, as Linux without strict RFC 1122: it points behind the urgent byte.
func (r *receiver) urgentIn(g *segment, seq uint32) {
	end := seq + uint32(g.urg)
	if after(end, r.nxt) && (!r.urgent || after(end, r.urgentEnd)) {
		r.urgent, r.urgentEnd = true, end
	}
}
