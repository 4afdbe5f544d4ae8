// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"net"
	"sync"
	"time"

	"lockstep/control/checkpoint"
	"lockstep/control/failover"
	"lockstep/control/qmp"
)

const (
	qmpTimeout  = 2 * time.Second
	qmpPoll     = 5 * time.Second // a QEMU that says nothing is asked how it is
	qmpPollLife = time.Second     // where another host can go on
	qmpRetry    = 100 * time.Millisecond
	qmpRetryMax = 2 * time.Second
)

// qmpInfo is what is known of QEMU.
type qmpInfo struct {
	connected bool
	since     time.Time
	version   string
	state     string // QEMU's word
	colo      string // COLO mode
	err       string // of the last failure
}

// monitor keeps a connection to QEMU and hands what comes of it to the
// controller. All of its fields but path are the controller's.
type monitor struct {
	path string
	conn *qmp.Monitor // nil: not connected
	info qmpInfo

	reported map[string]time.Time // when an event was reported last, by name
}

// watchQEMU connects, tells, reconnects, until ctx ends.
func (d *Daemon) watchQEMU(ctx context.Context) {
	again := backoff{first: qmpRetry, last: qmpRetryMax}
	process := owner{path: d.qmp.path, noAsk: d.opt.noAskQEMU}
	if d.life != nil {
		process.guest = d.life.Guest
	}
	defer process.forget()
	for ctx.Err() == nil {
		began := time.Now()
		m, err := d.opt.dialQMP(ctx, d.qmp.path, &d.opt, func(conn *net.UnixConn) {
			process.connected(conn)
			d.slowToAnswer(ctx)
		})
		connected := err == nil
		if connected {
			again.reset()
			err = d.watchMonitor(ctx, m)
		} else {
			var r reach
			r, err = process.judge(err)
			d.post(func() { d.unreachable(r, err) })
		}
		d.post(func() {
			if why := err.Error(); d.qmp.info.err != why && ctx.Err() == nil {
				d.qmp.info.err = why
				d.log.Warn("no QMP connection", "socket", d.qmp.path, "err", err)
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

// watchMonitor follows one connection to its end.
func (d *Daemon) watchMonitor(ctx context.Context, m *qmp.Monitor) error {
	defer context.AfterFunc(ctx, func() { m.Disconnect() })()
	defer m.Disconnect()
	events, err := m.Events(ctx)
	if err != nil {
		return err
	}
	// Events that come meanwhile wait; at worst they tell again what Status told.
	running, state, err := m.Status()
	if err != nil {
		return err
	}
	mode, err := m.COLO()
	if err != nil {
		return err
	}
	d.post(func() {
		d.qmp.conn = m
		d.qmp.info = qmpInfo{connected: true, since: time.Now(), version: m.Version(), state: state, colo: mode}
		d.log.Info("QMP connected", "socket", d.qmp.path, "qemu", m.Version(), "state", state, "colo", mode)
		if d.life != nil {
			d.life.hadQEMU, d.life.unanswered, d.life.outOfReach = true, 0, false
			if d.life.untold {
				d.tellQEMU()
			}
		}
		d.step(checkpoint.Event{Kind: checkpoint.EvQMPUp, OK: running})
		d.guestState(state)
		d.checkMasked()
		d.prepare()
		d.probe()
		d.rescue(running, state)
		d.paired()
	})

	polling, stop := context.WithCancel(ctx)
	var asking sync.WaitGroup
	defer asking.Wait()
	defer stop()
	asking.Go(func() { d.pollMonitor(polling, m) })
	for e := range events {
		at, skew := d.boottime(qmp.Time(e))
		switch e.Event {
		case "STOP":
			d.post(func() {
				d.qmp.info.state = "paused"
				d.ran(checkpoint.Event{Kind: checkpoint.EvStop, At: at, Skew: skew})
			})
		case "RESUME":
			d.post(func() {
				d.qmp.info.state = "running"
				d.ran(checkpoint.Event{Kind: checkpoint.EvResume, At: at, Skew: skew})
			})
		case "COLO_EXIT":
			d.log.Info("QEMU", "event", e.Event, "data", e.Data)
			d.post(func() {
				if d.life == nil || !d.life.deaf {
					d.live(failover.Event{Kind: failover.EvCOLOExit})
				}
			})
		default:
			d.post(func() { d.guestEvent(e.Event, e.Data) })
			d.reportEvent(e)
		}
	}
	d.post(func() {
		d.qmp.conn = nil
		d.qmp.info.connected, d.qmp.info.since = false, time.Now()
		d.step(checkpoint.Event{Kind: checkpoint.EvQMPDown})
	})
	return m.Err()
}

// ran takes a STOP or a RESUME.
func (d *Daemon) ran(ev checkpoint.Event) {
	if d.life != nil {
		if d.life.deaf {
			return // the failover's own
		}
		if ev.Kind == checkpoint.EvResume {
			defer d.live(failover.Event{Kind: failover.EvRuns})
			defer d.guestGoesOn()
		}
	}
	d.step(ev)
}

// maxUnanswered is how often in a row a QEMU may not answer a new connection before
// it counts as dead.
const maxUnanswered = 2

// pollMonitor finds out about a QEMU that hangs: the command's deadline closes
// the connection.
func (d *Daemon) pollMonitor(ctx context.Context, m *qmp.Monitor) {
	tick := time.NewTicker(d.opt.qmpPoll)
	defer tick.Stop()
	for m.Err() == nil {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		_, state, err := m.Status()
		if err != nil {
			continue
		}
		mode, err := m.COLO()
		if err != nil {
			continue
		}
		d.post(func() {
			if d.qmp.conn == m {
				d.qmp.info.state, d.qmp.info.colo = state, mode
				d.guestState(state)
			}
		})
	}
}

// askQEMU runs a command beside the controller, which hears of the result.
func (d *Daemon) askQEMU(ask func(*qmp.Monitor) checkpoint.Event) {
	m := d.qmp.conn
	if m == nil {
		return // evQMPDown said so
	}
	d.work.Go(func() {
		ev := ask(m)
		d.post(func() {
			if d.qmp.conn == m {
				d.step(ev)
			}
		})
	})
}

// boottime is QEMU's time on our clock, and the wall clock's lead over it.
func (d *Daemon) boottime(t time.Time) (at, skew int64) {
	// The clocks are read one after the other: the closest of a few readings.
	best := int64(-1)
	for range 5 {
		before := d.now()
		wall := time.Now().UnixNano()
		if gap := d.now() - before; best < 0 || gap < best {
			best, skew = gap, wall-before-gap/2
		}
	}
	return t.UnixNano() - skew, skew
}
