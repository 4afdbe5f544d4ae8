// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"lockstep/control/qmp"
)

// A secondary may stand still at any step of a try to replicate. What waits for it in
// the primary's QEMU has a bound of its own, so that the guest that serves never waits
// longer.
const (
	// hang is how long a command may wait for the secondary before its connections
	// are cut: QEMU does nothing else meanwhile.
	hang = 2 * time.Second
	// pause is how long the guest may stand still for a try, at the end of a copy.
	pause = 5 * time.Second
	// stalled is how long a copy may make no progress.
	stalled = 30 * time.Second
	// ends is how long a migration may take to end once its connection is cut.
	ends = 5 * time.Second
	// DefaultTimeout is [Limits]'s.
	DefaultTimeout = time.Hour
)

// ErrStuck means that this QEMU's last migration never ended: it cannot begin another.
var ErrStuck = errors.New("this QEMU's last migration never ended, so it cannot replicate any more; the guest goes on, and needs a new QEMU: " +
	"shut it down and start it again when that suits")

// Limits of a try to replicate. The zero Limits are QEMU's bandwidth and the default
// times.
type Limits struct {
	Bandwidth    int64 // bytes per second of memory, and of each disk; 0: QEMU's own limit
	AutoConverge bool  // QEMU may slow the guest down that writes faster than is copied
	// Timeout is how long a copy may take that never ends because the guest writes too
	// fast: of the memory, or of a disk behind its first pass.
	Timeout time.Duration
	Stalled time.Duration // without progress
}

func (l *Limits) fill() {
	if l.Timeout == 0 {
		l.Timeout = DefaultTimeout
	}
	if l.Stalled == 0 {
		l.Stalled = stalled
	}
}

// guarded runs a command that may wait for the secondary. It has to come to an end
// before this QEMU counts as dead.
func guarded(m *qmp.Monitor, disks []Disk, f func() error) error {
	late := time.AfterFunc(hang, func() { _ = cut(m, disks) })
	defer late.Stop()
	return f()
}

// stall tells a copy that goes on from one that stands still.
type stall struct {
	limit time.Duration
	moved int64
	at    time.Time
}

// spent takes what was copied so far, and is true when that has not grown for too
// long.
func (p *stall) spent(moved int64) bool {
	if now := time.Now(); moved != p.moved || p.at.IsZero() {
		p.moved, p.at = moved, now
	}
	return time.Since(p.at) > p.limit
}

// meter measures a copy's rate over at least a second.
type meter struct {
	at   time.Time
	from int64
	rate int64
}

func (r *meter) measure(moved int64) int64 {
	now := time.Now()
	switch took := now.Sub(r.at); {
	case r.at.IsZero() || moved < r.from:
		r.at, r.from = now, moved
	case took >= time.Second:
		r.rate = int64(float64(moved-r.from) / took.Seconds())
		r.at, r.from = now, moved
	}
	return r.rate
}

// setLimits has the next migration keep to them.
func setLimits(m *qmp.Monitor, l Limits) error {
	if l.Bandwidth > 0 {
		if err := m.Execute("migrate-set-parameters", map[string]any{"max-bandwidth": l.Bandwidth}, nil); err != nil {
			return err
		}
	}
	is, there, err := capability(m, "auto-converge")
	switch {
	case err != nil:
		return err
	case !there && l.AutoConverge:
		return fmt.Errorf("QEMU %s has no auto-converge", m.Version())
	case is == l.AutoConverge:
		return nil
	}
	return setCapabilities(m, l.AutoConverge, "auto-converge")
}

func setCapabilities(m *qmp.Monitor, on bool, names ...string) error {
	var list []map[string]any
	for _, n := range names {
		list = append(list, map[string]any{"capability": n, "state": on})
	}
	return m.Execute("migrate-set-capabilities", map[string]any{"capabilities": list}, nil)
}

// underWay are the states of a migration that has not ended and is not in COLO.
var underWay = []string{"setup", "active", "device"}

// endMigration ends what there is of an earlier migration, COLO too, and returns when
// QEMU can begin another. That is not when query-migrate says so, but when the
// migration's connection is none that could be cut any more: until then QEMU refuses
// another one ("duplicate yank instance").
func endMigration(ctx context.Context, m *qmp.Monitor, disks []Disk) error {
	if err := cut(m, disks); err != nil {
		return err
	}
	s, err := migration(m)
	if err != nil {
		return err
	}
	if slices.Contains(underWay, s.Status) {
		_ = m.Execute("migrate_cancel", nil, nil) // it may have ended meanwhile
	}
	if mode, err := m.COLO(); err != nil {
		return err
	} else if mode == "primary" {
		if err := lostHeartbeat(ctx, m, mode); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, ends, ErrStuck)
	defer cancel()
	return until(ctx, "the last migration has ended", func() (bool, error) {
		links, err := m.Links()
		return !slices.ContainsFunc(links, isMigration), err
	})
}

func isMigration(l qmp.Link) bool { return l.Type == "migration" }
