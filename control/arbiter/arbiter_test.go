// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/config"
)

// long is a timeout that a test does not wait for; short one that it does.
const (
	long  = 20 * time.Second
	short = 300 * time.Millisecond
)

func open(t testing.TB, node string, a config.Arbiter) Arbiter {
	t.Helper()
	c := &config.Config{File: "pair.yaml", VM: "web1", Arbiter: a}
	c.Nodes = []config.Node{{Name: "alpha"}, {Name: "beta"}}
	arb, err := Open(c, node)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { arb.Close() })
	return arb
}

func read(t testing.TB, a Arbiter) Entry {
	t.Helper()
	r, err := a.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func settle(t testing.TB, a Arbiter) Entry {
	t.Helper()
	r, err := a.Settle(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func swap(t testing.TB, a Arbiter, old, next Entry) (Entry, bool) {
	t.Helper()
	now, swapped, err := a.Swap(t.Context(), old, next)
	if err != nil {
		t.Fatal(err)
	}
	return now, swapped
}

// follow checks what every arbiter must do, with two hosts' views of one entry.
func follow(t *testing.T, alpha, beta Arbiter) {
	t.Helper()
	if r := read(t, alpha); r != (Entry{}) {
		t.Fatalf("at first there is %s", r)
	}
	if r := settle(t, beta); r != (Entry{}) {
		t.Fatalf("nothing is settled as %s", r)
	}
	first := Entry{1, "alpha"}
	if now, ok := swap(t, alpha, Entry{}, first); !ok || now != first {
		t.Fatalf("the first entry: %s, %v", now, ok)
	}
	if now, ok := swap(t, alpha, Entry{}, first); !ok || now != first {
		t.Fatalf("the same again: %s, %v", now, ok)
	}
	if r := read(t, beta); r != first {
		t.Fatalf("beta reads %s", r)
	}
	if now, ok := swap(t, beta, Entry{}, Entry{1, "beta"}); ok || now != first {
		t.Fatalf("beta, who knew of no entry: %s, %v", now, ok)
	}
	if r := settle(t, beta); r != first {
		t.Fatalf("settled as %s", r)
	}
	second := Entry{2, "beta"}
	if now, ok := swap(t, beta, first, second); !ok || now != second {
		t.Fatalf("beta takes over: %s, %v", now, ok)
	}
	if now, ok := swap(t, alpha, first, Entry{2, "alpha"}); ok || now != second {
		t.Fatalf("alpha, who lost: %s, %v", now, ok)
	}
	for _, bad := range []Entry{{}, {1, "alpha"}, {2, "alpha"}, {4, "alpha"}, {3, ""}} {
		if _, ok, err := alpha.Swap(t.Context(), second, bad); ok || err == nil {
			t.Errorf("%s is followed by %s", second, bad)
		}
	}
	// An entry older than one seen before decides nothing.
	if _, ok, err := alpha.Swap(t.Context(), Entry{7, "beta"}, Entry{8, "alpha"}); ok || err == nil || !strings.Contains(err.Error(), "lost it") {
		t.Errorf("an arbiter that forgot: %v, %v", ok, err)
	}
	if r := read(t, alpha); r != second {
		t.Errorf("at last there is %s", r)
	}
}

// race has two hosts claim the same fencing term, again and again: one wins each time.
func race(t *testing.T, alpha, beta Arbiter, rounds int) {
	t.Helper()
	type claim struct {
		now Entry
		won bool
		err error
	}
	old := settle(t, alpha)
	wins := map[string]int{}
	for i := range rounds {
		start := make(chan struct{})
		results := make(chan claim, 2)
		for name, a := range map[string]Arbiter{"alpha": alpha, "beta": beta} {
			go func() {
				<-start
				now, won, err := a.Swap(t.Context(), old, Entry{old.Term + 1, name})
				results <- claim{now, won, err}
			}()
		}
		close(start)
		x, y := <-results, <-results
		if x.err != nil || y.err != nil {
			t.Fatalf("round %d: %v, %v", i, x.err, y.err)
		}
		if x.won == y.won || x.now != y.now {
			t.Fatalf("round %d: %+v and %+v", i, x, y)
		}
		if r := read(t, alpha); r != x.now {
			t.Fatalf("round %d: %s won, and the entry says %s", i, x.now, r)
		}
		old = x.now
		wins[old.Speaker]++
	}
	t.Logf("wins: %v", wins)
}

func unknown(t *testing.T, result <-chan error) {
	t.Helper()
	err := <-result
	if err == nil {
		t.Fatal("a change without an answer has an outcome")
	}
	t.Logf("told: %v", err)
}
