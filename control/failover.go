// SPDX-License-Identifier: Apache-2.0

package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"time"

	"github.com/lockstep-ft/lockstep/control/checkpoint"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/journal"
	"github.com/lockstep-ft/lockstep/control/nicloop"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qmp"
	"github.com/lockstep-ft/lockstep/control/replica"
	"github.com/lockstep-ft/lockstep/control/state"
)

// ended reports whether this host is fenced or its guest off.
func (fo *failoverPart) ended() bool {
	return fo.p != nil && fo.p.State() >= failover.PrimaryFenced || fo.s != nil && fo.s.State() >= failover.SecondaryFenced
}

// paired reports whether this host's primary has a secondary and goes on with it. Without
// failover it always does.
func (fo *failoverPart) paired() bool {
	return fo == nil || fo.p == nil || fo.p.State() == failover.PrimaryPair
}

// waits reports whether this host follows a primary, or waits for one (S). One that takes over does not.
func (fo *failoverPart) waits() bool {
	return fo == nil || fo.s == nil || fo.s.State() <= failover.SecondaryPair
}

// follows reports whether a stop that nobody asked for is one: the SVM of a pair that begins stands still
// until the first checkpoint.
func (fo *failoverPart) follows() bool { return fo == nil || fo.s == nil || fo.s.Covered() }

// poweredOff ends this daemon, because its guest is off (R25).
func (fo *failoverPart) poweredOff() error {
	fo.d.log.Info("the guest powered off, and stays off until `lockstep start`")
	fo.d.event(journal.QEMU, "the guest powered off", nil)
	if fo.p != nil {
		fo.d.peer.send(peerlink.PoweredOff{})
		if err := fo.remember(func(st *state.State) { st.Off = fo.Guest != nil }); err != nil {
			return err
		}
	}
	if fo.Guest == nil || fo.d.qmp.conn == nil {
		fo.d.fatal = ErrPoweredOff
		return nil
	}
	fo.d.qmp.procedure("end QEMU", func(_ context.Context, m *qmp.Monitor) error { return qemu.Quit(m) }, func(error) {
		fo.d.fatal = ErrPoweredOff // it may have gone before it answered
	})
	return nil
}

// end ends this daemon's role. A secondary that had no room rests first: the next
// one's disks have to be copied before it finds out whether there is some.
func (fo *failoverPart) end(end error) {
	if fo.s != nil {
		fo.d.room.noteFull("") // P may have given it up before QEMU reported it
	}
	if fo.d.room.pause == nil {
		fo.d.fatal = end
		return
	}
	fo.d.work.Go(func() {
		if fo.d.room.pause.wait(fo.d.ctx) {
			fo.d.post(func() { fo.d.fatal = end })
		}
	})
}

// guardTicks is G of R22: what the SVM sends is newer than what the PVM sent. Nothing on
// the wire shows how long a tick of a guest's TCP timestamps is: mostly 1 ms, but 1 µs
// with Linux's route feature tcp_usec_ts, and up to 1 s elsewhere (RFC 7323). So it is
// 16 s of the fastest clock and 194 days of the slowest; a receiver takes any step
// below 2^31 ticks for one ahead.
const guardTicks = 1 << 24

// failoverMachine is a failover.Primary or a failover.Secondary.
type failoverMachine interface {
	NextDeadline() int64
	Step(now int64, ev failover.Event) []failover.Effect
	Term() uint64
	Why() string
	Sick() bool
}

// failoverPart carries out what the failover machine decides.
type failoverPart struct {
	d *Daemon
	Failover
	machine   failoverMachine
	p         *failover.Primary // one of the two
	s         *failover.Secondary
	orphan    bool        // P: of Begin, until a new QEMU is started
	state     state.State // as it is on disk
	queue     []failover.Event
	stepping  bool
	tellAgain bool          // S: order QEMU to take over once it is connected
	note      *replica.Note // S: what the images are; nil: somebody else starts QEMU
	mute      muteWatch
	first     string // the peer that this role began with
}

func newFailoverPart(o Failover, d *Daemon) (*failoverPart, error) {
	if o.Setback == nil {
		o.Setback = new(Setback)
	}
	st, err := o.Store.Load()
	if err != nil {
		return nil, err
	}
	o.Arbiter = serialize(o.Arbiter)
	fo := &failoverPart{d: d, Failover: o, state: st, orphan: o.Begin.Orphan(), first: d.opt.Peer}
	d.qmp.hadQEMU = o.Begin.HasGuest()
	d.repl.tries.atOnce = o.triesAtOnce
	if o.again != (backoff{}) {
		d.repl.tries.again = o.again
	}
	cfg, now := failover.DefaultConfig(d.opt.Heartbeat.Timeout, d.opt.Heartbeat.Lease, cmp.Or(d.opt.Heartbeat.Restart, peerlink.MaxRejoin)), d.opt.NICs[0].Now()
	cfg.NoR26Entry = o.noR26Entry
	if o.doubt != 0 {
		cfg.Doubt = int64(o.doubt)
	}
	fo.note = openNote(&o)
	if d.opt.Role == datapath.RolePrimary {
		if fo.note != nil { // also where the guest is served without a takeover: by order, or from the first start
			if err := fo.note.End(); err != nil {
				return nil, err
			}
		}
		fo.p = o.Begin.Primary(cfg, now)
		fo.machine = fo.p
		return fo, fo.remember(func(*state.State) {}) // that its disks are the guest's (R19)
	}
	fo.s = o.Begin.Secondary(cfg, d.opt.Node, now)
	fo.machine = fo.s
	return fo, nil
}

// step gives the machine an event, if there is one, and carries out what
// follows.
func (fo *failoverPart) step(ev failover.Event) {
	if fo == nil {
		return
	}
	fo.queue = append(fo.queue, ev)
	if fo.stepping {
		return
	}
	fo.stepping = true
	for len(fo.queue) > 0 && fo.d.fatal == nil {
		ev := fo.queue[0]
		fo.queue = fo.queue[1:]
		for _, n := range fo.d.nics {
			ev.Echoed = max(ev.Echoed, n.DP.LastEcho())
		}
		for _, fx := range append([]failover.Effect(nil), fo.machine.Step(fo.d.now(), ev)...) {
			if err := fo.carryOut(fx); err != nil {
				fo.d.fatal = err
				break
			}
		}
	}
	fo.stepping = false
}

func (fo *failoverPart) carryOut(fx failover.Effect) error {
	switch fx.Op {
	case failover.OpClaim:
		fo.claim(fx.Term)
	case failover.OpShut:
		if fo.s != nil {
			fo.d.checkpoints.step(checkpoint.Event{Kind: checkpoint.EvQuiet}) // it opens nothing any more
		}
		return fo.d.each("shut", (*nicloop.Loop).Shut)
	case failover.OpTellDead:
		fo.d.peer.send(peerlink.Dead{})
	case failover.OpFenced:
		fo.fenced()
	case failover.OpPoweredOff:
		return fo.poweredOff()
	case failover.OpYield:
		if !fo.guestGone() {
			fo.d.peer.send(peerlink.Yield{})
		}
	case failover.OpSync:
		return fo.d.repl.replicate()
	case failover.OpPair:
		fo.d.repl.tries.paired = time.Now()
		fo.d.event(journal.Sync, "the guest replicates", nil)
		if err := fo.remember(fo.withPeer); err != nil { // before S can be covered
			return err
		}
		fo.d.repl.hello.COLO = true // S's QEMU waited when it sent its hello, and follows from now on
		if err := fo.d.each("begin a pair", func(n *nicloop.Loop) error { return n.Renew(fo.d.opt.Compare, fo.d.epoch) }); err != nil {
			return err
		}
		fo.d.repl.sendEdges()
		fo.d.qmp.noDelay(fo.Peers)
		fo.d.checkpoints.step(checkpoint.Event{Kind: checkpoint.EvPair, OK: true})
	case failover.OpUnpair:
		fo.d.checkpoints.step(checkpoint.Event{Kind: checkpoint.EvPair})
		fo.d.repl.stopSync("this host replicates no more")
		fo.d.repl.tries.over()
		if fo.p.Covered() { // fenced, and the secondary may be about to take over
			return nil
		}
		return fo.remember(func(st *state.State) { st.Covered = 0 })
	case failover.OpTellCovered:
		if err := fo.remember(func(st *state.State) { st.Covered = fx.Term }); err != nil {
			return err
		}
		fo.d.log.Info("covered: the secondary can take over", "arbiter_term", fx.Term)
		if fo.d.repl.edgesSent == fo.d.peer.link { // else tellEdges does it
			fo.d.peer.send(peerlink.Covered{Term: fx.Term})
		}
	case failover.OpQuiet:
		fo.d.log.Warn("taking over from "+fo.d.opt.Peer, "why", fo.s.Why())
		fo.d.event(journal.Failover, "taking over: "+fo.s.Why(), nil)
		fo.d.checkpoints.step(checkpoint.Event{Kind: checkpoint.EvQuiet})
		if err := fo.d.each("mute", (*nicloop.Loop).Quiet); err != nil {
			return err
		}
		fo.d.qmp.bePatient()
		fo.askAwake()
	case failover.OpQEMU:
		fo.d.qmp.detached = true
		fo.tellQEMU()
	case failover.OpSolo:
		if fo.d.isPrimary() {
			return fo.goAlone()
		}
		return fo.promote()
	}
	return nil
}

// tellQEMU is R21 (iv). A connection that broke on the way decides nothing, nor does a QEMU that is slow to
// answer: this host has won, and the order is repeated, unless QEMU is dead.
func (fo *failoverPart) tellQEMU() {
	fo, m := fo, fo.d.qmp.conn
	fo.tellAgain = m == nil
	if fo.tellAgain {
		return
	}
	fo.d.qmp.endNote() // QEMU writes to the images as soon as it takes over
	if fo.d.fatal != nil {
		return
	}
	fo.d.qmp.procedure("take over", func(ctx context.Context, m *qmp.Monitor) error {
		return qemu.SecondaryFailover(ctx, m, fo.Disks)
	}, func(err error) {
		if err != nil && (m.Err() != nil || errors.Is(err, qmp.ErrTimeout)) {
			fo.d.log.Warn("the order to take over is repeated", "err", err)
			fo.tellAgain = true
			if fo.d.qmp.conn != nil && (fo.d.qmp.conn != m || m.Err() == nil) {
				fo.tellQEMU()
			}
			return
		}
		if err != nil {
			fo.d.log.Error("QEMU cannot take over", "err", err)
		}
		fo.step(failover.Event{Kind: failover.EvQEMU, OK: err == nil})
	})
}

// remember changes what is on disk, before anything is done that rests on it.
func (fo *failoverPart) remember(change func(*state.State)) error {
	st := fo.state
	st.Role, st.Term = string(fo.d.opt.Role), fo.machine.Term()
	change(&st)
	if st == fo.state {
		return nil
	}
	if err := fo.Store.Save(st); err != nil {
		return err
	}
	fo.state = st
	return nil
}

// goAlone has P transmit without S (R21): what is held leaves first.
func (fo *failoverPart) goAlone() error {
	if fo.d.peer.link != nil {
		fo.d.peer.send(peerlink.Dismiss{})
	}
	if err := fo.d.each("go on alone", (*nicloop.Loop).Solo); err != nil {
		return err
	}
	fo.d.log.Warn("transmitting alone: nothing protects the guest until there is a secondary again", "arbiter_term", fo.p.Term())
	fo.d.event(journal.Role, "transmitting alone: "+fo.p.Why(), map[string]any{"state": "solo", "term": fo.p.Term()})
	fo.d.repl.endReplication()
	return fo.remember(func(st *state.State) { st.Alone = !st.Replicated })
}

// promote has the SVM transmit (R21 v, R22), and ends this daemon's role.
func (fo *failoverPart) promote() error {
	if len(fo.Disks) > 0 {
		// Stored before a client gets anything that only the overlays have.
		if err := fo.remember(func(st *state.State) { st.Unmerged = true }); err != nil {
			return err
		}
	}
	if err := fo.d.each("take over", func(n *nicloop.Loop) error { return n.TakeOver(guardTicks, fo.d.checkpoints.secondary.Doubt()) }); err != nil {
		return err
	}
	fo.d.log.Warn("took over: the guest transmits from here", "arbiter_term", fo.s.Term())
	fo.d.event(journal.Failover, "took over", map[string]any{"term": fo.s.Term()})
	fo.d.qmp.procedure("announce", func(_ context.Context, m *qmp.Monitor) error { return qemu.Announce(m) }, func(err error) {
		if err != nil {
			fo.d.log.Warn("the network was not told where the guest is now, and learns it from the guest's frames", "err", err)
		}
		fo.d.fatal = ErrPromoted
	})
	return nil
}

// fenced: this host may not transmit any more.
func (fo *failoverPart) fenced() {
	end := fmt.Errorf("%w: %s", ErrFenced, fo.machine.Why())
	if fo.s != nil {
		end = fmt.Errorf("%w: %s", ErrAfresh, fo.machine.Why())
	}
	fo.d.event(journal.Fencing, "this node is fenced: "+fo.machine.Why(), nil)
	if fo.s != nil {
		// So that a daemon after this one knows that the SVM may be ended.
		if err := fo.remember(func(st *state.State) { st.Covered = 0 }); err != nil {
			fo.d.log.Error("what becomes of this secondary could not be noted", "err", err)
		}
	}
	if fo.d.qmp.conn == nil {
		fo.end(end)
		return
	}
	fo.d.qmp.conn.BePatient(1) // whatever it may still load is of no use
	fo.d.qmp.procedure("stop the guest", func(_ context.Context, m *qmp.Monitor) error {
		fo.d.qmp.pausing.Lock() // or a request that fails would resume it
		defer fo.d.qmp.pausing.Unlock()
		return qemu.Stop(m)
	}, func(err error) {
		if err != nil {
			fo.d.log.Error("the guest could not be stopped: its NICs stay shut", "err", err)
		}
		fo.end(end)
	})
}

// askAwake finds out whether the SVM runs: then nothing is being loaded. A QEMU that stands still
// itself may hold a checkpoint that it has not loaded yet, so nobody goes on before it answers.
func (fo *failoverPart) askAwake() {
	running := false
	fo.d.qmp.procedure("ask for the guest's state", func(_ context.Context, m *qmp.Monitor) (err error) {
		running, err = qemu.LeavePrimary(m)
		return err
	}, func(err error) {
		if err != nil {
			return
		}
		kind := failover.EvStands
		if running {
			kind = failover.EvRuns
		}
		fo.step(failover.Event{Kind: kind})
	})
}

// joined is S's side of a session: record is P's fencing term, pair whether P goes
// on with the pair that there was.
func (fo *failoverPart) joined(record uint64, pair, colo bool) {
	if fo == nil {
		return
	}
	fo.d.repl.refused = ""
	fo.step(failover.Event{Kind: failover.EvLinkUp, Term: record})
	if err := fo.remember(func(st *state.State) {
		st.Replicated = true
		fo.withPeer(st)
		if !fo.s.Covered() {
			st.Covered = 0
		}
	}); err != nil {
		fo.d.fatal = err
		return
	}
	switch {
	case pair:
	case fo.s.Covered():
		// P has lost its guest, or asks the arbiter whether it may go on alone. It has not said that its gate is shut.
		fo.step(failover.Event{Kind: failover.EvPeerDead})
	case colo:
		fo.d.fatal = fmt.Errorf("%w: the primary has another guest than the one that this secondary's followed", ErrAfresh)
	}
}

// received takes a message about the failover; false: it is none that this side takes.
func (fo *failoverPart) received(m peerlink.Message) bool {
	_, ping := m.(peerlink.Ping)
	if fo == nil {
		return ping
	}
	fo.step(failover.Event{Kind: failover.EvReceived})
	if _, dead := m.(peerlink.Dead); dead {
		fo.d.repl.stopSync("the secondary's QEMU died")
		fo.step(failover.Event{Kind: failover.EvPeerDead, OK: true})
		return true
	}
	if fo.p != nil {
		return ping || fo.fromSecondary(m)
	}
	return ping || fo.fromPrimary(m)
}

func (fo *failoverPart) fromSecondary(m peerlink.Message) bool {
	switch m := m.(type) {
	case peerlink.Yield:
		fo.step(failover.Event{Kind: failover.EvYield}) // which says why this node is fenced
	case peerlink.Overlays:
		fo.d.room.peersOverlays(m)
	case peerlink.Kept:
		fo.d.repl.kept(m.Point)
	default:
		return false
	}
	return true
}

func (fo *failoverPart) fromPrimary(m peerlink.Message) bool {
	switch m := m.(type) {
	case peerlink.Covered:
		covered := fo.s.Covered()
		fo.step(failover.Event{Kind: failover.EvCovered, Term: m.Term})
		if fo.s.Covered() && !covered {
			if err := fo.remember(func(st *state.State) { st.Covered = m.Term }); err != nil {
				fo.d.fatal = err
			}
			fo.d.log.Info("covered: this host can take over", "arbiter_term", m.Term)
		}
	case peerlink.Edges:
		if err := fo.d.repl.addEdges(m); err != nil {
			fo.d.peer.unlink(fo.d.peer.link, err) // not covered, then
		}
	case peerlink.PoweredOff:
		fo.step(failover.Event{Kind: failover.EvPoweredOff})
	case peerlink.Refused:
		fo.d.repl.noteRefused(m.Cause)
	case peerlink.Replica:
		fo.d.repl.noteReplica(m.Point)
	case peerlink.Dismiss:
		if fo.Guest != nil {
			if said := qemu.Log(fo.Guest); said != "" { // it may have refused the primary's
				fo.d.log.Warn("the primary goes on without this secondary, whose QEMU has printed", "qemu_log", said)
			}
		}
		fo.step(failover.Event{Kind: failover.EvDismissed})
	default:
		return false
	}
	return true
}

// insecure reports whether memory and disks go between the two QEMUs in the clear.
func (fo *failoverPart) insecure() bool {
	return fo != nil && (fo.Own.TLS == nil || fo.d.qmp.info.clear && fo.d.qmp.info.colo != "none")
}

// linkLost follows the end of a session.
func (fo *failoverPart) linkLost(why error) {
	if fo == nil {
		return
	}
	fo.d.repl.stopSync(fmt.Sprintf("the control link was lost: %v", why))
	var timeout net.Error
	fo.step(failover.Event{Kind: failover.EvLinkDown, OK: !(errors.As(why, &timeout) && timeout.Timeout())})
}

// nextDeadline is when the machine wants its next tick.
func (fo *failoverPart) nextDeadline() int64 {
	if fo == nil {
		return math.MaxInt64
	}
	return fo.machine.NextDeadline()
}
