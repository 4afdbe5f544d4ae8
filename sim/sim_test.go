// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"flag"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/compare"
)

var (
	seeds    = flag.Uint64("seeds", 1000, "how many seeds TestSeeds runs")
	from     = flag.Uint64("from", 0, "the first of them")
	mutation = flag.String("mutation", "", "the rule that is off in TestSeeds")
	mutants  = flag.Uint64("mutants", 0, "how many seeds TestMutations runs at most for each mutation; 0: as many as were needed once, and some")
	noshrink = flag.Bool("noshrink", false, "a scenario that fails is left as it is")
	tell     = flag.Bool("tell", false, "a run that fails shows its log")
)

// sweep runs seeds on all CPUs until one is wrong, and returns that one and its fault.
func sweep(first, n uint64, mutation string, each func(Result)) (seed uint64, fault *Fault) {
	var next atomic.Uint64
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for {
				i := first + next.Add(1) - 1
				mu.Lock()
				stop := i >= first+n || fault != nil && i > seed
				mu.Unlock()
				if stop {
					return
				}
				r := Run(Generate(i), mutation, false)
				mu.Lock()
				if each != nil {
					each(r)
				}
				if r.Fault != nil && (fault == nil || i < seed) {
					seed, fault = i, r.Fault
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return seed, fault
}

// report shows a fault with the short scenario that it shrinks to.
func report(t *testing.T, seed uint64, f *Fault) {
	t.Helper()
	if *noshrink {
		t.Errorf("seed %d: %v", seed, f)
		return
	}
	short := Shrink(Generate(seed), *mutation, f.Kind, 400)
	t.Errorf("seed %d: %v\nIt shrinks to (put it into testdata/NAME.txt):\n%s", seed, f, short)
	if r := Run(short, *mutation, true); r.Fault != nil {
		t.Logf("which fails with: %v", r.Fault)
		if *tell {
			t.Log(strings.Join(r.Fault.Log, "\n"))
		}
	}
}

// TestSeeds runs the world from many seeds. What was reached is logged, and has to hold all that
// is in testdata/reached: a simulator that never gets anywhere finds nothing.
func TestSeeds(t *testing.T) {
	reached := map[string]int{}
	events, answers, frames, compared, lost, idle, waited := 0, 0, 0, 0, 0, 0, time.Duration(0)
	seed, fault := sweep(*from, *seeds, *mutation, func(r Result) {
		events, answers, frames, compared = events+r.Events, answers+r.Answers, frames+r.Frames, compared+r.Compared
		waited += r.Waited
		if r.Lost {
			lost++
		}
		if r.Idle {
			idle++
		}
		for k, n := range r.Reached {
			reached[k] += n
		}
	})
	if fault != nil {
		report(t, seed, fault)
	}
	t.Logf("%d seeds: %d events, %d answers after %v in sum, %d frames left, %d of them held against the SVM; in %d the guest was lost, in %d nobody served at the end",
		*seeds, events, answers, waited, frames, compared, lost, idle)
	for _, k := range slices.Sorted(maps.Keys(reached)) {
		t.Logf("%9d %s", reached[k], k)
	}
	if fault != nil || *seeds < 1000 || *mutation != "" {
		return
	}
	text, err := os.ReadFile("testdata/reached")
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range strings.Split(strings.TrimSpace(string(text)), "\n") {
		if reached[k] == 0 {
			t.Errorf("no run has reached %q", k)
		}
	}
}

// TestScenarios runs what once failed, and what seeds do not draw.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			f, err := os.Open(file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			sc, err := Parse(f)
			if err != nil {
				t.Fatal(err)
			}
			r := Run(sc, *mutation, true)
			if *tell {
				t.Log(strings.Join(r.Log, "\n"))
			}
			if r.Fault != nil {
				t.Errorf("%v\n%s", r.Fault, strings.Join(r.Fault.Log, "\n"))
			}
		})
	}
}

// TestSame: the same scenario runs in the same way, also through its text.
func TestSame(t *testing.T) {
	for seed := range uint64(20) {
		sc := Generate(seed)
		again, err := Parse(strings.NewReader(sc.String()))
		if err != nil {
			t.Fatal(err)
		}
		if got, want := again.String(), sc.String(); got != want {
			t.Fatalf("%s\n%s", got, want)
		}
		a, b := Run(sc, "", false), Run(again, "", false)
		if a.Events != b.Events || a.Frames != b.Frames || a.Answers != b.Answers || !maps.Equal(a.Reached, b.Reached) {
			t.Errorf("seed %d: %d events and %d; %d frames and %d", seed, a.Events, b.Events, a.Frames, b.Frames)
		}
	}
}

func TestMain(m *testing.M) {
	flag.Parse()
	compare.Assertions = true
	debug.SetGCPercent(400) // a run allocates much, and keeps little
	os.Exit(m.Run())
}

// TestMutations: without a rule some seed is wrong. The number is how many seeds that took;
// what takes more than a few hundred is for -mutants alone.
func TestMutations(t *testing.T) {
	for _, m := range []struct {
		rule string
		runs uint64
	}{
		{"R1", 2}, {"R2", 1}, {"R3", 1}, {"R4", 1}, {"R6", 1515}, {"R7", 19}, {"R8", 26}, {"R11", 8}, {"R13 late", 39}, {"R14", 1}, {"R14 events", 53}, {"R15", 57}, {"R15 stop", 10}, {"R16", 149}, {"R18", 16},
		{"R21 claim", 69}, {"R21 wait", 32}, {"R21 living", 379}, {"R21 dismissed", 242}, {"R22 ended", 62}, {"R24", 51}, {"R25", 2},
		{"R26 uncovered", 89}, {"R26 lease", 305}, {"R26 entry", 306}, {"R27 bytes", 8}, {"R27 acks", 1}, {"datagram", 1},
	} {
		n := m.runs + m.runs/4
		if *mutants != 0 {
			n = *mutants
		} else if n > 1200 {
			continue
		}
		t.Run(m.rule, func(t *testing.T) {
			seed, fault := sweep(0, n, m.rule, nil)
			if fault == nil {
				t.Errorf("%d seeds have not noticed it", n)
				return
			}
			t.Logf("seed %d: %.200s", seed, fault)
		})
	}
}

// calm is a scenario in which nothing goes wrong but loss, and what is given.
func calm(seed uint64, actions ...Action) *Scenario {
	sc := draw(seed)
	sc.Actions, sc.RefuseCheckpoint, sc.Period = actions, 0, 300*ms
	sc.noFastPath = true // it is the daemon's rules that cost
	sc.PeerLoss, sc.PeerReorder = 15, 10
	sc.Exchanges, sc.Announce, sc.Floods, sc.GSO, sc.RandomISN, sc.Slow = nil, 0, nil, false, false, [2]int64{}
	if len(actions) > 0 { // they meet something
		sc.Conns = append(sc.Conns, drawBusy(rand.New(rand.NewPCG(seed, 0)), 3*s))
	}
	for i := range sc.Conns {
		sc.Conns[i].Requests = slices.DeleteFunc(sc.Conns[i].Requests, func(r Request) bool { return r.Kind == 'T' || r.Kind == 'S' || r.Kind == 'V' })
	}
	return sc
}

// restarts are P's daemon's, again and again.
var restarts = func() (as []Action) {
	for at := 1 * s; at < 8*s; at += 700 * ms {
		as = append(as, Action{At: at, Kind: "kill-daemon", For: 50 * ms})
	}
	return as
}()

// TestCosts: rules without which nothing is wrong, but clients wait longer, by virtual time.
func TestCosts(t *testing.T) {
	for _, c := range []struct {
		rule    string
		actions []Action
	}{
		{"R5", nil}, {"R6", nil}, {"R17", nil}, {"R23", restarts},
		{"R22", []Action{{At: 3 * s, Kind: "kill-qemu"}}},
	} {
		t.Run(c.rule, func(t *testing.T) {
			var with, without time.Duration
			for seed := range uint64(60) {
				with += Run(calm(seed, c.actions...), "", false).Waited
				without += Run(calm(seed, c.actions...), c.rule, false).Waited
			}
			if t.Logf("%v with the rule, %v without", with, without); without < with+with/200 {
				t.Error("nobody waits longer without it")
			}
		})
	}
}
