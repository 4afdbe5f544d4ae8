// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/lockstep-ft/lockstep/control/qmp"
)

// Options of [Replicate].
type Options struct {
	// Resync copies the disks to the secondary first. Without it the images of
	// both hosts have to be the same already.
	Resync bool
	// Since is the point that the secondary's images are known to be at: with Resync only
	// what was written since is copied, if this QEMU has recorded that. "": they are not known.
	Since string
	// Copied is called with what was copied of each disk; it may be nil.
	Copied func(Copied)
	// Progress is called again and again while something is copied; it may be nil.
	Progress func(Progress)
	// Unstarted: the guest has never run. Then nothing is lost by a reset, which QEMU may need: see [Unmigrate].
	Unstarted bool
	Limits

	// Mutations, set by tests: QEMU keeps its own period (R12), and makes the migration's
	// connection itself.
	ownPeriod, ownConnection bool
}

// Progress is how far the copy of one disk or of the memory is, or the comparison of a
// disk's images.
type Progress struct {
	What        string // "memory" or the disk's ID
	Compare     bool   // both hosts' images are compared, and nothing is copied
	Done, Total int64  // bytes; Total may grow
	Rate        int64  // bytes per second; 0: not measured yet
	Dirtied     int64  // bytes of memory that the guest writes per second, each page counted once a pass; 0: not measured yet
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

// PrepareSecondary makes a secondary that waits for its primary ready for the primary's
// [Replicate]. It waits at in, and serves its disks' images there.
func PrepareSecondary(ctx context.Context, m *qmp.Monitor, caps Caps, disks []Disk, in Incoming) error {
	if err := checkCaps(caps, disks); err != nil {
		return err
	}
	if mode, err := m.COLO(); err != nil || mode == "secondary" {
		return err
	}
	if err := Waits(m); err != nil {
		return err
	}
	// QEMU 8.1 and later need it on the secondary too, and 7.2 allows it.
	if err := setCOLO(m, true); err != nil {
		return err
	}
	if err := in.TLS.use(m, tlsServer); err != nil {
		return err
	}
	if err := listen(m, in); err != nil {
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
		server := map[string]any{"addr": map[string]any{"type": "inet",
			"data": map[string]string{"host": in.NBD.Addr().String(), "port": strconv.Itoa(int(in.NBD.Port()))}}}
		if in.TLS != nil {
			server["tls-creds"], server["tls-authz"] = tlsCreds(tlsServer), tlsPeer
		}
		err := m.Execute("nbd-server-start", server, nil)
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

// Waits returns an error unless QEMU waits for a primary, and has not followed one yet.
func Waits(m *qmp.Monitor) error {
	_, state, err := m.Status()
	if err != nil {
		return err
	}
	mode, err := m.COLO()
	if err == nil && (state != "inmigrate" || mode != "none") {
		err = fmt.Errorf("it waits for no primary, its guest is %s: end it, and start one with -incoming defer", state)
	}
	return err
}

// listen has a QEMU wait for a migration that was started with -incoming defer. One that
// waits already is left as it is.
func listen(m *qmp.Monitor, in Incoming) error {
	if in.TLS == nil {
		return nil // its command line says where
	}
	links, err := m.Links()
	if err != nil || slices.ContainsFunc(links, isMigration) {
		return err
	}
	return m.Execute("migrate-incoming", map[string]string{"uri": in.Migration}, nil)
}

// Replicate makes a primary, or a guest without a secondary, replicate to the secondary at
// to, which [PrepareSecondary] has prepared. Afterwards the guest runs in COLO, also if it
// was paused before, as a primary is that was just started. If replication is on already,
// Replicate returns at once.
//
// The guest runs meanwhile. After an error, ctx's end among them, everything is undone and
// the guest goes on alone if it ran before. The secondary's QEMU has to be started anew
// then.
//
// The primary does not use QEMU's replication driver, which refuses writes until COLO is
// on. Instead the secondary's image becomes an NBD child of the disk's quorum as soon as
// both are the same. So the guest can run while its memory is copied.
func Replicate(ctx context.Context, m *qmp.Monitor, caps Caps, disks []Disk, to Incoming, o Options) error {
	if err := checkCaps(caps, disks); err != nil {
		return err
	}
	if o.Progress == nil {
		o.Progress = func(Progress) {}
	}
	if o.Copied == nil {
		o.Copied = func(Copied) {}
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
		// First, because otherwise the disks may be copied in vain.
		if err := endMigration(ctx, m, disks); err != nil {
			return err
		}
		if o.Unstarted {
			if err := Unmigrate(ctx, m); err != nil {
				return err
			}
		}
		var w wire
		defer w.release()
		if err = begin(ctx, m, disks, to, o, running, &w); err == nil {
			err = finish(ctx, m, o, running)
		}
		if err != nil {
			w.cut()
		}
		if to.TLS != nil && errors.Is(err, errMigrationFailed) { // in TLS 1.3 it does so after this side's handshake
			err = fmt.Errorf("%w (if the secondary refused this host's certificate, its QEMU's log says why)", err)
		}
	} else {
		err = finish(ctx, m, o, running)
	}
	if err != nil {
		return errors.Join(err, undo(m, disks, running))
	}
	return nil
}

// begin does everything up to the command migrate, and that. w becomes its connection.
func begin(ctx context.Context, m *qmp.Monitor, disks []Disk, to Incoming, o Options, running bool, w *wire) error {
	if err := to.TLS.use(m, tlsClient); err != nil {
		return err
	}
	if len(disks) > 0 {
		// What an earlier try has left, or a failover.
		if err := detach(m, disks); err != nil {
			return err
		}
		if err := until(ctx, "the overlays are merged", func() (bool, error) { return Merged(m, disks) }); err != nil {
			return err
		}
		if err := KeepPoints(m, disks, o.Since); err != nil {
			return err
		}
		for i := range disks {
			if err := connectNBD(m, i, to); err != nil {
				return fmt.Errorf("disk %s: %w", disks[i].ID, err)
			}
		}
		if o.Resync {
			if err := copyDisks(ctx, m, disks, o, running); err != nil {
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
	// QEMU must make no checkpoint of its own, from the beginning (R12).
	if !o.ownPeriod {
		if err := m.Checkpoint(); err != nil {
			return err
		}
	}
	uri, err := w.connect(ctx, m, to, o)
	if err != nil {
		return err
	}
	return m.Execute("migrate", map[string]any{"uri": uri}, nil)
}

// Unmigrate has a guest that has never run wait for its start again, if QEMU has it in the state of one that has gone to another
// host. It gets there when a migration ends in the moment in which the try to replicate is taken back, and would refuse
// every other one.
func Unmigrate(ctx context.Context, m *qmp.Monitor) error {
	_, state, err := m.Status()
	if err != nil || state != "postmigrate" {
		return err
	}
	if err := m.Execute("system_reset", nil, nil); err != nil {
		return err
	}
	return until(ctx, "the guest waits for its start", func() (bool, error) {
		_, state, err := m.Status()
		return state == "prelaunch", err
	})
}

// copyDisks makes the secondary's images the same as this host's. A guest that ran is
// stopped afterwards.
func copyDisks(ctx context.Context, m *qmp.Monitor, disks []Disk, o Options, running bool) error {
	since, err := hasPoint(m, disks, o.Since)
	if err != nil {
		return err
	}
	live := func() error { return mirror(ctx, m, disks, o) }
	rest := func() error { return endMirror(ctx, m, disks, o) }
	if since {
		c := &changes{m: m, disks: disks, o: o}
		if err := c.begin(); err != nil {
			return err
		}
		live = func() error { return c.live(ctx) }
		rest = func() error { return errors.Join(c.rest(ctx), c.end()) }
	}
	if err := live(); err != nil {
		return err
	}
	if running {
		if err := guarded(m, disks, func() error { return Stop(m) }); err != nil {
			return err
		}
	}
	return rest()
}

// undo takes back a try to replicate: the guest is alone again, and runs if it did before.
// It has no context because it has to be done, and each command has a deadline.
func undo(m *qmp.Monitor, disks []Disk, running bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*stateTimeout)
	defer cancel()
	// This makes whatever waits for the secondary fail at once.
	err := endMigration(ctx, m, disks)
	if running {
		err = errors.Join(err, goOn(m)) // before the rest, which may take a while
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

// goOn resumes a guest that does not run.
func goOn(m *qmp.Monitor) error {
	is, _, err := m.Status()
	if err != nil || is {
		return err
	}
	return Cont(m)
}
