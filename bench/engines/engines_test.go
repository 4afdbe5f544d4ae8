// SPDX-License-Identifier: Apache-2.0

package engines

import (
	"path/filepath"
	"strings"
	"testing"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestRun measures in short. It asserts nothing about the figures but that they are there,
// and that neither engine releases what differs.
func TestRun(t *testing.T) {
	lt.NeedRoot(t)
	bin := filepath.Join(t.TempDir(), "lockstep")
	lt.Run(t, "go", "build", "-o", bin, "github.com/lockstep-ft/lockstep/cmd/lockstep")
	part, err := Run(t.Context(), Options{Lockstep: bin, Quick: true}, func(what string) { t.Log(what) })
	if err != nil {
		t.Fatal(err)
	}
	differing := 0
	for _, c := range part.Cases {
		for _, v := range part.Variants {
			s := c.Series[v]
			t.Logf("%s, %s [%s]: %s: %.1f %s", c.Group, c.Name, c.Unit, v, s.Rounds, s.Instead)
			if len(s.Rounds) == 0 && s.Instead == "" {
				t.Errorf("%s, %s: %s has neither a figure nor what it did instead", c.Group, c.Name, v)
			}
			if c.Group != differGroup {
				continue
			}
			differing++
			want := 5.
			if strings.HasSuffix(c.Name, "behind it") {
				want = 0
			}
			if len(s.Rounds) != 1 || s.Rounds[0] != want {
				t.Errorf("%s, %s: %s has %v, want %v", c.Group, c.Name, v, s.Rounds, want)
			}
		}
	}
	if want := 2 * 2 * (len(synthetic()) + 1); differing != want {
		t.Errorf("%d figures of differing streams, want %d", differing, want)
	}
}
