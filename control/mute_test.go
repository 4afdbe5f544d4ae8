// SPDX-License-Identifier: Apache-2.0

package control

import (
	"testing"
	"time"
)

// TestMuteWatch: an SVM is mute when output waits for it through three checkpoints and
// three times compare.timeout, without a record: however fast checkpoints come.
func TestMuteWatch(t *testing.T) {
	const timeout = time.Second
	for _, x := range []struct {
		name          string
		period        time.Duration
		waited        time.Duration
		records       uint64 // from one commit to the next
		commits, mute int    // of so many, the first that finds it; 0: none
		periodic      bool
	}{
		{"at each timeout", timeout, timeout, 0, 4, 3, false},
		{"checkpoints come fast", timeout / 10, timeout / 10, 0, 40, 30, false},
		{"in periodic mode", timeout / 10, timeout / 20, 0, 400, 0, true},
		{"checkpoints come seldom", time.Minute, timeout, 0, 4, 3, false},
		{"it sends", timeout, timeout, 1, 40, 0, false},
		{"nothing is expected of it", timeout, 0, 0, 40, 0, false},
		{"what waits has just been captured", timeout, time.Millisecond, 0, 40, 0, false},
	} {
		t.Run(x.name, func(t *testing.T) {
			var w muteWatch
			var now int64 = 1e12 // of a host that has run for some time
			records := uint64(7)
			w.commit(now, records, 0, timeout, x.periodic)
			for i := 1; i <= x.commits; i++ {
				now += int64(x.period)
				records += x.records
				if mute := w.commit(now, records, x.waited, timeout, x.periodic); mute != (i == x.mute) {
					t.Fatalf("commit %d: mute is %v", i, mute)
				} else if mute {
					return
				}
			}
		})
	}
}

// What an SVM did not send in periodic mode does not count when that ends.
func TestMuteAfterPeriodicMode(t *testing.T) {
	const timeout = time.Second
	var w muteWatch
	now := int64(1e12)
	for i := range 103 {
		now += int64(timeout)
		if mute := w.commit(now, 7, timeout, timeout, i < 100); mute != (i == 102) {
			t.Fatalf("commit %d, of which 100 are the mode's: mute is %v", i, mute)
		}
	}
}
