// SPDX-License-Identifier: Apache-2.0

package nicloop

import (
	"errors"
	"math"
	"time"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
)

// Freeze has P release nothing until Thaw or Commit (R13, R15).
func (n *Loop) Freeze() error {
	n.frozen, n.captured = true, n.captured[:0]
	err := n.fastPath(false)
	n.stepNow(compare.Event{Kind: compare.EvFreeze})
	return err
}

// Thaw has P release again: the checkpoint did not happen.
func (n *Loop) Thaw() error {
	n.frozen = false
	n.stepNow(compare.Event{Kind: compare.EvThaw})
	return n.fastPath(true)
}

// Commit lets leave what the PVM sent before at (R14) and reports whether it sent
// anything between stop and resume.
func (n *Loop) Commit(epoch uint32, at, stop, resume int64) (inside bool, err error) {
	// Frames captured before the commit point may still be on their way.
	began := n.DP.Now()
	for {
		if err := n.poll(0); err != nil {
			return false, err
		}
		if len(n.evs) == 0 || newest(n.evs) > resume {
			break
		}
		if n.DP.Now()-began > int64(maxCatchUp) {
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
	return inside, n.fastPath(true)
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

// SetMode sets the mode, at once or when no foreign program is in front any more.
func (n *Loop) SetMode(m datapath.Mode) error {
	n.mode = m
	if n.intruder != "" {
		return nil
	}
	return n.DP.SetMode(m)
}

// Restore takes over what an earlier daemon's tables hold (R23). The loop does not
// Run yet.
func (n *Loop) Restore(idle time.Duration) {
	a := n.DP.Recovered()
	n.mode, n.parked = a.Mode, a.Mode == datapath.ModePark
	if n.Primary == nil {
		return
	}
	now := n.DP.Now()
	for _, r := range a.Remotes {
		if now-r.At <= int64(idle) {
			ev := adoption(r.Tuple, r.Ack)
			n.step(now, &ev)
		}
	}
}

// RestoreMode has the kernel go on in the mode of the earlier daemon.
func (n *Loop) RestoreMode() error { return n.SetMode(n.mode) }

// Park holds back the SVM's input and drops its output (R13).
func (n *Loop) Park() error {
	n.parked = true
	return n.SetMode(datapath.ModePark)
}

// Reset follows a checkpoint that was loaded (S): offsets and copies are those of
// another SVM. Output stays shut.
func (n *Loop) Reset(epoch uint32) error {
	if err := n.DP.ResetOffsets(); err != nil {
		return err
	}
	n.stepNow(compare.Event{Kind: compare.EvReset, Epoch: epoch})
	return nil
}

// Unpark lets the SVM's output out and its input in, first what was parked. unsure: a checkpoint may have been loaded of
// which nobody knows yet.
func (n *Loop) Unpark(unsure bool) error {
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
	if err := n.SetMode(datapath.ModeRun); err != nil {
		return err
	}
	if unsure {
		n.stepNow(compare.Event{Kind: compare.EvUnsure})
	}
	n.stepNow(compare.Event{Kind: compare.EvUnpark})
	return nil
}

// Offsets counts the connections with an offset (S).
func (n *Loop) Offsets() (known int, err error) {
	err = n.DP.Offsets(func(compare.Tuple, datapath.Offset) { known++ })
	return known, err
}

// Install begins a session. On S new digest keys make the copies void.
func (n *Loop) Install(s datapath.Session) error {
	if n.Secondary != nil && *n.Keys != s.Digest {
		n.stepNow(compare.Event{Kind: compare.EvReset})
		*n.Keys = s.Digest
	}
	return n.DP.InstallSession(s)
}

// OwnKeys has the kernel digest with this loop's keys (P). The guest repeats what was captured
// under others.
func (n *Loop) OwnKeys(s datapath.Session) error {
	err := errors.Join(n.fastPath(false), n.DP.InstallSession(s))
	n.since = n.DP.Now()
	return err
}

// Hold begins replication (P): what the guest sends is held, and leaves under a lease. Where P releases nothing
// before the first commit (R18) the kernel does not either.
func (n *Loop) Hold(echoEvery, lease time.Duration) error {
	// A host that transmitted alone had no lease.
	return errors.Join(n.DP.SetLeaseUntil(0), n.SetMode(datapath.ModeHold), n.startEchoes(echoEvery, lease), n.fastPath(!n.frozen))
}

// Shut: nothing in or out, and no echoes.
func (n *Loop) Shut() error {
	n.echoEvery = 0
	// No program is left that takes an echo when the mode is set.
	return errors.Join(n.SetMode(datapath.ModeShut), n.DP.SetLeaseUntil(0))
}

// Renew begins a pair with an empty core; the guest goes on in mid-stream.
func (n *Loop) Renew(cfg compare.Config, epoch uint32) error {
	if err := n.fastPath(false); err != nil {
		return err
	}
	if n.fast != nil {
		if err := n.fast.ForgetAll(); err != nil {
			return err
		}
	}
	cfg.Epoch = epoch
	n.Primary = compare.NewPrimary(cfg, n.Keys)
	n.core = n.Primary
	n.frozen, n.captured = false, nil
	return nil
}

// Solo has P's guest transmit alone.
func (n *Loop) Solo() error {
	n.echoEvery, n.frozen = 0, false
	if err := errors.Join(n.fastPath(false), n.DP.SetLeaseUntil(math.MaxInt64)); err != nil {
		return err
	}
	n.stepNow(compare.Event{Kind: compare.EvSolo})
	return n.SetMode(datapath.ModeSolo)
}

// Quiet has S send nothing to anybody; what its guest sends is kept (R21 i).
func (n *Loop) Quiet() error { return n.SetMode(datapath.ModeQuiet) }

// Sweep ends connections that are closed, or idle (R11). While S is quiet none ends: nothing that the guest
// repeats, or answers, reaches anybody. Any goroutine.
func (n *Loop) Sweep(linger, idle time.Duration) error {
	quiet := true
	if _ = n.Do(func() error { quiet = n.mode == datapath.ModeQuiet; return nil }); quiet {
		return nil // or the loop has ended
	}
	_, err := n.DP.Sweep(linger, idle)
	return err
}

// TakeOver has the SVM transmit, first what the clients may not have received (R22). doubt: a checkpoint may have been
// loaded of which nobody knows. Then the copies may be another guest's, and the SVM repeats what is its own.
func (n *Loop) TakeOver(guard uint32, doubt bool) error {
	if doubt {
		n.stepNow(compare.Event{Kind: compare.EvReset})
	}
	if err := n.DP.TakeOver(guard, doubt); err != nil {
		return err
	}
	if err := n.DP.Offsets(func(t compare.Tuple, o datapath.Offset) {
		seg := compare.Segment{Tuple: t, Inc: o.Incarnation, Inherited: o.Inherited, ClientAck: o.ClientAck, Slot: compare.NoSlot}
		n.step(n.DP.Now(), &compare.Event{Kind: compare.EvRemote, Seg: seg})
	}); err != nil {
		return err
	}
	if err := n.DP.SetLeaseUntil(math.MaxInt64); err != nil {
		return err
	}
	if err := n.SetMode(datapath.ModeSolo); err != nil {
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
