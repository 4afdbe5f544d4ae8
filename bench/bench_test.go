// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// The test binary is also the service of the guests and the client, as the lockstep binary is.
func TestMain(m *testing.M) {
	if len(os.Args) < 3 || os.Args[1] != "bench" || os.Args[2] != "act" {
		os.Exit(m.Run())
	}
	if err := Act(os.Stdin, os.Stdout, os.Args[3:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// TestQuick runs every part with small counts: each variant has a figure for every case, or says
// what it did instead. Nothing is asserted about the figures.
func TestQuick(t *testing.T) {
	lt.NeedRoot(t)
	o := lab.Options{Rounds: 1, Quick: true, Lockstep: filepath.Join(t.TempDir(), "lockstep"), Guest: qemutest.Dir(t)}
	lt.Run(t, "go", "build", "-o", o.Lockstep, "github.com/lockstep-ft/lockstep/cmd/lockstep")
	var err error
	if o.QEMU, err = exec.LookPath("qemu-system-x86_64"); err != nil {
		lt.Missing(t, "needs QEMU: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	last := 0
	parts := Parts()
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		parts = slices.DeleteFunc(parts, func(name string) bool { return name == "C" }) // pairs of emulated guests take minutes
	}
	r, err := Run(ctx, o, parts, "test", func(done, total int, what string) {
		if total > 0 && done >= total || what == "" || done < last && done != 0 {
			t.Errorf("progress: %d of %d after %d: %q", done, total, last, what)
		}
		last = done
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Parts) != len(parts) {
		t.Errorf("%d parts, want %d", len(r.Parts), len(parts))
	}
	for _, p := range r.Parts {
		seen := make(map[string]bool)
		for _, c := range p.Cases {
			if key := c.Group + "\x00" + c.Name; seen[key] {
				t.Errorf("part %s has %s, %s twice", p.Name, c.Group, c.Name)
			} else {
				seen[key] = true
			}
			for _, v := range p.Variants {
				if s := c.Series[v]; len(s.Rounds) == 0 && s.Instead == "" {
					t.Errorf("part %s: %s has neither a figure nor an explanation for %s, %s", p.Name, v, c.Group, c.Name)
				}
			}
		}
		if len(p.Cases) == 0 || !slices.Contains(p.Variants, "lockstep") {
			t.Errorf("part %s has %d cases of %q", p.Name, len(p.Cases), p.Variants)
		}
		// Of what lockstep has in part A nothing may stall. Emulated guests on a machine with other work now and then
		// do not come up, or lose each other: that some of part C is not carried is logged.
		missing := 0
		for _, c := range p.Cases {
			if s := c.Series["lockstep"]; len(s.Rounds) == 0 && p.Name == "A" {
				t.Errorf("lockstep did not carry %s, %s: %s", c.Group, c.Name, s.Instead)
			} else if len(s.Rounds) == 0 && p.Name == "C" {
				t.Logf("lockstep did not carry %s, %s: %s", c.Group, c.Name, s.Instead)
				missing++
			}
		}
		if 2*missing > len(p.Cases) {
			t.Errorf("lockstep did not carry %d of %d cases of part %s", missing, len(p.Cases), p.Name)
		}
	}
}

// TestMistakes: what cannot be measured is refused before anything is made.
func TestMistakes(t *testing.T) {
	none := func(int, int, string) { t.Error("something is measured") }
	if _, err := Run(t.Context(), lab.Options{Rounds: 1}, []string{"Z"}, "test", none); err == nil {
		t.Error("part Z is run")
	}
	if _, err := Run(t.Context(), lab.Options{}, nil, "test", none); err == nil {
		t.Error("no rounds are run")
	}
	if _, err := Run(t.Context(), lab.Options{Rounds: 1}, []string{"B"}, "test", none); err == nil {
		t.Error("part B is run without QEMU")
	}
	if _, err := Run(t.Context(), lab.Options{Rounds: 1, QEMU: "/bin/false"}, []string{"C"}, "test", none); err == nil {
		t.Error("part C is run without a guest")
	}
	if _, err := Run(t.Context(), lab.Options{Rounds: 1, Only: "nothing of this name"}, nil, "test", none); err == nil {
		t.Error("nothing is run")
	}
}
