// SPDX-License-Identifier: Apache-2.0

// Package nicloop drives one guest NIC: a core of package compare over the data path. What
// the daemon orders, such as a commit or a takeover, is a method; everything that decides is
// in the core, and everything that acts in the data path.
package nicloop

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

// ErrStopped: the loop takes no more orders.
var ErrStopped = errors.New("the NIC's loop has ended")

// core is a compare.Primary or a compare.Secondary.
type core interface {
	Step(now int64, ev *compare.Event, out []compare.Effect) []compare.Effect
	NextDeadline() int64
}

// Loop is one guest NIC's. The goroutine of [Loop.Run] owns the core and drives the data path:
// all methods but New, Do and Sweep are for it, or for the time before it runs.
type Loop struct {
	Index int
	DP    datapath.NIC
	log   *slog.Logger
	cmds  chan func()
	dead  chan struct{} // closed when the loop has ended
	want  func(Request) // a checkpoint is needed; never blocks

	Primary   *compare.Primary // one of the two
	Secondary *compare.Secondary
	core      core
	Keys      *compare.Keys // the core's

	order order // CheckOrder's

	fast   datapath.FastPath // nil: there is none
	fastOn bool              // connections may be the kernel's
	owned  []compare.Tuple   // fastPath's
	taken  map[string]uint64 // GivenBack's

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

// Request is a wish for a checkpoint.
type Request struct {
	At     time.Time
	NIC    int // -1: not a NIC's
	Flow   string
	Reason string
	Where  string // in what the guests differ; "": not known

	Diverged bool // the guests differ
}

// NewPrimary makes P's loop of the guest's NIC index, with a core that digests with keys. want
// takes requests for checkpoints, and must not block.
func NewPrimary(index int, dp datapath.NIC, log *slog.Logger, want func(Request), cfg compare.Config, keys compare.Keys) *Loop {
	n := newLoop(index, dp, log, want, keys)
	n.Primary = compare.NewPrimary(cfg, n.Keys)
	n.core = n.Primary
	return n
}

// NewSecondary makes S's loop likewise. Its core wants no checkpoints.
func NewSecondary(index int, dp datapath.NIC, log *slog.Logger, cfg compare.SecondaryConfig, keys compare.Keys) *Loop {
	n := newLoop(index, dp, log, nil, keys)
	n.Secondary = compare.NewSecondary(cfg, n.Keys)
	n.core = n.Secondary
	return n
}

func newLoop(index int, dp datapath.NIC, log *slog.Logger, want func(Request), keys compare.Keys) *Loop {
	fast, _ := dp.(datapath.FastPath)
	return &Loop{
		Index: index, DP: dp, Keys: &keys, log: log.With("nic", index), want: want,
		cmds: make(chan func(), 16), dead: make(chan struct{}), fast: fast, taken: make(map[string]uint64),
	}
}

// Do has the loop run f between two polls and returns its error. It is for every
// goroutine but the loop's.
func (n *Loop) Do(f func() error) error {
	done := make(chan error, 1)
	select {
	case n.cmds <- func() { done <- f() }:
	case <-n.dead:
		return ErrStopped
	}
	n.DP.Wake()
	select {
	case err := <-done:
		return err
	case <-n.dead:
		return ErrStopped
	}
}

// Run is the loop. It ends when ctx has ended and it is woken, or when the data
// path fails.
func (n *Loop) Run(ctx context.Context) error {
	defer close(n.dead)
	for ctx.Err() == nil {
		n.commands()
		wait := maxWait
		if d := n.Deadline(); d != math.MaxInt64 {
			wait = time.Duration(min(max(d-n.DP.Now(), 0), int64(maxWait)))
		}
		if err := n.Turn(wait); err != nil {
			if ctx.Err() != nil {
				break
			}
			return err
		}
	}
	return nil
}

// Turn takes in the kernel's events within wait, and carries out what comes of them and of
// time.
func (n *Loop) Turn(wait time.Duration) error {
	if err := n.poll(wait); err != nil {
		return fmt.Errorf("nic %d: %w", n.Index, err)
	}
	if now := n.DP.Now(); n.core.NextDeadline() <= now {
		n.step(now, &compare.Event{Kind: compare.EvTick})
	}
	n.apply()
	if err := n.echo(); err != nil {
		return fmt.Errorf("nic %d: %w", n.Index, err)
	}
	return nil
}

// Deadline is when the loop has to go on though nothing comes, boottime ns.
func (n *Loop) Deadline() int64 {
	d := n.core.NextDeadline()
	if n.echoEvery > 0 {
		d = min(d, n.echoAt)
	}
	return d
}

// startEchoes has P ask S's kernel for echoes from now on (R20). They come from
// this loop: when it does not turn, nothing is released, and the PVM is muted.
func (n *Loop) startEchoes(every, lease time.Duration) error {
	n.echoEvery, n.echoAt = int64(every), n.DP.Now()
	return n.DP.SetLeaseDuration(lease)
}

func (n *Loop) echo() error {
	now := n.DP.Now()
	if n.echoEvery == 0 || now < n.echoAt {
		return nil
	}
	n.echoAt = now + n.echoEvery
	return n.DP.RequestEcho()
}

func (n *Loop) commands() {
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
func (n *Loop) poll(wait time.Duration) error {
	evs, err := n.DP.Poll(wait, n.evs[:0])
	n.evs = evs
	if err != nil {
		return err
	}
	now := n.DP.Now()
	unpark := false
	for i := range evs {
		ev := &evs[i]
		if n.Primary != nil && n.Primary.Owners().Holds(ev) {
			n.take(ev.Seg.Tuple, ev.Kind)
			if ev.Kind == compare.EvOpened {
				continue // it came back with what waits
			}
		}
		if ev.Kind == compare.EvPark {
			unpark = !n.parked
		}
		n.takeIn(now, ev)
		if ev.Kind == compare.EvOpened && !(n.fastOn && n.Primary.Owners().Kernel(&ev.Seg.Tuple)) {
			n.take(ev.Seg.Tuple, compare.EvFreeze)
		}
	}
	if unpark {
		// Parked just before parking ended.
		n.step(now, &compare.Event{Kind: compare.EvUnpark})
	}
	return nil
}

// takeIn gives the core an event of the kernel's.
func (n *Loop) takeIn(now int64, ev *compare.Event) {
	if ev.Kind == compare.EvPVM {
		if ev.Seg.At < n.since {
			// Its sums are those of keys that are gone. The guest repeats it.
			if ev.Seg.Slot != compare.NoSlot {
				n.effs = append(n.effs, compare.Effect{Op: compare.OpFree, Slot: ev.Seg.Slot, Reason: compare.ReasonVoid})
			}
			return
		}
		if n.frozen && len(n.captured) < maxCaptured {
			n.captured = append(n.captured, ev.Seg.At)
		}
	}
	n.step(now, ev)
}

// step gives the core an event; what it wants done waits for apply.
func (n *Loop) step(now int64, ev *compare.Event) {
	n.effs = n.core.Step(now, ev, n.effs)
}

// stepNow is step and apply.
func (n *Loop) stepNow(ev compare.Event) {
	n.step(n.DP.Now(), &ev)
	n.apply()
}

// apply carries out the effects so far, and those of what they ask for.
func (n *Loop) apply() {
	for len(n.effs) > 0 {
		n.applyOnce()
	}
}

func (n *Loop) applyOnce() {
	var acked []compare.Event
	var owners []compare.Effect
	for i := range n.effs {
		switch e := &n.effs[i]; e.Op {
		case compare.OpGrant, compare.OpTake, compare.OpForget, compare.OpEven:
			owners = append(owners, *e)
		case compare.OpCheckpoint:
			n.want(Request{At: time.Now(), NIC: n.Index, Flow: e.Tuple.String(), Reason: e.Reason.String(), Where: e.Where, Diverged: e.Reason.Diverges()})
		case compare.OpAdopt:
			if ack, ok := n.DP.Acked(e.Tuple); ok {
				acked = append(acked, adoption(e.Tuple, ack))
			}
		}
	}
	// What could not be sent is lost as on any link, and the guests repeat it.
	if err := n.DP.Apply(n.effs); err != nil {
		n.applyErr++
		if now := time.Now(); now.Sub(n.applyLog) >= time.Second {
			n.applyLog = now
			n.log.Warn("frames lost on the way out", "err", err, "times", n.applyErr)
		}
	}
	n.effs = n.effs[:0]
	for i := range acked {
		n.step(n.DP.Now(), &acked[i])
	}
	for i := range owners {
		n.changeOwner(&owners[i])
	}
}

// adoption is the event of what the remote of a connection of an earlier daemon has
// acknowledged (R23).
func adoption(t compare.Tuple, ack uint32) compare.Event {
	return compare.Event{Kind: compare.EvAdopt, Seg: compare.Segment{Tuple: t, Seq: ack, Slot: compare.NoSlot}}
}
