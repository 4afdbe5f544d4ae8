// SPDX-License-Identifier: Apache-2.0

package checkpoint

import (
	"fmt"
	"math"
	"time"
)

// pStage is where P's attempt is.
type pStage uint8

const (
	pIdle    pStage = iota
	pPrepare        // waiting for READY
	pAsk            // waiting for P's STOP
	pStopped        // waiting for P's RESUME
	pVerify         // waiting for the rest of R14
)

// Primary is P's machine.
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
	pauses    pauses
	periodic  periodic

	stage     pStage
	cause     string // of the attempt
	last      uint32 // number of the last attempt
	committed uint32 // epoch that holds
	deadline  int64
	began     int64 // when it began
	asked     int64 // when QEMU was asked
	asking    bool  // QEMU has not answered yet: a STOP is due to the question
	agreed    bool  // QEMU makes the checkpoint
	pvmStop   int64
	stopSkew  int64
	pvmResume int64
	skewed    bool // the wall clock was set meanwhile
	sStopped  bool
	sResumed  bool
	inCOLO    bool
}

// NewPrimary begins with nothing held and no session.
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
	case c.wanted, c.periodic.on:
		return c.due()
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
		switch {
		case !c.cfg.QMP || !c.paired:
		case ev.Diverged && c.periodic.on && c.stage != pPrepare:
			c.want(CausePeriodic) // at the epoch's end
		case c.stage == pPrepare: // before QEMU is asked, the attempt under way serves
			c.periodic.attempt = c.periodic.attempt || ev.Diverged
		default:
			c.periodic.wanted = c.periodic.wanted || ev.Diverged
			c.want(ev.Cause)
		}
	case EvReleased:
		c.periodic.busy = c.now
	case EvInside:
		// R14: the epoch is suspect.
		if !c.cfg.noR14 {
			c.want("the PVM transmitted while it was stopped")
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
				periodic: periodic{begun: c.periodic.begun},
			}
			break
		}
		// R18: until a commit, the SVM is a copy of a PVM that has transmitted since.
		c.paired = true
		c.suspect("nothing covers the secondary yet")
		c.resolve()

	case EvQMPUp:
		c.qmp, c.pvmStopped = true, !ev.OK
		c.resolve()
	case EvQMPDown:
		c.qmp, c.asking = false, false
		c.endPeriodic()
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
			c.asking = true
			c.emit(Effect{Op: OpAsk, Epoch: c.last})
		}
	case EvAsked:
		c.asking = false
		if current && c.stage >= pAsk {
			if c.agreed = ev.OK; !ev.OK {
				c.fail(ev.Cause)
			}
		}
	case EvPeerStopped:
		switch {
		case current && c.stage >= pStopped:
			c.sStopped = true
		case current, ev.Epoch == 0:
			// Or S takes somebody's STOP for the checkpoint's: no QEMU is asked for one before the PVM has stopped.
			c.suspect("the SVM stopped unasked")
			c.resolve()
			if c.stage != pIdle {
				c.give("the SVM stopped unasked", current)
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
	c.unasked = !c.asking
	if c.last != c.committed {
		// It may be QEMU's, of a guest that somebody had go on since the first (R16).
		c.emit(Effect{Op: OpMark, Epoch: c.last})
	}
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
		if !c.sStopped {
			// Somebody has it go on before QEMU makes the checkpoint, unless S's report is late (R16).
			c.emit(Effect{Op: OpMark, Epoch: c.last})
		}
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
	c.endPeriodic()
	if c.stage >= pAsk {
		// S may have stopped and could not report it.
		c.suspect("control link lost during a checkpoint")
	}
	if c.stage != pIdle {
		c.fail("control link lost")
	}
}

// want asks for an attempt as soon as one can begin.
func (c *Primary) want(why string) {
	if !c.wanted || c.why == CausePeriodic {
		c.wanted, c.why = true, why
	}
	c.periodic.hurry = c.periodic.hurry || why != CausePeriodic
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

func (c *Primary) fail(cause string) { c.give(cause, false) }

// give gives the attempt up; unasked: see [Event].
func (c *Primary) give(cause string, unasked bool) {
	if c.sStopped || c.stage >= pStopped {
		c.suspect(cause)
	}
	c.emit(Effect{Op: OpFailed, Epoch: c.last, Cause: cause})
	if c.link {
		c.emit(Effect{Op: OpAbort, Epoch: c.last, Cause: cause, Unasked: unasked})
	}
	c.stage = pIdle
	c.endPeriodic()
	c.periodic.wanted, c.periodic.attempt = c.periodic.wanted || c.periodic.attempt, false
	c.want(c.cause)
	retry := max(c.cfg.MinInterval, int64(10*time.Millisecond)) << min(c.failures, 10)
	c.failures++
	c.notBefore = c.now + max(min(retry, c.cfg.MaxRetry), c.cfg.MinInterval)
}

// Stuck reports whether a doubt holds everything back, and a checkpoint could end it: the
// PVM does not wait for an operator, and its monitor is connected.
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
	if c.stage == pVerify && c.inCOLO && (c.agreed && c.sStopped && c.sResumed || c.cfg.noR14) {
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
		switch {
		case c.periodic.on && c.now >= c.due():
			c.want(CausePeriodic)
		case c.period > 0 && c.now >= c.lastDone+c.period:
			c.want(CausePeriod)
		}
		if c.wanted && c.now >= c.due() {
			c.begin()
		}
	}
	c.settle()
}

func (c *Primary) begin() {
	c.last++
	c.stage, c.began, c.deadline = pPrepare, c.now, c.now+c.cfg.Ready
	c.cause, c.wanted, c.why = c.why, false, ""
	c.periodic.wanted, c.periodic.attempt, c.periodic.hurry = false, c.periodic.wanted, false
	c.notBefore = c.now + c.cfg.MinInterval
	c.pvmStop, c.pvmResume, c.skewed = 0, 0, false
	c.sStopped, c.sResumed, c.inCOLO, c.agreed = false, false, false, false
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
	// Anything the PVM sent before its STOP is in the checkpoint, so an earlier
	// commit point is always right, only less is released. When QEMU's times
	// cannot be (the wall clock was set), the time of the request serves.
	stop, resume := c.pvmStop, c.pvmResume
	tol := c.cfg.clockTolerance
	at := stop + (resume-stop)/2
	if c.skewed || stop < c.asked-tol || resume < stop || resume > c.now+tol {
		at, stop, resume = c.asked, c.asked, c.now
		c.want("the clock was set during a checkpoint")
	}
	c.emit(Effect{Op: OpCommit, Epoch: c.last, At: at, Stop: stop, Resume: resume, Began: c.began, Asked: c.asked})
	if !c.periodic.on { // what it leads to is the time between two commits, which the mode sets
		c.adapt(resume - stop)
	}
	c.committed, c.stage, c.doubt, c.failures = c.last, pIdle, "", 0
	c.frozen = false
	c.lastDone = c.now
	c.judge(resume - stop)
}

// maxShare: the period that adapt chooses is at least so many times the part of the pause that
// does not come of what the guest wrote: more checkpoints do not make it shorter.
const maxShare = 10

// adapt has the period follow the pause that just was. What the guest writes between
// two checkpoints is what a pause is for: half the time, half the pause.
func (c *Primary) adapt(pause int64) {
	if c.cfg.TargetPause == 0 || c.period == 0 || pause <= 0 || c.lastDone == 0 { // or nobody knows for how long it has written
		return
	}
	since := c.now - c.lastDone // the checkpoint may have come before the period's end
	c.pauses.add(since, pause)
	wanted := float64(since) * float64(c.cfg.TargetPause) / float64(pause)
	next := int64(min((float64(c.period)+wanted)/2, float64(c.cfg.Period))) // half way: one pause is a noisy measure
	c.period = min(max(next, c.cfg.MinInterval, maxShare*c.pauses.fixed), c.cfg.Period)
}

// pauses are what adapt knows of them.
type pauses struct {
	since, pause int64 // of the one before: time that the guest had to write, and the pause then
	fixed        int64 // the part of a pause that does not come of what the guest wrote, as far as it is known
}

// add takes one in. Two pauses after different times lie on a line, which begins at the fixed part. Without
// a second time what was known loses weight, until the period changes and shows it anew.
func (p *pauses) add(since, pause int64) {
	if apart := since - p.since; p.since == 0 || abs(apart) <= since/10 {
		p.fixed -= p.fixed / 8
	} else {
		rate := max(0, float64(pause-p.pause)/float64(apart))
		now := max(0, pause-int64(rate*float64(since)))
		p.fixed += (now - p.fixed) / 2 // as a pause is a noisy measure
	}
	p.fixed = min(p.fixed, pause)
	p.since, p.pause = since, pause
}

func abs(x int64) int64 { return max(x, -x) }
