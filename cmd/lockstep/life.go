// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"lockstep/control"
	"lockstep/control/arbiter"
	"lockstep/control/config"
	"lockstep/control/journal"
	"lockstep/control/qemu"
	"lockstep/control/state"
)

// again is the wait before a part begins anew.
const again = 200 * time.Millisecond

// partLife is what one part in the pair's life is run with.
type partLife struct {
	begin   control.Begin
	arbiter arbiter.Arbiter
	store   *state.Store
	journal *journal.Journal
	setback control.Setback
	afresh  bool // whatever is found belongs to an SVM that is not wanted any more
}

// runLife runs one part after the other: a secondary that took over goes on as the
// primary, one that follows nobody any more begins afresh (DESIGN §7).
func runLife(ctx context.Context, e env, o runOptions, protected *tls.Config) error {
	c, self := o.config, o.self.Name
	a, err := arbiter.Open(c, self)
	if err != nil {
		return err
	}
	defer a.Close()
	store, err := state.Open(c.StateDir, c.VM, self)
	if err != nil {
		return c.Refuse("state_dir", err.Error(), "")
	}
	j, err := journal.Open(c.StateDir, c.VM, self, journal.DefaultLimit, o.log)
	if err != nil {
		return c.Refuse("state_dir", err.Error(), "")
	}
	defer j.Close()
	if st, err := store.Load(); err != nil {
		return err
	} else if st.Off && o.self.Starts {
		o.log.Info(fmt.Sprintf("%s powered off and stays off; `lockstep start -c %s --node %s` has the next run boot it", c.VM, c.File, self))
		return nil
	}
	life := &partLife{arbiter: a, store: store, journal: j}
	for {
		if life.begin, err = decide(ctx, e, o, life); err != nil {
			return err
		}
		part := o
		part.primary = life.begin.Role == control.RolePrimary
		if part.primary != o.primary {
			o.log.Warn("this node's role is not the one it was started with: the arbiter's record says so", "role", life.begin.Role, "record", life.begin.Record)
		}
		j.Add(journal.Event{Kind: journal.Role, Fields: map[string]any{"role": life.begin.Role, "term": life.begin.Record.Term}})
		err := runPart(ctx, e, part, protected, life)
		life.afresh = errors.Is(err, control.ErrAfresh)
		switch {
		case errors.Is(err, control.ErrPromoted):
			o.primary = true
			continue
		case errors.Is(err, control.ErrPoweredOff):
			return nil
		case !errors.Is(err, control.ErrAfresh):
			return err
		}
		o.log.Warn(err.Error())
		select {
		case <-time.After(again):
		case <-ctx.Done():
			return nil
		}
	}
}

// decide finds out what this node has to be (R19). Without the arbiter it does not
// know, and leaves everything as it is.
func decide(ctx context.Context, e env, o runOptions, life *partLife) (control.Begin, error) {
	self, other := o.self.Name, o.other.Name
	warned := false
	rec, err := control.Settle(ctx, life.arbiter, func(err error) {
		if !warned {
			o.log.Warn("the arbiter does not answer: waiting for it, and leaving everything as it is", "err", err)
			warned = true
		}
	})
	if err != nil {
		return control.Begin{}, err
	}
	if o.primary && rec == (arbiter.Record{}) {
		first := arbiter.Record{Term: 1, Speaker: self}
		if rec, _, err = control.Swap(ctx, life.arbiter, rec, first, func(err error) {
			o.log.Warn("the arbiter does not answer: waiting", "err", err)
		}); err != nil {
			return control.Begin{}, err
		}
	}
	st, err := life.store.Load()
	if err != nil {
		return control.Begin{}, err
	}
	found, err := e.kernel.found(nicOptions{
		pinDir: o.config.PinDir, vm: o.config.VM, node: self, tap: o.self.NICs[0].Tap, compare: o.config.Compare, hash: o.config.Hash(), log: o.log,
	})
	if err != nil {
		return control.Begin{}, err
	}
	role := control.RoleSecondary
	if o.primary {
		role = control.RolePrimary
	}
	if life.afresh || o.self.Starts && !guestRuns(o) {
		found = control.Found{} // tables are of no use without the guest whose connections they know
	}
	b, err := control.Decide(role, self, other, st, rec, found)
	if err != nil {
		return b, usageError{err}
	}
	return b, nil
}

// guestRuns reports whether a QEMU that an earlier daemon started is there.
func guestRuns(o runOptions) bool {
	spec := guestSpec(o.config, o.self)
	p, err := qemu.Find(&spec)
	if err != nil {
		return !errors.Is(err, qemu.ErrNotRunning)
	}
	p.Release()
	return true
}

// fill tells control what the config says of the pair's life.
func (l *partLife) fill(opt *control.Options, e env, o runOptions) {
	c := o.config
	life := &control.Life{
		Begin: l.begin, Arbiter: l.arbiter, Store: l.store, Timeout: c.Heartbeat.Timeout, Restart: c.Heartbeat.Restart,
		Setback: &l.setback,
		Own:     incoming(c, o.self), Peers: incoming(c, o.other),
	}
	if q := c.QEMU; q != nil {
		spec := guestSpec(c, o.self)
		life.Disks, life.FirstStart = spec.Disks, control.FirstStart(q.FirstStart)
		if o.self.Starts {
			life.Guest = &spec
		}
	}
	opt.Life, opt.Journal, opt.Progress = life, l.journal, progress(e, o)
}

// incoming is where a node's QEMU waits as a secondary.
func incoming(c *config.Config, n *config.Node) qemu.Incoming {
	in := qemu.Incoming{
		Migration: "tcp:" + net.JoinHostPort(n.Control.Addr().String(), strconv.Itoa(int(c.Migration.Port))),
		NBD:       netip.AddrPortFrom(n.Control.Addr(), c.Migration.NBDPort),
	}
	if c.Migration.Unix != "" {
		in.Migration = "unix:" + c.Migration.Unix
	}
	return in
}

// guestSpec is the guest on a node.
func guestSpec(c *config.Config, n *config.Node) qemu.Spec {
	q := c.QEMU.On(n.Name)
	s := qemu.Spec{
		VM: c.VM, Node: n.Name, Binary: q.Binary, Machine: q.Machine, Accel: q.Accel, CPU: q.CPU, Memory: q.Memory, SMP: q.SMP,
		Kernel: q.Kernel, Initrd: q.Initrd, Append: q.Append, NICModel: q.NICModel, Extra: q.Extra, QMP: n.QMP, Dir: c.RunDir,
	}
	for i, nic := range n.NICs {
		s.NICs = append(s.NICs, qemu.NIC{Tap: nic.Tap, MAC: q.MACs[i]})
	}
	for _, d := range q.Disks {
		s.Disks = append(s.Disks, qemu.Disk{ID: d.ID, Image: d.Image, OverlayDir: d.OverlayDir})
	}
	return s
}

// progress shows how far a replication is that begins: a bar on a terminal, log lines
// elsewhere.
func progress(e env, o runOptions) func(qemu.Progress) {
	f, ok := e.stderr.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
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
			fmt.Fprintln(f)
			bar = nil
		}
		if what = p.What; p.Total == 0 {
			return
		}
		if bar == nil {
			bar = progressbar.NewOptions64(p.Total, progressbar.OptionSetWriter(f), progressbar.OptionShowBytes(true), progressbar.OptionSetDescription(p.What))
		}
		bar.ChangeMax64(p.Total)
		bar.Set64(p.Done)
	}
}
