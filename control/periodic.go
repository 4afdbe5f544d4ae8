// SPDX-License-Identifier: Apache-2.0

package control

import (
	"log/slog"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/journal"
)

// isPeriodic reports whether periodic mode (R28) is on.
func (ck *checkpoints) isPeriodic() bool {
	if ck.primary == nil {
		return false
	}
	on, _, _, _ := ck.primary.Periodic()
	return on
}

// level is for what is logged of a checkpoint: in periodic mode there are too many.
func (ck *checkpoints) level() slog.Level {
	if ck.isPeriodic() {
		return slog.LevelDebug
	}
	return slog.LevelInfo
}

// periodicEvent notes that periodic mode has begun or ended. Its checkpoints are in no event of their own.
func (ck *checkpoints) periodicEvent() {
	on := ck.isPeriodic()
	if on == ck.periodic {
		return
	}
	ck.periodic = on
	if on {
		_, since, until, _ := ck.primary.Periodic()
		ck.periodicFirst = ck.committed
		ck.d.log.Warn("periodic mode begins: the guests differ so often that a checkpoint is made at each epoch's end, with which what differs leaves",
			"epoch", ck.d.opt.Checkpoint.Epoch, "for", time.Duration(until-since))
		ck.d.event(journal.Periodic, "checkpoints because of divergence are above checkpoint.periodic_above", map[string]any{"state": "begins", "seconds": float64(until-since) / 1e9})
		return
	}
	why := "comparing is tried again"
	if n := len(ck.attempts); n > 0 && ck.attempts[n-1].Result != "committed" {
		why = "no checkpoint can be made: " + ck.attempts[n-1].Result
	}
	ck.d.log.Info("periodic mode ends", "cause", why, "checkpoints", ck.committed-ck.periodicFirst)
	ck.d.event(journal.Periodic, why, map[string]any{"state": "ends", "checkpoints": ck.committed - ck.periodicFirst})
}

// periodicStatus is what status shows of periodic mode; nil: it has never begun.
func (ck *checkpoints) periodicStatus() *api.Periodic {
	if ck.primary == nil {
		return nil
	}
	on, since, until, begun := ck.primary.Periodic()
	if begun == 0 {
		return nil
	}
	p := &api.Periodic{On: on, Begun: uint64(begun), EpochMS: milliseconds(int64(ck.d.opt.Checkpoint.Epoch))}
	if on {
		at := func(boottime int64) *time.Time {
			t := time.Now().Add(time.Duration(boottime - ck.d.now()))
			return &t
		}
		p.Since, p.Until = at(since), at(until)
	}
	return p
}
