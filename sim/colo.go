// SPDX-License-Identifier: Apache-2.0

package sim

import "errors"

// COLO, and what lockstep orders of QEMU (control/qemu). Each of these is a procedure: done is
// called when QEMU has answered the last of its commands.

// checkpoint is control/qemu's Checkpoint.
func (q *qemu) checkpoint(done func(error)) {
	if !q.running() {
		done(errors.New("the guest is stopped: " + q.state))
		return
	}
	q.paused = true
	fail := func(why string) {
		q.unpause()
		done(errors.New(why))
	}
	tries := 0
	var stop func()
	stop = func() {
		if !q.alive {
			return
		}
		if !q.drain() {
			// R24's bound: after 3 s the secondary's disks are cut off.
			if tries++; tries == 300 {
				q.yank()
			}
			if q.state == "running" && tries < 400 {
				q.w.after(10*ms, stop)
				return
			}
		}
		if q.state == "running" {
			q.halt("paused")
		}
		d := q.w.between(rndQEMU+q.h.id, 100*us, 1*ms)
		if m := q.h.monitor; m != nil && m.q == q {
			d = max(d, m.last+1-q.w.now) // the daemon asks when it has read that the guest is stopped
		}
		q.w.after(d, func() {
			switch {
			case !q.alive:
			case q.state != "paused":
				fail("the guest is stopped: " + q.state)
			case q.colo != "primary" || q.w.chance(rndQEMU+q.h.id, q.w.sc.RefuseCheckpoint):
				fail("COLO mode is " + q.colo)
			default:
				q.paused, q.asked = false, true
				done(nil)
				q.transaction()
			}
		})
	}
	stop()
}

// unpause is control/qemu's Unpause.
func (q *qemu) unpause() {
	if !q.paused {
		return
	}
	q.paused = false
	if q.state == "paused" && q.attempt == 0 {
		q.resume()
	}
}

// transaction is one checkpoint of COLO's, as the primary drives it.
func (q *qemu) transaction() {
	if q.attempt != 0 || !q.asked || q.colo != "primary" {
		return
	}
	q.asked = false
	q.w.attempts++
	no := q.w.attempts
	q.attempt = no
	if !q.linked {
		q.lost()
		return
	}
	r := func(lo, hi int64) int64 { return q.w.between(rndQEMU+q.h.id, lo, hi) }
	mine := func() bool { return q.alive && q.attempt == no && q.linked }
	q.toPeer(r(100*us, 1*ms), func(s *qemu) {
		// S stops, whatever it does.
		if s.guest != nil && s.state == "running" {
			s.halt("colo")
		} else if s.state == "shutdown" || s.state == "paused" {
			s.state = "colo" // and it runs at the end, whoever had stopped it (vm_stop_force_state, vm_start)
		}
		s.received = nil
		s.toPeer(r(100*us, 1*ms), func(q *qemu) {
			if !mine() {
				return
			}
			if q.state == "running" {
				q.halt("colo") // an operator had resumed it
			}
			q.state = "colo"
			image := q.guest.clone()
			q.toPeer(r(1*ms, 12*ms), func(s *qemu) {
				s.received = image
				s.toPeer(r(50*us, 500*us), func(q *qemu) { q.w.reach("checkpoint received") })
				s.w.after(r(200*us, 3*ms), func() { s.load(no) })
			})
		})
	})
}

// load: S becomes the copy that it has received, and says so to P.
func (q *qemu) load(no int) {
	if !q.works() || q.received == nil {
		if q.alive && q.received != nil {
			q.w.after(2*ms, func() { q.load(no) })
		}
		return
	}
	q.guest, q.received = q.received, nil
	q.guest.since = q.h.clock()
	q.h.disk.checkpoint()
	q.input = nil
	q.w.reach("checkpoint loaded")
	q.toPeer(q.w.between(rndQEMU+q.h.id, 50*us, 400*us), func(p *qemu) {
		if p.attempt != no {
			return
		}
		p.attempt = 0
		p.w.after(p.w.between(rndQEMU+p.h.id, 10*us, 500*us), func() {
			if p.state == "colo" {
				p.state = "paused"
				p.resume()
			}
			p.transaction()
		})
	})
	q.w.after(q.w.between(rndQEMU+q.h.id, 10*us, 600*us), func() {
		if q.state == "colo" {
			q.state = "paused"
			q.resume()
		}
		if !q.linked {
			q.lost()
		}
	})
}

// replicate is control/qemu's Replicate: the disks are copied if resync, then the memory.
func (q *qemu) replicate(to *qemu, resync bool, gaveUp func() bool, done func(error)) {
	if q.guest == nil || to == nil || !to.alive || to.state != "inmigrate" || q.w.cut.qemu > 0 || !to.h.alive {
		done(errors.New("the secondary's QEMU cannot be reached"))
		return
	}
	if q.colo == "secondary" {
		done(errors.New("it is in COLO as a secondary: it never heard that it took over"))
		return
	}
	r := func(lo, hi int64) int64 { return q.w.between(rndQEMU+q.h.id, lo, hi) }
	q.peer, to.peer = to, q
	q.linkGen++
	to.linkGen++
	q.linked, to.linked = true, true
	gen, ran := q.linkGen, q.running()
	undo := func(why string) {
		q.attached, q.nbd = false, false
		q.unlink()
		q.colo = "none"
		if ran && q.alive && q.state != "running" && q.state != "io-error" {
			q.resume()
		}
		q.retry()
		done(errors.New(why))
	}
	ok := func() bool { return q.linked && gen == q.linkGen && !gaveUp() && to.alive }
	copying := int64(0)
	if resync {
		copying = r(20*ms, 200*ms)
		q.w.reach("resync")
	}
	q.w.after(copying, func() {
		switch {
		case !q.alive:
			return
		case !ok() || q.w.cut.qemu > 0 || !to.works():
			undo("the copy of the disks was cut off")
			return
		case !q.drain():
			undo("the disk does not answer")
			return
		}
		if resync {
			to.h.disk.copyFrom(q.h.disk)
		}
		q.attached, q.nbd = true, true
		q.w.after(r(20*ms, 300*ms), func() {
			switch {
			case !q.alive:
				return
			case !ok() || q.w.cut.qemu > 0 || !to.works():
				undo("the migration was cut off")
				return
			case q.state == "io-error":
				undo("the guest was stopped by its disk")
				return
			}
			if q.state == "running" {
				if !q.drain() {
					undo("the disk does not answer")
					return
				}
				q.halt("finish-migrate")
			}
			image := q.guest.clone()
			q.w.after(r(3*ms, 30*ms), func() {
				switch {
				case !q.alive:
					return
				case !ok() || q.w.cut.qemu > 0 || !to.works():
					undo("the migration was cut off")
					return
				}
				to.guest, to.colo, to.state = image, "secondary", "paused"
				to.guest.since = to.h.clock()
				to.h.disk.checkpoint()
				to.input = nil
				q.colo, q.follower = "primary", to
				to.w.after(r(100*us, 2*ms), to.resume)
				q.w.after(r(100*us, 2*ms), func() {
					q.resume() // COLO begins with that, whoever stopped the guest
					done(nil)
				})
			})
		})
	})
}

// yank closes the connections to the other host.
func (q *qemu) yank() {
	q.nbd = false
	q.unlink()
}

// retry is control/qemu's Retry.
func (q *qemu) retry() {
	if q.alive && q.state == "io-error" {
		q.state = "paused"
		q.resume()
	}
}

// primaryFailover is control/qemu's PrimaryFailover.
func (q *qemu) primaryFailover(done func(error)) {
	q.yank()
	q.attached = false
	q.w.after(q.w.between(rndQEMU+q.h.id, 300*us, 10*ms), func() {
		if !q.alive {
			return
		}
		was := q.colo
		q.colo, q.attempt, q.asked, q.peer = "none", 0, false, nil
		if was == "primary" || q.state == "prelaunch" {
			q.resume() // QEMU's migration ends with that, whoever stopped the guest
		}
		q.retry()
		done(nil)
	})
}

// leave is control/qemu's LeavePrimary: a checkpoint that has come whole is loaded all the same.
func (q *qemu) leave() {
	if q.received == nil {
		q.unlink()
		return
	}
	q.linked = false
	q.linkGen++
}

// secondaryFailover is control/qemu's SecondaryFailover: a checkpoint that has come whole is
// loaded, one that has not is dropped.
func (q *qemu) secondaryFailover(done func(error)) {
	q.linked = false
	q.linkGen++
	if q.colo != "secondary" {
		done(errors.New("this secondary has no guest that could take over"))
		return
	}
	q.given = true
	if p := q.peer; p != nil && p.peer == q {
		p.nbd = false // nbd-server-stop: a primary that wakes later reaches no replica
	}
	if q.received != nil {
		q.guest, q.received = q.received, nil
		q.guest.since = q.h.clock()
		q.h.disk.checkpoint()
		q.w.reach("takeover loads")
	}
	q.w.after(q.w.between(rndQEMU+q.h.id, 1*ms, 20*ms), func() {
		if !q.alive {
			return
		}
		q.colo, q.peer = "none", nil
		q.h.disk.merge()
		if q.state != "running" && q.state != "io-error" && q.state != "shutdown" {
			q.state = "paused"
			q.resume()
		}
		done(nil)
	})
}
