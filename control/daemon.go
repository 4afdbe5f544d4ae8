// SPDX-License-Identifier: Apache-2.0

// Package control runs one host of a pair: it owns the loop, the clock, QEMU's
// monitor, the control link and the epochs. What may leave is compare's decision;
// how it leaves is behind [datapath.NIC].
//
// Goroutines: one per NIC (nic.go) drives its data path and its compare core. One
// controller (this file) owns the checkpoint machine (ckpt.go) and everything
// else; QEMU's monitor (monitor.go), the control link (peer.go) and the status
// socket (status.go) have goroutines that only wait, and hand what they get to the
// controller.
package control

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"

	"lockstep/compare"
	"lockstep/control/api"
	"lockstep/control/checkpoint"
	"lockstep/control/datapath"
	"lockstep/control/failover"
	"lockstep/control/journal"
	"lockstep/control/program"
	"lockstep/control/qemu"
	"lockstep/control/qmp"
)

// Options say what to run. Zero durations mean defaults.
type Options struct {
	VM   string
	Node string // this host's name
	Peer string // the other's
	Role datapath.Role

	// ConfigDigest is over what both nodes' configs must agree on; a peer with
	// another one is refused.
	ConfigDigest string

	// Control is where the primary listens and the secondary connects: the
	// primary's control address.
	Control string
	// Where the control link is made from: by this host as the secondary, by the peer.
	// The zero Addr: from anywhere.
	OwnAddr, PeerAddr netip.Addr

	TLS *tls.Config // nil: the control link is not protected
	QMP string      // QEMU's socket; "": none, checkpoints are counted but not made

	NICs []datapath.NIC // as many as the peer has, in the same order; closed when Run returns
	// Fresh tells that a NIC's tables were made at this start, not found pinned
	// (R23).
	Fresh bool

	Compare     compare.Config          // primary; Linger and Idle also the secondary's
	Copies      compare.SecondaryConfig // secondary
	Period      time.Duration           // of checkpoints that nothing asks for, the longest; 0: none
	TargetPause time.Duration           // of the PVM, which the period follows; 0: the period is fixed
	MinInterval time.Duration           // between the beginnings of two checkpoints; 20 ms
	Rekey       time.Duration           // between rotations of the signing keys; 0: none

	// R20: how often P asks S for an echo, and what one allows; 50 ms, 400 ms.
	EchoEvery, SpeakFor time.Duration

	StatusSocket string // "": none
	Log          *slog.Logger

	// Life: the pair begins and ends by lockstep. nil: it is there, and nobody takes
	// over.
	Life     *Life
	Journal  *journal.Journal    // of what happened; nil: none
	Progress func(qemu.Progress) // told how far a replication is that begins; the zero Progress: it is over

	// Tests shorten these.
	link       linkTiming
	qmpTimeout time.Duration
	qmpPoll    time.Duration
	dialQMP    dialQMP
	noAskQEMU  bool // mutation: a monitor that cannot be reached is a dead QEMU's
	orderEvery time.Duration
	entryEvery time.Duration
	ckpt       *checkpoint.Config
}

func (o *Options) setDefaults() error {
	switch {
	case o.Role != datapath.RolePrimary && o.Role != datapath.RoleSecondary:
		return fmt.Errorf("role %q is neither primary nor secondary", o.Role)
	case len(o.NICs) == 0 || len(o.NICs) > maxNICs:
		return fmt.Errorf("%d NICs: there have to be 1 to %d", len(o.NICs), maxNICs)
	}
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&o.MinInterval, 20*time.Millisecond)
	set(&o.EchoEvery, 50*time.Millisecond)
	set(&o.SpeakFor, 400*time.Millisecond)
	set(&o.Compare.Linger, 2*time.Second)
	set(&o.Compare.Idle, 2*time.Hour)
	set(&o.qmpTimeout, qmpTimeout)
	if o.Life != nil {
		set(&o.qmpPoll, qmpPollLife)
	}
	set(&o.qmpPoll, qmpPoll)
	if o.dialQMP == nil {
		o.dialQMP = dialMonitor
	}
	set(&o.orderEvery, orderEvery)
	set(&o.entryEvery, entryEvery)
	if o.link == (linkTiming{}) {
		o.link = defaultLinkTiming
		if o.Life != nil {
			o.link.silence, o.link.ping = o.Life.Timeout, o.EchoEvery
			if o.Life.Restart != 0 {
				// A daemon that was started again is found within that time.
				o.link.retryMax = min(o.link.retryMax, o.Life.Restart/4)
			}
		}
	}
	if o.Progress == nil {
		o.Progress = func(qemu.Progress) {}
	}
	if o.ckpt == nil {
		c := checkpoint.DefaultConfig()
		o.ckpt = &c
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

const (
	maxHistory   = 32 // requests and attempts kept for status
	maxRequests  = 256
	sweepEvery   = time.Second
	quietRequest = time.Second // between two log lines about requests that nothing serves
)

// machine is a ckptPrimary or a ckptSecondary.
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

	requests    chan request
	requested   atomic.Uint64 // by anyone
	committed   uint64
	waiting     []request // causes of the next attempt
	causes      []api.Cause
	attempts    []api.Checkpoint
	attemptNow  []request // causes of the attempt under way
	attemptAt   int64
	unservedLog time.Time
	unserved    uint64
}

// Daemon runs one host. What is not said to be otherwise is the controller's.
type Daemon struct {
	opt  Options
	log  *slog.Logger
	nics []*nic

	inbox   chan func()
	stopped chan struct{} // closed when the controller has ended
	work    sync.WaitGroup
	ctx     context.Context
	fatal   error

	epoch, term uint32 // the kernel's epoch, the key generation
	recovered   bool   // all NICs go on from one daemon's tables

	// The parts, each with what it knows.
	ckpts checkpoints
	peer  peerLink
	qmp   monitor
	life  *pairLife // nil: the pair does not end by itself
	repl  replicator
	guest guestWatch
	room  overlayRoom
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
	d.ckpts.d, d.ckpts.requests = d, make(chan request, maxRequests)
	d.peer.d, d.peer.linkSince = d, time.Now()
	d.qmp.d, d.qmp.path, d.qmp.info.since = d, o.QMP, time.Now()
	d.repl = replicator{d: d, prepared: make(chan struct{}), tries: tries{again: syncAgain}, endAgain: endAgain, imagesRetry: imagesRetry}
	d.guest.d, d.room.d = d, d
	cfg := *o.ckpt
	cfg.QMP, cfg.Period, cfg.MinInterval, cfg.TargetPause = o.QMP != "", int64(o.Period), int64(o.MinInterval), int64(o.TargetPause)
	keys, err := compare.NewKeys(rand.Reader)
	if err != nil {
		return nil, err
	}
	found := d.found()
	if found != nil {
		*keys = found.Digest
	}
	cfg.FirstEpoch = max(cfg.FirstEpoch, d.epoch)
	d.epoch = cfg.FirstEpoch
	d.opt.Compare.Epoch = d.epoch
	if o.Life != nil {
		if d.life, err = newPairLife(*o.Life, d); err != nil {
			return nil, err
		}
		cfg.Unpaired = d.life.p != nil && d.life.p.State() != failover.PrimaryPair
	}
	if o.Role == datapath.RolePrimary {
		d.ckpts.primary = checkpoint.NewPrimary(cfg)
		d.ckpts.machine = d.ckpts.primary
	} else {
		d.ckpts.secondary = checkpoint.NewSecondary(cfg)
		if found != nil {
			d.ckpts.secondary.Step(0, checkpoint.Event{Kind: checkpoint.EvRecovered, OK: found.Mode == datapath.ModeRun})
		}
		d.ckpts.machine = d.ckpts.secondary
	}
	for i, dp := range o.NICs {
		n := newNIC(i, dp, d.log, d.ckpts.want)
		n.keys = new(compare.Keys)
		*n.keys = *keys
		if d.isPrimary() {
			n.primary = compare.NewPrimary(d.opt.Compare, n.keys)
			n.core = n.primary
		} else {
			n.secondary = compare.NewSecondary(o.Copies, n.keys)
			n.core = n.secondary
		}
		d.nics = append(d.nics, n)
	}
	return d, nil
}

// found is what the NICs' tables tell of the daemon before this one (R23); nil:
// there is no going on from them. Their term and epoch count in any case: a number
// is not used twice.
func (d *Daemon) found() *datapath.Recovered {
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
// the kernel goes on as it was told last.
func (d *Daemon) Run(ctx context.Context) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	d.ctx = ctx
	defer func() {
		for _, n := range d.nics {
			err = errors.Join(err, n.dp.Close())
		}
	}()
	switch {
	case d.recovered:
		for _, n := range d.nics {
			n.adopt(d.opt.Compare.Idle)
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

	if err := d.qmp.startGuest(ctx); err != nil {
		return err
	}
	for _, n := range d.nics {
		// Before anything opens. What goes wrong is tried again.
		_ = n.checkOrder(func(f func() error) error { return f() })
	}

	// Whatever ends first ends the rest.
	ends := make(chan error, len(d.nics)+8)
	start := func(f func() error) { d.work.Go(func() { ends <- f() }) }
	for _, n := range d.nics {
		start(func() error { return n.run(ctx) })
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
	if d.life != nil && d.life.p != nil {
		start(func() error { d.life.watchEntry(ctx, d.opt.entryEvery); return nil })
	}
	if l := d.life; l != nil && l.Guest != nil && len(l.Guest.Disks) > 0 {
		start(func() error { d.room.watchOverlays(ctx); return nil })
	}
	notify(d.log, sd.SdNotifyReady)
	err = <-ends
	notify(d.log, sd.SdNotifyStopping)
	cancel()
	for _, n := range d.nics {
		n.dp.Wake()
	}
	d.work.Wait()
	for err == nil || errors.Is(err, errStopped) { // a consequence; the cause is behind it
		select {
		case e := <-ends:
			err = cmp.Or(e, err)
			continue
		default:
		}
		break
	}
	return err
}

// notify tells systemd, and does not wait for one that stands still.
func notify(log *slog.Logger, state string) {
	ctx, done := context.WithTimeout(context.Background(), notifyTimeout)
	defer done()
	err := program.Within(ctx, "sd_notify "+state, func() error { _, err := sd.SdNotify(false, state); return err })
	if err != nil {
		log.Warn("systemd does not listen", "err", err)
	}
}

const notifyTimeout = time.Second

// ownKeys has the kernel digest with this daemon's keys. What it captured with
// those of an earlier one is repeated by the guest; no record is accepted until
// there is a session.
func (d *Daemon) ownKeys() error {
	var seed [seedLen]byte
	rand.Read(seed[:])
	p2s, s2p := signKeys(seed)
	for _, n := range d.nics {
		s := datapath.Session{Term: d.term, Epoch: d.epoch, PeerMAC: make(net.HardwareAddr, 6), TxKey: p2s, RxKey: s2p, Digest: *n.keys}
		if err := n.dp.InstallSession(s); err != nil {
			return fmt.Errorf("nic %d: install keys: %w", n.index, err)
		}
		n.since = n.dp.Now()
	}
	return nil
}

// isPrimary reports whether this host runs the PVM.
func (d *Daemon) isPrimary() bool { return d.opt.Role == datapath.RolePrimary }

// now is the boottime, ns.
func (d *Daemon) now() int64 { return d.nics[0].dp.Now() }

// post hands f to the controller.
func (d *Daemon) post(f func()) {
	select {
	case d.inbox <- f:
	case <-d.stopped:
	}
}

// ask has the controller run f and waits for it.
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
			d.peer.link.flush() // the peer may have to hear why
			d.peer.link.close(context.Canceled)
		}
	}()
	d.ckpts.step(checkpoint.Event{Kind: checkpoint.EvTick})
	if d.life != nil && d.life.Begin.ResumesTakeOver() {
		d.life.live(failover.Event{Kind: failover.EvTakeOver})
	}
	if d.recovered && d.fatal == nil {
		// P matches nothing before it has a session; the kernel goes on as it did.
		d.fatal = d.each("go on", (*nic).goOn)
	}
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for d.fatal == nil {
		if next := min(d.ckpts.machine.NextDeadline(), d.life.nextLife()); next == math.MaxInt64 {
			timer.Stop()
		} else {
			timer.Reset(time.Duration(max(next-d.now(), 0)))
		}
		select {
		case <-ctx.Done():
			return nil
		case f := <-d.inbox:
			f()
		case r := <-d.ckpts.requests:
			d.ckpts.wanted(r)
		case <-timer.C:
			d.ckpts.step(checkpoint.Event{Kind: checkpoint.EvTick})
			d.life.live(failover.Event{Kind: failover.EvTick})
		}
	}
	if ctx.Err() != nil {
		return nil
	}
	return d.fatal
}

// want takes a request for a checkpoint from any goroutine, and never blocks.
func (ck *checkpoints) want(r request) {
	ck.requested.Add(1)
	select {
	case ck.requests <- r:
	default: // as many wait as are ever told apart
	}
}

func (ck *checkpoints) wanted(r request) {
	ck.note(r)
	if ck.d.opt.QMP == "" || !ck.d.peer.linkUp {
		// Nobody to ask. A guest in a bad way asks without end.
		if ck.unserved++; time.Since(ck.unservedLog) >= quietRequest {
			ck.d.log.Warn("checkpoint needed", "reason", r.reason, "flow", r.flow, "requests", ck.unserved, "qmp", ck.d.opt.QMP != "", "peer", ck.d.peer.linkUp)
			ck.unservedLog, ck.unserved = time.Now(), 0
		}
	}
	ck.step(checkpoint.Event{Kind: checkpoint.EvWant, Cause: r.reason})
}

// note keeps a request in mind for the attempt that serves it, and for status.
func (ck *checkpoints) note(r request) {
	c := api.Cause{At: r.at, Reason: r.reason, Flow: r.flow}
	if r.nic >= 0 {
		c.NIC = &r.nic
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
	if ck.d.life == nil || !ck.d.isPrimary() {
		return
	}
	if stuck := ck.primary.Stuck(); stuck != (ck.d.life.p.InDoubt()) {
		ck.d.life.live(failover.Event{Kind: failover.EvDoubt, OK: stuck})
	}
}

// each runs f in every NIC's loop. A NIC that cannot do what it was told is the
// end: the daemon does not know any more what the kernel does.
func (d *Daemon) each(what string, f func(*nic) error) error {
	for _, n := range d.nics {
		if err := n.do(func() error { return f(n) }); err != nil {
			return fmt.Errorf("nic %d: %s: %w", n.index, what, err)
		}
	}
	return nil
}

func (ck *checkpoints) carryOut(fx checkpoint.Effect) error {
	switch fx.Op {
	case checkpoint.OpOpen:
		ck.d.log.Info("replicating", "epoch", ck.d.epoch, "term", ck.d.term)
		return ck.d.each("hold", func(n *nic) error {
			// Who spoke alone did so without a limit.
			return errors.Join(n.dp.SetLeaseUntil(0), n.setMode(datapath.ModeHold), n.startEchoes(ck.d.opt.EchoEvery, ck.d.opt.SpeakFor))
		})
	case checkpoint.OpFreeze:
		ck.attemptAt = ck.d.now()
		return ck.d.each("freeze", (*nic).freeze)
	case checkpoint.OpThaw:
		return ck.d.each("thaw", (*nic).thaw)
	case checkpoint.OpPrepare:
		ck.attempt(fx)
		ck.d.peer.send(message{Type: "prepare", Epoch: fx.Epoch})
	case checkpoint.OpAbort:
		ck.d.peer.send(message{Type: "abort", Epoch: fx.Epoch, Cause: fx.Cause})
	case checkpoint.OpAsk:
		ck.d.qmp.askQEMU(func(m *qmp.Monitor) checkpoint.Event {
			ev := checkpoint.Event{Kind: checkpoint.EvAsked, Epoch: fx.Epoch, OK: true}
			if err := m.Checkpoint(); err != nil {
				ev.OK, ev.Cause = false, err.Error()
			}
			return ev
		})
	case checkpoint.OpEpoch:
		return ck.d.each("set epoch", func(n *nic) error { return errors.Join(n.dp.SetEpoch(fx.Epoch), n.dp.MarkStop()) })
	case checkpoint.OpCOLO:
		ck.d.qmp.askQEMU(func(m *qmp.Monitor) checkpoint.Event {
			mode, err := m.COLO()
			ev := checkpoint.Event{Kind: checkpoint.EvCOLO, Epoch: fx.Epoch, OK: err == nil && mode == string(ck.d.opt.Role)}
			if err != nil {
				ev.Cause = err.Error()
			} else if !ev.OK {
				ev.Cause = fmt.Sprintf("COLO mode is %q", mode)
			}
			if ev.OK && ck.d.isPrimary() && ck.d.life != nil {
				// Whatever was heard of the disks, their state decides (R24). A QEMU
				// that does not answer may be dead: then S is the better host.
				switch missing, err := qemu.Unreplicated(m, ck.d.life.Disks); {
				case err != nil:
					ev.OK, ev.Cause = false, err.Error()
				case len(missing) > 0:
					ev.OK, ev.Cause = false, fmt.Sprintf("the secondary's image is no replica of %v", missing)
					ck.d.post(func() { ck.d.life.live(failover.Event{Kind: failover.EvReplica}) })
				}
			}
			return ev
		})
	case checkpoint.OpCommit:
		return ck.commit(fx)
	case checkpoint.OpFailed:
		ck.attemptEnds(fx.Cause, fx)
		ck.d.log.Warn("checkpoint failed", "epoch", fx.Epoch, "cause", fx.Cause)
		ck.checkpointEvent()

	case checkpoint.OpPark:
		return ck.d.each("park", (*nic).park)
	case checkpoint.OpDrain:
		ck.drain(fx.Epoch)
	case checkpoint.OpReady:
		ck.d.peer.send(message{Type: "ready", Epoch: fx.Epoch})
	case checkpoint.OpBegin:
		ck.d.epoch = fx.Epoch
		return ck.d.each("begin an epoch", func(n *nic) error { return n.dp.SetEpoch(fx.Epoch) })
	case checkpoint.OpReset:
		return ck.d.each("reset offsets", func(n *nic) error { return n.reset(fx.Epoch) })
	case checkpoint.OpStopped:
		if fx.Epoch == 0 {
			ck.d.log.Warn("the SVM stopped, or may have, and nobody asked it to: parked until a checkpoint")
		}
		ck.d.peer.send(message{Type: "stopped", Epoch: fx.Epoch})
	case checkpoint.OpRun:
		return ck.d.each("unpark", (*nic).unpark)
	case checkpoint.OpResumed:
		ck.committed++
		ck.d.peer.send(message{Type: "resumed", Epoch: fx.Epoch, PauseNS: fx.Resume - fx.Stop})
	}
	return nil
}

// attempt notes that a checkpoint begins.
func (ck *checkpoints) attempt(fx checkpoint.Effect) {
	if len(ck.waiting) == 0 && fx.Cause != checkpoint.CausePeriod {
		// The machine's own wish: it has a doubt to end.
		ck.requested.Add(1)
		ck.note(request{at: time.Now(), nic: -1, reason: fx.Cause})
	}
	ck.attemptNow, ck.waiting = ck.waiting, nil
	c := api.Checkpoint{Epoch: fx.Epoch, At: time.Now(), Cause: fx.Cause, Result: "running"}
	for _, r := range ck.attemptNow {
		c.Flow = cmp.Or(c.Flow, r.flow)
	}
	ck.attempts = keepLast(append(ck.attempts, c))
	ck.d.log.Info("checkpoint", "epoch", fx.Epoch, "cause", fx.Cause, "requests", len(ck.attemptNow))
}

func (ck *checkpoints) attemptEnds(result string, fx checkpoint.Effect) {
	if len(ck.attempts) == 0 {
		return
	}
	a := &ck.attempts[len(ck.attempts)-1]
	a.Result = result
	a.FrozenMS = milliseconds(ck.d.now() - ck.attemptAt)
	a.PVMPauseMS = milliseconds(fx.Resume - fx.Stop)
	if fx.Op == checkpoint.OpFailed {
		// What it was for is still to be done.
		ck.waiting = keepLast(append(ck.attemptNow, ck.waiting...))
	}
	ck.attemptNow = nil
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
	ck.d.event(journal.Checkpoint, a.Cause, fields)
}

func milliseconds(ns int64) float64 { return float64(ns) / 1e6 }

func (ck *checkpoints) commit(fx checkpoint.Effect) error {
	inside := false
	err := ck.d.each("commit", func(n *nic) error {
		in, err := n.commit(fx.Epoch, fx.At, fx.Stop, fx.Resume)
		inside = inside || in
		return err
	})
	if err != nil {
		return err
	}
	ck.d.epoch = fx.Epoch
	ck.committed++
	ck.attemptEnds("committed", fx)
	a := ck.attempts[len(ck.attempts)-1]
	ck.checkpointEvent()
	ck.d.log.Info("committed", "epoch", fx.Epoch, "frozen_ms", a.FrozenMS, "pvm_pause_ms", a.PVMPauseMS, "svm_pause_ms", a.SVMPauseMS)
	if inside {
		ck.step(checkpoint.Event{Kind: checkpoint.EvInside, Epoch: fx.Epoch})
	}
	if ck.d.life != nil {
		ck.d.repl.tries.lasts()
	}
	ck.d.life.live(failover.Event{Kind: failover.EvCommitted})
	return ck.d.life.listen(a.Cause)
}

// drain waits until the SVM has read what its taps hold.
func (ck *checkpoints) drain(epoch uint32) {
	if ck.stopDrain != nil {
		ck.stopDrain()
	}
	// P waits a little longer than that.
	ctx, cancel := context.WithTimeout(ck.d.ctx, time.Duration(ck.d.opt.ckpt.Ready)*4/5)
	ck.stopDrain = cancel
	ck.d.work.Go(func() {
		defer cancel()
		ev := checkpoint.Event{Kind: checkpoint.EvDrained, Epoch: epoch, OK: true}
		for _, n := range ck.d.nics {
			if err := n.dp.DrainTap(ctx); err != nil {
				ev.OK, ev.Cause = false, fmt.Sprintf("nic %d: drain the tap: %v", n.index, err)
				break
			}
		}
		ck.d.post(func() { ck.step(ev) })
	})
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
			if _, err := n.dp.Sweep(d.opt.Compare.Linger, d.opt.Compare.Idle); err != nil && ctx.Err() == nil {
				return fmt.Errorf("nic %d: sweep: %w", n.index, err)
			}
		}
	}
}
