// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/lockstep-ft/lockstep/control/qmp"
)

// setLimits sets the migration parameters and capabilities that the limits need.
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

// migrationState is some of what query-migrate returns.
type migrationState struct {
	Status string
	Why    string `json:"error-desc"`
	RAM    struct {
		Transferred, Remaining, Total int64 // bytes
		PageSize                      int64 `json:"page-size"`        // bytes
		DirtyPages                    int64 `json:"dirty-pages-rate"` // per second; 0 until the first pass is over
	}
}

func migration(m *qmp.Monitor) (s migrationState, err error) {
	err = m.Execute("query-migrate", nil, &s)
	return s, err
}

// errMigrationFailed is how QEMU itself ended one.
var errMigrationFailed = errors.New("the migration to the secondary failed")

// memoryCopy follows the copy of the memory, and decides when it has to be given up.
type memoryCopy struct {
	began time.Time
	still stall
	speed meter
}

// look takes the state of the migration. done: it is in COLO. An error means that it
// failed, or has to be given up.
func (c *memoryCopy) look(now time.Time, s migrationState, l Limits) (p Progress, done bool, err error) {
	switch {
	case s.Status == "colo":
		return p, true, nil
	case !slices.Contains(underWay, s.Status):
		if s.Why == "" {
			s.Why = "its state is " + s.Status
		}
		return p, false, fmt.Errorf("%w: %s", errMigrationFailed, s.Why)
	}
	p = Progress{What: "memory", Done: max(0, s.RAM.Total-s.RAM.Remaining), Total: s.RAM.Total,
		Rate: c.speed.measure(now, s.RAM.Transferred), Dirtied: s.RAM.DirtyPages * s.RAM.PageSize}
	switch still := c.still.spent(now, s.RAM.Transferred); {
	case still:
		return p, false, fmt.Errorf("copying the memory to the secondary has made no progress for %v, at %d of %d MiB", l.Stalled, p.Done>>20, p.Total>>20)
	case now.Sub(c.began) > l.Timeout:
		writes := "" // QEMU measures that after the first pass
		if p.Dirtied > 0 {
			writes = " and the guest writes " + perSecond(p.Dirtied)
		}
		return p, false, fmt.Errorf("the memory was not copied within %v: %s are copied%s, with %d of %d MiB left; "+
			"a faster link, a higher migration.bandwidth, migration.auto_converge, less load or a longer migration.timeout ends that",
			l.Timeout, perSecond(p.Rate), writes, (p.Total-p.Done)>>20, p.Total>>20)
	}
	return p, false, nil
}

// finish waits until COLO is on and the guest runs in it. A guest that was running before
// must not be stopped for long.
func finish(ctx context.Context, m *qmp.Monitor, o Options, running bool) error {
	memory, halted := memoryCopy{began: time.Now(), still: stall{limit: o.Stalled}}, stall{limit: maxPause}
	err := until(ctx, "the memory is copied", func() (bool, error) {
		s, err := migration(m)
		if err != nil {
			return false, err
		}
		p, done, err := memory.look(time.Now(), s, o.Limits)
		if done || err != nil {
			return done, err
		}
		o.Progress(p)
		return false, stoppedTooLong(m, running, &halted)
	})
	if err != nil {
		return err
	}
	ctx, done := context.WithTimeoutCause(ctx, stateTimeout, errors.New("COLO began and ended at once: the secondary's log has the reason"))
	defer done()
	return until(ctx, "the guest runs in COLO", func() (bool, error) {
		mode, err := m.COLO()
		if err != nil {
			return false, err
		}
		is, _, err := m.Status()
		if err != nil || is && mode == "primary" {
			return err == nil, err
		}
		return false, stoppedTooLong(m, running, &halted)
	})
}

// stoppedTooLong returns an error when a guest that ran before has been stopped for too
// long, because the secondary does not take the last of its state.
func stoppedTooLong(m *qmp.Monitor, ran bool, halted *stall) error {
	is, _, err := m.Status()
	if err != nil || !ran {
		return err
	}
	if is {
		*halted = stall{limit: halted.limit}
		return nil
	}
	if halted.spent(time.Now(), 0) {
		return fmt.Errorf("the guest has been stopped for %v, because the secondary does not take the last of its state", halted.limit)
	}
	return nil
}

// underWay are the states of a migration that has neither ended nor entered COLO.
var underWay = []string{"setup", "active", "device"}

// endMigration ends an earlier migration, also one in COLO, and returns when QEMU can
// begin another. That is later than query-migrate reports the end: until the migration's
// connection is no yank instance any more QEMU refuses another migration ("duplicate
// yank instance").
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
	ctx, cancel := context.WithTimeoutCause(ctx, cancelTimeout, ErrStuck)
	defer cancel()
	return until(ctx, "the last migration has ended", func() (bool, error) {
		links, err := m.Links()
		return !slices.ContainsFunc(links, isMigration), err
	})
}

func isMigration(l qmp.Link) bool { return l.Type == "migration" }
