// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestMan: every command that help lists has a manual page, with its flags, and no other has.
func TestMan(t *testing.T) {
	c := newCLI(t)
	dir := t.TempDir()
	if code, _, stderr := c.run(t.Context(), "man "+dir); code != 0 {
		t.Fatalf("exit %d, %s", code, stderr)
	}
	want := map[string]bool{"lockstep.8": true}
	for _, cmd := range newRoot(env{}).Commands() {
		if cmd.IsAvailableCommand() {
			want["lockstep-"+cmd.Name()+".8"] = true
		}
	}
	pages, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pages {
		if !want[p.Name()] {
			t.Errorf("%s is no command's that help lists", p.Name())
		}
		delete(want, p.Name())
	}
	if len(want) > 0 {
		t.Errorf("without a page: %v", want)
	}
	run, err := os.ReadFile(filepath.Join(dir, "lockstep-run.8"))
	if err != nil || !strings.Contains(string(run), "--metrics") || strings.Contains(string(run), "Auto generated") {
		t.Errorf("%v, %s", err, run)
	}
}
