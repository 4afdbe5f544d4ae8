// SPDX-License-Identifier: Apache-2.0

// Package checkpoint is the two hosts' checkpoint machines (R12-R17). They are pure:
// events and times come in, effects go out, in the order in which they have to be
// carried out. One sentence rules them: doubt never releases (R0). P freezes matching
// on any doubt, and only a checkpoint that it ordered itself and saw through ends it.
//
//	P: idle → prepare ── Ready(k) ──▶ ask ── STOP ──▶ stopped ── RESUME ──▶ verify ── all of R14 ──▶ commit, idle
//	S: run ── Prepare(k) ──▶ parking ── drained ──▶ parked ── STOP ──▶ stopped ── RESUME ──▶ run
//	   and from anywhere, on a STOP that nobody asked for: void, until the next Prepare
//
// Every attempt has a number of its own, which is the epoch that begins with it.
package checkpoint

import "time"

// Kind is the kind of an event.
type Kind uint8

// Events of both sides, of P, of S.
const (
	EvTick     Kind = iota + 1
	EvQMPUp         // OK: the guest runs
	EvQMPDown       // events of QEMU may have been missed
	EvStop          // QEMU's STOP: At, Skew
	EvResume        // QEMU's RESUME: At, Skew
	EvCOLO          // answer to OpCOLO: OK when the mode is this side's, else Cause
	EvLinkUp        // a session holds. P: OK when S's tables are whole. S: OK unless P is in doubt
	EvLinkDown      // the control link or its handshake failed
	EvPair          // P. OK: COLO runs, and the next commit covers S; else it is over, and nobody waits for one
	EvQuiet         // S: it is about to take over: this machine only follows whether a checkpoint is loaded

	EvHandshake   // P: a session is being made
	EvWant        // P: a checkpoint is needed: Cause, Diverged
	EvReleased    // P: with the last commit something left that had waited
	EvReady       // P: S has parked its input and its tap is empty
	EvPeerStopped // P: S's QEMU stopped for Epoch; 0: for nothing that was asked
	EvPeerResumed // P: S's QEMU goes on in Epoch, in COLO state
	EvPeerAbort   // P: S gave Epoch up
	EvAsked       // P: answer to OpAsk: OK, else Cause, and the PVM goes on if it was stopped for this
	EvInside      // P: the PVM sent something between STOP and RESUME of Epoch

	EvPrepare // S: P prepares Epoch
	EvAbort   // S: P gave Epoch up: Cause, Unasked
	EvDrained // S: answer to OpDrain: OK, else Cause
	EvOff     // S: the SVM powered off, which the PVM has not: only a checkpoint has it go on

	EvRecovered // S, before anything else: the offsets are an earlier daemon's (R23). OK: the kernel was in RUN
)

// CausePeriod is the cause of an attempt that only the period asked for.
const CausePeriod = "period"

// CausePeriodic is the cause of an attempt that ends an epoch of periodic mode.
const CausePeriodic = "periodic mode"

// Event is what happened.
type Event struct {
	Kind  Kind
	Epoch uint32
	OK    bool
	Cause string
	At    int64 // boottime ns
	Skew  int64 // wall clock minus boottime when At was computed from QEMU's wall clock time

	Diverged bool // it is needed because the guests differ

	Unasked bool // the SVM had stopped before P saw the PVM stop, and so before P asked QEMU
}

// Op is the kind of an effect.
type Op uint8

// Effects.
const (
	OpOpen    Op = iota + 1 // P: replication begins: HOLD, and a lease
	OpFreeze                // P: the cores release nothing from now on
	OpThaw                  // P: the cores match again
	OpPrepare               // P: send Prepare(Epoch); Cause is why
	OpAbort                 // send Abort(Epoch), Cause, Unasked
	OpAsk                   // P: stop the PVM and ask QEMU for a checkpoint
	OpEpoch                 // P: the kernel is in Epoch, and marks the PVM's STOP for S
	OpMark                  // P: mark the PVM's STOP for S again
	OpCOLO                  // ask QEMU for its COLO mode
	OpCommit                // P: Epoch is committed at At, inside [Stop, Resume]; ends the freeze
	OpFailed                // P: the attempt failed: Cause

	OpPark    // S: park input, drop output
	OpDrain   // S: wait for the tap to empty
	OpReady   // S: send Ready(Epoch)
	OpBegin   // S: the kernel is in Epoch
	OpReset   // S: the SVM is the PVM of Epoch's beginning: offsets and copies are void. Epoch 0: nobody knows when the PVM stopped
	OpStopped // S: send Stopped(Epoch)
	OpRun     // S: deliver again, what was parked first; digest records are sent
	OpResumed // S: send Resumed(Epoch) with the SVM's pause
)

// Effect is something to carry out.
type Effect struct {
	Op               Op
	Epoch            uint32
	At, Stop, Resume int64
	Began, Asked     int64 // OpCommit: when the attempt began, and when QEMU was asked
	Events           bool  // OpDrain: what QEMU has reported by now is to be taken in first
	Unsure           bool  // OpRun: the SVM may have become a copy of the PVM, and nothing has told so yet
	Unasked          bool  // OpAbort: as in Event
	Cause            string
}

// Config has durations in ns.
type Config struct {
	QMP            bool  // a QMP socket is configured: checkpoints are possible
	Period         int64 // the longest
	MinInterval    int64
	TargetPause    int64 // pause that the period is to lead to; 0: it is fixed
	Ready          int64 // PREPARE to READY
	Stop           int64 // OpAsk to P's STOP
	Resume         int64 // P's STOP to the commit
	MaxRetry       int64 // longest wait after failed attempts
	PeriodicAbove  int   // so many divergences a minute lead to periodic mode; 0: never
	PeriodicEnough int   // and so many at least
	PeriodicFirst  int64 // how long it lasts
	PeriodicMost   int64 // and at most, where it goes on when it has ended
	Epoch          int64 // between two commits of periodic mode
	Unpaired       bool  // EvPair reports when COLO runs; else it does from the beginning
	noR14, noR15   bool  // mutations: only tests set them
	noLate         bool  // another: a checkpoint that is loaded after it was given up is not noticed
	noDoubt        bool  // another: the offsets count at a takeover, though a checkpoint may have been loaded unseen
	noR28Share     bool  // another: in periodic mode the guest's pauses do not count
	FirstEpoch     uint32
	clockTolerance int64
}

// DefaultConfig has no QMP and no period.
func DefaultConfig() Config {
	return Config{
		Ready:          int64(500 * time.Millisecond),
		Stop:           int64(2 * time.Second),
		Resume:         int64(10 * time.Second),
		MaxRetry:       int64(5 * time.Second),
		PeriodicEnough: 5,
		PeriodicFirst:  int64(30 * time.Second),
		PeriodicMost:   int64(5 * time.Minute),
		FirstEpoch:     1,
		clockTolerance: int64(time.Millisecond),
	}
}
