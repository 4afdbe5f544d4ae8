// SPDX-License-Identifier: Apache-2.0

package tcp

// startUndo remembers from where on a reduction can turn out wrong.
func (v *recovery) startUndo() {
	s := &v.c.snd
	s.undo, s.undoFrom, s.undoRetrans = true, s.una, -1
	if s.retrans > 0 {
		s.undoRetrans = s.retrans
	}
}

// delayed reports whether the ACK at hand was sent for a first transmission, by the timestamp that it echoes (Eifel, RFC 3522).
func (v *recovery) delayed() bool {
	c := v.c
	return c.tsSeen && c.tsEcr != 0 && c.snd.stamped && before(c.tsEcr, c.snd.retransStamp)
}

func (v *recovery) mayUndo() bool {
	c := v.c
	return c.snd.undo && (c.snd.undoRetrans == 0 || c.snd.delayed())
}

// undoReduction restores cwnd. With all, nothing counts as lost any more.
func (v *recovery) undoReduction(all bool) {
	s := &v.c.snd
	if all {
		for i := s.first; i < len(s.segs); i++ {
			s.segs[i].marks &^= segLost
		}
		s.lost = 0
	}
	if s.priorSsthresh != 0 {
		s.cwnd = max(s.cwnd, s.priorCwnd)
		s.ssthresh = max(s.ssthresh, s.priorSsthresh)
	}
	s.undo = false
}

// alert is Linux's tcp_fastretrans_alert: it changes the state of congestion control by what
// an ACK brought, and marks what is lost.
func (v *recovery) alert(now int64, info *ackInfo) {
	s := &v.c.snd
	dup := !info.advanced && !info.data && !info.window && !info.duplicate && (s.packets() > 0)
	if s.ca == caOpen && !dup && !info.sacked && !info.duplicate && !info.echo && s.lost == 0 {
		s.stamped = s.stamped && s.retrans > 0
		return
	}
	switch {
	case s.ca == caOpen:
		s.stamped = s.stamped && s.retrans > 0
	case before(s.una, s.highSeq):
	case s.ca == caCWR:
		if s.una != s.highSeq {
			s.endReduction()
			s.ca = caOpen
		}
	case s.ca == caRecovery:
		if s.reno() {
			s.sacked = 0
		}
		if s.recovered() {
			return
		}
		s.endReduction()
		s.ca = caOpen
	}
	switch s.ca {
	case caRecovery:
		if !info.advanced {
			if s.reno() && dup {
				info.delivered += s.addReno()
			}
		} else if s.undo && s.delayed() {
			if s.retrans == 0 {
				s.undoReduction(true)
				s.open(info)
			}
			return
		}
		if s.undo && s.undoRetrans == 0 {
			s.undoReduction(false)
			s.open(info)
		}
		s.markReno(info)
		if s.ca != caRecovery && !s.enterRecovery(info) {
			return
		}
	case caLoss:
		s.inLoss(now, info, dup)
		if s.ca != caOpen {
			return
		}
		fallthrough
	default:
		if s.reno() {
			if info.advanced {
				s.sacked = 0
			}
			if dup {
				info.delivered += s.addReno()
			}
		}
		if s.ca <= caDisorder && s.undo && s.undoRetrans == 0 {
			s.undoReduction(false)
		}
		s.markReno(info)
		if !s.enterRecovery(info) {
			s.open(info)
			if s.ca == caCWR {
				s.prr(info.delivered, info.advanced, info.lost)
			}
			return
		}
	}
	s.prr(info.delivered, info.advanced, info.lost)
}

// markReno marks the first segment as lost, after three duplicate ACKs or a partial one (NewReno, RFC 6582).
func (v *recovery) markReno(info *ackInfo) {
	s := &v.c.snd
	if !s.reno() || s.packets() == 0 {
		return
	}
	if s.ca < caRecovery && s.sacked >= dupThresh || s.ca == caRecovery && info.advanced {
		if g := &s.segs[s.first]; !g.is(segLost) {
			s.lose(g)
			info.lost = true
			s.limitReno()
		}
	}
}

// open leaves recovery, as far as nothing is missing.
func (v *recovery) open(info *ackInfo) {
	s := &v.c.snd
	if info.echo && s.ca != caCWR {
		s.priorSsthresh = 0
		s.reduce()
		s.reduced, s.undo = true, false
		s.ca = caCWR
		return
	}
	if s.ca == caCWR {
		return
	}
	ca := caOpen
	if s.sacked+s.lost+s.retrans > 0 || s.undo && s.undoRetrans != 0 && before(s.una, s.highSeq) {
		ca = caDisorder
	}
	if s.ca != ca {
		s.ca, s.highSeq = ca, s.nxt
	}
}

// enterRecovery begins a fast retransmit, if something is lost.
func (v *recovery) enterRecovery(info *ackInfo) bool {
	c := v.c
	s := &c.snd
	if s.lost == 0 {
		return false
	}
	s.priorSsthresh = 0
	s.startUndo()
	if s.ca < caCWR {
		if !info.echo {
			s.priorSsthresh = s.ssthresh
		}
		s.reduce()
		s.reduced = c.ecn
	}
	s.highSeq = s.nxt
	s.ca = caRecovery
	return true
}

// recovered: everything that was in flight when the loss was found is acknowledged. It reports
// true if the state has to stay.
func (v *recovery) recovered() bool {
	s := &v.c.snd
	if s.mayUndo() {
		s.undoReduction(false)
	}
	if s.reno() && s.una == s.highSeq && s.packets() > 0 {
		return true // later duplicate ACKs could be of the old losses
	}
	if s.ca == caLoss {
		s.ca = caOpen
	}
	return false
}

// enterLoss is what a retransmission timeout does: everything counts as lost.
func (v *recovery) enterLoss(now int64) {
	c := v.c
	s := &c.snd
	first := s.ca < caRecovery
	if s.ca <= caDisorder || !after(s.highSeq, s.una) || s.ca == caLoss && s.retries == 0 {
		s.priorSsthresh, s.priorCwnd = s.ssthresh, s.cwnd
		s.ssthresh = s.halved()
		s.startUndo()
	}
	reneged := s.segs[s.first].is(segSacked) // what is SACKed would have been acknowledged with it
	for i := s.first; i < len(s.segs); i++ {
		g := &s.segs[i]
		if reneged && g.is(segSacked) {
			g.marks &^= segSacked
			s.sacked--
		}
		if !g.is(segSacked) {
			s.lose(g)
		}
	}
	if s.reno() {
		s.sacked = 0
	}
	s.cwnd, s.cwndCnt = s.inFlight()+1, 0
	s.ca, s.highSeq, s.tlpOut = caLoss, s.nxt, false
	s.reduced = c.ecn
	s.frto = !c.s.cfg.NoFRTO && (first || s.retries > 0)
}

// inLoss is an ACK after a timeout. By F-RTO (RFC 5682) the timeout was spurious if something
// is acknowledged that was not sent again.
func (v *recovery) inLoss(now int64, info *ackInfo, dup bool) {
	s := &v.c.snd
	recovered := !before(s.una, s.highSeq)
	if info.advanced && s.mayUndo() || s.frto && info.original {
		s.undoReduction(true)
		s.retries = 0
		if info.original || !s.reno() {
			s.ca = caOpen
			s.highSeq = s.nxt
		}
		return
	}
	if s.frto {
		if after(s.nxt, s.highSeq) {
			if info.sacked || dup {
				s.frto = false
			}
		} else if info.advanced && !recovered {
			s.highSeq = s.nxt
			// Send new data, and see whether it is acknowledged. Only then the rest is retransmitted.
			was := s.nxt
			s.output(now)
			if s.nxt != was {
				return
			}
			s.frto = false
		}
	}
	if recovered {
		s.recovered()
		return
	}
	if s.reno() {
		if after(s.nxt, s.highSeq) && dup {
			info.delivered += s.addReno()
		} else if info.advanced {
			s.sacked = 0
		}
	}
}

// detectLoss is RACK (RFC 8985): a segment is lost if one sent a little later arrived.
func (v *recovery) detectLoss(now int64, info *ackInfo) {
	s := &v.c.snd
	s.rackNew = false
	slack := s.minRTT / 4
	if !s.disorder && (s.ca >= caRecovery || s.sacked >= dupThresh) {
		slack = 0
	}
	wait := int64(0)
	for i := s.first; i < len(s.segs); i++ {
		g := &s.segs[i]
		if g.is(segSacked) || g.is(segLost) && !g.is(segRetrans) {
			continue
		}
		if !before(g.order, s.rackOrder) {
			continue
		}
		if left := g.sentAt + s.rackRTT + slack - now; left > 0 {
			wait = max(wait, left)
		} else {
			s.lose(g)
			info.lost = true
		}
	}
	if wait > 0 {
		s.arm(timerReorder, now+wait+leastTimeout)
		info.armed = true
	}
}

// resend retransmits what is lost, as cwnd allows.
func (v *recovery) resend(now int64) {
	c := v.c
	s := &c.snd
	if s.lost == 0 || s.ca != caRecovery && s.ca != caLoss || s.ca == caLoss && s.frto && after(s.nxt, s.highSeq) {
		return
	}
	sent := false
	for i := s.first; i < len(s.segs) && s.inFlight() < s.cwnd; i++ {
		g := &s.segs[i]
		if !g.is(segLost) || g.is(segSacked|segRetrans) {
			continue
		}
		if !s.retransmit(now, i) {
			break
		}
		sent = true
		if s.ca == caRecovery {
			s.prrOut++
		}
	}
	if sent && c.timers.kind != timerReorder {
		s.arm(timerRTO, now+s.rto)
	}
}

// tailAcked is an ACK while a tail loss probe is out.
func (v *recovery) tailAcked(g *segment, info *ackInfo) {
	s := &v.c.snd
	if !s.tlpOut || before(g.ack, s.tlpHigh) {
		return
	}
	switch {
	case !s.tlpRetransmits, info.duplicate:
		s.tlpOut = false
	case after(g.ack, s.tlpHigh):
		// The probe repaired a loss.
		s.priorSsthresh = 0
		s.reduce()
		s.ca = caCWR
		s.endReduction()
		s.ca = caOpen
		s.open(info)
	case !info.advanced && !info.data && !info.window && !info.sacked:
		s.tlpOut = false
	}
}
