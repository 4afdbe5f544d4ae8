// SPDX-License-Identifier: Apache-2.0

package main

import (
	"path/filepath"
	"slices"
	"testing"

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
