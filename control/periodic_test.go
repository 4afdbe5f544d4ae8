// SPDX-License-Identifier: Apache-2.0

package control

import (
	"fmt"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/checkpoint"
	"github.com/lockstep-ft/lockstep/control/journal"
)

// TestPeriodicMode: five divergences begin it, status and journal tell, and what one guest alone sends leaves without asking
// for a checkpoint (R28).
func TestPeriodicMode(t *testing.T) {
	pair := newPair(t)
	p, s := hosts(t, pair)
	cfg := checkpoint.DefaultConfig()
	cfg.PeriodicFirst = int64(300 * time.Millisecond)
	p.opt.timing = &cfg
	p.opt.Checkpoint.PeriodicAbove, p.opt.Checkpoint.Epoch = 15, 10*time.Millisecond
	read := p.keepJournal()
	startReplicating(p, s)
	seq, mark := uint32(1000), p.path.mark()
	p.path.pvm(seq, "same")
	p.path.svm(1, seq, "same")
	p.path.await(t, mark, "send 1000+4")
	seq += 4
	for i := range uint64(5) {
		st := p.replicating()
		if st.Periodic != nil {
			t.Fatalf("after %d divergences: %v", i, st.Periodic)
		}
		p.path.pvm(seq, "primary")
		p.path.svm(st.Epoch, seq, "another")
		p.path.await(t, mark, fmt.Sprintf("send %d+7", seq))
		seq += 7
		p.await("the commit", func(st api.Status) bool {
			return st.CheckpointsDone > i && st.State == "replicating" || st.Periodic != nil
		})
	}
	st := p.await("periodic mode", func(st api.Status) bool { return st.Periodic != nil })
	if st.Periodic.Begun != 1 || st.Periodic.EpochMS != 10 {
		t.Errorf("status: %+v", st.Periodic)
	}
	p.path.pvm(seq, "alone")
	p.path.await(t, mark, fmt.Sprintf("send %d+5", seq))
	st = p.await("its end", func(st api.Status) bool { return !st.Periodic.On })
	if st.CheckpointsRequested != 5 {
		t.Errorf("%d checkpoints were asked for, want 5: %+v", st.CheckpointsRequested, st.Causes)
	}
	p.end()
	count := make(map[string]int)
	for _, e := range read() {
		switch e.Kind {
		case journal.Periodic:
			count[fmt.Sprint(e.Fields["state"])]++
		case journal.Checkpoint:
			count[e.Cause]++
		}
	}
	if count["begins"] != 1 || count["ends"] != 1 || count["payload differs"] != 5 || count[checkpoint.CausePeriodic] != 0 {
		t.Errorf("the journal has %v", count)
	}
}
