// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"
	"time"

	"lockstep/control/api"
	"lockstep/control/arbiter"
	"lockstep/control/failover"
	"lockstep/control/journal"
	"lockstep/control/qemu"
	"lockstep/control/qmp"
	"lockstep/control/state"
)

// What QEMU reports of the guest itself: disks that fail (R24), and its own end (R25).

// ErrPoweredOff is how a part ends whose guest powered off: the pair stays off until
// somebody starts it.
var ErrPoweredOff = errors.New("the guest powered off")

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

// guestLife is what is known of the guest's own state.
type guestLife struct {
	faults   []api.DiskFault
	ioError  bool // QEMU stopped the guest because a disk failed
	told     bool // which replica that was
	masked   []string
	svmOff   bool // S: the SVM powered off
	retry    backoff
	retryAt  time.Time
	retrying bool

	mergeFrom           time.Time // when a merge was first waited for
	asksMerge, saidSlow bool
}

// guestEvent takes one of QEMU's events.
func (d *Daemon) guestEvent(event string, data map[string]any) {
	l := d.life
	if l == nil {
		return
	}
	text := func(key string) string { s, _ := data[key].(string); return s }
	switch event {
	case "QUORUM_REPORT_BAD":
		d.diskFailed(text("node-name"), text("type"), text("error"))
	case "BLOCK_IO_ERROR":
		if full, _ := data["nospace"].(bool); full {
			d.outOfRoom(text("node-name"))
		}
		if text("action") == "stop" {
			d.ioStopped(text("node-name"), text("operation"), text("reason"))
		}
	case "BLOCK_JOB_COMPLETED", "BLOCK_JOB_ERROR":
		if why := text("error"); why != "" {
			d.log.Error("a block job failed", "job", text("device"), "err", why)
			d.event(journal.Disk, "a block job failed", map[string]any{"job": text("device"), "error": why})
		}
	case "GUEST_PANICKED":
		if text("action") != "run" {
			d.guestDead("the guest panicked")
		}
	case "WATCHDOG":
		if text("action") == "pause" {
			d.guestDead("the guest's watchdog expired")
		}
	case "RESET":
		// The SVM resets on its own: what the guests say from here on agrees only if both
		// begin at the same point.
		if d.primary != nil {
			d.wanted(request{at: time.Now(), nic: -1, reason: "the guest was reset"})
		}
	case "SHUTDOWN":
		d.shutDown(text("reason"))
	}
}

// shutDown follows the end of a guest or of its QEMU.
func (d *Daemon) shutDown(reason string) {
	switch reason {
	case "guest-shutdown", "guest-reset": // a reset with -no-reboot
		d.guestOff()
	case "host-signal", "host-qmp-quit", "host-ui", "host-error":
		// A death at once: on its way QEMU loses the other's QEMU and its disks, which
		// says nothing about them.
		d.qemuGone("it was told to end: " + reason)
	}
}

// diskFailed: a replica of a disk did not take a write or a flush, or could not be
// read.
func (d *Daemon) diskFailed(node, operation, why string) {
	l := d.life
	if l.ended() {
		return // another host serves, and has cut the connection to its disks
	}
	disk, secondarys := qemu.Replica(node, l.Disks)
	host := d.opt.Node
	if secondarys {
		host = d.opt.Peer
	}
	l.told = true
	l.note(api.DiskFault{Disk: disk, Host: host, Operation: operation, Error: why, At: time.Now()})
	d.log.Error("a disk failed", "disk", disk, "host", host, "operation", operation, "err", why)
	d.event(journal.Disk, "a disk failed", map[string]any{"disk": disk, "host": host, "operation": operation, "error": why})
	if !secondarys {
		d.live(failover.Event{Kind: failover.EvGuestFailed})
		return
	}
	l.stopSync(fmt.Sprintf("disk %s on %s: %s: %s", disk, host, operation, why)) // what is copied is not what the guest has
	d.live(failover.Event{Kind: failover.EvReplica})
}

// ended reports whether this host has no say any more.
func (l *pairLife) ended() bool {
	return l.p != nil && l.p.State() >= failover.PrimaryFenced || l.s != nil && l.s.State() >= failover.SecondaryFenced
}

func (l *pairLife) note(f api.DiskFault) {
	for i := range l.faults {
		if x := &l.faults[i]; x.Disk == f.Disk && x.Host == f.Host && x.Operation == f.Operation {
			f.Count = x.Count + 1
			*x = f
			return
		}
	}
	f.Count = 1
	l.faults = append(l.faults, f) // disks, hosts and operations are few
}

// ioStopped: QEMU stopped the guest because a disk's request failed. It is queued, and
// done again when the guest goes on.
func (d *Daemon) ioStopped(node, operation, why string) {
	l := d.life
	if l.ioError {
		return
	}
	l.ioError, l.retry, l.retryAt = true, backoff{first: retryFirst, last: retryLast}, time.Now().Add(retryFirst)
	if l.told {
		return
	}
	// Not known which replica it was: of the primary's, its own counts as the one.
	time.AfterFunc(lateReport, func() {
		d.post(func() {
			if l.ioError && !l.told {
				d.diskFailed(node, operation, why)
			}
		})
	})
}

// guestState takes QEMU's word for what the guest does, which tells what an event that
// nobody heard would have told.
func (d *Daemon) guestState(state string) {
	l := d.life
	if l == nil {
		return
	}
	d.watchMerge()
	switch state {
	case "io-error":
		d.ioStopped("", "", "QEMU has stopped the guest because a disk failed")
		d.retryDisk()
	case "guest-panicked", "watchdog":
		d.guestDead("the guest has stopped: " + state)
	case "shutdown":
		d.guestOff()
	}
}

// retryDisk has a guest that nobody else can go on for try its disk again, now and
// then: its file system may have room again.
func (d *Daemon) retryDisk() {
	l := d.life
	if l.p == nil || l.p.State() != failover.PrimarySolo && l.p.State() != failover.PrimaryStart || l.retrying || time.Now().Before(l.retryAt) {
		return
	}
	l.retryAt, l.retrying = time.Now().Add(l.retry.take()), true
	d.procedure("try the disk again", func(_ context.Context, m *qmp.Monitor) error { return qemu.Retry(m) }, func(err error) {
		l.retrying = false
		if err != nil {
			d.log.Warn("the guest cannot go on", "err", err)
		}
	})
}

// guestGoesOn follows a RESUME.
func (d *Daemon) guestGoesOn() {
	l := d.life
	l.ioError, l.told = false, false
	d.live(failover.Event{Kind: failover.EvGuestHealthy})
}

// guestDead: QEMU stopped the guest for a reason of the guest's own, which is no
// operator's stop.
func (d *Daemon) guestDead(why string) {
	if d.life.machine.Sick() {
		return
	}
	d.log.Error(why)
	d.event(journal.QEMU, why, nil)
	d.live(failover.Event{Kind: failover.EvGuestFailed})
}

// guestOff: the guest powered off. Of the SVM that counts when the PVM has done so,
// too, or is gone.
func (d *Daemon) guestOff() {
	l := d.life
	if l.p != nil {
		d.live(failover.Event{Kind: failover.EvPoweredOff})
		return
	}
	if !l.svmOff {
		d.log.Info("the secondary's guest powered off")
		l.svmOff = true
	}
}

// poweredOff ends a part (R25).
func (d *Daemon) poweredOff() error {
	l := d.life
	d.log.Info("the guest powered off, and stays off until `lockstep start`")
	d.event(journal.QEMU, "the guest powered off", nil)
	if l.p != nil {
		d.send(message{Type: "off"})
		if err := d.remember(func(st *state.State) { st.Off = l.Guest != nil }); err != nil {
			return err
		}
	}
	if l.Guest == nil || d.qmp.conn == nil {
		d.fatal = ErrPoweredOff
		return nil
	}
	d.procedure("end QEMU", func(_ context.Context, m *qmp.Monitor) error { return qemu.Quit(m) }, func(error) {
		d.fatal = ErrPoweredOff // it may have gone before it answered
	})
	return nil
}

// diskStatus adds what is wrong with the disks and the guest to a status.
func (l *pairLife) diskStatus(s *api.Status) {
	s.DiskFaults = append([]api.DiskFault{}, l.faults...)
	s.MaskedDisks, s.Unmerged = l.masked, l.state.Unmerged
	if l.ioError {
		s.Detail = "the guest stands still"
		if n := len(l.faults); n > 0 {
			f := l.faults[n-1]
			for _, x := range l.faults {
				if x.At.After(f.At) {
					f = x
				}
			}
			s.Detail = fmt.Sprintf("the guest stands still: disk %s on %s: %s: %s; it goes on when the disk does", f.Disk, f.Host, f.Operation, f.Error)
		}
	}
}

// checkMasked finds out whether QEMU hides failing replicas from the guest, as one does
// that was started with a vote threshold of 1. Then a fault that nobody heard of may
// have passed, so the secondary is not trusted over a new connection to the monitor.
func (d *Daemon) checkMasked() {
	l := d.life
	if l == nil || l.p == nil || len(l.Disks) == 0 {
		return
	}
	var masked []string
	d.procedure("look at the disks", func(_ context.Context, m *qmp.Monitor) (err error) {
		masked, err = qemu.Masked(m, l.Disks)
		return err
	}, func(err error) {
		if err != nil {
			d.log.Warn("the disks cannot be looked at", "err", err)
			return
		}
		l.masked = masked
		if len(masked) == 0 {
			return
		}
		d.log.Warn("QEMU tells the guest that a write is done when one of two replicas took it: start it with vote-threshold=2 (docs/GUARANTEES.md)", "disks", masked)
		if l.p.State() == failover.PrimaryPair {
			d.log.Error("writes that the secondary missed may have passed unseen")
			d.live(failover.Event{Kind: failover.EvReplica})
		}
	})
}

// mergeSlow is how long a merge may take before somebody is told.
const mergeSlow = 30 * time.Second

// watchMerge finds out when what the guest wrote since it took over is in its images.
func (d *Daemon) watchMerge() {
	l := d.life
	if l.p == nil || !l.state.Unmerged || l.asksMerge {
		return
	}
	if l.mergeFrom.IsZero() {
		l.mergeFrom = time.Now()
	}
	merged := false
	l.asksMerge = true
	d.procedure("look at the overlays", func(_ context.Context, m *qmp.Monitor) (err error) {
		merged, err = qemu.Merged(m, l.Disks)
		return err
	}, func(err error) {
		l.asksMerge = false
		switch {
		case err != nil:
		case merged:
			if err := d.remember(func(st *state.State) { st.Unmerged = false }); err != nil {
				d.fatal = err
			}
		case time.Since(l.mergeFrom) > mergeSlow && !l.saidSlow:
			l.saidSlow = true
			d.log.Error("the overlays are not merged into the guest's images: is there room where these are? Until they are, overlay_dir must not be lost", "since", l.mergeFrom)
			d.event(journal.Disk, "the overlays are not merged into the guest's images", nil)
		}
	})
}

// entryEvery is how often a primary reads the arbiter's entry: one that somebody else
// has won is fenced.
const entryEvery = 5 * time.Second

// entryTimeout bounds it: a claim may be waiting for its turn.
const entryTimeout = 500 * time.Millisecond

// watchEntry fences a host that the arbiter does not name any more (R26).
func (d *Daemon) watchEntry(ctx context.Context, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		asking, done := context.WithTimeout(ctx, entryTimeout)
		now, err := d.life.Arbiter.Read(asking)
		done()
		if err != nil {
			continue // whoever needs its answer says so
		}
		d.post(func() { d.entry(now) })
	}
}

func (d *Daemon) entry(now arbiter.Record) {
	if now.Speaker != d.opt.Node && now.Term > d.life.p.Term() && d.life.p.State() != failover.PrimaryClaim {
		d.log.Error("the arbiter names another node: this one is fenced", "entry", now)
	}
	d.live(failover.Event{Kind: failover.EvEntry, Term: now.Term, OK: now.Speaker == d.opt.Node})
}

// serialArbiter is an arbiter that several goroutines ask, one after the other.
type serialArbiter struct {
	arbiter.Arbiter
	turn chan struct{} // holds one
}

func serialize(a arbiter.Arbiter) *serialArbiter {
	s := &serialArbiter{a, make(chan struct{}, 1)}
	s.turn <- struct{}{}
	return s
}

func (s *serialArbiter) wait(ctx context.Context) error {
	select {
	case <-s.turn:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *serialArbiter) Read(ctx context.Context) (arbiter.Record, error) {
	if err := s.wait(ctx); err != nil {
		return arbiter.Record{}, err
	}
	defer func() { s.turn <- struct{}{} }()
	return s.Arbiter.Read(ctx)
}

func (s *serialArbiter) Settle(ctx context.Context) (arbiter.Record, error) {
	if err := s.wait(ctx); err != nil {
		return arbiter.Record{}, err
	}
	defer func() { s.turn <- struct{}{} }()
	return s.Arbiter.Settle(ctx)
}

func (s *serialArbiter) Swap(ctx context.Context, old, next arbiter.Record) (arbiter.Record, bool, error) {
	if err := s.wait(ctx); err != nil {
		return arbiter.Record{}, false, err
	}
	defer func() { s.turn <- struct{}{} }()
	return s.Arbiter.Swap(ctx, old, next)
}
