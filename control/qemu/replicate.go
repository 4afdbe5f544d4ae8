// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"lockstep/control/qmp"
)

// Options of Replicate.
type Options struct {
	// Resync copies the disks to the secondary first. Without it the images of
	// both hosts have to be the same already.
	Resync bool
	// Progress is told how far things are, in between; nil: nobody is.
	Progress func(Progress)
	Limits

	ownPeriod bool // a mutation, only tests set it: QEMU\'s own period stays
}

// Progress is how much is done of copying one disk, or the memory, or of comparing a
// disk's images.
type Progress struct {
	What        string // "memory" or the disk's ID
	Compare     bool   // both hosts' images are compared, and nothing is copied
	Done, Total int64  // bytes; Total may grow
	Rate        int64  // bytes per second; 0: not measured yet
	Dirtied     int64  // of memory: bytes per second that the guest writes meanwhile; 0: not measured yet
}

func (p Progress) String() string {
	what := p.What
	if p.Compare {
		what = "comparing the images of " + what
	}
	s := fmt.Sprintf("%s: %d of %d MiB", what, p.Done>>20, p.Total>>20)
	if p.Rate > 0 {
		s += ", " + perSecond(p.Rate)
	}
	if p.Dirtied > 0 {
		s += ", and the guest writes " + perSecond(p.Dirtied)
	}
	return s
}

// PrepareSecondary makes a secondary that waits for its primary ready for it:
// behind it the primary may call [Replicate]. nbd is where it serves its disks'
// images.
func PrepareSecondary(ctx context.Context, m *qmp.Monitor, caps Caps, disks []Disk, nbd netip.AddrPort) error {
	if err := checkCaps(caps, disks); err != nil {
		return err
	}
	if mode, err := m.COLO(); err != nil || mode == "secondary" {
		return err
	}
	// From 8.1 on the secondary has to know; 7.2 does not mind.
	if err := setCOLO(m, true); err != nil {
		return err
	}
	if len(disks) == 0 {
		return nil
	}
	var exports []struct{ ID string }
	if err := m.Execute("query-block-exports", nil, &exports); err != nil {
		return err
	}
	if len(exports) == 0 {
		err := m.Execute("nbd-server-start", map[string]any{"addr": map[string]any{"type": "inet",
			"data": map[string]string{"host": nbd.Addr().String(), "port": strconv.Itoa(int(nbd.Port()))}}}, nil)
		if err != nil && !strings.Contains(err.Error(), "already running") {
			return err
		}
	}
	for i := range disks {
		name := parentNode(i)
		if slices.ContainsFunc(exports, func(e struct{ ID string }) bool { return e.ID == name }) {
			continue
		}
		if err := m.Execute("nbd-server-add", map[string]any{"device": name, "writable": true}, nil); err != nil {
			return fmt.Errorf("disk %s: %w", disks[i].ID, err)
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
	}
	return nil
}

// Replicate makes a primary, or a guest that is alone, replicate to the
// secondary at to, which is prepared. Behind it the guest runs in COLO: it does
// so as well when it was paused before, as a primary is that was just started.
// When replication is on already, it returns at once.
//
// The guest runs meanwhile. When it fails, or ctx ends, everything is undone, and
// the guest goes on alone if it ran. The secondary's QEMU has to be started anew
// then.
//
// Other than with QEMU's replication driver on the primary, which refuses writes
// until COLO is on, the secondary's image is an NBD child of the disk's quorum from
// the moment on in which both are the same. So the guest need not stand still while
// its memory is copied.
func Replicate(ctx context.Context, m *qmp.Monitor, caps Caps, disks []Disk, to Incoming, o Options) error {
	if err := checkCaps(caps, disks); err != nil {
		return err
	}
	if o.Progress == nil {
		o.Progress = func(Progress) {}
	}
	o.Limits.fill()
	state, err := migration(m)
	if err != nil {
		return err
	}
	running, _, err := m.Status()
	if err != nil {
		return err
	}
	if !slices.Contains([]string{"setup", "active", "colo"}, state.Status) {
		// What an earlier try has left is found before a disk is copied in vain.
		if err := endMigration(ctx, m, disks); err != nil {
			return err
		}
		err = begin(ctx, m, disks, to, o, running)
	}
	if err == nil {
		err = finish(ctx, m, o, running)
	}
	if err != nil {
		return errors.Join(err, undo(m, disks, running))
	}
	return nil
}

// begin does everything up to the order to migrate.
func begin(ctx context.Context, m *qmp.Monitor, disks []Disk, to Incoming, o Options, running bool) error {
	if len(disks) > 0 {
		// Of an earlier try, or of the time before a failover.
		if err := detach(m, disks); err != nil {
			return err
		}
		if err := until(ctx, "the overlays are merged", func() (bool, error) { return Merged(m, disks) }); err != nil {
			return err
		}
		for i := range disks {
			if err := connectNBD(m, i, to.NBD); err != nil {
				return fmt.Errorf("disk %s: %w", disks[i].ID, err)
			}
		}
		if o.Resync {
			if err := mirror(ctx, m, disks, o); err != nil {
				return err
			}
			if running {
				if err := guarded(m, disks, func() error { return Stop(m) }); err != nil {
					return err
				}
			}
			if err := endMirror(ctx, m, disks); err != nil {
				return err
			}
		}
		if err := guarded(m, disks, func() error { return attach(m, disks) }); err != nil {
			return err
		}
		if o.Resync && running {
			if err := Cont(m); err != nil {
				return err
			}
		}
	}
	if err := setLimits(m, o.Limits); err != nil {
		return err
	}
	if err := setCOLO(m, true); err != nil {
		return err
	}
	// No checkpoint but ours, from the first moment on (R12).
	if !o.ownPeriod {
		if err := m.Checkpoint(); err != nil {
			return err
		}
	}
	return m.Execute("migrate", map[string]any{"uri": to.Migration}, nil)
}

// undo leaves a guest that is alone, running if it was; it needs no context,
// because each command has its deadline.
func undo(m *qmp.Monitor, disks []Disk, running bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*settle)
	defer cancel()
	// Whatever waits for the secondary fails at once.
	err := endMigration(ctx, m, disks)
	if running {
		err = errors.Join(err, goOn(m)) // the rest need not keep it waiting
	}
	for i := range disks {
		m.Execute("block-job-cancel", map[string]any{"device": mirrorJob(&disks[i]), "force": true}, nil)
	}
	err = errors.Join(err, until(ctx, "the copies have ended", func() (bool, error) {
		jobs, err := mirrors(m, disks)
		if err != nil {
			return false, err
		}
		all := true
		for _, j := range jobs {
			if j != nil && j.finished() {
				err = errors.Join(err, m.Execute("job-dismiss", map[string]string{"id": j.ID}, nil))
			} else if j != nil {
				all = false
			}
		}
		return all, err
	}))
	err = errors.Join(err, PrimaryFailover(ctx, m, disks), setCOLO(m, false))
	if running {
		err = errors.Join(err, goOn(m))
	}
	if err != nil {
		return fmt.Errorf("and could not be undone: %w", err)
	}
	return nil
}

// goOn has a guest run that does not.
func goOn(m *qmp.Monitor) error {
	is, _, err := m.Status()
	if err != nil || is {
		return err
	}
	return Cont(m)
}
