// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"container/heap"
	"math"
	"time"
)

const (
	fullEvery = time.Second
	askDelay  = 100 * time.Microsecond // the frame that resolves it is often just behind
	askAgain  = 5 * time.Millisecond
	maxAsks   = 8
)

// timer is the entry of a connection, or of a flow of datagrams, in a [timerHeap].
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

func (h timerHeap) Len() int           { return len(h) }
func (h timerHeap) Less(i, j int) bool { return h[i].due < h[j].due }

func (h timerHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].heapIdx, h[j].heapIdx = i, j
}

func (h *timerHeap) Push(t any) { *h = append(*h, t.(*timer)) }

func (h *timerHeap) Pop() any {
	last := len(*h) - 1
	t := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return t
}

// add makes t an entry that is never due.
func (h *timerHeap) add(t *timer) {
	t.due, t.heapIdx = math.MaxInt64, len(*h)
	heap.Push(h, t)
}

func (h *timerHeap) remove(t *timer) {
	heap.Remove(h, t.heapIdx)
	t.heapIdx = -1
}

func (h *timerHeap) set(t *timer, due int64) {
	t.due = due
	heap.Fix(h, t.heapIdx)
}

// askClock times the questions to S for one sum: the second and later ones ever more
// seldom, maxAsks of them.
type askClock struct {
	at int64 // of the next question; 0: none
	n  int   // asked so far
}

func (k *askClock) stop() { *k = askClock{} }

// start sets the time of the first question, unless it was asked.
func (k *askClock) start(now int64, delay time.Duration) {
	if k.n > 0 {
		return
	}
	if at := now + int64(delay); k.at == 0 || at < k.at {
		k.at = at
	}
}

// again notes a question and sets the time of the next one.
func (k *askClock) again(now int64) {
	k.at = now + int64(askAgain)<<k.n
	k.n++
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
			p.datagrams.fire(t.flow)
		} else {
			p.fire(t.conn)
		}
	}
}

// deadline is c's earliest timer. While frozen there is none: nothing may leave,
// and a checkpoint is under way.
func (c *conn) deadline() int64 {
	if c.frozen {
		return math.MaxInt64
	}
	if c.owner.kernel {
		return c.owner.lookAt
	}
	d := c.endOfLife()
	for _, at := range [...]int64{int64(c.cuts), c.ackAt, c.lag.at, c.asks.at, c.syn.due, c.query.at} {
		if at != 0 {
			d = min(d, at)
		}
	}
	return min(d, c.stall.lookAt(), c.stall.deadline(c.cfg.Timeout))
}

// endOfLife is when c is forgotten unless something happens to it. One of which nothing
// is compared, met in mid-stream, begins afresh with whatever comes next; it may be no more
// than the ACK with which TIME_WAIT answers a late FIN.
func (c *conn) endOfLife() int64 {
	switch {
	case !c.pvmSeen:
		return c.born + int64(c.cfg.Timeout)
	case !c.diverged && (c.clientRST || c.rstSent || c.floating && !c.unmatched()):
		return c.last + int64(c.cfg.Linger)
	case !c.diverged && c.closed():
		// A guest that has repeated its FIN may do so again, after about the time from the first to the last.
		return c.last + int64(c.cfg.Linger) + c.finAgain - c.finAt
	case !c.diverged && c.syn.seen && !c.established:
		return c.born + int64(c.cfg.HalfOpen)
	}
	return c.last + int64(c.cfg.Idle)
}

// arm makes sure that c's timers are looked at in time, and runs those that are
// due already.
func (p *Primary) arm(c *conn) {
	if d := c.deadline(); d <= p.now {
		p.fire(c)
	} else if d < c.due {
		p.timers.set(&c.timer, d)
	}
}

// fire runs c's timers that are due.
func (p *Primary) fire(c *conn) {
	due := func(at int64) bool { return at != 0 && at <= p.now }
	if c.owner.kernel {
		if due(c.owner.lookAt) {
			p.emit(OpTake, &c.tuple)
			c.owner.looking, c.owner.lookAt = true, p.now+int64(ownedFor)
		}
		p.timers.set(&c.timer, c.deadline())
		return
	}
	if !p.frozen {
		if due(c.syn.due) {
			c.announce()
		}
		if due(int64(c.cuts)) {
			c.cut()
		}
		if due(c.ackAt) {
			c.sendGrownACK(c.dataDue())
		}
		if due(c.asks.at) {
			c.ask()
		}
		if c.lag.due(p.now) {
			c.probe()
		}
		if c.query.due(p.now) && c.stuck() {
			c.unstick()
		}
		if c.stall.lookAt() <= p.now && c.stall.look(leadOf(c)) && !p.off(mutOrder) {
			p.checkpoint(&c.tuple, ReasonOrder, missingOf(c))
		}
		if c.stall.deadline(p.cfg.Timeout) <= p.now && p.stalled(c) {
			return
		}
		if c.endOfLife() <= p.now {
			p.expire(c)
			return
		}
	}
	p.timers.set(&c.timer, c.deadline())
}

// stalled: R7's clock ran out. It reports whether c was removed.
func (p *Primary) stalled(c *conn) bool {
	if c.clientRST {
		// The remote has reset the connection, and one guest received the RST before it
		// transmitted. If the guests ignored the RST, the next segment makes the
		// connection known again.
		p.conns.remove(c, ReasonReset)
		return true
	}
	if p.conns.flooded(c) {
		p.conns.remove(c, ReasonHalfOpen) // R11; the remote repeats its SYN
		return true
	}
	c.stall.begin(p.now)
	p.checkpoint(&c.tuple, ReasonTimeout, missingOf(c))
	return false
}

// expire ends a connection whose time is over.
func (p *Primary) expire(c *conn) {
	why := ReasonExpired
	if c.held.hasRST {
		why = ReasonUnmatchedRST
	}
	if c.openOnSVM && !c.pvmSeen {
		p.checkpoint(&c.tuple, ReasonTimeout, missingOf(c))
	}
	p.conns.remove(c, why)
}

// askEnd reports whether something is held at the compared point that the SVM's
// records do not resolve, up to where to ask, and how long to wait for what may resolve it.
func (c *conn) askEnd() (end uint32, delay time.Duration, ok bool) {
	if c.syn.waiting || c.diverged || c.frozen {
		return 0, 0, false
	}
	for i := range c.held.view() {
		h := &c.held.view()[i]
		if end = h.dataEnd(); !after(end, c.svm.compared) {
			continue
		}
		if after(h.start, c.svm.compared) {
			break
		}
		switch known, any := c.svm.end(); {
		case !any || !after(known, end):
			delay = askAgain
		case h.flags&PSH != 0 && !c.pvm.beyond(end):
			// The records reach beyond it, and the PVM has sent all it had (see cutDelay).
			delay = atOnce
		default:
			delay = askDelay
		}
		if c.svm.ahead() {
			end = minSeq(end, c.svm.extent.end)
		}
		return end, delay, true
	}
	return 0, 0, false
}

// ask asks S for a sum (R5). That repairs the loss of a digest record too. Where records
// behind the hole are known, it asks for what leads to them: without that they are of no
// use, and as long as the SVM is ahead each frame of the PVM would need a question.
func (c *conn) ask() {
	c.asks.at = 0
	end, _, ok := c.askEnd()
	if !ok || c.asks.n >= maxAsks {
		return
	}
	c.askFor(c.svm.compared, end)
	if from, to, ok := c.svm.hole(); ok && to != end {
		c.askFor(from, to)
	}
	c.asks.again(c.now)
}

// wait sets the timers after something happened to c.
func (p *Primary) wait(c *conn) {
	c.retime()
	p.arm(c)
	p.offer(c)
}

// retime updates the timers; the caller looks at them next.
func (c *conn) retime() {
	c.stall.run(c.unmatched(), leadOf(c), c.now)
	c.watchLag(!c.diverged && (c.held.partly(c.released) || c.held.len() == 0 && c.svm.ahead()))
	if c.stuck() {
		c.query.run(c.now)
	} else {
		c.query = backoff{}
	}
	if _, delay, ok := c.askEnd(); !ok {
		c.asks.stop()
	} else {
		c.asks.start(c.now, delay)
	}
}

// moved notes that the compared point, or what the SVM acknowledged, moved.
func (c *conn) moved() {
	c.query = backoff{}
	if !c.off(mutR7) {
		c.stall.moved(c.now)
	}
}
