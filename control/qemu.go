// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/journal"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qmp"
	"github.com/lockstep-ft/lockstep/control/state"
)

// startGuest is ensureGuest's; but a secondary without room for its overlays waits for
// it, and status shows that.
func (mo *monitor) startGuest(ctx context.Context) error {
	err := mo.ensureGuest(ctx)
	full := (*qemu.OverlayError)(nil)
	if !errors.As(err, &full) {
		return err
	}
	pause := mo.d.room.noRoom(full.Dir, full.Error())
	mo.d.work.Go(func() {
		for pause.wait(ctx) {
			err := mo.startQEMU(ctx)
			if again := (*qemu.OverlayError)(nil); errors.As(err, &again) {
				continue
			}
			mo.d.post(func() {
				mo.hadQEMU = err == nil
				if mo.d.failover.Setback.why = ""; err != nil {
					mo.d.fatal = err
				}
			})
			return
		}
	})
	return nil
}

// procedure runs one of QEMU's beside the controller, which gets the result.
func (mo *monitor) procedure(what string, f func(context.Context, *qmp.Monitor) error, done func(error)) context.CancelFunc {
	ctx, cancel := context.WithCancel(mo.d.ctx)
	m := mo.conn
	mo.d.work.Go(func() {
		defer cancel()
		err := fmt.Errorf("%s: no QMP connection", what)
		if m != nil {
			err = f(ctx, m)
		}
		mo.d.post(func() { done(err) })
	})
	return cancel
}

// qemuGone: this host's QEMU is. hangs: its process is not.
func (mo *monitor) qemuGone(why string, hangs bool) {
	log := ""
	if mo.d.failover.Guest != nil {
		log = qemu.Log(mo.d.failover.Guest)
	}
	said := "dead"
	if hangs {
		said = "without an answer for so long that it counts as dead"
	}
	mo.d.log.Error("QEMU is "+said, "why", why, "qemu_log", log)
	mo.d.event(journal.QEMU, said+": "+why, nil)
	if mo.d.guest.svmOff {
		// One that ends with its guest: the primary's powers off as well, and reports it.
		time.AfterFunc(awaitOff, func() { mo.d.post(func() { mo.d.failover.step(failover.Event{Kind: failover.EvQEMUDead, OK: hangs}) }) })
		return
	}
	mo.d.failover.step(failover.Event{Kind: failover.EvQEMUDead, OK: hangs})
}

// ensureGuest starts this host's QEMU, unless that is somebody else's or the one of
// the daemon before this one runs.
func (mo *monitor) ensureGuest(ctx context.Context) error {
	fo := mo.d.failover
	if fo == nil || fo.Guest == nil {
		return nil
	}
	p, err := qemu.Find(fo.Guest)
	switch {
	case err == nil && fo.Begin.Ends():
		mo.beginNote(true) // judged anew below, and nobody else had the images so far
		err = p.Kill(ctx)
		p.Release()
		if err != nil {
			return err
		}
	case err == nil:
		mo.beginNote(true)
		mo.d.log.Info("going on with the QEMU that runs", "pid", p.Pid())
		p.Release()
		mo.hadQEMU = true
		return nil
	case !errors.Is(err, qemu.ErrNotRunning):
		return err
	case mo.hadQEMU:
		return nil // it died; watchQEMU finds that out
	}
	fo.orphan = false // clients know nothing of a new one
	in := mo.incoming()
	if err := fo.Guest.Check(in, nil); err != nil {
		return err
	}
	if fo.state.Unmerged {
		if fo.p != nil {
			mo.d.log.Warn("merging what the guest wrote after its takeover into its images")
			if err := qemu.MergeOverlays(ctx, fo.Guest); err != nil {
				return err
			}
		}
		if err := mo.d.failover.remember(func(st *state.State) { st.Unmerged = false }); err != nil {
			return err
		}
	}
	if err := mo.startQEMU(ctx); err != nil {
		return err
	}
	mo.hadQEMU = true
	return nil
}

// beginNote reads what this host's images are, if they are a secondary's. held: QEMU has them.
func (mo *monitor) beginNote(held bool) {
	fo := mo.d.failover
	if fo.s == nil || fo.note == nil || len(fo.Disks) == 0 {
		return
	}
	if err := fo.note.Begin(held); err != nil {
		mo.d.log.Warn("this host's images are copied whole", "why", err)
		mo.d.event(journal.Sync, "this host's images are copied whole: "+err.Error(), nil)
	}
}

// endNote forgets what this host's images are, because QEMU may write to them by itself (R29).
func (mo *monitor) endNote() {
	fo := mo.d.failover
	if fo == nil || fo.note == nil {
		return
	}
	if err := fo.note.End(); err != nil {
		mo.d.fatal = err
	}
}

// incoming is where this host's QEMU waits for another's; nil: it does not.
func (mo *monitor) incoming() *qemu.Incoming {
	if mo.d.failover.s == nil {
		return nil
	}
	return &mo.d.failover.Own
}

// startQEMU starts this host's QEMU, which does not run.
func (mo *monitor) startQEMU(ctx context.Context) error {
	mo.beginNote(false)
	p, err := qemu.Start(ctx, mo.d.failover.Guest, mo.incoming())
	if err != nil {
		return err
	}
	mo.d.log.Info("QEMU started", "pid", p.Pid())
	mo.d.event(journal.QEMU, "started", map[string]any{"pid": p.Pid()})
	p.Release()
	mo.d.post(mo.d.clock.booted)
	return nil
}

// follows reports whether the SVM follows a PVM, or did so to the end (S).
func (mo *monitor) follows(ctx context.Context) (bool, error) {
	var m *qmp.Monitor
	if err := mo.d.ask(ctx, func() { m = mo.conn }); err != nil {
		return false, err
	}
	if m == nil {
		return false, errors.New("no QMP connection")
	}
	mode, err := m.COLO()
	return mode == "secondary", err
}

// rescue has a P go on with a guest that clients know and whose tables are gone. What was
// compared before is not known any more, and an S that was covered may be about to take
// over, so it asks the arbiter whether it may transmit alone. A guest that has not run waits
// for its secondary.
func (fo *failoverPart) rescue(running bool, state string) {
	if fo == nil || fo.p == nil || !fo.orphan || !running && state != "paused" && state != "colo" {
		return
	}
	fo.orphan = false
	fo.d.log.Warn("QEMU runs, and its tables in the kernel are gone: asking the arbiter whether the guest may go on alone", "state", state)
	fo.step(failover.Event{Kind: failover.EvTakeOver})
}
