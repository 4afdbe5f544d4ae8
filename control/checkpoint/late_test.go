// SPDX-License-Identifier: Apache-2.0

package checkpoint

import (
	"slices"
	"testing"
)

// QEMU carries a checkpoint out that both daemons have given up: the control link broke after
// READY, and the connection between the two QEMUs was slow. The SVM is a copy of the PVM from
// then on, so its offsets are void, also for a takeover that follows. An SVM that was stopped
// when no checkpoint was due is what it was.
func TestLateCheckpoint(t *testing.T) {
	run := func(mutate func(*Config), evs ...Event) (resets []uint32) {
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
		return resets
	}
	none := func(*Config) {}
	ready := []Event{{Kind: EvPrepare, Epoch: 5}, {Kind: EvDrained, Epoch: 5, OK: true}, {Kind: EvLinkDown}}
	late := append(slices.Clone(ready), Event{Kind: EvStop}, Event{Kind: EvResume})
	for _, c := range []struct {
		name   string
		mutate func(*Config)
		evs    []Event
		want   []uint32
	}{
		{"loaded late", none, late, []uint32{5}},
		{"loaded while it takes over", none, append(slices.Clone(ready), Event{Kind: EvQuiet}, Event{Kind: EvStop}, Event{Kind: EvResume}), []uint32{5}},
		{"stopped before it takes over, loaded after", none, append(slices.Clone(ready), Event{Kind: EvStop}, Event{Kind: EvQuiet}, Event{Kind: EvResume}), []uint32{5}},
		{"stopped twice, loaded once", none, append(slices.Clone(late), Event{Kind: EvStop}, Event{Kind: EvResume}), []uint32{5}},
		{"stopped by an operator", none, []Event{{Kind: EvStop}, {Kind: EvResume}}, nil},
		{"given up before READY", none, []Event{{Kind: EvPrepare, Epoch: 5}, {Kind: EvLinkDown}, {Kind: EvStop}, {Kind: EvResume}}, nil},
		{"mutation", func(c *Config) { c.noLate = true }, late, nil},
	} {
		if got := run(c.mutate, c.evs...); !slices.Equal(got, c.want) {
			t.Errorf("%s: offsets reset for %v, want %v", c.name, got, c.want)
		}
	}
}
