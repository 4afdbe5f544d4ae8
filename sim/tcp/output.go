// SPDX-License-Identifier: Apache-2.0

package tcp

import "slices"

// sackBlocks is how many SACK blocks a segment has room for, and has.
func (r *receiver) sackBlocks() int {
	c := r.c
	n, most := r.sacks, 4
	if r.dup {
		n++
	}
	if c.timestamps {
		most = 3
	}
	return min(n, most)
}

// currentMSS is how many bytes fit into a segment with the options of this moment.
func (s *sender) currentMSS() int {
	c := s.c
	n := min(c.mss, s.mss)
	if c.timestamps {
		n -= timestampLen
	}
	if b := c.rcv.sackBlocks(); b > 0 && c.sack {
		n -= 4 + 8*b
	}
	// No more than half of the largest window seen, or a peer with a small one would see silly segments.
	if half := int(s.maxWnd) / 2; s.maxWnd > defaultMSS && n > half {
		n = half
	} else if s.maxWnd > 0 && s.maxWnd <= defaultMSS {
		n = min(n, int(s.maxWnd))
	}
	return max(n, 8)
}

// windowEnd is the end of the peer's window.
func (s *sender) windowEnd() uint32 { return s.una + s.wnd }

// synchronized reports whether data may be sent.
func (c *conn) synchronized() bool {
	return c.state >= Established && c.state != TimeWait || c.state == SynReceived && c.fast
}

// output sends what may be sent for the first time, and arms the timer of a closed window.
func (s *sender) output(now int64) {
	c := s.c
	if !c.synchronized() {
		return
	}
	if s.pending() && s.packets() == 0 && s.lastSentAt != 0 {
		s.restartIdle(now)
	}
	c.corked = false
	sent := 0
	for s.pending() {
		if s.inFlight() >= s.cwnd {
			s.cwndLimited = true
			break
		}
		mss := s.currentMSS()
		left := s.left()
		n := min(left, mss)
		last := n == left
		closing := last && s.closed
		to := s.nxt + uint32(n)
		flags := uint8(0)
		if closing {
			flags = fin
			to++
		}
		if after(to, s.windowEnd()) {
			break
		}
		if n < mss && !closing && s.hold() {
			break
		}
		s.sendNew(now, n, mss, flags)
		sent++
	}
	if sent > 0 {
		if s.ca == caCWR || s.ca == caRecovery {
			s.prrOut += sent
		}
		s.armTail(now)
		return
	}
	if s.packets() == 0 && s.pending() && c.timers.kind == timerNone && !c.corked {
		s.arm(timerProbe, now+s.probeTimeout())
	}
}

// hold reports whether a segment below the MSS, not urgent, has to wait: by Nagle's algorithm in Minshall's
// variant while a small segment is not acknowledged, and by autocorking while frames wait for Take.
func (s *sender) hold() bool {
	c := s.c
	if s.urgent {
		return false
	}
	if !c.noDelay && s.packets() > 0 && after(s.smallEnd, s.una) {
		return true
	}
	if c.s.cfg.Autocork && c.queued && s.packets() > 0 {
		c.corked = true
		return true
	}
	return false
}

// restartIdle halves cwnd for each RTO without a transmission (RFC 5681, 4.1).
func (s *sender) restartIdle(now int64) {
	idle := now - s.lastSentAt
	for idle > s.rto && s.cwnd > initialCwnd {
		s.cwnd = max(s.cwnd/2, initialCwnd)
		idle -= s.rto
	}
}

// finBehind is FIN, if it follows the next n bytes and is in the window.
func (s *sender) finBehind(n int) uint8 {
	if end := s.nxt + uint32(n); s.closed && end == s.end() && before(end, s.windowEnd()) {
		return fin
	}
	return 0
}

// sendNew sends the next n bytes, with further flags.
func (s *sender) sendNew(now int64, n, mss int, flags uint8) {
	c := s.c
	seq := s.nxt
	flags |= ack
	data := s.bytes(seq, n)
	g := seg{from: seq, to: seq + uint32(n), sentAt: now, order: s.nextOrder()}
	// PSH is at the end of what was written, and after half of the largest window.
	if end := seq + uint32(n); n > 0 && (end == s.end() || end-s.pushed-1 > s.maxWnd/2) {
		flags |= psh
	}
	if flags&psh != 0 {
		g.marks |= segPush
		s.pushed = g.to
	}
	if flags&fin != 0 {
		g.to++
		g.marks |= segFIN
		s.finSent = true
	}
	if n < mss {
		s.smallEnd = seq + uint32(n)
	}
	if s.packets() == 0 {
		s.stuckSince = now
	}
	s.push(g)
	s.nxt = g.to
	c.rcv.dataSent(now)
	c.segment(now, seq, flags, data)
	s.sentOnce = g.to
	s.lastSentAt = now
}

// dataSent has the connection count as interactive if what it sends follows what it received.
func (r *receiver) dataSent(now int64) {
	c := r.c
	if r.active && now-r.lastDataAt < int64(c.s.cfg.DelayedACK) {
		r.pingpong = true
	}
}

// retransmit sends a segment of the queue again, together with those behind it that fit in. It
// reports false if the peer's window does not allow it.
func (s *sender) retransmit(now int64, i int) bool {
	c := s.c
	g := &s.segs[i]
	mss := s.currentMSS()
	end := s.windowEnd()
	if !before(g.from, end) && g.from != s.una {
		return false
	}
	if int(g.to-g.from) > mss && !(g.is(segFIN) && int(g.to-g.from) == mss+1) {
		s.split(i, uint32(mss))
		g = &s.segs[i]
	}
	// A window that was taken back is probed with what fits in, at least a byte.
	if after(g.to, end) {
		if room := end - g.from; before(g.from, end) && room < g.to-g.from {
			s.split(i, room)
		}
	}
	s.collapse(i, mss)
	g = &s.segs[i]
	flags := ack
	n := int(g.to - g.from)
	if g.is(segFIN) {
		flags |= fin
		n--
	}
	if g.is(segPush) {
		flags |= psh
	}
	if !g.is(segRetrans) {
		s.retrans++
	}
	g.marks |= segRetrans | segEver
	g.sentAt, g.order = now, s.nextOrder()
	if !s.stamped {
		s.retransStamp, s.stamped = c.tsNow(now), true
	}
	s.undoRetrans = max(s.undoRetrans, 0) + 1
	c.segment(now, g.from, flags, s.bytes(g.from, n))
	s.lastSentAt = now
	return true
}

// split cuts a segment of the queue in two.
func (s *sender) split(i int, n uint32) {
	g := s.segs[i]
	rest := g
	g.to, rest.from = g.from+n, g.from+n
	g.marks &^= segFIN | segPush
	s.segs[i] = g
	s.segs = slices.Insert(s.segs, i+1, rest)
	s.count(rest.marks, 1)
}

// collapse joins a segment that is sent again with the next ones, as long as they fit in whole.
func (s *sender) collapse(i, mss int) {
	for i+1 < len(s.segs) {
		g, next := &s.segs[i], &s.segs[i+1]
		n := int(next.to - g.from)
		if next.is(segFIN) {
			n--
		}
		if g.is(segSacked) || next.is(segSacked) || n > mss || after(next.to, s.windowEnd()) {
			return
		}
		s.forgetJoined(next)
		g.to = next.to
		g.marks |= next.marks & (segFIN | segPush | segEver)
		copy(s.segs[i+1:], s.segs[i+2:])
		s.segs = s.segs[:len(s.segs)-1]
	}
}
