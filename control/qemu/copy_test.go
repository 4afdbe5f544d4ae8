// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"strings"
	"testing"
	"time"
)

// TestCopyLimit: the time limit of a disk's copy is for what the guest writes after
// the first pass. It does not run during that pass, which takes as long as the disk
// is large, nor before QEMU knows how much there is to copy.
func TestCopyLimit(t *testing.T) {
	d, l := &Disk{ID: "vda"}, Limits{Timeout: time.Nanosecond}
	c := diskCopy{still: stall{limit: time.Hour}}
	now := time.Unix(1, 0)
	for _, x := range []struct {
		name string
		job  job
		err  string
	}{
		{"not begun", job{}, ""},
		{"the first pass", job{Current: 1, Total: 64}, ""},
		{"the first pass, and the guest writes", job{Current: 63, Total: 80}, ""},
		{"after it", job{Current: 64, Total: 80}, "the guest has written"},
		{"the rest is copied", job{Current: 81, Total: 81, Status: "ready"}, ""},
	} {
		// The limit has passed by the second look.
		var err error
		for range 2 {
			_, err = c.look(now, d, &x.job, l)
			now = now.Add(time.Microsecond)
		}
		check(t, x.name, err, x.err)
	}
}

// check compares an error with a part of its text; "": there is to be none.
func check(t *testing.T, name string, err error, want string) {
	t.Helper()
	if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
		t.Errorf("%s: got %v, want %q", name, err, want)
	}
}

// TestMemoryCopy: the copy of the memory is given up when it makes no progress, when its
// time is over and when QEMU reports a failure, each with what an operator needs to know.
func TestMemoryCopy(t *testing.T) {
	l := Limits{Timeout: time.Minute, Stalled: 10 * time.Second}
	active := func(transferred int64) (s migrationState) {
		s.Status = "active"
		s.RAM.Transferred, s.RAM.Remaining, s.RAM.Total = transferred, 24<<20, 128<<20
		s.RAM.PageSize, s.RAM.DirtyPages = 4096, 64<<8
		return s
	}
	first := active(122 << 20)
	first.RAM.DirtyPages = 0
	began := time.Unix(1, 0)
	for _, x := range []struct {
		name string
		at   time.Duration // of the second look; the first is at 0, with nothing copied
		last migrationState
		err  string
	}{
		{"it goes on", 9 * time.Second, active(1 << 20), ""},
		{"it makes no progress", 11 * time.Second, active(0), "has made no progress for 10s, at 104 of 128 MiB"},
		{"it made none and goes on", 11 * time.Second, active(1), ""},
		{"its time is over", 61 * time.Second, active(122 << 20),
			"not copied within 1m0s: 2.0 MiB/s are copied and the guest writes 64.0 MiB/s, with 24 of 128 MiB left; a faster link, a higher migration.bandwidth, migration.auto_converge"},
		{"the first pass takes too long", 61 * time.Second, first,
			"not copied within 1m0s: 2.0 MiB/s are copied, with 24 of 128 MiB left"},
		{"it failed", time.Second, migrationState{Status: "failed", Why: "broken pipe"}, "migration to the secondary failed: broken pipe"},
		{"it was cancelled", time.Second, migrationState{Status: "cancelled"}, "its state is cancelled"},
		{"it is done", time.Second, migrationState{Status: "colo"}, ""},
	} {
		c := memoryCopy{began: began, still: stall{limit: l.Stalled}}
		_, _, err := c.look(began, active(0), l)
		check(t, x.name, err, "")
		p, done, err := c.look(began.Add(x.at), x.last, l)
		check(t, x.name, err, x.err)
		if done != (x.last.Status == "colo") {
			t.Errorf("%s: done is %v", x.name, done)
		}
		if err == nil && !done && (p.Done != 104<<20 || p.Total != 128<<20 || p.Dirtied != 64<<20) {
			t.Errorf("%s: progress %+v", x.name, p)
		}
	}
}

func TestMeter(t *testing.T) {
	var m meter
	at := time.Unix(1, 0)
	for _, x := range []struct {
		after time.Duration
		moved int64
		rate  int64
	}{
		{0, 100, 0},                         // nothing to measure from
		{500 * time.Millisecond, 200, 0},    // too short
		{500 * time.Millisecond, 300, 200},  // over a second
		{500 * time.Millisecond, 900, 200},  // too short again: the rate before
		{1500 * time.Millisecond, 900, 300}, // over two
		{2 * time.Second, 0, 300},           // a new copy begins
		{2 * time.Second, 10, 5},
	} {
		at = at.Add(x.after)
		if got := m.measure(at, x.moved); got != x.rate {
			t.Errorf("%v later, at %d: %d, want %d", x.after, x.moved, got, x.rate)
		}
	}
}
