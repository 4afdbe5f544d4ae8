// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"errors"
	"slices"
	"time"

	"github.com/lockstep-ft/lockstep/control/checkpoint"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/peerlink"
)

// checkpoints makes a daemon's share in them, as package control's does.
type checkpoints struct {
	d        *daemon
	p        *checkpoint.Primary // one of the two
	s        *checkpoint.Secondary
	queue    []checkpoint.Event
	stepping bool
}

// step gives the checkpoint machine an event and carries out what follows.
func (c *checkpoints) step(ev checkpoint.Event) {
	d := c.d
	d.checks.queue = append(d.checks.queue, ev)
	if d.checks.stepping {
		return
	}
	d.checks.stepping = true
	for len(d.checks.queue) > 0 && d.ended == endNone {
		ev := d.checks.queue[0]
		d.checks.queue = d.checks.queue[1:]
		var fxs []checkpoint.Effect
		if d.isPrimary() {
			fxs = d.checks.p.Step(d.h.clock(), ev)
		} else {
			fxs = d.checks.s.Step(d.h.clock(), ev)
		}
		for _, fx := range slices.Clone(fxs) {
			d.checks.effect(fx)
		}
	}
	d.checks.stepping = false
	if d.isPrimary() {
		if on, _, _, _ := d.checks.p.Periodic(); on {
			d.w.reach("periodic mode")
		}
	}
	if d.isPrimary() {
		if stuck := d.checks.p.Stuck(); stuck != d.pair.p.InDoubt() {
			d.pair.step(failover.Event{Kind: failover.EvDoubt, OK: stuck})
		}
	}
}

func (c *checkpoints) effect(fx checkpoint.Effect) {
	d := c.d
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
		w.reach("prepare")
		d.send(peerlink.Prepare{Epoch: fx.Epoch})
	case checkpoint.OpAbort:
		d.send(peerlink.Abort{Epoch: fx.Epoch, Cause: fx.Cause, Unasked: fx.Unasked})
	case checkpoint.OpAsk:
		w.reach("ask")
		d.checks.ask(fx.Epoch)
	case checkpoint.OpEpoch:
		d.fail(errors.Join(d.h.nic.SetEpoch(fx.Epoch), d.h.nic.MarkStop()))
	case checkpoint.OpMark:
		w.reach("marked again")
		d.fail(d.h.nic.MarkStop())
	case checkpoint.OpCOLO:
		d.checks.askCOLO(fx.Epoch)
	case checkpoint.OpCommit:
		w.check.doubt = false
		if d.h.id == w.check.speaker && !w.check.alone { // else it has slept, and nobody goes by it
			replicas(w, d.h)
		}
		inside, err := l.Commit(fx.Epoch, fx.At, fx.Stop, fx.Resume)
		d.fail(err)
		d.epoch = fx.Epoch
		w.reach("commit")
		if inside {
			w.reach("commit, output inside")
			d.checks.step(checkpoint.Event{Kind: checkpoint.EvInside, Epoch: fx.Epoch})
		}
		if l.Primary.Stats().CommitWait > 0 {
			d.checks.step(checkpoint.Event{Kind: checkpoint.EvReleased, Epoch: fx.Epoch})
		}
		d.repl.tries = 0
		d.pair.step(failover.Event{Kind: failover.EvCommitted})
	case checkpoint.OpFailed:
		w.reach("attempt failed: " + fx.Cause)

	case checkpoint.OpPark:
		d.fail(l.Park())
	case checkpoint.OpDrain:
		d.checks.beginDrain(fx)
	case checkpoint.OpReady:
		w.reach("ready")
		d.send(peerlink.Ready{Epoch: fx.Epoch})
	case checkpoint.OpBegin:
		d.epoch = fx.Epoch
		d.fail(d.h.nic.SetEpoch(fx.Epoch))
	case checkpoint.OpReset:
		d.fail(l.Reset(fx.Epoch))
	case checkpoint.OpStopped:
		d.send(peerlink.Stopped{Epoch: fx.Epoch})
	case checkpoint.OpRun:
		if fx.Unsure {
			w.reach("unparked unsure")
		}
		d.fail(l.Unpark(fx.Unsure))
	case checkpoint.OpResumed:
		d.send(peerlink.Resumed{Epoch: fx.Epoch})
	}
	d.turnWithin(0)
}

// ask has QEMU begin the checkpoint, unless the secondary is being given up.
func (c *checkpoints) ask(epoch uint32) {
	d := c.d
	m := d.h.monitor
	if m == nil {
		return
	}
	paired := d.pair.p.State() == failover.PrimaryPair
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
		d.checks.step(ev)
	})
}

// askCOLO asks QEMU for its mode, and P's whether its disks are replicas (R24).
func (c *checkpoints) askCOLO(epoch uint32) {
	d := c.d
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
			d.post(0, func() { d.pair.step(failover.Event{Kind: failover.EvReplica}) })
		}
		d.checks.step(ev)
	})
}

// beginDrain begins to drain the tap, behind QEMU's events if that is asked for.
func (c *checkpoints) beginDrain(fx checkpoint.Effect) {
	d := c.d
	if m := d.h.monitor; fx.Events && m != nil {
		m.run(qmpTimeout, func(_ *qemu, answer func(error)) { answer(nil) }, func(err error) {
			if err != nil {
				d.checks.step(checkpoint.Event{Kind: checkpoint.EvDrained, Epoch: fx.Epoch, Cause: err.Error()})
				return
			}
			d.checks.drain(fx.Epoch, 40)
		})
		return
	}
	d.checks.drain(fx.Epoch, 40)
}

// drain waits until the SVM has read what its tap holds, for so many milliseconds. What it has not read by then is
// dropped, a loss to it (loader's DrainTap).
func (c *checkpoints) drain(epoch uint32, left int) {
	d := c.d
	d.post(d.w.between(rndDaemon+d.h.id, 500*us, 2*ms), func() {
		if q := d.h.qemu; q != nil && len(q.input) > 0 {
			if left > 0 {
				d.checks.drain(epoch, left-1)
				return
			}
			d.w.reach("tap purged")
			q.input = nil
		}
		d.checks.step(checkpoint.Event{Kind: checkpoint.EvDrained, Epoch: epoch, OK: true})
	})
}
