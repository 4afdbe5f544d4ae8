// SPDX-License-Identifier: Apache-2.0

package control

import (
	"testing"
	"time"
)

// pointsLost plays random orders of what happens to a pair of disks, and reports whether S came to
// note a point though something from before it was not yet durable there.
func pointsLost(early bool) (noted int, lost bool) {
	p := points{kept: neverKept, early: early}
	made := make(map[string]int64)
	names := 0
	for k := int64(0); k < 2000; k++ {
		began := k * int64(time.Second) * (1 + k%3) / 2
		stopped := began + int64(5*time.Millisecond)      // where both QEMUs flush
		committed := stopped + int64(10*time.Millisecond) // of this checkpoint
		add, give := p.committed(committed, began)
		if give != "" {
			// The flush that counts is one behind the point; whether it failed is known 1 s later.
			lost = lost || committed < made[give]+int64(time.Second)
			if k%5 == 0 {
				p.lost() // the session broke, and it is given again
			} else if p.noted(committed, give) {
				noted++
			}
		}
		if add {
			names++
			name := string(rune('a' + names%26))
			// QEMU answers at once, or while the next checkpoint is under way.
			at := committed
			if k%2 == 0 {
				at += int64(time.Millisecond)
			}
			made[name] = at
			p.made(at, name)
		}
	}
	return noted, lost
}

// TestPoints: a point counts only when a checkpoint that began behind it was committed, and
// no failed flush was reported up to another commit (R29).
func TestPoints(t *testing.T) {
	if noted, lost := pointsLost(false); lost || noted < 20 {
		t.Errorf("%d points noted; one too early: %v", noted, lost)
	}
	p := points{kept: neverKept}
	if add, give := p.committed(0, -1); !add || give != "" {
		t.Fatal("no point is wanted")
	}
	p.made(10, "p")
	second := int64(time.Second)
	for _, x := range []struct {
		committed, began int64
		give             string
	}{
		{20, 5, ""},                     // began before the point
		{second, second - 10, ""},       // flushes
		{2 * second, 2*second - 10, ""}, // a failure may not be reported yet
		{4 * second, 4*second - 10, "p"},
		{9 * second, 9*second - 10, ""}, // S notes it
	} {
		if _, give := p.committed(x.committed, x.began); give != x.give {
			t.Errorf("at %v: %q, want %q", time.Duration(x.committed), give, x.give)
		}
	}
	if p.noted(9*second, "q") || !p.noted(9*second, "p") {
		t.Error("another point is taken for the one that was given")
	}
	if add, _ := p.committed(12*second, 11*second); add {
		t.Error("a new point is wanted at once")
	}
	if add, _ := p.committed(20*second, 19*second); !add {
		t.Error("no new point is wanted")
	}
}

// TestMutationPoints: a point that counts before anything is flushed is noticed.
func TestMutationPoints(t *testing.T) {
	if _, lost := pointsLost(true); !lost {
		t.Error("nobody noticed")
	}
}
