// SPDX-License-Identifier: Apache-2.0

package tcp

import "time"

// timerKind is what the retransmission timer is for. Only one of them runs at a time.
type timerKind uint8

const (
	timerNone      timerKind = iota
	timerRTO                 // retransmit
	timerTail                // tail loss probe (RFC 8985)
	timerReorder             // what may be reordered counts as lost then
	timerProbe               // window probe
	timerHandshake           // SYN or SYN|ACK
)

// Retransmissions before a connection is given up.
const (
	synRetries    = 6
	synAckRetries = 5
	dataRetries   = 15
	orphanRetries = 8

	leastTimeout = 2e6 // ns, of timers for a part of a round trip

	keepaliveInterval = 75 * time.Second
	keepaliveProbes   = 9
)

// timers of a connection: ns, never if not set.
type timers struct {
	kind      timerKind
	at        int64 // of kind
	delayed   int64 // a delayed ACK
	keepalive int64
	life      int64 // the end of TIME-WAIT, or of FIN-WAIT-2 of a closed connection
	uncork    int64

	probes int // keep-alive probes without an answer
	heard  int64
}

func (t *timers) clear() {
	*t = timers{at: never, delayed: never, keepalive: never, life: never, uncork: never}
}

func (c *conn) deadline() int64 {
	t := &c.timers
	return min(t.at, t.delayed, t.keepalive, t.life, t.uncork)
}

func (s *sender) arm(kind timerKind, at int64) { s.c.timers.kind, s.c.timers.at = kind, at }
func (s *sender) disarm()                      { s.arm(timerNone, never) }

// rearm begins the retransmission timer anew, or the one for a tail loss probe.
func (s *sender) rearm(now int64) {
	if s.packets() == 0 {
		s.disarm()
	} else if !s.armProbe(now) {
		s.arm(timerRTO, now+s.rto)
	}
}

// armTail is rearm after new data was sent, which does not put off a timeout.
func (s *sender) armTail(now int64) {
	c := s.c
	if k := c.timers.kind; k != timerRTO && k != timerReorder || s.packets() == 1 {
		s.arm(timerRTO, now+s.rto)
	}
	if c.timers.kind == timerRTO {
		s.armProbe(now)
	}
}

// armProbe has a tail loss probe be sent after two round trips without an ACK.
func (s *sender) armProbe(now int64) bool {
	c := s.c
	if c.s.cfg.NoTLP || s.reno() || s.srtt == 0 || s.ca != caOpen && s.ca != caCWR {
		return false
	}
	d := 2*s.srtt + leastTimeout
	if s.packets() == 1 {
		d = 2*s.srtt + int64(c.s.cfg.MinRTO) // the ACK may be delayed
	}
	if s.ca == caOpen || s.ca == caCWR {
		d = min(d, s.segs[s.first].sentAt+s.rto-now)
	}
	if d <= 0 {
		return false
	}
	s.arm(timerTail, now+d)
	return true
}

// expire does what is due.
func (c *conn) expire(now int64) {
	t := &c.timers
	if t.life <= now {
		c.end(nil)
		return
	}
	if t.uncork <= now {
		t.uncork = never
		c.snd.output(now)
	}
	if t.delayed <= now {
		c.rcv.delayedACK(now)
	}
	if t.at <= now {
		kind := t.kind
		c.snd.disarm()
		if c.state == SynReceived && c.fast {
			kind = timerHandshake // the peer takes nothing without the SYN|ACK
		}
		switch kind {
		case timerHandshake:
			c.repeatHandshake(now)
		case timerRTO:
			c.snd.retransmitTimeout(now)
		case timerTail:
			c.snd.probeTail(now)
		case timerReorder:
			c.snd.reorderTimeout(now)
		case timerProbe:
			c.snd.probeWindow(now)
		}
	}
	if c.state != Closed && t.keepalive <= now {
		c.keepAlive(now)
	}
}

// givenUp closes the connection if its peer has not answered for too long.
func (s *sender) givenUp(now int64) bool {
	c := s.c
	most := dataRetries
	if c.orphan {
		most = orphanRetries
	}
	limit := int64(c.s.cfg.UserTimeout)
	if s.retries < most && limit == 0 || limit > 0 && now-s.stuckSince < limit && s.retries < 4*dataRetries {
		return false
	}
	c.end(ErrTimeout)
	return true
}

func (s *sender) retransmitTimeout(now int64) {
	if s.packets() == 0 || s.givenUp(now) {
		return
	}
	s.enterLoss(now)
	s.retries++
	s.retransmit(now, s.first)
	s.double()
	s.arm(timerRTO, now+s.rto)
}

// probeTail sends new data, or the last segment again, so that the peer tells what is missing.
func (s *sender) probeTail(now int64) {
	if s.packets() == 0 {
		return
	}
	if !s.tlpOut {
		was := s.nxt
		if n := min(s.left(), s.currentMSS()); n > 0 && !after(s.nxt+uint32(n), s.windowEnd()) {
			s.sendNew(now, n, s.currentMSS(), s.finBehind(n))
		} else if last := len(s.segs) - 1; !s.segs[last].is(segSacked) {
			s.retransmit(now, last)
		}
		s.tlpOut, s.tlpHigh, s.tlpRetransmits = true, s.nxt, s.nxt == was
	}
	s.arm(timerRTO, now+s.rto)
}

// reorderTimeout: what was sent before something that arrived is taken for lost now.
func (s *sender) reorderTimeout(now int64) {
	c := s.c
	if s.packets() == 0 {
		return
	}
	var info ackInfo
	flight := s.inFlight()
	s.detectLoss(now, &info)
	if s.inFlight() != flight && s.ca != caRecovery && s.ca != caLoss {
		s.enterRecovery(&info)
		s.prr(1, false, true)
	}
	s.resend(now)
	if c.timers.kind == timerNone {
		s.arm(timerRTO, now+s.rto)
	}
}

// probeWindow asks a peer with a closed window whether it is open, with what fits in or without data.
func (s *sender) probeWindow(now int64) {
	c := s.c
	if s.packets() > 0 || !s.pending() {
		return
	}
	if s.retries == 0 && s.backoff == 0 {
		s.stuckSince = now
	}
	if s.givenUp(now) {
		return
	}
	mss := s.currentMSS()
	room := int(int32(s.windowEnd() - s.nxt))
	if n := min(s.left(), mss, room); room > 0 && n > 0 {
		s.sendNew(now, n, mss, psh|s.finBehind(n))
		s.arm(timerRTO, now+s.rto)
		return
	}
	if room > 0 { // only the FIN is left
		s.output(now)
		return
	}
	c.segment(now, s.una-1, ack, nil)
	s.retries++
	s.backoff++
	s.arm(timerProbe, now+s.probeTimeout())
}

// keepAlive probes a peer that has not been heard of for long.
func (c *conn) keepAlive(now int64) {
	t := &c.timers
	idle := int64(c.s.cfg.Keepalive)
	if due := t.heard + idle; due > now && t.probes == 0 {
		t.keepalive = due
		return
	}
	if c.snd.packets() > 0 || c.snd.pending() { // retransmissions find out
		t.keepalive = now + idle
		return
	}
	if t.probes >= keepaliveProbes {
		c.reset(now, ErrTimeout)
		return
	}
	t.probes++
	t.keepalive = now + min(int64(keepaliveInterval), idle)
	c.segment(now, c.snd.una-1, ack, nil)
}
