// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"
)

// What an operator may ask a daemon for, over its status socket.

const (
	// orderTimeout bounds an order that is carried out in steps.
	orderTimeout = 30 * time.Second
	orderPoll    = 10 * time.Millisecond

	causeOperator = "an operator asked for it"
)

// Checkpoint orders a checkpoint and returns it when it is committed, or has failed
// for good.
func (d *Daemon) Checkpoint(ctx context.Context) (Checkpoint, error) {
	var refused error
	var after time.Time
	if err := d.ask(ctx, func() {
		switch {
		case d.primary == nil:
			refused = fmt.Errorf("checkpoints are the primary's: ask %s", d.opt.Peer)
		case d.opt.QMP == "":
			refused = errors.New("there is no QEMU to ask for one: the config names no qmp socket")
		case !d.linkUp:
			refused = fmt.Errorf("there is no session with %s", d.opt.Peer)
		case d.life != nil && d.life.p.state != lpPair:
			refused = errors.New("the guest does not replicate")
		default:
			after = time.Now()
			d.wanted(request{at: after, nic: -1, reason: causeOperator})
		}
	}); err != nil || refused != nil {
		return Checkpoint{}, errors.Join(err, refused)
	}
	var done *Checkpoint
	err := d.until(ctx, func() bool {
		for i := range d.attempts {
			if a := &d.attempts[i]; !a.At.Before(after) && a.Result == "committed" {
				done = new(Checkpoint)
				*done = *a
				return true
			}
		}
		return false
	})
	if err != nil {
		return Checkpoint{}, fmt.Errorf("no checkpoint was committed: %w; `lockstep status` tells what was tried", err)
	}
	return *done, nil
}

// until asks the controller again and again.
func (d *Daemon) until(ctx context.Context, done func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, orderTimeout)
	defer cancel()
	tick := time.NewTicker(orderPoll)
	defer tick.Stop()
	for {
		ok := false
		if err := d.ask(ctx, func() { ok = done() }); err != nil || ok {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// FailoverDone tells what came of a failover.
type FailoverDone struct {
	Node    string  `json:"node"`   // that was asked
	Result  string  `json:"result"` // "speaks alone", "takes over"
	Seconds float64 `json:"seconds"`
}

// Failover has this host speak alone: as the primary it goes on without the
// secondary, as the secondary it takes over. Without force a takeover that loses
// what the guest said is refused.
func (d *Daemon) Failover(ctx context.Context, force bool) (FailoverDone, error) {
	began := time.Now()
	if d.life == nil {
		return FailoverDone{}, errors.New("the config names no arbiter, so nobody can know which host may speak")
	}
	// Asked before anybody falls silent. While nothing is claimed nobody else asks it.
	if _, err := d.life.Arbiter.Read(ctx); err != nil {
		return FailoverDone{}, fmt.Errorf("the arbiter cannot be reached, and without it neither host could speak: %w", err)
	}
	var refused error
	if err := d.ask(ctx, func() { refused = d.orderFailover(force) }); err != nil || refused != nil {
		return FailoverDone{}, errors.Join(err, refused)
	}
	out := FailoverDone{Node: d.opt.Node, Result: "takes over"}
	if d.life.p != nil {
		out.Result = "speaks alone"
	}
	err := d.until(ctx, func() bool {
		if p := d.life.p; p != nil {
			return p.state == lpSolo || p.state == lpOut
		}
		return d.life.s.state >= lsSolo
	})
	if d.life.s != nil && ctx.Err() == nil {
		err = nil // the daemon's part as the secondary ends with it
	}
	out.Seconds = time.Since(began).Seconds()
	return out, err
}

func (d *Daemon) orderFailover(force bool) error {
	if p := d.life.p; p != nil {
		switch p.state {
		case lpStart, lpPair:
			d.live(lifeEvent{Kind: lvTakeOver})
			return nil
		case lpSolo:
			return errors.New("this host speaks alone already")
		}
		return fmt.Errorf("not now: the pair is in state %q", d.ownStatus().State)
	}
	s := d.life.s
	switch {
	case s.state != lsPair:
		return errors.New("this host follows nobody, so there is nothing to take over")
	case !s.covered && !force:
		return errors.New("no checkpoint covers this secondary yet: clients would lose what the guest has told them since replication began; wait, or use --force")
	}
	s.covered = true
	if d.link != nil {
		d.send(message{Type: "yield"}) // a primary that lives says when it is silent
		return nil
	}
	d.live(lifeEvent{Kind: lvTakeOver})
	return nil
}

// obey answers a POST.
func obey[T any](f func(context.Context, *http.Request) (T, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Longer than what is only told.
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(orderTimeout + askTimeout))
		v, err := f(r.Context(), r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		reply(w, v)
	})
}

// OrderCheckpoint asks the daemon behind the status socket path for a checkpoint.
func OrderCheckpoint(ctx context.Context, path string) (Checkpoint, error) {
	return call[Checkpoint](ctx, http.MethodPost, path, "checkpoint")
}

// OrderFailover has the daemon's host speak alone.
func OrderFailover(ctx context.Context, path string, force bool) (FailoverDone, error) {
	topic := "failover"
	if force {
		topic += "?force=1"
	}
	return call[FailoverDone](ctx, http.MethodPost, path, topic)
}
