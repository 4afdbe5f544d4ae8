// SPDX-License-Identifier: Apache-2.0

package checkpoint

import "math"

// sStage is where S is.
type sStage uint8

const (
	sOff     sStage = iota // no session yet
	sRun                   // the SVM runs with the offsets known
	sParking               // parked, the tap is not empty yet
	sParked                // READY was sent
	sStopped               // the SVM's QEMU stopped for the checkpoint
	sVoid                  // parked until a checkpoint makes the SVM known
)

// Secondary is S's machine.
type Secondary struct {
	cfg Config
	out []Effect

	stage      sStage
	epoch      uint32 // of the attempt
	due        uint32 // the attempt that P may have asked QEMU for: READY was sent, and no STOP has come since
	over       bool   // P has given it up, or may have
	unasked    bool   // and it had not asked QEMU
	late       uint32 // the attempt whose STOP came after it had been given up; 0: none
	next       uint32 // prepared while the SVM was stopped; 0: none
	pending    bool   // a STOP and RESUME counted as an attempt's, and P has not gone on from there: it may have been somebody's, and the checkpoint's come later
	link, qmp  bool
	recovered  bool // the offsets are older than this daemon
	park       bool // P was in doubt when the session began
	void       bool // offsets are not to be trusted
	unsure     bool // a checkpoint may have been loaded since they were made, and nothing will tell
	quiet      bool // taking over
	svmStopped bool
	svmOff     bool // it powered off: its QEMU has no STOP for the next checkpoint
	svmStop    int64
	svmResume  int64
}

// NewSecondary begins without offsets; EvRecovered brings an earlier daemon's.
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
		c.stepQuiet(ev)
		return c.out
	}
	switch ev.Kind {
	case EvRecovered:
		c.recovered = true
		if !ev.OK { // the daemon died in mid checkpoint, or before it knew
			c.missed()
			c.unsure = true
		}
	case EvQuiet:
		c.quiet = true
	case EvLinkUp:
		c.link, c.park, c.next = true, !ev.OK, 0
		if c.stage != sOff {
			c.begin()
		}
	case EvLinkDown:
		c.link, c.next, c.over = false, 0, true
		switch c.stage {
		case sParking, sParked:
			c.unpark()
		case sStopped:
			// P may not have asked for a checkpoint, and not have heard of the STOP: then it was somebody's, and
			// nothing was loaded.
			c.void = true
		}
	case EvQMPUp:
		c.qmp, c.svmStopped = true, !ev.OK
		if c.stage == sOff && !ev.OK {
			c.missed()
		}
	case EvQMPDown:
		c.qmp = false
		c.unsure = c.unsure || c.due != 0 || c.stage == sStopped
		if c.stage == sOff {
			c.missed()
		} else {
			c.doubt()
		}

	case EvPrepare:
		c.next, c.pending = ev.Epoch, c.pending && c.over
	case EvAbort:
		if c.next == ev.Epoch {
			c.next = 0
		}
		if c.epoch == ev.Epoch {
			c.over, c.unasked = true, ev.Unasked
			if c.stage == sParking || c.stage == sParked {
				c.unpark()
			}
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
		c.stage, c.due = sParked, c.epoch
		c.emit(OpReady, c.epoch)

	case EvOff:
		c.svmOff = true
	case EvStop:
		c.svmStopped = true
		switch c.stage {
		case sOff:
			c.missed()
		case sParked:
			// The epoch is right before P's mark of it comes. The offsets stay: P
			// may die now, and the SVM goes on as it was.
			c.stage, c.svmStop, c.void, c.due = sStopped, ev.At, false, 0
			c.emit(OpBegin, c.epoch)
			c.emit(OpStopped, c.epoch)
		default:
			c.stopsLate()
			c.doubt()
		}
	case EvResume:
		c.goesOn()
		switch {
		case c.stage == sStopped && c.unasked:
			// It was somebody's STOP, unless P's QEMU was slow to report its own: then nothing was loaded. P knows of it.
			c.stage, c.void, c.unsure = sVoid, true, true
		case c.stage == sStopped:
			// The order counts: the offsets are right before output opens.
			c.stage, c.svmResume, c.late = sRun, ev.At, 0
			c.reset()
			c.emit(OpRun, c.epoch)
			c.emit(OpCOLO, c.epoch)
		case c.stage != sOff && c.stage != sVoid:
			c.doubt() // a STOP was missed
		}
		c.loadedLate()
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

// stepQuiet follows QEMU alone: a checkpoint that was under way when P died is loaded if
// the SVM goes on before it was told that P is gone.
func (c *Secondary) stepQuiet(ev Event) {
	switch ev.Kind {
	case EvStop:
		c.svmStopped = true
		if c.stage == sParked {
			c.stage, c.due = sStopped, 0 // P had asked for it before it died
		} else {
			c.stopsLate()
		}
	case EvOff:
		c.svmOff = true
	case EvResume:
		c.goesOn()
		if c.stage == sStopped {
			c.stage, c.late = sRun, 0
			c.reset()
		}
		c.loadedLate()
	}
}

// reset: the SVM is a copy of the PVM as that was at P's mark of the attempt. Of one that is over the mark counts for
// nothing: the PVM may have gone on and stopped again, and the mark of that be lost (R16).
func (c *Secondary) reset() {
	c.unsure, c.pending = false, true
	epoch := c.epoch
	if c.over {
		epoch = 0
	}
	c.emit(OpReset, epoch)
}

// stopsLate: the SVM stops, and nobody waits for it to. If P may have asked for a checkpoint,
// that is what it stops for: QEMU carries out what it was asked for when it can, whatever has
// become of the attempt, the link and P. An SVM that goes on afterwards is a copy of the PVM.
func (c *Secondary) stopsLate() {
	c.unsure = c.unsure || c.pending && c.due == 0
	if !c.cfg.noLate {
		c.late, c.due = max(c.late, c.due), 0
	}
}

// goesOn: the SVM runs. One that had powered off is a copy of the PVM then.
func (c *Secondary) goesOn() {
	if c.svmOff {
		c.stopsLate()
	}
	c.svmStopped, c.svmOff = false, false
}

// loadedLate: the offsets are those of the SVM that was. A host that takes over now goes by
// them.
func (c *Secondary) loadedLate() {
	if c.late != 0 {
		c.emit(OpReset, c.late)
		c.late, c.unsure = 0, false
	}
}

// Doubt reports whether a checkpoint may have been loaded of which this machine does not know, since the offsets were
// made: a host that takes over finds out from what the SVM sends (R22).
func (c *Secondary) Doubt() bool { return c.cfg.QMP && c.unsure && !c.cfg.noDoubt }

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
	case c.svmStopped && !c.svmOff:
		// Its tap cannot drain. The attempt waits for RESUME, P for no longer
		// than it likes. One that powered off goes on by a checkpoint alone, and
		// loses what is in its tap, as one that has crashed does.
	default:
		// An attempt before this one is over; what was parked stays parked.
		c.epoch, c.next, c.stage, c.over, c.unasked = c.next, 0, sParking, false, false
		c.emit(OpPark, c.epoch)
		// A STOP for the attempt before must not be taken for one for this.
		c.out = append(c.out, Effect{Op: OpDrain, Epoch: c.epoch, Events: c.due != 0})
	}
}

// doubt follows a STOP or RESUME that nobody asked for or nobody may have seen:
// what the SVM sends from here on may not fit the offsets.
func (c *Secondary) doubt() {
	c.stage, c.void = sVoid, true
	c.emit(OpPark, 0)
	if c.link {
		c.emit(OpStopped, 0)
	}
}

// unpark goes back to where the attempt began: nothing happened, or S does not know of it. Where QEMU may have been asked,
// its STOP and RESUME may be under way to this daemon (R16).
func (c *Secondary) unpark() {
	if c.void {
		c.stage = sVoid
		return
	}
	c.stage = sRun
	c.out = append(c.out, Effect{Op: OpRun, Unsure: c.due != 0})
}

func (c *Secondary) abort(cause string) {
	if c.link {
		c.out = append(c.out, Effect{Op: OpAbort, Epoch: c.epoch, Cause: cause})
	}
}
