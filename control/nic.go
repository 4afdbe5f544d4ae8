// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"time"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
)

const (
	// maxWait bounds one Poll, for the sake of the arithmetic; commands wake it.
	maxWait = time.Minute
	// maxCaptured bounds what is remembered of a freeze. More frames than the
	// slots of a NIC cannot be captured meanwhile, only pure ACKs can.
	maxCaptured = 1 << 16
	// maxUnpark bounds the batches that are read before input flows again.
	maxUnpark = 64
	// maxCatchUp bounds the reading of what was captured before a commit.
	maxCatchUp = 100 * time.Millisecond
	// clockNoise is how far a time of QEMU's may be off on our clock. Frames
	// this close to STOP or RESUME are not inside.
	clockNoise = int64(50 * time.Microsecond)
)

var errStopped = errors.New("the NIC's loop has ended")

// core is a compare.Primary or a compare.Secondary.
type core interface {
	Step(now int64, ev *compare.Event, out []compare.Effect) []compare.Effect
	NextDeadline() int64
}

// nic is one guest NIC. Its loop owns the core and drives the data path; others
// send it commands.
type nic struct {
	index int
	dp    datapath.NIC
	log   *slog.Logger
	cmds  chan func()
	dead  chan struct{} // closed when the loop has ended
	want  func(request) // a checkpoint is needed; never blocks

	primary   *compare.Primary // one of the two
	secondary *compare.Secondary
	core      core
	keys      *compare.Keys // the core's

	order order // watchOrder's

	// The loop's own.
	evs               []compare.Event
	effs              []compare.Effect
	since             int64 // P: what was captured earlier has sums of older keys
	frozen            bool
	captured          []int64       // P: when, while frozen
	parked            bool          // S
	mode              datapath.Mode // the one to be in when no foreign program is in front
	intruder          string        // that is; "": none
	intruded          uint64        // times
	tapSet, tapDown   bool          // the tap was set up or down; down, on its account
	applyErr          uint64
	applyLog          time.Time
	echoEvery, echoAt int64 // P: time between echoes, ns (0: none yet), and when the next is due
}

// request is a wish for a checkpoint.
type request struct {
	at     time.Time
	nic    int // -1: not a NIC's
	flow   string
	reason string
}

func newNIC(index int, dp datapath.NIC, log *slog.Logger, want func(request)) *nic {
	return &nic{
		index: index, dp: dp, log: log.With("nic", index), want: want,
		cmds: make(chan func(), 16), dead: make(chan struct{}),
	}
}

// do has the loop run f between two polls and returns its error. It is for every
// goroutine but the loop's.
func (n *nic) do(f func() error) error {
	done := make(chan error, 1)
	select {
	case n.cmds <- func() { done <- f() }:
	case <-n.dead:
		return errStopped
	}
	n.dp.Wake()
	select {
	case err := <-done:
		return err
	case <-n.dead:
		return errStopped
	}
}

// run is the loop. It ends when ctx has ended and it is woken, or when the data
// path fails.
func (n *nic) run(ctx context.Context) error {
	defer close(n.dead)
	for ctx.Err() == nil {
		n.commands()
		now := n.dp.Now()
		wait := maxWait
		if d := n.deadline(); d != math.MaxInt64 {
			wait = time.Duration(min(max(d-now, 0), int64(maxWait)))
		}
		if err := n.poll(wait); err != nil {
			if ctx.Err() != nil {
				break
			}
			return fmt.Errorf("nic %d: %w", n.index, err)
		}
		if now := n.dp.Now(); n.core.NextDeadline() <= now {
			n.step(now, &compare.Event{Kind: compare.EvTick})
		}
		n.apply()
		if err := n.echo(); err != nil {
			return fmt.Errorf("nic %d: %w", n.index, err)
		}
	}
	return nil
}

// deadline is when the loop has to go on though nothing comes, boottime ns.
func (n *nic) deadline() int64 {
	d := n.core.NextDeadline()
	if n.echoEvery > 0 {
		d = min(d, n.echoAt)
	}
	return d
}

// startEchoes has P ask S's kernel for echoes from now on (R20). They come from
// this loop: when it does not turn, nothing is released, and the PVM is muted.
func (n *nic) startEchoes(every, lease time.Duration) error {
	n.echoEvery, n.echoAt = int64(every), n.dp.Now()
	return n.dp.SetLeaseDuration(lease)
}

func (n *nic) echo() error {
	now := n.dp.Now()
	if n.echoEvery == 0 || now < n.echoAt {
		return nil
	}
	n.echoAt = now + n.echoEvery
	return n.dp.RequestEcho()
}

func (n *nic) commands() {
	for {
		select {
		case f := <-n.cmds:
			f()
		default:
			return
		}
	}
}

// poll takes in the kernel's events within wait. It leaves the effects to apply.
func (n *nic) poll(wait time.Duration) error {
	evs, err := n.dp.Poll(wait, n.evs[:0])
	n.evs = evs
	if err != nil {
		return err
	}
	now := n.dp.Now()
	unpark := false
	for i := range evs {
		ev := &evs[i]
		switch ev.Kind {
		case compare.EvPVM:
			if ev.Seg.At < n.since {
				// Its sums are those of keys that are gone. The guest repeats it.
				if ev.Seg.Slot != compare.NoSlot {
					n.effs = append(n.effs, compare.Effect{Op: compare.OpFree, Slot: ev.Seg.Slot, Reason: compare.ReasonVoid})
				}
				continue
			}
			if n.frozen && len(n.captured) < maxCaptured {
				n.captured = append(n.captured, ev.Seg.At)
			}
		case compare.EvPark:
			unpark = !n.parked
		}
		n.step(now, ev)
	}
	if unpark {
		// Parked just before parking ended.
		n.step(now, &compare.Event{Kind: compare.EvUnpark})
	}
	return nil
}

// step gives the core an event; what it wants done waits for apply.
func (n *nic) step(now int64, ev *compare.Event) {
	n.effs = n.core.Step(now, ev, n.effs)
}

// stepNow is step and apply.
func (n *nic) stepNow(ev compare.Event) {
	n.step(n.dp.Now(), &ev)
	n.apply()
}

// apply carries out the effects so far, and those of what they ask for.
func (n *nic) apply() {
	for len(n.effs) > 0 {
		n.applyOnce()
	}
}

func (n *nic) applyOnce() {
	var acked []compare.Event
	for i := range n.effs {
		switch e := &n.effs[i]; e.Op {
		case compare.OpCheckpoint:
			n.want(request{at: time.Now(), nic: n.index, flow: e.Tuple.String(), reason: e.Reason.String()})
		case compare.OpAdopt:
			if ack, ok := n.dp.Acked(e.Tuple); ok {
				acked = append(acked, adoption(e.Tuple, ack))
			}
		}
	}
	// What could not be sent is lost as on any link, and the guests repeat it.
	if err := n.dp.Apply(n.effs); err != nil {
		n.applyErr++
		if now := time.Now(); now.Sub(n.applyLog) >= time.Second {
			n.applyLog = now
			n.log.Warn("frames lost on the way out", "err", err, "times", n.applyErr)
		}
	}
	n.effs = n.effs[:0]
	for i := range acked {
		n.step(n.dp.Now(), &acked[i])
	}
}

// adoption is the event of what the remote of a connection of an earlier daemon has
// acknowledged (R23).
func adoption(t compare.Tuple, ack uint32) compare.Event {
	return compare.Event{Kind: compare.EvAdopt, Seg: compare.Segment{Tuple: t, Seq: ack, Slot: compare.NoSlot}}
}

// freeze and thaw: nothing leaves meanwhile (R13, R15).
func (n *nic) freeze() error {
	n.frozen, n.captured = true, n.captured[:0]
	n.stepNow(compare.Event{Kind: compare.EvFreeze})
	return nil
}

func (n *nic) thaw() error {
	n.frozen = false
	n.stepNow(compare.Event{Kind: compare.EvThaw})
	return nil
}

// commit lets leave what the PVM sent before at (R14) and reports whether it sent
// anything between stop and resume.
func (n *nic) commit(epoch uint32, at, stop, resume int64) (inside bool, err error) {
	// Frames captured before the commit point may still be on their way.
	began := n.dp.Now()
	for {
		if err := n.poll(0); err != nil {
			return false, err
		}
		if len(n.evs) == 0 || newest(n.evs) > resume {
			break
		}
		if n.dp.Now()-began > int64(maxCatchUp) {
			inside = true // nobody knows
			break
		}
	}
	inside = inside || len(n.captured) == maxCaptured
	for _, at := range n.captured {
		if at > stop+clockNoise && at < resume-clockNoise {
			inside = true
		}
	}
	n.frozen = false
	n.stepNow(compare.Event{Kind: compare.EvCommit, Epoch: epoch, At: at})
	return inside, nil
}

// newest is the latest capture among evs.
func newest(evs []compare.Event) int64 {
	var at int64
	for i := range evs {
		if evs[i].Kind == compare.EvPVM {
			at = max(at, evs[i].Seg.At)
		}
	}
	return at
}

// setMode sets the mode, at once or when no foreign program is in front any more.
func (n *nic) setMode(m datapath.Mode) error {
	n.mode = m
	if n.intruder != "" {
		return nil
	}
	return n.dp.SetMode(m)
}

// restore takes over what an earlier daemon's tables hold (R23). The loop does not
// run yet.
func (n *nic) restore(idle time.Duration) {
	a := n.dp.Recovered()
	n.mode, n.parked = a.Mode, a.Mode == datapath.ModePark
	if n.primary == nil {
		return
	}
	now := n.dp.Now()
	for _, r := range a.Remotes {
		if now-r.At <= int64(idle) {
			ev := adoption(r.Tuple, r.Ack)
			n.step(now, &ev)
		}
	}
}

// restoreMode has the kernel go on in the mode of the earlier daemon.
func (n *nic) restoreMode() error { return n.setMode(n.mode) }

// failClosed shuts the NIC while a foreign program is in front of ours; at the guest's tap
// that one could let frames out itself, so there the tap goes down as well. "":
// none is any more.
func (n *nic) failClosed(intruder string, onTap bool) error {
	var errs []error
	if intruder != "" && n.intruder == "" {
		n.intruded++
		errs = append(errs, n.dp.SetMode(datapath.ModeShut))
	}
	// At first, too: whatever set the tap down, the programs are in their place now.
	if onTap != n.tapDown || !n.tapSet {
		err := n.dp.SetTap(!onTap)
		if err == nil {
			n.tapSet, n.tapDown = true, onTap
		}
		errs = append(errs, err)
	}
	before := n.intruder
	n.intruder = intruder
	if intruder == "" && before != "" {
		errs = append(errs, n.setMode(n.mode))
	}
	return errors.Join(errs...)
}

// park holds back the SVM's input and drops its output (R13).
func (n *nic) park() error {
	n.parked = true
	return n.setMode(datapath.ModePark)
}

// reset follows a checkpoint that was loaded (S): offsets and copies are those of
// another SVM. Output stays shut.
func (n *nic) reset(epoch uint32) error {
	if err := n.dp.ResetOffsets(); err != nil {
		return err
	}
	n.stepNow(compare.Event{Kind: compare.EvReset, Epoch: epoch})
	return nil
}

// unpark lets the SVM's output out and its input in, first what was parked.
func (n *nic) unpark() error {
	// P's mark, and what was parked behind it, may still be in the ring.
	for range maxUnpark {
		if err := n.poll(0); err != nil {
			return err
		}
		if len(n.evs) == 0 {
			break
		}
	}
	n.parked = false
	if err := n.setMode(datapath.ModeRun); err != nil {
		return err
	}
	n.stepNow(compare.Event{Kind: compare.EvUnpark})
	return nil
}

// offsets counts the connections with an offset (S).
func (n *nic) offsets() (known int, err error) {
	err = n.dp.Offsets(func(compare.Tuple, datapath.Offset) { known++ })
	return known, err
}

// install begins a session. On S new digest keys make the copies void.
func (n *nic) install(s datapath.Session) error {
	if n.secondary != nil && *n.keys != s.Digest {
		n.stepNow(compare.Event{Kind: compare.EvReset})
		*n.keys = s.Digest
	}
	return n.dp.InstallSession(s)
}

// shut: nothing in or out, and no echoes.
func (n *nic) shut() error {
	n.echoEvery = 0
	// No program is left that takes an echo when the mode is set.
	return errors.Join(n.setMode(datapath.ModeShut), n.dp.SetLeaseUntil(0))
}

// renew begins a pair with an empty core; the guest goes on in mid-stream.
func (n *nic) renew(cfg compare.Config, epoch uint32) error {
	cfg.Epoch = epoch
	n.primary = compare.NewPrimary(cfg, n.keys)
	n.core = n.primary
	n.frozen, n.captured = false, nil
	return nil
}

// solo has P's guest transmit alone.
func (n *nic) solo() error {
	n.echoEvery, n.frozen = 0, false
	if err := n.dp.SetLeaseUntil(math.MaxInt64); err != nil {
		return err
	}
	n.stepNow(compare.Event{Kind: compare.EvSolo})
	return n.setMode(datapath.ModeSolo)
}

// quiet has S send nothing to anybody; what its guest sends is kept (R21 i).
func (n *nic) quiet() error { return n.setMode(datapath.ModeQuiet) }

// takeOver has the SVM transmit, first what the clients may not have received (R22).
func (n *nic) takeOver(guard uint32) error {
	if err := n.dp.TakeOver(guard); err != nil {
		return err
	}
	if err := n.dp.SetLeaseUntil(math.MaxInt64); err != nil {
		return err
	}
	if err := n.setMode(datapath.ModeSolo); err != nil {
		return err
	}
	n.parked = false
	n.stepNow(compare.Event{Kind: compare.EvTakeOver})
	// What it sent until now may still be in the ring.
	for range maxUnpark {
		if err := n.poll(0); err != nil {
			return err
		}
		n.apply()
		if len(n.evs) == 0 {
			break
		}
	}
	return nil
}
