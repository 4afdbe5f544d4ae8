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

func (c *conn) arm(kind timerKind, at int64) { c.timers.kind, c.timers.at = kind, at }
func (c *conn) disarm()                      { c.arm(timerNone, never) }

// rearm begins the retransmission timer anew, or the one for a tail loss probe.
func (c *conn) rearm(now int64) {
	if c.snd.packets() == 0 {
		c.disarm()
	} else if !c.armProbe(now) {
		c.arm(timerRTO, now+c.snd.timeout())
	}
}

// armTail is rearm after new data was sent, which does not put off a timeout.
func (c *conn) armTail(now int64) {
	if k := c.timers.kind; k != timerRTO && k != timerReorder || c.snd.packets() == 1 {
		c.arm(timerRTO, now+c.snd.timeout())
	}
	if c.timers.kind == timerRTO {
		c.armProbe(now)
	}
}

// armProbe has a tail loss probe be sent after two round trips without an ACK.
func (c *conn) armProbe(now int64) bool {
	s := &c.snd
	if c.s.cfg.NoTLP || s.reno() || s.srtt == 0 || s.ca != caOpen && s.ca != caCWR {
		return false
	}
	const least = 8e6 // Linux: two ticks of 250 Hz
	d := 2*s.srtt + least
	if s.packets() == 1 {
		d = 2*s.srtt + int64(c.s.cfg.MinRTO) // the ACK may be delayed
	}
	if s.ca == caOpen || s.ca == caCWR {
		d = min(d, s.segs[s.first].sentAt+s.timeout()-now)
	}
	if d <= 0 {
		return false
	}
	c.arm(timerTail, now+d)
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
		c.output(now)
	}
	if t.delayed <= now {
		c.delayedACK(now)
	}
	if t.at <= now {
		kind := t.kind
		c.disarm()
		switch kind {
		case timerHandshake:
			c.repeatHandshake(now)
		case timerRTO:
			c.retransmitTimeout(now)
		case timerTail:
			c.probeTail(now)
		case timerReorder:
			c.reorderTimeout(now)
		case timerProbe:
			c.probeWindow(now)
		}
	}
	if c.state != Closed && t.keepalive <= now {
		c.keepAlive(now)
	}
}

// givenUp closes the connection if its peer has not answered for too long.
func (c *conn) givenUp(now int64) bool {
	s := &c.snd
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

func (c *conn) retransmitTimeout(now int64) {
	s := &c.snd
	if s.packets() == 0 || c.givenUp(now) {
		return
	}
	c.enterLoss(now)
	s.retries++
	i := s.first
	for i < len(s.segs) && s.segs[i].is(segSacked) { // the peer has to acknowledge what it SACKed, one day
		i++
	}
	if i == len(s.segs) {
		i = s.first
	}
	c.retransmit(now, i)
	s.backoff++
	c.arm(timerRTO, now+s.timeout())
}

// probeTail sends new data, or the last segment again, so that the peer tells what is missing.
func (c *conn) probeTail(now int64) {
	s := &c.snd
	if s.packets() == 0 {
		return
	}
	if !s.tlpOut {
		was := s.nxt
		if n := min(s.left(), c.currentMSS()); n > 0 && !after(s.nxt+uint32(n), c.windowEnd()) {
			closing := s.closed && s.nxt+uint32(n) == s.end() && before(s.nxt+uint32(n), c.windowEnd())
			c.sendNew(now, n, c.currentMSS(), closing)
		} else {
			c.retransmit(now, len(s.segs)-1)
		}
		s.tlpOut, s.tlpHigh, s.tlpRetransmits = true, s.nxt, s.nxt == was
	}
	c.arm(timerRTO, now+s.timeout())
}

// reorderTimeout: what was sent before something that arrived is taken for lost now.
func (c *conn) reorderTimeout(now int64) {
	s := &c.snd
	if s.packets() == 0 {
		return
	}
	var info ackInfo
	flight := s.inFlight()
	c.detectLoss(now, &info)
	if s.inFlight() != flight && s.ca != caRecovery && s.ca != caLoss {
		c.enterRecovery(&info)
		s.prr(1, false, true)
	}
	c.resend(now)
	if c.timers.kind == timerNone {
		c.arm(timerRTO, now+s.timeout())
	}
}

// probeWindow asks a peer with a closed window whether it is open, with what fits in or without data.
func (c *conn) probeWindow(now int64) {
	s := &c.snd
	if s.packets() > 0 || !s.pending() {
		return
	}
	if s.retries == 0 && s.backoff == 0 {
		s.stuckSince = now
	}
	if c.givenUp(now) {
		return
	}
	mss := c.currentMSS()
	room := int(int32(c.windowEnd() - s.nxt))
	if n := min(s.left(), mss, room); room > 0 && n > 0 {
		c.sendNew(now, n, mss, s.closed && s.nxt+uint32(n) == s.end() && n < room)
		c.arm(timerRTO, now+s.timeout())
		return
	}
	if room > 0 { // only the FIN is left
		c.output(now)
		return
	}
	c.segment(now, s.una-1, ack, nil)
	s.retries++
	s.backoff++
	c.arm(timerProbe, now+s.backed(s.rto))
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
