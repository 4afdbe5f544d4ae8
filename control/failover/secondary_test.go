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

// A P whose guest is gone, and which does not know that S has the last one, gives S up when it
// cannot replicate to it. S has asked the arbiter by then, and that decides.
func TestDismissedClaim(t *testing.T) {
	run := func(mutate func(*Config)) (ops []Op, state SecondaryState) {
		cfg := DefaultConfig(500*time.Millisecond, 400*time.Millisecond, 3*time.Second)
		mutate(&cfg)
		l := NewSecondary(cfg, 7, true, 0)
		for i, ev := range []Event{{Kind: EvLinkUp, Term: 7}, {Kind: EvPeerDead}, {Kind: EvDismissed}, {Kind: EvClaimed, OK: true, Term: 8}} {
			for _, e := range l.Step(int64(i)*int64(time.Millisecond), ev) {
				ops = append(ops, e.Op)
			}
		}
		return ops, l.State()
	}
	if ops, state := run(func(*Config) {}); slices.Contains(ops, OpFenced) || state < SecondaryLease || state > SecondarySolo {
		t.Errorf("%v, state %d", ops, state)
	}
	if ops, _ := run(func(c *Config) { c.noClaimCounts = true }); !slices.Contains(ops, OpFenced) {
		t.Errorf("the mutation goes unnoticed: %v", ops)
	}
}
