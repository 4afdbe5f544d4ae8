// SPDX-License-Identifier: Apache-2.0

package checkpoint

import (
	"slices"
	"testing"
)

// QEMU carries a checkpoint out that both daemons have given up: the control link broke after
// READY, and the connection between the two QEMUs was slow. The SVM is a copy of the PVM from
// then on, so its offsets are void, also for a takeover that follows. An SVM that was stopped
// when no checkpoint was due is what it was. Where it may be either, S is in doubt.
func TestLateCheckpoint(t *testing.T) {
	run := func(mutate func(*Config), evs ...Event) (resets []uint32, doubt bool) {
		cfg := DefaultConfig()
		cfg.QMP = true
		mutate(&cfg)
		s := NewSecondary(cfg)
		for i, ev := range append([]Event{{Kind: EvQMPUp, OK: true}, {Kind: EvLinkUp, OK: true}}, evs...) {
			for _, fx := range s.Step(int64(i), ev) {
				if fx.Op == OpReset {
					resets = append(resets, fx.Epoch)
				}
			}
		}
		return resets, s.Doubt()
	}
	none := func(*Config) {}
	ready := []Event{{Kind: EvPrepare, Epoch: 5}, {Kind: EvDrained, Epoch: 5, OK: true}}
	lost := append(slices.Clone(ready), Event{Kind: EvLinkDown})
	unasked := []Event{{Kind: EvAbort, Epoch: 5, Unasked: true}}
	goesOn := []Event{{Kind: EvStop}, {Kind: EvResume}}
	loaded := append(slices.Clone(ready), goesOn...)
	seq := func(evs ...any) (all []Event) {
		for _, ev := range evs {
			switch ev := ev.(type) {
			case []Event:
				all = append(all, ev...)
			case Kind:
				all = append(all, Event{Kind: ev, Epoch: 5})
			}
		}
		return all
	}
	for _, c := range []struct {
		name   string
		mutate func(*Config)
		evs    []Event
		resets []uint32
		doubt  bool
	}{
		{"nothing happened", none, nil, nil, false},
		{"loaded", none, loaded, []uint32{5}, false},
		{"loaded by a P that dies then", none, seq(loaded, EvLinkDown, EvQuiet), []uint32{5}, false},
		{"given up before READY", none, seq(EvPrepare, EvLinkDown, goesOn), nil, false},
		{"given up after READY", none, lost, nil, false},
		{"given up, and loaded", none, seq(lost, goesOn), []uint32{5}, false},
		{"given up, loaded while it takes over", none, seq(lost, EvQuiet, goesOn), []uint32{5}, false},
		{"stopped twice, loaded once", none, seq(lost, goesOn, goesOn), []uint32{5}, false},
		{"lost in mid checkpoint", none, seq(ready, EvStop, EvLinkDown, EvQuiet, EvResume), []uint32{0}, false},
		{"stopped by an operator", none, goesOn, nil, false},
		{"given up between STOP and RESUME", none, seq(ready, EvStop, EvAbort, EvResume), []uint32{0}, false},
		{"stopped before P asked", none, seq(ready, EvStop, unasked, EvResume), nil, true},
		{"and then loaded", none, seq(ready, EvStop, unasked, EvResume, loaded), []uint32{5}, false},
		{"loaded, and P has gone on", none, seq(loaded, []Event{{Kind: EvPrepare, Epoch: 6}, {Kind: EvDrained, Epoch: 6}}, goesOn), []uint32{5}, false},
		{"stopped by somebody in mid checkpoint, and then loaded", none, seq(loaded, goesOn), []uint32{5}, true},
		{"and P gave it up", none, seq(loaded, EvAbort, []Event{{Kind: EvPrepare, Epoch: 6}, {Kind: EvDrained, Epoch: 6}}, goesOn), []uint32{5}, true},
		{"the monitor is lost when nothing is due", none, seq(EvQMPDown), nil, false},
		{"the monitor is lost with a checkpoint due", none, seq(ready, EvQMPDown), nil, true},
		{"the monitor is lost between STOP and RESUME", none, seq(ready, EvStop, EvQMPDown), nil, true},
		{"mutation: loaded late", func(c *Config) { c.noLate = true }, seq(lost, goesOn), nil, false},
		{"mutation: doubt", func(c *Config) { c.noDoubt = true }, seq(ready, EvQMPDown), nil, false},
	} {
		if resets, doubt := run(c.mutate, c.evs...); !slices.Equal(resets, c.resets) || doubt != c.doubt {
			t.Errorf("%s: offsets reset for %v, in doubt %t; want %v, %t", c.name, resets, doubt, c.resets, c.doubt)
		}
	}
}

// A daemon that died in mid checkpoint does not know what QEMU has loaded meanwhile.
func TestRecoveredDoubt(t *testing.T) {
	for _, ran := range []bool{false, true} {
		cfg := DefaultConfig()
		cfg.QMP = true
		s := NewSecondary(cfg)
		s.Step(0, Event{Kind: EvRecovered, OK: ran})
		s.Step(0, Event{Kind: EvQMPUp, OK: true})
		if s.Doubt() == ran {
			t.Errorf("the kernel was running: %t, in doubt: %t", ran, s.Doubt())
		}
	}
}
