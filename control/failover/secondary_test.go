// SPDX-License-Identifier: Apache-2.0

package failover

import (
	"slices"
	"testing"
	"time"
)

// An SVM that has lost the PVM's QEMU gives up only when P has shown since that it lives. If
// P's daemon hangs and its QEMU is dead, the link is whole and silent, and this is the last guest.
func TestUseless(t *testing.T) {
	const ms = int64(time.Millisecond)
	run := func(living bool, mutate func(*Config)) (ops []Op) {
		cfg := DefaultConfig(500*time.Millisecond, 400*time.Millisecond, 3*time.Second)
		mutate(&cfg)
		l := NewSecondary(cfg, 7, true, 0)
		step := func(at int64, ev Event) {
			for _, e := range l.Step(at, ev) {
				ops = append(ops, e.Op)
			}
		}
		step(1*ms, Event{Kind: EvLinkUp, Term: 7})
		step(100*ms, Event{Kind: EvCOLOExit})
		step(110*ms, Event{Kind: EvReceived})
		if living {
			step(601*ms, Event{Kind: EvReceived})
		} else {
			step(601*ms, Event{Kind: EvTick})
			step(611*ms, Event{Kind: EvLinkDown})
			step(1200*ms, Event{Kind: EvTick})
		}
		return ops
	}
	none := func(*Config) {}
	if ops := run(true, none); !slices.Contains(ops, OpFenced) || slices.Contains(ops, OpClaim) {
		t.Errorf("P lives: %v", ops)
	}
	if ops := run(false, none); slices.Contains(ops, OpFenced) || !slices.Contains(ops, OpClaim) {
		t.Errorf("P hangs: %v", ops)
	}
	if ops := run(false, func(c *Config) { c.noLiving = true }); !slices.Contains(ops, OpFenced) {
		t.Errorf("the mutation goes unnoticed: %v", ops)
	}
}
