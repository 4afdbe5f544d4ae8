// SPDX-License-Identifier: Apache-2.0

package failover

import "math"

// PrimaryState is where P is.
type PrimaryState uint8

const (
	PrimaryStart PrimaryState = iota // the guest has not run, or must not transmit
	PrimarySolo
	PrimarySync
	PrimaryPair
	PrimaryClaim
	PrimaryFenced
	PrimaryOff // the guest powered off
)

// Primary is the machine of the host whose guest serves the clients.
type Primary struct {
	side
	state   PrimaryState
	solo    bool  // what to go back to when synchronising fails
	covered bool  // S may take over
	paired  int64 // since when
	doubtBy int64 // when a doubt has lasted too long; 0: there is none
}

// NewPrimary begins with the arbiter's entry of term, which names this host. state is
// PrimaryStart, or what a daemon before this one left: PrimarySolo, or PrimaryPair and whether S
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
			l.alone("the secondary's host came back with another guest than the one that followed")
		case l.state != PrimaryStart && l.state != PrimarySolo:
		case ev.OK:
			l.pair(now, l.covered)
		default:
			l.state, l.covered = PrimarySync, false
			l.emit(OpSync)
		}
	case EvSynced:
		switch {
		case l.state != PrimarySync:
		case ev.OK:
			l.pair(now, false)
		default:
			l.back()
		}
	case EvCommitted:
		if l.state == PrimaryPair && !l.covered {
			// Stored before S is told: P must never know less of it than S.
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
		if l.state == PrimaryPair && !l.yields() { // while QEMU begins to replicate, EvSynced reports it
			l.alone("QEMU has lost the secondary's")
		}
	case EvPeerDead:
		if l.state == PrimaryPair {
			l.alone("the secondary's guest has ended, or is of no use")
		}
	case EvReplica:
		if l.state == PrimaryPair {
			l.alone("the secondary's disks may lack a write")
		}
	case EvGuestFailed:
		l.sick = true
	case EvGuestHealthy:
		l.sick = false
	case EvEntry:
		// Somebody else has won since: an operator's doing, or a claim that this host
		// did not learn of.
		if ev.Term > l.term && !ev.OK && l.state != PrimaryClaim && !l.cfg.NoR26Entry {
			l.fence("the arbiter names the other node")
		}
	case EvPoweredOff:
		l.powerOff()
	case EvTakeOver:
		switch l.state {
		case PrimaryPair:
			l.alone(ordered)
		case PrimaryStart: // an S that was covered once may be about to ask, too
			l.why = ordered
			l.claim()
		}
	case EvQEMUDead:
		l.fence("its QEMU is dead")
	case EvYield:
		if l.state == PrimaryPair {
			l.fence("an operator has the secondary take over")
		}
	case EvClaimed:
		l.claimed(ev)
	}
	if l.state == PrimaryPair && now >= l.gone() {
		l.alone(l.missed(now))
	}
	if l.state == PrimaryPair && l.yields() && l.link {
		l.fence("its guest cannot go on, and the secondary's can") // S is told, and takes over
	}
	return l.out
}

// missed is what made S count as dead by now.
func (l *Primary) missed(now int64) string {
	switch {
	case l.doubtBy != 0 && now >= l.doubtBy:
		return "nothing could leave, and no checkpoint with the secondary ended that"
	case l.link:
		return "the secondary's kernel has not answered for heartbeat.timeout"
	case now >= l.received+l.cfg.Rejoin:
		return "the secondary's daemon has not come back within heartbeat.restart"
	}
	return "the secondary's host has sent nothing for heartbeat.timeout"
}

// yields: the covered secondary is the better one (R24, R25). Until it can be told so,
// this host does not compete with it.
func (l *Primary) yields() bool { return l.sick && l.covered && !l.cfg.noR24 }

func (l *Primary) pair(now int64, covered bool) {
	l.state, l.paired, l.covered = PrimaryPair, now, covered
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
func (l *Primary) alone(why string) {
	l.why = why
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
		l.fence("the other node won the arbiter")
		return
	}
	l.term = ev.Term
	l.goSolo()
}

// fence: this host may not transmit any more.
func (l *Primary) fence(why string) {
	if l.state >= PrimaryFenced {
		return
	}
	l.state, l.why = PrimaryFenced, why
	l.mute()
	l.emit(OpUnpair)
	l.emit(OpFenced)
}

// off: nobody takes over from a guest that powered off (R25).
func (l *Primary) powerOff() {
	if l.state >= PrimaryFenced {
		return
	}
	l.state, l.covered = PrimaryOff, false
	l.emit(OpShut)
	l.emit(OpUnpair)
	l.emit(OpPoweredOff)
}
