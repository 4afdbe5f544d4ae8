// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"github.com/lockstep-ft/lockstep/control/checkpoint"
	"github.com/lockstep-ft/lockstep/control/datapath"
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
		if q == nil || !q.works() || !q.running() || !q.drain() {
			return
		}
		q.halt("paused")
		w.after(a.For, func() {
			if q.works() && q.state == "paused" && !q.paused && q.attempt == 0 {
				q.resume()
			}
		})
	}},
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
	h := w.hosts[a.Host]
	w.logf("--- %s %s", a.Kind, h.name)
	w.reach("action " + a.Kind)
	if kills[a.Kind] {
		if w.kills++; w.kills == 1 {
			w.saved = w.covered()
		}
	}
	k.do(w, h, a)
}

// kills are the actions after which a guest may be lost. A pair that is covered survives one.
var kills = map[string]bool{
	"kill-qemu": true, "kill-host": true, "freeze-host": true, "freeze-qemu": true, "disk-fails": true, "failover-force": true, "stop-guest": true,
}

// covered reports whether there are two guests, each of which can do without the other.
func (w *world) covered() bool {
	p, s := w.hosts[w.check.speaker], w.hosts[1-w.check.speaker]
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
	if w.kills == 0 || w.kills == 1 && w.saved {
		w.failf("guest lost", "another guest runs, after %d deaths", w.kills)
	}
}

// fatal counts the actions that may each cost a host.
func (sc *Scenario) fatal() (n int) {
	for _, a := range sc.Actions {
		if actions[a.Kind].fatal {
			n++
		}
	}
	return n
}

// mend is what an operator does in the end: every host is on, and has a daemon. The one that
// the arbiter names serves.
func (w *world) mend() {
	for _, h := range w.hosts {
		h.powerOn()
		if h.daemon != nil || !h.works() {
			continue
		}
		role := datapath.RoleSecondary
		if w.arbiter.entry.Speaker == h.name {
			role = datapath.RolePrimary
		}
		h.boot(role, false)
	}
}
