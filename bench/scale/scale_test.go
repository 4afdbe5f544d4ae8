// SPDX-License-Identifier: Apache-2.0

package scale

import (
	"strings"
	"testing"

	"github.com/lockstep-ft/lockstep/bench/lab"
)

// TestNoSuchSection: what is measured is asked for by name, and a name that is none is refused before anything is made.
func TestNoSuchSection(t *testing.T) {
	_, err := Part(t.Context(), lab.Options{Rounds: 1, Quick: true, Only: "nonsense"}, func(int, int, string) { t.Error("something is measured") })
	if err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("%v", err)
	}
}

// TestCount: digits are in groups of three, which a line break does not part.
func TestCount(t *testing.T) {
	for n, want := range map[int]string{7: "7", 999: "999", 1000: "1\u00a0000", 12_345: "12\u00a0345", 1_000_000: "1\u00a0000\u00a0000"} {
		if got := count(n); got != want {
			t.Errorf("%d is written %q, want %q", n, got, want)
		}
	}
}
