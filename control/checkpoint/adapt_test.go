// SPDX-License-Identifier: Apache-2.0

package checkpoint

import (
	"fmt"
	"testing"
	"time"
)

// TestTargetPause: whatever a guest writes, the pause comes down to the target, or as near to it as checkpoints can that
// take about a tenth of the time even when the guest has written nothing.
func TestTargetPause(t *testing.T) {
	const target = 20 * time.Millisecond
	for _, period := range []time.Duration{time.Second, 20 * time.Second} {
		for _, fixed := range []time.Duration{0, time.Millisecond, 10 * time.Millisecond, 40 * time.Millisecond} {
			for _, written := range []float64{0, 0.01, 0.1, 0.4, 0.8} { // pause for each second of writing, in seconds
				t.Run(fmt.Sprintf("period %v, %v and %v", period, fixed, written), func(t *testing.T) {
					cfg := DefaultConfig()
					cfg.Period, cfg.MinInterval, cfg.TargetPause = int64(period), int64(20*time.Millisecond), int64(target)
					c := NewPrimary(cfg)
					pauseAfter := func(since time.Duration) time.Duration { return fixed + time.Duration(written*float64(since)) }
					c.now = int64(5 * time.Hour) // since the boot: nobody knows for how long the guest has written
					for i := range 100 {
						since := time.Duration(c.period)
						if c.lastDone != 0 {
							c.now = c.lastDone + int64(since)
						}
						pause := pauseAfter(since)
						if i == 30 {
							pause += 400 * time.Millisecond // the host had other work
						}
						c.adapt(int64(pause))
						c.lastDone = c.now
					}
					last := time.Duration(c.period)
					nearest := max(target, pauseAfter(11*fixed), pauseAfter(20*time.Millisecond))
					if got := pauseAfter(last); got > nearest+nearest/10 {
						t.Errorf("the pause is %v with a period of %v; %v can be reached", got, last, nearest)
					}
					if last < period && 6*fixed > last {
						t.Errorf("with a period of %v a checkpoint takes %v of it for nothing", last, fixed)
					}
				})
			}
		}
	}
}
