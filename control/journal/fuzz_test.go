// SPDX-License-Identifier: Apache-2.0

package journal

import (
	"bytes"
	"encoding/json"
	"os"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// FuzzRead: whatever a crash left in the two files, what is whole is read, and so is what
// is added later, behind it.
func FuzzRead(f *testing.F) {
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, before, now []byte) {
		dir, err := os.MkdirTemp(dir, "")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		for name, content := range map[string][]byte{path(dir, "web1", "alpha") + ".1": before, path(dir, "web1", "alpha"): now} {
			if err := os.WriteFile(name, content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		found, err := Read(dir, "web1", "alpha", 0)
		if err != nil {
			t.Fatal(err)
		}
		j := openIn(t, dir, DefaultLimit)
		j.Add(Event{Kind: Role, Cause: "after the crash"})
		j.Close()
		all, err := Read(dir, "web1", "alpha", 0)
		if err != nil {
			t.Fatal(err)
		}
		whole := 0
		for line := range bytes.Lines(slices.Concat(before, []byte("\n"), now)) {
			if json.Valid(line) {
				whole++
			}
		}
		if len(found) > whole {
			t.Errorf("%d events of %d whole lines", len(found), whole)
		}
		if n := len(all); n == 0 || all[n-1].Kind != Role || all[n-1].Cause != "after the crash" {
			t.Fatalf("the event that was added is not the last of %+v", all)
		}
		if n := len(found); len(all) < n+1 {
			t.Errorf("%d events, %d were there before", len(all), n)
		} else if d := cmp.Diff(found, all[:n]); d != "" {
			t.Errorf("-before +after\n%s", d)
		}
	})
}
