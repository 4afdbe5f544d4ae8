// SPDX-License-Identifier: Apache-2.0

package checkpoint

import (
	"slices"
	"testing"
)

// QEMU carries a checkpoint out that both daemons have given up: the control link broke after
// READY, and the connection between the two QEMUs was slow. The SVM is a copy of the PVM from
// then on, or somebody had stopped it, and it is what it was: QEMU's events are the same. Neither may
// be taken for sure, by the next session or by a takeover.
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
		{"loaded while it takes over from a P that said so", none, seq(ready, EvStop, EvQuiet, EvResume), []uint32{5}, false},
		{"given up after READY", none, lost, nil, true},
		{"given up, and loaded", none, seq(lost, goesOn), nil, true},
		{"given up, loaded while it takes over", none, seq(lost, EvQuiet, goesOn), nil, true},
		{"given up in mid checkpoint", none, seq(ready, EvStop, EvAbort, EvResume), nil, true},
		{"lost in mid checkpoint", none, seq(ready, EvStop, EvLinkDown, EvQuiet, EvResume), nil, true},
		{"stopped by an operator", none, goesOn, nil, true},
		{"powered off, and goes on", none, []Event{{Kind: EvOff}, {Kind: EvResume}}, nil, true},
		{"given up before READY", none, seq(EvPrepare, EvLinkDown), nil, false},
		{"after doubt a checkpoint", none, seq(goesOn, loaded), []uint32{5}, false},
		{"mutation", func(c *Config) { c.noDoubt = true }, seq(lost, goesOn), nil, false},
	} {
		if resets, doubt := run(c.mutate, c.evs...); !slices.Equal(resets, c.resets) || doubt != c.doubt {
			t.Errorf("%s: offsets reset for %v, in doubt %t; want %v, %t", c.name, resets, doubt, c.resets, c.doubt)
		}
	}
}

// A daemon that starts again does not know what QEMU has loaded meanwhile.
func TestRecoveredDoubt(t *testing.T) {
	for _, ran := range []bool{false, true} {
		cfg := DefaultConfig()
		cfg.QMP = true
		s := NewSecondary(cfg)
		s.Step(0, Event{Kind: EvRecovered, OK: ran})
		s.Step(0, Event{Kind: EvQMPUp, OK: true})
		if !s.Doubt() {
			t.Errorf("kernel was running %t: no doubt", ran)
		}
	}
}
