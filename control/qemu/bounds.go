// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"fmt"
	"time"

	"github.com/lockstep-ft/lockstep/control/qmp"
)

// A secondary may hang at any step of a try to replicate. Each step of the primary's
// QEMU that waits for it has a bound, so that the guest that serves waits no longer.
const (
	// cutAfter is how long a command may wait for the secondary before its connections
	// are cut: QEMU does nothing else meanwhile.
	cutAfter = 2 * time.Second
	// maxPause is how long the guest may be stopped at the end of a copy.
	maxPause = 5 * time.Second
	// defaultStalled is how long a copy may make no progress.
	defaultStalled = 30 * time.Second
	// cancelTimeout is how long a migration may take to end once its connection is cut.
	cancelTimeout = 5 * time.Second
	// DefaultTimeout is the Timeout of the zero [Limits].
	DefaultTimeout = time.Hour
)

// ErrStuck means that this QEMU's last migration never ended, so that it cannot begin
// another.
var ErrStuck = errors.New("this QEMU's last migration never ended, so it cannot replicate any more; the guest goes on, and needs a new QEMU: " +
	"shut it down and start it again when that suits")

// Limits bound a try to replicate. The zero Limits are QEMU's own bandwidth and the
// default times.
type Limits struct {
	Bandwidth    int64 // bytes per second of memory, and of each disk; 0: QEMU's own limit
	AutoConverge bool  // QEMU throttles a guest that writes to its memory faster than it is copied
	// Timeout is how long copying the memory may take, and how long copying a disk may go
	// on after its first pass: a guest that writes fast enough keeps either from ending.
	Timeout time.Duration
	Stalled time.Duration // how long a copy may make no progress
}

func (l *Limits) fill() {
	if l.Timeout == 0 {
		l.Timeout = DefaultTimeout
	}
	if l.Stalled == 0 {
		l.Stalled = defaultStalled
	}
}

// guarded runs a command that may wait for the secondary, and cuts the connections it
// waits for in time: a monitor that does not answer counts as a dead QEMU.
func guarded(m *qmp.Monitor, disks []Disk, f func() error) error {
	late := time.AfterFunc(cutAfter, func() { _ = cut(m, disks) })
	defer late.Stop()
	return f()
}

// stall distinguishes a copy that makes progress from one that makes none.
type stall struct {
	limit time.Duration
	moved int64     // bytes copied at the last progress
	since time.Time // of the last progress; zero: nothing was reported yet
}

// spent takes how many bytes are copied by now, and reports whether that has not grown
// for longer than the limit.
func (s *stall) spent(now time.Time, moved int64) bool {
	if moved != s.moved || s.since.IsZero() {
		s.moved, s.since = moved, now
	}
	return now.Sub(s.since) > s.limit
}

// meter measures the rate of a copy, over a second at least.
type meter struct {
	since time.Time
	from  int64 // bytes copied then
	rate  int64 // bytes per second
}

// measure takes how many bytes are copied by now, and returns the rate in bytes per
// second; 0: not measured yet.
func (m *meter) measure(now time.Time, moved int64) int64 {
	switch took := now.Sub(m.since); {
	case m.since.IsZero() || moved < m.from:
		m.since, m.from = now, moved
	case took >= time.Second:
		m.rate = int64(float64(moved-m.from) / took.Seconds())
		m.since, m.from = now, moved
	}
	return m.rate
}

func perSecond(rate int64) string { return fmt.Sprintf("%.1f MiB/s", float64(rate)/(1<<20)) }
