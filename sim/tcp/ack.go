// SPDX-License-Identifier: Apache-2.0

package tcp

// ackInfo is what an ACK brought.
type ackInfo struct {
	data, window, advanced bool
	sacked                 bool // something new was SACKed
	duplicate              bool // a D-SACK
	original               bool // something was delivered that had not been retransmitted
	echo                   bool // ECE
	lost                   bool // something new was found to be lost
	armed                  bool // the timer for reordering is set
	acked                  int  // segments that were acknowledged now
	delivered              int  // segments that arrived, as acknowledged or SACKed now
	priorUna               uint32
	rtt                    int64 // of a segment that was sent once; 0: none
}

// acks takes the acknowledgment of a segment into account. False: the segment is to be dropped.
func (s *sender) acks(now int64, g *segment) bool {
	c := s.c
	if before(g.ack, s.una) {
		if before(g.ack, s.una-max(s.maxWnd, 1)) { // blind data injection
			c.challenge(now)
			return false
		}
		if c.sack && g.sacks > 0 {
			info := ackInfo{priorUna: s.una}
			s.sacksIn(now, g, &info)
			s.alert(now, &info)
			s.resend(now)
		}
		return true
	}
	if after(g.ack, s.nxt) {
		c.challenge(now) // of what was never sent
		return false
	}
	info := ackInfo{priorUna: s.una, data: len(g.data) > 0, echo: c.ecn && !c.acc.on && g.has(ece) && !g.has(syn)}
	if c.acc.on {
		info.echo = c.acc.echo(g)
	}
	packets, flight := s.packets(), s.inFlight()
	delivered := s.sacked
	wnd := uint32(g.wnd)
	if !g.has(syn) {
		wnd <<= s.scale
	}
	if after(g.ack, s.una) || after(g.seq, s.wl1) || g.seq == s.wl1 && (wnd > s.wnd || wnd == 0) {
		info.window = true
		s.wnd, s.wl1 = wnd, g.seq
		s.maxWnd = max(s.maxWnd, wnd)
	}
	info.advanced = after(g.ack, s.una)
	if info.advanced || s.packets() == 0 {
		s.retries = 0
	}
	s.una = g.ack
	s.fack, s.smallEnd = maxSeq(s.fack, s.una), maxSeq(s.smallEnd, s.una)
	if s.urgent && !before(s.una, s.urgentEnd) {
		s.urgent = false
	}
	if c.sack && g.sacks > 0 {
		s.sacksIn(now, g, &info)
	}
	s.clean(now, &info)
	s.drop(s.una)
	if packets == 0 {
		if info.duplicate { // it can show that a reduction was wrong
			s.alert(now, &info)
		}
		s.tailAcked(g, &info)
		s.probed(now)
		return true
	}
	s.measure(now, g, &info)
	if info.advanced {
		s.stuckSince = now
	}
	if !s.reno() {
		info.delivered = max(info.acked+s.sacked-delivered, 0)
	}
	if info.delivered > 0 && c.timers.kind == timerTail {
		s.arm(timerRTO, now+s.rto)
	}
	s.tailAcked(g, &info)
	if c.sack && (s.rackNew || s.retrans > 0) {
		s.detectLoss(now, &info)
	}
	s.alert(now, &info)
	if s.ca != caCWR && s.ca != caRecovery && info.acked > 0 {
		s.grow(info.delivered, flight)
	}
	if s.inFlight() < s.cwnd {
		s.cwndLimited = false
	}
	if info.advanced && !info.armed {
		s.rearm(now)
	}
	s.resend(now)
	return true
}

// clean removes the segments that are acknowledged.
func (s *sender) clean(now int64, info *ackInfo) {
	again := false
	for s.packets() > 0 {
		g := &s.segs[s.first]
		if after(g.to, s.una) {
			if after(s.una, g.from) { // a part: the peer's window ended there, or it was collapsed
				g.from = s.una
			}
			break
		}
		if g.is(segSacked) {
			s.sacked--
		} else {
			s.delivered(now, g, info)
		}
		again = again || g.is(segEver)
		s.forget(g)
		info.acked++
		s.shift()
	}
	if again { // Karn: what follows a retransmission may have waited for it
		info.rtt = 0
		info.original = info.original && !s.reno()
	}
	if s.reno() && info.acked > 0 { // duplicate ACKs were of what is acknowledged now
		info.delivered = max(info.acked-s.sacked, 1)
		s.sacked = max(s.sacked-max(info.acked-1, 0), 0)
		s.limitReno()
	}
	if s.packets() == 0 {
		s.sacked, s.lost, s.retrans = 0, 0, 0
	}
}

// delivered takes down that a segment arrived that was not known to have arrived.
func (s *sender) delivered(now int64, g *seg, info *ackInfo) {
	rtt := now - g.sentAt
	if !g.is(segEver) {
		if info.rtt == 0 {
			info.rtt = rtt
		}
		if !after(g.to, s.highSeq) {
			info.original = true
		}
		if before(g.to, s.fack) {
			s.disorder = true
		}
	} else if rtt < s.minRTT {
		return // it was the first transmission that arrived
	}
	s.rackNew = true
	if after(g.order, s.rackOrder) {
		s.rackOrder, s.rackRTT = g.order, rtt
	}
}

// measure takes a round trip time: of a segment that was sent once, or by the timestamp echo.
func (s *sender) measure(now int64, g *segment, info *ackInfo) {
	c := s.c
	rtt := info.rtt
	if rtt == 0 && info.advanced && g.timestamps && g.tsEcr != 0 {
		if ticks := c.tsNow(now) - g.tsEcr; int32(ticks) >= 0 && ticks < 1<<20 {
			rtt = max(int64(ticks), 1) * c.s.cfg.TickNS
		}
	}
	if rtt > 0 {
		s.sample(rtt, c.s.cfg.MinRTO)
	}
}

// sacksIn reads the SACK blocks, of which the first can be a D-SACK (RFC 2883).
func (s *sender) sacksIn(now int64, g *segment, info *ackInfo) {
	blocks := g.blocks[:g.sacks]
	d := blocks[0]
	if before(d.from, g.ack) || len(blocks) > 1 && !before(d.from, blocks[1].from) && !after(d.to, blocks[1].to) {
		info.duplicate = true
		if s.undo && s.undoRetrans > 0 && !after(d.to, s.nxt) && after(d.to, s.undoFrom) {
			s.undoRetrans--
		}
		if before(d.from, g.ack) {
			blocks = blocks[1:]
		}
	}
	for _, b := range blocks {
		if !before(b.from, b.to) || before(b.from, s.una) || after(b.to, s.nxt) {
			continue
		}
		for i := s.first; i < len(s.segs); i++ {
			seg := &s.segs[i]
			if !before(seg.from, b.to) {
				break
			}
			if before(seg.from, b.from) || after(seg.to, b.to) || seg.is(segSacked) {
				continue
			}
			s.delivered(now, seg, info)
			s.forget(seg)
			seg.marks |= segSacked
			s.sacked++
			info.sacked = true
			s.fack = maxSeq(s.fack, seg.to)
		}
	}
}

// probed: an ACK came while nothing was in flight. What waits for the window can be sent or is probed for.
func (s *sender) probed(now int64) {
	c := s.c
	if !s.pending() {
		return
	}
	n := min(s.left(), s.currentMSS())
	if !after(s.nxt+uint32(n), s.windowEnd()) {
		s.backoff = 0
		if c.timers.kind == timerProbe {
			s.disarm()
		}
	} else if c.timers.kind == timerProbe {
		s.arm(timerProbe, now+s.probeTimeout())
	}
}
