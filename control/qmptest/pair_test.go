// SPDX-License-Identifier: Apache-2.0

package qmptest_test

import (
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/qmp"
	"github.com/lockstep-ft/lockstep/control/qmptest"
)

// A request makes both sides stop and go on in COLO's order, with times that
// agree with it; requests before the state is taken coalesce.
func TestPairCheckpoint(t *testing.T) {
	pair, err := qmptest.NewPair(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer pair.Close()
	var monitors [2]*qmp.Monitor
	for i, s := range []*qmptest.Server{pair.Primary, pair.Secondary} {
		if monitors[i], err = qmp.Dial(t.Context(), s.Path(), 30*time.Second); err != nil {
			t.Fatal(err)
		}
		defer monitors[i].Disconnect()
	}
	hold, held := make(chan struct{}), make(chan struct{}, 8)
	var order []qmptest.Stage
	pair.SetHook(func(s qmptest.Stage) bool {
		order = append(order, s)
		if s == qmptest.PrimaryStop || s == qmptest.SecondaryStop {
			held <- struct{}{}
			<-hold
		}
		return true
	})
	checkpoint := func() {
		if err := monitors[0].Checkpoint(); err != nil {
			t.Fatal(err)
		}
	}
	checkpoint()
	<-held
	checkpoint() // coalesces
	hold <- struct{}{}
	<-held
	checkpoint() // the state is taken: one more
	close(hold)

	var times []time.Time
	p, _ := monitors[0].Events(t.Context())
	s, _ := monitors[1].Events(t.Context())
	for range 2 {
		for _, want := range []struct {
			events <-chan qmp.Event
			name   string
		}{{s, "STOP"}, {p, "STOP"}, {s, "RESUME"}, {p, "RESUME"}} {
			e := <-want.events
			if e.Event != want.name {
				t.Fatalf("got %s, want %s", e.Event, want.name)
			}
			times = append(times, qmp.Time(e))
		}
	}
	for i := range times[1:] {
		if times[i+1].Before(times[i]) {
			t.Errorf("event %d at %v, behind %v", i+1, times[i+1], times[i])
		}
	}
	if n := pair.Checkpoints(); n != 2 {
		t.Errorf("%d checkpoints, want 2", n)
	}
	for i, stage := range order {
		if want := qmptest.Stage(i % 4); stage != want {
			t.Errorf("stage %d: %v, want %v", i, stage, want)
		}
	}
}
