// SPDX-License-Identifier: Apache-2.0

package control

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
type lifeKind uint8

// Events of both sides, of P, of S.
const (
	lvTick     lifeKind = iota + 1
	lvLinkUp            // a session holds. P: OK when S's QEMU is in COLO mode with P's already. S: Term is the pair's
	lvLinkDown          // OK: the peer's kernel ended it, so its host lives; else it fell silent
	lvHeard             // the peer said something on the control link
	lvPeerDead          // the peer says that its QEMU is dead and, if it was P, its gate shut
	lvOver              // S: P goes on without this SVM
	lvQEMUDead          // this side's QEMU is dead
	lvCOLOExit          // this side's QEMU lost the other's
	lvTakeOver          // an operator says that the other is to count as dead; P: also that the guest is to begin alone. S: OK: by force, and the SVM is loaded
	lvClaimed           // answer to lxClaim, when it is known: OK when won; Term is the record's
	lvSick              // this side's guest cannot go on: its disk failed (R24), or it panicked (R25)
	lvHealthy           // it goes on
	lvOff               // the guest powered off: P's own, or P says so (R25)

	lvSynced    // P: answer to lxSync
	lvYield     // P: S is to take over
	lvCommitted // P: a checkpoint was committed in HOLD
	lvDoubt     // P: OK: nothing leaves until a checkpoint ends a doubt; else it has ended
	lvReplica   // P: a write or flush did not reach S's disks, or may not have (R24)
	lvEntry     // P: the arbiter's entry is of Term; OK: it names this host

	lvCovered // S: P confirmed the first commit (R18)
	lvAwake   // S: the SVM goes on, or QEMU knows that P is gone; nothing is being loaded
	lvQEMU    // S: answer to lxQEMU
)

type lifeEvent struct {
	Kind   lifeKind
	OK     bool
	Term   uint64 // of the arbiter
	Echoed int64  // boottime ns of the last echo that passed; 0: none yet
}

// lifeOp is the kind of an effect.
type lifeOp uint8

// Effects.
const (
	lxClaim lifeOp = iota + 1 // swap the record {Term, the pair's speaker} for {Term+1, this host}, until the outcome is known
	lxShut                    // shut the gates: nothing leaves, no echo is returned
	lxSolo                    // speak alone, for ever: what is held leaves first
	lxDead                    // tell the peer: this side's QEMU is dead, its gate shut
	lxOut                     // this host has no say any more: stop the guest, look at the arbiter again
	lxOff                     // the guest powered off: tell the peer, remember it, end QEMU

	lxSync    // P: make QEMU replicate
	lxPair    // P: HOLD, and a checkpoint to cover it
	lxUnpair  // P: replication is over
	lxCovered // P: tell S that it may take over

	lxYield // S: ask P to fall silent
	lxQuiet // S: R21 (i), and the checkpoint machine stands by
	lxQEMU  // S: R21 (iv)
)

type lifeEffect struct {
	Op   lifeOp
	Term uint64
}

// OrderTimeout bounds an order of an operator's that is carried out in steps.
const OrderTimeout = 30 * time.Second

// lifeConfig has durations in ns.
type lifeConfig struct {
	timeout int64 // silence of a peer that counts as dead
	speak   int64 // T of R20
	rejoin  int64 // for a daemon that ended on a living host to come back
	settle  int64 // S: for a checkpoint to show whether it was loaded
	doubt   int64 // P: that no checkpoint ends, before S is given up
	order   int64 // S: how long an operator's order to take over holds

	// Mutations, only tests set them: S takes over uncovered; P goes on unasked; S
	// does not wait for P's last echo to run out; an uncovered P asks nobody; a forced S
	// does not look whether P is bound by its lease; a newer entry is not looked at; a
	// sick P competes with its covered secondary; an S takes over from a guest that has
	// powered off.
	noR18, noClaim, noWait, noR26Uncovered, noR26Lease, noR26Entry, noR24, noR25 bool
}

// rejoin is how long a daemon that ended on a living host may take to come back.
func defaultLifeConfig(timeout, speak, rejoin time.Duration) lifeConfig {
	return lifeConfig{
		timeout: int64(timeout), speak: int64(speak),
		rejoin: int64(max(rejoin, timeout)), settle: int64(50 * time.Millisecond),
		doubt: int64(10 * time.Second), order: int64(OrderTimeout),
	}
}

// drifted is T(1+ρ): the two hosts' clocks may run 1 % apart.
func (c *lifeConfig) drifted() int64 { return c.speak + c.speak/100 }

// lifeSide is what both machines have: the record's term, and what a side knows of
// the other's life.
type lifeSide struct {
	cfg  lifeConfig
	out  []lifeEffect
	term uint64 // P: of the record that names this host. S: of the pair

	link   bool
	sick   bool  // this side's guest cannot go on
	lives  bool  // the link was ended by a living host
	heard  int64 // when the control link last said anything
	echoed int64
}

// take begins a step.
func (l *lifeSide) take(now int64, ev lifeEvent) {
	l.out = l.out[:0]
	l.echoed = max(l.echoed, ev.Echoed)
	switch ev.Kind {
	case lvLinkUp:
		l.link, l.lives, l.heard = true, false, now
	case lvHeard:
		l.heard = now
	case lvLinkDown:
		l.link, l.lives = false, ev.OK
	}
}

func (l *lifeSide) emit(op lifeOp) { l.out = append(l.out, lifeEffect{op, l.term}) }

// fallSilent: this guest is not to be heard again. The order counts: the peer believes
// lxDead.
func (l *lifeSide) fallSilent() {
	l.emit(lxShut)
	if l.link {
		l.emit(lxDead)
	}
}

// Term is the arbiter's: P: of the entry that names this host. S: of the pair.
func (l *lifeSide) Term() uint64 { return l.term }

// Sick reports whether this side's guest cannot go on.
func (l *lifeSide) Sick() bool { return l.sick }

// lpState is where P is.
type lpState uint8

const (
	lpStart lpState = iota // the guest has not run, or is not to be heard
	lpSolo
	lpSync
	lpPair
	lpClaim
	lpOut
	lpOff // the guest powered off
)

// lifePrimary is the machine of the host whose guest clients hear.
type lifePrimary struct {
	lifeSide
	state   lpState
	solo    bool  // what to go back to when synchronising fails
	covered bool  // S may take over
	paired  int64 // since when
	doubtBy int64 // when a doubt has lasted too long; 0: there is none
}

// newLifePrimary begins with the record of term, which names this host. state is
// lpStart, or what a daemon before this one left: lpSolo, or lpPair and whether S
// was told that it is covered (R23).
func newLifePrimary(cfg lifeConfig, term uint64, state lpState, covered bool, now int64) *lifePrimary {
	return &lifePrimary{
		lifeSide: lifeSide{cfg: cfg, term: term, heard: now},
		// Until there is a session nobody is asked for an echo.
		state: state, solo: state == lpSolo, covered: covered, paired: now + cfg.rejoin,
	}
}

// State is where P is.
func (l *lifePrimary) State() lpState { return l.state }

// Covered reports whether S may take over.
func (l *lifePrimary) Covered() bool { return l.covered }

// InDoubt reports whether nothing leaves until a checkpoint ends a doubt.
func (l *lifePrimary) InDoubt() bool { return l.doubtBy != 0 }

// WasSolo reports whether the guest transmitted alone before this replication began.
func (l *lifePrimary) WasSolo() bool { return l.solo }

// gone is when S counts as dead if nothing changes, and whether only its kernel's
// echoes can put that off.
func (l *lifePrimary) gone() int64 {
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
	return max(l.heard+l.cfg.timeout, min(echo, l.heard+l.cfg.rejoin))
}

// NextDeadline is when lvTick is due next, boottime ns; math.MaxInt64: never.
func (l *lifePrimary) NextDeadline() int64 {
	if l.state == lpPair {
		return l.gone()
	}
	return math.MaxInt64
}

// Step takes one event in. The effects are valid until the next Step.
func (l *lifePrimary) Step(now int64, ev lifeEvent) []lifeEffect {
	l.take(now, ev)
	switch ev.Kind {
	case lvLinkUp:
		l.paired = min(l.paired, now)
		switch {
		case l.state == lpPair && !ev.OK:
			l.alone() // another SVM than the one that followed
		case l.state != lpStart && l.state != lpSolo:
		case ev.OK:
			l.pair(now)
		default:
			l.state = lpSync
			l.emit(lxSync)
		}
	case lvSynced:
		switch {
		case l.state != lpSync:
		case ev.OK:
			l.pair(now)
		default:
			l.back()
		}
	case lvCommitted:
		if l.state == lpPair && !l.covered {
			// Noted before it is said: whatever S hears, P has counted with.
			l.covered = true
			l.emit(lxCovered)
		}
	case lvDoubt:
		if !ev.OK {
			l.doubtBy = 0
		} else if l.doubtBy == 0 {
			l.doubtBy = now + l.cfg.doubt
		}
	case lvCOLOExit:
		if l.state == lpPair && !l.yields() { // while QEMU begins to replicate, lvSynced tells
			l.alone()
		}
	case lvPeerDead, lvReplica:
		if l.state == lpPair {
			l.alone()
		}
	case lvSick:
		l.sick = true
	case lvHealthy:
		l.sick = false
	case lvEntry:
		// Somebody else has won since: an operator's doing, or a claim that this host
		// never heard of.
		if ev.Term > l.term && !ev.OK && l.state != lpClaim && !l.cfg.noR26Entry {
			l.quit()
		}
	case lvOff:
		l.off()
	case lvTakeOver:
		switch l.state {
		case lpPair:
			l.alone()
		case lpStart: // an S that was covered once may be about to ask, too
			l.claim()
		}
	case lvQEMUDead:
		l.quit()
	case lvYield:
		if l.state == lpPair {
			l.quit()
		}
	case lvClaimed:
		l.claimed(ev)
	}
	if l.state == lpPair && now >= l.gone() {
		l.alone()
	}
	if l.state == lpPair && l.yields() && l.link {
		l.quit() // S hears of it, and takes over
	}
	return l.out
}

// yields: the covered secondary is the better one (R24, R25). Until it can be told so,
// this host does not compete with it.
func (l *lifePrimary) yields() bool { return l.sick && l.covered && !l.cfg.noR24 }

func (l *lifePrimary) pair(now int64) {
	l.state, l.paired, l.covered = lpPair, now, false
	l.emit(lxPair)
}

// back: no pair came of it.
func (l *lifePrimary) back() {
	l.state = lpStart
	if l.solo {
		l.state = lpSolo
	}
}

// alone goes on without S, covered or not: an operator may have had S take over by
// force (R26).
func (l *lifePrimary) alone() {
	if l.cfg.noClaim || !l.covered && l.cfg.noR26Uncovered {
		l.speak()
		return
	}
	l.claim()
}

func (l *lifePrimary) claim() {
	l.state = lpClaim
	l.emit(lxClaim)
}

func (l *lifePrimary) speak() {
	l.state, l.solo, l.covered = lpSolo, true, false
	l.emit(lxUnpair)
	l.emit(lxSolo)
}

func (l *lifePrimary) claimed(ev lifeEvent) {
	if l.state != lpClaim {
		return
	}
	if !ev.OK {
		l.quit()
		return
	}
	l.term = ev.Term
	l.speak()
}

// quit: this host has no say any more.
func (l *lifePrimary) quit() {
	if l.state >= lpOut {
		return
	}
	l.state = lpOut
	l.fallSilent()
	l.emit(lxUnpair)
	l.emit(lxOut)
}

// off: nobody takes over from a guest that powered off (R25).
func (l *lifePrimary) off() {
	if l.state >= lpOut {
		return
	}
	l.state = lpOff
	l.emit(lxShut)
	l.emit(lxUnpair)
	l.emit(lxOff)
}

// lsState is where S is.
type lsState uint8

const (
	lsWait  lsState = iota // no pair yet
	lsPair                 // the SVM follows
	lsClaim                // QUIET, and the arbiter is asked
	lsEcho                 // won; P may still speak on the last echo
	lsLoad                 // a checkpoint that was under way shows whether it was loaded
	lsQEMU                 // QEMU is being told
	lsSolo
	lsOut
	lsOff // P's guest powered off
)

// lifeSecondary is the machine of the host whose guest follows.
type lifeSecondary struct {
	lifeSide
	state   lsState
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
func newLifeSecondary(cfg lifeConfig, term uint64, covered bool, now int64) *lifeSecondary {
	// Nothing says that P is dead: its daemon, too, may have been started again.
	l := &lifeSecondary{lifeSide: lifeSide{cfg: cfg, term: term, heard: now, lives: true}, covered: covered}
	if covered {
		l.state = lsPair
	}
	return l
}

// State is where S is.
func (l *lifeSecondary) State() lsState { return l.state }

// Covered reports whether S may take over.
func (l *lifeSecondary) Covered() bool { return l.covered }

// gone is when P counts as dead if nothing changes.
func (l *lifeSecondary) gone() int64 {
	if l.link || !l.covered && !l.cfg.noR18 {
		return math.MaxInt64
	}
	limit := l.cfg.timeout
	if l.lives && l.exited == 0 {
		limit = l.cfg.rejoin // its daemon is started again, its QEMU runs
	}
	return max(l.heard, l.echoed) + limit
}

// useless is when an SVM that follows nobody gives up, though P lives.
func (l *lifeSecondary) useless() int64 {
	if !l.link || l.exited == 0 {
		return math.MaxInt64
	}
	return l.exited + l.cfg.timeout
}

// silent is when P cannot speak any more (R21 iii).
func (l *lifeSecondary) silent() int64 {
	if l.shut || l.echoed == 0 || l.cfg.noWait {
		return 0
	}
	return l.echoed + l.cfg.drifted()
}

// NextDeadline is when lvTick is due next, boottime ns; math.MaxInt64: never.
func (l *lifeSecondary) NextDeadline() int64 {
	switch l.state {
	case lsPair:
		return min(l.gone(), l.useless())
	case lsEcho:
		return l.silent()
	case lsLoad:
		return l.loadBy
	}
	return math.MaxInt64
}

// Step takes one event in. The effects are valid until the next Step.
func (l *lifeSecondary) Step(now int64, ev lifeEvent) []lifeEffect {
	l.take(now, ev)
	switch ev.Kind {
	case lvLinkUp:
		if l.state > lsPair {
			break
		}
		if ev.Term != l.term {
			l.term, l.covered, l.paired = ev.Term, false, now
		}
		l.state = lsPair
	case lvCovered:
		if l.state == lsPair && l.link && ev.Term == l.term {
			l.covered = true
		}
	case lvPeerDead:
		if l.state == lsPair && (l.covered || now < l.ordered || l.cfg.noR18) {
			l.shut = true
			l.takeOver()
		}
	case lvOver:
		if l.state < lsEcho {
			l.quit()
		}
	case lvTakeOver:
		switch {
		case l.state != lsPair || !l.MayTakeOver(l.echoed, ev.OK):
		case l.link:
			// A primary that lives says when it is silent.
			l.ordered = now + l.cfg.order
			l.emit(lxYield)
		default:
			l.takeOver()
		}
	case lvSick:
		l.sick = true
	case lvHealthy:
		l.sick = false
	case lvOff:
		l.off()
	case lvCOLOExit:
		l.exited, l.awake = now, true
	case lvAwake:
		l.awake = true
	case lvQEMUDead:
		l.quit()
	case lvClaimed:
		switch {
		case l.state != lsClaim:
		case ev.OK:
			l.state, l.term = lsEcho, ev.Term
		default:
			l.quit()
		}
	case lvQEMU:
		switch {
		case l.state != lsQEMU:
		case ev.OK:
			l.state = lsSolo
			l.emit(lxSolo)
		default:
			l.quit()
		}
	}
	l.advance(now)
	return l.out
}

// advance does what time allows.
func (l *lifeSecondary) advance(now int64) {
	if l.state == lsPair && (now >= l.useless() || l.sick && l.link) {
		l.quit() // P hears of it, and goes on alone
	}
	if l.state == lsPair && now >= l.gone() {
		l.takeOver()
	}
	if l.state == lsEcho && now >= l.silent() {
		l.state, l.loadBy = lsLoad, now+l.cfg.settle
	}
	if l.state == lsLoad && (l.awake || now >= l.loadBy) {
		l.state = lsQEMU
		l.emit(lxQEMU)
	}
}

// MayTakeOver reports whether an order to take over can be followed: by force also by
// an SVM that no commit covers, but not from a P that no lease binds, as none does
// before it holds the PVM's output (R26). echoed is the boottime of the last echo, ns.
func (l *lifeSecondary) MayTakeOver(echoed int64, force bool) bool {
	return l.covered || force && (max(l.echoed, echoed) > l.paired || l.cfg.noR26Lease)
}

// takeOver is R21 (i) and (ii). awake is asked anew: lxQuiet's executor tells.
func (l *lifeSecondary) takeOver() {
	l.state, l.awake = lsClaim, l.exited != 0
	l.emit(lxQuiet)
	l.emit(lxClaim)
}

// quit: this guest follows nobody any more.
func (l *lifeSecondary) quit() {
	if l.state >= lsOut {
		return
	}
	l.state, l.covered = lsOut, false
	l.fallSilent()
	l.emit(lxOut)
}

// off: the pair stays off until somebody starts it.
func (l *lifeSecondary) off() {
	if l.state >= lsClaim || l.cfg.noR25 {
		return // the arbiter was asked: that decides
	}
	l.state, l.covered = lsOff, false
	l.emit(lxShut)
	l.emit(lxOff)
}
