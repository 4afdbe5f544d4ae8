// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"errors"
	"slices"

	realarbiter "github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/checkpoint"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/state"
)

// pair carries out what the failover machine decides.
type pair struct {
	d         *daemon
	p         *failover.Primary // one of the two
	s         *failover.Secondary
	queue     []failover.Event
	stepping  bool
	tellAgain bool // S: order QEMU to take over once it is connected
}

// step gives the failover machine an event and carries out what follows.
func (p *pair) step(ev failover.Event) {
	d := p.d
	d.pair.queue = append(d.pair.queue, ev)
	if d.pair.stepping {
		return
	}
	d.pair.stepping = true
	for len(d.pair.queue) > 0 && d.ended == endNone {
		ev := d.pair.queue[0]
		d.pair.queue = d.pair.queue[1:]
		ev.Echoed = d.h.nic.LastEcho()
		var fxs []failover.Effect
		if d.isPrimary() {
			fxs = d.pair.p.Step(d.h.clock(), ev)
			d.w.reach([...]string{"P start", "P solo", "P sync", "P pair", "P claim", "P fenced", "P off"}[d.pair.p.State()])
		} else {
			fxs = d.pair.s.Step(d.h.clock(), ev)
			d.w.reach([...]string{"S wait", "S pair", "S claim", "S lease", "S load", "S qemu", "S solo", "S fenced", "S off"}[d.pair.s.State()])
		}
		for _, fx := range slices.Clone(fxs) {
			if d.ended == endNone {
				d.w.logf("%s: failover event %+v effect %d, term %d", d.h.name, ev, fx.Op, fx.Term)
				d.pair.effect(fx)
			}
		}
	}
	d.pair.stepping = false
}

func (p *pair) effect(fx failover.Effect) {
	d := p.d
	l := d.loop
	switch fx.Op {
	case failover.OpClaim:
		d.pair.claim(fx.Term)
	case failover.OpShut:
		if !d.isPrimary() {
			d.checks.step(checkpoint.Event{Kind: checkpoint.EvQuiet})
		}
		d.fail(l.Shut())
	case failover.OpTellDead:
		d.send(peerlink.Dead{})
	case failover.OpFenced:
		d.pair.fenced()
	case failover.OpPoweredOff:
		if d.isPrimary() {
			d.send(peerlink.PoweredOff{})
			d.remember(func(st *state.State) { st.Off = true })
		}
		d.w.reach("powered off")
		if m := d.h.monitor; m != nil {
			m.run(qmpTimeout, func(q *qemu, answer func(error)) { q.die() }, func(error) { d.ended = endOff })
			break
		}
		d.ended = endOff
	case failover.OpYield:
		if !p.guestGone() {
			d.send(peerlink.Yield{})
		}
	case failover.OpSync:
		d.repl.begin()
	case failover.OpPair:
		d.w.paired(d.h)
		d.repl.helloCOLO = true
		cc := d.w.sc.compare()
		d.w.check.cores++
		d.fail(l.Renew(cc, d.epoch))
		d.w.mutate(d)
		d.repl.sendEdges()
		d.checks.step(checkpoint.Event{Kind: checkpoint.EvPair, OK: true})
	case failover.OpUnpair:
		d.checks.step(checkpoint.Event{Kind: checkpoint.EvPair})
		d.repl.giveUp()
		if !d.pair.p.Covered() {
			d.remember(func(st *state.State) { st.Covered = 0 })
		}
	case failover.OpTellCovered:
		d.remember(func(st *state.State) { st.Covered = fx.Term })
		d.w.reach("covered")
		if d.repl.edgesSent == d.link && d.link != nil {
			d.send(peerlink.Covered{Term: fx.Term})
		}
	case failover.OpQuiet:
		d.checks.step(checkpoint.Event{Kind: checkpoint.EvQuiet})
		d.fail(l.Quiet())
		d.qmp.bePatient()
		d.pair.askAwake()
	case failover.OpQEMU:
		d.qmp.detached = true
		d.pair.tellQEMU()
	case failover.OpSolo:
		if d.isPrimary() {
			d.pair.goAlone()
		} else {
			d.pair.promote()
		}
	}
	d.turnWithin(0)
}

// guestGone reports whether the process that the monitor's connection was to has ended.
func (p *pair) guestGone() bool {
	d := p.d
	gone := d.qmp.process != nil && !d.qmp.process.alive
	if gone {
		d.w.reach("qemu found dead")
		d.post(0, func() { d.pair.step(failover.Event{Kind: failover.EvQEMUDead}) })
	}
	return gone
}

// claim is control's: it asks until it is known what came of it (R21 ii).
func (p *pair) claim(term uint64) {
	d := p.d
	if p.guestGone() {
		return
	}
	from := realarbiter.Entry{Term: term, Speaker: d.h.name}
	if !d.isPrimary() {
		from.Speaker = d.h.other().name
	}
	to := realarbiter.Entry{Term: term + 1, Speaker: d.h.name}
	a, pause := d.w.arbiter, 50*ms
	known := func(now realarbiter.Entry) {
		d.pair.step(failover.Event{Kind: failover.EvClaimed, OK: now == to, Term: now.Term})
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
func (p *pair) readEntry() {
	d := p.d
	d.w.arbiter.ask(d.h, func() bool { return false }, func(ok bool) {
		if now := d.w.arbiter.of(d.h); ok {
			if now.Term > d.pair.p.Term() && now.Speaker != d.h.name && d.pair.p.State() != failover.PrimaryClaim {
				d.h.replaced = d.w.now
			}
			d.pair.step(failover.Event{Kind: failover.EvEntry, Term: now.Term, OK: now.Speaker == d.h.name})
		}
	})
}

func (p *pair) goAlone() {
	d := p.d
	d.send(peerlink.Dismiss{})
	d.w.solo(d.h)
	d.fail(d.loop.Solo())
	d.w.reach("goes alone")
	d.repl.end()
	d.remember(func(st *state.State) { st.Alone = !st.Replicated })
}

// promote has the SVM transmit, and ends this role.
func (p *pair) promote() {
	d := p.d
	d.remember(func(st *state.State) { st.Unmerged = true })
	d.w.solo(d.h)
	d.w.check.replays = true
	d.fail(d.loop.TakeOver(guard, d.checks.s.Doubt()))
	d.w.check.replays = false
	d.w.reach("takes over")
	d.post(d.w.between(rndDaemon+d.h.id, 1*ms, 5*ms), func() {
		d.w.port = d.h.id // announce-self
		d.ended = endPromoted
	})
}

func (p *pair) fenced() {
	d := p.d
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
	m.patience = 1
	m.run(qmpTimeout, func(q *qemu, answer func(error)) {
		if q.state == "running" {
			q.drain()
			q.halt("paused")
		}
		answer(nil)
	}, func(error) { d.ended = why })
}

// askAwake finds out whether the SVM runs: then nothing is being loaded.
func (p *pair) askAwake() {
	d := p.d
	m, running := d.h.monitor, false
	if m == nil {
		return
	}
	m.run(qmpTimeout, func(q *qemu, answer func(error)) {
		q.leave()
		running = q.state == "running"
		answer(nil)
	}, func(err error) {
		switch {
		case err != nil:
		case running:
			d.pair.step(failover.Event{Kind: failover.EvRuns})
		default:
			d.pair.step(failover.Event{Kind: failover.EvStands})
		}
	})
}

// tellQEMU is R21 (iv).
func (p *pair) tellQEMU() {
	d := p.d
	m := d.h.monitor
	d.pair.tellAgain = m == nil
	if m == nil {
		return
	}
	m.run(10*s, (*qemu).takeOver, func(err error) {
		if err != nil && (!m.open || errors.Is(err, errLate)) {
			d.pair.tellAgain = true
			if d.h.monitor != nil {
				d.pair.tellQEMU()
			}
			return
		}
		d.pair.step(failover.Event{Kind: failover.EvQEMU, OK: err == nil})
	})
}

// order is an operator's `lockstep failover` (control's orderFailover).
func (p *pair) order(force bool) {
	d := p.d
	if d.isPrimary() {
		if s := d.pair.p.State(); s == failover.PrimaryStart || s == failover.PrimaryPair {
			d.pair.step(failover.Event{Kind: failover.EvTakeOver})
		}
		return
	}
	loaded := d.h.qemu != nil && d.h.qemu.colo == "secondary" && d.h.qemu.state != "inmigrate"
	if d.pair.s.State() != failover.SecondaryPair || !d.pair.s.Covered() && !(force && loaded) || !d.pair.s.MayTakeOver(d.h.nic.LastEcho(), true) {
		return
	}
	if !d.pair.s.Covered() {
		d.w.forced = true
	}
	d.pair.step(failover.Event{Kind: failover.EvTakeOver, OK: force})
}

// takeOver is secondaryFailover, which may be ordered twice.
func (q *qemu) takeOver(answer func(error)) {
	if q.given && q.colo == "none" {
		answer(nil)
		return
	}
	q.secondaryFailover(answer)
}
