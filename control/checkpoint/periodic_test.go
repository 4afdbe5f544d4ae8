// SPDX-License-Identifier: Apache-2.0

package checkpoint

import (
	"slices"
	"testing"
	"time"
)

// guests are two that differ, and all that a primary needs for checkpoints.
type guests struct {
	p       *Primary
	now     int64
	agenda  []appointment
	differ  time.Duration // so long after output can leave they differ again; 0: they agree
	pause   time.Duration // of a checkpoint
	broken  bool          // none is made
	frozen  bool
	asked   bool // a divergence waits for its commit
	began   []int64
	ended   []int64
	commits int
	ran     int64 // the guest's time between two commits, at the least
	resumed int64
	paused  int64 // in sum
}

func newGuests(above int, mutate ...func(*Config)) *guests {
	cfg := DefaultConfig()
	cfg.QMP, cfg.MinInterval = true, int64(20*time.Millisecond)
	cfg.PeriodicAbove, cfg.Epoch = above, int64(50*time.Millisecond)
	for _, f := range mutate {
		f(&cfg)
	}
	g := &guests{p: NewPrimary(cfg), pause: 10 * time.Millisecond}
	g.step(Event{Kind: EvQMPUp, OK: true})
	g.step(Event{Kind: EvLinkUp, OK: true})
	return g
}

// differs has the guests differ so long after output can leave.
func (g *guests) differs(after time.Duration) {
	g.differ = after
	g.step(Event{Kind: EvTick})
}

func (g *guests) after(d time.Duration, do func()) {
	g.agenda = append(g.agenda, appointment{at: g.now + int64(d), order: len(g.agenda), do: do})
}

func (g *guests) step(ev Event) {
	for _, fx := range slices.Clone(g.p.Step(g.now, ev)) {
		g.effect(fx)
	}
	switch on, _, _, _ := g.p.Periodic(); {
	case on && len(g.began) == len(g.ended):
		g.began = append(g.began, g.now)
	case !on && len(g.began) > len(g.ended):
		g.ended = append(g.ended, g.now)
	}
	if !g.frozen && !g.asked && g.differ > 0 {
		g.asked = true
		g.after(g.differ, func() { g.step(Event{Kind: EvWant, Diverged: true, Cause: "payload differs"}) })
	}
}

func (g *guests) effect(fx Effect) {
	switch k := fx.Epoch; fx.Op {
	case OpFreeze:
		g.frozen = true
	case OpThaw:
		g.frozen, g.asked = false, false
	case OpPrepare:
		if !g.broken {
			g.after(time.Millisecond, func() { g.step(Event{Kind: EvReady, Epoch: k}) })
		}
	case OpAsk:
		g.after(time.Millisecond, func() {
			g.ran, g.paused = min(g.ran, g.now-g.resumed), g.paused+int64(g.pause)
			g.step(Event{Kind: EvStop, At: g.now})
			g.step(Event{Kind: EvAsked, Epoch: k, OK: true})
			g.step(Event{Kind: EvPeerStopped, Epoch: k})
			g.step(Event{Kind: EvPeerResumed, Epoch: k})
			g.after(g.pause, func() { g.resumed = g.now; g.step(Event{Kind: EvResume, At: g.now}) })
		})
	case OpCOLO:
		g.step(Event{Kind: EvCOLO, Epoch: k, OK: true})
	case OpCommit:
		g.commits++
		if g.asked {
			g.step(Event{Kind: EvReleased})
		}
		g.frozen, g.asked = false, false
	}
}

// run lets time pass.
func (g *guests) run(d time.Duration) {
	for end := g.now + int64(d); ; {
		slices.SortStableFunc(g.agenda, func(a, b appointment) int { return int(a.at - b.at) })
		next := g.p.NextDeadline()
		switch {
		case len(g.agenda) > 0 && g.agenda[0].at <= min(next, end):
			a := g.agenda[0]
			g.agenda = g.agenda[1:]
			g.now = max(g.now, a.at)
			a.do()
		case next <= end:
			g.now = max(g.now, next)
			g.step(Event{Kind: EvTick})
		default:
			g.now = end
			return
		}
	}
}

// TestPeriodicBegins: where the guests differ more often than the config says, and only there. What somebody else
// asks for does not count.
func TestPeriodicBegins(t *testing.T) {
	for _, c := range []struct {
		name   string
		above  int
		differ time.Duration
		others time.Duration // an operator asks so often
		begins time.Duration // within; 0: not at all
	}{
		{name: "answers wait for a timeout of 1 s", above: 45, differ: time.Second, begins: 17 * time.Second},
		{name: "answers differ at once", above: 45, differ: time.Millisecond, begins: time.Second},
		{name: "30 a minute", above: 45, differ: 2 * time.Second},
		{name: "switched off", differ: time.Millisecond},
		{name: "an operator's", above: 45, others: 100 * time.Millisecond},
		{name: "few are enough to be above a low threshold, but not one", above: 1, differ: 20 * time.Second, begins: 2 * time.Minute},
		{name: "fewer than a low threshold", above: 1, differ: 70 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newGuests(c.above)
			g.differs(c.differ)
			if c.others > 0 {
				var ask func()
				ask = func() { g.step(Event{Kind: EvWant, Cause: "an operator asked for it"}); g.after(c.others, ask) }
				ask()
			}
			g.run(10 * time.Minute)
			switch {
			case (len(g.began) > 0) != (c.begins > 0):
				t.Errorf("the mode began at %v, after %d commits", g.began, g.commits)
			case c.begins > 0 && (g.began[0] > int64(c.begins)):
				t.Errorf("the mode began at %v, want within %v", time.Duration(g.began[0]), c.begins)
			}
		})
	}
}

// TestPeriodicEnds: comparing is tried again, ever more seldom while that is in vain, and the mode is over when the
// guests agree.
func TestPeriodicEnds(t *testing.T) {
	g := newGuests(45)
	g.differs(time.Second)
	g.run(25 * time.Minute)
	for i, want := range []time.Duration{30 * time.Second, time.Minute, 2 * time.Minute, 4 * time.Minute, 5 * time.Minute} {
		if len(g.ended) <= i {
			t.Fatalf("the mode ended at %v only", g.ended)
		}
		if lasted := time.Duration(g.ended[i] - g.began[i]); lasted < want || lasted > want+time.Second {
			t.Errorf("time %d: it lasted %v, want %v", i, lasted, want)
		}
		if i > 0 {
			if tried := time.Duration(g.began[i] - g.ended[i-1]); tried > 6*time.Second {
				t.Errorf("time %d: for %v answers waited for a timeout again", i, tried)
			}
		}
	}
	g.differ = 0
	g.run(6 * time.Minute)
	if on, _, _, _ := g.p.Periodic(); on || g.frozen {
		t.Fatalf("the guests have agreed for minutes, and the mode is on: %v, frozen: %v", on, g.frozen)
	}
	g.run(2 * time.Minute)
	g.differs(time.Second)
	g.run(time.Minute)
	i := len(g.ended) - 1
	if lasted := time.Duration(g.ended[i] - g.began[i]); time.Duration(g.now-g.began[i]) > time.Minute || lasted > 31*time.Second {
		t.Errorf("after minutes of peace it lasts %v, not as short as at first", lasted)
	}
}

// share is how much of the time the guest runs in periodic mode, and how long at a time.
func share(pause time.Duration, mutate ...func(*Config)) (part float64, atOnce time.Duration) {
	g := newGuests(45, mutate...)
	g.differs(time.Millisecond)
	for len(g.began) == 0 && g.now < int64(time.Minute) {
		g.run(time.Millisecond)
	}
	g.pause = pause
	g.run(2 * time.Second) // until the mean is this pause
	g.ran, g.paused = 1<<62, 0
	from := g.now
	g.run(20 * time.Second)
	return 1 - float64(g.paused)/float64(g.now-from), time.Duration(g.ran)
}

// TestPeriodicShare: however long checkpoints take, two thirds of the time are the guest's. Short ones come at each
// epoch's end.
func TestPeriodicShare(t *testing.T) {
	for _, pause := range []time.Duration{time.Millisecond, 20 * time.Millisecond, 100 * time.Millisecond, 300 * time.Millisecond} {
		if part, atOnce := share(pause); part < 0.66 || atOnce < 50*time.Millisecond {
			t.Errorf("with pauses of %v the guest has %.2f of the time, at least %v at once", pause, part, atOnce)
		}
	}
	if part, _ := share(100*time.Millisecond, func(c *Config) { c.noR28Share = true }); part > 0.5 {
		t.Errorf("the mutation of R28 leaves the guest %.2f of the time", part)
	}
}

// TestPeriodicFails: where no checkpoint can be made the mode is over, and what differed meanwhile goes on asking for one.
func TestPeriodicFails(t *testing.T) {
	for name, trouble := range map[string]func(*guests){
		"checkpoints fail":    func(g *guests) { g.broken = true; g.run(time.Second); g.broken = false },
		"the link breaks":     func(g *guests) { g.step(Event{Kind: EvLinkDown}); g.step(Event{Kind: EvLinkUp, OK: true}) },
		"the monitor is lost": func(g *guests) { g.step(Event{Kind: EvQMPDown}); g.step(Event{Kind: EvQMPUp, OK: true}) },
	} {
		g := newGuests(45)
		g.differs(time.Millisecond)
		for len(g.began) == 0 && g.now < int64(time.Minute) {
			g.run(time.Millisecond)
		}
		g.run(10 * time.Millisecond) // something differs, and waits
		g.differ = 0
		before := g.commits
		trouble(g)
		if on, _, _, _ := g.p.Periodic(); on {
			t.Errorf("%s: the mode is on", name)
		}
		if g.run(time.Second); g.frozen || g.commits == before {
			t.Errorf("%s: frozen %t, %d commits", name, g.frozen, g.commits-before)
		}
		before = g.commits
		if g.run(time.Minute); g.commits > before {
			t.Errorf("%s: %d commits of guests that agree", name, g.commits-before)
		}
	}
}

// TestPeriodicIdle: it ends soon where nothing waits for a commit.
func TestPeriodicIdle(t *testing.T) {
	g := newGuests(45)
	g.differs(time.Millisecond)
	for len(g.began) == 0 && g.now < int64(time.Minute) {
		g.run(time.Millisecond)
	}
	g.run(20 * time.Second)
	if len(g.ended) > 0 {
		t.Errorf("it ended after %v, and the guests differ", time.Duration(g.ended[0]-g.began[0]))
	}
	g.differ = 0
	if g.run(6 * time.Second); len(g.ended) != 1 {
		t.Error("nothing has waited for 6 s, and the mode is on")
	}
}
