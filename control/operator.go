// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/nicloop"
	"github.com/lockstep-ft/lockstep/control/qmp"
)

// What an operator may ask a daemon for, over its status socket.

const (
	orderPoll = 10 * time.Millisecond

	causeOperator = "an operator asked for it"
)

// Checkpoint orders a checkpoint and returns it when it is committed, or has failed
// for good.
func (d *Daemon) Checkpoint(ctx context.Context) (api.Checkpoint, error) {
	var refused error
	var from uint32 // the first attempt that has all that the guest did until now
	if err := d.ask(ctx, func() {
		switch {
		case !d.isPrimary():
			refused = fmt.Errorf("checkpoints are the primary's: ask %s", d.opt.Peer)
		case d.opt.QMP == "":
			refused = errors.New("there is no QEMU to ask for one: the config names no qmp socket")
		case !d.peer.linkUp:
			refused = fmt.Errorf("there is no session with %s", d.opt.Peer)
		case d.failover != nil && d.failover.p.State() != failover.PrimaryPair:
			refused = errors.New("the guest does not replicate")
		default:
			from = d.checkpoints.primary.Serves()
			d.checkpoints.wanted(nicloop.Request{At: time.Now(), NIC: -1, Reason: causeOperator})
		}
	}); err != nil {
		return api.Checkpoint{}, err // the controller may still be at it
	}
	if refused != nil {
		return api.Checkpoint{}, refused
	}
	var done *api.Checkpoint
	err := d.until(ctx, func() bool {
		for i := range d.checkpoints.attempts {
			if a := &d.checkpoints.attempts[i]; a.Epoch >= from && a.Result == "committed" {
				done = new(api.Checkpoint)
				*done = *a
				return true
			}
		}
		return false
	})
	if err != nil {
		return api.Checkpoint{}, fmt.Errorf("no checkpoint was committed: %w; `lockstep status` shows what was tried", err)
	}
	return *done, nil
}

// until asks the controller again and again.
func (d *Daemon) until(ctx context.Context, done func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, failover.OrderTimeout)
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

// Failover has this host transmit alone: as the primary it goes on without the
// secondary, as the secondary it takes over. Without force a takeover that loses
// what the guest has sent is refused. An error is what came of it in its place.
func (d *Daemon) Failover(ctx context.Context, force bool) (api.FailoverDone, error) {
	began := time.Now()
	if d.failover == nil {
		return api.FailoverDone{}, errors.New("the config names no arbiter, so nobody can know which host may transmit")
	}
	// Asked before anybody is muted.
	if _, err := d.failover.Arbiter.Read(ctx); err != nil {
		return api.FailoverDone{}, fmt.Errorf("the arbiter cannot be reached, and without it neither host could transmit: %w", err)
	}
	loaded := false
	if d.failover.s != nil && force {
		var err error
		if loaded, err = d.qmp.loaded(ctx); err != nil {
			return api.FailoverDone{}, err
		}
	}
	var refused error
	peer := "" // as it is now: another may follow the outcome at once
	if err := d.ask(ctx, func() { peer, refused = d.opt.Peer, d.failover.orderFailover(force, loaded) }); err != nil {
		return api.FailoverDone{}, err
	}
	if refused != nil {
		return api.FailoverDone{}, refused
	}
	err := d.until(ctx, func() bool { return d.failover.done() })
	select {
	case <-d.stopped: // the controller has ended with it, and nobody else looks at its machine any more
		err = nil
	default:
	}
	if err == nil {
		err = d.failover.outcome(peer)
	} else if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("nothing came of it in %v; `lockstep status` shows what it waits for, and it may still happen", failover.OrderTimeout)
	}
	return api.FailoverDone{Node: d.opt.Node, Result: "transmits alone", Seconds: time.Since(began).Seconds()}, err
}

// loaded reports whether the SVM is one that could go on (S): it follows a PVM, and is
// not in the middle of being loaded for the first time.
func (mo *monitor) loaded(ctx context.Context) (bool, error) {
	follows, err := mo.follows(ctx)
	if err != nil || !follows {
		return false, err
	}
	var m *qmp.Monitor
	if err := mo.d.ask(ctx, func() { m = mo.conn }); err != nil || m == nil {
		return false, err
	}
	_, state, err := m.Status()
	return state != "inmigrate", err
}

// done reports whether an order to fail over has come to an end.
func (fo *failoverPart) done() bool {
	if fo.p != nil {
		return fo.p.State() == failover.PrimarySolo || fo.p.State() >= failover.PrimaryFenced
	}
	return fo.s.State() >= failover.SecondarySolo
}

// outcome is nil when this host transmits alone.
func (fo *failoverPart) outcome(peer string) error {
	switch {
	case fo.p != nil && fo.p.State() == failover.PrimarySolo, fo.s != nil && fo.s.State() == failover.SecondarySolo:
		return nil
	case fo.p != nil && fo.p.State() == failover.PrimaryOff, fo.s != nil && fo.s.State() == failover.SecondaryOff:
		return ErrPoweredOff
	}
	return fmt.Errorf("this host does not transmit: the arbiter's entry names %s, or its own QEMU failed; `lockstep events` shows which", peer)
}

// order hands an operator's order to the failover machine, or returns why that
// would not follow it. loaded: S has an SVM that could go on.
func (fo *failoverPart) orderFailover(force, loaded bool) error {
	if p := fo.p; p != nil {
		switch p.State() {
		case failover.PrimaryStart, failover.PrimaryPair:
			fo.step(failover.Event{Kind: failover.EvTakeOver})
			return nil
		case failover.PrimarySolo:
			return errors.New("this host transmits alone already")
		}
		return fmt.Errorf("not now: the pair is in state %q", fo.d.ownStatus().State)
	}
	s := fo.s
	var echoed int64
	for _, n := range fo.d.nics {
		echoed = max(echoed, n.DP.LastEcho())
	}
	switch {
	case s.State() != failover.SecondaryPair:
		return errors.New("this host follows nobody, so there is nothing to take over")
	case !s.Covered() && !force:
		return errors.New("no checkpoint covers this secondary yet: clients would lose what the guest has sent them since replication began; wait, or use --force")
	case !s.Covered() && !loaded:
		return errors.New("this secondary has no guest yet: its memory is still being copied")
	case !s.MayTakeOver(echoed, true):
		return errors.New("the primary transmits alone, without a lease that this host could wait for: end it first, or wait until it replicates")
	}
	fo.step(failover.Event{Kind: failover.EvTakeOver, OK: force})
	return nil
}
