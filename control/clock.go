// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/guestagent"
	"github.com/lockstep-ft/lockstep/control/nicloop"
)

const (
	// clockBehind is how far behind a guest's clock has to be to be set: a step, and the checkpoint after it, for
	// each few milliseconds would be worse than these.
	clockBehind = 250 * time.Millisecond
	clockEvery  = 10 * time.Second // between two looks at it
	clockAnswer = 5 * time.Second  // for the guest agent to answer
)

// guestClock knows how far the guest's clock has fallen behind: it stands still while the guest does. Where there is a
// guest agent, it has that set the clock.
type guestClock struct {
	d *Daemon
	*Pauses

	every   time.Duration
	answer  time.Duration // a limit
	asking  bool
	looked  time.Time      // when the agent was asked last
	counted int64          // pauses until then
	behind  *time.Duration // as it found; nil: it has not answered yet
	found   time.Time      // then
	sets    uint64
	err     error // of the last look
}

// Pauses add up for how long a guest has stood still since it booted.
type Pauses struct {
	sum  int64 // ns
	at   int64 // when it stopped, boottime ns; 0: it runs
	pvms int64 // S: the PVM's sum when the last checkpoint began
}

func (p *Pauses) stopped(at int64) {
	if p.at == 0 {
		p.at = at
	}
}

func (p *Pauses) resumed(at int64) {
	if p.at != 0 {
		p.sum += max(0, at-p.at) // QEMU's times are not of this clock
	}
	p.at = 0
}

// copied: a checkpoint has made the SVM the PVM's copy, whose clock stood still before that and during pause.
func (p *Pauses) copied(pause int64) { p.sum = p.pvms + max(0, pause) }

// booted: a guest that boots takes the time from its RTC, which is right.
func (p *Pauses) booted() { *p = Pauses{} }

// status is what is known of the clock.
func (gc *guestClock) status() api.GuestClock {
	s := api.GuestClock{PausedSeconds: time.Duration(gc.sum).Seconds(), Agent: gc.d.opt.GuestAgent != "", Sets: gc.sets}
	if gc.behind != nil {
		behind, at := gc.behind.Seconds(), gc.found
		s.BehindSeconds, s.Looked = &behind, &at
	}
	if gc.err != nil {
		s.Error = gc.err.Error()
	}
	return s
}

// watch looks at the clock now and then.
func (gc *guestClock) watch(ctx context.Context) {
	tick := time.NewTicker(gc.every / 10)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			gc.d.post(gc.look)
		case <-ctx.Done():
			return
		}
	}
}

// due reports whether the agent is to be asked: first of all, later when the guest has stood still for long enough, or
// when it did not answer.
func (gc *guestClock) due(now time.Time) bool {
	if gc.asking || now.Sub(gc.looked) < gc.every {
		return false
	}
	return gc.looked.IsZero() || gc.err != nil || gc.sum-gc.counted >= int64(clockBehind) || gc.sum < gc.counted
}

// look asks the agent, beside the controller, and has it set the PVM's clock where that is behind. The SVM gets the new
// time like everything else of the PVM, with the next checkpoint, which is made at once: until then the two differ.
func (gc *guestClock) look() {
	d := gc.d
	if d.qmp.conn == nil || d.qmp.info.state != "running" || !gc.due(time.Now()) {
		return
	}
	limit := gc.answer
	gc.asking, gc.looked, gc.counted = true, time.Now(), gc.sum
	d.work.Go(func() {
		ctx, cancel := context.WithTimeout(d.ctx, limit)
		defer cancel()
		behind, set, err := correct(ctx, d.opt.GuestAgent, d.isPrimary())
		d.post(func() { gc.answered(behind, set, err) })
	})
}

// correct has the agent at path report how far behind this host's clock the guest's is, at least, and set it if that is
// too much and it may. set: it did, or may have.
func correct(ctx context.Context, path string, may bool) (behind time.Duration, set bool, err error) {
	a, err := guestagent.Dial(ctx, path)
	if err != nil {
		return 0, false, err
	}
	defer a.Close()
	now := time.Now()
	at, err := a.Time()
	if err != nil {
		return 0, false, err
	}
	// The guest's clock was read later than ours, if it stood still meanwhile much later.
	// A time that reaches the guest late would set it back.
	if behind = now.Sub(at); !may || behind < max(clockBehind, 2*time.Since(now)) {
		return behind, false, nil
	}
	return behind, true, a.SetTime(time.Now())
}

func (gc *guestClock) answered(behind time.Duration, set bool, err error) {
	d := gc.d
	gc.asking = false
	switch {
	case err == nil:
		gc.behind, gc.found = &behind, gc.looked
		if gc.err != nil {
			d.log.Info("the guest agent answers")
		}
	case d.isPrimary() && (gc.err == nil || gc.err.Error() != err.Error()) && d.ctx.Err() == nil:
		d.log.Warn("the guest's clock is not set", "socket", d.opt.GuestAgent, "err", err)
	}
	gc.err = err
	if !set {
		return
	}
	if err == nil {
		gc.sets++
	}
	d.log.Info("the guest's clock was set", "behind", behind, "err", err)
	if d.failover.paired() { // there may be no session yet: the checkpoint waits for it
		d.checkpoints.wanted(nicloop.Request{At: time.Now(), NIC: -1, Reason: "the guest's clock was set"})
	}
}
