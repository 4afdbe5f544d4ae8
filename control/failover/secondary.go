// SPDX-License-Identifier: Apache-2.0

package failover

import "math"

// SecondaryState is where S is.
type SecondaryState uint8

const (
	SecondaryWait  SecondaryState = iota // no pair yet
	SecondaryPair                        // the SVM follows
	SecondaryClaim                       // QUIET, and the arbiter is asked
	SecondaryLease                       // won; P may still transmit on its last lease
	SecondaryLoad                        // a checkpoint that was under way shows whether it was loaded
	SecondaryQEMU                        // QEMU is ordered to take over
	SecondarySolo
	SecondaryFenced
	SecondaryOff // P's guest powered off
)

// Secondary is the machine of the host whose guest follows.
type Secondary struct {
	side
	state   SecondaryState
	covered bool
	exited  int64 // when this side's QEMU lost P's; 0: it did not
	steady  int64 // since when P's messages have been read without a gap of a timeout
	shut    bool  // P reported that its gate is shut
	awake   bool
	stands  bool // QEMU has answered that it is not
	loadBy  int64
	paired  int64 // when P's term was learnt
	ordered int64 // until then an operator's order to take over holds
}

// NewSecondary begins anew, or with what a daemon before this one was told for
// term, if the SVM is still the one it was told of (R23).
func NewSecondary(cfg Config, term uint64, covered bool, now int64) *Secondary {
	// Nothing shows that P is dead: its daemon, too, may have been started again.
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
	if l.hostLives && l.exited == 0 { // its QEMU runs
		if l.sick {
			return math.MaxInt64 // this guest cannot go on: that one can, when its daemon is started again
		}
		limit = l.cfg.Rejoin
	}
	return max(l.received, l.echoed) + limit
}

// useless is when an SVM that follows nobody gives up, because P lives: P has sent something
// since it should have found out about its QEMU, too, which is within a timeout. A link that is whole but
// silent shows nothing: this SVM may be the only one left. Nor does what is read behind a gap: this daemon may
// have been stopped, and it was sent before. Without a gap it was sent at most a timeout before it is read.
func (l *Secondary) useless() int64 {
	due := max(l.exited, l.steady) + 2*l.cfg.timeout
	if !l.link || l.exited == 0 || l.received < due && !l.cfg.noLiving {
		return math.MaxInt64
	}
	return due
}

// leaseEnd is when P cannot transmit any more (R21 iii).
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
	if ev.Kind == EvLinkUp || ev.Kind == EvReceived && now-l.received >= l.cfg.timeout {
		l.steady = now
	}
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
			l.shut = l.shut || ev.OK
			switch {
			case now < l.ordered:
				l.takeOver(ordered)
			case ev.OK:
				l.takeOver("the primary's daemon reports that its guest cannot go on")
			default:
				l.takeOver("the primary's daemon came back, and does not go on with the pair")
			}
		}
	case EvDismissed:
		// Once the arbiter is asked, that decides: a P whose guest is gone cannot know that
		// this is the last one.
		if l.state < SecondaryClaim || l.cfg.noClaimCounts && l.state < SecondaryLease {
			l.fence("the primary goes on without this secondary")
		}
	case EvTakeOver:
		switch {
		case l.state != SecondaryPair || !l.MayTakeOver(l.echoed, ev.OK):
		case l.link:
			// A primary that lives reports when its gate is shut.
			l.ordered = now + l.cfg.order
			l.emit(OpYield)
		default:
			l.takeOver(ordered)
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
	case EvStands:
		l.stands = true
		if l.state == SecondaryLoad {
			l.loadBy = min(l.loadBy, now+l.cfg.settle)
		}
	case EvQEMUDead:
		// Once the arbiter is asked no other guest may be left: one whose QEMU hangs goes on if that does.
		if !ev.OK || l.state < SecondaryClaim {
			l.fence("its QEMU is dead")
		}
	case EvClaimed:
		switch {
		case l.state != SecondaryClaim:
		case ev.OK:
			l.state, l.term = SecondaryLease, ev.Term
		default:
			l.fence("the primary won the arbiter")
		}
	case EvQEMU:
		switch {
		case l.state != SecondaryQEMU:
		case ev.OK:
			l.state = SecondarySolo
			l.emit(OpSolo)
		default:
			l.fence("its QEMU could not take over")
		}
	}
	l.advance(now)
	return l.out
}

// advance does what time allows.
func (l *Secondary) advance(now int64) {
	if l.state == SecondaryPair && l.sick && l.link {
		l.fence("its guest cannot go on") // P is told, and goes on alone
	}
	if l.state == SecondaryPair && now >= l.useless() {
		l.fence("its QEMU has lost the primary's, which lives")
	}
	if l.state == SecondaryPair && now >= l.gone() {
		switch {
		case l.hostLives && l.exited == 0:
			l.takeOver("the primary's daemon has not come back within heartbeat.restart")
		case l.hostLives:
			l.takeOver("the primary's daemon and its QEMU have both closed their connections")
		default:
			l.takeOver("the primary's host has sent nothing for heartbeat.timeout")
		}
	}
	if l.state == SecondaryLease && now >= l.leaseEnd() {
		l.state, l.loadBy = SecondaryLoad, now+l.cfg.answer
		if l.stands {
			l.loadBy = now + l.cfg.settle
		}
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

// takeOver is R21 (i) and (ii). awake and stands are found out anew by whoever carries out OpQuiet.
func (l *Secondary) takeOver(why string) {
	l.why = why
	l.state, l.awake, l.stands = SecondaryClaim, l.exited != 0, false
	l.emit(OpQuiet)
	l.emit(OpClaim)
}

// fence: this guest follows nobody any more.
func (l *Secondary) fence(why string) {
	if l.state >= SecondaryFenced {
		return
	}
	l.state, l.covered, l.why = SecondaryFenced, false, why
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
