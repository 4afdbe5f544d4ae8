// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"fmt"
	"time"

	"github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/journal"
)

// entryEvery is how often a primary reads the arbiter's entry: one that somebody else
// has won is fenced.
const entryEvery = 5 * time.Second

// entryTimeout bounds it: a claim may be waiting for its turn.
const entryTimeout = 500 * time.Millisecond

// EntryNoticed is how long a primary that can ask the arbiter may take to find a newer entry.
const EntryNoticed = entryEvery + 2*entryTimeout

// watchEntry fences a host that the arbiter does not name any more (R26), and has a spare follow the one that it names.
func (fo *failoverPart) watchEntry(ctx context.Context, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		asking, done := context.WithTimeout(ctx, entryTimeout)
		now, err := fo.Arbiter.Read(asking)
		done()
		if err != nil {
			continue // whoever needs its answer logs that
		}
		fo.d.post(func() { fo.entry(now) })
	}
}

func (fo *failoverPart) entry(now arbiter.Entry) {
	if fo.s != nil {
		fo.passedBy(now)
		return
	}
	if now.Speaker != fo.d.opt.Node && now.Term > fo.p.Term() && fo.p.State() != failover.PrimaryClaim {
		fo.d.log.Error("the arbiter names another node", "entry", now)
	}
	fo.step(failover.Event{Kind: failover.EvEntry, Term: now.Term, OK: now.Speaker == fo.d.opt.Node})
}

// serialArbiter is an arbiter that several goroutines ask, one after the other.
type serialArbiter struct {
	arbiter.Arbiter
	turn chan struct{} // holds one
}

func serialize(a arbiter.Arbiter) *serialArbiter {
	s := &serialArbiter{a, make(chan struct{}, 1)}
	s.turn <- struct{}{}
	return s
}

func (s *serialArbiter) wait(ctx context.Context) error {
	select {
	case <-s.turn:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *serialArbiter) Read(ctx context.Context) (arbiter.Entry, error) {
	if err := s.wait(ctx); err != nil {
		return arbiter.Entry{}, err
	}
	defer func() { s.turn <- struct{}{} }()
	return s.Arbiter.Read(ctx)
}

func (s *serialArbiter) Settle(ctx context.Context) (arbiter.Entry, error) {
	if err := s.wait(ctx); err != nil {
		return arbiter.Entry{}, err
	}
	defer func() { s.turn <- struct{}{} }()
	return s.Arbiter.Settle(ctx)
}

func (s *serialArbiter) Swap(ctx context.Context, old, next arbiter.Entry) (arbiter.Entry, bool, error) {
	if err := s.wait(ctx); err != nil {
		return arbiter.Entry{}, false, err
	}
	defer func() { s.turn <- struct{}{} }()
	return s.Arbiter.Swap(ctx, old, next)
}

// guestGone reports whether this host's QEMU has ended, and has that be found out then: a daemon that
// stood still may miss the other host before it learns what its own monitor's socket tells.
func (fo *failoverPart) guestGone() bool {
	gone := fo.d.qmp.process.dead()
	if gone {
		fo.d.work.Go(func() { fo.d.post(func() { fo.d.qmp.qemuGone("its process has ended", false) }) })
	}
	return gone
}

// claim asks the arbiter until it is known what came of it (R21 ii). A host whose guest has gone does not.
func (fo *failoverPart) claim(term uint64) {
	if fo.guestGone() {
		return
	}
	from := arbiter.Entry{Term: term, Speaker: fo.d.opt.Node}
	if fo.s != nil {
		from.Speaker = fo.d.opt.Peer
	}
	to := arbiter.Entry{Term: term + 1, Speaker: fo.d.opt.Node}
	if fo.p != nil {
		fo.d.log.Warn("going on without "+fo.d.opt.Peer+", if the arbiter lets it", "why", fo.p.Why())
	}
	fo.d.log.Info("asking the arbiter whether this node may transmit alone", "from", from, "to", to)
	fo.d.work.Go(func() {
		now, won, err := Swap(fo.d.ctx, fo.Arbiter, from, to, func(err error) {
			fo.d.log.Warn("the arbiter does not answer which host may transmit: muted until it does", "err", err)
		})
		if err != nil {
			return // the daemon ends
		}
		fo.d.post(func() {
			fo.d.log.Info("the arbiter answered", "won", won, "entry", now)
			cause := "this node may transmit alone"
			if !won {
				cause = "this node may not transmit any more"
			}
			fo.d.event(journal.Arbiter, cause, map[string]any{"won": won, "term": now.Term, "speaker": now.Speaker})
			fo.step(failover.Event{Kind: failover.EvClaimed, OK: won, Term: now.Term})
		})
	})
}

// Swap changes the arbiter's entry to "to" if it is "from", and returns when that is known, or ctx has
// ended. An arbiter that answers with from has decided nothing: as one that does not
// answer it is asked again, at a growing distance, since each time may fence a host.
func Swap(ctx context.Context, a arbiter.Arbiter, from, to arbiter.Entry, failed func(error)) (now arbiter.Entry, won bool, err error) {
	unanswered, unmoved := arbiterRetry, unmovedRetry
	for {
		again := &unanswered
		now, won, err = a.Swap(ctx, from, to)
		if err == nil && !won && now == from {
			again = &unmoved
			err = fmt.Errorf("asked to change the entry (%s) to %s, the arbiter answers that it is what it was, which means neither won nor lost; an `exec` command has to make the change or fail (docs/ARBITER.md)", from, to)
		}
		if err == nil {
			return now, won, nil
		}
		failed(err)
		if !again.wait(ctx) {
			return now, false, ctx.Err()
		}
		if now, err = Settle(ctx, a, failed); err != nil {
			return now, false, err
		}
		if now == to || now != from {
			return now, now == to, nil
		}
	}
}

// Settle returns the entry when the arbiter knows it, or ctx has ended.
func Settle(ctx context.Context, a arbiter.Arbiter, failed func(error)) (arbiter.Entry, error) {
	again := arbiterRetry
	for {
		now, err := a.Settle(ctx)
		if err == nil {
			return now, nil
		}
		failed(err)
		if !again.wait(ctx) {
			return now, ctx.Err()
		}
	}
}

// arbiterRetry paces the questions to an arbiter that does not answer.
var arbiterRetry = backoff{first: 50 * time.Millisecond, last: time.Second}

// unmovedRetry paces them to one that answers with the entry as it was.
var unmovedRetry = backoff{first: 50 * time.Millisecond, last: 30 * time.Second}
