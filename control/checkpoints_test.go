// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/checkpoint"
	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/nicloop"
	"github.com/lockstep-ft/lockstep/control/qmptest"
)

// A divergence makes a checkpoint: what was held leaves, in order, what was
// captured behind the commit point does not.
func TestCheckpoint(t *testing.T) {
	pair := newPair(t)
	p, s := hosts(t, pair)
	startReplicating(p, s)
	p.path.pvm(1000, "same")
	p.path.svm(1, 1000, "same")
	p.path.await(t, 0, "send 1000+4")

	// The guests go on talking while their checkpoint runs.
	hold := make(chan struct{})
	held := make(chan qmptest.Stage)
	pair.SetHook(func(stage qmptest.Stage) bool {
		held <- stage
		<-hold
		return true
	})
	draining, drained := make(chan struct{}), make(chan struct{})
	s.path.mu.Lock()
	s.path.drain = func(context.Context) error {
		close(draining)
		<-drained
		return nil
	}
	s.path.mu.Unlock()
	pm, sm := p.path.mark(), s.path.mark()
	p.path.pvm(1004, "primary")
	p.path.svm(1, 1004, "another")
	at := func(want qmptest.Stage, then func()) {
		t.Helper()
		if got := <-held; got != want {
			t.Fatalf("stage %v, want %v", got, want)
		}
		then()
		hold <- struct{}{}
	}
	<-draining
	s.path.await(t, sm, "mode park")
	s.path.put(compare.Event{Kind: compare.EvPark, Seg: compare.Segment{Slot: 501}})
	s.path.put(compare.Event{Kind: compare.EvPark, Seg: compare.Segment{Slot: 502}})
	p.path.pvm(1011, "more")
	p.await("a held frame", func(st api.Status) bool { return st.HeldPackets == 2 && st.State == "checkpointing" })
	close(drained)
	at(qmptest.SecondaryStop, func() {})
	at(qmptest.PrimaryStop, func() { s.path.await(t, sm, "epoch 2") })
	at(qmptest.SecondaryResume, func() { p.path.await(t, pm, "epoch 2") })
	at(qmptest.PrimaryResume, func() {
		s.path.await(t, sm, "mode park", "epoch 2", "reset", "mode run", "deliver 501", "deliver 502")
		// The SVM, a copy of the PVM now, is ahead (R17).
		p.path.svm(2, 1015, "later")
		if got := sent(p.path, pm); got != nil {
			t.Errorf("before the commit: %q", got)
		}
	})
	p.path.await(t, pm, "send 1004+7", "send 1011+4")
	p.path.pvm(1015, "later")
	p.path.await(t, pm, "send 1004+7", "send 1011+4", "send 1015+5")
	st := p.replicating()
	if st.Epoch != 2 || st.CheckpointsDone != 1 || st.CheckpointsRequested != 1 {
		t.Errorf("status %+v", st)
	}
	if c := st.Checkpoints; len(c) != 1 || c[0].Result != "committed" || c[0].Cause != "payload differs" || c[0].Epoch != 2 ||
		c[0].PVMPauseMS <= 0 || c[0].SVMPauseMS <= 0 || c[0].FrozenMS < c[0].PVMPauseMS {
		t.Errorf("checkpoints %+v", c)
	}
	if ph := st.CheckpointPhases; ph["frozen"].Count != 1 || ph["prepare"].Count != 1 || ph["request"].Count != 1 || ph["confirm"].Count != 1 ||
		ph["pause"].Seconds <= 0 || ph["frozen"].Seconds < ph["pause"].Seconds+ph["prepare"].Seconds {
		t.Errorf("the phases are %+v", ph)
	}
	if want := []api.CheckpointCount{{Cause: "payload differs", Result: "committed", Count: 1}}; !slices.Equal(st.CheckpointCounts, want) {
		t.Errorf("by cause and result: %+v, want %+v", st.CheckpointCounts, want)
	}
	if st.HoldTimes == nil || st.HoldTimes.Count != 4 {
		t.Errorf("hold times %+v, of 4 frames", st.HoldTimes)
	}
	if st.LeaseMS == nil || *st.LeaseMS <= 0 || *st.LeaseMS > milliseconds(int64(config.DefaultHeartbeatLease)) {
		t.Errorf("%v ms are left of the output lease", st.LeaseMS)
	}
	st = s.replicating()
	if st.LeaseMS != nil || st.HoldTimes != nil {
		t.Errorf("S has a lease: %v, or hold times: %v", st.LeaseMS, st.HoldTimes)
	}
	if st.Epoch != 2 || st.CheckpointsDone != 1 {
		t.Errorf("S: %+v", st)
	}
	if ph := st.CheckpointPhases; ph["drain"].Count != 1 || ph["pause"].Count != 1 || ph["tables"].Seconds <= 0 {
		t.Errorf("S: the phases are %+v", ph)
	}
	if trace := s.path.since(sm); slices.Contains(trace, "mode shut") || slices.Index(trace, "reset") > slices.Index(trace, "mode run") {
		t.Errorf("S: %q", trace)
	}
}

// pause lets the clock move by more than its noise.
func pause(t *testing.T) {
	t.Helper()
	timer := time.NewTimer(250 * time.Microsecond)
	<-timer.C
}

// R15: an operator's stop releases nothing, also not what both guests said.
func TestUnaskedStop(t *testing.T) {
	pair := newPair(t)
	p, s := hosts(t, pair)
	startReplicating(p, s)
	mark := p.path.mark()
	pair.Primary.Stop()
	p.await("a freeze", func(st api.Status) bool { return st.State == "checkpointing" && st.QMP.State == "paused" })
	p.path.pvm(1000, "same")
	p.path.svm(1, 1000, "same")
	p.await("the frame", func(st api.Status) bool { return st.HeldPackets == 1 })
	if n := pair.Checkpoints(); n != 0 {
		t.Errorf("%d checkpoints of a stopped guest", n)
	}
	if got := sent(p.path, mark); got != nil {
		t.Errorf("left: %q", got)
	}
	pair.Primary.Resume()
	st := p.await("our own checkpoint", func(st api.Status) bool { return st.CheckpointsDone == 1 && st.State == "replicating" })
	p.path.await(t, mark, "send 1000+4")
	if st.Checkpoints[0].Cause != "the PVM stopped unasked" || st.CheckpointsRequested != 1 {
		t.Errorf("status %+v", st)
	}

	// The same on S: it parks, and P freezes.
	sm := s.path.mark()
	pair.Secondary.Stop()
	s.path.await(t, sm, "mode park")
	s.await("void", func(st api.Status) bool { return st.State == "checkpointing" })
	pair.Secondary.Resume()
	p.await("a checkpoint", func(st api.Status) bool { return st.CheckpointsDone == 2 && st.State == "replicating" })
	s.path.await(t, sm, "mode park", "mode run")
}

// A checkpoint that S cannot prepare, or that QEMU does not make, releases nothing
// and is made later.
func TestFailedAttempts(t *testing.T) {
	pair := newPair(t)
	p, s := hosts(t, pair)
	startReplicating(p, s)
	s.path.mu.Lock()
	s.path.drain = func(context.Context) error { return errors.New("3 frames in the tap") }
	s.path.mu.Unlock()
	sm, pm := s.path.mark(), p.path.mark()
	p.path.pvm(1000, "held")
	p.d.checkpoints.want(nicloop.Request{NIC: -1, Reason: "test"})
	p.await("a failed attempt", func(st api.Status) bool {
		return slices.ContainsFunc(st.Checkpoints, func(c api.Checkpoint) bool { return strings.Contains(c.Result, "3 frames in the tap") })
	})
	s.path.await(t, sm, "mode park", "mode run")

	pair.Primary.SetFault(qmptest.Refuse, 0)
	s.path.mu.Lock()
	s.path.drain = nil
	s.path.mu.Unlock()
	p.await("a refused request", func(st api.Status) bool {
		return slices.ContainsFunc(st.Checkpoints, func(c api.Checkpoint) bool { return strings.Contains(c.Result, "refused by the test") })
	})
	if got := sent(p.path, pm); got != nil {
		t.Errorf("left: %q", got)
	}
	states := func() (n int) {
		for _, r := range pair.Secondary.Requests() {
			if r.Execute == "query-status" {
				n++
			}
		}
		return n
	}
	asked := states()
	pair.Primary.SetFault(qmptest.None, 0)
	st := p.await("a commit", func(st api.Status) bool { return st.CheckpointsDone == 1 })
	if states() == asked {
		t.Error("S was ready for a checkpoint without knowing whether QEMU has made the one before")
	}
	// "test" is no cause that is explained.
	if c := st.CheckpointCounts; len(c) != 2 || c[0].Cause != "other" || c[0].Result != "failed" || c[0].Count < 2 || c[1] != (api.CheckpointCount{Cause: "other", Result: "committed", Count: 1}) {
		t.Errorf("by cause and result: %+v", c)
	}
	p.path.await(t, pm, "send 1000+4")
}

// COLO mode is over on one side: both guests stop and go on, nothing is committed.
func TestNotInCOLO(t *testing.T) {
	for _, who := range []string{"primary", "secondary"} {
		t.Run(who, func(t *testing.T) {
			pair := newPair(t)
			p, s := hosts(t, pair)
			startReplicating(p, s)
			qemu := map[string]*qmptest.Server{"primary": pair.Primary, "secondary": pair.Secondary}[who]
			qemu.SetCOLO("none")
			mark := p.path.mark()
			p.path.pvm(1000, "held")
			p.d.checkpoints.want(nicloop.Request{NIC: -1, Reason: "test"})
			p.await("a failed attempt", func(st api.Status) bool {
				return slices.ContainsFunc(st.Checkpoints, func(c api.Checkpoint) bool { return strings.Contains(c.Result, `COLO mode is "none"`) })
			})
			if st := p.await("doubt", func(st api.Status) bool { return st.State == "checkpointing" }); st.CheckpointsDone != 0 {
				t.Errorf("committed: %+v", st)
			}
			if got := sent(p.path, mark); got != nil {
				t.Errorf("left: %q", got)
			}
		})
	}
}

// QMP fails in every way there is: the daemon says so, releases nothing meanwhile,
// and gets well by a checkpoint.
func TestQMPFaults(t *testing.T) {
	for name, fault := range map[string]qmptest.Fault{
		"silent": qmptest.Silent, "garbage": qmptest.Garbage, "huge": qmptest.Huge, "hang up": qmptest.HangUp,
	} {
		for _, who := range []string{"primary", "secondary"} {
			t.Run(name+" "+who, func(t *testing.T) {
				t.Parallel()
				pair := newPair(t)
				p, s := hosts(t, pair)
				p.opt.qmpTimeout, s.opt.qmpTimeout = 500*time.Millisecond, 500*time.Millisecond
				p.opt.qmpPoll, s.opt.qmpPoll = 10*time.Millisecond, 10*time.Millisecond
				startReplicating(p, s)
				sick, qemu := p, pair.Primary
				if who == "secondary" {
					sick, qemu = s, pair.Secondary
				}
				mark := p.path.mark()
				qemu.SetFault(fault, 0)
				st := sick.await("a lost monitor", func(st api.Status) bool { return !st.QMP.Connected && st.QMP.Error != "" })
				if !st.QMP.Configured {
					t.Errorf("status %+v", st)
				}
				p.await("a freeze", func(st api.Status) bool { return st.State == "checkpointing" })
				p.path.pvm(1000, "same")
				p.path.svm(1, 1000, "same")
				p.await("the frame", func(st api.Status) bool { return st.HeldPackets == 1 })
				if got := sent(p.path, mark); got != nil {
					t.Errorf("left: %q", got)
				}
				qemu.SetFault(qmptest.None, 0)
				p.await("health", func(st api.Status) bool { return st.State == "replicating" && st.CheckpointsDone > 0 })
				s.await("health", func(st api.Status) bool { return st.State == "replicating" && st.QMP.Connected })
				p.path.await(t, mark, "send 1000+4")
			})
		}
	}
}

// A QEMU dies half way through a checkpoint: frozen, whatever the other side does,
// until one has been seen through.
func TestHalfACheckpoint(t *testing.T) {
	for stage := qmptest.PrimaryStop; stage <= qmptest.PrimaryResume; stage++ {
		t.Run(stage.String(), func(t *testing.T) {
			pair := newPair(t)
			p, s := hosts(t, pair)
			cfg := checkpoint.DefaultConfig()
			cfg.Stop, cfg.Resume = int64(200*time.Millisecond), int64(200*time.Millisecond)
			p.opt.timing = &cfg
			startReplicating(p, s)
			pair.SetHook(func(s qmptest.Stage) bool { return s != stage })
			mark := p.path.mark()
			p.path.pvm(1000, "held")
			p.d.checkpoints.want(nicloop.Request{NIC: -1, Reason: "test"})
			p.await("a failed attempt", func(st api.Status) bool {
				return len(st.Checkpoints) > 0 && strings.Contains(st.Checkpoints[0].Result, "in time") && st.State == "checkpointing"
			})
			if got := sent(p.path, mark); got != nil {
				t.Errorf("left: %q", got)
			}
			// It is got going again, by hand.
			pair.SetHook(nil)
			pair.Secondary.Resume()
			pair.Primary.Resume()
			p.await("a commit", func(st api.Status) bool { return st.CheckpointsDone == 1 && st.State == "replicating" })
			p.path.await(t, mark, "send 1000+4")
		})
	}
}
