// SPDX-License-Identifier: Apache-2.0

package tcp

// Quick ACKs at the start and after something unusual, as Linux counts them.
const quickACKs = 16

// appendBlocks appends the SACK option, a D-SACK first.
func (r *receiver) appendBlocks(opts []byte) []byte {
	c := r.c
	if !c.sack {
		r.dup = false
		return opts
	}
	n := r.sackBlocks()
	var blocks [5]span
	kept := blocks[:0]
	if r.dup {
		kept = append(kept, r.dupOf)
		r.dup = false
	}
	kept = append(kept, r.blocks[:r.sacks]...)
	return appendSACK(opts, kept[:n])
}

// acknowledged: a segment went out that acknowledges everything received.
func (c *conn) acknowledged() {
	r := &c.rcv
	if r.quick > 0 {
		r.quick--
	}
	r.ackPending, r.ackNow, r.pushed = false, false, 0
	c.timers.delayed = never
}

// received: data is to be acknowledged.
func (r *receiver) received(now int64, g *segment) {
	c := r.c
	r.ackPending = true
	if n := len(g.data); n < r.mss {
		r.pushed = min(r.pushed+1, 2)
	} else {
		r.mss = min(n, c.s.cfg.MSS)
		if g.has(psh) {
			r.pushed = max(r.pushed, 1)
		}
	}
	if !r.active {
		r.active = true
		r.quicken(quickACKs)
	} else if now-r.lastDataAt > c.snd.rto { // a new burst: the peer is in slow start
		r.quicken(quickACKs)
	}
	r.lastDataAt = now
}

// quicken has the next ACKs not be delayed: as many as the window has pairs of segments.
func (r *receiver) quicken(most int) {
	n := max(int(r.wnd)/(2*r.mss), 2)
	r.quick = max(r.quick, min(n, most))
}

// hurry is quicken for something unusual: it ends the interactive mode.
func (r *receiver) hurry(most int) {
	r.quicken(most)
	r.pingpong = false
}

// maybeACK acknowledges what came in: at once or within the time of a delayed ACK.
func (r *receiver) maybeACK(now int64) {
	c := r.c
	if !r.ackPending || c.state == Closed {
		return
	}
	full := int(r.nxt-r.wup) > r.mss && (r.unread() == 0 || r.selectWindow() >= r.wnd)
	if r.ackNow || full || r.quick > 0 && !r.pingpong || len(r.ooo) > 0 {
		c.sendACK(now)
		return
	}
	wait := int64(c.s.cfg.DelayedACK)
	if !r.active { // a FIN before any data: Linux's estimate is 0 yet, and the timer's tick 4 ms
		wait = min(wait, 4e6)
	}
	c.timers.delayed = min(c.timers.delayed, now+wait)
}

func (r *receiver) delayedACK(now int64) {
	c := r.c
	c.timers.delayed = never
	if r.ackPending {
		r.pingpong = false
		c.sendACK(now)
	}
}

// afterRead acknowledges what a reader made room for (Linux's tcp_cleanup_rbuf).
func (r *receiver) afterRead(now int64, n int) {
	c := r.c
	if c.state < Established || c.state == TimeWait || n == 0 {
		return
	}
	if r.ackPending && (int(r.nxt-r.wup) > r.mss || (r.pushed == 2 || r.pushed == 1 && !r.pingpong) && r.unread() == 0) {
		c.sendACK(now)
		return
	}
	// The window is told again once it has at least doubled.
	if c.state > FinWait2 {
		return
	}
	left := r.window()
	if w := r.selectWindow(); w > 0 && w >= 2*left && 2*left <= uint32(r.room) {
		c.sendACK(now)
	}
}
