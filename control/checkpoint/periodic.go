// SPDX-License-Identifier: Apache-2.0

package checkpoint

import "time"

// Periodic mode (R28) is for guests that differ all the time: a checkpoint is made at each epoch's end, and differences ask
// for none. It begins by itself where they have asked too often, and ends by itself: when nothing waits any more, when it is
// to be tried without, and where checkpoints are not to be had. What may leave, and when, is as without it.

const (
	judged     = int64(20 * time.Second) // the rate is judged over so long, or for as long as enough divergences take
	idle       = int64(5 * time.Second)  // it ends when for so long nothing has waited for a commit
	trial      = int64(time.Minute)      // so soon behind its end it was left in vain, if the guests go on as before
	trialShare = 4                       // then this part of what is judged otherwise is enough
	runShare   = 2                       // the guest runs for at least so many times its pause between two commits
)

// periodic is the mode, and what leads to it.
type periodic struct {
	on           bool
	since, until int64 // when it began, and when it is tried without
	busy         int64 // when a commit last had something leave that waited
	begun        int   // how often it has

	wanted, attempt bool    // divergence wants the next attempt, wanted the one under way
	hurry           bool    // what wants the next one is not to wait for the epoch's end
	at              []int64 // the last commits that divergence asked for, the oldest first
	lasts           int64   // how long it lasts the next time; 0: as long as at first
	tried           int64   // when it last ended; 0: never
	pause           int64   // the guest's, lately
}

// enough is for how many divergences the mode begins, and within how long.
func (c *Primary) enough() (n int, within int64) {
	n = max(c.cfg.PeriodicAbove*int(judged/int64(time.Second))/60, c.cfg.PeriodicEnough)
	if t := c.periodic.tried; t != 0 && c.now-t < trial {
		n = max(n/trialShare, c.cfg.PeriodicEnough/2, 1)
	}
	return n, int64(n-1) * int64(time.Minute) / int64(c.cfg.PeriodicAbove)
}

// judge takes a commit in: it may be one divergence too many, or the mode's last.
func (c *Primary) judge(pause int64) {
	m := &c.periodic
	m.pause = (m.pause + max(0, pause)) / 2 // as one pause is a noisy measure
	diverged := m.attempt
	m.attempt = false
	switch {
	case c.cfg.PeriodicAbove == 0:
	case m.on:
		if c.now >= m.until || c.now-m.busy >= idle {
			m.on, m.tried = false, c.now
		}
	case diverged:
		m.at = append(m.at, c.now)
		n, within := c.enough()
		m.at = m.at[max(0, len(m.at)-n):]
		if len(m.at) == n && c.now-m.at[0] <= within {
			c.beginPeriodic()
		}
	}
}

func (c *Primary) beginPeriodic() {
	m := &c.periodic
	if m.tried != 0 && c.now-m.tried < trial {
		m.lasts = min(2*m.lasts, c.cfg.PeriodicMost)
	} else {
		m.lasts = c.cfg.PeriodicFirst
	}
	m.on, m.since, m.busy, m.until, m.at, m.wanted = true, c.now, c.now, c.now+m.lasts, nil, false
	m.begun++
}

// endPeriodic: no checkpoint can be made, or one failed.
func (c *Primary) endPeriodic() { c.periodic.on, c.periodic.at = false, nil }

// due is when an attempt that is wanted may begin. In periodic mode it is at the epoch's end, or sooner for what is no
// divergence, but not before the guest has run for long enough since the last commit. A doubt waits for neither.
func (c *Primary) due() int64 {
	m := &c.periodic
	if !m.on || c.doubt != "" {
		return c.notBefore
	}
	at := c.notBefore
	if !c.cfg.noR28Share {
		at = max(at, c.lastDone+runShare*m.pause)
	}
	if !m.hurry {
		at = max(at, c.lastDone+c.cfg.Epoch)
	}
	return at
}

// Periodic reports whether periodic mode is on, since when, until when at most, and how often it began.
func (c *Primary) Periodic() (on bool, since, until int64, begun int) {
	m := &c.periodic
	return m.on, m.since, m.until, m.begun
}
