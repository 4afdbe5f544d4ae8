// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/config"

	"github.com/lockstep-ft/lockstep/control/state"
)

// The power-off is forgotten, and nothing else of the state.
func TestStart(t *testing.T) {
	c := newCLI(t)
	c.write(t, "pair.yaml", pairYAML+"state_dir: state\n")
	store, err := state.Open(filepath.Join(c.dir, "state"), "web1", "alpha")
	if err != nil {
		t.Fatal(err)
	}
	const line = "start -c @/pair.yaml --node alpha"
	const none = "lockstep: web1 did not power off while alpha was its primary, so there is nothing to forget: start the daemon\n"
	if code, _, stderr := c.run(t.Context(), line); code != exitFailed || stderr != none {
		t.Errorf("without a power-off: exit %d, %q", code, stderr)
	}
	off := state.State{Role: "primary", Term: 7, Covered: 6, Replicated: true, Off: true}
	if err := store.Save(off); err != nil {
		t.Fatal(err)
	}
	c.calls = nil
	if code, stdout, stderr := c.run(t.Context(), line); code != 0 || stdout != "The next `lockstep run` on alpha boots web1.\n" {
		t.Errorf("exit %d, %q, %q", code, stdout, stderr)
	}
	if want := []string{"lock web1 alpha", "release"}; !slices.Equal(c.calls, want) {
		t.Errorf("calls %q, want %q", c.calls, want)
	}
	off.Off = false
	if got, err := store.Load(); err != nil || got != off {
		t.Errorf("%+v, %v, want %+v", got, err, off)
	}
}

// Who has the guest's disks is said once, and only where nobody serves whose writes are missing here.
func TestStartHere(t *testing.T) {
	was := noticed
	noticed = 0
	t.Cleanup(func() { noticed = was })
	secondary := state.State{Role: "secondary", Term: 4, Covered: 4, Replicated: true}
	first := state.State{Role: "primary", Replicated: false}
	for _, tc := range []struct {
		name  string
		rec   arbiter.Entry
		st    state.State
		flags string
		says  string        // what it refuses with; "": it does not
		now   arbiter.Entry // the entry then, if another
		then  state.State   // what is stored, if anything else
	}{
		{name: "the first start", now: arbiter.Entry{Term: 1, Speaker: "alpha"}, then: first},
		{name: "again", rec: arbiter.Entry{Term: 1, Speaker: "alpha"}, st: first, says: "names alpha already: start the daemon"},
		{name: "the other node was first", rec: arbiter.Entry{Term: 1, Speaker: "beta"}, says: "beta served last"},
		{name: "the other node served last", rec: arbiter.Entry{Term: 5, Speaker: "beta"}, st: secondary, says: "may not be all that the guest wrote"},
		{name: "and is lost", rec: arbiter.Entry{Term: 5, Speaker: "beta"}, st: secondary, flags: " --force",
			now: arbiter.Entry{Term: 6, Speaker: "alpha"}, then: state.State{Role: "primary", Term: 5, Replicated: true}},
		{name: "covered to the end", rec: arbiter.Entry{Term: 4, Speaker: "beta"}, st: secondary,
			now: arbiter.Entry{Term: 5, Speaker: "alpha"}, then: state.State{Role: "primary", Term: 4, Replicated: true}},
		{name: "not covered", rec: arbiter.Entry{Term: 4, Speaker: "beta"}, st: state.State{Role: "secondary", Term: 4, Replicated: true}, says: "beta served last"},
		{name: "its state is lost", rec: arbiter.Entry{Term: 4, Speaker: "alpha"}, says: "alpha served last"},
		{name: "and its disks are not", rec: arbiter.Entry{Term: 4, Speaker: "alpha"}, flags: " --force",
			now: arbiter.Entry{Term: 5, Speaker: "alpha"}, then: state.State{Role: "primary", Term: 4, Replicated: true}},
		{name: "an arbiter that has lost the entry", st: secondary, flags: " --force", says: "is older than the one that this node has acted on"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newCLI(t)
			file := strings.Replace(pairYAML, "beta: {", "beta: {qmp: b.qmp, ", 1) + fmt.Sprintf("arbiter: {type: file, path: %s/arbiter}\nstate_dir: state\n", c.dir)
			c.write(t, "pair.yaml", file)
			if err := os.Mkdir(filepath.Join(c.dir, "arbiter"), 0o700); err != nil {
				t.Fatal(err)
			}
			conf, err := config.Load(filepath.Join(c.dir, "pair.yaml"))
			if err != nil {
				t.Fatal(err)
			}
			a, err := arbiter.Open(conf, "beta")
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			var old arbiter.Entry
			for old.Term < tc.rec.Term {
				next := arbiter.Entry{Term: old.Term + 1, Speaker: tc.rec.Speaker}
				if _, won, err := a.Swap(t.Context(), old, next); !won || err != nil {
					t.Fatal(won, err)
				}
				old = next
			}
			store, err := state.Open(conf.StateDir, "web1", "alpha")
			if err != nil {
				t.Fatal(err)
			}
			if tc.st != (state.State{}) {
				if err := store.Save(tc.st); err != nil {
					t.Fatal(err)
				}
			}
			code, stdout, stderr := c.run(t.Context(), "start -c @/pair.yaml --node alpha --here"+tc.flags)
			wantEntry, wantState := tc.now, tc.then
			if tc.says != "" {
				wantEntry, wantState = tc.rec, tc.st
				if code != exitFailed || !strings.Contains(stderr, tc.says) {
					t.Errorf("exit %d, %s", code, stderr)
				}
			} else if code != exitOK || !strings.Contains(stdout, "alpha is the primary, and beta follows") {
				t.Errorf("exit %d, %q, %s", code, stdout, stderr)
			}
			if rec, err := a.Read(t.Context()); rec != wantEntry || err != nil {
				t.Errorf("the entry is %v (%v), want %v", rec, err, wantEntry)
			}
			if st, err := store.Load(); st != wantState || err != nil {
				t.Errorf("the state is %+v (%v), want %+v", st, err, wantState)
			}
		})
	}
	t.Run("a guest that runs", func(t *testing.T) {
		c := newCLI(t)
		c.write(t, "pair.yaml", strings.Replace(pairYAML, "beta: {", "beta: {qmp: b.qmp, ", 1)+"arbiter: {type: file, path: "+c.dir+"}\nstate_dir: state\n")
		c.kernel.inUse = func(string) (bool, error) { return true, nil }
		if code, _, stderr := c.run(t.Context(), "start -c @/pair.yaml --node alpha --here --force"); code != exitFailed || !strings.Contains(stderr, "the guest runs here (a process has tap tapP open)") {
			t.Errorf("exit %d, %s", code, stderr)
		}
	})
	t.Run("no arbiter", func(t *testing.T) {
		if code, _, stderr := newCLI(t).run(t.Context(), "start -c @/pair.yaml --node alpha --here"); code != exitUsage || !strings.Contains(stderr, "nobody keeps which node has the guest's disks") {
			t.Errorf("exit %d, %s", code, stderr)
		}
	})
}
