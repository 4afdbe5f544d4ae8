// SPDX-License-Identifier: Apache-2.0

// Package failover decides which host may transmit, which is dead and which takes over
// (R18-R21, R24-R26). Its machines are pure, as the checkpoint machines are: events and
// times come in, effects go out in the order in which they have to be carried out. One
// sentence rules them: a host transmits alone only after it has won the arbiter, and an
// outcome that is not known is not won (R26).
//
//	P: start ⇄ sync → pair ── the secondary is gone ──▶ claim ── won ──▶ solo → sync → pair
//	   from any but start: lost, fenced, or the own QEMU dead ──▶ fenced
//	S: wait → pair ── P is gone, and it is covered ──▶ claim ── won ──▶ wait for T ──▶ QEMU ──▶ solo
//	   lost, or the own QEMU dead ──▶ fenced
//
// The arbiter's entry is {fencing term, host that may transmit}. A claim swaps exactly the
// entry that the pair began with, so a host that was left behind cannot win.
package failover

import "time"

// Kind is the kind of an event.
type Kind uint8

// Events of both sides, of P, of S.
const (
	EvTick         Kind = iota + 1
	EvLinkUp            // a session holds. P: OK when S's QEMU is in COLO mode with P's already. S: Term is the pair's
	EvLinkDown          // OK: the peer's kernel ended it, so its host lives; else it timed out
	EvReceived          // a message came on the control link
	EvPeerDead          // the peer's QEMU is dead, or P does without S's. OK: the peer has said so, and if it was P, that its gate is shut
	EvDismissed         // S: P goes on without this SVM
	EvQEMUDead          // this side's QEMU is dead. OK: it has not ended, and has not answered for so long that it counts as dead
	EvCOLOExit          // this side's QEMU lost the other's
	EvTakeOver          // an operator has the other count as dead; P: also that the guest is to begin alone. S: OK: by force, and the SVM is loaded
	EvClaimed           // answer to OpClaim, when it is known: OK when won; Term is the entry's
	EvGuestFailed       // this side's guest cannot go on: its disk failed (R24), or it panicked (R25)
	EvGuestHealthy      // it goes on
	EvPoweredOff        // the guest powered off: P's own, or P reports it (R25)

	EvSynced    // P: answer to OpSync
	EvYield     // P: S is to take over
	EvCommitted // P: a checkpoint was committed in HOLD
	EvDoubt     // P: OK: nothing leaves until a checkpoint ends a doubt; else it has ended
	EvReplica   // P: a write or flush did not reach S's disks, or may not have (R24)
	EvEntry     // P: the arbiter's entry is of Term; OK: it names this host

	EvCovered // S: P confirmed the first commit (R18)
	EvRuns    // S: the SVM goes on, or QEMU knows that P is gone; nothing is being loaded
	EvStands  // S: QEMU answers, cut off from P's, and the SVM stands still: a checkpoint may be being loaded
	EvQEMU    // S: answer to OpQEMU
)

// Event is what happened.
type Event struct {
	Kind   Kind
	OK     bool
	Term   uint64 // the arbiter's fencing term
	Echoed int64  // boottime ns of the last echo that passed; 0: none yet
}

// Op is the kind of an effect.
type Op uint8

// Effects.
const (
	OpClaim      Op = iota + 1 // swap the entry {Term, the pair's primary} for {Term+1, this host}, until the outcome is known
	OpShut                     // shut the gates: nothing leaves, no echo is returned
	OpSolo                     // transmit alone, without a lease: what is held leaves first
	OpTellDead                 // tell the peer: this side's QEMU is dead, its gate shut
	OpFenced                   // this host is fenced: stop the guest, ask the arbiter again
	OpPoweredOff               // the guest powered off: tell the peer, remember it, end QEMU

	OpSync        // P: make QEMU replicate
	OpPair        // P: HOLD, and a checkpoint to cover it
	OpUnpair      // P: replication is over
	OpTellCovered // P: tell S that it may take over

	OpYield // S: ask P to stop transmitting
	OpQuiet // S: R21 (i), and the checkpoint machine stands by
	OpQEMU  // S: R21 (iv)
)

// Effect is something to carry out.
type Effect struct {
	Op   Op
	Term uint64
}

// OrderTimeout bounds an order of an operator's that is carried out in steps.
const OrderTimeout = 30 * time.Second

// Config has durations in ns.
type Config struct {
	timeout int64 // a peer that sends nothing for so long counts as dead
	lease   int64 // T of R20
	Rejoin  int64 // for a daemon that ended on a living host to come back
	settle  int64 // S: for a checkpoint to show whether it was loaded, from when QEMU answers on
	answer  int64 // S: for QEMU to answer, before it is ordered to take over all the same
	Doubt   int64 // P: that no checkpoint ends, before S is given up
	order   int64 // S: how long an operator's order to take over holds

	// Mutations, only tests set them: S takes over uncovered; P goes on unasked; S
	// does not wait for P's last echo to run out; S takes a link that is silent for a P that
	// lives; S gives its claim up when P does without it; an uncovered P asks nobody; a forced S
	// does not look whether P is bound by its lease; a newer entry is not looked at; a
	// sick P competes with its covered secondary; an S takes over from a guest that has
	// powered off.
	noR18, noClaim, noWait, noLiving, noClaimCounts, noR26Uncovered, noR26Lease, NoR26Entry, noR24, noR25 bool
}

// DefaultConfig is for a peer that counts as dead after timeout, a lease of that duration,
// and a daemon that may take rejoin to come back after it ended on a living host.
func DefaultConfig(timeout, lease, rejoin time.Duration) Config {
	return Config{
		timeout: int64(timeout), lease: int64(lease),
		Rejoin: int64(max(rejoin, timeout)), settle: int64(50 * time.Millisecond), answer: int64(5 * time.Second),
		Doubt: int64(10 * time.Second), order: int64(OrderTimeout),
	}
}

// drifted is T(1+ρ): the two hosts' clocks may run 1 % apart.
func (c *Config) drifted() int64 { return c.lease + c.lease/100 }

// ordered is the reason of what an operator has asked for.
const ordered = "an operator ordered it"

// side is what both machines have: the arbiter's term, and what one host knows of the
// other.
type side struct {
	cfg  Config
	out  []Effect
	term uint64 // P: of the entry that names this host. S: of the pair

	link      bool
	sick      bool   // this side's guest cannot go on
	hostLives bool   // the link was ended by a living host
	why       string // see Why
	received  int64  // when the last message came on the control link
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

// mute ends this guest's output for good. The order counts: the peer relies on OpTellDead.
func (l *side) mute() {
	l.emit(OpShut)
	if l.link {
		l.emit(OpTellDead)
	}
}

// Term is the fencing term. P: of the entry that names this host. S: of the pair.
func (l *side) Term() uint64 { return l.term }

// Why is why this side last began to take over, went on alone, or was fenced: what follows "because".
func (l *side) Why() string { return l.why }

// Sick reports whether this side's guest cannot go on.
func (l *side) Sick() bool { return l.sick }
