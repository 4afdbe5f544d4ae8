// SPDX-License-Identifier: Apache-2.0

package checkpoint

import (
	"fmt"
	"math"
	"time"
)

// The checkpoint machines (R12-R17). They are pure: events and times come in,
// effects go out, in the order in which they have to be carried out. One
// sentence rules them: doubt never releases (R0). P freezes matching on any doubt
// and only a checkpoint that it ordered itself, and saw through, ends it.
//
//	P: idle → prepare ── Ready(k) ──▶ ask ── STOP ──▶ stopped ── RESUME ──▶ verify ── all of R14 ──▶ commit, idle
//	S: run ── Prepare(k) ──▶ parking ── drained ──▶ parked ── STOP ──▶ stopped ── RESUME ──▶ run
//	   and from anywhere, on a STOP that nobody asked for: void, until the next Prepare
//
// Every attempt has a number of its own, which is the epoch that begins with it.

// ckptKind is the kind of an event.
type Kind uint8

// Events of both sides, of P, of S.
const (
	EvTick     Kind = iota + 1
	EvQMPUp         // OK: the guest runs
	EvQMPDown       // events of QEMU may have been missed
	EvStop          // QEMU's STOP: At, Skew
	EvResume        // QEMU's RESUME: At, Skew
	EvCOLO          // answer to fxCOLO: OK when the mode is this side's, else Cause
	EvLinkUp        // a session holds. P: OK when S's tables are whole. S: OK unless P is in doubt
	EvLinkDown      // the control link or its handshake failed
	EvPair          // P. OK: COLO runs, and the next commit covers S; else it is over, and nobody waits for one
	EvQuiet         // S: it is about to take over: of this machine only the offsets' age is asked

	EvHandshake   // P: a session is being made
	EvWant        // P: a checkpoint is needed
	EvReady       // P: S has parked its input and its tap is empty
	EvPeerStopped // P: S's QEMU stopped for Epoch; 0: for nothing that was asked
	EvPeerResumed // P: S's QEMU goes on in Epoch, in COLO state
	EvPeerAbort   // P: S gave Epoch up
	EvAsked       // P: answer to fxAsk: OK, else Cause
	EvInside      // P: the PVM said something between STOP and RESUME of Epoch

	EvPrepare // S: P prepares Epoch
	EvAbort   // S: P gave Epoch up
	EvDrained // S: answer to fxDrain: OK, else Cause

	EvRecovered // S, before anything else: the offsets are an earlier daemon's (R23). OK: the kernel was in RUN
)

// causePeriod is the cause of an attempt that only the period asked for.
const CausePeriod = "period"

type Event struct {
	Kind  Kind
	Epoch uint32
	OK    bool
	Cause string
	At    int64 // boottime ns
	Skew  int64 // wall clock minus boottime when At was computed from QEMU's wall clock time
}

// ckptOp is the kind of an effect.
type Op uint8

// Effects.
const (
	OpOpen    Op = iota + 1 // P: replication begins: HOLD, speak
	OpFreeze                // P: the cores release nothing from now on
	OpThaw                  // P: the cores match again
	OpPrepare               // P: send Prepare(Epoch); Cause is why
	OpAbort                 // send Abort(Epoch), Cause
	OpAsk                   // P: ask QEMU for a checkpoint
	OpEpoch                 // P: the kernel is in Epoch
	OpCOLO                  // ask QEMU for its COLO mode
	OpCommit                // P: Epoch is committed at At, inside [Stop, Resume]; ends the freeze
	OpFailed                // P: the attempt failed: Cause

	OpPark    // S: park input, drop output
	OpDrain   // S: wait for the tap to empty
	OpReady   // S: send Ready(Epoch)
	OpBegin   // S: the kernel is in Epoch
	OpReset   // S: the SVM is the PVM of Epoch's beginning: offsets and copies are void
	OpStopped // S: send Stopped(Epoch)
	OpRun     // S: deliver again, what was parked first; records go out
	OpResumed // S: send Resumed(Epoch) with the SVM's pause
)

type Effect struct {
	Op               Op
	Epoch            uint32
	At, Stop, Resume int64
	Cause            string
}

// ckptConfig has durations in ns.
type Config struct {
	QMP            bool  // a QMP socket is configured: checkpoints are possible
	Period         int64 // the longest
	MinInterval    int64
	TargetPause    int64 // pause that the period is to lead to; 0: it is fixed
	Ready          int64 // PREPARE to READY
	Stop           int64 // request to P's STOP
	Resume         int64 // P's STOP to the commit
	MaxRetry       int64 // longest wait after failed attempts
	Unpaired       bool  // evPair tells when COLO runs; else it does from the beginning
	noR14, noR15   bool  // mutations: only tests set them
	FirstEpoch     uint32
	clockTolerance int64
}

func DefaultConfig() Config {
	return Config{
		Ready:          int64(500 * time.Millisecond),
		Stop:           int64(2 * time.Second),
		Resume:         int64(10 * time.Second),
		MaxRetry:       int64(5 * time.Second),
		FirstEpoch:     1,
		clockTolerance: int64(time.Millisecond),
	}
}

// pStage is where P's attempt is.
type pStage uint8

const (
	pIdle    pStage = iota
	pPrepare        // waiting for READY
	pAsk            // waiting for P's STOP
	pStopped        // waiting for P's RESUME
	pVerify         // waiting for the rest of R14
)

// ckptPrimary is P's machine.
type Primary struct {
	cfg Config
	now int64
	out []Effect

	link, handshake bool
	paired          bool // COLO runs between the two QEMUs, or none is configured
	qmp             bool
	pvmStopped      bool
	unasked         bool // it was not for a checkpoint
	started         bool
	frozen          bool
	doubt           string // why only a commit may release; "": no doubt

	wanted    bool
	why       string // the first reason
	notBefore int64
	failures  int
	lastDone  int64
	period    int64

	stage     pStage
	cause     string // of the attempt
	last      uint32 // number of the last attempt
	committed uint32 // epoch that holds
	deadline  int64
	asked     int64 // when QEMU was asked
	pvmStop   int64
	stopSkew  int64
	pvmResume int64
	skewed    bool // the wall clock was set meanwhile
	sStopped  bool
	sResumed  bool
	inCOLO    bool
}

func NewPrimary(cfg Config) *Primary {
	return &Primary{cfg: cfg, period: cfg.Period, last: cfg.FirstEpoch, committed: cfg.FirstEpoch, paired: !cfg.Unpaired}
}

// State is the pair's state as status names it, and what to add to it.
func (c *Primary) State() (word, detail string) {
	switch {
	case !c.started:
		return "start", c.doubt
	case c.stage != pIdle || c.frozen:
		return "checkpointing", c.doubt
	}
	return "replicating", ""
}

// NextDeadline is when evTick is due next, boottime ns; MaxInt64: never.
func (c *Primary) NextDeadline() int64 {
	if c.stage != pIdle {
		return c.deadline
	}
	switch {
	case !c.able():
	case c.wanted:
		return c.notBefore
	case c.period > 0:
		return max(c.notBefore, c.lastDone+c.period)
	}
	return math.MaxInt64
}

// Step takes one event in. The effects are valid until the next Step.
func (c *Primary) Step(now int64, ev Event) []Effect {
	c.now, c.out = now, c.out[:0]
	c.event(ev)
	c.advance()
	return c.out
}

func (c *Primary) emit(fx Effect) { c.out = append(c.out, fx) }

func (c *Primary) event(ev Event) {
	current := c.stage != pIdle && ev.Epoch == c.last
	switch ev.Kind {
	case EvWant:
		// Before QEMU is asked, the attempt under way serves.
		if c.cfg.QMP && c.paired && c.stage != pPrepare {
			c.want(ev.Cause)
		}
	case EvInside:
		// R14: the epoch is suspect.
		if !c.cfg.noR14 {
			c.want("the PVM spoke while it was stopped")
		}

	case EvHandshake:
		c.unlinked()
		c.handshake = true
	case EvLinkUp:
		c.link, c.handshake = true, false
		if !ev.OK {
			c.suspect("the secondary's tables are not whole")
		}
		c.resolve()
	case EvLinkDown:
		c.unlinked()

	case EvPair:
		if !ev.OK {
			*c = Primary{
				cfg: c.cfg, period: c.cfg.Period, out: c.out, now: c.now, last: c.last, committed: c.committed,
				link: c.link, handshake: c.handshake, qmp: c.qmp, pvmStopped: c.pvmStopped, unasked: c.unasked,
			}
			break
		}
		// R18: until a commit, the SVM is a copy of a PVM that went on speaking.
		c.paired = true
		c.suspect("nothing covers the secondary yet")
		c.resolve()

	case EvQMPUp:
		c.qmp, c.pvmStopped = true, !ev.OK
		c.resolve()
	case EvQMPDown:
		c.qmp = false
		if c.started {
			// A STOP may pass unseen from now on (R15).
			c.suspect("no QMP connection")
		}
		if c.stage != pIdle {
			c.fail("no QMP connection")
		}

	case EvReady:
		if current && c.stage == pPrepare {
			c.stage, c.asked, c.deadline = pAsk, c.now, c.now+c.cfg.Stop
			c.emit(Effect{Op: OpAsk, Epoch: c.last})
		}
	case EvAsked:
		if current && c.stage == pAsk && !ev.OK {
			c.fail(ev.Cause)
		}
	case EvPeerStopped:
		switch {
		case current:
			c.sStopped = true
		case ev.Epoch == 0:
			c.suspect("the SVM stopped unasked")
			c.resolve()
			if c.stage != pIdle {
				c.fail("the SVM stopped unasked")
			}
		case ev.Epoch > c.committed:
			c.suspect("the SVM stopped for an attempt given up")
			c.resolve()
		}
	case EvPeerResumed:
		if current {
			c.sResumed = true
		}
	case EvPeerAbort:
		if current {
			c.fail("secondary: " + ev.Cause)
		}
	case EvStop:
		c.stopped(ev)
	case EvResume:
		c.resumed(ev)
	case EvCOLO:
		if current && c.stage == pVerify {
			c.inCOLO = ev.OK
			if !ev.OK {
				c.fail(ev.Cause)
			}
		}
	}
}

func (c *Primary) stopped(ev Event) {
	c.pvmStopped = true
	if c.stage == pAsk {
		c.stage, c.deadline = pStopped, c.now+c.cfg.Resume
		c.pvmStop, c.stopSkew = ev.At, ev.Skew
		c.emit(Effect{Op: OpEpoch, Epoch: c.last})
		return
	}
	// R15: nobody asked for this one. It may be an operator's, or a checkpoint
	// of which S's state came; nothing that is held may leave on its account.
	c.unasked = true
	if c.cfg.noR15 {
		return
	}
	c.suspect("the PVM stopped unasked")
	if c.stage != pIdle {
		c.fail("the PVM stopped unasked")
	}
}

func (c *Primary) resumed(ev Event) {
	c.pvmStopped, c.unasked = false, false
	if c.stage == pStopped {
		c.stage, c.pvmResume = pVerify, ev.At
		c.skewed = abs(ev.Skew-c.stopSkew) > c.cfg.clockTolerance
		c.emit(Effect{Op: OpCOLO, Epoch: c.last})
		return
	}
	if c.cfg.noR15 {
		return
	}
	c.suspect("the PVM went on unasked")
	c.resolve()
	if c.stage != pIdle {
		c.fail("the PVM went on unasked")
	}
}

func (c *Primary) unlinked() {
	c.link, c.handshake = false, false
	if c.stage >= pAsk {
		// S may have stopped and could not say so.
		c.suspect("control link lost during a checkpoint")
	}
	if c.stage != pIdle {
		c.fail("control link lost")
	}
}

// want asks for an attempt as soon as one can begin.
func (c *Primary) want(why string) {
	if !c.wanted {
		c.wanted, c.why = true, why
	}
}

// resolve asks for the attempt that ends a doubt, if there is one.
func (c *Primary) resolve() {
	if c.doubt != "" {
		c.want(c.doubt)
	}
}

// suspect freezes until the next commit. Without QMP no commit will ever come:
// then there are no STOPs to be seen either, and compare alone decides.
func (c *Primary) suspect(why string) {
	if c.cfg.QMP && c.paired && c.doubt == "" {
		c.doubt = why
	}
}

func (c *Primary) fail(cause string) {
	if c.sStopped || c.stage >= pStopped {
		c.suspect(cause)
	}
	c.emit(Effect{Op: OpFailed, Epoch: c.last, Cause: cause})
	if c.link {
		c.emit(Effect{Op: OpAbort, Epoch: c.last, Cause: cause})
	}
	c.stage = pIdle
	c.want(c.cause)
	retry := max(c.cfg.MinInterval, int64(10*time.Millisecond)) << min(c.failures, 10)
	c.failures++
	c.notBefore = c.now + max(min(retry, c.cfg.MaxRetry), c.cfg.MinInterval)
}

// Stuck reports whether nothing leaves, and not because somebody has the PVM wait or
// keeps its QEMU's monitor: then QEMU cannot be told to go on alone either.
func (c *Primary) Stuck() bool { return c.doubt != "" && !c.unasked && c.qmp }

// InDoubt reports whether only a commit may release what is held.
func (c *Primary) InDoubt() bool { return c.doubt != "" }

// Serves is the first attempt whose commit covers all that the guest has done until
// now.
func (c *Primary) Serves() uint32 {
	if c.stage == pPrepare {
		return c.last // QEMU has not been asked yet
	}
	return c.last + 1
}

// able reports whether an attempt could begin.
func (c *Primary) able() bool {
	return c.started && c.link && !c.handshake && c.qmp && !c.pvmStopped
}

// advance does what time and the event just taken allow.
func (c *Primary) advance() {
	if c.stage != pIdle && c.now >= c.deadline {
		c.fail(fmt.Sprintf("no %s in time", map[pStage]string{
			pPrepare: "READY of the secondary", pAsk: "STOP of the PVM", pStopped: "RESUME of the PVM", pVerify: "RESUME of the SVM",
		}[c.stage]))
	}
	if c.stage == pVerify && c.inCOLO && (c.sStopped && c.sResumed || c.cfg.noR14) {
		c.commit()
	}
	if !c.started && c.paired && c.link && !c.handshake && (c.qmp || !c.cfg.QMP) {
		c.started, c.lastDone = true, c.now
		if c.doubt != "" {
			c.settle() // it holds from the first frame on
		}
		c.emit(Effect{Op: OpOpen})
	}
	if c.stage == pIdle && c.able() {
		if c.period > 0 && c.now >= c.lastDone+c.period {
			c.want(CausePeriod)
		}
		if c.wanted && c.now >= c.notBefore {
			c.begin()
		}
	}
	c.settle()
}

func (c *Primary) begin() {
	c.last++
	c.stage, c.deadline = pPrepare, c.now+c.cfg.Ready
	c.cause, c.wanted, c.why = c.why, false, ""
	c.notBefore = c.now + c.cfg.MinInterval
	c.pvmStop, c.pvmResume, c.skewed = 0, 0, false
	c.sStopped, c.sResumed, c.inCOLO = false, false, false
	c.settle() // first nothing is released any more, then S is told (R13)
	c.emit(Effect{Op: OpPrepare, Epoch: c.last, Cause: c.cause})
}

// settle makes the cores' freeze what it has to be.
func (c *Primary) settle() {
	frozen := c.paired && (!c.started || c.handshake || c.stage != pIdle || c.doubt != "")
	if frozen == c.frozen {
		return
	}
	c.frozen = frozen
	if frozen {
		c.emit(Effect{Op: OpFreeze})
	} else {
		c.emit(Effect{Op: OpThaw})
	}
}

// commit lets leave what the checkpoint covers (R14).
func (c *Primary) commit() {
	// Anything the PVM said before its STOP is in the checkpoint, so an earlier
	// commit point is always right, only less is released. When QEMU's times
	// cannot be (the wall clock was set), the time of the request serves.
	stop, resume := c.pvmStop, c.pvmResume
	tol := c.cfg.clockTolerance
	at := stop + (resume-stop)/2
	if c.skewed || stop < c.asked-tol || resume < stop || resume > c.now+tol {
		at, stop, resume = c.asked, c.asked, c.now
		c.want("the clock was set during a checkpoint")
	}
	c.emit(Effect{Op: OpCommit, Epoch: c.last, At: at, Stop: stop, Resume: resume})
	c.adapt(resume - stop)
	c.committed, c.stage, c.doubt, c.failures = c.last, pIdle, "", 0
	c.frozen = false
	c.lastDone = c.now
}

// maxShare: the period that adapt chooses is at least so many times the pause. One that
// does not come of what the guest wrote is not made shorter by more checkpoints.
const maxShare = 10

// adapt has the period follow the pause that just was. What the guest writes between
// two checkpoints is what a pause is for: half the time, half the pause.
func (c *Primary) adapt(pause int64) {
	if c.cfg.TargetPause == 0 || c.period == 0 || pause <= 0 {
		return
	}
	since := float64(c.now - c.lastDone) // the checkpoint may have come before the period's end
	wanted := since * float64(c.cfg.TargetPause) / float64(pause)
	next := int64(min((float64(c.period)+wanted)/2, float64(c.cfg.Period))) // half way: one pause says little
	c.period = min(max(next, c.cfg.MinInterval, maxShare*pause), c.cfg.Period)
}

// sStage is where S is.
type sStage uint8

const (
	sOff     sStage = iota // no session yet
	sRun                   // the SVM runs with the offsets known
	sParking               // parked, the tap is not empty yet
	sParked                // READY was sent
	sStopped               // the SVM's QEMU stopped for the checkpoint
	sVoid                  // parked until a checkpoint tells what the SVM is
)

// ckptSecondary is S's machine.
type Secondary struct {
	cfg Config
	out []Effect

	stage      sStage
	epoch      uint32 // of the attempt
	next       uint32 // prepared while the SVM was stopped; 0: none
	link, qmp  bool
	recovered  bool // the offsets are older than this daemon
	park       bool // P was in doubt when the session began
	void       bool // offsets are not to be trusted
	quiet      bool // taking over
	svmStopped bool
	svmStop    int64
	svmResume  int64
}

func NewSecondary(cfg Config) *Secondary { return &Secondary{cfg: cfg} }

// missed: before the first session the SVM stopped, or may have. Only offsets that
// are there can be wrong. Without QMP there are no STOPs, and no way back.
func (c *Secondary) missed() {
	c.void = c.void || c.recovered && c.cfg.QMP
}

// State is the secondary's, as status names it.
func (c *Secondary) State() (word, detail string) {
	switch c.stage {
	case sOff:
		return "start", ""
	case sRun:
		return "replicating", ""
	case sVoid:
		return "checkpointing", "parked until a checkpoint"
	}
	return "checkpointing", ""
}

// NextDeadline: S waits for P or for the link to fail, never for a time.
func (c *Secondary) NextDeadline() int64 { return math.MaxInt64 }

func (c *Secondary) emit(op Op, epoch uint32) {
	c.out = append(c.out, Effect{Op: op, Epoch: epoch})
}

// Step takes one event in. The effects are valid until the next Step.
func (c *Secondary) Step(_ int64, ev Event) []Effect {
	c.out = c.out[:0]
	if c.quiet {
		c.hush(ev)
		return c.out
	}
	switch ev.Kind {
	case EvRecovered:
		c.recovered = true
		if !ev.OK { // the daemon died in mid checkpoint, or before it knew
			c.missed()
		}
	case EvQuiet:
		c.quiet = true
	case EvLinkUp:
		c.link, c.park, c.next = true, !ev.OK, 0
		if c.stage != sOff {
			c.begin()
		}
	case EvLinkDown:
		c.link, c.next = false, 0
		if c.stage == sParking || c.stage == sParked {
			c.unpark()
		}
	case EvQMPUp:
		c.qmp, c.svmStopped = true, !ev.OK
		if c.stage == sOff && !ev.OK {
			c.missed()
		}
	case EvQMPDown:
		c.qmp = false
		if c.stage == sOff {
			c.missed()
		} else {
			c.doubt()
		}

	case EvPrepare:
		c.next = ev.Epoch
	case EvAbort:
		if c.next == ev.Epoch {
			c.next = 0
		}
		if c.epoch == ev.Epoch && (c.stage == sParking || c.stage == sParked) {
			c.unpark()
		}
	case EvDrained:
		if c.stage != sParking || c.epoch != ev.Epoch {
			break
		}
		if !ev.OK {
			c.abort(ev.Cause)
			c.unpark()
			break
		}
		c.stage = sParked
		c.emit(OpReady, c.epoch)

	case EvStop:
		c.svmStopped = true
		switch c.stage {
		case sOff:
			c.missed()
		case sParked:
			// The epoch is right before P's mark of it comes. The offsets stay: P
			// may die now, and the SVM goes on as it was.
			c.stage, c.svmStop, c.void = sStopped, ev.At, false
			c.emit(OpBegin, c.epoch)
			c.emit(OpStopped, c.epoch)
		default:
			c.doubt()
		}
	case EvResume:
		c.svmStopped = false
		switch c.stage {
		case sStopped:
			// The order counts: the offsets are right before output opens.
			c.stage, c.svmResume = sRun, ev.At
			c.emit(OpReset, c.epoch)
			c.emit(OpRun, c.epoch)
			c.emit(OpCOLO, c.epoch)
		case sRun, sParking, sParked:
			c.doubt() // a STOP was missed
		}
	case EvCOLO:
		if c.stage == sRun && c.epoch == ev.Epoch {
			if ev.OK {
				c.out = append(c.out, Effect{Op: OpResumed, Epoch: c.epoch, Stop: c.svmStop, Resume: c.svmResume})
			} else {
				c.abort(ev.Cause)
			}
		}
	}

	if c.stage == sOff && c.link && (c.qmp || !c.cfg.QMP) {
		c.begin()
	}
	if c.next != 0 {
		c.prepare()
	}
	return c.out
}

// hush follows QEMU alone: a checkpoint that was under way when P died is loaded if
// the SVM goes on before anybody told it that P is gone.
func (c *Secondary) hush(ev Event) {
	switch ev.Kind {
	case EvStop:
		c.svmStopped = true
		if c.stage == sParked {
			c.stage = sStopped // P had asked for it before it died
		}
	case EvResume:
		c.svmStopped = false
		if c.stage == sStopped {
			c.stage = sRun
			c.emit(OpReset, c.epoch)
		}
	}
}

// Whole reports whether the offsets are those of the SVM as it is. In mid
// checkpoint they are so only for the P that ordered it.
func (c *Secondary) Whole() bool { return !c.void && c.stage != sStopped }

// begin follows a new session.
func (c *Secondary) begin() {
	if c.park || !c.Whole() {
		c.stage, c.void = sVoid, true
		c.emit(OpPark, 0)
		if !c.park {
			c.emit(OpStopped, 0) // P may not know yet
		}
		return
	}
	c.stage = sRun
	c.emit(OpRun, 0)
}

// prepare begins the attempt c.next when the SVM runs.
func (c *Secondary) prepare() {
	switch {
	case c.stage == sOff || !c.qmp:
		c.epoch, c.next = c.next, 0
		c.abort("no QMP connection")
	case c.svmStopped:
		// Its tap cannot drain. The attempt waits for RESUME, P for no longer
		// than it likes.
	default:
		// An attempt before this one is over; what was parked stays parked.
		c.epoch, c.next, c.stage = c.next, 0, sParking
		c.emit(OpPark, c.epoch)
		c.emit(OpDrain, c.epoch)
	}
}

// doubt follows a STOP or RESUME that nobody asked for or nobody may have seen:
// what the SVM says from here on may not be what the offsets are for.
func (c *Secondary) doubt() {
	c.stage, c.void = sVoid, true
	c.emit(OpPark, 0)
	if c.link {
		c.emit(OpStopped, 0)
	}
}

// unpark goes back to where the attempt began: nothing happened.
func (c *Secondary) unpark() {
	if c.void {
		c.stage = sVoid
		return
	}
	c.stage = sRun
	c.emit(OpRun, 0)
}

func (c *Secondary) abort(cause string) {
	if c.link {
		c.out = append(c.out, Effect{Op: OpAbort, Epoch: c.epoch, Cause: cause})
	}
}

func abs(x int64) int64 { return max(x, -x) }
