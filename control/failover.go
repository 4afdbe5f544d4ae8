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

	"lockstep/compare"
	"lockstep/control/arbiter"
	"lockstep/control/checkpoint"
	"lockstep/control/datapath"
	"lockstep/control/failover"
	"lockstep/control/journal"
	"lockstep/control/peerlink"
	"lockstep/control/qemu"
	"lockstep/control/qmp"
	"lockstep/control/state"
)

// ErrPoweredOff is how a part ends whose guest powered off: the pair stays off until
// somebody starts it.
var ErrPoweredOff = errors.New("the guest powered off")

// ended reports whether this host has no say any more.
func (l *pairLife) ended() bool {
	return l.p != nil && l.p.State() >= failover.PrimaryFenced || l.s != nil && l.s.State() >= failover.SecondaryFenced
}

// poweredOff ends a part (R25).
func (l *pairLife) poweredOff() error {
	l.d.log.Info("the guest powered off, and stays off until `lockstep start`")
	l.d.event(journal.QEMU, "the guest powered off", nil)
	if l.p != nil {
		l.d.peer.send(peerlink.PoweredOff{})
		if err := l.remember(func(st *state.State) { st.Off = l.Guest != nil }); err != nil {
			return err
		}
	}
	if l.Guest == nil || l.d.qmp.conn == nil {
		l.d.fatal = ErrPoweredOff
		return nil
	}
	l.d.qmp.procedure("end QEMU", func(_ context.Context, m *qmp.Monitor) error { return qemu.Quit(m) }, func(error) {
		l.d.fatal = ErrPoweredOff // it may have gone before it answered
	})
	return nil
}

// endPart ends this daemon's part. A secondary that had no room rests first: the next
// one's disks have to be copied before it finds out whether there is some.
func (l *pairLife) endPart(end error) {
	if l.s != nil {
		l.d.room.noteFull("") // P may have given it up before QEMU said so
	}
	if l.d.room.pause == nil {
		l.d.fatal = end
		return
	}
	l.d.work.Go(func() {
		if l.d.room.pause.wait(l.d.ctx) {
			l.d.post(func() { l.d.fatal = end })
		}
	})
}

// Life is what a daemon needs to begin a pair and to end it: an arbiter,
// a place on disk for what it must not forget, and QEMU.
type Life struct {
	Begin   failover.Begin
	Arbiter arbiter.Arbiter
	Store   *state.Store

	FirstStart FirstStart // what is done about the disks before a first replication
	Setback    *Setback   // one of a node's, for all of its parts; nil: a new one

	Guest *qemu.Spec // nil: QEMU is started by somebody else, and attached to
	Disks []qemu.Disk
	// Where a secondary's QEMU waits: this host's, the other's.
	Own, Peers qemu.Incoming
	Limits     qemu.Limits // of replication's beginning

	doubt      time.Duration // tests shorten it
	noR26Entry bool          // a mutation: only tests set it
	again      backoff       // between two tries to replicate; tests shorten it
	// Mutations, only tests set them: a QEMU that does not end replication counts as dead;
	// tries to replicate do not back off; the two QEMUs' machines are not compared.
	fencesUnended, triesAtOnce, anyMachine bool
}

// How a daemon's part in a pair's life ends: what Run returns.
var (
	// ErrPromoted: this host speaks alone, and goes on as the primary.
	ErrPromoted = errors.New("the secondary took over")
	// ErrAfresh: the SVM follows nobody any more; a new one may.
	ErrAfresh = errors.New("the secondary begins afresh")
	// ErrFenced: this host has no say any more, and its guest does not run.
	ErrFenced = errors.New("this node does not speak for the guest any more, which was stopped here")
)

// guardTicks is G of R22: what the SVM says is newer than what the PVM said. Nothing on
// the wire tells how long a tick of a guest's TCP timestamps is: mostly 1 ms, but 1 µs
// with Linux's route feature tcp_usec_ts, and up to 1 s elsewhere (RFC 7323). So it is
// 16 s of the fastest clock and 194 days of the slowest; a receiver takes any step
// below 2^31 ticks for one ahead.
const guardTicks = 1 << 24

// lifeMachine is lifePrimary or lifeSecondary.
type lifeMachine interface {
	NextDeadline() int64
	Step(now int64, ev failover.Event) []failover.Effect
	Term() uint64
	Sick() bool
}

// pairLife is the daemon's share in the pair's life: the controller's.
type pairLife struct {
	d *Daemon
	Life
	machine lifeMachine
	p       *failover.Primary // one of the two
	s       *failover.Secondary
	orphan  bool        // P: of Begin, until a new QEMU is started
	state   state.State // as it is on disk
	queue   []failover.Event
	busy    bool   // stepping
	untold  bool   // S: QEMU has to be told to take over, once it is connected
	said    uint64 // P: records of the SVM until the last commit
	mute    int    // P: commits in a row without one
}

func newPairLife(l Life, d *Daemon) (*pairLife, error) {
	if l.Setback == nil {
		l.Setback = new(Setback)
	}
	st, err := l.Store.Load()
	if err != nil {
		return nil, err
	}
	l.Arbiter = serialize(l.Arbiter)
	pl := &pairLife{d: d, Life: l, state: st, orphan: l.Begin.Orphan()}
	d.qmp.hadQEMU = l.Begin.HasGuest()
	d.repl.tries.atOnce = l.triesAtOnce
	if l.again != (backoff{}) {
		d.repl.tries.again = l.again
	}
	cfg, now := failover.DefaultConfig(d.opt.Heartbeat.Timeout, d.opt.Heartbeat.Lease, cmp.Or(d.opt.Heartbeat.Restart, peerlink.MaxRejoin)), d.opt.NICs[0].Now()
	cfg.NoR26Entry = l.noR26Entry
	if l.doubt != 0 {
		cfg.Doubt = int64(l.doubt)
	}
	if d.opt.Role == datapath.RolePrimary {
		pl.p = l.Begin.Primary(cfg, now)
		pl.machine = pl.p
		return pl, nil
	}
	pl.s = l.Begin.Secondary(cfg, d.opt.Node, now)
	pl.machine = pl.s
	return pl, nil
}

// live gives the life's machine an event, if there is one, and carries out what
// follows.
func (l *pairLife) live(ev failover.Event) {
	if l == nil {
		return
	}
	l.queue = append(l.queue, ev)
	if l.busy {
		return
	}
	l.busy = true
	for len(l.queue) > 0 && l.d.fatal == nil {
		ev := l.queue[0]
		l.queue = l.queue[1:]
		for _, n := range l.d.nics {
			ev.Echoed = max(ev.Echoed, n.dp.LastEcho())
		}
		for _, fx := range append([]failover.Effect(nil), l.machine.Step(l.d.now(), ev)...) {
			if err := l.carryOutLife(fx); err != nil {
				l.d.fatal = err
				break
			}
		}
	}
	l.busy = false
}

func (l *pairLife) carryOutLife(fx failover.Effect) error {
	switch fx.Op {
	case failover.OpClaim:
		l.claim(fx.Term)
	case failover.OpShut:
		if l.s != nil {
			l.d.ckpts.step(checkpoint.Event{Kind: checkpoint.EvQuiet}) // it opens nothing any more
		}
		return l.d.each("shut", (*nic).shut)
	case failover.OpTellDead:
		l.d.peer.send(peerlink.Dead{})
	case failover.OpFenced:
		l.out()
	case failover.OpPoweredOff:
		return l.poweredOff()
	case failover.OpYield:
		l.d.peer.send(peerlink.Yield{})
	case failover.OpSync:
		return l.d.repl.replicate()
	case failover.OpPair:
		l.d.repl.tries.paired = time.Now()
		l.d.event(journal.Sync, "the guest replicates", nil)
		l.d.repl.hello.COLO = true // S's QEMU waited when it said hello, and follows from now on
		if err := l.d.each("begin a pair", func(n *nic) error { return n.renew(l.d.opt.Compare, l.d.epoch) }); err != nil {
			return err
		}
		l.d.repl.tellEdges()
		l.d.ckpts.step(checkpoint.Event{Kind: checkpoint.EvPair, OK: true})
	case failover.OpUnpair:
		l.d.ckpts.step(checkpoint.Event{Kind: checkpoint.EvPair})
		l.d.repl.stopSync("this host replicates no more")
		l.d.repl.tries.over()
		return l.remember(func(st *state.State) { st.Covered = 0 })
	case failover.OpTellCovered:
		if err := l.remember(func(st *state.State) { st.Covered = fx.Term }); err != nil {
			return err
		}
		l.d.log.Info("covered: the secondary can take over", "arbiter_term", fx.Term)
		if l.d.repl.edgesTold == l.d.peer.link { // else tellEdges does it
			l.d.peer.send(peerlink.Covered{Term: fx.Term})
		}
	case failover.OpQuiet:
		l.d.log.Warn("the primary is gone: taking over")
		l.d.event(journal.Failover, "the primary is gone", nil)
		l.d.ckpts.step(checkpoint.Event{Kind: checkpoint.EvQuiet})
		if err := l.d.each("fall silent", (*nic).quiet); err != nil {
			return err
		}
		l.askAwake()
	case failover.OpQEMU:
		l.d.qmp.deaf = true
		l.tellQEMU()
	case failover.OpSolo:
		if l.d.isPrimary() {
			return l.goAlone()
		}
		return l.promote()
	}
	return nil
}

// tellQEMU is R21 (iv). A connection that broke on the way decides nothing: this host
// has won, and QEMU is told again on the next one, unless it is dead.
func (l *pairLife) tellQEMU() {
	l, m := l, l.d.qmp.conn
	l.untold = m == nil
	if l.untold {
		return
	}
	l.d.qmp.procedure("take over", func(ctx context.Context, m *qmp.Monitor) error {
		return qemu.SecondaryFailover(ctx, m, l.Disks)
	}, func(err error) {
		if err != nil && m.Err() != nil {
			l.d.log.Warn("QEMU is told again to take over, on the next connection", "err", err)
			l.untold = true
			if l.d.qmp.conn != nil && l.d.qmp.conn != m {
				l.tellQEMU()
			}
			return
		}
		if err != nil {
			l.d.log.Error("QEMU cannot take over", "err", err)
		}
		l.live(failover.Event{Kind: failover.EvQEMU, OK: err == nil})
	})
}

// remember changes what is on disk, before anything is done that rests on it.
func (l *pairLife) remember(change func(*state.State)) error {
	st := l.state
	st.Role, st.Term = string(l.d.opt.Role), l.machine.Term()
	change(&st)
	if st == l.state {
		return nil
	}
	if err := l.Store.Save(st); err != nil {
		return err
	}
	l.state = st
	return nil
}

// goAlone has P speak without S (R21): what is held leaves first.
func (l *pairLife) goAlone() error {
	if l.d.peer.link != nil {
		l.d.peer.send(peerlink.Dismiss{})
	}
	if err := l.d.each("go on alone", (*nic).solo); err != nil {
		return err
	}
	l.d.log.Warn("speaking alone: nothing protects the guest now", "arbiter_term", l.p.Term())
	l.d.event(journal.Role, "the secondary is gone", map[string]any{"state": "solo", "term": l.p.Term()})
	l.d.repl.endReplication()
	return l.remember(func(*state.State) {})
}

// promote has the SVM speak (R21 v, R22), and ends this daemon's part.
func (l *pairLife) promote() error {
	if len(l.Disks) > 0 {
		// Noted before a client hears of anything that only the overlays have.
		if err := l.remember(func(st *state.State) { st.Unmerged = true }); err != nil {
			return err
		}
	}
	if err := l.d.each("take over", func(n *nic) error { return n.takeOver(guardTicks) }); err != nil {
		return err
	}
	l.d.log.Warn("took over: the guest speaks from here", "arbiter_term", l.s.Term())
	l.d.event(journal.Failover, "took over", map[string]any{"term": l.s.Term()})
	l.d.qmp.procedure("announce", func(_ context.Context, m *qmp.Monitor) error { return qemu.Announce(m) }, func(err error) {
		if err != nil {
			l.d.log.Warn("the network was not told where the guest is now, and learns it from what the guest says", "err", err)
		}
		l.d.fatal = ErrPromoted
	})
	return nil
}

// out: this host has no say any more.
func (l *pairLife) out() {
	end := ErrFenced
	if l.s != nil {
		end = ErrAfresh
	}
	l.d.event(journal.Fencing, "this node has no say any more", nil)
	if l.s != nil {
		// So that a daemon after this one knows that the SVM may be ended.
		if err := l.remember(func(st *state.State) { st.Covered = 0 }); err != nil {
			l.d.log.Error("what becomes of this secondary could not be noted", "err", err)
		}
	}
	if l.d.qmp.conn == nil {
		l.endPart(end)
		return
	}
	l.d.qmp.procedure("stop the guest", func(_ context.Context, m *qmp.Monitor) error { return qemu.Stop(m) }, func(err error) {
		if err != nil {
			l.d.log.Error("the guest could not be stopped: its NICs stay shut", "err", err)
		}
		l.endPart(end)
	})
}

// askAwake finds out whether the SVM runs: then nothing is being loaded.
func (l *pairLife) askAwake() {
	running := false
	l.d.qmp.procedure("ask for the guest's state", func(_ context.Context, m *qmp.Monitor) (err error) {
		running, _, err = m.Status()
		return err
	}, func(err error) {
		if err == nil && running {
			l.live(failover.Event{Kind: failover.EvRuns})
		}
	})
}

// maxMute is how many checkpoints in a row may find that the SVM has said nothing since
// the one before, though the PVM waited for it.
const maxMute = 3

// listen gives up an SVM that is mute (P): it was made the PVM's copy again and again,
// and still says nothing. As a speaker it would be of no use.
func (l *pairLife) listen(cause string) error {
	if l == nil {
		return nil
	}
	var said uint64
	if err := l.d.each("count records", func(n *nic) error {
		said += n.primary.Stats().Records
		return nil
	}); err != nil {
		return err
	}
	if said != l.said || cause != compare.ReasonTimeout.String() {
		l.mute = 0
	} else {
		l.mute++
	}
	if l.said = said; l.mute < maxMute {
		return nil
	}
	l.mute = 0
	l.d.log.Error("the SVM says nothing, whatever it is made a copy of: it is given up", "checkpoints", maxMute)
	l.d.event(journal.Failover, "the SVM is mute", nil)
	l.live(failover.Event{Kind: failover.EvPeerDead})
	return nil
}

// joinedPair is S's side of a session: record is the term of P's, pair whether P goes
// on with the pair that there was.
func (l *pairLife) joinedPair(record uint64, pair, colo bool) {
	if l == nil {
		return
	}
	l.d.repl.refused = ""
	l.live(failover.Event{Kind: failover.EvLinkUp, Term: record})
	if err := l.remember(func(st *state.State) {
		st.Replicated = true
		if !l.s.Covered() {
			st.Covered = 0
		}
	}); err != nil {
		l.d.fatal = err
		return
	}
	switch {
	case pair:
	case l.s.Covered():
		// P has lost its guest, and says nothing before a new pair begins.
		l.live(failover.Event{Kind: failover.EvPeerDead})
	case colo:
		l.d.fatal = ErrAfresh // this SVM followed a PVM that is gone
	}
}

// received takes a message about the failover; false: it is none that this side takes.
func (l *pairLife) received(m peerlink.Message) bool {
	_, ping := m.(peerlink.Ping)
	if l == nil {
		return ping
	}
	l.live(failover.Event{Kind: failover.EvReceived})
	if _, dead := m.(peerlink.Dead); dead {
		l.d.repl.stopSync("the secondary's QEMU died")
		l.live(failover.Event{Kind: failover.EvPeerDead})
		return true
	}
	if l.p != nil {
		return ping || l.fromSecondary(m)
	}
	return ping || l.fromPrimary(m)
}

func (l *pairLife) fromSecondary(m peerlink.Message) bool {
	switch m := m.(type) {
	case peerlink.Yield:
		l.d.log.Warn("an operator has the secondary take over")
		l.live(failover.Event{Kind: failover.EvYield})
	case peerlink.Overlays:
		l.d.room.peersOverlays(m)
	default:
		return false
	}
	return true
}

func (l *pairLife) fromPrimary(m peerlink.Message) bool {
	switch m := m.(type) {
	case peerlink.Covered:
		covered := l.s.Covered()
		l.live(failover.Event{Kind: failover.EvCovered, Term: m.Term})
		if l.s.Covered() && !covered {
			if err := l.remember(func(st *state.State) { st.Covered = m.Term }); err != nil {
				l.d.fatal = err
			}
			l.d.log.Info("covered: this host can take over", "arbiter_term", m.Term)
		}
	case peerlink.Edges:
		if err := l.d.repl.addEdges(m); err != nil {
			l.d.peer.unlink(l.d.peer.link, err) // not covered, then
		}
	case peerlink.PoweredOff:
		l.live(failover.Event{Kind: failover.EvPoweredOff})
	case peerlink.Refused:
		l.d.repl.noteRefused(m.Cause)
	case peerlink.Dismiss:
		l.d.log.Warn("the primary goes on without this secondary")
		l.live(failover.Event{Kind: failover.EvDismissed})
	default:
		return false
	}
	return true
}

// linkLost follows the end of a session.
func (l *pairLife) linkLost(why error) {
	if l == nil {
		return
	}
	l.d.repl.stopSync(fmt.Sprintf("the control link was lost: %v", why))
	var silent net.Error
	l.live(failover.Event{Kind: failover.EvLinkDown, OK: !(errors.As(why, &silent) && silent.Timeout())})
}

// nextLife is when the life's machine wants to be asked again.
func (l *pairLife) nextLife() int64 {
	if l == nil {
		return math.MaxInt64
	}
	return l.machine.NextDeadline()
}
