// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"math"
	"time"
)

const (
	fullEvery     = time.Second
	askDelay      = 100 * time.Microsecond // the frame that resolves it is often just behind
	askAgain      = 5 * time.Millisecond
	maxAsks       = 8
	announceFirst = 5 * time.Millisecond
	announceMax   = 200 * time.Millisecond
	announceAgain = 8 // times after a commit
)

// timer is the entry of a connection, or of a flow of datagrams, in a timerHeap.
type timer struct {
	due     int64
	heapIdx int // -1: removed
	conn    *conn
	flow    *dgramFlow
}

// timerHeap is a binary heap of all connections and flows by due, each of which
// has one entry for its earliest timer. An entry may be early: a timer that moved
// later is only noticed when the entry comes up, so that what happens at every
// packet costs nothing.
type timerHeap []*timer

func (h timerHeap) swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].heapIdx, h[j].heapIdx = i, j
}

func (h timerHeap) up(i int) {
	for i > 0 && h[i].due < h[(i-1)/2].due {
		h.swap(i, (i-1)/2)
		i = (i - 1) / 2
	}
}

func (h timerHeap) down(i int) {
	for {
		least := i
		for k := 2*i + 1; k <= 2*i+2 && k < len(h); k++ {
			if h[k].due < h[least].due {
				least = k
			}
		}
		if least == i {
			return
		}
		h.swap(i, least)
		i = least
	}
}

func (h *timerHeap) push(t *timer) {
	t.due, t.heapIdx = math.MaxInt64, len(*h)
	*h = append(*h, t)
}

func (h *timerHeap) remove(t *timer) {
	i, last := t.heapIdx, len(*h)-1
	h.swap(i, last)
	(*h)[last] = nil
	*h = (*h)[:last]
	t.heapIdx = -1
	if i < last {
		h.up(i)
		h.down(i)
	}
}

func (h timerHeap) set(t *timer, due int64) {
	t.due = due
	h.up(t.heapIdx)
	h.down(t.heapIdx)
}

// NextDeadline is the boottime, in ns, at which Step wants an [EvTick] if
// nothing happens before; math.MaxInt64: never. The tick may find nothing to do.
func (p *Primary) NextDeadline() int64 {
	if len(p.timers) == 0 {
		return math.MaxInt64
	}
	return p.timers[0].due
}

// tick runs what is due.
func (p *Primary) tick() {
	for len(p.timers) > 0 && p.timers[0].due <= p.now {
		if t := p.timers[0]; t.flow != nil {
			p.fireFlow(t.flow)
		} else {
			p.fire(t.conn)
		}
	}
}

// deadline is c's earliest timer. While frozen there is none: nothing may leave,
// and a checkpoint is under way.
func (p *Primary) deadline(c *conn) int64 {
	if p.frozen {
		return math.MaxInt64
	}
	d := p.endOfLife(c)
	for _, at := range [...]int64{c.cutAt, c.askAt, c.annAt, c.query.at} {
		if at != 0 {
			d = min(d, at)
		}
	}
	if c.waiting {
		d = min(d, c.progress+int64(p.cfg.Timeout))
	}
	return d
}

// endOfLife is when c is forgotten unless something happens to it.
func (p *Primary) endOfLife(c *conn) int64 {
	switch {
	case !c.pvmSeen:
		return c.born + int64(p.cfg.Timeout)
	case !c.diverged && (c.clientRST || c.closed()):
		return c.last + int64(p.cfg.Linger)
	case !c.diverged && c.synSeen && !c.established:
		return c.born + int64(p.cfg.HalfOpen)
	}
	return c.last + int64(p.cfg.Idle)
}

// arm makes sure that c's timers are looked at in time, and runs those that are
// due already.
func (p *Primary) arm(c *conn) {
	if d := p.deadline(c); d <= p.now {
		p.fire(c)
	} else if d < c.due {
		p.timers.set(&c.timer, d)
	}
}

// fire runs c's timers that are due.
func (p *Primary) fire(c *conn) {
	due := func(at int64) bool { return at != 0 && at <= p.now }
	if !p.frozen {
		if due(c.annAt) {
			p.announce(c)
		}
		if due(c.cutAt) {
			p.cut(c)
		}
		if due(c.askAt) {
			p.ask(c)
		}
		if c.query.due(p.now) && c.stuck() {
			p.unstick(c)
		}
		if c.waiting && c.progress+int64(p.cfg.Timeout) <= p.now && p.stalled(c) {
			return
		}
		if p.endOfLife(c) <= p.now {
			p.expire(c)
			return
		}
	}
	p.timers.set(&c.timer, p.deadline(c))
}

// stalled: R7's clock ran out. It reports whether c was removed.
func (p *Primary) stalled(c *conn) bool {
	if c.clientRST {
		// The remote has reset the connection, and one guest saw it before it
		// spoke. If the guests did not believe the RST, the next segment makes the
		// connection known again.
		p.remove(c, ReasonReset)
		return true
	}
	c.progress = p.now
	p.checkpoint(&c.tuple, ReasonTimeout)
	return false
}

// expire ends a connection whose time is over.
func (p *Primary) expire(c *conn) {
	why := ReasonExpired
	if c.rstHeld {
		why = ReasonUnmatchedRST
	}
	if c.openOnSVM && !c.pvmSeen {
		p.checkpoint(&c.tuple, ReasonTimeout)
	}
	p.remove(c, why)
}

// announce repeats the PVM's SYN to S until the SVM's is there (R9).
func (p *Primary) announce(c *conn) {
	if c.annAt = 0; !c.announcing || c.annLeft == 0 {
		return
	}
	c.annLeft--
	p.stats.Announces++
	e := p.emit(OpAnnounce, &c.tuple)
	e.Seq, e.Ack, e.Flags, e.Inc = c.inc, c.synAck, c.synFlags, c.inc
	e.OptLen, e.Opts = c.synOpts.n, c.synOpts.b
	c.annDelay = min(2*c.annDelay, int64(announceMax))
	c.annAt = p.now + c.annDelay
}

func (p *Primary) startAnnouncing(c *conn, times int) {
	c.announcing, c.annLeft, c.annDelay = true, times, int64(announceFirst)
	c.annAt = p.now + c.annDelay
}

// askEnd reports whether something is held at the compared point that the SVM's
// records do not resolve, and up to where to ask. soon: they reach beyond it.
func (p *Primary) askEnd(c *conn) (end uint32, soon, ok bool) {
	if c.synWait || c.diverged || p.frozen {
		return 0, false, false
	}
	for i := range c.held.view() {
		h := &c.held.view()[i]
		if end = h.dataEnd(); !after(end, c.compared) {
			continue
		}
		if after(h.start, c.compared) {
			break
		}
		known, any := c.svm.end()
		soon = any && after(known, end)
		if c.svmSaid && after(c.svmEnd, c.compared) {
			end = minSeq(end, c.svmEnd)
		}
		return end, soon, true
	}
	return 0, false, false
}

// ask asks S for a sum (R5). It heals a lost record too, and where records behind it
// are known, asks for what leads to them: without that they would be of no use, and as
// long as the SVM is ahead each frame of the PVM would have to be asked for.
func (p *Primary) ask(c *conn) {
	c.askAt = 0
	end, _, ok := p.askEnd(c)
	if !ok || c.asks >= maxAsks {
		return
	}
	p.askFor(c, c.compared, end)
	if from, to, ok := c.hole(); ok && to != end {
		p.askFor(c, from, to)
	}
	c.askAt = p.now + int64(askAgain)<<c.asks
	c.asks++
}

func (p *Primary) askFor(c *conn, from, to uint32) {
	p.stats.Asks++
	e := p.emit(OpAsk, &c.tuple)
	e.Seq, e.To = from, to-from
	e.Inc, e.Inherited = c.inc, c.inherited || !c.incKnown
}

// wait sets the timers after something happened to c.
func (p *Primary) wait(c *conn) {
	p.retime(c)
	p.arm(c)
}

// retime is wait for who looks at the timers next.
func (p *Primary) retime(c *conn) {
	w := c.unmatched()
	if w && !c.waiting {
		c.progress = p.now
	}
	c.waiting = w
	if c.stuck() {
		c.query.run(p.now)
	} else {
		c.query = backoff{}
	}
	if _, soon, ok := p.askEnd(c); !ok {
		c.askAt, c.asks = 0, 0
	} else if c.asks == 0 {
		d := askAgain
		if soon {
			d = askDelay
		}
		if at := p.now + int64(d); c.askAt == 0 || at < c.askAt {
			c.askAt = at
		}
	}
}

// moved notes that the compared point or A moved.
func (p *Primary) moved(c *conn) {
	c.query = backoff{}
	if !p.off(mutR7) {
		c.progress = p.now
	}
}
