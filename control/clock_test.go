// SPDX-License-Identifier: Apache-2.0

package control

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/nicloop"
)

// TestPauses: each stop counts until the guest goes on, once, and what was before a boot does not.
func TestPauses(t *testing.T) {
	var p Pauses
	p.resumed(1000) // its STOP came before there was a connection
	p.stopped(2000)
	p.stopped(2500) // of QEMU, of a guest that was stopped already
	p.resumed(3000)
	p.resumed(9000)
	p.stopped(10_000)
	p.resumed(9_999) // the host's clock was set
	if p.sum != 1000 {
		t.Errorf("stood still for %d ns, want 1000", p.sum)
	}
	p.stopped(11_000)
	if p.booted(); p != (Pauses{}) {
		t.Errorf("after a boot %+v", p)
	}
	p = Pauses{sum: 700, pvms: 5000}
	if p.copied(70); p.sum != 5070 {
		t.Errorf("the SVM's are %d ns, want the PVM's and its own last one: 5070", p.sum)
	}
}

func TestClockDue(t *testing.T) {
	now := time.Now()
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	for _, x := range []struct {
		name string
		gc   guestClock
		want bool
	}{
		{"never asked", guestClock{}, true},
		{"is being asked", guestClock{asking: true}, false},
		{"nothing happened since", guestClock{looked: ago(time.Hour), counted: 5, Pauses: &Pauses{sum: 5}}, false},
		{"a long pause", guestClock{looked: ago(clockEvery), counted: 5, Pauses: &Pauses{sum: 5 + int64(clockBehind)}}, true},
		{"a short one", guestClock{looked: ago(clockEvery), counted: 5, Pauses: &Pauses{sum: 4 + int64(clockBehind)}}, false},
		{"a long pause just after the last time", guestClock{looked: ago(clockEvery - 1), Pauses: &Pauses{sum: int64(time.Second)}}, false},
		{"it did not answer", guestClock{looked: ago(clockEvery), err: net.ErrClosed}, true},
		{"it did not answer just now", guestClock{looked: now, err: net.ErrClosed}, false},
		{"the guest booted", guestClock{looked: ago(clockEvery), counted: 5}, true},
	} {
		if x.gc.Pauses == nil {
			x.gc.Pauses = new(Pauses)
		}
		x.gc.every = clockEvery
		if got := x.gc.due(now); got != x.want {
			t.Errorf("%s: due is %t", x.name, got)
		}
	}
}

// playedAgent is a guest's agent and clock.
type playedAgent struct {
	path string

	mu     sync.Mutex
	behind time.Duration
	mute   bool
	set    []time.Duration // how far behind this host's clock, each time
}

func playAgent(t *testing.T, behind time.Duration) *playedAgent {
	t.Helper()
	a := &playedAgent{path: filepath.Join(t.TempDir(), "agent"), behind: behind}
	l, err := net.Listen("unix", a.path)
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	work.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			for r := bufio.NewScanner(c); r.Scan(); {
				fmt.Fprint(c, a.answer(r.Text()))
			}
			c.Close()
		}
	})
	t.Cleanup(func() { l.Close(); work.Wait() })
	return a
}

func (a *playedAgent) answer(line string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var command struct {
		Execute   string
		Arguments struct{ ID, Time int64 }
	}
	if err := json.Unmarshal([]byte(strings.TrimPrefix(line, "\xff")), &command); err != nil || a.mute {
		return ""
	}
	switch command.Execute {
	case "guest-sync-delimited":
		return fmt.Sprintf("\xff{\"return\": %d}\n", command.Arguments.ID)
	case "guest-get-time":
		return fmt.Sprintf("{\"return\": %d}\n", time.Now().Add(-a.behind).UnixNano())
	case "guest-set-time":
		a.behind = time.Since(time.Unix(0, command.Arguments.Time))
		a.set = append(a.set, a.behind)
		return "{\"return\": {}}\n"
	}
	return "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"?\"}}\n"
}

func (a *playedAgent) change(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

// TestPausesKept: the other host knows for how long the guest has stood still, also for a daemon that is started again.
func TestPausesKept(t *testing.T) {
	pair := newPair(t)
	p, s := hosts(t, pair)
	startReplicating(p, s)
	p.d.post(func() { p.d.clock.sum += int64(time.Hour) })
	p.d.checkpoints.want(nicloop.Request{NIC: -1, Reason: "test"})
	long := func(st api.Status) bool { return st.GuestClock.PausedSeconds >= 3600 }
	s.await("the PVM's pauses", long)
	p.end()
	p.start().await("the pauses that the secondary knows", long)
}

// TestGuestClock: the PVM's clock is set when it is behind, with a checkpoint after that, and neither is done when it
// is not; the SVM's is only looked at.
func TestGuestClock(t *testing.T) {
	pair := newPair(t)
	p, s := hosts(t, pair)
	pvm, svm := playAgent(t, time.Hour), playAgent(t, time.Hour)
	p.opt.GuestAgent, s.opt.GuestAgent = pvm.path, svm.path
	p.opt.clockEvery, s.opt.clockEvery = 50*time.Millisecond, 50*time.Millisecond
	p.start()
	p.await("a clock that is set before there is a secondary", func(st api.Status) bool { return st.GuestClock.Sets > 0 })
	s.start()
	st := p.await("a clock that was set, and a checkpoint for it", func(st api.Status) bool {
		return slices.ContainsFunc(st.Checkpoints, func(c api.Checkpoint) bool {
			return c.Cause == "the guest's clock was set" && c.Result == "committed"
		})
	})
	if c := st.GuestClock; !c.Agent || c.Sets != 1 || c.BehindSeconds == nil || *c.BehindSeconds < 3599 || *c.BehindSeconds > 3660 || c.Error != "" {
		t.Errorf("the clock was set: %+v", &c)
	}
	if c := st.GuestClock; c.PausedSeconds <= 0 {
		t.Errorf("a checkpoint is a pause: %+v", &c)
	}
	st = s.await("the SVM's clock", func(st api.Status) bool { return st.GuestClock.BehindSeconds != nil })
	if c := st.GuestClock; c.Sets != 0 || *c.BehindSeconds < 3599 {
		t.Errorf("the SVM's clock: %+v", &c)
	}
	svm.change(func() {
		if svm.set != nil {
			t.Errorf("the SVM's clock was set: %v", svm.set)
		}
	})

	// A pause that is long enough for a look, after which the clock turns out to be right.
	pvm.change(func() { pvm.behind = -time.Millisecond })
	p.d.post(func() { p.d.clock.sum += int64(time.Second) })
	st = p.await("another look", func(st api.Status) bool { return *st.GuestClock.BehindSeconds < 1 })
	if st.GuestClock.Sets != 1 {
		t.Errorf("the clock was right: %+v", &st.GuestClock)
	}

	// An agent that does not answer holds nothing up, and is asked again.
	pvm.change(func() { pvm.mute, pvm.behind = true, time.Hour })
	p.d.post(func() { p.d.clock.sum += int64(time.Second); p.d.clock.answer = 50 * time.Millisecond })
	st = p.await("an error", func(st api.Status) bool { return st.GuestClock.Error != "" })
	if !strings.Contains(st.GuestClock.Error, "is qemu-guest-agent running in the guest?") {
		t.Errorf("%+v", &st.GuestClock)
	}
	p.d.checkpoints.want(nicloop.Request{NIC: -1, Reason: "test"})
	p.await("a checkpoint", func(now api.Status) bool { return now.CheckpointsDone > st.CheckpointsDone })
	pvm.change(func() { pvm.mute = false })
	p.await("an answer", func(st api.Status) bool { return st.GuestClock.Error == "" && st.GuestClock.Sets == 2 })
}
