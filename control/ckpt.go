// SPDX-License-Identifier: Apache-2.0

package control

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
type ckptKind uint8

// Events of both sides, of P, of S.
const (
	evTick     ckptKind = iota + 1
	evQMPUp             // OK: the guest runs
	evQMPDown           // events of QEMU may have been missed
	evStop              // QEMU's STOP: At, Skew
	evResume            // QEMU's RESUME: At, Skew
	evCOLO              // answer to fxCOLO: OK when the mode is this side's, else Cause
	evLinkUp            // a session holds. P: OK when S's tables are whole. S: OK unless P is in doubt
	evLinkDown          // the control link or its handshake failed
	evPair              // P. OK: COLO runs, and the next commit covers S; else it is over, and nobody waits for one
	evQuiet             // S: it is about to take over: of this machine only the offsets' age is asked

	evHandshake   // P: a session is being made
	evWant        // P: a checkpoint is needed
	evReady       // P: S has parked its input and its tap is empty
	evPeerStopped // P: S's QEMU stopped for Epoch; 0: for nothing that was asked
	evPeerResumed // P: S's QEMU goes on in Epoch, in COLO state
	evPeerAbort   // P: S gave Epoch up
	evAsked       // P: answer to fxAsk: OK, else Cause
	evInside      // P: the PVM said something between STOP and RESUME of Epoch

	evPrepare // S: P prepares Epoch
	evAbort   // S: P gave Epoch up
	evDrained // S: answer to fxDrain: OK, else Cause

	evRecovered // S, before anything else: the offsets are an earlier daemon's (R23). OK: the kernel was in RUN
)

// causePeriod is the cause of an attempt that only the period asked for.
const causePeriod = "period"

type ckptEvent struct {
	Kind  ckptKind
	Epoch uint32
	OK    bool
	Cause string
	At    int64 // boottime ns
	Skew  int64 // wall clock minus boottime when At was computed from QEMU's wall clock time
}

// ckptOp is the kind of an effect.
type ckptOp uint8

// Effects.
const (
	fxOpen    ckptOp = iota + 1 // P: replication begins: HOLD, speak
	fxFreeze                    // P: the cores release nothing from now on
	fxThaw                      // P: the cores match again
	fxPrepare                   // P: send Prepare(Epoch); Cause is why
	fxAbort                     // send Abort(Epoch), Cause
	fxAsk                       // P: ask QEMU for a checkpoint
	fxEpoch                     // P: the kernel is in Epoch
	fxCOLO                      // ask QEMU for its COLO mode
	fxCommit                    // P: Epoch is committed at At, inside [Stop, Resume]; ends the freeze
	fxFailed                    // P: the attempt failed: Cause

	fxPark    // S: park input, drop output
	fxDrain   // S: wait for the tap to empty
	fxReady   // S: send Ready(Epoch)
	fxBegin   // S: the kernel is in Epoch
	fxReset   // S: the SVM is the PVM of Epoch's beginning: offsets and copies are void
	fxStopped // S: send Stopped(Epoch)
	fxRun     // S: deliver again, what was parked first; records go out
	fxResumed // S: send Resumed(Epoch) with the SVM's pause
)

type ckptEffect struct {
	Op               ckptOp
	Epoch            uint32
	At, Stop, Resume int64
	Cause            string
}

// ckptConfig has durations in ns.
type ckptConfig struct {
	qmp            bool  // a QMP socket is configured: checkpoints are possible
	period         int64 // the longest
	minInterval    int64
	target         int64 // pause that the period is to lead to; 0: it is fixed
	ready          int64 // PREPARE to READY
	stop           int64 // request to P's STOP
	resume         int64 // P's STOP to the commit
	maxRetry       int64 // longest wait after failed attempts
	unpaired       bool  // evPair tells when COLO runs; else it does from the beginning
	noR14, noR15   bool  // mutations: only tests set them
	firstEpoch     uint32
	clockTolerance int64
}

func defaultCkptConfig() ckptConfig {
	return ckptConfig{
		ready:          int64(500 * time.Millisecond),
		stop:           int64(2 * time.Second),
		resume:         int64(10 * time.Second),
		maxRetry:       int64(5 * time.Second),
		firstEpoch:     1,
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
type ckptPrimary struct {
	cfg ckptConfig
	now int64
	out []ckptEffect

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

func newCkptPrimary(cfg ckptConfig) *ckptPrimary {
	return &ckptPrimary{cfg: cfg, period: cfg.period, last: cfg.firstEpoch, committed: cfg.firstEpoch, paired: !cfg.unpaired}
}

// State is the pair's state as status names it, and what to add to it.
func (c *ckptPrimary) State() (word, detail string) {
	switch {
	case !c.started:
		return "start", c.doubt
	case c.stage != pIdle || c.frozen:
		return "checkpointing", c.doubt
	}
	return "replicating", ""
}

// NextDeadline is when evTick is due next, boottime ns; MaxInt64: never.
func (c *ckptPrimary) NextDeadline() int64 {
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
func (c *ckptPrimary) Step(now int64, ev ckptEvent) []ckptEffect {
	c.now, c.out = now, c.out[:0]
	c.event(ev)
	c.advance()
	return c.out
}

func (c *ckptPrimary) emit(fx ckptEffect) { c.out = append(c.out, fx) }

func (c *ckptPrimary) event(ev ckptEvent) {
	current := c.stage != pIdle && ev.Epoch == c.last
	switch ev.Kind {
	case evWant:
		// Before QEMU is asked, the attempt under way serves.
		if c.cfg.qmp && c.paired && c.stage != pPrepare {
			c.want(ev.Cause)
		}
	case evInside:
		// R14: the epoch is suspect.
		if !c.cfg.noR14 {
			c.want("the PVM spoke while it was stopped")
		}

	case evHandshake:
		c.unlinked()
		c.handshake = true
	case evLinkUp:
		c.link, c.handshake = true, false
		if !ev.OK {
			c.suspect("the secondary's tables are not whole")
		}
		c.resolve()
	case evLinkDown:
		c.unlinked()

	case evPair:
		if !ev.OK {
			*c = ckptPrimary{
				cfg: c.cfg, period: c.cfg.period, out: c.out, now: c.now, last: c.last, committed: c.committed,
				link: c.link, handshake: c.handshake, qmp: c.qmp, pvmStopped: c.pvmStopped, unasked: c.unasked,
			}
			break
		}
		// R18: until a commit, the SVM is a copy of a PVM that went on speaking.
		c.paired = true
		c.suspect("nothing covers the secondary yet")
		c.resolve()

	case evQMPUp:
		c.qmp, c.pvmStopped = true, !ev.OK
		c.resolve()
	case evQMPDown:
		c.qmp = false
		if c.started {
			// A STOP may pass unseen from now on (R15).
			c.suspect("no QMP connection")
		}
		if c.stage != pIdle {
			c.fail("no QMP connection")
		}

	case evReady:
		if current && c.stage == pPrepare {
			c.stage, c.asked, c.deadline = pAsk, c.now, c.now+c.cfg.stop
			c.emit(ckptEffect{Op: fxAsk, Epoch: c.last})
		}
	case evAsked:
		if current && c.stage == pAsk && !ev.OK {
			c.fail(ev.Cause)
		}
	case evPeerStopped:
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
	case evPeerResumed:
		if current {
			c.sResumed = true
		}
	case evPeerAbort:
		if current {
			c.fail("secondary: " + ev.Cause)
		}
	case evStop:
		c.stopped(ev)
	case evResume:
		c.resumed(ev)
	case evCOLO:
		if current && c.stage == pVerify {
			c.inCOLO = ev.OK
			if !ev.OK {
				c.fail(ev.Cause)
			}
		}
	}
}

func (c *ckptPrimary) stopped(ev ckptEvent) {
	c.pvmStopped = true
	if c.stage == pAsk {
		c.stage, c.deadline = pStopped, c.now+c.cfg.resume
		c.pvmStop, c.stopSkew = ev.At, ev.Skew
		c.emit(ckptEffect{Op: fxEpoch, Epoch: c.last})
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

func (c *ckptPrimary) resumed(ev ckptEvent) {
	c.pvmStopped, c.unasked = false, false
	if c.stage == pStopped {
		c.stage, c.pvmResume = pVerify, ev.At
		c.skewed = abs(ev.Skew-c.stopSkew) > c.cfg.clockTolerance
		c.emit(ckptEffect{Op: fxCOLO, Epoch: c.last})
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

func (c *ckptPrimary) unlinked() {
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
func (c *ckptPrimary) want(why string) {
	if !c.wanted {
		c.wanted, c.why = true, why
	}
}

// resolve asks for the attempt that ends a doubt, if there is one.
func (c *ckptPrimary) resolve() {
	if c.doubt != "" {
		c.want(c.doubt)
	}
}

// suspect freezes until the next commit. Without QMP no commit will ever come:
// then there are no STOPs to be seen either, and compare alone decides.
func (c *ckptPrimary) suspect(why string) {
	if c.cfg.qmp && c.paired && c.doubt == "" {
		c.doubt = why
	}
}

func (c *ckptPrimary) fail(cause string) {
	if c.sStopped || c.stage >= pStopped {
		c.suspect(cause)
	}
	c.emit(ckptEffect{Op: fxFailed, Epoch: c.last, Cause: cause})
	if c.link {
		c.emit(ckptEffect{Op: fxAbort, Epoch: c.last, Cause: cause})
	}
	c.stage = pIdle
	c.want(c.cause)
	retry := max(c.cfg.minInterval, int64(10*time.Millisecond)) << min(c.failures, 10)
	c.failures++
	c.notBefore = c.now + max(min(retry, c.cfg.maxRetry), c.cfg.minInterval)
}

// Stuck reports whether nothing leaves, and not because somebody has the PVM wait or
// keeps its QEMU's monitor: then QEMU cannot be told to go on alone either.
func (c *ckptPrimary) Stuck() bool { return c.doubt != "" && !c.unasked && c.qmp }

// InDoubt reports whether only a commit may release what is held.
func (c *ckptPrimary) InDoubt() bool { return c.doubt != "" }

// Serves is the first attempt whose commit covers all that the guest has done until
// now.
func (c *ckptPrimary) Serves() uint32 {
	if c.stage == pPrepare {
		return c.last // QEMU has not been asked yet
	}
	return c.last + 1
}

// able reports whether an attempt could begin.
func (c *ckptPrimary) able() bool {
	return c.started && c.link && !c.handshake && c.qmp && !c.pvmStopped
}

// advance does what time and the event just taken allow.
func (c *ckptPrimary) advance() {
	if c.stage != pIdle && c.now >= c.deadline {
		c.fail(fmt.Sprintf("no %s in time", map[pStage]string{
			pPrepare: "READY of the secondary", pAsk: "STOP of the PVM", pStopped: "RESUME of the PVM", pVerify: "RESUME of the SVM",
		}[c.stage]))
	}
	if c.stage == pVerify && c.inCOLO && (c.sStopped && c.sResumed || c.cfg.noR14) {
		c.commit()
	}
	if !c.started && c.paired && c.link && !c.handshake && (c.qmp || !c.cfg.qmp) {
		c.started, c.lastDone = true, c.now
		if c.doubt != "" {
			c.settle() // it holds from the first frame on
		}
		c.emit(ckptEffect{Op: fxOpen})
	}
	if c.stage == pIdle && c.able() {
		if c.period > 0 && c.now >= c.lastDone+c.period {
			c.want(causePeriod)
		}
		if c.wanted && c.now >= c.notBefore {
			c.begin()
		}
	}
	c.settle()
}

func (c *ckptPrimary) begin() {
	c.last++
	c.stage, c.deadline = pPrepare, c.now+c.cfg.ready
	c.cause, c.wanted, c.why = c.why, false, ""
	c.notBefore = c.now + c.cfg.minInterval
	c.pvmStop, c.pvmResume, c.skewed = 0, 0, false
	c.sStopped, c.sResumed, c.inCOLO = false, false, false
	c.settle() // first nothing is released any more, then S is told (R13)
	c.emit(ckptEffect{Op: fxPrepare, Epoch: c.last, Cause: c.cause})
}

// settle makes the cores' freeze what it has to be.
func (c *ckptPrimary) settle() {
	frozen := c.paired && (!c.started || c.handshake || c.stage != pIdle || c.doubt != "")
	if frozen == c.frozen {
		return
	}
	c.frozen = frozen
	if frozen {
		c.emit(ckptEffect{Op: fxFreeze})
	} else {
		c.emit(ckptEffect{Op: fxThaw})
	}
}

// commit lets leave what the checkpoint covers (R14).
func (c *ckptPrimary) commit() {
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
	c.emit(ckptEffect{Op: fxCommit, Epoch: c.last, At: at, Stop: stop, Resume: resume})
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
func (c *ckptPrimary) adapt(pause int64) {
	if c.cfg.target == 0 || c.period == 0 || pause <= 0 {
		return
	}
	since := float64(c.now - c.lastDone) // the checkpoint may have come before the period's end
	wanted := since * float64(c.cfg.target) / float64(pause)
	next := int64(min((float64(c.period)+wanted)/2, float64(c.cfg.period))) // half way: one pause says little
	c.period = min(max(next, c.cfg.minInterval, maxShare*pause), c.cfg.period)
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
type ckptSecondary struct {
	cfg ckptConfig
	out []ckptEffect

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

func newCkptSecondary(cfg ckptConfig) *ckptSecondary { return &ckptSecondary{cfg: cfg} }

// missed: before the first session the SVM stopped, or may have. Only offsets that
// are there can be wrong. Without QMP there are no STOPs, and no way back.
func (c *ckptSecondary) missed() {
	c.void = c.void || c.recovered && c.cfg.qmp
}

// State is the secondary's, as status names it.
func (c *ckptSecondary) State() (word, detail string) {
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
func (c *ckptSecondary) NextDeadline() int64 { return math.MaxInt64 }

func (c *ckptSecondary) emit(op ckptOp, epoch uint32) {
	c.out = append(c.out, ckptEffect{Op: op, Epoch: epoch})
}

// Step takes one event in. The effects are valid until the next Step.
func (c *ckptSecondary) Step(_ int64, ev ckptEvent) []ckptEffect {
	c.out = c.out[:0]
	if c.quiet {
		c.hush(ev)
		return c.out
	}
	switch ev.Kind {
	case evRecovered:
		c.recovered = true
		if !ev.OK { // the daemon died in mid checkpoint, or before it knew
			c.missed()
		}
	case evQuiet:
		c.quiet = true
	case evLinkUp:
		c.link, c.park, c.next = true, !ev.OK, 0
		if c.stage != sOff {
			c.begin()
		}
	case evLinkDown:
		c.link, c.next = false, 0
		if c.stage == sParking || c.stage == sParked {
			c.unpark()
		}
	case evQMPUp:
		c.qmp, c.svmStopped = true, !ev.OK
		if c.stage == sOff && !ev.OK {
			c.missed()
		}
	case evQMPDown:
		c.qmp = false
		if c.stage == sOff {
			c.missed()
		} else {
			c.doubt()
		}

	case evPrepare:
		c.next = ev.Epoch
	case evAbort:
		if c.next == ev.Epoch {
			c.next = 0
		}
		if c.epoch == ev.Epoch && (c.stage == sParking || c.stage == sParked) {
			c.unpark()
		}
	case evDrained:
		if c.stage != sParking || c.epoch != ev.Epoch {
			break
		}
		if !ev.OK {
			c.abort(ev.Cause)
			c.unpark()
			break
		}
		c.stage = sParked
		c.emit(fxReady, c.epoch)

	case evStop:
		c.svmStopped = true
		switch c.stage {
		case sOff:
			c.missed()
		case sParked:
			// The epoch is right before P's mark of it comes. The offsets stay: P
			// may die now, and the SVM goes on as it was.
			c.stage, c.svmStop, c.void = sStopped, ev.At, false
			c.emit(fxBegin, c.epoch)
			c.emit(fxStopped, c.epoch)
		default:
			c.doubt()
		}
	case evResume:
		c.svmStopped = false
		switch c.stage {
		case sStopped:
			// The order counts: the offsets are right before output opens.
			c.stage, c.svmResume = sRun, ev.At
			c.emit(fxReset, c.epoch)
			c.emit(fxRun, c.epoch)
			c.emit(fxCOLO, c.epoch)
		case sRun, sParking, sParked:
			c.doubt() // a STOP was missed
		}
	case evCOLO:
		if c.stage == sRun && c.epoch == ev.Epoch {
			if ev.OK {
				c.out = append(c.out, ckptEffect{Op: fxResumed, Epoch: c.epoch, Stop: c.svmStop, Resume: c.svmResume})
			} else {
				c.abort(ev.Cause)
			}
		}
	}

	if c.stage == sOff && c.link && (c.qmp || !c.cfg.qmp) {
		c.begin()
	}
	if c.next != 0 {
		c.prepare()
	}
	return c.out
}

// hush follows QEMU alone: a checkpoint that was under way when P died is loaded if
// the SVM goes on before anybody told it that P is gone.
func (c *ckptSecondary) hush(ev ckptEvent) {
	switch ev.Kind {
	case evStop:
		c.svmStopped = true
		if c.stage == sParked {
			c.stage = sStopped // P had asked for it before it died
		}
	case evResume:
		c.svmStopped = false
		if c.stage == sStopped {
			c.stage = sRun
			c.emit(fxReset, c.epoch)
		}
	}
}

// Whole reports whether the offsets are those of the SVM as it is. In mid
// checkpoint they are so only for the P that ordered it.
func (c *ckptSecondary) Whole() bool { return !c.void && c.stage != sStopped }

// begin follows a new session.
func (c *ckptSecondary) begin() {
	if c.park || !c.Whole() {
		c.stage, c.void = sVoid, true
		c.emit(fxPark, 0)
		if !c.park {
			c.emit(fxStopped, 0) // P may not know yet
		}
		return
	}
	c.stage = sRun
	c.emit(fxRun, 0)
}

// prepare begins the attempt c.next when the SVM runs.
func (c *ckptSecondary) prepare() {
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
		c.emit(fxPark, c.epoch)
		c.emit(fxDrain, c.epoch)
	}
}

// doubt follows a STOP or RESUME that nobody asked for or nobody may have seen:
// what the SVM says from here on may not be what the offsets are for.
func (c *ckptSecondary) doubt() {
	c.stage, c.void = sVoid, true
	c.emit(fxPark, 0)
	if c.link {
		c.emit(fxStopped, 0)
	}
}

// unpark goes back to where the attempt began: nothing happened.
func (c *ckptSecondary) unpark() {
	if c.void {
		c.stage = sVoid
		return
	}
	c.stage = sRun
	c.emit(fxRun, 0)
}

func (c *ckptSecondary) abort(cause string) {
	if c.link {
		c.out = append(c.out, ckptEffect{Op: fxAbort, Epoch: c.epoch, Cause: cause})
	}
}

func abs(x int64) int64 { return max(x, -x) }
