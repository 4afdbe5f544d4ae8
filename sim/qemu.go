// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"errors"
	"fmt"
	"math"
)

// qemu is the model of a QEMU with COLO, after what was seen of 7.2 and 10.0: which events come
// in which order, what a checkpoint does when either end breaks on the way, and what each
// command answers.
type qemu struct {
	w     *world
	h     *host
	id    int
	alive bool
	frozen
	guest   *guest // nil: it waits for one
	state   string // as query-status names it
	colo    string // "none", "primary", "secondary"
	another bool   // it has booted a guest after there was one already, and that has not run yet
	paused  bool   // lockstep's mark: stopped to ask for a checkpoint
	halted  int64  // when it stopped last
	unasked bool   // the stop under way is nobody's who asks for a checkpoint

	peer     *qemu // COLO's other end, or the migration's
	follower *qemu // P: whose guest is the SVM, or was
	linkGen  int   // of the migration's connection
	linked   bool
	attached bool // P: the secondary's image is a replica
	nbd      bool // P: the connection to it holds

	attempt  int    // of the checkpoint under way; 0: none
	asked    bool   // one more is wanted
	received *guest // S: all of a checkpoint has come
	given    bool   // S: x-colo-lost-heartbeat
	left     int64  // S: when it left COLO; 0: it has not

	wakeUp alarm
	input  [][]byte
	io     bool // a step of the disk is planned
}

var errQMP = errors.New("no QMP connection")

func (q *qemu) running() bool { return q.alive && q.state == "running" }

// works: it gets CPU time.
func (q *qemu) works() bool { return q.alive && !q.isFrozen() && q.h.alive && !q.h.isFrozen() }

func (q *qemu) String() string { return fmt.Sprintf("qemu %d on %s", q.id, q.h.name) }

// wake has the guest run within d, if it runs.
func (q *qemu) wake(d int64) {
	q.w.set(&q.wakeUp, d)
}

// soon is the time until a guest's CPU gets to something.
func (q *qemu) soon() int64 {
	d := q.w.between(rndGuest+q.h.id, 5*us, 150*us)
	if q.w.chance(rndGuest+q.h.id, 5) {
		d += q.w.between(rndGuest+q.h.id, 1*ms, 15*ms) // the host was busy
	}
	if slow := q.w.sc.Slow[q.h.id]; slow > 0 {
		d += q.w.between(rndGuest+q.h.id, 0, 2*slow)
	}
	return d
}

// arrive is a frame in the guest's NIC.
func (q *qemu) arrive(frame []byte) {
	if q.guest == nil || !q.alive {
		return
	}
	if len(q.input) >= 500 { // the tap's queue
		q.w.reach("tap overflow")
		return
	}
	q.input = append(q.input, frame)
	if int64(len(q.input))*q.w.sc.Slow[q.h.id] > int64(q.w.sc.compare().Timeout)/2 {
		q.w.reach("guest late") // its answer comes too late for R7
	}
	if len(q.input) == 1 && q.running() {
		q.wake(q.soon())
	}
}

// runGuest lets the guest do all that it has to.
func (q *qemu) runGuest() {
	if !q.running() || q.guest == nil {
		return
	}
	if !q.works() {
		return // whoever thaws it wakes it
	}
	if q.guest.leaves {
		q.halt("shutdown")
		q.emit(func(m *monitor) { m.d.qmp.guestOff() })
		return
	}
	if q.guest.panicked {
		q.input = nil
		return
	}
	g, now := q.guest, q.guest.time(q.h.clock())
	input := q.input
	if q.w.sc.Slow[q.h.id] > 0 {
		input = input[:min(len(input), 1)]
	}
	q.input = q.input[len(input):]
	for _, f := range input {
		q.hears(f)
		g.stack.Input(now, f)
	}
	g.stack.Tick(now)
	g.serve(now, func() uint32 { return q.w.rnd(rndGuest + q.h.id).Uint32() })
	frames := g.stack.Take()
	for _, f := range frames {
		if p, ok := parse(f); ok {
			g.note(&p)
			if q.w.logging {
				q.w.logf("%v: sends %v", q, p)
			}
		} else if id, ok := datagram(f); ok {
			g.messages.sent[id]++
		}
	}
	q.h.fromGuest(frames)
	q.submit()
	if at := g.wakeAt(); at != math.MaxInt64 {
		q.wake(max(at-q.h.clock(), 0) + q.soon())
	}
	if len(q.input) > 0 || g.interrupted() {
		q.wake(q.soon())
	}
}

// submit hands the guest's requests to the disk.
func (q *qemu) submit() {
	if q.io {
		return
	}
	for i := range q.guest.pending {
		r := &q.guest.pending[i]
		if r.sent {
			continue
		}
		r.sent, q.io = true, true
		q.w.after(q.w.between(rndDisk, 20*us, 2*ms), func() {
			q.io = false
			q.disk()
		})
		return
	}
}

// disk carries out the first request that was sent. The guest has one under way at a time.
func (q *qemu) disk() {
	if !q.alive || q.guest == nil {
		return
	}
	if !q.works() || !q.running() {
		// Its bottom half runs when it can; stop waits for it (see drain).
		if q.alive && !q.works() {
			q.w.after(5*ms, q.disk)
		}
		return
	}
	q.complete()
}

// complete ends the request that is under way; false: it cannot end.
func (q *qemu) complete() bool {
	for i := range q.guest.pending {
		r := q.guest.pending[i]
		if !r.sent {
			continue
		}
		value, done := q.carryOut(r)
		if !done {
			return false
		}
		q.guest.answered(r, value)
		q.wake(q.soon())
		return true
	}
	return true
}

// carryOut does what a request asks for on the images. done false: it waits, or the guest was
// stopped because of it.
func (q *qemu) carryOut(r diskRequest) (value uint32, done bool) {
	d := q.h.disk
	switch {
	case !r.write:
		return d.read(r.key), true
	case q.colo == "secondary":
		if d.broken {
			q.ioError("local")
			return 0, false
		}
		d.active[r.key] = r.value
		return 0, true
	}
	if q.attached {
		switch {
		case !q.nbd:
			q.ioError("replica")
			return 0, false
		case q.peer == nil || !q.peer.h.alive || q.w.cut.qemu > 0 || !q.peer.works():
			// Nobody answers, and nobody says so: the request waits. It is looked at again
			// when something has changed.
			q.w.after(10*ms, q.disk)
			return 0, false
		case !q.peer.alive:
			q.nbd = false
			q.ioError("replica")
			return 0, false
		case q.peer.h.disk.broken:
			q.ioError("replica")
			return 0, false
		}
	}
	if d.broken {
		q.ioError("local")
		return 0, false
	}
	if q.attached {
		q.peer.h.disk.replicate(r.key, r.value)
	}
	d.image[r.key] = r.value
	return 0, true
}

// ioError stops the guest because a disk refused a request, which is queued.
func (q *qemu) ioError(which string) {
	for i := range q.guest.pending {
		q.guest.pending[i].sent = false
	}
	q.w.reach("io error " + which)
	secondarys := which == "replica"
	q.emit(func(m *monitor) { m.d.qmp.diskFailed(secondarys) })
	if q.state == "running" {
		q.unasked = true
		q.halt("io-error")
	}
}

// halt stops the guest.
func (q *qemu) halt(state string) {
	if q.state == "running" {
		q.guest.stop(q.h.clock())
		q.halted = q.w.now
		q.emitState("STOP")
	}
	q.state = state
}

// panics: this guest alone, as one does for a fault of its host's. QEMU stops it.
func (q *qemu) panics() {
	q.guest.panicked, q.unasked = true, true
	q.emit(func(m *monitor) { m.d.qmp.guestDead() })
	q.halt("guest-panicked")
}

// drain ends the I/O under way before a stop; false: it does not end.
func (q *qemu) drain() bool {
	if q.guest == nil || !q.io {
		return true
	}
	return q.complete()
}

// powerOff has the guest of this host power off, and the one that does the same.
func (w *world) powerOff(h *host) {
	q := h.qemu
	if q == nil || h.id != w.check.speaker || !q.running() {
		return
	}
	w.off = true
	for _, a := range w.client.conns {
		a.lost = true
	}
	for _, q := range []*qemu{q, q.follower} {
		if q != nil && q.alive && q.guest != nil {
			q.guest.leaves = true
			q.wake(q.soon())
		}
	}
}

// resume has the guest run.
func (q *qemu) resume() {
	if !q.alive || q.state == "shutdown" || q.state == "running" || q.guest == nil {
		return
	}
	if q.another {
		q.another = false
		q.w.lost()
	}
	q.state = "running"
	if q.halted > 0 && q.h.id == q.w.check.speaker {
		q.w.stood += q.w.now - q.halted
	}
	q.guest.start(q.h.clock())
	q.emitState("RESUME")
	for i := range q.guest.pending {
		q.guest.pending[i].sent = false
	}
	q.io = false
	q.wake(q.soon())
}

// emit hands an event to whoever is connected to the monitor.
func (q *qemu) emit(f func(*monitor)) {
	if m := q.h.monitor; m != nil && m.q == q {
		m.deliver(f)
	}
}

func (q *qemu) emitState(event string) {
	at, unasked := q.h.clock(), q.unasked
	q.unasked = false
	q.w.logf("%v: %s %s", q, event, q.state)
	q.emit(func(m *monitor) {
		m.d.qmp.ran(event, at)
		if unasked {
			q.w.doubt(m.d)
		}
	})
}

// toPeer sends something over the migration's connection; what comes behind a cut waits for
// its end.
func (q *qemu) toPeer(d int64, f func(peer *qemu)) {
	gen := q.linkGen
	q.w.after(d, func() {
		switch {
		case !q.linked || gen != q.linkGen || q.peer == nil || !q.peer.linked && q.peer.alive:
		case q.w.cut.qemu > 0 || !q.peer.h.alive || !q.peer.works():
			if q.peer.alive || !q.peer.h.alive { // frozen, or nobody says that it is dead
				q.toPeer(5*ms, f)
			}
		default:
			f(q.peer)
		}
	})
}

// unlink ends the migration's connection: this end knows, the other one too if it can.
func (q *qemu) unlink() {
	p := q.peer
	if !q.linked {
		return
	}
	q.linked = false
	q.linkGen++
	q.lost()
	if p != nil && p.peer == q && p.linked {
		gen := p.linkGen
		q.w.after(q.w.between(rndQEMU+q.h.id, 100*us, 5*ms), func() {
			if p.linked && p.linkGen == gen && q.w.cut.qemu == 0 && p.works() && q.h.alive { // a host without power closes nothing
				p.linked = false
				p.linkGen++
				p.lost()
			}
		})
	}
}

// lost: the connection to the other QEMU broke. A checkpoint under way stops, and leaves the
// guest as it is until x-colo-lost-heartbeat. A primary notices at its next checkpoint.
func (q *qemu) lost() {
	if !q.alive || q.colo == "none" || q.colo == "primary" && q.attempt == 0 {
		return
	}
	q.w.reach("colo exit " + q.colo)
	q.left = q.w.now
	q.emit(func(m *monitor) { m.d.qmp.coloExit() })
}

// die is kill -9.
func (q *qemu) die() {
	if !q.alive {
		return
	}
	q.w.logf("%v dies", q)
	if q.guest != nil && q.state == "running" {
		q.guest.stop(q.h.clock())
	}
	q.alive = false
	p := q.peer
	q.unlink()
	if p != nil && p.attached && p.peer == q {
		// Its kernel resets the connection; P's next write meets that.
		q.w.after(q.w.between(rndQEMU+q.h.id, 100*us, 3*ms), func() {
			if q.h.alive && q.w.cut.qemu == 0 {
				p.nbd = false
			}
		})
	}
	if m := q.h.monitor; m != nil && m.q == q {
		m.close()
	}
}
