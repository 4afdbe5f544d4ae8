// SPDX-License-Identifier: Apache-2.0

package compare

import "time"

// The kernel's slots are shared by all connections. When they run out, the frame that
// comes last is dropped, and that may be the one that all others wait for. So P keeps an
// eighth of them free: beyond that the connection that holds more than its share gives
// up frames, from the end that leaves last. The guest repeats those.

// slotClass is the size of a slot: for frames of the usual size, or for large ones.
type slotClass uint8

const (
	smallSlot slotClass = iota
	largeSlot
	slotClasses
)

func classOf(large bool) slotClass {
	if large {
		return largeSlot
	}
	return smallSlot
}

// slotUse is how the slots of a class are used.
type slotUse struct {
	limit   int
	held    int
	holders int // connections that hold any
}

// slotLimit is how many of n slots may be held.
func slotLimit(n int) int { return max(1, n-max(1, n/8)) }

// shareEvery is how often all connections are looked at for one that holds too much.
const shareEvery = time.Millisecond

// countSlot notes that one slot more is held, or, with n = -1, less.
func (q *heldQueue) countSlot(h *piece, n int) {
	if h.slot == NoSlot {
		return
	}
	class := classOf(h.large)
	u := &q.slots[class]
	before := q.holds[class]
	q.holds[class] += n
	u.held += n
	switch {
	case before == 0:
		u.holders++
	case q.holds[class] == 0:
		u.holders--
	}
}

// noRoom: the kernel had no slot for s, dropped it and counted it.
func (p *Primary) noRoom(s *Segment) {
	c := p.conns.byTuple[s.Tuple]
	switch {
	case c == nil:
	case s.Flags&(SYN|RST) == SYN && !c.syn.repeated(s) && outlives(c, s) == ReasonNone:
		// R8: what follows the SYN is another connection's. It leaves when the guest repeats it.
		if c = p.pvmSYN(c, s); c != nil {
			c.pvmSeen = true
			c.acks.fromPVM(s, p.frozen)
			p.pump(c)
		}
	default:
		p.makeRoom(c, classOf(s.Large))
	}
}

// makeRoom has c give up a frame if too many slots are in use and c has more than its
// share of them; else others give up what they have beyond theirs.
func (p *Primary) makeRoom(c *conn, class slotClass) {
	u := &p.slots[class]
	if p.frozen || p.solo || u.held <= u.limit || p.off(mutRoom) {
		return
	}
	share := u.limit / u.holders
	switch {
	case share == 0: // nobody has more than one frame
	case c.held.holds[class] > share:
		c.held.giveUp(class)
	case p.now >= p.sharedAt:
		p.sharedAt = p.now + int64(shareEvery)
		for _, t := range p.timers {
			for t.conn != nil && u.held > u.limit && t.conn.held.holds[class] > share && t.conn.held.giveUp(class) {
			}
		}
	}
}

// giveUp drops the last frame but one that is held in a slot of the class, and reports
// whether there was any. The last one of all stays as long as it can: a SACK block for
// it shows the guest that what lies before it was lost.
func (q *heldQueue) giveUp(class slotClass) bool {
	held := q.view()
	end := len(held) - 1
	i := end - 1
	for i > 0 && classOf(held[i].large) != class {
		i--
	}
	if i <= 0 {
		if i = end; i <= 0 || classOf(held[i].large) != class {
			return false // the first one is what all others wait for
		}
	}
	q.free(i, i+1, ReasonNoRoom)
	return true
}
