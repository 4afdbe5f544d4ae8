// SPDX-License-Identifier: Apache-2.0

package state

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func newStore(t *testing.T) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "a", "b"), "web1", "alpha")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func load(t *testing.T, s *Store) State {
	t.Helper()
	st, err := s.Load()
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func TestSaveLoad(t *testing.T) {
	s := newStore(t)
	if st := load(t, s); st != (State{}) {
		t.Errorf("at first %+v", st)
	}
	for _, st := range []State{{Role: "primary", Term: 1, Replicated: true}, {Role: "secondary", Term: 1<<64 - 1, Covered: 7}, {Role: "primary", Term: 3, Covered: 3, Replicated: true, Unmerged: true, Off: true}} {
		if err := s.Save(st); err != nil {
			t.Fatal(err)
		}
		again, err := Open(filepath.Dir(s.Path()), "web1", "alpha")
		if err != nil {
			t.Fatal(err)
		}
		if got := load(t, again); got != st {
			t.Errorf("%+v, saved as %+v", got, st)
		}
	}
	// Other guests and nodes have their own.
	for _, o := range []Store{{filepath.Dir(s.Path()), "web2", "alpha"}, {filepath.Dir(s.Path()), "web1", "beta"}} {
		if st := load(t, &o); st != (State{}) {
			t.Errorf("%s: %+v", o.Path(), st)
		}
	}
}

// A crash in mid Save leaves a file beside it, and the old state.
func TestCrashInSave(t *testing.T) {
	s := newStore(t)
	old := State{Role: "secondary", Term: 4, Covered: 4, Replicated: true}
	if err := s.Save(old); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.Path()+".new", []byte(`{"vers`), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := load(t, s); got != old {
		t.Errorf("%+v", got)
	}
	if err := s.Save(State{Role: "primary", Term: 5, Replicated: true}); err != nil {
		t.Fatal(err)
	}
	if got := load(t, s); got != (State{Role: "primary", Term: 5, Replicated: true}) {
		t.Errorf("%+v", got)
	}
	if left, _ := filepath.Glob(s.Path() + ".*"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// Every flipped bit and every cut is noticed: a wrong role or fencing term is worse than none.
func TestDamaged(t *testing.T) {
	s := newStore(t)
	if err := s.Save(State{Role: "secondary", Term: 4, Covered: 4, Replicated: true}); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(s.Path())
	if err != nil {
		t.Fatal(err)
	}
	check := func(b []byte, what string, at int) {
		t.Helper()
		if err := os.WriteFile(s.Path(), b, 0o600); err != nil {
			t.Fatal(err)
		}
		st, err := s.Load()
		if err == nil || st != (State{}) {
			t.Fatalf("%s at %d: %+v, %v", what, at, st, err)
		}
		for _, part := range []string{s.Path(), "the file is damaged", "remove the file", "lockstep start --here"} {
			if !strings.Contains(err.Error(), part) {
				t.Fatalf("%s at %d: %q lacks %q", what, at, err, part)
			}
		}
	}
	for i := range whole {
		for bit := range 8 {
			b := append([]byte{}, whole...)
			b[i] ^= 1 << bit
			check(b, "bit", i)
		}
		check(whole[:i], "cut", i)
	}
	check(append(append([]byte{}, whole...), 'x'), "more", 0)
	check(make([]byte, 1<<20), "long", 0)
}

// What is whole and not ours is refused too.
func TestForeign(t *testing.T) {
	s := newStore(t)
	for line, want := range map[string]string{
		`{"version":1,"vm":"web2","node":"alpha","role":"primary","term":1,"covered":0,"replicated":false}`:          "guest web2 on node alpha",
		`{"version":1,"vm":"web1","node":"beta","role":"primary","term":1,"covered":0,"replicated":false}`:           "guest web1 on node beta",
		`{"version":1,"vm":"web1","node":"alpha","role":"","term":1,"covered":0,"replicated":false}`:                 `the role ""`,
		`{"version":2,"vm":"web1","node":"alpha","role":"primary","term":1,"covered":0,"replicated":false}`:          "of another version (2, not 1)",
		`{"version":1,"vm":"web1","node":"alpha","role":"primary","term":1,"covered":0,"replicated":false,"more":1}`: "of another version",
		`{"version":1,"vm":"web1","node":"alpha","role":"primary","term":-1}`:                                        "of another version",
		`[]`: "of another version",
	} {
		if err := os.WriteFile(s.Path(), []byte(line+"\n"+checksum([]byte(line))), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Load(); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "remove the file") {
			t.Errorf("%s: %v", line, err)
		}
	}
}

func TestUnwritable(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(file, "web1", "alpha"); err == nil || !strings.Contains(err.Error(), "state_dir") {
		t.Errorf("%v", err)
	}
	s := newStore(t)
	if err := os.Mkdir(s.Path(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.Save(State{Role: "primary"}); err == nil {
		t.Error("saved in place of a directory")
	}
	if _, err := s.Load(); err == nil {
		t.Error("loaded a directory")
	}
}

// Follower knows whose the pair was only at its own fencing term; a pair without spares stores that there was one.
func TestFollower(t *testing.T) {
	for _, c := range []struct {
		st    State
		node  string
		known bool
	}{
		{State{}, "", false},
		{State{Peer: "beta", PairTerm: 3}, "beta", true},
		{State{Peer: "beta", PairTerm: 2}, "", false},
		{State{Covered: 3}, "", true},
		{State{Covered: 2}, "", false},
		{State{Peer: "beta", PairTerm: 2, Covered: 3}, "", true},
		{State{Peer: "beta", PairTerm: 3, Covered: 3}, "beta", true},
	} {
		if node, known := c.st.Follower(3); node != c.node || known != c.known {
			t.Errorf("%+v: %q, %t", c.st, node, known)
		}
	}
	if _, known := new(State).Follower(0); known {
		t.Error("a node that never ran has a follower")
	}
}
