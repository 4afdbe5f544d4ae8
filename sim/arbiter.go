// SPDX-License-Identifier: Apache-2.0

package sim

import (
	realarbiter "github.com/lockstep-ft/lockstep/control/arbiter"
)

// arbiterKind is how an arbiter behaves in trouble.
type arbiterKind string

const (
	arbiterEtcd arbiterKind = "etcd" // an answer may be lost; Settle knows what came of it
	arbiterFile arbiterKind = "file" // a host that is cut off waits; its change may be made later, until Settle
	arbiterExec arbiterKind = "exec" // it may answer that nothing was changed, too
	arbiterNone arbiterKind = "none" // each process has an entry of its own, and is granted what it asks for
)

// arbiter is the entry and the ways to it.
type arbiter struct {
	w      *world
	entry  realarbiter.Entry
	own    [2]realarbiter.Entry // of `none`, by host: its process forgets it when it ends
	cut    [2]int               // hosts that cannot reach it; how many reasons there are
	out    int                  // it answers nobody
	lose   [2]int               // so many answers are lost
	late   [2]int               // so many changes take effect late
	fences [2]int               // grows with each Settle: a change from before is void
}

// of is the entry as the host sees it.
func (a *arbiter) of(h *host) realarbiter.Entry {
	if a.w.sc.Arbiter == arbiterNone {
		return a.own[h.id]
	}
	return a.entry
}

// edit is an operator's, who has the other host serve by writing its name into the entry.
func (a *arbiter) edit(h *host) {
	if a.w.sc.Arbiter == arbiterNone || a.entry.Term == 0 {
		return
	}
	a.w.edited = true
	a.entry = realarbiter.Entry{Term: a.entry.Term + 1, Speaker: h.other().name}
	a.w.logf("arbiter: edited: %v", a.entry)
}

// reachable: questions of the host arrive, and answers too.
func (a *arbiter) reachable(h int) bool { return a.cut[h] == 0 && a.out == 0 }

// ask carries out a question of a host, answers, and calls answer; or it does not, within the
// timeout of 1 s: then answer is called with ok false.
func (a *arbiter) ask(h *host, question func() (lost bool), answer func(ok bool)) {
	w := a.w
	if w.sc.Arbiter == arbiterNone {
		question()
		h.daemon.post(0, func() { answer(true) })
		return
	}
	done, d := false, h.daemon
	end := func(ok bool) {
		if !done {
			done = true
			d.post(0, func() { answer(ok) })
		}
	}
	w.after(1*s, func() { end(false) })
	w.after(w.between(rndArbiter, 200*us, 8*ms), func() {
		if !a.reachable(h.id) || !h.alive {
			return
		}
		if question() {
			return
		}
		w.after(w.between(rndArbiter, 200*us, 8*ms), func() {
			if a.reachable(h.id) {
				end(true)
			}
		})
	})
}

// swap is arbiter.Arbiter's Swap.
func (a *arbiter) swap(h *host, from, to realarbiter.Entry, answer func(now realarbiter.Entry, won, ok bool)) {
	var now realarbiter.Entry
	won := false
	change := func() {
		if a.w.sc.Arbiter == arbiterNone {
			a.own[h.id], now, won = to, to, true
			return
		}
		if a.entry == from {
			a.entry = to
			a.w.logf("arbiter: %v -> %v", from, to)
			a.w.reach("arbiter changed")
		}
		now, won = a.entry, a.entry == to
	}
	a.ask(h, func() bool {
		if a.late[h.id] > 0 && a.w.sc.Arbiter == arbiterFile {
			// The write is under way for a while after the host has given up waiting.
			a.late[h.id]--
			fence := a.fences[h.id]
			a.w.after(a.w.between(rndArbiter, 500*ms, 3*s), func() {
				if a.fences[h.id] == fence {
					change()
					a.w.reach("arbiter changed late")
				}
			})
			return true
		}
		if a.w.sc.Arbiter == arbiterExec && a.lose[h.id] > 0 {
			a.lose[h.id]--
			now = a.entry // nothing done, nothing said
			a.w.reach("arbiter unmoved")
			return false
		}
		change()
		if a.lose[h.id] > 0 {
			a.lose[h.id]--
			a.w.reach("arbiter answer lost")
			return true
		}
		return false
	}, func(ok bool) { answer(now, won, ok) })
}

// settle is arbiter.Arbiter's Settle.
func (a *arbiter) settle(h *host, answer func(now realarbiter.Entry, ok bool)) {
	var now realarbiter.Entry
	a.ask(h, func() bool {
		a.fences[h.id]++
		now = a.of(h)
		return false
	}, func(ok bool) { answer(now, ok) })
}
