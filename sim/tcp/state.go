// SPDX-License-Identifier: Apache-2.0

package tcp

// afterACK changes the state as an ACK of the FIN does. It reports false if the connection is closed now.
func (c *conn) afterACK(now int64, g *segment) bool {
	done := c.snd.finAcked()
	switch c.state {
	case FinWait1:
		if done {
			c.state = FinWait2
			c.snd.disarm()
			if c.orphan {
				c.timers.life = now + int64(c.s.cfg.TimeWait)
			}
		}
	case Closing:
		if done {
			c.timeWait(now)
			return false
		}
	case LastAck:
		if done {
			c.end(nil)
			return false
		}
	}
	if c.orphan && len(g.data) > 0 && (c.state == FinWait1 || c.state == FinWait2) {
		end := g.seq + uint32(len(g.data))
		if after(end, c.rcv.nxt) { // nobody will read it
			c.s.refuse(&c.route, g)
			c.end(nil)
			return false
		}
	}
	return true
}

// finIn: everything that the peer sends was received.
func (c *conn) finIn(now int64) {
	r := &c.rcv
	r.fin, r.finSeq = true, r.nxt
	r.nxt++
	r.ooo, r.sacks, r.dup = nil, 0, false
	r.ackPending = true
	switch c.state {
	case Established:
		c.state = CloseWait
		r.pingpong = true // the ACK can wait for the own FIN
	case FinWait1:
		c.state = Closing
		r.ackNow = true
	case FinWait2:
		c.sendACK(now)
		c.timeWait(now)
	}
}

// timeWait is entered by the side that closed first.
func (c *conn) timeWait(now int64) {
	c.timers.clear()
	c.state = TimeWait
	c.timers.life = now + int64(c.s.cfg.TimeWait)
	c.rcv.ackPending = false
	c.snd.buf, c.snd.off, c.snd.segs, c.snd.first = nil, 0, nil, 0
	if c.orphan {
		c.rcv.buf, c.rcv.off = nil, 0
	}
}

// inTimeWait is a segment for a connection in TIME-WAIT (Linux's tcp_timewait_state_process).
func (c *conn) inTimeWait(now int64, g *segment) (again bool) {
	outdated := c.outdated(g)
	r := &c.rcv
	if !outdated && g.seq == r.nxt && (g.end == g.seq || g.has(rst)) {
		if g.has(rst) {
			c.end(nil) // RFC 1337 is not followed by default
			return false
		}
		if c.timestamps && g.timestamps {
			c.tsRecent, c.tsRecentAt = g.tsVal, now
		}
		c.timers.life = now + int64(c.s.cfg.TimeWait)
		return false
	}
	// A new connection with the same addresses and ports: its numbers or timestamps are newer (RFC 6191).
	if g.has(syn) && g.flags&(rst|ack) == 0 && !outdated &&
		(after(g.seq, r.nxt) || c.timestamps && g.timestamps && before(c.tsRecent, g.tsVal)) && c.s.ports[g.to] != nil {
		return true
	}
	if !g.has(rst) {
		if outdated || g.has(ack) {
			c.timers.life = now + int64(c.s.cfg.TimeWait)
		}
		c.repeated(now, g)
	}
	return false
}

// closeWrite has a FIN follow what was written.
func (c *conn) closeWrite(now int64) {
	s := &c.snd
	if s.closed {
		return
	}
	switch c.state {
	case SynSent:
		c.end(nil)
		return
	case SynReceived:
	case Established:
		c.state = FinWait1
	case CloseWait:
		c.state = LastAck
	default:
		return
	}
	s.closed = true
	s.output(now)
}

// close gives the connection up: nobody reads any more.
func (c *conn) close(now int64) {
	if c.orphan || c.state == Closed {
		c.orphan = true
		c.rcv.buf, c.rcv.off = nil, 0
		return
	}
	c.orphan = true
	if c.rcv.unread() > 0 && c.state != TimeWait { // what was not read is lost: tell the peer
		c.reset(now, nil)
		return
	}
	c.rcv.buf, c.rcv.off = nil, 0
	c.closeWrite(now)
	if c.state == FinWait2 {
		c.timers.life = now + int64(c.s.cfg.TimeWait)
	}
}
