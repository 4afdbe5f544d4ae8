// SPDX-License-Identifier: Apache-2.0

package control

import (
	"time"

	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/journal"
)

// maxMute is how many checkpoints in a row, and how many times compare.timeout, an SVM may
// send nothing while the PVM's output waits for it. Both count: checkpoints may come
// faster than an SVM on a busy host answers, or more slowly than compare.timeout.
const maxMute = 3

// muteWait is how long output waits for a record, at least, before its absence counts: at
// a checkpoint there is always some that has just been captured.
const muteWait = 20 * time.Millisecond

// muteWatch finds an SVM that is mute (P): each checkpoint makes it the PVM's copy and
// releases what waits, so that clients notice nothing, but it could not serve them.
type muteWatch struct {
	records uint64 // digest records of the SVM until the last commit
	commits int    // in a row for which output waited, and no record had come
	since   int64  // when the last record had come, at the latest; boottime ns
}

// commit takes a commit in, and reports whether the SVM is mute: records is how many
// digest records there have been, waited for how long output waited for one. In periodic mode none is: there the SVM becomes
// the PVM's copy so often that one on a busy host may come too late for one epoch after the other.
func (w *muteWatch) commit(now int64, records uint64, waited, timeout time.Duration, periodic bool) bool {
	waits := waited >= muteWait
	switch {
	case records != w.records, periodic:
		*w = muteWatch{records: records, since: now}
	case w.commits == 0 && !waits:
		w.since = now // nothing was expected of it
	case waits:
		w.commits++
	}
	if w.commits < maxMute || now-w.since < maxMute*int64(timeout) {
		return false
	}
	*w = muteWatch{records: records, since: now}
	return true
}

// dropMute gives up an SVM that is mute at a commit.
func (fo *failoverPart) dropMute(records uint64, waited time.Duration, periodic bool) {
	if fo == nil || !fo.mute.commit(fo.d.now(), records, waited, fo.d.opt.Compare.Timeout, periodic) {
		return
	}
	fo.d.log.Error("the SVM sends nothing, whatever it is made a copy of: it is given up", "checkpoints", maxMute)
	fo.d.event(journal.Failover, "the SVM is mute", nil)
	fo.step(failover.Event{Kind: failover.EvPeerDead})
}
