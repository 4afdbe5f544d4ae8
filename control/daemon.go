// SPDX-License-Identifier: Apache-2.0

// Package control runs one host of a pair: it owns the loop, the clock, QEMU's
// monitor, the control link and the epochs. What may leave is compare's decision;
// how it leaves is behind [datapath.NIC].
//
// One goroutine per NIC (nic.go) drives its data path and its compare core. One
// controller (this file) owns everything else, in parts that each carry out the
// decisions of one machine or keep one connection:
//
//	checkpoints.go                      [checkpoint], and what was asked for and came of it
//	failover.go, arbiter.go             [failover], and the arbiter's entry
//	peer.go, accept.go, rotate.go       the session over [peerlink]
//	monitor.go, reach.go, qemu.go       QEMU's monitor and process
//	replication.go, images.go, edges.go how replication begins, and how it is tried again (retry.go)
//	guest.go, overlay.go                the guest's own state, its disks, the room for overlays
//	clock.go                            the guest's clock
//
// All other goroutines only wait, and hand what they get to the controller.
package control

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"sync"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/checkpoint"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/journal"
	"github.com/lockstep-ft/lockstep/control/nicloop"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/program"
)

// Daemon runs one host. All is the controller's unless a comment names somebody else.
type Daemon struct {
	opt  Options
	log  *slog.Logger
	nics []*nicloop.Loop

	inbox   chan func()
	stopped chan struct{} // closed when the controller has ended
	work    sync.WaitGroup
	ctx     context.Context
	fatal   error

	epoch, term uint32 // the kernel's epoch, the key generation
	recovered   bool   // all NICs go on from one daemon's tables

	// The parts, each with what it knows.
	checkpoints checkpoints
	peer        peerLink
	qmp         monitor
	failover    *failoverPart // nil: the pair does not end by itself
	repl        replicator
	guest       guestWatch
	room        overlayRoom
	clock       guestClock
}

// New makes a daemon; Run works.
func New(o Options) (*Daemon, error) {
	if err := o.setDefaults(); err != nil {
		return nil, err
	}
	d := &Daemon{
		opt: o, log: o.Log.With("role", string(o.Role)),
		inbox: make(chan func(), 64), stopped: make(chan struct{}),
	}
	d.checkpoints.d, d.checkpoints.requests = d, make(chan nicloop.Request, maxRequests)
	d.peer.d, d.peer.linkSince, d.peer.spares = d, time.Now(), make(map[string]bool)
	if d.peer.peers = o.Spares; o.Spares == nil {
		d.peer.peers = []Peer{{Name: o.Peer, Addr: o.PeerAddr, TLS: o.TLS}}
	}
	d.qmp.d, d.qmp.path, d.qmp.info.since = d, o.QMP, time.Now()
	d.repl = replicator{d: d, prepared: make(chan struct{}), tries: tries{again: syncAgain}, endAgain: endAgain, imagesRetry: imagesRetry, prepAgain: prepAgain}
	d.guest.d, d.room.d = d, d
	d.clock = guestClock{d: d, Pauses: o.Pauses, every: o.clockEvery, answer: clockAnswer}
	cfg := *o.timing
	cfg.QMP, cfg.Period, cfg.MinInterval, cfg.TargetPause = o.QMP != "", int64(o.Checkpoint.Period), int64(o.Checkpoint.MinInterval), int64(o.Checkpoint.TargetPause)
	cfg.PeriodicAbove, cfg.Epoch = o.Checkpoint.PeriodicAbove, int64(o.Checkpoint.Epoch)
	keys, err := compare.NewKeys(rand.Reader)
	if err != nil {
		return nil, err
	}
	found := d.recoveredState()
	if found != nil {
		*keys = found.Digest
	}
	cfg.FirstEpoch = max(cfg.FirstEpoch, d.epoch)
	d.epoch = cfg.FirstEpoch
	d.opt.Compare.Epoch = d.epoch
	if o.Failover != nil {
		if d.failover, err = newFailoverPart(*o.Failover, d); err != nil {
			return nil, err
		}
		cfg.Unpaired = d.failover.p != nil && d.failover.p.State() != failover.PrimaryPair
	}
	if o.Role == datapath.RolePrimary {
		d.checkpoints.primary = checkpoint.NewPrimary(cfg)
		d.checkpoints.machine = d.checkpoints.primary
	} else {
		d.checkpoints.secondary = checkpoint.NewSecondary(cfg)
		if found != nil {
			d.checkpoints.secondary.Step(0, checkpoint.Event{Kind: checkpoint.EvRecovered, OK: found.Mode == datapath.ModeRun})
		}
		d.checkpoints.machine = d.checkpoints.secondary
	}
	for i, dp := range o.NICs {
		var n *nicloop.Loop
		if d.isPrimary() {
			n = nicloop.NewPrimary(i, dp, d.log, d.checkpoints.want, d.opt.Compare, *keys)
		} else {
			n = nicloop.NewSecondary(i, dp, d.log, o.Copies, *keys)
		}
		d.nics = append(d.nics, n)
	}
	return d, nil
}

// recoveredState is what the NICs' tables hold of the daemon before this one (R23); nil:
// there is no going on from them. Their term and epoch count in any case: a number
// is not used twice.
func (d *Daemon) recoveredState() *datapath.Recovered {
	first := d.opt.NICs[0].Recovered()
	whole := !d.opt.Fresh
	for _, dp := range d.opt.NICs {
		a := dp.Recovered()
		if a == nil {
			whole = false
			continue
		}
		d.term, d.epoch = max(d.term, a.Term), max(d.epoch, a.Epoch)
		// It may have died between one NIC and the next, or before there were keys:
		// digests under zeros are all the same.
		whole = whole && a.Epoch == first.Epoch && a.Mode == first.Mode && a.Digest == first.Digest && a.Digest != (compare.Keys{})
	}
	d.recovered = whole
	if !whole {
		return nil
	}
	return first
}

// Run runs a daemon until ctx ends, which is no error, or until it cannot go on.
// It closes the data paths in any case.
func Run(ctx context.Context, o Options) error {
	d, err := New(o)
	if err != nil {
		for _, dp := range o.NICs {
			err = errors.Join(err, dp.Close())
		}
		return err
	}
	return d.Run(ctx)
}

// Run works until ctx ends or the daemon cannot go on. It closes the data paths:
// the kernel goes on in its last mode.
func (d *Daemon) Run(ctx context.Context) (err error) {
	told := ctx
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	d.ctx = ctx
	defer func() {
		for _, n := range d.nics {
			err = errors.Join(err, n.DP.Close())
		}
	}()
	switch {
	case d.recovered:
		for _, n := range d.nics {
			n.Restore(d.opt.Compare.Idle)
		}
	case d.isPrimary():
		if err := d.ownKeys(); err != nil {
			return err
		}
	}
	var control, status net.Listener
	if d.opt.Role == datapath.RolePrimary {
		if control, err = new(net.ListenConfig).Listen(ctx, "tcp", d.opt.Control); err != nil {
			return fmt.Errorf("control link: %w", err)
		}
		defer control.Close()
		d.log.Info("control link", "address", control.Addr())
	}
	if d.opt.StatusSocket != "" {
		if status, err = api.Listen(ctx, d.opt.StatusSocket); err != nil {
			return err
		}
		defer status.Close()
	}
	if d.opt.TLS == nil {
		d.log.Warn("the control link is INSECURE (tls: {insecure: true}): session keys travel in the clear, and whoever reaches its address can be the peer; use it on a trusted network only, or make certificates with `lockstep keys`")
	}
	if fo := d.failover; fo != nil && fo.Own.TLS == nil {
		d.log.Warn("the connections between the two QEMUs are INSECURE (tls: {qemu: false}, or {insecure: true}): the guest's memory and disks travel in the clear, and whoever reaches the ports of migration can read and change them; use them on a trusted network only")
	}

	if err := d.qmp.startGuest(ctx); err != nil {
		return err
	}
	for _, n := range d.nics {
		// Before anything opens. What goes wrong is tried again.
		_ = n.CheckOrder(func(f func() error) error { return f() })
	}

	// Whatever ends first ends the rest.
	ends := make(chan error, len(d.nics)+8)
	start := func(f func() error) { d.work.Go(func() { ends <- f() }) }
	for _, n := range d.nics {
		start(func() error { return n.Run(ctx) })
	}
	start(func() error { return d.control(ctx) })
	start(func() error { d.watchOrder(ctx); return nil })
	if control != nil {
		start(func() error { return d.peer.accept(ctx, control) })
	} else {
		start(func() error { d.peer.connect(ctx); return nil })
	}
	start(func() error { return d.sweep(ctx) })
	if status != nil {
		start(func() error { return api.Serve(ctx, status, d, d.log) })
	}
	if d.opt.QMP != "" {
		start(func() error { d.qmp.watchQEMU(ctx); return nil })
	}
	if d.opt.QMP != "" && d.opt.GuestAgent != "" {
		start(func() error { d.clock.watch(ctx); return nil })
	}
	if d.failover != nil && (d.failover.p != nil || d.opt.Spares != nil) {
		start(func() error { d.failover.watchEntry(ctx, d.opt.entryEvery); return nil })
	}
	if fo := d.failover; fo != nil && fo.Guest != nil && len(fo.Guest.Disks) > 0 {
		start(func() error { d.room.watchOverlays(ctx); return nil })
		if d.failover.s != nil {
			start(func() error { d.repl.touchNote(ctx); return nil })
		}
	}
	Notify(d.log, sd.SdNotifyReady)
	err = <-ends
	cancel()
	for _, n := range d.nics {
		n.DP.Wake()
	}
	d.work.Wait()
	for err == nil || errors.Is(err, nicloop.ErrStopped) { // a consequence; the cause is behind it
		select {
		case e := <-ends:
			err = cmp.Or(e, err)
			continue
		default:
		}
		break
	}
	if told.Err() != nil && err == nil {
		d.log.Info("told to end: the guest and the programs in the kernel go on without this daemon; " + d.leaves())
	}
	return err
}

// leaves is what becomes of the guest without this daemon.
func (d *Daemon) leaves() string {
	fo := d.failover
	switch {
	case fo == nil && d.isPrimary():
		return "nothing leaves the guest until one is started again"
	case fo == nil:
		return "nothing leaves the primary's guest until one is started again"
	case fo.p != nil && fo.p.State() == failover.PrimarySolo:
		return "the guest transmits alone"
	case fo.p != nil && fo.p.State() == failover.PrimaryPair && fo.p.Covered():
		return fmt.Sprintf("nothing leaves the guest until one is started again, and %s takes over after heartbeat.restart (%v)", d.opt.Peer, d.opt.Heartbeat.Restart)
	case fo.p != nil && fo.p.State() == failover.PrimaryPair:
		return fmt.Sprintf("nothing leaves the guest until one is started again: %s cannot take over yet", d.opt.Peer)
	case fo.s != nil && fo.s.State() == failover.SecondaryPair:
		return fmt.Sprintf("%s goes on alone after heartbeat.restart (%v), unless one is started again", d.opt.Peer, d.opt.Heartbeat.Restart)
	}
	return "no guest served or followed here"
}

// Notify reports a daemon's state to systemd, and does not wait for one that hangs. A role's end is no
// stopping: systemd would end the daemon, whatever it becomes next, after the unit's TimeoutStopSec.
func Notify(log *slog.Logger, state string) {
	ctx, done := context.WithTimeout(context.Background(), notifyTimeout)
	defer done()
	err := program.Within(ctx, "sd_notify "+state, func() error { _, err := sd.SdNotify(false, state); return err })
	if err != nil {
		log.Warn("systemd does not listen", "err", err)
	}
}

const notifyTimeout = time.Second

// ownKeys has the kernel digest with this daemon's keys. What it captured with
// those of an earlier one is repeated by the guest; no digest record is accepted until
// there is a session.
func (d *Daemon) ownKeys() error {
	var seed [peerlink.SeedLen]byte
	rand.Read(seed[:])
	p2s, s2p := peerlink.SignKeys(seed)
	for _, n := range d.nics {
		s := datapath.Session{Term: d.term, Epoch: d.epoch, PeerMAC: make(net.HardwareAddr, 6), TxKey: p2s, RxKey: s2p, Digest: *n.Keys}
		if err := n.OwnKeys(s); err != nil {
			return fmt.Errorf("nic %d: install keys: %w", n.Index, err)
		}
	}
	return nil
}

// isPrimary reports whether this host runs the PVM.
func (d *Daemon) isPrimary() bool { return d.opt.Role == datapath.RolePrimary }

// now is the boottime, ns.
func (d *Daemon) now() int64 { return d.nics[0].DP.Now() }

// post hands f to the controller.
func (d *Daemon) post(f func()) {
	select {
	case d.inbox <- f:
	case <-d.stopped:
	}
}

// ask has the controller run f and waits for it. After an error f may run still, or never: what it sets is not to be read.
func (d *Daemon) ask(ctx context.Context, f func()) error {
	done := make(chan struct{})
	d.post(func() { f(); close(done) })
	select {
	case <-done:
		return nil
	case <-d.stopped:
		return errors.New("the daemon is stopping")
	case <-ctx.Done():
		return ctx.Err()
	}
}

// control is the controller.
func (d *Daemon) control(ctx context.Context) error {
	defer close(d.stopped)
	defer func() {
		if d.peer.link != nil {
			d.peer.link.Flush() // the peer may need the reason
			d.peer.link.Close(context.Canceled)
		}
	}()
	d.checkpoints.step(checkpoint.Event{Kind: checkpoint.EvTick})
	if d.failover != nil && d.failover.Begin.ResumesTakeOver() {
		d.failover.step(failover.Event{Kind: failover.EvTakeOver})
	}
	if d.recovered && d.fatal == nil {
		// P matches nothing before it has a session; the kernel goes on as it did.
		d.fatal = d.each("go on", (*nicloop.Loop).RestoreMode)
	}
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for d.fatal == nil {
		if next := min(d.checkpoints.machine.NextDeadline(), d.failover.nextDeadline()); next == math.MaxInt64 {
			timer.Stop()
		} else {
			timer.Reset(time.Duration(max(next-d.now(), 0)))
		}
		select {
		case <-ctx.Done():
			return nil
		case f := <-d.inbox:
			f()
		case r := <-d.checkpoints.requests:
			d.checkpoints.wanted(r)
		case <-timer.C:
			d.checkpoints.step(checkpoint.Event{Kind: checkpoint.EvTick})
			d.failover.step(failover.Event{Kind: failover.EvTick})
		}
	}
	if ctx.Err() != nil {
		return nil
	}
	return d.fatal
}

// each runs f in every NIC's loop. A NIC that cannot carry out an order is the
// end: the daemon does not know any more what the kernel does.
func (d *Daemon) each(what string, f func(*nicloop.Loop) error) error {
	for _, n := range d.nics {
		if err := n.Do(func() error { return f(n) }); err != nil {
			return fmt.Errorf("nic %d: %s: %w", n.Index, what, err)
		}
	}
	return nil
}

// sweep ends connections that are closed or idle, and that a host translates.
func (d *Daemon) sweep(ctx context.Context) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		for _, n := range d.nics {
			if err := n.Sweep(d.opt.Compare.Linger, d.opt.Compare.Idle); err != nil && ctx.Err() == nil {
				return fmt.Errorf("nic %d: sweep: %w", n.Index, err)
			}
		}
	}
}

// event notes something for `lockstep events`.
func (d *Daemon) event(kind journal.Kind, cause string, fields map[string]any) {
	if d.opt.Journal != nil {
		d.opt.Journal.Add(journal.Event{Kind: kind, Cause: cause, Fields: fields})
	}
}
