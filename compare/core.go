// SPDX-License-Identifier: Apache-2.0

package compare

import "time"

// core is what all parts of a [Primary] share: its settings, the shared bounds, the
// counters, and, during Step, the time of the event and the effects of it so far.
type core struct {
	cfg  Config
	keys *Keys
	mut  mutation

	asserts bool // see Assertions

	frozen, solo bool
	timers       timerHeap // holds every connection and every flow of datagrams
	opens        openTable
	slots        [slotClasses]slotUse
	sharedAt     int64 // before it no connection is looked for that holds too much
	points       pointBudget
	queryAt      int64              // before it no query is made
	delays       map[uint16]*delays // by the guest's port
	led          [leads]int         // connections on which a guest has led for an unusual time
	stats        Stats

	now     int64
	eventNo uint64
	effects []Effect
	bounds  []Bound // scratch of conn.svmData
}

// emit appends an effect.
func (k *core) emit(op Op, t *Tuple) *Effect {
	k.effects = append(k.effects, Effect{Op: op, Tuple: *t, Slot: NoSlot})
	return &k.effects[len(k.effects)-1]
}

// drop counts a frame that does not leave and frees its slot.
func (k *core) drop(slot Slot, why Reason) {
	k.stats.Drops[why]++
	if slot != NoSlot {
		k.effects = append(k.effects, Effect{Op: OpFree, Slot: slot, Reason: why})
	}
}

// heldSince counts that a frame leaves which was captured at.
func (k *core) heldSince(at int64) {
	k.stats.HoldTimes.Observe(time.Duration(max(0, k.now-at)))
}

// checkpoint asks for one. where: the place in which the guests differ, if that is known.
func (k *core) checkpoint(t *Tuple, why Reason, where string) {
	k.stats.Checkpoints[why]++
	e := k.emit(OpCheckpoint, t)
	e.Reason, e.Where = why, where
}

// before reports whether a frame captured at t belongs to the epoch that the commit
// point ends (R14). Both are boottime, in ns.
func (k *core) before(t, commit int64) bool { return t < commit || k.off(mutR14) }

func (k *core) off(m mutation) bool { return k.mut&m != 0 }
