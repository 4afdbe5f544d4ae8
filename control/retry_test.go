// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/qmptest"
)

// unended has a covered pair lose its secondary, while the primary's QEMU refuses to end
// replication.
func unended(t *testing.T, mutation bool) (*side, *qmptest.Pair) {
	t.Helper()
	pair := newPair(t)
	p, s, _ := lives(t, pair)
	p.opt.Failover.fencesUnended = mutation
	startCovered(p, s)
	pair.Primary.SetReply("x-colo-lost-heartbeat", `"error": {"class": "GenericError", "desc": "busy"}`)
	pair.Secondary.Close()
	s.ends(ErrAfresh)
	return p, pair
}

// TestUnendedReplication: a primary that has won speaks alone, and goes on to when its
// QEMU does not end replication. It is told again until it does.
func TestUnendedReplication(t *testing.T) {
	p, pair := unended(t, false)
	p.await("the reason", func(st api.Status) bool { return st.State == "solo" && strings.Contains(st.Detail, "busy") })
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := pair.Primary.Await(ctx, "x-colo-lost-heartbeat", 4); err != nil {
		t.Fatal(err)
	}
	if mode := p.path.left().Mode; mode != datapath.ModeSolo {
		t.Errorf("the NIC is in mode %d", mode)
	}
	pair.Primary.SetReply("x-colo-lost-heartbeat", "")
	p.await("the end", func(st api.Status) bool { return st.State == "solo" && !strings.Contains(st.Detail, "busy") })
}

// TestUnendedReplicationMutation: without the rule such a primary is fenced.
func TestUnendedReplicationMutation(t *testing.T) {
	p, _ := unended(t, true)
	p.ends(ErrFenced)
}

// failedTries has five tries to replicate come to nothing, and returns how long was waited
// before each of the last four.
func failedTries(t *testing.T, mutation bool) (pair *qmptest.Pair, p, s *side, waits []time.Duration) {
	t.Helper()
	pair = newPair(t)
	p, s, _ = lives(t, pair)
	p.opt.Failover.again = backoff{first: 100 * time.Millisecond, last: 400 * time.Millisecond}
	p.opt.Failover.triesAtOnce = mutation
	pair.Primary.SetCOLO("none")
	pair.Secondary.SetCOLO(qmptest.Incoming)
	pair.Primary.SetReply("query-migrate", `"return": {"status": "none"}`)
	pair.Primary.SetReply("migrate-set-capabilities", `"return": {}`)
	pair.Primary.SetReply("migrate", `"error": {"class": "GenericError", "desc": "no room at the other host"}`)
	p.start()
	var last time.Time
	for try := 1; try <= 5; try++ {
		s.start()
		s.ends(ErrAfresh) // P told it that nothing came of it
		s.opt.Fresh = true
		now := time.Now()
		if try > 1 {
			waits = append(waits, now.Sub(last))
		}
		last = now
		st := p.await("the reason", func(st api.Status) bool { return st.Replication != nil && st.Replication.Failed == try })
		if r := st.Replication; st.State != "start" || !strings.Contains(r.Why, "no room") || r.Next == nil || !strings.Contains(st.Detail, "no room") {
			t.Errorf("try %d: status %+v, %+v", try, st, r)
		}
	}
	return pair, p, s, waits
}

// backedOff are the least waits of failedTries.
var backedOff = [...]time.Duration{90 * time.Millisecond, 180 * time.Millisecond, 360 * time.Millisecond, 360 * time.Millisecond}

// TestTriesBackOffMutation: without the rule the tries follow each other at once.
func TestTriesBackOffMutation(t *testing.T) {
	_, _, _, waits := failedTries(t, true)
	for i, least := range backedOff {
		if waits[i] < least {
			return
		}
	}
	t.Errorf("the waits were %v", waits)
}

// TestTriesBackOff: tries to replicate that come to nothing are made less and less often.
// The status says why, and when the next one is due; one that succeeds is the last.
func TestTriesBackOff(t *testing.T) {
	pair, p, s, waits := failedTries(t, false)
	for i, least := range backedOff {
		if waits[i] < least {
			t.Errorf("the wait before try %d was %v", i+2, waits[i])
		}
	}
	pair.Primary.SetReply("migrate", "")
	pair.Primary.SetCOLO("primary")
	pair.Primary.SetReply("query-migrate", "")
	s.start()
	p.await("a pair", func(st api.Status) bool { return st.State == "checkpointing" }) // its first

	// A connection to QEMU that breaks is no other secondary.
	pair.Primary.SetFault(qmptest.Garbage, 0)
	p.await("an error", func(st api.Status) bool { return st.QMP.Error != "" && !st.QMP.Connected })
	pair.Primary.SetFault(qmptest.None, 0)
	since := p.await("QEMU", func(st api.Status) bool { return st.QMP.Connected }).QMP.Since
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	<-ctx.Done() // the time in which it was given up
	if st := p.await("a status", func(api.Status) bool { return true }); st.State != "checkpointing" || !st.QMP.Since.Equal(since) {
		t.Errorf("behind a new connection to QEMU: %s, %s", st.State, st.Detail)
	}
	s.end()
}

// A pair that did not last is a try that failed; one that did makes the waits short again.
func TestTriesForget(t *testing.T) {
	tr := tries{again: syncAgain}
	for range 20 {
		tr.paired = time.Now()
		tr.over()
	}
	if wait := time.Until(tr.due); tr.failed != 20 || wait > time.Minute || wait < 50*time.Second {
		t.Errorf("%d failed, and the next is due in %v", tr.failed, wait)
	}
	tr.paired = time.Now().Add(-time.Minute)
	if tr.lasts(); tr.failed != 20 {
		t.Error("a minute is not ten times the wait before")
	}
	tr.paired = time.Now().Add(-11 * time.Minute)
	if tr.lasts(); tr.failed != 0 || tr.String() != "" {
		t.Errorf("a pair that lasted: %s", tr.String())
	}
	tr.over()
	if wait := time.Until(tr.due); tr.failed != 1 || wait > time.Second {
		t.Errorf("%d failed, and the next is due in %v", tr.failed, wait)
	}
}

// TestGivenUpSVM: an SVM that was given up, and that lockstep cannot end because somebody else started it, is not offered to
// the primary again, which would copy memory and disks for nothing. status says so, until another QEMU waits.
func TestGivenUpSVM(t *testing.T) {
	pair := newPair(t)
	p, s, _ := lives(t, pair)
	s.opt.Failover.Begin.Anew = true
	p.start()
	s.start()
	s.await("what is to be done", func(st api.Status) bool {
		return !st.Peer.Connected && strings.Contains(st.Peer.Error, "it waits for no primary") && strings.Contains(st.Peer.Error, "end it")
	})
	pair.Secondary.SetCOLO(qmptest.Incoming)
	s.await("the session", func(st api.Status) bool { return st.Peer.Connected })
}
