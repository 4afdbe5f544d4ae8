// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"fmt"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qmp"
)

// A secondary may be sick in a way that only a try to replicate shows, and each try
// costs the guest that serves: a copy of its disks and memory, and a while in which
// nothing leaves when the secondary then hangs at a checkpoint. So the tries back off.
var (
	syncAgain = backoff{first: 500 * time.Millisecond, last: time.Minute}
	// endAgain paces the orders to a QEMU that does not end replication.
	endAgain = backoff{first: 100 * time.Millisecond, last: 5 * time.Second}
	// prepAgain paces what makes S's QEMU ready: a certificate may be renewed, a port become free.
	prepAgain = backoff{first: 500 * time.Millisecond, last: time.Minute}
)

// tries are P's to replicate, and why the last ones came to nothing.
type tries struct {
	again  backoff
	failed int       // in a row
	why    string    // the last one failed
	due    time.Time // the next one
	timer  *time.Timer
	paired time.Time // since when a pair lasts; zero: there is none

	atOnce bool // a mutation, only tests set it: the next try does not wait
}

// fail counts a try that came to nothing, or a pair that did not last.
func (t *tries) fail(why string) {
	t.failed++
	t.why, t.due = why, time.Now().Add(t.again.take())
	if t.atOnce {
		t.due = time.Now()
	}
}

// over is the end of a pair, if there was one.
func (t *tries) over() {
	if !t.paired.IsZero() {
		t.fail(fmt.Sprintf("the secondary was lost after %v", time.Since(t.paired).Round(100*time.Millisecond)))
		t.paired = time.Time{}
	}
}

// lasts looks at a pair's age when a checkpoint was committed. One that has outlived the
// wait before it ten times over has shown that its secondary is well.
func (t *tries) lasts() {
	if !t.paired.IsZero() && time.Since(t.paired) > 10*max(t.again.next, time.Second) {
		t.failed, t.why = 0, ""
		t.again.reset()
	}
}

// replication is what begins, or what came of the tries so far; nil: nothing.
func (re *replicator) replication() *api.Replication {
	r := api.Replication{
		What: re.syncing.What, Done: re.syncing.Done, Total: re.syncing.Total, Rate: re.syncing.Rate, Dirtied: re.syncing.Dirtied,
		Failed: re.tries.failed, Why: re.tries.why,
	}
	if r == (api.Replication{}) {
		return nil
	}
	if re.tries.failed > 0 && re.d.failover.p.State() != failover.PrimarySync && re.d.failover.p.State() != failover.PrimaryPair {
		r.Next = &re.tries.due
	}
	return &r
}

func (t *tries) String() string {
	if t.failed == 0 {
		return ""
	}
	s := fmt.Sprintf("try %d to replicate failed: %s", t.failed, t.why)
	if left := time.Until(t.due); left > 0 {
		s += fmt.Sprintf("; the next is due in %v", left.Round(time.Second))
	}
	return s
}

// mustWait reports whether a session has to wait: for QEMU to end the last pair, or, when a try
// to replicate would follow, until that is due. The machine gets it later: until then
// the guest serves alone, and orders are taken.
func (re *replicator) mustWait(follows bool) bool {
	fo := re.d.failover
	if re.ending {
		return true // endReplication comes back to it
	}
	left := time.Until(re.tries.due)
	if left <= 0 || follows || fo.p.State() != failover.PrimaryStart && fo.p.State() != failover.PrimarySolo {
		return false
	}
	if re.tries.timer != nil {
		re.tries.timer.Stop()
	}
	re.tries.timer = time.AfterFunc(left, func() { re.d.post(re.paired) })
	return true
}

// endReplication has this host's QEMU go on without the other's, until it does. A QEMU
// that does not decides nothing: this host has won, its guest serves, and whether that
// is dead its monitor shows (watchQEMU).
func (re *replicator) endReplication() {
	fo := re.d.failover
	re.ending = true
	unstarted := re.d.guest.unstarted
	re.d.qmp.procedure("go on alone", func(ctx context.Context, m *qmp.Monitor) error {
		if err := qemu.PrimaryFailover(ctx, m, fo.Disks); err != nil {
			return err
		}
		if unstarted {
			if err := qemu.Unmigrate(ctx, m); err != nil {
				return err
			}
		}
		if _, state, err := m.Status(); err != nil || state != "prelaunch" {
			return err
		}
		return qemu.Cont(m) // it never ran: an operator has it begin alone
	}, func(err error) {
		if err == nil || fo.p.State() != failover.PrimarySolo {
			re.ending, re.unended = false, ""
			re.endAgain.reset()
			re.paired() // a session may have waited
			return
		}
		if fo.fencesUnended {
			re.d.failover.step(failover.Event{Kind: failover.EvQEMUDead})
			return
		}
		wait := re.endAgain.take()
		if err.Error() != re.unended {
			re.d.log.Error("QEMU has not ended replication: the guest goes on, and the order is repeated", "err", err, "in", wait)
		}
		re.unended = err.Error()
		time.AfterFunc(wait, func() { re.d.post(re.endReplication) })
	})
}
