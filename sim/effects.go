// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"errors"
	"math"
	"slices"
	"time"

	realarbiter "github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/checkpoint"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/state"
)

// checkStep gives the checkpoint machine an event and carries out what follows.
func (d *daemon) checkStep(ev checkpoint.Event) {
	d.checkQ = append(d.checkQ, ev)
	if d.inside {
		return
	}
	d.inside = true
	for len(d.checkQ) > 0 && d.ended == endNone {
		ev := d.checkQ[0]
		d.checkQ = d.checkQ[1:]
		var fxs []checkpoint.Effect
		if d.isPrimary() {
			fxs = d.checkP.Step(d.h.clock(), ev)
		} else {
			fxs = d.checkS.Step(d.h.clock(), ev)
		}
		for _, fx := range slices.Clone(fxs) {
			d.checkEffect(fx)
		}
	}
	d.inside = false
	if d.isPrimary() {
		if stuck := d.checkP.Stuck(); stuck != d.lifeP.InDoubt() {
			d.lifeStep(failover.Event{Kind: failover.EvDoubt, OK: stuck})
		}
	}
}

func (d *daemon) checkEffect(fx checkpoint.Effect) {
	w, l := d.w, d.loop
	w.logf("%s: checkpoint effect %d, epoch %d %s", d.h.name, fx.Op, fx.Epoch, fx.Cause)
	switch fx.Op {
	case checkpoint.OpOpen:
		w.reach("replicating")
		d.fail(l.Hold(time.Duration(heartbeat), time.Duration(lease)))
	case checkpoint.OpFreeze:
		d.fail(l.Freeze())
	case checkpoint.OpThaw:
		d.fail(l.Thaw())
	case checkpoint.OpPrepare:
		d.send(peerlink.Prepare{Epoch: fx.Epoch})
	case checkpoint.OpAbort:
		d.send(peerlink.Abort{Epoch: fx.Epoch, Cause: fx.Cause})
	case checkpoint.OpAsk:
		d.ask(fx.Epoch)
	case checkpoint.OpEpoch:
		d.fail(errors.Join(d.h.nic.SetEpoch(fx.Epoch), d.h.nic.MarkStop()))
	case checkpoint.OpCOLO:
		d.askCOLO(fx.Epoch)
	case checkpoint.OpCommit:
		inside, err := l.Commit(fx.Epoch, fx.At, fx.Stop, fx.Resume)
		d.fail(err)
		d.epoch = fx.Epoch
		d.commits++
		w.reach("commit")
		if inside {
			w.reach("commit, output inside")
			d.checkStep(checkpoint.Event{Kind: checkpoint.EvInside, Epoch: fx.Epoch})
		}
		d.tries = 0
		d.lifeStep(failover.Event{Kind: failover.EvCommitted})
	case checkpoint.OpFailed:
		w.reach("attempt failed: " + fx.Cause)

	case checkpoint.OpPark:
		d.fail(l.Park())
	case checkpoint.OpDrain:
		d.drain(fx.Epoch, 40)
	case checkpoint.OpReady:
		d.send(peerlink.Ready{Epoch: fx.Epoch})
	case checkpoint.OpBegin:
		d.epoch = fx.Epoch
		d.fail(d.h.nic.SetEpoch(fx.Epoch))
	case checkpoint.OpReset:
		d.fail(l.Reset(fx.Epoch))
	case checkpoint.OpStopped:
		d.send(peerlink.Stopped{Epoch: fx.Epoch})
	case checkpoint.OpRun:
		d.fail(l.Unpark())
	case checkpoint.OpResumed:
		d.send(peerlink.Resumed{Epoch: fx.Epoch})
	}
	d.turnWithin(0)
}

// ask has QEMU begin the checkpoint, unless the secondary is being given up.
func (d *daemon) ask(epoch uint32) {
	m := d.h.monitor
	if m == nil {
		return
	}
	paired := d.lifeP.State() == failover.PrimaryPair
	m.run(6*s, func(q *qemu, answer func(error)) {
		if !paired {
			answer(errors.New("the secondary is being given up"))
			return
		}
		q.checkpoint(answer)
	}, func(err error) {
		if d.h.monitor != m {
			return
		}
		ev := checkpoint.Event{Kind: checkpoint.EvAsked, Epoch: epoch, OK: err == nil}
		if err != nil {
			ev.Cause = err.Error()
		}
		d.checkStep(ev)
	})
}

// askCOLO asks QEMU for its mode, and P's whether its disks are replicas (R24).
func (d *daemon) askCOLO(epoch uint32) {
	m := d.h.monitor
	if m == nil {
		return
	}
	mode, replica := "", false
	m.run(qmpTimeout, func(q *qemu, answer func(error)) {
		mode, replica = q.colo, q.attached && q.nbd
		answer(nil)
	}, func(err error) {
		if d.h.monitor != m {
			return
		}
		ev := checkpoint.Event{Kind: checkpoint.EvCOLO, Epoch: epoch, OK: err == nil && mode == string(d.role), Cause: "COLO mode is " + mode}
		if ev.OK && d.isPrimary() && !replica {
			ev.OK, ev.Cause = false, "the secondary's image is no replica"
			d.post(0, func() { d.lifeStep(failover.Event{Kind: failover.EvReplica}) })
		}
		d.checkStep(ev)
	})
}

// drain waits until the SVM has read what its tap holds, for so many milliseconds.
func (d *daemon) drain(epoch uint32, left int) {
	d.post(d.w.between(rndDaemon+d.h.id, 500*us, 2*ms), func() {
		empty := d.h.qemu == nil || len(d.h.qemu.input) == 0
		if !empty && left > 0 {
			d.drain(epoch, left-1)
			return
		}
		d.checkStep(checkpoint.Event{Kind: checkpoint.EvDrained, Epoch: epoch, OK: empty, Cause: "drain the tap: it does not empty"})
	})
}

// lifeStep gives the failover machine an event and carries out what follows.
func (d *daemon) lifeStep(ev failover.Event) {
	d.lifeQ = append(d.lifeQ, ev)
	if d.inLife {
		return
	}
	d.inLife = true
	for len(d.lifeQ) > 0 && d.ended == endNone {
		ev := d.lifeQ[0]
		d.lifeQ = d.lifeQ[1:]
		ev.Echoed = d.h.nic.LastEcho()
		var fxs []failover.Effect
		if d.isPrimary() {
			fxs = d.lifeP.Step(d.h.clock(), ev)
			d.w.reach("P " + [...]string{"start", "solo", "sync", "pair", "claim", "fenced", "off"}[d.lifeP.State()])
		} else {
			fxs = d.lifeS.Step(d.h.clock(), ev)
			d.w.reach("S " + [...]string{"wait", "pair", "claim", "lease", "load", "qemu", "solo", "fenced", "off"}[d.lifeS.State()])
		}
		for _, fx := range slices.Clone(fxs) {
			if d.ended == endNone {
				d.w.logf("%s: failover event %+v effect %d, term %d", d.h.name, ev, fx.Op, fx.Term)
				d.lifeEffect(fx)
			}
		}
	}
	d.inLife = false
}

func (d *daemon) lifeEffect(fx failover.Effect) {
	l := d.loop
	switch fx.Op {
	case failover.OpClaim:
		d.claim(fx.Term)
	case failover.OpShut:
		if !d.isPrimary() {
			d.checkStep(checkpoint.Event{Kind: checkpoint.EvQuiet})
		}
		d.fail(l.Shut())
	case failover.OpTellDead:
		d.send(peerlink.Dead{})
	case failover.OpFenced:
		d.fenced()
	case failover.OpPoweredOff:
		d.send(peerlink.PoweredOff{})
		d.ended = endOff
	case failover.OpYield:
		d.send(peerlink.Yield{})
	case failover.OpSync:
		d.replicate()
	case failover.OpPair:
		d.w.check.alone = false
		d.helloCOLO = true
		cc := d.w.sc.compare()
		d.w.check.cores++
		d.fail(l.Renew(cc, d.epoch))
		d.w.mutate(d)
		d.sendEdges()
		d.checkStep(checkpoint.Event{Kind: checkpoint.EvPair, OK: true})
	case failover.OpUnpair:
		d.checkStep(checkpoint.Event{Kind: checkpoint.EvPair})
		d.stopSync()
		d.remember(func(st *state.State) { st.Covered = 0 })
	case failover.OpTellCovered:
		d.remember(func(st *state.State) { st.Covered = fx.Term })
		d.w.reach("covered")
		if d.edgesSent == d.link && d.link != nil {
			d.send(peerlink.Covered{Term: fx.Term})
		}
	case failover.OpQuiet:
		d.checkStep(checkpoint.Event{Kind: checkpoint.EvQuiet})
		d.fail(l.Quiet())
		d.askAwake()
	case failover.OpQEMU:
		d.detached = true
		d.tellQEMU()
	case failover.OpSolo:
		if d.isPrimary() {
			d.goAlone()
		} else {
			d.promote()
		}
	}
	d.turnWithin(0)
}

// claim is control's: it asks until it is known what came of it (R21 ii).
func (d *daemon) claim(term uint64) {
	from := realarbiter.Entry{Term: term, Speaker: d.h.name}
	if !d.isPrimary() {
		from.Speaker = d.h.other().name
	}
	to := realarbiter.Entry{Term: term + 1, Speaker: d.h.name}
	a, pause := d.w.arbiter, 50*ms
	known := func(now realarbiter.Entry) {
		d.lifeStep(failover.Event{Kind: failover.EvClaimed, OK: now == to, Term: now.Term})
	}
	var swap, settle func()
	again := func(f func()) {
		d.post(pause, f)
		pause = min(2*pause, 1*s)
	}
	swap = func() {
		a.swap(d.h, from, to, func(now realarbiter.Entry, _, ok bool) {
			if ok && now != from {
				known(now)
				return
			}
			again(settle)
		})
	}
	settle = func() {
		a.settle(d.h, func(now realarbiter.Entry, ok bool) {
			switch {
			case !ok:
				again(settle)
			case now == from:
				swap()
			default:
				known(now)
			}
		})
	}
	swap()
}

// readEntry fences a host that the arbiter does not name any more (R26).
func (d *daemon) readEntry() {
	d.w.arbiter.ask(d.h, func() bool { return false }, func(ok bool) {
		if now := d.w.arbiter.entry; ok {
			d.lifeStep(failover.Event{Kind: failover.EvEntry, Term: now.Term, OK: now.Speaker == d.h.name})
		}
	})
}

func (d *daemon) goAlone() {
	d.send(peerlink.Dismiss{})
	d.w.solo(d.h)
	d.fail(d.loop.Solo())
	d.w.reach("goes alone")
	d.endReplication()
	d.remember(func(*state.State) {})
}

// promote has the SVM transmit, and ends this role.
func (d *daemon) promote() {
	d.remember(func(st *state.State) { st.Unmerged = true })
	d.w.solo(d.h)
	d.w.check.replays = true
	d.fail(d.loop.TakeOver(guard))
	d.w.check.replays = false
	d.w.reach("takes over")
	d.post(d.w.between(rndDaemon+d.h.id, 1*ms, 5*ms), func() {
		d.w.port = d.h.id // announce-self
		d.ended = endPromoted
	})
}

func (d *daemon) fenced() {
	why := endFenced
	if !d.isPrimary() {
		why = endAfresh
		d.remember(func(st *state.State) { st.Covered = 0 })
	}
	m := d.h.monitor
	if m == nil {
		d.ended = why
		return
	}
	m.run(qmpTimeout, func(q *qemu, answer func(error)) {
		if q.state == "running" {
			q.drain()
			q.halt("paused")
		}
		answer(nil)
	}, func(error) { d.ended = why })
}

// askAwake finds out whether the SVM runs: then nothing is being loaded.
func (d *daemon) askAwake() {
	m, running := d.h.monitor, false
	if m == nil {
		return
	}
	m.run(qmpTimeout, func(q *qemu, answer func(error)) {
		running = q.state == "running"
		answer(nil)
	}, func(err error) {
		if err == nil && running {
			d.lifeStep(failover.Event{Kind: failover.EvRuns})
		}
	})
}

// tellQEMU is R21 (iv).
func (d *daemon) tellQEMU() {
	m := d.h.monitor
	d.tellAgain = m == nil
	if m == nil {
		return
	}
	m.run(10*s, (*qemu).takeOver, func(err error) {
		if err != nil && !m.open {
			d.tellAgain = true
			if d.h.monitor != nil && d.h.monitor != m {
				d.tellQEMU()
			}
			return
		}
		d.lifeStep(failover.Event{Kind: failover.EvQEMU, OK: err == nil})
	})
}

// takeOver is secondaryFailover, which may be ordered twice.
func (q *qemu) takeOver(answer func(error)) {
	if q.given && q.colo == "none" {
		answer(nil)
		return
	}
	q.secondaryFailover(answer)
}

// replicate has QEMU begin to replicate to S's (P).
func (d *daemon) replicate() {
	m := d.h.monitor
	resync := d.h.state.Replicated
	d.remember(func(st *state.State) { st.Replicated = true })
	peer := d.link
	gaveUp := new(bool)
	d.syncing = gaveUp
	done := func(err error) {
		d.syncing = nil
		if err != nil {
			d.tries++
			d.due = d.w.now + min(500*ms<<min(d.tries, 6), 20*s)
			d.w.logf("%s: replication did not begin: %v", d.h.name, err)
			d.w.reach("replication failed")
			if d.link == peer {
				d.send(peerlink.Dismiss{})
			}
		} else {
			d.syncedOn = peer
		}
		d.lifeStep(failover.Event{Kind: failover.EvSynced, OK: err == nil})
		if d.link != peer {
			d.paired()
		}
	}
	if m == nil {
		d.post(0, func() { done(errQMP) })
		return
	}
	to := d.h.other()
	m.run(0, func(q *qemu, answer func(error)) {
		q.replicate(to.qemu, resync, func() bool { return *gaveUp }, answer)
	}, done)
}

func (d *daemon) stopSync() {
	if d.syncing != nil {
		*d.syncing = true
	}
}

// endReplication has this host's QEMU go on without the other's, until it does.
func (d *daemon) endReplication() {
	d.ending = true
	m := d.h.monitor
	again := func(err error) {
		if err == nil || d.lifeP.State() != failover.PrimarySolo {
			d.ending = false
			d.paired()
			return
		}
		d.post(100*ms, d.endReplication)
	}
	if m == nil {
		d.post(0, func() { again(errQMP) })
		return
	}
	m.run(10*s, (*qemu).primaryFailover, again)
}

// connectQMP connects to QEMU, again and again.
func (d *daemon) connectQMP(delay int64) {
	d.post(delay, func() {
		q, pause := d.h.qemu, int64(100*ms)
		switch {
		case q == nil || !q.alive:
			d.unanswered = maxUnanswered
		case !q.works():
			d.post(qmpTimeout, func() {
				switch {
				case q.works(): // it has answered after all
				case !q.isFrozen(): // this host stood still: nothing is known
				default:
					d.unanswered++
				}
				d.judgeQMP()
				d.connectQMP(pause)
			})
			return
		default:
			d.unanswered = 0
			m := &monitor{d: d, q: q, open: true, last: d.w.now}
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
					d.qmpUp(m, running, state, mode)
				}
			})
			return
		}
		d.judgeQMP()
		d.connectQMP(pause)
	})
}

func (d *daemon) judgeQMP() {
	if d.hadQEMU && d.unanswered >= maxUnanswered {
		d.w.reach("qemu counts as dead")
		d.lifeStep(failover.Event{Kind: failover.EvQEMUDead})
	}
}

func (d *daemon) qmpUp(m *monitor, running bool, state, mode string) {
	d.hadQEMU, d.unanswered, d.colo = true, 0, mode
	if d.tellAgain {
		d.tellQEMU()
	}
	d.checkStep(checkpoint.Event{Kind: checkpoint.EvQMPUp, OK: running})
	d.guestState(state)
	if !d.isPrimary() {
		d.post(d.w.between(rndDaemon+d.h.id, 1*ms, 20*ms), func() { d.prepared = true })
	} else if d.begin.Orphan() && (running || state == "paused" || state == "colo") {
		d.lifeStep(failover.Event{Kind: failover.EvTakeOver})
	}
	d.paired()
	d.poll(m)
}

// poll asks an idle QEMU for its state.
func (d *daemon) poll(m *monitor) {
	d.post(qmpPoll, func() {
		if d.h.monitor != m || !m.open {
			return
		}
		is := ""
		m.run(qmpTimeout, func(q *qemu, answer func(error)) {
			is = q.state
			answer(nil)
		}, func(err error) {
			if err == nil {
				d.guestState(is)
				if d.isPrimary() {
					d.remember(func(st *state.State) { st.Unmerged = false })
				}
			}
		})
		d.poll(m)
	})
}

func (d *daemon) qmpDown() {
	d.w.reach("qmp down")
	d.checkStep(checkpoint.Event{Kind: checkpoint.EvQMPDown})
	d.connectQMP(1 * ms)
}

// ran takes a STOP or a RESUME.
func (d *daemon) ran(event string, at int64) {
	if d.detached {
		return
	}
	kind := checkpoint.EvStop
	if event == "RESUME" {
		kind = checkpoint.EvResume
	}
	d.checkStep(checkpoint.Event{Kind: kind, At: at})
	if event == "RESUME" {
		d.ioError, d.reported = false, false
		d.lifeStep(failover.Event{Kind: failover.EvGuestHealthy})
		d.lifeStep(failover.Event{Kind: failover.EvRuns})
	}
}

func (d *daemon) coloExit() {
	if !d.detached {
		d.lifeStep(failover.Event{Kind: failover.EvCOLOExit})
	}
}

// diskFailed: QEMU reports a disk; which replica it was may come late, or not at all.
func (d *daemon) diskFailed(secondarys bool) {
	d.ioError = true
	if d.reported {
		return
	}
	late := int64(0)
	if d.w.chance(rndDaemon+d.h.id, 300) {
		late = d.w.between(rndDaemon+d.h.id, 1*ms, 1200*ms) // QUORUM_REPORT_BAD comes once a second at most
	}
	d.post(late, func() {
		if !d.ioError && late > 0 {
			return
		}
		d.reported = true
		switch {
		case d.isPrimary() && d.lifeP.State() >= failover.PrimaryFenced:
		case secondarys:
			d.stopSync()
			d.lifeStep(failover.Event{Kind: failover.EvReplica})
		default:
			d.lifeStep(failover.Event{Kind: failover.EvGuestFailed})
		}
	})
}

// guestState makes up for an event that was missed.
func (d *daemon) guestState(state string) {
	if state != "io-error" {
		return
	}
	q := d.h.qemu
	if !d.ioError {
		d.diskFailed(q != nil && q.attached && !q.h.disk.broken)
	}
	if d.isPrimary() && (d.lifeP.State() == failover.PrimarySolo || d.lifeP.State() == failover.PrimaryStart) && d.h.monitor != nil {
		d.h.monitor.run(qmpTimeout, func(q *qemu, answer func(error)) {
			q.retry()
			answer(nil)
		}, func(error) {})
	}
}

const never = math.MaxInt64
