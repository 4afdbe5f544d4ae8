// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/state"
)

// replicator begins replication and ends it (P).
type replicator struct {
	d         *daemon
	syncedOn  *session
	syncing   *bool // of the replication that begins: whether it is given up
	ending    bool
	edgesSent *session
	helloCOLO bool
	tries     int
	due       int64 // the next try
}

// begin has QEMU begin to replicate to S's (P).
func (r *replicator) begin() {
	d := r.d
	m := d.h.monitor
	// At the first start a guest that runs already, or has run alone, is refused: its images are not the other host's.
	// The operator sets first_start: copy.
	resync := d.h.state.Replicated || d.h.state.Alone || d.h.qemu != nil && d.h.qemu.running()
	d.remember(func(st *state.State) { st.Replicated = true })
	peer := d.link
	gaveUp := new(bool)
	d.repl.syncing = gaveUp
	done := func(err error) {
		d.repl.syncing = nil
		if err != nil {
			d.repl.tries++
			d.repl.due = d.w.now + min(500*ms<<min(d.repl.tries, 6), 20*s)
			d.w.logf("%s: replication did not begin: %v", d.h.name, err)
			d.w.reach("replication failed")
			if d.link == peer {
				d.send(peerlink.Dismiss{})
			}
		} else {
			d.repl.syncedOn = peer
		}
		d.pair.step(failover.Event{Kind: failover.EvSynced, OK: err == nil})
		if d.link != peer {
			d.repl.paired()
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

func (r *replicator) giveUp() {
	d := r.d
	if d.repl.syncing != nil {
		*d.repl.syncing = true
	}
}

// end has this host's QEMU go on without the other's, until it does.
func (r *replicator) end() {
	d := r.d
	d.repl.ending = true
	m := d.h.monitor
	again := func(err error) {
		if err == nil || d.pair.p.State() != failover.PrimarySolo {
			d.repl.ending = false
			d.repl.paired()
			return
		}
		d.post(100*ms, d.repl.end)
	}
	if m == nil {
		d.post(0, func() { again(errQMP) })
		return
	}
	m.run(10*s, (*qemu).primaryFailover, again)
}

// paired gives the failover machine a session, once QEMU's mode is known (P).
func (r *replicator) paired() {
	d := r.d
	m, peer := d.h.monitor, d.link
	if !d.isPrimary() || !d.linkUp || m == nil {
		return
	}
	mode := ""
	m.run(qmpTimeout, func(q *qemu, answer func(error)) {
		mode = q.colo
		answer(nil)
	}, func(err error) {
		if err != nil || d.link != peer || !d.linkUp {
			return
		}
		if d.pair.p.State() == failover.PrimaryPair && d.repl.syncedOn == peer {
			return
		}
		ok := mode == "primary" && d.repl.helloCOLO
		if d.repl.mustWait(ok) {
			return
		}
		d.pair.step(failover.Event{Kind: failover.EvLinkUp, OK: ok})
		if d.pair.p.State() == failover.PrimaryPair && d.repl.edgesSent != peer {
			d.repl.sendEdges()
		}
	})
}

// mustWait: for QEMU to end the last pair, or for the next try to be due.
func (r *replicator) mustWait(follows bool) bool {
	d := r.d
	if d.repl.ending {
		return true
	}
	left := d.repl.due - d.w.now
	if left <= 0 || follows || d.pair.p.State() != failover.PrimaryStart && d.pair.p.State() != failover.PrimarySolo {
		return false
	}
	d.post(left, d.repl.paired)
	return true
}

// sendEdges sends S the connections that were taken over (P).
func (r *replicator) sendEdges() {
	d := r.d
	peer := d.link
	if peer == nil {
		return
	}
	edges, err := d.h.nic.Edges()
	d.fail(err)
	if len(edges) > 0 {
		d.w.reach("edges sent")
		d.send(peerlink.Edges{Edges: edges})
	}
	d.repl.edgesSent = peer
	if d.pair.p.Covered() {
		d.send(peerlink.Covered{Term: d.pair.p.Term()})
	}
}
