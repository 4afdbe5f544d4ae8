// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/checkpoint"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/journal"
	"github.com/lockstep-ft/lockstep/control/nicloop"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qmp"
	"github.com/lockstep-ft/lockstep/control/state"
)

// What QEMU reports of the guest itself: disks that fail (R24), and its own end (R25).

const (
	// lateReport is how much later than BLOCK_IO_ERROR QEMU may report which replica
	// failed: it emits QUORUM_REPORT_BAD once a second at most.
	lateReport = 1200 * time.Millisecond
	// awaitOff is how long after the SVM a PVM may power off that does the same.
	awaitOff = 3 * time.Second
	// retryFirst and retryLast are between two tries of a request that a disk refused.
	retryFirst = time.Second
	retryLast  = 10 * time.Second
)

// guestWatch knows the guest's own state.
type guestWatch struct {
	d        *Daemon
	faults   []api.DiskFault
	ioError  bool // QEMU stopped the guest because a disk failed
	reported bool // which replica that was
	masked   []string
	svmOff   bool // S: the SVM powered off
	broken   bool // a device, of this QEMU
	retry    backoff
	retryAt  time.Time
	retrying bool

	unstarted bool // the guest of this QEMU has never run

	mergeFrom    time.Time // when a merge was first waited for
	asking, slow bool
}

// guestEvent takes one of QEMU's events.
func (gw *guestWatch) guestEvent(event string, at time.Time, data map[string]any) {
	if event == "RESET" {
		gw.d.clock.booted()
	}
	fo := gw.d.failover
	if fo == nil {
		return
	}
	text := func(key string) string { s, _ := data[key].(string); return s }
	switch event {
	case "QUORUM_REPORT_BAD":
		if _, secondarys := qemu.Replica(text("node-name"), fo.Disks); secondarys && at.Before(gw.d.repl.begun) {
			return // QEMU sends one a second: this one is about the replica of a secondary before
		}
		gw.diskFailed(text("node-name"), text("type"), text("error"))
	case "BLOCK_IO_ERROR":
		if full, _ := data["nospace"].(bool); full {
			gw.d.room.outOfRoom(text("node-name"))
		}
		if text("action") == "stop" {
			gw.ioStopped(text("node-name"), text("operation"), text("reason"))
		}
	case "BLOCK_JOB_COMPLETED", "BLOCK_JOB_ERROR":
		if why := text("error"); why != "" {
			gw.d.log.Error("a block job failed", "job", text("device"), "err", why)
			gw.d.event(journal.Disk, "a block job failed", map[string]any{"job": text("device"), "error": why})
		}
	case "GUEST_PANICKED":
		if text("action") != "run" {
			gw.guestDead("the guest panicked")
		}
	case "WATCHDOG":
		if text("action") == "pause" {
			gw.guestDead("the guest's watchdog expired")
		}
	case "RESET":
		// The SVM resets on its own: what the guests send from here on agrees only if both
		// begin at the same point.
		if gw.d.isPrimary() {
			gw.d.checkpoints.wanted(nicloop.Request{At: time.Now(), NIC: -1, Reason: "the guest was reset"})
		}
	case "SHUTDOWN":
		gw.shutDown(text("reason"))
	}
}

// shutDown follows the end of a guest or of its QEMU.
func (gw *guestWatch) shutDown(reason string) {
	switch reason {
	case "guest-shutdown", "guest-reset": // a reset with -no-reboot
		gw.guestOff()
	case "host-signal", "host-qmp-quit", "host-ui", "host-error":
		if gw.d.failover.ended() {
			return // it is ended here
		}
		// A death at once: on its way QEMU loses the other's QEMU and its disks, which
		// shows nothing about them.
		gw.d.qmp.qemuGone("it was ordered to end: "+reason, false)
	}
}

// diskFailed: a replica of a disk did not take a write or a flush, or could not be
// read.
func (gw *guestWatch) diskFailed(node, operation, why string) {
	fo := gw.d.failover
	if fo.ended() {
		return // another host serves, and has cut the connection to its disks
	}
	disk, secondarys := qemu.Replica(node, fo.Disks)
	host := gw.d.opt.Node
	if secondarys {
		host = gw.d.opt.Peer
	}
	gw.reported = true
	gw.note(api.DiskFault{Disk: disk, Host: host, Operation: operation, Error: why, At: time.Now()})
	gw.d.log.Error("a disk failed", "disk", disk, "host", host, "operation", operation, "err", why)
	gw.d.event(journal.Disk, "a disk failed", map[string]any{"disk": disk, "host": host, "operation": operation, "error": why})
	if !secondarys {
		gw.d.failover.step(failover.Event{Kind: failover.EvGuestFailed})
		return
	}
	gw.d.repl.stopSync(fmt.Sprintf("disk %s on %s: %s: %s", disk, host, operation, why)) // what is copied is not what the guest has
	gw.d.failover.step(failover.Event{Kind: failover.EvReplica})
}

func (gw *guestWatch) note(f api.DiskFault) {
	for i := range gw.faults {
		if x := &gw.faults[i]; x.Disk == f.Disk && x.Host == f.Host && x.Operation == f.Operation {
			f.Count = x.Count + 1
			*x = f
			return
		}
	}
	f.Count = 1
	gw.faults = append(gw.faults, f) // disks, hosts and operations are few
}

// ioStopped: QEMU stopped the guest because a disk's request failed. It is queued, and
// done again when the guest goes on.
func (gw *guestWatch) ioStopped(node, operation, why string) {
	if gw.ioError {
		return
	}
	gw.ioError, gw.retry, gw.retryAt = true, backoff{first: retryFirst, last: retryLast}, time.Now().Add(retryFirst)
	if gw.reported {
		return
	}
	// Not known which replica it was: of the primary's, its own counts as the one.
	time.AfterFunc(lateReport, func() {
		gw.d.post(func() {
			if gw.ioError && !gw.reported {
				gw.diskFailed(node, operation, why)
			}
		})
	})
}

// guestState takes the state that QEMU reports, which makes up for an event that was
// missed.
func (gw *guestWatch) guestState(state string) {
	fo := gw.d.failover
	if fo == nil {
		return
	}
	gw.watchMerge()
	gw.unstarted = state == "prelaunch" || gw.unstarted && slices.Contains([]string{"postmigrate", "finish-migrate", "colo"}, state)
	switch state {
	case "io-error":
		gw.ioStopped("", "", "QEMU has stopped the guest because a disk failed")
		gw.retryDisk()
	case "guest-panicked", "watchdog":
		gw.guestDead("the guest has stopped: " + state)
	case "shutdown":
		gw.guestOff()
	}
}

// retryDisk has a guest that nobody else can go on for try its disk again, now and
// then: its file system may have room again.
func (gw *guestWatch) retryDisk() {
	fo := gw.d.failover
	if fo.p == nil || fo.p.State() != failover.PrimarySolo && fo.p.State() != failover.PrimaryStart || gw.retrying || time.Now().Before(gw.retryAt) {
		return
	}
	gw.retryAt, gw.retrying = time.Now().Add(gw.retry.take()), true
	gw.d.qmp.procedure("try the disk again", func(_ context.Context, m *qmp.Monitor) error { return qemu.Retry(m) }, func(err error) {
		gw.retrying = false
		if err != nil {
			gw.d.log.Warn("the guest cannot go on", "err", err)
		}
	})
}

// guestGoesOn follows a RESUME.
func (gw *guestWatch) guestGoesOn() {
	gw.ioError, gw.reported, gw.svmOff, gw.unstarted = false, false, false, false
	gw.d.failover.step(failover.Event{Kind: failover.EvGuestHealthy})
}

// guestDead: QEMU stopped the guest for a reason of the guest's own, which is no
// operator's stop.
func (gw *guestWatch) guestDead(why string) {
	if gw.d.failover.machine.Sick() {
		return
	}
	gw.d.log.Error(why)
	gw.d.event(journal.QEMU, why, nil)
	gw.d.failover.step(failover.Event{Kind: failover.EvGuestFailed})
}

// devicesBroken follows virtio devices that QEMU has given up. An SVM that has one is
// no replica, though checkpoints go on being committed: its guest waits for that device
// for ever. What the primary's has would go to the next secondary, too.
func (gw *guestWatch) devicesBroken(paths []string) {
	fo := gw.d.failover
	if fo == nil || len(paths) == 0 || gw.broken {
		return
	}
	gw.broken = true
	why := fmt.Sprintf("QEMU has given up devices of the guest: %v", paths)
	if fo.s != nil {
		gw.guestDead(why)
		return
	}
	gw.d.log.Error(why)
	gw.d.event(journal.QEMU, why, nil)
}

// guestOff: the guest powered off. Of the SVM that counts when the PVM has done so,
// too, or is gone.
func (gw *guestWatch) guestOff() {
	fo := gw.d.failover
	if fo.p != nil {
		gw.d.failover.step(failover.Event{Kind: failover.EvPoweredOff})
		return
	}
	if !gw.svmOff {
		gw.d.log.Info("the secondary's guest powered off")
		gw.svmOff = true
		gw.d.checkpoints.step(checkpoint.Event{Kind: checkpoint.EvOff})
	}
}

// diskStatus adds what is wrong with the disks and the guest to a status.
func (gw *guestWatch) diskStatus(s *api.Status) {
	s.DiskFaults = append([]api.DiskFault{}, gw.faults...)
	s.MaskedDisks, s.Unmerged = gw.masked, gw.d.failover.state.Unmerged
	if gw.ioError {
		s.Detail = "the guest stands still"
		if n := len(gw.faults); n > 0 {
			f := gw.faults[n-1]
			for _, x := range gw.faults {
				if x.At.After(f.At) {
					f = x
				}
			}
			s.Detail = fmt.Sprintf("the guest stands still: disk %s on %s: %s: %s; it goes on when the disk does", f.Disk, f.Host, f.Operation, f.Error)
		}
	}
}

// checkMasked finds out whether QEMU hides failing replicas from the guest, as one does
// that was started with a vote threshold of 1. Then a fault that was not reported may
// have passed, so the secondary is not trusted over a new connection to the monitor.
func (gw *guestWatch) checkMasked() {
	fo := gw.d.failover
	if fo == nil || fo.p == nil || len(fo.Disks) == 0 {
		return
	}
	var masked []string
	gw.d.qmp.procedure("look at the disks", func(_ context.Context, m *qmp.Monitor) (err error) {
		masked, err = qemu.Masked(m, fo.Disks)
		return err
	}, func(err error) {
		if err != nil {
			gw.d.log.Warn("the disks cannot be looked at", "err", err)
			return
		}
		gw.masked = masked
		if len(masked) == 0 {
			return
		}
		gw.d.log.Warn("QEMU reports a write to the guest as done when one of two replicas took it: start it with vote-threshold=2 (docs/GUARANTEES.md)", "disks", masked)
		if fo.p.State() == failover.PrimaryPair {
			gw.d.log.Error("writes that the secondary missed may have passed unseen")
			gw.d.failover.step(failover.Event{Kind: failover.EvReplica})
		}
	})
}

// mergeSlow is how long a merge may take before it is logged.
const mergeSlow = 30 * time.Second

// watchMerge finds out when what the guest wrote since it took over is in its images.
func (gw *guestWatch) watchMerge() {
	fo := gw.d.failover
	if fo.p == nil || !fo.state.Unmerged || gw.asking {
		return
	}
	if gw.mergeFrom.IsZero() {
		gw.mergeFrom = time.Now()
	}
	merged := false
	gw.asking = true
	gw.d.qmp.procedure("look at the overlays", func(_ context.Context, m *qmp.Monitor) (err error) {
		merged, err = qemu.Merged(m, fo.Disks)
		return err
	}, func(err error) {
		gw.asking = false
		switch {
		case err != nil:
		case merged:
			if err := gw.d.failover.remember(func(st *state.State) { st.Unmerged = false }); err != nil {
				gw.d.fatal = err
			}
		case time.Since(gw.mergeFrom) > mergeSlow && !gw.slow:
			gw.slow = true
			gw.d.log.Error("the overlays are not merged into the guest's images: is there room where these are? Until they are, overlay_dir must not be lost", "since", gw.mergeFrom)
			gw.d.event(journal.Disk, "the overlays are not merged into the guest's images", nil)
		}
	})
}
