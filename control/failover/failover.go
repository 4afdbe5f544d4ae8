// SPDX-License-Identifier: Apache-2.0

package failover

import (
	"math"
	"time"
)

// The machines of a pair's life (R18-R21, R24-R26): who may speak, who is dead,
// who takes over. They are pure, as the checkpoint machines are: events and times
// come in, effects go out in the order in which they have to be carried out. One
// sentence rules them: a host speaks alone only after it has won the arbiter, and
// an outcome that is not known is not won (R26).
//
//	P: start ⇄ sync → pair ── the secondary is gone ──▶ claim ── won ──▶ solo → sync → pair
//	   from any but start: lost, fenced, or the own QEMU dead ──▶ out
//	S: wait → pair ── P is gone, and it is covered ──▶ claim ── won ──▶ wait for T ──▶ QEMU ──▶ solo
//	   lost, or the own QEMU dead ──▶ out
//
// The speaker's record in the arbiter is {term, speaker}. A claim swaps exactly the
// record that the pair began with, so a host that was left behind cannot win.

// lifeKind is the kind of an event.
type Kind uint8

// Events of both sides, of P, of S.
const (
	EvTick         Kind = iota + 1
	EvLinkUp            // a session holds. P: OK when S's QEMU is in COLO mode with P's already. S: Term is the pair's
	EvLinkDown          // OK: the peer's kernel ended it, so its host lives; else it fell silent
	EvReceived          // the peer said something on the control link
	EvPeerDead          // the peer says that its QEMU is dead and, if it was P, its gate shut
	EvDismissed         // S: P goes on without this SVM
	EvQEMUDead          // this side's QEMU is dead
	EvCOLOExit          // this side's QEMU lost the other's
	EvTakeOver          // an operator says that the other is to count as dead; P: also that the guest is to begin alone. S: OK: by force, and the SVM is loaded
	EvClaimed           // answer to lxClaim, when it is known: OK when won; Term is the record's
	EvGuestFailed       // this side's guest cannot go on: its disk failed (R24), or it panicked (R25)
	EvGuestHealthy      // it goes on
	EvPoweredOff        // the guest powered off: P's own, or P says so (R25)

	EvSynced    // P: answer to lxSync
	EvYield     // P: S is to take over
	EvCommitted // P: a checkpoint was committed in HOLD
	EvDoubt     // P: OK: nothing leaves until a checkpoint ends a doubt; else it has ended
	EvReplica   // P: a write or flush did not reach S's disks, or may not have (R24)
	EvEntry     // P: the arbiter's entry is of Term; OK: it names this host

	EvCovered // S: P confirmed the first commit (R18)
	EvRuns    // S: the SVM goes on, or QEMU knows that P is gone; nothing is being loaded
	EvQEMU    // S: answer to lxQEMU
)

type Event struct {
	Kind   Kind
	OK     bool
	Term   uint64 // of the arbiter
	Echoed int64  // boottime ns of the last echo that passed; 0: none yet
}

// lifeOp is the kind of an effect.
type Op uint8

// Effects.
const (
	OpClaim      Op = iota + 1 // swap the record {Term, the pair's speaker} for {Term+1, this host}, until the outcome is known
	OpShut                     // shut the gates: nothing leaves, no echo is returned
	OpSolo                     // speak alone, for ever: what is held leaves first
	OpTellDead                 // tell the peer: this side's QEMU is dead, its gate shut
	OpFenced                   // this host has no say any more: stop the guest, look at the arbiter again
	OpPoweredOff               // the guest powered off: tell the peer, remember it, end QEMU

	OpSync        // P: make QEMU replicate
	OpPair        // P: HOLD, and a checkpoint to cover it
	OpUnpair      // P: replication is over
	OpTellCovered // P: tell S that it may take over

	OpYield // S: ask P to fall silent
	OpQuiet // S: R21 (i), and the checkpoint machine stands by
	OpQEMU  // S: R21 (iv)
)

type Effect struct {
	Op   Op
	Term uint64
}

// OrderTimeout bounds an order of an operator's that is carried out in steps.
const OrderTimeout = 30 * time.Second

// lifeConfig has durations in ns.
type Config struct {
	timeout int64 // silence of a peer that counts as dead
	lease   int64 // T of R20
	Rejoin  int64 // for a daemon that ended on a living host to come back
	settle  int64 // S: for a checkpoint to show whether it was loaded
	Doubt   int64 // P: that no checkpoint ends, before S is given up
	order   int64 // S: how long an operator's order to take over holds

	// Mutations, only tests set them: S takes over uncovered; P goes on unasked; S
	// does not wait for P's last echo to run out; an uncovered P asks nobody; a forced S
	// does not look whether P is bound by its lease; a newer entry is not looked at; a
	// sick P competes with its covered secondary; an S takes over from a guest that has
	// powered off.
	noR18, noClaim, noWait, noR26Uncovered, noR26Lease, NoR26Entry, noR24, noR25 bool
}

// rejoin is how long a daemon that ended on a living host may take to come back.
func DefaultConfig(timeout, speak, rejoin time.Duration) Config {
	return Config{
		timeout: int64(timeout), lease: int64(speak),
		Rejoin: int64(max(rejoin, timeout)), settle: int64(50 * time.Millisecond),
		Doubt: int64(10 * time.Second), order: int64(OrderTimeout),
	}
}

// drifted is T(1+ρ): the two hosts' clocks may run 1 % apart.
func (c *Config) drifted() int64 { return c.lease + c.lease/100 }

// lifeSide is what both machines have: the record's term, and what a side knows of
// the other's life.
type side struct {
	cfg  Config
	out  []Effect
	term uint64 // P: of the record that names this host. S: of the pair

	link      bool
	sick      bool  // this side's guest cannot go on
	hostLives bool  // the link was ended by a living host
	received  int64 // when the control link last said anything
	echoed    int64
}

// take begins a step.
func (l *side) take(now int64, ev Event) {
	l.out = l.out[:0]
	l.echoed = max(l.echoed, ev.Echoed)
	switch ev.Kind {
	case EvLinkUp:
		l.link, l.hostLives, l.received = true, false, now
	case EvReceived:
		l.received = now
	case EvLinkDown:
		l.link, l.hostLives = false, ev.OK
	}
}

func (l *side) emit(op Op) { l.out = append(l.out, Effect{op, l.term}) }

// fallSilent: this guest is not to be heard again. The order counts: the peer believes
// lxDead.
func (l *side) mute() {
	l.emit(OpShut)
	if l.link {
		l.emit(OpTellDead)
	}
}

// Term is the arbiter's: P: of the entry that names this host. S: of the pair.
func (l *side) Term() uint64 { return l.term }

// Sick reports whether this side's guest cannot go on.
func (l *side) Sick() bool { return l.sick }

// lpState is where P is.
type PrimaryState uint8

const (
	PrimaryStart PrimaryState = iota // the guest has not run, or is not to be heard
	PrimarySolo
	PrimarySync
	PrimaryPair
	PrimaryClaim
	PrimaryFenced
	PrimaryOff // the guest powered off
)

// lifePrimary is the machine of the host whose guest clients hear.
type Primary struct {
	side
	state   PrimaryState
	solo    bool  // what to go back to when synchronising fails
	covered bool  // S may take over
	paired  int64 // since when
	doubtBy int64 // when a doubt has lasted too long; 0: there is none
}

// newLifePrimary begins with the record of term, which names this host. state is
// lpStart, or what a daemon before this one left: lpSolo, or lpPair and whether S
// was told that it is covered (R23).
func NewPrimary(cfg Config, term uint64, state PrimaryState, covered bool, now int64) *Primary {
	return &Primary{
		side: side{cfg: cfg, term: term, received: now},
		// Until there is a session nobody is asked for an echo.
		state: state, solo: state == PrimarySolo, covered: covered, paired: now + cfg.Rejoin,
	}
}

// State is where P is.
func (l *Primary) State() PrimaryState { return l.state }

// Covered reports whether S may take over.
func (l *Primary) Covered() bool { return l.covered }

// InDoubt reports whether nothing leaves until a checkpoint ends a doubt.
func (l *Primary) InDoubt() bool { return l.doubtBy != 0 }

// WasSolo reports whether the guest transmitted alone before this replication began.
func (l *Primary) WasSolo() bool { return l.solo }

// gone is when S counts as dead if nothing changes, and whether only its kernel's
// echoes can put that off.
func (l *Primary) gone() int64 {
	if l.yields() {
		return math.MaxInt64
	}
	echo := max(l.echoed, l.paired) + l.cfg.timeout
	if l.doubtBy != 0 {
		echo = min(echo, l.doubtBy) // nothing leaves: no SVM is better than this one
	}
	if l.link {
		return echo // the PVM is mute without them
	}
	// Its kernel goes on recording while the daemon is started again.
	return max(l.received+l.cfg.timeout, min(echo, l.received+l.cfg.Rejoin))
}

// NextDeadline is when lvTick is due next, boottime ns; math.MaxInt64: never.
func (l *Primary) NextDeadline() int64 {
	if l.state == PrimaryPair {
		return l.gone()
	}
	return math.MaxInt64
}

// Step takes one event in. The effects are valid until the next Step.
func (l *Primary) Step(now int64, ev Event) []Effect {
	l.take(now, ev)
	switch ev.Kind {
	case EvLinkUp:
		l.paired = min(l.paired, now)
		switch {
		case l.state == PrimaryPair && !ev.OK:
			l.alone() // another SVM than the one that followed
		case l.state != PrimaryStart && l.state != PrimarySolo:
		case ev.OK:
			l.pair(now)
		default:
			l.state = PrimarySync
			l.emit(OpSync)
		}
	case EvSynced:
		switch {
		case l.state != PrimarySync:
		case ev.OK:
			l.pair(now)
		default:
			l.back()
		}
	case EvCommitted:
		if l.state == PrimaryPair && !l.covered {
			// Noted before it is said: whatever S hears, P has counted with.
			l.covered = true
			l.emit(OpTellCovered)
		}
	case EvDoubt:
		if !ev.OK {
			l.doubtBy = 0
		} else if l.doubtBy == 0 {
			l.doubtBy = now + l.cfg.Doubt
		}
	case EvCOLOExit:
		if l.state == PrimaryPair && !l.yields() { // while QEMU begins to replicate, lvSynced tells
			l.alone()
		}
	case EvPeerDead, EvReplica:
		if l.state == PrimaryPair {
			l.alone()
		}
	case EvGuestFailed:
		l.sick = true
	case EvGuestHealthy:
		l.sick = false
	case EvEntry:
		// Somebody else has won since: an operator's doing, or a claim that this host
		// never heard of.
		if ev.Term > l.term && !ev.OK && l.state != PrimaryClaim && !l.cfg.NoR26Entry {
			l.fence()
		}
	case EvPoweredOff:
		l.powerOff()
	case EvTakeOver:
		switch l.state {
		case PrimaryPair:
			l.alone()
		case PrimaryStart: // an S that was covered once may be about to ask, too
			l.claim()
		}
	case EvQEMUDead:
		l.fence()
	case EvYield:
		if l.state == PrimaryPair {
			l.fence()
		}
	case EvClaimed:
		l.claimed(ev)
	}
	if l.state == PrimaryPair && now >= l.gone() {
		l.alone()
	}
	if l.state == PrimaryPair && l.yields() && l.link {
		l.fence() // S hears of it, and takes over
	}
	return l.out
}

// yields: the covered secondary is the better one (R24, R25). Until it can be told so,
// this host does not compete with it.
func (l *Primary) yields() bool { return l.sick && l.covered && !l.cfg.noR24 }

func (l *Primary) pair(now int64) {
	l.state, l.paired, l.covered = PrimaryPair, now, false
	l.emit(OpPair)
}

// back: no pair came of it.
func (l *Primary) back() {
	l.state = PrimaryStart
	if l.solo {
		l.state = PrimarySolo
	}
}

// alone goes on without S, covered or not: an operator may have had S take over by
// force (R26).
func (l *Primary) alone() {
	if l.cfg.noClaim || !l.covered && l.cfg.noR26Uncovered {
		l.goSolo()
		return
	}
	l.claim()
}

func (l *Primary) claim() {
	l.state = PrimaryClaim
	l.emit(OpClaim)
}

func (l *Primary) goSolo() {
	l.state, l.solo, l.covered = PrimarySolo, true, false
	l.emit(OpUnpair)
	l.emit(OpSolo)
}

func (l *Primary) claimed(ev Event) {
	if l.state != PrimaryClaim {
		return
	}
	if !ev.OK {
		l.fence()
		return
	}
	l.term = ev.Term
	l.goSolo()
}

// quit: this host has no say any more.
func (l *Primary) fence() {
	if l.state >= PrimaryFenced {
		return
	}
	l.state = PrimaryFenced
	l.mute()
	l.emit(OpUnpair)
	l.emit(OpFenced)
}

// off: nobody takes over from a guest that powered off (R25).
func (l *Primary) powerOff() {
	if l.state >= PrimaryFenced {
		return
	}
	l.state = PrimaryOff
	l.emit(OpShut)
	l.emit(OpUnpair)
	l.emit(OpPoweredOff)
}

// lsState is where S is.
type SecondaryState uint8

const (
	SecondaryWait  SecondaryState = iota // no pair yet
	SecondaryPair                        // the SVM follows
	SecondaryClaim                       // QUIET, and the arbiter is asked
	SecondaryLease                       // won; P may still speak on the last echo
	SecondaryLoad                        // a checkpoint that was under way shows whether it was loaded
	SecondaryQEMU                        // QEMU is being told
	SecondarySolo
	SecondaryFenced
	SecondaryOff // P's guest powered off
)

// lifeSecondary is the machine of the host whose guest follows.
type Secondary struct {
	side
	state   SecondaryState
	covered bool
	exited  int64 // when this side's QEMU lost P's; 0: it did not
	shut    bool  // P said that its gate is shut
	awake   bool
	loadBy  int64
	paired  int64 // when P's term was learnt
	ordered int64 // until then an operator's order to take over holds
}

// newLifeSecondary begins anew, or with what a daemon before this one was told for
// term, if the SVM is still the one it was told of (R23).
func NewSecondary(cfg Config, term uint64, covered bool, now int64) *Secondary {
	// Nothing says that P is dead: its daemon, too, may have been started again.
	l := &Secondary{side: side{cfg: cfg, term: term, received: now, hostLives: true}, covered: covered}
	if covered {
		l.state = SecondaryPair
	}
	return l
}

// State is where S is.
func (l *Secondary) State() SecondaryState { return l.state }

// Covered reports whether S may take over.
func (l *Secondary) Covered() bool { return l.covered }

// gone is when P counts as dead if nothing changes.
func (l *Secondary) gone() int64 {
	if l.link || !l.covered && !l.cfg.noR18 {
		return math.MaxInt64
	}
	limit := l.cfg.timeout
	if l.hostLives && l.exited == 0 {
		limit = l.cfg.Rejoin // its daemon is started again, its QEMU runs
	}
	return max(l.received, l.echoed) + limit
}

// useless is when an SVM that follows nobody gives up, though P lives.
func (l *Secondary) useless() int64 {
	if !l.link || l.exited == 0 {
		return math.MaxInt64
	}
	return l.exited + l.cfg.timeout
}

// silent is when P cannot speak any more (R21 iii).
func (l *Secondary) leaseEnd() int64 {
	if l.shut || l.echoed == 0 || l.cfg.noWait {
		return 0
	}
	return l.echoed + l.cfg.drifted()
}

// NextDeadline is when lvTick is due next, boottime ns; math.MaxInt64: never.
func (l *Secondary) NextDeadline() int64 {
	switch l.state {
	case SecondaryPair:
		return min(l.gone(), l.useless())
	case SecondaryLease:
		return l.leaseEnd()
	case SecondaryLoad:
		return l.loadBy
	}
	return math.MaxInt64
}

// Step takes one event in. The effects are valid until the next Step.
func (l *Secondary) Step(now int64, ev Event) []Effect {
	l.take(now, ev)
	switch ev.Kind {
	case EvLinkUp:
		if l.state > SecondaryPair {
			break
		}
		if ev.Term != l.term {
			l.term, l.covered, l.paired = ev.Term, false, now
		}
		l.state = SecondaryPair
	case EvCovered:
		if l.state == SecondaryPair && l.link && ev.Term == l.term {
			l.covered = true
		}
	case EvPeerDead:
		if l.state == SecondaryPair && (l.covered || now < l.ordered || l.cfg.noR18) {
			l.shut = true
			l.takeOver()
		}
	case EvDismissed:
		if l.state < SecondaryLease {
			l.fence()
		}
	case EvTakeOver:
		switch {
		case l.state != SecondaryPair || !l.MayTakeOver(l.echoed, ev.OK):
		case l.link:
			// A primary that lives says when it is silent.
			l.ordered = now + l.cfg.order
			l.emit(OpYield)
		default:
			l.takeOver()
		}
	case EvGuestFailed:
		l.sick = true
	case EvGuestHealthy:
		l.sick = false
	case EvPoweredOff:
		l.powerOff()
	case EvCOLOExit:
		l.exited, l.awake = now, true
	case EvRuns:
		l.awake = true
	case EvQEMUDead:
		l.fence()
	case EvClaimed:
		switch {
		case l.state != SecondaryClaim:
		case ev.OK:
			l.state, l.term = SecondaryLease, ev.Term
		default:
			l.fence()
		}
	case EvQEMU:
		switch {
		case l.state != SecondaryQEMU:
		case ev.OK:
			l.state = SecondarySolo
			l.emit(OpSolo)
		default:
			l.fence()
		}
	}
	l.advance(now)
	return l.out
}

// advance does what time allows.
func (l *Secondary) advance(now int64) {
	if l.state == SecondaryPair && (now >= l.useless() || l.sick && l.link) {
		l.fence() // P hears of it, and goes on alone
	}
	if l.state == SecondaryPair && now >= l.gone() {
		l.takeOver()
	}
	if l.state == SecondaryLease && now >= l.leaseEnd() {
		l.state, l.loadBy = SecondaryLoad, now+l.cfg.settle
	}
	if l.state == SecondaryLoad && (l.awake || now >= l.loadBy) {
		l.state = SecondaryQEMU
		l.emit(OpQEMU)
	}
}

// MayTakeOver reports whether an order to take over can be followed: by force also by
// an SVM that no commit covers, but not from a P that no lease binds, as none does
// before it holds the PVM's output (R26). echoed is the boottime of the last echo, ns.
func (l *Secondary) MayTakeOver(echoed int64, force bool) bool {
	return l.covered || force && (max(l.echoed, echoed) > l.paired || l.cfg.noR26Lease)
}

// takeOver is R21 (i) and (ii). awake is asked anew: lxQuiet's executor tells.
func (l *Secondary) takeOver() {
	l.state, l.awake = SecondaryClaim, l.exited != 0
	l.emit(OpQuiet)
	l.emit(OpClaim)
}

// quit: this guest follows nobody any more.
func (l *Secondary) fence() {
	if l.state >= SecondaryFenced {
		return
	}
	l.state, l.covered = SecondaryFenced, false
	l.mute()
	l.emit(OpFenced)
}

// off: the pair stays off until somebody starts it.
func (l *Secondary) powerOff() {
	if l.state >= SecondaryClaim || l.cfg.noR25 {
		return // the arbiter was asked: that decides
	}
	l.state, l.covered = SecondaryOff, false
	l.emit(OpShut)
	l.emit(OpPoweredOff)
}
