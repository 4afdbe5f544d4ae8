// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/checkpoint"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/journal"
	"github.com/lockstep-ft/lockstep/control/nicloop"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qmp"
)

const (
	maxHistory   = 32 // requests and attempts kept for status
	maxRequests  = 256
	sweepEvery   = time.Second
	quietRequest = time.Second // between two log lines about requests that nothing serves
)

// machine is a checkpoint.Primary or a checkpoint.Secondary.
type machine interface {
	Step(now int64, ev checkpoint.Event) []checkpoint.Effect
	NextDeadline() int64
	State() (word, detail string)
}

// checkpoints makes this host's share in them, and remembers what was asked for and what
// came of it.
type checkpoints struct {
	d         *Daemon
	machine   machine
	primary   *checkpoint.Primary   // one of the two
	secondary *checkpoint.Secondary // is machine
	queue     []checkpoint.Event
	stepping  bool
	stopDrain context.CancelFunc
	hurried   bool // S: its QEMU's connections are told not to delay

	requests    chan nicloop.Request
	requested   atomic.Uint64 // by anyone
	committed   uint64
	waiting     []nicloop.Request // causes of the next attempt
	causes      []api.Cause
	attempts    []api.Checkpoint
	attemptNow  []nicloop.Request // causes of the attempt under way
	attemptAt   int64
	counts      []api.CheckpointCount    // of those that have ended
	phases      map[string]api.Histogram // of committed ones
	phaseBegan  int64                    // S: of the one under way
	unservedLog time.Time
	unserved    uint64

	periodic      bool   // as last noted
	periodicFirst uint64 // committed, when it began
}

// want takes a request for a checkpoint from any goroutine, and never blocks.
func (ck *checkpoints) want(r nicloop.Request) {
	ck.requested.Add(1)
	select {
	case ck.requests <- r:
	default: // enough wait: more would not change anything
	}
}

func (ck *checkpoints) wanted(r nicloop.Request) {
	ck.note(r)
	if ck.d.opt.QMP == "" || !ck.d.peer.linkUp {
		// Nobody to ask. Guests that keep diverging ask without end.
		if ck.unserved++; time.Since(ck.unservedLog) >= quietRequest {
			ck.d.log.Warn("a checkpoint is needed and cannot be made: "+ck.unable(), "reason", r.Reason, "flow", r.Flow, "where", r.Where, "requests", ck.unserved)
			ck.unservedLog, ck.unserved = time.Now(), 0
		}
	}
	ck.step(checkpoint.Event{Kind: checkpoint.EvWant, Cause: r.Reason, Diverged: r.Diverged})
}

// unable is why no checkpoint can be made now.
func (ck *checkpoints) unable() string {
	if ck.d.opt.QMP == "" {
		return "the config names no QEMU to ask"
	}
	return "there is no session with " + ck.d.opt.Peer
}

// note keeps a request in mind for the attempt that serves it, and for status.
func (ck *checkpoints) note(r nicloop.Request) {
	c := api.Cause{At: r.At, Reason: r.Reason, Flow: r.Flow, Where: r.Where}
	if r.NIC >= 0 {
		c.NIC = &r.NIC
	}
	ck.causes = keepLast(append(ck.causes, c))
	ck.waiting = keepLast(append(ck.waiting, r))
}

func keepLast[T any](s []T) []T {
	return slices.Delete(s, 0, max(0, len(s)-maxHistory))
}

// step gives the machine an event and carries out what follows. Events that come
// of it are taken in their turn.
func (ck *checkpoints) step(ev checkpoint.Event) {
	ck.queue = append(ck.queue, ev)
	if ck.stepping {
		return
	}
	ck.stepping = true
	for len(ck.queue) > 0 && ck.d.fatal == nil {
		ev := ck.queue[0]
		ck.queue = slices.Delete(ck.queue, 0, 1)
		for _, fx := range ck.machine.Step(ck.d.now(), ev) {
			if err := ck.carryOut(fx); err != nil {
				ck.d.fatal = err
				break
			}
		}
	}
	ck.stepping = false
	ck.periodicEvent()
	if ck.d.failover == nil || !ck.d.isPrimary() {
		return
	}
	if stuck := ck.primary.Stuck(); stuck != (ck.d.failover.p.InDoubt()) {
		ck.d.failover.step(failover.Event{Kind: failover.EvDoubt, OK: stuck})
	}
}

func (ck *checkpoints) carryOut(fx checkpoint.Effect) error {
	switch fx.Op {
	case checkpoint.OpOpen:
		ck.d.log.Info("replicating", "epoch", ck.d.epoch, "term", ck.d.term)
		return ck.d.each("hold", func(n *nicloop.Loop) error { return n.Hold(ck.d.opt.Heartbeat.Interval, ck.d.opt.Heartbeat.Lease) })
	case checkpoint.OpFreeze:
		ck.attemptAt = ck.d.now()
		return ck.d.each("freeze", (*nicloop.Loop).Freeze)
	case checkpoint.OpThaw:
		return ck.d.each("thaw", (*nicloop.Loop).Thaw)
	case checkpoint.OpPrepare:
		ck.attempt(fx)
		ck.d.peer.send(peerlink.Prepare{Epoch: fx.Epoch, PausedNS: ck.d.clock.sum})
	case checkpoint.OpAbort:
		ck.d.peer.send(peerlink.Abort{Epoch: fx.Epoch, Cause: fx.Cause, Unasked: fx.Unasked})
	case checkpoint.OpAsk:
		ck.ask(fx.Epoch)
	case checkpoint.OpEpoch:
		return ck.d.each("set epoch", func(n *nicloop.Loop) error { return errors.Join(n.DP.SetEpoch(fx.Epoch), n.DP.MarkStop()) })
	case checkpoint.OpMark:
		return ck.d.each("mark", func(n *nicloop.Loop) error { return n.DP.MarkStop() })
	case checkpoint.OpCOLO:
		ck.d.qmp.askQEMU(func(m *qmp.Monitor) checkpoint.Event {
			mode, err := m.COLO()
			ev := checkpoint.Event{Kind: checkpoint.EvCOLO, Epoch: fx.Epoch, OK: err == nil && mode == string(ck.d.opt.Role)}
			if err != nil {
				ev.Cause = err.Error()
			} else if !ev.OK {
				ev.Cause = fmt.Sprintf("COLO mode is %q", mode)
			}
			if ev.OK && ck.d.isPrimary() && ck.d.failover != nil {
				// Whatever events reported of the disks, their state decides (R24). A QEMU
				// that does not answer may be dead: then S is the better host.
				switch missing, err := qemu.Unreplicated(m, ck.d.failover.Disks); {
				case err != nil:
					ev.OK, ev.Cause = false, err.Error()
				case len(missing) > 0:
					ev.OK, ev.Cause = false, fmt.Sprintf("the secondary's image is no replica of %v", missing)
					ck.d.post(func() { ck.d.failover.step(failover.Event{Kind: failover.EvReplica}) })
				}
			}
			return ev
		})
	case checkpoint.OpCommit:
		return ck.commit(fx)
	case checkpoint.OpFailed:
		ck.attemptEnds(fx.Cause, fx)
		level := slog.LevelWarn
		if fo := ck.d.failover; fo != nil && fo.p != nil && !fo.p.Covered() {
			level = slog.LevelInfo // the pair begins, and the SVM stops for that: it is tried again
		}
		ck.d.log.Log(ck.d.ctx, level, "checkpoint failed", "epoch", fx.Epoch, "cause", fx.Cause)
		ck.checkpointEvent()

	case checkpoint.OpPark:
		if fo := ck.d.failover; fo != nil && fx.Epoch != 0 && !ck.hurried {
			ck.hurried = true // the connection lasts as long as this daemon's role
			ck.d.qmp.noDelay(fo.Own)
		}
		ck.phaseBegan = ck.d.now()
		return ck.d.each("park", (*nicloop.Loop).Park)
	case checkpoint.OpDrain:
		ck.drain(fx.Epoch, fx.Events)
	case checkpoint.OpReady:
		ck.phase("drain", ck.phaseBegan, ck.d.now())
		ck.d.peer.send(peerlink.Ready{Epoch: fx.Epoch})
	case checkpoint.OpBegin:
		ck.d.epoch = fx.Epoch
		return ck.d.each("begin an epoch", func(n *nicloop.Loop) error { return n.DP.SetEpoch(fx.Epoch) })
	case checkpoint.OpReset:
		ck.phaseBegan = ck.d.now()
		return ck.d.each("reset offsets", func(n *nicloop.Loop) error { return n.Reset(fx.Epoch) })
	case checkpoint.OpStopped:
		if fx.Epoch == 0 && ck.d.failover.follows() {
			ck.d.log.Warn("the SVM stopped, or may have, and nobody asked it to: parked until a checkpoint")
		}
		ck.d.peer.send(peerlink.Stopped{Epoch: fx.Epoch})
	case checkpoint.OpRun:
		if err := ck.d.each("unpark", func(n *nicloop.Loop) error { return n.Unpark(fx.Unsure) }); err != nil {
			return err
		}
		if fx.Epoch != 0 { // of a checkpoint
			ck.phase("tables", ck.phaseBegan, ck.d.now())
		}
	case checkpoint.OpResumed:
		ck.committed++
		ck.phase("pause", fx.Stop, fx.Resume)
		ck.d.clock.copied(fx.Resume - fx.Stop)
		ck.d.peer.send(peerlink.Resumed{Epoch: fx.Epoch, PauseNS: fx.Resume - fx.Stop})
	}
	return nil
}

// ask has QEMU begin the checkpoint, unless the secondary is being given up.
func (ck *checkpoints) ask(epoch uint32) {
	mo, disks := &ck.d.qmp, []qemu.Disk(nil)
	if ck.d.failover != nil {
		disks = ck.d.failover.Disks
	}
	paired := ck.d.failover.paired()
	mo.askQEMU(func(m *qmp.Monitor) checkpoint.Event {
		err := errors.New("the secondary is being given up")
		if paired {
			mo.pausing.Lock()
			defer mo.pausing.Unlock()
			err = qemu.Checkpoint(m, disks)
		}
		ev := checkpoint.Event{Kind: checkpoint.EvAsked, Epoch: epoch, OK: err == nil}
		if err != nil {
			ev.Cause = err.Error()
		}
		return ev
	})
}

// attempt notes that a checkpoint begins.
func (ck *checkpoints) attempt(fx checkpoint.Effect) {
	if len(ck.waiting) == 0 && fx.Cause != checkpoint.CausePeriod && fx.Cause != checkpoint.CausePeriodic {
		// The machine's own wish: it has a doubt to end.
		ck.requested.Add(1)
		ck.note(nicloop.Request{At: time.Now(), NIC: -1, Reason: fx.Cause})
	}
	ck.attemptNow, ck.waiting = ck.waiting, nil
	c := api.Checkpoint{Epoch: fx.Epoch, At: time.Now(), Cause: fx.Cause, Result: "running"}
	for _, r := range ck.attemptNow {
		if c.Flow == "" {
			c.Flow, c.Where = r.Flow, r.Where
		}
	}
	ck.attempts = keepLast(append(ck.attempts, c))
	ck.d.log.Log(ck.d.ctx, ck.level(), "checkpoint", "epoch", fx.Epoch, "cause", fx.Cause, "requests", len(ck.attemptNow))
}

func (ck *checkpoints) attemptEnds(result string, fx checkpoint.Effect) {
	if len(ck.attempts) == 0 {
		return
	}
	a := &ck.attempts[len(ck.attempts)-1]
	a.Result = result
	ck.count(a.Cause, fx.Op == checkpoint.OpFailed)
	a.FrozenMS = milliseconds(ck.d.now() - ck.attemptAt)
	a.PVMPauseMS = milliseconds(fx.Resume - fx.Stop)
	if fx.Op == checkpoint.OpFailed {
		// What it was for is still to be done.
		ck.waiting = keepLast(append(ck.attemptNow, ck.waiting...))
	}
	ck.attemptNow = nil
}

// count counts an attempt that has ended. Causes without an explanation may be any text, and are one.
func (ck *checkpoints) count(cause string, failed bool) {
	c := api.CheckpointCount{Cause: "other", Result: "committed", Count: 1}
	if r, ok := api.Explain(cause); ok {
		c.Cause = r.Name
	}
	if failed {
		c.Result = "failed"
	}
	i := slices.IndexFunc(ck.counts, func(o api.CheckpointCount) bool { return o.Cause == c.Cause && o.Result == c.Result })
	if i < 0 {
		ck.counts = append(ck.counts, c)
		return
	}
	ck.counts[i].Count++
}

// checkpointEvent notes the attempt that has just ended.
func (ck *checkpoints) checkpointEvent() {
	if len(ck.attempts) == 0 {
		return
	}
	a := &ck.attempts[len(ck.attempts)-1]
	fields := map[string]any{
		"epoch": a.Epoch, "result": a.Result, "frozen_ms": a.FrozenMS, "pvm_pause_ms": a.PVMPauseMS, "svm_pause_ms": a.SVMPauseMS,
	}
	if a.Flow != "" {
		fields["flow"] = a.Flow
	}
	if a.Where != "" {
		fields["where"] = a.Where
	}
	ck.d.event(journal.Checkpoint, a.Cause, fields)
}

// phase notes how long a part of a checkpoint took, boottime ns.
func (ck *checkpoints) phase(name string, from, to int64) {
	if ck.phases == nil {
		ck.phases = make(map[string]api.Histogram)
	}
	h := ck.phases[name]
	h.Observe(time.Duration(max(0, to-from))) // QEMU's times are not of this clock
	ck.phases[name] = h
}

func milliseconds(ns int64) float64 { return float64(ns) / 1e6 }

func (ck *checkpoints) commit(fx checkpoint.Effect) error {
	inside, waited, records := false, time.Duration(0), uint64(0)
	err := ck.d.each("commit", func(n *nicloop.Loop) error {
		in, err := n.Commit(fx.Epoch, fx.At, fx.Stop, fx.Resume)
		st := n.Primary.Stats()
		inside, waited, records = inside || in, max(waited, st.CommitWait), records+st.Records
		return err
	})
	if err != nil {
		return err
	}
	ck.d.epoch = fx.Epoch
	ck.committed++
	ck.attemptEnds("committed", fx)
	now := ck.d.now()
	ck.phase("frozen", fx.Began, now)
	ck.phase("prepare", fx.Began, fx.Asked)
	ck.phase("request", fx.Asked, fx.Stop)
	ck.phase("pause", fx.Stop, fx.Resume)
	ck.phase("confirm", fx.Resume, now)
	a := ck.attempts[len(ck.attempts)-1]
	if a.Cause != checkpoint.CausePeriodic {
		ck.checkpointEvent()
	}
	ck.d.log.Log(ck.d.ctx, ck.level(), "committed", "epoch", fx.Epoch, "frozen_ms", a.FrozenMS, "pvm_pause_ms", a.PVMPauseMS, "svm_pause_ms", a.SVMPauseMS)
	if inside {
		ck.step(checkpoint.Event{Kind: checkpoint.EvInside, Epoch: fx.Epoch})
	}
	if ck.d.failover != nil {
		ck.d.repl.tries.lasts()
		ck.d.repl.pointsCommitted(fx.Began)
	}
	ck.d.failover.step(failover.Event{Kind: failover.EvCommitted})
	if waited > 0 {
		ck.step(checkpoint.Event{Kind: checkpoint.EvReleased, Epoch: fx.Epoch})
	}
	ck.d.failover.dropMute(records, waited, ck.isPeriodic())
	return nil
}

// drain waits until the SVM has read what its taps hold. events: first what QEMU has reported by now is taken in, as
// its answer comes behind that.
func (ck *checkpoints) drain(epoch uint32, events bool) {
	if ck.stopDrain != nil {
		ck.stopDrain()
	}
	// P waits a little longer than that.
	ctx, cancel := context.WithTimeout(ck.d.ctx, time.Duration(ck.d.opt.timing.Ready)*4/5)
	ck.stopDrain = cancel
	m := ck.d.qmp.conn
	ck.d.work.Go(func() {
		defer cancel()
		ev := checkpoint.Event{Kind: checkpoint.EvDrained, Epoch: epoch, OK: true}
		if events && m != nil {
			if _, _, err := m.Status(); err != nil {
				ev.OK, ev.Cause = false, fmt.Sprintf("what QEMU has reported is not known: %v", err)
			}
		}
		for _, n := range ck.d.nics {
			if err := n.DP.DrainTap(ctx); err != nil {
				ev.OK, ev.Cause = false, fmt.Sprintf("nic %d: drain the tap: %v", n.Index, err)
				break
			}
		}
		ck.d.post(func() { ck.step(ev) })
	})
}

// received takes a message about a checkpoint; false: it is none that this side takes.
func (ck *checkpoints) received(m peerlink.Message) bool {
	ev, primary := checkpoint.Event{OK: true}, ck.d.isPrimary()
	var mine bool
	switch m := m.(type) {
	case peerlink.Prepare:
		ev.Kind, ev.Epoch, mine = checkpoint.EvPrepare, m.Epoch, !primary
		ck.d.clock.pvms = m.PausedNS
	case peerlink.Ready:
		ev.Kind, ev.Epoch, mine = checkpoint.EvReady, m.Epoch, primary
	case peerlink.Stopped:
		ev.Kind, ev.Epoch, mine = checkpoint.EvPeerStopped, m.Epoch, primary
	case peerlink.Resumed:
		ev.Kind, ev.Epoch, mine = checkpoint.EvPeerResumed, m.Epoch, primary
		if n := len(ck.attempts); mine && n > 0 && ck.attempts[n-1].Epoch == m.Epoch {
			ck.attempts[n-1].SVMPauseMS = milliseconds(m.PauseNS)
		}
	case peerlink.Abort:
		ev.Kind, ev.Epoch, ev.Cause, ev.Unasked, mine = checkpoint.EvAbort, m.Epoch, m.Cause, m.Unasked, true
		if primary {
			ev.Kind = checkpoint.EvPeerAbort
		}
	}
	if mine {
		ck.step(ev)
	}
	return mine
}
