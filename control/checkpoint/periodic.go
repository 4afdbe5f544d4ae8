// SPDX-License-Identifier: Apache-2.0

package checkpoint

import "time"

// Periodic mode (R28) is for guests that differ all the time: comparing stops, and output leaves at a commit
// at each epoch's end. It begins by itself where checkpoints that divergence asked for come too often, and ends by
// itself: when comparing is to be tried again, and where checkpoints are not to be had.

// CausePeriodic is the cause of an attempt that ends an epoch of periodic mode.
const CausePeriodic = "periodic mode"

const (
	judged     = int64(20 * time.Second) // the rate is judged over so long, or for as long as enough divergences take
	trial      = int64(time.Minute)      // so soon behind a try to compare, the mode was left in vain if the guest goes on as before
	trialShare = 4                       // then this part of what is judged otherwise is enough
	runShare   = 2                       // the guest runs for at least so many times its pause between two commits
)

// periodic is the mode, and what leads to it.
type periodic struct {
	on           bool
	since, until int64 // when it began, and when comparing is tried again
	begun        int   // how often it has

	wanted, attempt bool    // divergence wants the next attempt, wanted the one under way
	at              []int64 // the last commits that divergence asked for, the oldest first
	lasts           int64   // how long it lasts the next time; 0: as long as at first
	tried           int64   // when comparing was last tried again; 0: never
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
		if c.now >= m.until {
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
	m.on, m.since, m.until, m.at, m.wanted = true, c.now, c.now+m.lasts, nil, false
	m.begun++
}

// endPeriodic: no checkpoint can be made, or it failed. What both guests send leaves again, as without the mode.
func (c *Primary) endPeriodic() {
	if !c.cfg.noR28Fails {
		c.periodic.on, c.periodic.at = false, nil
	}
}

// rested is when the guest has run for long enough since the last commit. A doubt does not wait for that.
func (c *Primary) rested() int64 {
	if !c.periodic.on || c.doubt != "" || c.cfg.noR28Share {
		return 0
	}
	return c.lastDone + runShare*c.periodic.pause
}

// epochEnds is when the next attempt of periodic mode is due.
func (c *Primary) epochEnds() int64 { return max(c.notBefore, c.rested(), c.lastDone+c.cfg.Epoch) }

// Periodic reports whether periodic mode is on, since when, until when comparing is not tried, and how often it began.
func (c *Primary) Periodic() (on bool, since, until int64, begun int) {
	m := &c.periodic
	return m.on, m.since, m.until, m.begun
}
