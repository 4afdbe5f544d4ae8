// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"errors"
	"math"

	"github.com/lockstep-ft/lockstep/control/checkpoint"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/state"
)

// watcher keeps a connection to QEMU, and follows what comes of it.
type watcher struct {
	d          *daemon
	hadQEMU    bool
	process    *qemu // that the newest connection was to
	unanswered int
	detached   bool
	colo       string // QEMU's mode when it connected
	ioError    bool
	reported   bool
}

// connect connects to QEMU, again and again.
func (x *watcher) connect(delay int64) {
	d := x.d
	d.post(delay, func() {
		q, pause := d.h.qemu, int64(100*ms)
		switch {
		case q == nil || !q.alive:
			d.qmp.unanswered = maxUnanswered
		case !q.works():
			d.post(qmpTimeout, func() {
				switch {
				case q.works(): // it has answered after all
				case !q.isFrozen(): // this host stood still: nothing is known
				default:
					d.qmp.unanswered++
				}
				d.qmp.judge()
				d.qmp.connect(pause)
			})
			return
		default:
			d.qmp.unanswered, d.qmp.process = 0, q
			m := &monitor{d: d, q: q, open: true, last: d.w.now, patience: 1}
			d.h.monitor = m
			running, state, mode := false, "", ""
			m.run(qmpTimeout, func(q *qemu, answer func(error)) {
				if d.isPrimary() {
					q.unpause()
				}
				running, state, mode = q.running(), q.state, q.colo
				answer(nil)
			}, func(err error) {
				if err == nil {
					d.qmp.up(m, running, state, mode)
				}
			})
			return
		}
		d.qmp.judge()
		d.qmp.connect(pause)
	})
}

func (x *watcher) judge() {
	d := x.d
	if d.qmp.hadQEMU && d.qmp.unanswered >= maxUnanswered {
		d.w.reach("qemu counts as dead")
		q := d.h.qemu
		d.pair.step(failover.Event{Kind: failover.EvQEMUDead, OK: q != nil && q.alive})
	}
}

// bePatient is control's.
func (x *watcher) bePatient() {
	d := x.d
	switch {
	case d.h.monitor == nil || d.isPrimary():
	case d.pair.s.State() <= failover.SecondaryPair:
		d.h.monitor.patience = 1 + maxUnanswered
	case d.pair.s.State() < failover.SecondaryFenced:
		d.h.monitor.patience = math.MaxInt
	}
}

func (x *watcher) up(m *monitor, running bool, state, mode string) {
	d := x.d
	d.qmp.hadQEMU, d.qmp.unanswered, d.qmp.colo = true, 0, mode
	x.bePatient()
	if d.pair.tellAgain {
		d.pair.tellQEMU()
	}
	d.checks.step(checkpoint.Event{Kind: checkpoint.EvQMPUp, OK: running})
	d.qmp.guestState(state)
	if !d.isPrimary() {
		d.post(d.w.between(rndDaemon+d.h.id, 1*ms, 20*ms), func() { d.prepared = true })
	} else if d.begin.Orphan() && (running || state == "paused" || state == "colo") {
		d.pair.step(failover.Event{Kind: failover.EvTakeOver})
	}
	d.repl.paired()
	d.qmp.poll(m, qmpPoll)
}

// poll asks an idle QEMU for its state, again and again. One that did not answer is asked at once.
func (x *watcher) poll(m *monitor, within int64) {
	d := x.d
	d.post(within, func() {
		if d.h.monitor != m || !m.open {
			return
		}
		is := ""
		m.run(qmpTimeout, func(q *qemu, answer func(error)) {
			is = q.state
			answer(nil)
		}, func(err error) {
			if err == nil {
				d.qmp.guestState(is)
				if d.isPrimary() {
					d.remember(func(st *state.State) { st.Unmerged = false })
				}
			}
			if errors.Is(err, errLate) {
				d.qmp.poll(m, 0)
				return
			}
			d.qmp.poll(m, qmpPoll)
		})
	})
}

func (x *watcher) down() {
	d := x.d
	d.w.reach("qmp down")
	d.checks.step(checkpoint.Event{Kind: checkpoint.EvQMPDown})
	d.qmp.connect(1 * ms)
}

// ran takes a STOP or a RESUME.
func (x *watcher) ran(event string, at int64) {
	d := x.d
	if d.qmp.detached {
		return
	}
	kind := checkpoint.EvStop
	if event == "RESUME" {
		kind = checkpoint.EvResume
	}
	d.checks.step(checkpoint.Event{Kind: kind, At: at})
	if event == "RESUME" {
		d.qmp.ioError, d.qmp.reported = false, false
		d.pair.step(failover.Event{Kind: failover.EvGuestHealthy})
		d.pair.step(failover.Event{Kind: failover.EvRuns})
	}
}

func (x *watcher) coloExit() {
	d := x.d
	if !d.qmp.detached {
		d.pair.step(failover.Event{Kind: failover.EvCOLOExit})
	}
}

// diskFailed: QEMU reports a disk; which replica it was may come late, or not at all.
func (x *watcher) diskFailed(secondarys bool) {
	d := x.d
	d.qmp.ioError = true
	if d.qmp.reported {
		return
	}
	late := int64(0)
	if d.w.chance(rndDaemon+d.h.id, 300) {
		late = d.w.between(rndDaemon+d.h.id, 1*ms, 1200*ms) // QUORUM_REPORT_BAD comes once a second at most
	}
	d.post(late, func() {
		if !d.qmp.ioError && late > 0 {
			return
		}
		d.qmp.reported = true
		switch {
		case d.isPrimary() && d.pair.p.State() >= failover.PrimaryFenced:
		case secondarys:
			d.repl.giveUp()
			d.pair.step(failover.Event{Kind: failover.EvReplica})
		default:
			d.pair.step(failover.Event{Kind: failover.EvGuestFailed})
		}
	})
}

// guestState makes up for an event that was missed.
func (x *watcher) guestState(state string) {
	d := x.d
	if state == "shutdown" {
		d.qmp.guestOff()
	}
	if state == "guest-panicked" {
		d.qmp.guestDead()
	}
	if state != "io-error" {
		return
	}
	q := d.h.qemu
	if !d.qmp.ioError {
		d.qmp.diskFailed(q != nil && q.attached && !q.h.disk.broken)
	}
	if d.isPrimary() && (d.pair.p.State() == failover.PrimarySolo || d.pair.p.State() == failover.PrimaryStart) && d.h.monitor != nil {
		d.h.monitor.run(qmpTimeout, func(q *qemu, answer func(error)) {
			q.retry()
			answer(nil)
		}, func(error) {})
	}
}

// guestDead: the guest panicked.
func (x *watcher) guestDead() { x.d.pair.step(failover.Event{Kind: failover.EvGuestFailed}) }

// guestOff: the guest powered off. Of the SVM that counts when the PVM has done so, too, or is
// gone.
func (x *watcher) guestOff() {
	if d := x.d; d.isPrimary() {
		d.pair.step(failover.Event{Kind: failover.EvPoweredOff})
	}
}
