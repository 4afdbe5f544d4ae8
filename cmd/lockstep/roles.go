// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"github.com/lockstep-ft/lockstep/control"
	"github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/journal"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/state"
)

// restartDelay is the wait before a secondary that was given up starts again.
const restartDelay = 200 * time.Millisecond

// roleState is what a node of a pair that fails over keeps from one role to the next.
type roleState struct {
	begin   failover.Begin
	arbiter arbiter.Arbiter
	store   *state.Store
	journal *journal.Journal
	setback control.Setback
	pauses  control.Pauses
	discard bool // the recovered state belongs to an SVM that was given up
	fenced  bool // the last role ended so: the other host may be about to take over
}

// runFailover runs this node's roles, and notes in the journal when the daemon began and ended.
func runFailover(ctx context.Context, e env, o runOptions) error {
	c, self := o.config, o.self.Name
	a, err := arbiter.Open(c, self)
	if err != nil {
		return err
	}
	defer a.Close()
	store, err := state.Open(c.StateDir, c.VM, self)
	if err != nil {
		return notYetError{c.Refuse("state_dir", err.Error(), "")}
	}
	j, err := journal.Open(c.StateDir, c.VM, self, journal.DefaultLimit, o.log)
	if err != nil {
		return notYetError{c.Refuse("state_dir", err.Error(), "")}
	}
	defer j.Close()
	if st, err := store.Load(); err != nil {
		return err
	} else if st.Off && o.self.Starts {
		o.log.Info(fmt.Sprintf("%s powered off and stays off; `lockstep start -c %s --node %s` has the next run boot it", c.VM, c.File, self))
		control.Notify(o.log, sd.SdNotifyReady) // or systemd takes this for a start that failed
		return nil
	}
	j.Add(journal.Event{Kind: journal.Daemon, Cause: "started", Fields: map[string]any{"version": versionString()}})
	err = runRoles(ctx, e, o, &roleState{arbiter: a, store: store, journal: j})
	ended := "ended: on request"
	switch {
	case err != nil:
		ended = "ended: " + err.Error()
	case ctx.Err() == nil:
		ended = "ended: " + control.ErrPoweredOff.Error()
	}
	j.Add(journal.Event{Kind: journal.Daemon, Cause: ended})
	return err
}

// runRoles runs one role after the other: a secondary that took over goes on as the
// primary, one that has no primary any more starts again with a new QEMU, and so does a
// primary that was deposed, unless it is started in one role.
func runRoles(ctx context.Context, e env, o runOptions, rs *roleState) (err error) {
	asked := o.role
	for {
		if rs.begin, err = decide(ctx, e, &o, rs); ctx.Err() != nil {
			return nil // it was told to end, whatever it has just asked
		} else if err != nil {
			return err
		}
		now := o
		now.role = rs.begin.Role
		why := fmt.Sprintf("the arbiter names %s (%s)", cmp.Or(rs.begin.Record.Speaker, "nobody"), rs.begin.Record)
		switch o.role {
		case failover.RoleAuto, now.role:
			o.log.Info(fmt.Sprintf("%s is the %s", o.self.Name, now.role), "why", why)
		default:
			o.log.Warn(fmt.Sprintf("%s is the %s, not the %s as which it was started", o.self.Name, now.role, o.role), "why", why)
		}
		rs.journal.Add(journal.Event{Kind: journal.Role, Cause: why, Fields: map[string]any{"role": rs.begin.Role, "term": rs.begin.Record.Term}})
		err := runRole(ctx, e, now, rs)
		rs.discard, rs.fenced = errors.Is(err, control.ErrAfresh), errors.Is(err, control.ErrFenced)
		switch {
		case errors.Is(err, control.ErrPromoted):
			if asked != failover.RoleAuto {
				o.role = datapath.RolePrimary
			}
			continue
		case errors.Is(err, control.ErrPoweredOff):
			return nil
		case !rs.discard && !(rs.fenced && asked == failover.RoleAuto):
			return err
		}
		o.log.Warn(err.Error())
		select {
		case <-time.After(restartDelay):
		case <-ctx.Done():
			return nil
		}
	}
}

// decide finds out what this node has to be, and towards which other one (R19). Without the arbiter it does not
// know, and leaves everything as it is.
func decide(ctx context.Context, e env, o *runOptions, rs *roleState) (failover.Begin, error) {
	self := o.self.Name
	found, running, err := meet(e, *o)
	if err != nil {
		return failover.Begin{}, err
	}
	rec, err := rs.settle(ctx, *o)
	if err != nil {
		return failover.Begin{}, err
	}
	if rs.fenced && rec.Speaker == self {
		// Whether the other host takes over shows within that time.
		h := &o.config.Heartbeat
		if rec, err = rs.await(ctx, rec, h.Restart+2*h.Timeout); err != nil {
			return failover.Begin{}, err
		}
	}
	st, err := rs.store.Load()
	if err != nil {
		return failover.Begin{}, err
	}
	// `none` forgets with its process.
	if rec.Term < st.Term && o.config.Arbiter.Type != config.ArbiterNone {
		return failover.Begin{}, o.config.Refuse("arbiter", fmt.Sprintf("its entry (%s) is older than the one that this node has acted on (term %d): it is another arbiter, or one that has lost the entry", rec, st.Term),
			"name the former arbiter, or restore the entry; docs/ARBITER.md describes how to move to another one")
	}
	if o.role == datapath.RolePrimary && rec == (arbiter.Entry{}) {
		first := arbiter.Entry{Term: 1, Speaker: self}
		if rec, _, err = control.Swap(ctx, rs.arbiter, rec, first, func(err error) {
			o.log.Warn("the arbiter does not answer: waiting", "err", err)
		}); err != nil {
			return failover.Begin{}, err
		}
	}
	if !running && o.self.Starts {
		found = datapath.Pinned{} // tables are of no use without the guest whose connections they know
	}
	if rs.discard {
		found, st.Covered = datapath.Pinned{}, 0
	}
	o.other = pairedWith(o, rec, st)
	b, err := failover.Decide(o.role, self, o.other.Name, st, rec, found)
	b.Anew = rs.discard
	if err == nil {
		err = b.Meets(running)
	}
	if errors.Is(err, failover.ErrNeverRan) {
		end := showWaiting(ctx, *o, fmt.Sprintf("%v. If it is this one, stop this daemon, call `lockstep start --here -c %s --node %s`, and start it again", err, o.config.File, self))
		_, err = rs.await(ctx, rec, 0)
		if end(); err != nil {
			return failover.Begin{}, err
		}
		return decide(ctx, e, o, rs)
	}
	if err != nil {
		return b, usageError{err}
	}
	return b, nil
}

// pairedWith is the other node of the pair that this one is in, or comes to be in: the one that the arbiter names; where
// that is this node, its last one.
func pairedWith(o *runOptions, rec arbiter.Entry, st state.State) *config.Node {
	others := o.config.Others(o.self.Name)
	for _, name := range []string{rec.Speaker, st.Peer} {
		for _, n := range others {
			if n.Name == name {
				return n
			}
		}
	}
	return others[0]
}

// spares are the nodes that may come to be the secondary in o.other's place.
func spares(e env, o runOptions) (all []control.Peer) {
	if !o.config.Spares() {
		return nil
	}
	for _, n := range o.config.Others(o.self.Name) {
		peer := control.Peer{Name: n.Name, Addr: n.Control.Addr(), TLS: o.protected[n.Name], QEMU: incoming(o, n, n)}
		peer.Direct = func() error {
			for i := range o.self.NICs {
				if v := o.config.PeerVXLAN(o.self, n, i); v != nil {
					if err := e.kernel.directVXLAN(v); err != nil {
						return err
					}
				}
			}
			return nil
		}
		all = append(all, peer)
	}
	return all
}

// incoming is where a node's QEMU waits, and what it and the one that comes show each other, as this node has it: other
// is the other end.
func incoming(o runOptions, n, other *config.Node) qemu.Incoming {
	c := o.config
	in := c.Incoming(n)
	if c.TLS.QEMU {
		files := certificates(o, other)
		in.TLS = &qemu.TLS{CA: files.CA, Cert: files.Cert, Key: files.Key, Peer: peerlink.CertName(files.Peer, files.VM), Dir: filepath.Join(c.RunDir, c.VM+"-"+files.Node+".tls")}
	}
	return in
}

// settle returns the arbiter's entry once it is known, and reports that it has to wait.
func (rs *roleState) settle(ctx context.Context, o runOptions) (arbiter.Entry, error) {
	var end func()
	rec, err := control.Settle(ctx, rs.arbiter, func(err error) {
		if end == nil {
			end = showWaiting(ctx, o, fmt.Sprintf("the arbiter does not answer, and everything is left as it is until it does: %v", err))
		}
	})
	if end != nil {
		end()
	}
	return rec, err
}

// entryPoll is between two looks at an entry that is to change.
const entryPoll = 500 * time.Millisecond

// await returns the arbiter's entry when it is another than rec, or after limit, if there is one.
func (rs *roleState) await(ctx context.Context, rec arbiter.Entry, limit time.Duration) (arbiter.Entry, error) {
	if limit > 0 {
		var done context.CancelFunc
		ctx, done = context.WithTimeout(ctx, limit)
		defer done()
	}
	tick := time.NewTicker(entryPoll)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			if limit > 0 && errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return rec, nil
			}
			return rec, ctx.Err()
		}
		if now, err := rs.arbiter.Read(ctx); err == nil && now != rec {
			return now, nil
		}
	}
}

// meet finds what an earlier daemon left in the kernel, and whether the guest that
// lockstep started runs. One that runs without its tables, because they were removed, is
// muted before anything else: which node may transmit is not known yet.
func meet(e env, o runOptions) (found datapath.Pinned, running bool, err error) {
	if found, err = e.kernel.found(tables(o.config, o.self, 0, o.log)); err != nil || !o.self.Starts {
		return found, false, err
	}
	spec := o.config.Guest(o.self)
	p, err := qemu.Find(&spec)
	if errors.Is(err, qemu.ErrNotRunning) {
		return found, false, nil
	}
	if err != nil {
		return found, false, err
	}
	defer p.Release()
	if found != (datapath.Pinned{}) {
		return found, true, nil
	}
	o.log.Warn("QEMU runs, and its programs and tables in the kernel are gone: muted until it is known which node may transmit", "pid", p.Pid())
	for _, nic := range o.self.NICs {
		if err := e.kernel.mute(nic.Tap); err != nil {
			return found, true, err
		}
	}
	return found, true, nil
}

// fill adds to control's options what failing over needs.
func (rs *roleState) fill(opt *control.Options, e env, o runOptions) {
	c := o.config
	life := &control.Failover{
		Begin: rs.begin, Arbiter: rs.arbiter, Store: rs.store,
		Setback: &rs.setback,
		Own:     incoming(o, o.self, o.other), Peers: incoming(o, o.other, o.other),
		Limits: c.Migration.Limits,
	}
	if q := c.QEMU; q != nil {
		spec := c.Guest(o.self)
		life.Disks, life.FirstStart = spec.Disks, control.FirstStart(q.FirstStart)
		if o.self.Starts {
			life.Guest = &spec
		}
	}
	opt.Failover, opt.Journal, opt.Progress, opt.Pauses = life, rs.journal, progress(e, o), &rs.pauses
}

// progress shows how far a replication is that begins: a bar on a terminal, log lines
// elsewhere.
func progress(e env, o runOptions) func(qemu.Progress) {
	terminal, ok := e.stderr.(*os.File)
	if !ok || !term.IsTerminal(int(terminal.Fd())) {
		var at time.Time
		return func(p qemu.Progress) {
			if p.Total == 0 || time.Since(at) < 2*time.Second {
				return
			}
			at = time.Now()
			doing := "copying to the secondary"
			if p.Compare {
				doing = "comparing with the secondary's"
			}
			o.log.Info(doing, "what", p.What, "percent", 100*p.Done/p.Total, "bytes", p.Done, "of", p.Total)
		}
	}
	var bar *progressbar.ProgressBar
	what := ""
	return func(p qemu.Progress) {
		if p.Compare {
			p.What = "comparing " + p.What
		}
		if bar != nil && p.What != what {
			bar.Finish()
			fmt.Fprintln(terminal)
			bar = nil
		}
		if what = p.What; p.Total == 0 {
			return
		}
		if bar == nil {
			bar = progressbar.NewOptions64(p.Total, progressbar.OptionSetWriter(terminal), progressbar.OptionShowBytes(true), progressbar.OptionSetDescription(p.What))
		}
		bar.ChangeMax64(p.Total)
		bar.Set64(p.Done)
	}
}
