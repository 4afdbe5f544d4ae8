// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"log/slog"
	"math"
	"math/rand/v2"
	"time"

	"github.com/lockstep-ft/lockstep/compare"
	realarbiter "github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/checkpoint"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/nicloop"
	"github.com/lockstep-ft/lockstep/control/state"
)

// How the daemons are set: as by default, but that some waits are shorter.
const (
	heartbeat   = 50 * ms
	lease       = 400 * ms
	peerTimeout = 500 * ms
	silence     = 500 * ms // of the control link
	pingEvery   = 50 * ms
	rejoin      = 3 * s
	sweepEvery  = 1 * s
	entryEvery  = 2 * s
	retryFirst  = 100 * ms
	retryMax    = 2 * s
	guard       = 1 << 24
)

// end is why a daemon's role ends.
type end uint8

const (
	endNone     end = iota
	endPromoted     // it goes on as the primary
	endAfresh       // a secondary that follows nobody begins again
	endFenced       // the process ends
	endOff          // the guest powered off
	endFailed       // an error that package control takes for the end
)

// daemon is the shell around the machines, as package control is: it hands them events and
// carries out their effects. One role of one process.
type daemon struct {
	w     *world
	h     *host
	role  datapath.Role
	alive bool
	frozen
	deferred []func() // what came while it was frozen
	ended    end

	loop    *nicloop.Loop
	turning alarm
	turnAt  int64 // when that is
	tickAt  alarm
	started bool

	checks checkpoints
	pair   pair
	repl   replicator
	qmp    watcher

	keyGen, epoch uint32
	keys          compare.Keys
	begin         failover.Begin
	recovered     bool

	link      *session
	linkUp    bool
	sessions  int
	peerWhole bool
	prepared  bool // S: QEMU waits for a primary's
}

// newDaemon is a process that does not know its role yet.
func (h *host) newDaemon(role datapath.Role) *daemon {
	d := &daemon{w: h.w, h: h, role: role, alive: true}
	d.checks.d, d.pair.d, d.repl.d, d.qmp.d = d, d, d, d
	d.turning.do, d.tickAt.do = d.turn, func() { d.do(d.tick) }
	h.daemon = d
	return d
}

func (d *daemon) isPrimary() bool { return d.role == datapath.RolePrimary }

// runs: it is a process that gets CPU time.
func (d *daemon) runs() bool { return d.alive && !d.isFrozen() && d.h.works() }

// post has the daemon do something when delay has passed; one that is frozen does it when it
// goes on.
func (d *daemon) post(delay int64, f func()) {
	d.w.after(delay, func() { d.do(f) })
}

func (d *daemon) do(f func()) {
	switch {
	case d == nil || !d.alive || d.ended != endNone:
	case !d.runs():
		d.deferred = append(d.deferred, f)
	default:
		f()
		d.settle()
	}
}

// wake: it is not frozen any more.
func (d *daemon) wake() {
	if !d.runs() {
		return
	}
	due := d.deferred
	d.deferred = nil
	for _, f := range due {
		d.do(f)
	}
	d.do(func() {})
	d.turnWithin(0)
}

// settle follows each event: the machines' deadlines, and the end of the role.
func (d *daemon) settle() {
	if d.ended != endNone {
		d.endRole()
		return
	}
	if d.loop == nil {
		return // it has no role yet
	}
	next := int64(math.MaxInt64)
	if d.isPrimary() {
		next = min(d.checks.p.NextDeadline(), d.pair.p.NextDeadline())
	} else {
		next = min(d.checks.s.NextDeadline(), d.pair.s.NextDeadline())
	}
	if next == math.MaxInt64 {
		d.w.unset(&d.tickAt)
		return
	}
	d.w.set(&d.tickAt, max(d.h.until(next), 1*us))
}

func (d *daemon) tick() {
	d.checks.step(checkpoint.Event{Kind: checkpoint.EvTick})
	d.pair.step(failover.Event{Kind: failover.EvTick})
}

// turnWithin has the NIC's loop turn within delay.
func (d *daemon) turnWithin(delay int64) {
	at := d.w.now + delay
	if !d.alive || d.loop == nil || d.turnAt > d.w.now && d.turnAt <= at {
		return
	}
	d.turnAt = at
	d.w.set(&d.turning, delay)
}

func (d *daemon) turn() {
	d.turnAt = 0
	if !d.runs() || d.ended != endNone || !d.started {
		return
	}
	if err := d.loop.Turn(0); err != nil {
		d.fail(err)
	}
	bounded(d.w, d.h)
	if at := d.loop.Deadline(); at != math.MaxInt64 {
		d.turnWithin(max(d.h.until(at), 1*us))
	}
	d.settle()
}

// fail is a data path that does not follow: the end of the daemon.
func (d *daemon) fail(err error) {
	if err != nil && d.ended == endNone {
		d.w.failf("data path", "%s: %v", d.h.name, err)
		d.ended = endFailed
	}
}

// start begins a role: what control.New and Run do.
func (h *host) start(begin failover.Begin) {
	d := h.newDaemon(begin.Role)
	h.replaced = 0
	d.begin, d.qmp.hadQEMU, d.qmp.colo = begin, begin.HasGuest(), "none"
	d.w.reach("role " + string(begin.Role))
	d.w.logf("%s: daemon begins as %s, %+v", h.name, d.role, begin)
	switch found := h.pinned(); {
	case begin.Discard || h.nic == nil:
		h.newNIC(d.role)
	case found.Role == d.role:
		h.nic = h.nic.Reopen()
	default:
		nic, err := h.nic.Promote()
		d.fail(err)
		h.dropNIC()
		h.nic = nic
	}
	keys, err := compare.NewKeys(rand.NewChaCha8([32]byte(d.w.seed())))
	d.keys = *keys
	d.fail(err)
	if r := h.nic.Recovered(); r != nil {
		d.keyGen, d.epoch = r.Term, r.Epoch
		if !begin.Discard && r.Digest != (compare.Keys{}) {
			d.recovered, d.keys = true, r.Digest
		}
	}
	cfg := checkpoint.DefaultConfig()
	cfg.QMP, cfg.Period, cfg.MinInterval = true, h.w.sc.Period, int64(20*time.Millisecond)
	h.w.sc.periodic(&cfg)
	cfg.FirstEpoch = max(cfg.FirstEpoch, d.epoch)
	d.epoch = cfg.FirstEpoch
	life := failover.DefaultConfig(time.Duration(peerTimeout), time.Duration(lease), time.Duration(rejoin))
	life.Doubt = 3 * s
	cfg.Mutate(h.w.mutation)
	life.Mutate(h.w.mutation)
	log, cc := slog.New(slog.DiscardHandler), h.w.sc.compare()
	cc.Epoch = d.epoch
	if d.isPrimary() {
		d.w.check.cores++
		d.pair.p = begin.Primary(life, h.clock())
		cfg.Unpaired = d.pair.p.State() != failover.PrimaryPair
		d.checks.p = checkpoint.NewPrimary(cfg)
		d.loop = nicloop.NewPrimary(0, h.nic, log, d.want, cc, d.keys)
	} else {
		d.pair.s = begin.Secondary(life, h.name, h.clock())
		d.checks.s = checkpoint.NewSecondary(cfg)
		d.loop = nicloop.NewSecondary(0, h.nic, log, h.w.sc.copies(), d.keys)
		if d.recovered {
			d.checks.s.Step(0, checkpoint.Event{Kind: checkpoint.EvRecovered, OK: h.nic.Recovered().Mode == datapath.ModeRun})
		}
	}
	h.w.mutate(d)
	switch {
	case d.recovered:
		d.loop.Restore(2 * time.Hour)
	case d.isPrimary():
		d.fail(d.loop.OwnKeys(datapath.Session{Term: d.keyGen, Epoch: d.epoch, PeerMAC: make([]byte, 6), Digest: d.keys}))
	}
	d.ensureGuest()
	d.post(0, func() {
		d.started = true
		d.checks.step(checkpoint.Event{Kind: checkpoint.EvTick})
		if begin.ResumesTakeOver() {
			d.pair.step(failover.Event{Kind: failover.EvTakeOver})
		}
		if d.recovered && d.ended == endNone {
			d.fail(d.loop.RestoreMode())
		}
		d.turnWithin(0)
	})
	d.qmp.connect(0)
	d.every(sweepEvery, func() {
		if h.pinned().Mode != datapath.ModeQuiet { // nicloop's Sweep
			_, err := h.nic.Sweep(cc.Linger, cc.Idle)
			d.fail(err)
		}
	})
	if d.isPrimary() {
		d.every(entryEvery, d.pair.readEntry)
	} else {
		d.connect(retryFirst)
	}
}

// every does f again and again.
func (d *daemon) every(interval int64, f func()) {
	d.post(interval, func() {
		f()
		d.every(interval, f)
	})
}

// ensureGuest has a QEMU there: control's ensureGuest.
func (d *daemon) ensureGuest() {
	h := d.h
	alive := h.qemu != nil && h.qemu.alive
	switch {
	case alive && d.begin.Ends():
		h.qemu.die()
	case alive:
		d.qmp.hadQEMU = true
		return
	case d.qmp.hadQEMU:
		return // it died; the monitor finds that out
	}
	if h.state.Unmerged {
		if d.isPrimary() {
			h.disk.merge()
		}
		d.remember(func(st *state.State) { st.Unmerged = false })
	}
	h.startQEMU(!d.isPrimary())
	d.qmp.hadQEMU = true
}

// kill ends the process at once. Its host's kernel ends its connections, if it lives.
func (d *daemon) kill(hostLives bool) {
	if !d.alive {
		return
	}
	d.alive = false
	d.w.logf("%s: daemon ends", d.h.name)
	if d.ended != endPromoted && d.ended != endAfresh {
		d.w.arbiter.own[d.h.id] = realarbiter.Entry{} // so does its process
	}
	if d.link != nil {
		d.link.drop(d, hostLives)
	}
	if m := d.h.monitor; m != nil && m.d == d {
		m.open = false
		d.h.monitor = nil
	}
	if d.h.daemon == d {
		d.h.daemon = nil
	}
}

// endRole follows the machines' wish to end: what cmd/lockstep's runRoles does.
func (d *daemon) endRole() {
	h, why := d.h, d.ended
	d.w.reach([...]string{"", "ends: promoted", "ends: afresh", "ends: fenced", "ends: off", "ends: failed"}[why])
	d.kill(true)
	role := d.role
	switch why {
	case endPromoted:
		h.boot(datapath.RolePrimary, false)
	case endAfresh:
		h.w.after(200*ms, func() {
			if h.alive && h.daemon == nil {
				h.boot(role, true)
			}
		})
	}
}

// boot is `lockstep run`: it asks the arbiter, and begins the role that comes of it (R19).
// afresh: what is found belongs to an SVM that was given up.
func (h *host) boot(role datapath.Role, afresh bool) {
	if h.state.Off {
		h.w.reach("stays off")
		return
	}
	b := h.newDaemon(role)
	var ask func()
	ask = func() {
		h.w.arbiter.settle(h, func(entry realarbiter.Entry, ok bool) {
			if !ok {
				b.post(200*ms, ask)
				return
			}
			if role == datapath.RolePrimary && entry == (realarbiter.Entry{}) {
				h.w.arbiter.swap(h, entry, realarbiter.Entry{Term: 1, Speaker: h.name}, func(realarbiter.Entry, bool, bool) { ask() })
				return
			}
			found, st := datapath.Pinned{}, h.state
			running := h.qemu != nil && h.qemu.alive
			if running && !afresh {
				found = h.pinned()
			}
			if afresh {
				st.Covered = 0
			}
			begin, err := failover.Decide(role, h.name, h.other().name, st, entry, found)
			if err == nil {
				err = begin.Meets(running)
			}
			b.alive, h.daemon = false, nil
			if err != nil {
				h.w.logf("%s: does not begin: %v", h.name, err)
				h.w.reach("does not begin")
				return
			}
			h.start(begin)
		})
	}
	b.post(0, ask)
}

// remember changes what is on disk.
func (d *daemon) remember(change func(*state.State)) {
	st := &d.h.state
	st.Role = string(d.role)
	if d.isPrimary() {
		st.Term = d.pair.p.Term()
	} else {
		st.Term = d.pair.s.Term()
	}
	change(st)
}

// want is compare's request for a checkpoint.
func (d *daemon) want(r nicloop.Request) {
	d.w.wanted(d.h, r.Flow, r.Reason)
	d.post(0, func() {
		d.checks.step(checkpoint.Event{Kind: checkpoint.EvWant, Cause: r.Reason, Diverged: r.Diverged})
	})
}
