// SPDX-License-Identifier: Apache-2.0

package control

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"lockstep/compare"
	"lockstep/control/api"
	"lockstep/control/arbiter"
	"lockstep/control/checkpoint"
	"lockstep/control/datapath"
	"lockstep/control/failover"
	"lockstep/control/journal"
	"lockstep/control/qemu"
	"lockstep/control/qmp"
	"lockstep/control/state"
)

// Life is what a daemon needs to begin a pair and to end it: an arbiter,
// a place on disk for what it must not forget, and QEMU.
type Life struct {
	Begin   failover.Begin
	Arbiter arbiter.Arbiter
	Store   *state.Store
	Timeout time.Duration // of a silent peer, before it counts as dead
	Restart time.Duration // for a daemon that ended on a living host to come back; 0: MaxRejoin

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

// replicator begins replication, for as long as it takes, and ends it. On S it makes QEMU
// ready for a primary's.
type replicator struct {
	d        *Daemon
	cancel   context.CancelFunc // P: of the replication that begins; nil: none does
	syncing  qemu.Progress      // how far it is
	refused  string             // why replication does not begin, which somebody has to mend; "": nothing is known
	gaveUp   string             // why it was cancelled
	syncedOn *link              // the session in which it ended well
	tries    tries
	ending   bool   // P: QEMU is being told to go on alone
	unended  string // why it has not; "": it was not tried
	endAgain backoff

	imagesRetry backoff // P: of comparisons that could not be made

	sizing    sync.Mutex
	sizes     []int64       // of the disks; nil: not asked for yet
	hello     hello         // P: of the session there is
	caps      qemu.Caps     // of this host's QEMU
	unfit     error         // why that cannot be part of a pair
	prepared  chan struct{} // S: closed when QEMU waits for a primary's
	ready     bool          // S: that is so
	edgesTo   *link         // P: the link on which the edges are told
	edgesTold *link         // P: and the one on which all were
}

func newPairLife(l Life, d *Daemon) (*pairLife, error) {
	if l.Timeout == 0 {
		l.Timeout = 500 * time.Millisecond
	}
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
	cfg, now := failover.DefaultConfig(l.Timeout, d.opt.SpeakFor, cmp.Or(l.Restart, MaxRejoin)), d.opt.NICs[0].Now()
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
		l.d.peer.send(message{Type: "dead"})
	case failover.OpFenced:
		l.out()
	case failover.OpPoweredOff:
		return l.poweredOff()
	case failover.OpYield:
		l.d.peer.send(message{Type: "yield"})
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
			l.d.peer.send(message{Type: "covered", Record: fx.Term})
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

// event notes something for `lockstep events`.
func (d *Daemon) event(kind journal.Kind, cause string, fields map[string]any) {
	if d.opt.Journal != nil {
		d.opt.Journal.Add(journal.Event{Kind: kind, Cause: cause, Fields: fields})
	}
}

// claim asks the arbiter until it is known what came of it (R21 ii).
func (l *pairLife) claim(term uint64) {
	from := arbiter.Record{Term: term, Speaker: l.d.opt.Node}
	if l.s != nil {
		from.Speaker = l.d.opt.Peer
	}
	to := arbiter.Record{Term: term + 1, Speaker: l.d.opt.Node}
	l.d.log.Info("claiming the arbiter", "from", from, "to", to)
	l.d.work.Go(func() {
		now, won, err := Swap(l.d.ctx, l.Arbiter, from, to, func(err error) {
			l.d.log.Warn("the arbiter does not tell who may speak: silent until it does", "err", err)
		})
		if err != nil {
			return // the daemon ends
		}
		l.d.post(func() {
			l.d.log.Info("the arbiter answered", "won", won, "record", now)
			l.d.event(journal.Arbiter, "", map[string]any{"won": won, "term": now.Term, "speaker": now.Speaker})
			l.live(failover.Event{Kind: failover.EvClaimed, OK: won, Term: now.Term})
		})
	})
}

// Swap makes the record to if it is from, and returns when that is known, or ctx has
// ended. An arbiter that answers with from has decided nothing: as one that does not
// answer it is asked again, at a growing distance, since each time may fence a host.
func Swap(ctx context.Context, a arbiter.Arbiter, from, to arbiter.Record, failed func(error)) (now arbiter.Record, won bool, err error) {
	silent, unmoved := arbiterRetry, unmovedRetry
	for {
		again := &silent
		now, won, err = a.Swap(ctx, from, to)
		if err == nil && !won && now == from {
			again = &unmoved
			err = fmt.Errorf("asked to change the record (%s) to %s, the arbiter answers that it is what it was, which says neither won nor lost; an `exec` command has to make the change or fail (docs/ARBITER.md)", from, to)
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

// Settle returns the record when the arbiter tells it, or ctx has ended.
func Settle(ctx context.Context, a arbiter.Arbiter, failed func(error)) (arbiter.Record, error) {
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

// unmovedRetry paces them to one that answers with the old record.
var unmovedRetry = backoff{first: 50 * time.Millisecond, last: 30 * time.Second}

// goAlone has P speak without S (R21): what is held leaves first.
func (l *pairLife) goAlone() error {
	if l.d.peer.link != nil {
		l.d.peer.send(message{Type: "over"})
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

// procedure runs one of QEMU's beside the controller, which hears of the result.
func (mo *monitor) procedure(what string, f func(context.Context, *qmp.Monitor) error, done func(error)) context.CancelFunc {
	ctx, cancel := context.WithCancel(mo.d.ctx)
	m := mo.conn
	mo.d.work.Go(func() {
		defer cancel()
		err := fmt.Errorf("%s: no QMP connection", what)
		if m != nil {
			err = f(ctx, m)
		}
		mo.d.post(func() { done(err) })
	})
	return cancel
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

// replicate has QEMU begin to replicate to S's (P).
func (re *replicator) replicate() error {
	if !re.d.life.state.Replicated {
		return re.replicateFirst()
	}
	return re.replicateTo(true)
}

// replicateTo does it; resync: the disks are copied first.
func (re *replicator) replicateTo(resync bool) error {
	l := re.d.life
	if err := re.d.life.remember(func(st *state.State) { st.Replicated = true }); err != nil {
		return err
	}
	peer := re.d.peer.link
	re.d.log.Info("replication begins", "to", l.Peers.Migration, "disks", len(l.Disks), "copy_disks", resync && len(l.Disks) > 0)
	re.d.event(journal.Sync, "replication begins", map[string]any{"copy_disks": resync && len(l.Disks) > 0})
	re.syncing, re.gaveUp = qemu.Progress{}, ""
	told := re.progress()
	re.cancel = re.d.qmp.procedure("replicate", func(ctx context.Context, m *qmp.Monitor) error {
		caps, err := qemu.Probe(m)
		if err != nil {
			return err
		}
		if err := qemu.CheckNICs(m, len(re.d.nics)); err != nil {
			return err
		}
		return qemu.Replicate(ctx, m, caps, l.Disks, l.Peers, qemu.Options{Resync: resync, Limits: l.Limits, Progress: told})
	}, func(err error) {
		re.cancel, re.syncing = nil, qemu.Progress{}
		re.d.opt.Progress(qemu.Progress{})
		if err != nil {
			if re.gaveUp != "" {
				err = fmt.Errorf("%s (%w)", re.gaveUp, err)
			}
			re.tries.fail(err.Error())
			re.d.log.Error("replication did not begin", "err", err, "try", re.tries.failed, "next_in", re.tries.again.next)
			re.d.event(journal.Sync, "replication did not begin: "+err.Error(), map[string]any{"try": re.tries.failed, "next_in": re.tries.again.next.String()})
			if re.d.peer.link == peer {
				re.d.peer.send(message{Type: "over"}) // S's QEMU has to wait anew
			}
		}
		if err == nil {
			re.syncedOn = peer
		}
		re.d.life.live(failover.Event{Kind: failover.EvSynced, OK: err == nil})
		if re.d.peer.link != peer {
			re.paired() // there was one meanwhile
		}
	})
	return nil
}

// stopSync gives up the replication that begins, if one does.
func (re *replicator) stopSync(why string) {
	if re.cancel != nil {
		re.cancel()
		re.gaveUp = why
	}
}

// progress hands on how far something is, to whoever waits for it and to status.
func (re *replicator) progress() func(qemu.Progress) {
	var told time.Time
	return func(p qemu.Progress) {
		if time.Since(told) < progressEvery {
			return
		}
		told = time.Now()
		re.d.opt.Progress(p)
		re.d.post(func() { re.syncing = p })
	}
}

// progressEvery is between two words on how far a replication that begins is.
const progressEvery = 200 * time.Millisecond

// paired tells the life's machine of a session, once QEMU's mode is known (P).
func (re *replicator) paired() {
	l := re.d.life
	if l == nil || l.p == nil || !re.d.peer.linkUp || re.d.qmp.conn == nil {
		return // QMP's connection or the session comes
	}
	peer, mode := re.d.peer.link, ""
	re.d.qmp.procedure("ask for COLO's mode", func(_ context.Context, m *qmp.Monitor) (err error) {
		mode, err = m.COLO()
		return err
	}, func(err error) {
		if err != nil || re.d.peer.link != peer || !re.d.peer.linkUp {
			return
		}
		if l.p.State() == failover.PrimaryPair && re.syncedOn == peer {
			return // the session in which the pair began, and only QMP's connection is new
		}
		ok := mode == "primary" && re.hello.COLO
		if re.held(ok) {
			return
		}
		re.d.life.live(failover.Event{Kind: failover.EvLinkUp, OK: ok})
		if l.p.State() == failover.PrimaryPair && re.edgesTo != peer {
			re.tellEdges() // what was told on the link before this one may be lost
		}
	})
}

// fitsQEMU is an error until this host's QEMU is connected, because what a session means
// depends on what that does, and unless the two QEMUs can be a pair (P). Of a pair that
// there was, and a QEMU that lives but cannot be reached, it is still what it was; were
// there no session, S would take over.
func (re *replicator) fitsQEMU(ctx context.Context, h *hello) error {
	var caps qemu.Caps
	var unfit error
	known := false
	if err := re.d.ask(ctx, func() {
		known = re.d.qmp.outOfReach && re.d.life.p.State() == failover.PrimaryPair
		if re.d.qmp.conn != nil {
			caps, unfit = re.caps, re.unfit
		}
	}); err != nil || known {
		return err
	}
	switch {
	case unfit != nil:
		return fmt.Errorf("the primary's QEMU cannot replicate: %w", unfit)
	case caps.Machine == "":
		return errors.New("the primary's QEMU is not connected yet")
	case h.Machine == "":
		return nil // an older lockstep does not tell
	case re.d.life.anyMachine:
		return nil
	}
	return qemu.SameMachine(caps, qemu.Caps{Version: h.QEMU, Machine: h.Machine})
}

// probe finds out what P's QEMU can do.
func (re *replicator) probe() {
	l := re.d.life
	if l == nil || l.p == nil {
		return
	}
	var caps qemu.Caps
	re.d.qmp.procedure("probe", func(_ context.Context, m *qmp.Monitor) (err error) {
		caps, err = qemu.Probe(m)
		return err
	}, func(err error) {
		if re.caps, re.unfit = caps, err; err != nil {
			re.d.log.Error("QEMU cannot replicate", "err", err)
		}
	})
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

// heardOf takes a message about the pair's life; false: it is none.
func (l *pairLife) heardOf(m message) bool {
	if l == nil {
		return m.Type == "ping"
	}
	l.live(failover.Event{Kind: failover.EvReceived})
	switch {
	case m.Type == "ping":
	case m.Type == "dead":
		l.d.repl.stopSync("the secondary's QEMU died")
		l.live(failover.Event{Kind: failover.EvPeerDead})
	case m.Type == "yield" && l.p != nil:
		l.d.log.Warn("an operator has the secondary take over")
		l.live(failover.Event{Kind: failover.EvYield})
	case m.Type == "covered" && l.s != nil:
		covered := l.s.Covered()
		l.live(failover.Event{Kind: failover.EvCovered, Term: m.Record})
		if l.s.Covered() && !covered {
			if err := l.remember(func(st *state.State) { st.Covered = m.Record }); err != nil {
				l.d.fatal = err
			}
			l.d.log.Info("covered: this host can take over", "arbiter_term", m.Record)
		}
	case m.Type == "edges" && l.s != nil:
		if err := l.d.repl.addEdges(m); err != nil {
			l.d.peer.unlink(l.d.peer.link, err) // not covered, then
		}
	case m.Type == "off" && l.s != nil:
		l.live(failover.Event{Kind: failover.EvPoweredOff})
	case m.Type == "refused" && l.s != nil:
		l.d.repl.noteRefused(m.Cause)
	case m.Type == "overlays" && l.p != nil:
		l.d.room.peersOverlays(m)
	case m.Type == "over" && l.s != nil:
		l.d.log.Warn("the primary goes on without this secondary")
		l.live(failover.Event{Kind: failover.EvDismissed})
	default:
		return false
	}
	return true
}

// tellEdges tells S of the connections that were taken over by this host or by one
// before it (P). There may be millions, so that takes a while, beside everything else.
// S hears that it is covered only behind them.
func (re *replicator) tellEdges() {
	l, peer := re.d.life, re.d.peer.link
	if peer == nil {
		return // whoever comes is told
	}
	re.edgesTo = peer
	re.d.work.Go(func() {
		err := re.streamEdges(peer)
		re.d.post(func() {
			switch {
			case re.d.peer.link != peer:
			case err != nil:
				re.d.peer.unlink(peer, err) // the next session tries again
			default:
				if re.edgesTold = peer; l.p.Covered() {
					re.d.peer.send(message{Type: "covered", Record: l.p.Term()})
				}
			}
		})
	})
}

func (re *replicator) streamEdges(peer *link) error {
	for _, n := range re.d.nics {
		edges, err := n.dp.Edges()
		if err != nil {
			return fmt.Errorf("nic %d: %w", n.index, err)
		}
		if !peer.stream(func(yield func(message) bool) {
			for some := range slices.Chunk(edges, maxEdges) {
				b, err := binary.Append(nil, binary.LittleEndian, some)
				if err != nil {
					panic(err) // fields of fixed size
				}
				if !yield(message{Type: "edges", NIC: n.index, Edges: b}) {
					return
				}
			}
		}) {
			return errors.New("the link was lost while edges were told")
		}
	}
	return nil
}

// addEdges takes what tellEdges tells (S).
func (re *replicator) addEdges(m message) error {
	edges := make([]datapath.Edge, len(m.Edges)/binary.Size(datapath.Edge{}))
	if n, err := binary.Decode(m.Edges, binary.LittleEndian, edges); err != nil || n != len(m.Edges) || m.NIC < 0 || m.NIC >= len(re.d.nics) {
		return errors.New("edges that make no sense")
	}
	n := re.d.nics[m.NIC]
	return n.do(func() error { return n.dp.AddEdges(edges) })
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

// qemuGone: this host's QEMU is.
func (mo *monitor) qemuGone(why string) {
	said := ""
	if mo.d.life.Guest != nil {
		said = qemu.Log(mo.d.life.Guest)
	}
	mo.d.log.Error("QEMU is dead", "why", why, "qemu_said", said)
	mo.d.event(journal.QEMU, "dead: "+why, nil)
	if mo.d.guest.svmOff {
		// One that ends with its guest: the primary's powers off as well, and says so.
		time.AfterFunc(awaitOff, func() { mo.d.post(func() { mo.d.life.live(failover.Event{Kind: failover.EvQEMUDead}) }) })
		return
	}
	mo.d.life.live(failover.Event{Kind: failover.EvQEMUDead})
}

// nextLife is when the life's machine wants to be asked again.
func (l *pairLife) nextLife() int64 {
	if l == nil {
		return math.MaxInt64
	}
	return l.machine.NextDeadline()
}

// ensureGuest starts this host's QEMU, unless that is somebody else's or the one of
// the daemon before this one runs.
func (mo *monitor) ensureGuest(ctx context.Context) error {
	l := mo.d.life
	if l == nil || l.Guest == nil {
		return nil
	}
	p, err := qemu.Find(l.Guest)
	switch {
	case err == nil && l.Begin.Ends():
		err = p.Kill(ctx)
		p.Release()
		if err != nil {
			return err
		}
	case err == nil:
		mo.d.log.Info("going on with the QEMU that runs", "pid", p.Pid())
		p.Release()
		mo.hadQEMU = true
		return nil
	case !errors.Is(err, qemu.ErrNotRunning):
		return err
	case mo.hadQEMU:
		return nil // it died; watchQEMU finds that out
	}
	l.orphan = false // a new one has told clients nothing
	in := mo.incoming()
	if err := l.Guest.Check(in, nil); err != nil {
		return err
	}
	if l.state.Unmerged {
		if l.p != nil {
			mo.d.log.Warn("merging what the guest wrote after its takeover into its images")
			if err := qemu.MergeOverlays(ctx, l.Guest); err != nil {
				return err
			}
		}
		if err := mo.d.life.remember(func(st *state.State) { st.Unmerged = false }); err != nil {
			return err
		}
	}
	if err := mo.startQEMU(ctx); err != nil {
		return err
	}
	mo.hadQEMU = true
	return nil
}

// incoming is where this host's QEMU waits for another's; nil: it does not.
func (mo *monitor) incoming() *qemu.Incoming {
	if mo.d.life.s == nil {
		return nil
	}
	return &mo.d.life.Own
}

// startQEMU starts this host's QEMU, which does not run.
func (mo *monitor) startQEMU(ctx context.Context) error {
	p, err := qemu.Start(ctx, mo.d.life.Guest, mo.incoming())
	if err != nil {
		return err
	}
	mo.d.log.Info("QEMU started", "pid", p.Pid())
	mo.d.event(journal.QEMU, "started", map[string]any{"pid": p.Pid()})
	p.Release()
	return nil
}

// prepare makes S's QEMU ready for P's, after which S may connect.
func (re *replicator) prepare() {
	l := re.d.life
	if l == nil || l.s == nil || re.ready {
		return
	}
	var caps qemu.Caps
	re.d.qmp.procedure("prepare", func(ctx context.Context, m *qmp.Monitor) (err error) {
		if caps, err = qemu.Probe(m); err != nil {
			return err
		}
		if err := qemu.CheckNICs(m, len(re.d.nics)); err != nil {
			return err
		}
		return qemu.PrepareSecondary(ctx, m, caps, l.Disks, l.Own.NBD)
	}, func(err error) {
		switch {
		case err == nil && !re.ready:
			re.ready, re.caps = true, caps
			close(re.prepared)
		case err != nil:
			re.d.log.Error("QEMU is not ready for a primary", "err", err)
		}
	})
}

// checkSizes refuses a secondary whose disks are not of the primary's sizes.
func checkSizes(disks []qemu.Disk, own, peer []int64) error {
	if len(own) != len(peer) {
		return fmt.Errorf("%d disks here, %d there", len(own), len(peer))
	}
	for i := range own {
		if own[i] != peer[i] {
			return fmt.Errorf("disk %s has %d bytes here and %d there: they must be of one size", disks[i].ID, own[i], peer[i])
		}
	}
	return nil
}

// diskSizes are those of this host's disks, which do not change while they are in use.
// Sessions are made on several goroutines.
func (re *replicator) diskSizes() ([]int64, error) {
	re.sizing.Lock()
	defer re.sizing.Unlock()
	if re.sizes == nil {
		spec := qemu.Spec{Guest: qemu.Guest{Disks: re.d.life.Disks}}
		sizes, err := spec.DiskSizes()
		if err != nil {
			return nil, err
		}
		re.sizes = sizes
	}
	return re.sizes, nil
}

// status tells where the pair's life is.
func (l *pairLife) status(s *api.Status) {
	s.Record = l.machine.Term()
	defer func() {
		l.d.repl.statusOfImages(s)
		l.d.room.statusOfOverlays(s)
	}()
	if l.p != nil {
		s.Covered, s.Replication = l.p.Covered(), l.d.repl.replication()
		switch l.p.State() {
		case failover.PrimaryStart:
			s.State, s.Detail = "start", l.d.repl.tries.String()
		case failover.PrimarySolo:
			s.State, s.Detail = "solo", "nothing protects the guest"
			for _, more := range []string{l.d.repl.unended, l.d.repl.tries.String()} {
				s.Detail = strings.TrimSuffix(s.Detail+"; "+more, "; ")
			}
		case failover.PrimarySync:
			s.State, s.Detail = "start", "replication begins"
			if l.p.WasSolo() {
				s.State = "resync"
			}
			if l.d.repl.syncing.Total > 0 {
				s.Detail = l.d.repl.syncing.String()
			}
		case failover.PrimaryClaim:
			s.State, s.Detail = "failover", "the arbiter is asked"
		case failover.PrimaryFenced:
			s.State, s.Detail = "failover", "another host speaks"
		case failover.PrimaryOff:
			s.State, s.Detail = "off", "the guest powered off"
		}
		l.d.guest.diskStatus(s)
		return
	}
	s.Covered = l.s.Covered()
	switch l.s.State() {
	case failover.SecondaryWait:
		s.State = "start"
	case failover.SecondaryClaim, failover.SecondaryLease, failover.SecondaryLoad, failover.SecondaryQEMU, failover.SecondarySolo:
		s.State = "failover"
	case failover.SecondaryFenced:
		s.State, s.Detail = "failover", "another host speaks"
	case failover.SecondaryOff:
		s.State, s.Detail = "off", "the guest powered off"
	}
	l.d.guest.diskStatus(s)
}

// follows reports whether the SVM follows a PVM, or did so to the end (S).
func (mo *monitor) follows(ctx context.Context) (bool, error) {
	var m *qmp.Monitor
	if err := mo.d.ask(ctx, func() { m = mo.conn }); err != nil {
		return false, err
	}
	if m == nil {
		return false, errors.New("no QMP connection")
	}
	mode, err := m.COLO()
	return mode == "secondary", err
}

// The NICs' share.

// shut: nothing in or out, and no echoes.
func (n *nic) shut() error {
	n.echoEvery = 0
	// No program is left that takes an echo when the mode is set.
	return errors.Join(n.setMode(datapath.ModeShut), n.dp.SetLeaseUntil(0))
}

// renew begins a pair with an empty core; the guest goes on in mid-stream.
func (n *nic) renew(cfg compare.Config, epoch uint32) error {
	cfg.Epoch = epoch
	n.primary = compare.NewPrimary(cfg, n.keys)
	n.core = n.primary
	n.frozen, n.captured = false, nil
	return nil
}

// solo has P's guest speak alone.
func (n *nic) solo() error {
	n.echoEvery, n.frozen = 0, false
	if err := n.dp.SetLeaseUntil(math.MaxInt64); err != nil {
		return err
	}
	n.tell(compare.Event{Kind: compare.EvSolo})
	return n.setMode(datapath.ModeSolo)
}

// quiet has S say nothing to anybody; what its guest says is kept (R21 i).
func (n *nic) quiet() error { return n.setMode(datapath.ModeQuiet) }

// takeOver has the SVM speak, first what the clients may not have heard (R22).
func (n *nic) takeOver(guard uint32) error {
	if err := n.dp.TakeOver(guard); err != nil {
		return err
	}
	if err := n.dp.SetLeaseUntil(math.MaxInt64); err != nil {
		return err
	}
	if err := n.setMode(datapath.ModeSolo); err != nil {
		return err
	}
	n.parked = false
	n.tell(compare.Event{Kind: compare.EvTakeOver})
	// What it said until now may still be in the ring.
	for range maxUnpark {
		if err := n.poll(0); err != nil {
			return err
		}
		n.apply()
		if len(n.evs) == 0 {
			break
		}
	}
	return nil
}
