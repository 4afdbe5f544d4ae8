// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"io"
	"math"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/lockstep-ft/lockstep/control/checkpoint"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qmp"
)

const (
	qmpTimeout      = 2 * time.Second
	qmpPoll         = 5 * time.Second // how often an idle QEMU is asked for its state
	qmpPollFailover = time.Second     // where another host can go on
	qmpRetry        = 100 * time.Millisecond
	qmpRetryMax     = 2 * time.Second
)

// qmpInfo is what is known of QEMU.
type qmpInfo struct {
	connected bool
	since     time.Time
	version   string
	state     string // as QEMU names it
	colo      string // COLO mode
	err       string // of the last failure
	clear     bool   // it is in COLO with the other host's in the clear
}

// monitor keeps a connection to QEMU and hands what comes of it to the
// controller. All of its fields but path and process are the controller's.
type monitor struct {
	d       *Daemon
	path    string
	process owner        // the watcher's
	conn    *qmp.Monitor // nil: not connected
	info    qmpInfo

	reported map[string]time.Time // when an event was reported last, by name

	hadQEMU    bool // there was one, so its absence is its death
	unanswered int  // connections to it that it did not answer, in a row
	outOfReach bool // it lives, but its monitor cannot be reached
	detached   bool // S: what QEMU does now is not the checkpoint machine's

	pausing sync.Mutex // held while the guest is stopped to ask for a checkpoint
}

// watchQEMU connects, reports, reconnects, until ctx ends.
func (mo *monitor) watchQEMU(ctx context.Context) {
	again := backoff{first: qmpRetry, last: qmpRetryMax}
	process := &mo.process
	process.path, process.noAsk = mo.path, mo.d.opt.noAskQEMU
	if mo.d.failover != nil {
		process.guest = mo.d.failover.Guest
	}
	defer process.forget()
	for ctx.Err() == nil {
		began := time.Now()
		m, err := mo.d.opt.dialQMP(ctx, mo.path, &mo.d.opt, func(conn *net.UnixConn) {
			process.connected(conn)
			mo.slowToAnswer(ctx)
		})
		connected := err == nil
		if connected {
			again.reset()
			err = mo.watchMonitor(ctx, m)
			if errors.Is(err, qmp.ErrHangs) {
				r, why := process.judge(err)
				mo.d.post(func() { mo.hangs(r, why) })
			}
		} else {
			var r reach
			r, err = process.judge(err)
			mo.d.post(func() { mo.unreachable(r, err) })
		}
		mo.d.post(func() {
			if why := err.Error(); mo.info.err != why && ctx.Err() == nil {
				mo.info.err = why
				if !connected || !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) { // the next connection shows what that means
					mo.d.log.Warn("no QMP connection", "socket", mo.path, "err", err)
				}
			}
		})
		if connected && time.Since(began) > qmpRetry {
			continue // at once it is found out whether QEMU died
		}
		if !again.waitUnless(ctx, process.ended()) {
			return
		}
	}
}

// bePatient sets how many commands in a row QEMU may leave unanswered. A secondary whose QEMU goes on after a while
// has to know whether it has loaded a checkpoint then; one that takes over gives it up only when it has ended, since
// nobody else may be left to serve. A primary's is in doubt at once, and goes on with a guest that a command has stopped
// late.
func (mo *monitor) bePatient() {
	switch {
	case mo.conn == nil || mo.d.isPrimary():
	case mo.d.failover.waits():
		mo.conn.BePatient(1 + maxUnanswered)
	case !mo.d.failover.ended():
		mo.conn.BePatient(math.MaxInt)
	}
}

// watchMonitor follows one connection to its end.
func (mo *monitor) watchMonitor(ctx context.Context, m *qmp.Monitor) error {
	defer context.AfterFunc(ctx, func() { m.Disconnect() })()
	defer m.Disconnect()
	events, err := m.Events(ctx)
	if err != nil {
		return err
	}
	if err := mo.unpause(m); err != nil {
		return err
	}
	// Events that come meanwhile wait; at worst they repeat what Status reported.
	running, state, err := m.Status()
	if err != nil {
		return err
	}
	mode, err := m.COLO()
	if err != nil {
		return err
	}
	clear := false // a pair that began before the setting goes on as it is
	if fo := mo.d.failover; fo != nil && fo.Own.TLS != nil && mode != "none" {
		if clear, err = qemu.InClear(m); err != nil {
			return err
		}
	}
	mo.d.post(func() {
		mo.conn = m
		mo.info = qmpInfo{connected: true, since: time.Now(), version: m.Version(), state: state, colo: mode, clear: clear}
		mo.d.log.Info("QMP connected", "socket", mo.path, "qemu", m.Version(), "state", state, "colo", mode)
		if mo.d.failover != nil {
			mo.hadQEMU, mo.unanswered, mo.outOfReach = true, 0, false
			if mo.d.failover.tellAgain {
				mo.d.failover.tellQEMU()
			}
		}
		if running {
			mo.d.clock.resumed(mo.d.now()) // the event may have been missed
		}
		mo.d.checkpoints.step(checkpoint.Event{Kind: checkpoint.EvQMPUp, OK: running})
		mo.d.guest.guestState(state)
		mo.d.guest.checkMasked()
		mo.d.repl.prepare()
		mo.d.repl.probe()
		mo.d.failover.rescue(running, state)
		mo.d.repl.paired()
	})

	mo.d.post(mo.bePatient)
	polling, stop := context.WithCancel(ctx)
	var asking sync.WaitGroup
	defer asking.Wait()
	defer stop()
	asking.Go(func() { mo.pollMonitor(polling, m) })
	for e := range events {
		at, skew := mo.boottime(qmp.Time(e))
		switch e.Event {
		case "STOP":
			mo.d.post(func() {
				mo.info.state = "paused"
				mo.d.clock.stopped(at)
				mo.ran(checkpoint.Event{Kind: checkpoint.EvStop, At: at, Skew: skew})
			})
		case "RESUME":
			mo.d.post(func() {
				mo.info.state = "running"
				mo.d.clock.resumed(at)
				mo.ran(checkpoint.Event{Kind: checkpoint.EvResume, At: at, Skew: skew})
			})
		case "COLO_EXIT":
			mo.d.log.Info("QEMU", "event", e.Event, "data", e.Data)
			mo.d.post(func() {
				if e.Data["reason"] == "request" {
					mo.endNote() // also where somebody else ordered it
				}
				if mo.d.failover == nil || !mo.detached {
					mo.d.failover.step(failover.Event{Kind: failover.EvCOLOExit})
				}
			})
		default:
			mo.d.post(func() { mo.d.guest.guestEvent(e.Event, qmp.Time(e), e.Data) })
			mo.reportEvent(e)
		}
	}
	mo.d.post(func() {
		mo.conn = nil
		mo.info.connected, mo.info.since = false, time.Now()
		mo.d.checkpoints.step(checkpoint.Event{Kind: checkpoint.EvQMPDown})
	})
	return m.Err()
}

// unpause has a guest go on that a connection before this one, or a daemon, left stopped.
func (mo *monitor) unpause(m *qmp.Monitor) error {
	if !mo.d.isPrimary() {
		return nil
	}
	mo.pausing.Lock()
	defer mo.pausing.Unlock()
	return qemu.Unpause(m)
}

// status asks for the guest's state, but not while it is stopped for a checkpoint: then
// QEMU may not answer before the guest's I/O has ended, which is no sign that it hangs.
func (mo *monitor) status(m *qmp.Monitor) (state string, err error) {
	mo.pausing.Lock()
	defer mo.pausing.Unlock()
	_, state, err = m.Status()
	return state, err
}

// ran takes a STOP or a RESUME.
func (mo *monitor) ran(ev checkpoint.Event) {
	if mo.d.failover != nil {
		if mo.detached {
			return // the failover's own
		}
		if ev.Kind == checkpoint.EvResume {
			defer mo.d.failover.step(failover.Event{Kind: failover.EvRuns})
			defer mo.d.guest.guestGoesOn()
		}
	}
	mo.d.checkpoints.step(ev)
}

// maxUnanswered is how often in a row a QEMU may not answer a new connection before
// it counts as dead.
const maxUnanswered = 2

// pollMonitor finds out about a QEMU that hangs: the command's deadline closes
// the connection, or that of several in a row (S).
func (mo *monitor) pollMonitor(ctx context.Context, m *qmp.Monitor) {
	tick := time.NewTicker(mo.d.opt.qmpPoll)
	defer tick.Stop()
	for m.Err() == nil {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		state, err := mo.status(m)
		if err != nil {
			continue
		}
		mode, err := m.COLO()
		if err != nil {
			continue
		}
		broken, _ := qemu.BrokenDevices(m) // without an answer the state counts all the same
		mo.d.post(func() {
			if mo.conn == m {
				mo.info.state, mo.info.colo = state, mode
				mo.d.guest.guestState(state)
				mo.d.guest.devicesBroken(broken)
			}
		})
	}
}

// askQEMU runs a command beside the controller, which gets the result.
func (mo *monitor) askQEMU(ask func(*qmp.Monitor) checkpoint.Event) {
	m := mo.conn
	if m == nil {
		return // EvQMPDown reported it
	}
	mo.d.work.Go(func() {
		ev := ask(m)
		mo.d.post(func() {
			if mo.conn == m {
				mo.d.checkpoints.step(ev)
			}
		})
	})
}

// noDelay has checkpoints not wait for the network between the hosts longer than they must.
func (mo *monitor) noDelay(in qemu.Incoming) {
	mo.procedure("switch Nagle's algorithm off", func(_ context.Context, m *qmp.Monitor) error { return qemu.NoDelay(m, in) }, func(err error) {
		if err != nil {
			mo.d.log.Warn("Nagle's algorithm stays on between the two QEMUs, so each checkpoint takes longer", "err", err)
		}
	})
}

// boottime is QEMU's time on our clock, and the wall clock's lead over it.
func (mo *monitor) boottime(t time.Time) (at, skew int64) {
	// The clocks are read one after the other: the closest of a few readings.
	best := int64(-1)
	for range 5 {
		before := mo.d.now()
		wall := time.Now().UnixNano()
		if gap := mo.d.now() - before; best < 0 || gap < best {
			best, skew = gap, wall-before-gap/2
		}
	}
	return t.UnixNano() - skew, skew
}
