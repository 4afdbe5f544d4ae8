// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"net/netip"
	"slices"
)

// dial sends the first SYN.
func (c *conn) dial(now int64, isn uint32) {
	if dialFast(c, now, isn) {
		return
	}
	prepareDial(c, now, isn)
	c.sendSYN(now)
	c.snd.arm(timerHandshake, now+c.snd.rto)
}

func prepareDial(c *conn, now int64, isn uint32) {
	c.state, c.iss = SynSent, isn
	c.snd.start(isn)
	c.snd.nxt++
	c.snd.mss = defaultMSS
	c.snd.stuckSince = now
}

// sendSYN sends the SYN or SYN|ACK.
func (c *conn) sendSYN(now int64) {
	flags := syn
	if c.state == SynReceived {
		flags |= ack
		switch {
		case c.acc.on:
			flags |= cwr // the SYN could not be marked
		case c.ecn:
			flags |= ece
		}
	} else if c.s.cfg.ECN && c.snd.retries == 0 {
		flags |= ece | cwr
	}
	data := fastSYN(c)
	c.early = max(c.early, uint32(len(data)))
	c.segment(now, c.iss, flags, data)
	c.snd.lastSentAt = now
}

func (c *conn) repeatHandshake(now int64) {
	s := &c.snd
	most := synRetries
	if c.state == SynReceived {
		most = synAckRetries
	}
	if s.retries >= most {
		c.end(ErrTimeout)
		return
	}
	s.retries++
	s.double()
	c.sendSYN(now)
	s.arm(timerHandshake, now+s.rto)
}

// agree takes the options of the peer's SYN.
func (c *conn) agree(now int64, g *segment) {
	s := &c.snd
	c.irs = g.seq
	c.rcv.start(g.seq + 1)
	s.mss = defaultMSS
	if g.mss > 0 {
		s.mss = max(g.mss, minMSS)
	}
	c.timestamps = c.timestamps && g.timestamps
	c.sack = c.sack && g.sackPermitted
	s.noSACK = !c.sack
	c.scaling = c.scaling && g.scale >= 0
	if c.scaling {
		s.scale = uint8(g.scale)
	} else {
		s.scale, c.rcv.scale = 0, 0
	}
	if c.timestamps {
		c.tsRecent, c.tsRecentAt = g.tsVal, now
	}
	// The window of a SYN is not scaled.
	s.wnd, s.wl1 = uint32(g.wnd), g.seq
	s.maxWnd = s.wnd
	c.rcv.mss = max(min(c.rcv.mss, s.mss, c.rcv.room/2), 88)
}

// listen is a segment for which there is no connection.
func (s *Stack) listen(now int64, remote netip.Addr, g *segment) {
	l := s.ports[g.to]
	if l != nil && l.pending+len(l.ready) < s.cfg.Backlog {
		if c := byCookie(s, now, remote, g); c != nil {
			c.input(now, g)
			return
		}
	}
	if l == nil || g.has(ack) {
		r := s.route(remote, protoTCP)
		s.refuse(&r, g)
		return
	}
	if g.flags&(rst|fin) != 0 || !g.has(syn) || l.pending+len(l.ready) >= s.cfg.Backlog {
		return
	}
	t := tuple{remote, g.from, g.to}
	isn := initialNumber(s, now, t)
	if old := s.byTuple[t]; old != nil { // in TIME-WAIT
		isn = old.snd.nxt + 65535 + 2
		old.end(nil)
	}
	if s.cfg.SynCookies {
		answerWithCookie(s, now, t, g)
		return
	}
	c := s.add(t)
	c.state, c.iss, c.listener = SynReceived, isn, true
	l.pending++
	c.snd.start(isn)
	c.snd.nxt++
	c.agree(now, g)
	c.ecn = s.cfg.ECN && g.flags&(ece|cwr) == ece|cwr
	if c.ecn && s.cfg.AccECN && g.ae {
		c.acc.begin()
		c.acc.waits = true
	}
	acceptFast(c, now, g)
	c.sendSYN(now)
	c.snd.arm(timerHandshake, now+c.snd.rto)
	if c.fast {
		openFast(c)
	}
}

// establish: the peer has acknowledged the SYN.
func (c *conn) establish(now int64, g *segment) {
	s := &c.snd
	if s.retries == 0 && !c.cookie {
		s.sample(now-s.lastSentAt, c.s.cfg.MinRTO)
	} else if c.timestamps && g.timestamps {
		s.measure(now, g, &ackInfo{advanced: true})
	} else {
		s.rto = int64(fallbackRTO)
	}
	if s.retries > 1 { // RFC 5681: after a lost SYN
		s.cwnd = 1
	}
	s.retries, s.backoff = 0, 0
	s.disarm()
	if !c.fast {
		s.taken(c.iss+1, fastTaken(c, g))
	} else if s.packets() > 0 {
		s.arm(timerRTO, now+s.rto)
	}
	s.maxWnd = max(s.maxWnd, s.wnd)
	s.lastSentAt = now
	if c.state == SynReceived {
		wnd := uint32(g.wnd)
		if !g.has(syn) {
			wnd <<= s.scale
		}
		s.wnd, s.wl1 = wnd, g.seq
		s.maxWnd = max(s.maxWnd, wnd)
	}
	c.state = Established
	c.timers.heard = now
	if k := int64(c.s.cfg.Keepalive); k > 0 {
		c.timers.keepalive = now + k
	}
	if c.listener {
		c.listener = false
		l := c.s.ports[c.tuple.local]
		l.pending--
		l.ready = append(l.ready, c.id)
	}
}

// inSynSent is a segment for a connection in SYN-SENT.
func (c *conn) inSynSent(now int64, g *segment) {
	if g.has(ack) {
		if !after(g.ack, c.iss) || after(g.ack, c.snd.nxt+c.early) ||
			c.timestamps && g.timestamps && g.tsEcr != 0 && after(g.tsEcr, c.tsNow(now)) {
			c.s.refuse(&c.route, g)
			return
		}
		if g.has(rst) {
			c.end(ErrRefused)
			return
		}
	}
	if g.has(rst) || !g.has(syn) {
		return
	}
	c.agree(now, g)
	if !g.has(ack) { // both sides sent a SYN
		c.ecn = c.s.cfg.ECN && g.flags&(ece|cwr) == ece|cwr
		c.state, c.simultaneous = SynReceived, true
		c.sendSYN(now)
		if c.deferred { // its own SYN has waited for data
			c.deferred = false
			c.snd.arm(timerHandshake, now+c.snd.rto)
		}
		return
	}
	c.ecn = c.s.cfg.ECN && g.flags&(ece|cwr) == ece
	if c.s.cfg.ECN && c.s.cfg.AccECN && (g.ae || g.flags&(ece|cwr) == cwr) {
		c.ecn = true
		c.acc.begin()
		c.acc.first = true
	}
	if g.fastOpen && len(g.cookie) > 0 {
		c.s.cookies[c.tuple.addr] = slices.Clone(g.cookie)
	}
	c.establish(now, g)
	c.rcv.quicken(quickACKs)
	c.sendACK(now)
	if c.snd.closed {
		c.state = FinWait1
	}
	c.snd.output(now)
}

// request is a segment for a connection that came in by a port and is not established (Linux's
// tcp_check_req). It reports whether the segment can establish it.
func (c *conn) request(now int64, g *segment) bool {
	if g.seq == c.irs && g.flags&(syn|ack|rst|fin) == syn {
		if !c.outdated(g) && !c.limited(now) {
			c.sendSYN(now)
		}
		return false
	}
	if g.has(ack) && !handshakeACK(c, g) {
		c.s.refuse(&c.route, g)
		return false
	}
	if c.outdated(g) || !c.inWindow(g) {
		if !g.has(rst) {
			c.repeated(now, g)
		}
		return false
	}
	if g.has(rst) || g.has(syn) && g.seq != c.irs {
		c.s.refuse(&c.route, g)
		c.end(ErrReset)
		return false
	}
	return g.has(ack)
}
