// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"github.com/lockstep-ft/lockstep/control/checkpoint"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/failover"
)

// action is one kind of thing that may happen.
type action struct {
	fatal bool // nobody may be left who serves after two of these
	lasts bool // it ends after a while
	do    func(w *world, h *host, a *Action)
}

// lasting is an action that one function begins and another ends.
func lasting(fatal bool, begin, end func(w *world, h *host)) action {
	return action{fatal, true, func(w *world, h *host, a *Action) {
		begin(w, h)
		w.after(a.For, func() { end(w, h) })
	}}
}

// counter is one that is counted up and down.
func counter(fatal bool, at func(w *world, h *host) *int) action {
	return lasting(fatal, func(w *world, h *host) { *at(w, h)++ }, func(w *world, h *host) { *at(w, h)-- })
}

func once(fatal bool, do func(w *world, h *host)) action {
	return action{fatal, false, func(w *world, h *host, _ *Action) { do(w, h) }}
}

// ofDaemon is something that an operator, or nobody, does to a daemon that runs.
func ofDaemon(w *world, h *host, f func(d *daemon)) {
	if d := h.daemon; d != nil && d.started {
		d.do(func() { f(d) })
	}
}

// actions are all kinds, by name.
var actions = map[string]action{
	"kill-qemu": once(true, func(_ *world, h *host) {
		if h.qemu != nil {
			h.qemu.die()
		}
	}),
	"kill-host": {true, true, func(w *world, h *host, a *Action) {
		h.lose()
		w.after(a.For, func() { h.powerOn() })
	}},
	"kill-daemon": {false, true, func(w *world, h *host, a *Action) {
		if d := h.daemon; d != nil && d.alive {
			role := d.role
			// Known: the daemon after this one cannot tell whether the SVM has become a copy of
			// the PVM meanwhile. The next checkpoint makes it right; a takeover before that may
			// break connections.
			w.excused = w.excused || h.pinned().Mode == datapath.ModePark
			d.kill(true)
			w.after(a.For, func() {
				if h.alive && h.daemon == nil {
					h.boot(role, false)
				}
			})
		}
	}},
	"freeze-host": lasting(true, func(_ *world, h *host) { h.freeze() }, func(_ *world, h *host) { h.thaw() }),
	"freeze-daemon": {true, true, func(w *world, h *host, a *Action) {
		if d := h.daemon; d != nil {
			d.reasons++
			w.after(a.For, func() {
				d.reasons--
				d.wake()
			})
		}
	}},
	"freeze-qemu": {true, true, func(w *world, h *host, a *Action) {
		if q := h.qemu; q != nil {
			q.reasons++
			w.after(a.For, func() {
				if q.reasons--; q.running() {
					q.wake(0)
				}
			})
		}
	}},
	"cut-peer":    counter(false, func(w *world, _ *host) *int { return &w.cut.peer }),
	"cut-control": counter(false, func(w *world, _ *host) *int { return &w.cut.control }),
	"cut-qemu":    counter(true, func(w *world, _ *host) *int { return &w.cut.qemu }),
	"cut-all": lasting(true, func(w *world, _ *host) { w.cut.peer++; w.cut.control++; w.cut.qemu++ },
		func(w *world, _ *host) { w.cut.peer--; w.cut.control--; w.cut.qemu-- }),
	"cut-arbiter":   counter(false, func(w *world, h *host) *int { return &w.arbiter.cut[h.id] }),
	"arbiter-out":   counter(false, func(w *world, _ *host) *int { return &w.arbiter.out }),
	"arbiter-loses": once(false, func(w *world, h *host) { w.arbiter.lose[h.id]++ }),
	"arbiter-late":  once(false, func(w *world, h *host) { w.arbiter.late[h.id]++ }),
	"nbd-reset": once(true, func(_ *world, h *host) {
		if h.qemu != nil {
			h.qemu.nbd = false
		}
	}),
	"migration-reset": once(true, func(_ *world, h *host) {
		if h.qemu != nil {
			h.qemu.unlink()
		}
	}),
	"disk-fails": {true, true, func(w *world, h *host, a *Action) {
		d := h.disk
		d.broken = true
		w.after(a.For, func() { d.broken = false })
	}},
	"stop-guest": {true, true, func(w *world, h *host, a *Action) {
		q := h.qemu
		if q == nil || !q.works() || q.guest == nil || q.running() && !q.drain() {
			return
		}
		if d := h.daemon; d != nil && d.checks.s != nil && h.other().daemon == nil {
			if word, _ := d.checks.s.State(); word == "checkpointing" {
				return // S takes it for the checkpoint's, and P is not there to say that it is not (docs/TCP.md)
			}
		}
		if q.running() {
			q.unasked = true
			q.halt("paused")
		}
		w.after(a.For, func() { // cont goes on with a guest that lockstep has paused, too
			if q.works() && q.state == "paused" {
				q.resume()
			}
		})
	}},
	"cont-guest": once(false, func(_ *world, h *host) { // of lockstep's own pause, too
		if q := h.qemu; q != nil && q.works() && q.state == "paused" {
			q.resume()
		}
	}),
	panicGuest: once(false, func(w *world, h *host) {
		q, other := h.qemu, h.other().qemu
		if !w.covered(h) || !q.running() || !q.works() || q.attempt+other.attempt > 0 || other.received != nil || !q.drain() {
			return // of a guest that panics in mid-checkpoint the copy has panicked, too
		}
		w.fatal++
		w.saved = w.saved || w.kills == 0
		w.kills++
		q.panics()
	}),
	"power-off": once(false, func(w *world, h *host) { w.powerOff(h) }),
	"start-guest": once(false, func(_ *world, h *host) { // lockstep start
		if h.daemon == nil {
			h.state.Off = false
		}
	}),
	"arbiter-edit": once(true, func(w *world, h *host) { w.arbiter.edit(h) }),
	"checkpoint": once(false, func(w *world, h *host) {
		ofDaemon(w, h, func(d *daemon) {
			if d.isPrimary() {
				d.checks.step(checkpoint.Event{Kind: checkpoint.EvWant, Cause: "an operator asked for it"})
			}
		})
	}),
	"rotate": once(false, func(w *world, h *host) { ofDaemon(w, h, (*daemon).rotate) }),
	"failover": once(true, func(w *world, h *host) {
		ofDaemon(w, h, func(d *daemon) { d.pair.order(false) })
	}),
	"failover-force": once(true, func(w *world, h *host) {
		ofDaemon(w, h, func(d *daemon) { d.pair.order(true) })
	}),
	"drop-link": once(false, func(w *world, h *host) {
		ofDaemon(w, h, func(d *daemon) { d.unlink(d.link, false) })
	}),
	"start-primary":   once(true, func(_ *world, h *host) { h.startDaemon(datapath.RolePrimary) }),
	clientAborts:      once(false, func(w *world, _ *host) { w.client.abort() }),
	coveredDeath:      once(false, func(w *world, _ *host) { w.killCovered() }),
	"start-secondary": once(false, func(_ *world, h *host) { h.startDaemon(datapath.RoleSecondary) }),
}

// startDaemon is an operator's, who has found that none runs.
func (h *host) startDaemon(role datapath.Role) {
	if h.alive && h.daemon == nil {
		h.boot(role, false)
	}
}

// powerOn boots a host that was lost.
func (h *host) powerOn() {
	if !h.alive {
		h.alive = true
		h.w.logf("host %s is back", h.name)
	}
}

func (w *world) act(a *Action) {
	k, ok := actions[a.Kind]
	if !ok {
		w.failf("scenario", "no action is called %q", a.Kind)
		return
	}
	if w.now >= healed-s {
		return // what it waited for came too late
	}
	if a.On != "" && k.lasts {
		b := *a
		b.For = min(a.For, healed-s-w.now)
		a = &b
	}
	h := w.hosts[a.Host]
	if k.fatal {
		w.fatal++
	}
	w.apart = w.apart || !clean[a.Kind]
	w.logf("--- %s %s", a.Kind, h.name)
	w.reach("action " + a.Kind)
	if kills[a.Kind] {
		if w.kills++; w.kills == 1 {
			w.saved = w.covered(h)
		}
	}
	k.do(w, h, a)
}

// kills are the actions after which a guest may be lost. A pair that is covered survives one.
var kills = map[string]bool{
	"kill-qemu": true, "kill-host": true, "freeze-host": true, "freeze-qemu": true, "disk-fails": true, "stop-guest": true,
	"failover": true, "failover-force": true, // P goes on alone from then on
	"arbiter-edit": true,
}

// clean are the actions after which a host that counts as dead is.
var clean = map[string]bool{"kill-host": true, "kill-qemu": true, "checkpoint": true, "rotate": true, "power-off": true, "start-guest": true}

// covered reports whether there are two guests, of which the other host's can do without h's.
func (w *world) covered(h *host) bool {
	p, s := w.hosts[w.check.speaker], w.hosts[1-w.check.speaker]
	if d := p.daemon; w.check.alone || d != nil && d.pair.p != nil && d.pair.p.State() != failover.PrimaryPair {
		return false // P goes on alone, or is about to
	}
	if d := s.daemon; h == s && d != nil && d.pair.s != nil && d.pair.s.State() != failover.SecondaryPair {
		return false // S is taking over: P is stopped, or will be
	}
	if s.state.Covered != w.arbiter.of(p).Term {
		return false // P has won the arbiter, whether its daemon knows or not
	}
	if q := s.qemu; q != nil && q.left > 0 && w.now > q.left+2*peerTimeout-5*ms {
		return false // S gives its SVM up, which follows nobody, as soon as it hears of P once more: from then on P is alone
	}
	return p.qemu != nil && p.qemu.alive && s.qemu != nil && s.qemu.alive && s.daemon != nil && s.daemon.pair.s != nil && s.daemon.pair.s.Covered()
}

// lost: another guest runs.
func (w *world) lost() {
	w.guestLost = true
	for _, a := range w.client.conns {
		a.lost = a.lost || a.begun // it may wait for ever
	}
	for _, q := range w.client.questioners {
		q.count = 0
	}
	clear(w.check.datagrams)
	if w.off {
		return
	}
	if w.kills == 0 || w.kills == 1 && w.saved {
		w.failf("guest lost", "another guest runs, after %d deaths", w.kills)
	}
}

// mend is what an operator does in the end: every host is on, and has a daemon. The one that
// the arbiter names serves.
func (w *world) mend() {
	for _, h := range w.hosts {
		h.powerOn()
		if h.daemon != nil || !h.works() {
			continue
		}
		h.state.Off = false
		role := datapath.RoleSecondary
		if e := w.arbiter.of(h); e.Speaker == h.name || w.sc.Arbiter != arbiterNone && e.Speaker == "" && h.id == 0 ||
			w.sc.Arbiter == arbiterNone && w.check.speaker == h.id {
			role = datapath.RolePrimary
		}
		h.boot(role, false)
	}
}
