// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"cmp"
	"math/rand/v2"
	"slices"
)

// theme is what a third of the scenarios concentrate on, since what goes wrong at random times
// seldom meets what takes milliseconds. In another third all of a chain happens.
type theme struct {
	kinds  []string // of actions: some of these happen,
	on     []string // when one of these is reached
	period bool     // there are many checkpoints
}

// step is an action of a chain: on P's host, or on the other one; when on is reached, "" standing
// for the chain's beginning; at most after later; for about lasts.
type step struct {
	kind         string
	other        bool
	on           string
	after, lasts int64
}

var themes = []theme{
	{ // in mid-checkpoint
		kinds: []string{
			"kill-host", "kill-qemu", "kill-daemon", "freeze-daemon", "drop-link", "cut-control", "cut-qemu", "cut-peer", "migration-reset", "failover", "stop-guest",
		},
		on:     []string{"prepare", "ready", "ask", "checkpoint received", "checkpoint loaded", "commit"},
		period: true,
	},
	{ // daemons that start again
		kinds:  []string{"kill-daemon", "kill-daemon", "kill-daemon", "freeze-daemon", "drop-link", "checkpoint", "kill-host", "kill-qemu"},
		on:     []string{"session", "replicating", "covered", "prepare", "ask", "checkpoint loaded", "commit", "resync", "S claim", "P claim", "takes over", "goes alone"},
		period: true,
	},
	{ // disks
		kinds:  []string{"disk-fails", "disk-fails", "nbd-reset", "cut-qemu", "kill-qemu", "freeze-qemu", "freeze-daemon", "drop-link"},
		on:     []string{"ready", "ask", "checkpoint received", "commit", "covered", "resync", "io error local", "io error replica", "attempt failed: no STOP of the PVM in time"},
		period: true,
	},
	{ // who takes over
		kinds: []string{
			"kill-host", "kill-qemu", "failover", "failover-force", "cut-control", "cut-all", "freeze-daemon", "freeze-host", "drop-link", "arbiter-late", "arbiter-loses", "arbiter-out",
		},
		on: []string{"link lost", "colo exit secondary", "S claim", "P claim", "arbiter changed", "S lease", "takes over", "goes alone"},
	},
	{ // what nothing covers yet
		kinds: []string{"failover", "failover-force", "drop-link", "cut-control", "kill-daemon", "nbd-reset", "migration-reset", "kill-qemu", "kill-host", "disk-fails"},
		on:    []string{"session", "P sync", "resync", "replicating", "link lost"},
	},
	{ // the guest's own end
		kinds: []string{"power-off", "power-off", "power-off", "start-guest", "start-primary", "start-secondary", "kill-host", "kill-qemu", "kill-daemon", "drop-link", "checkpoint", "failover"},
		on:    []string{"ask", "checkpoint loaded", "commit", "covered", "replicating", "link lost", "powered off", "stays off", "S claim"},
	},
	{ // what an operator does to the arbiter's entry
		kinds: []string{"arbiter-edit", "arbiter-edit", "kill-daemon", "kill-host", "kill-qemu", "cut-control", "cut-arbiter", "failover", "disk-fails"},
		on:    []string{"covered", "commit", "replicating", "resync", "goes alone", "takes over", "S claim", "P claim", "link lost"},
	},
}

// chains are what one rule or another is there for.
var chains = [][]step{
	// P goes on while S has been told to take over, with what its daemon has not looked at yet.
	{{kind: "freeze-daemon", lasts: 200 * ms}, {kind: "drop-link", other: true, on: "action freeze-daemon", after: 100 * ms}, {kind: "failover", other: true, on: "link lost", after: 5 * ms}},
	{{kind: "power-off"}},
	{{kind: "disk-fails", lasts: 2 * s}},
	{{kind: "stop-guest", lasts: 20 * ms}},
	// S gets an answer late, and meanwhile P's host begins anew without a guest.
	{{kind: "cut-arbiter", other: true, lasts: 4 * s}, {kind: "kill-daemon", lasts: 800 * ms}, {kind: "kill-qemu", on: "action kill-daemon", after: 400 * ms}},
	// S is told to take over by force before a checkpoint covers it.
	{{kind: "kill-qemu", other: true}, {kind: "cut-control", on: "replicating", after: 20 * ms, lasts: 2 * s}, {kind: "failover-force", other: true, on: "action cut-control", after: 1 * s}},
	// Likewise, while P transmits alone and has no daemon that could know.
	{
		{kind: "kill-qemu", other: true}, {kind: "kill-daemon", on: "resync", after: 600 * ms, lasts: 2 * s}, {kind: "failover-force", other: true, on: "link lost", after: 500 * ms},
		{kind: "failover-force", other: true, on: "action kill-daemon", after: 700 * ms},
	},
	// An operator has a guest go on that is stopped for a checkpoint.
	{{kind: "cont-guest", on: "ask", after: 1500 * us}},
	// A checkpoint is given up and made all the same; then P's host dies.
	{{kind: "checkpoint"}, {kind: "drop-link", on: "ask", after: 500 * us}, {kind: "kill-host", on: "checkpoint loaded", after: 60 * ms, lasts: 3 * s}},
	// P's host dies after S's QEMU has lost P's.
	{{kind: "migration-reset"}, {kind: "kill-host", on: "colo exit secondary", after: 600 * ms, lasts: 3 * s}},
}

// themed are the actions that only themes have: they excuse much of what else would be wrong.
var themed = map[string]bool{"power-off": true, "start-guest": true, "arbiter-edit": true}

// drawTheme has the scenario concentrate on something, or not.
func (sc *Scenario) drawTheme() {
	r := rand.New(rand.NewPCG(sc.Seed, 1<<41))
	if r.IntN(16) == 0 {
		sc.Arbiter = arbiterNone
	}
	what := r.IntN(3)
	if what == 0 {
		return
	}
	sc.Actions = sc.Actions[:min(len(sc.Actions), r.IntN(2))]
	at := 300*ms + r.Int64N(6*s)
	sc.Conns = append(sc.Conns, drawBusy(r, at))
	draw := func(kind string, host int, on string, after, lasts int64) {
		a := Action{At: at, Kind: kind, Host: host, On: on}
		if after > 0 {
			a.After = r.Int64N(after)
		}
		if actions[kind].lasts {
			a.For = lasts/2 + r.Int64N(lasts)
		}
		sc.Actions = append(sc.Actions, a)
	}
	if what == 1 {
		p := r.IntN(8) / 7 // it is the first host mostly
		for _, x := range chains[r.IntN(len(chains))] {
			host := p
			if x.other {
				host = 1 - p
			}
			draw(x.kind, host, x.on, max(x.after, 1), max(x.lasts, 20*ms))
		}
	} else {
		t := &themes[r.IntN(len(themes))]
		if t.period {
			sc.Period = []int64{100 * ms, 300 * ms}[r.IntN(2)]
		}
		for range 1 + r.IntN(4) {
			on := ""
			if r.IntN(5) > 0 {
				on = t.on[r.IntN(len(t.on))]
			}
			draw(t.kinds[r.IntN(len(t.kinds))], r.IntN(2), on, []int64{1, 3 * ms, 100 * ms, 1 * s}[r.IntN(4)], []int64{20 * ms, 200 * ms, 1 * s, 2500 * ms}[r.IntN(4)])
			if r.IntN(3) == 0 {
				at += r.Int64N(1 * s)
			}
		}
	}
	slices.SortStableFunc(sc.Actions, func(a, b Action) int { return cmp.Compare(a.At, b.At) })
}

// drawBusy draws a connection on which something is under way at that time, mostly.
func drawBusy(r *rand.Rand, at int64) Conn {
	c := Conn{At: max(at-300*ms, 200*ms), Pipelined: 1 + r.IntN(4)}
	for range 20 {
		if r.IntN(6) == 0 {
			c.Requests = append(c.Requests, Request{'T', 0})
		}
		c.Requests = append(c.Requests, Request{"GE"[r.IntN(2)], 1 + r.Int64N(20000)}, Request{'S', 9}, Request{'W', 1 + r.Int64N(40)})
	}
	return c
}

// drawPortsAgain has one scenario of sixteen be about a takeover in the handshake of a connection whose ports were another one's
// before, whose SYN the guest answers with a cookie: it knows nothing of either then (R22).
func drawPortsAgain(sc *Scenario) {
	r := rand.New(rand.NewPCG(sc.Seed, 1<<43))
	if r.IntN(16) > 0 {
		return
	}
	sc.SynCookies, sc.NoTimestamps, sc.SeqWrap, sc.TSWrap = true, false, 0, 0
	at := 400*ms + r.Int64N(2*s)
	sc.Conns = []Conn{{At: at, Pipelined: 1, Requests: []Request{{'E', 100}, {'G', 3000}, {'N', r.Int64N(2)}, {'E', 100}, {'N', r.Int64N(2)}, {'E', 3000}}}}
	sc.Actions = []Action{{At: at, Kind: "kill-qemu", On: "ports again, client time-wait", After: r.Int64N(4*sc.NetDelay + 300*us)}}
}
