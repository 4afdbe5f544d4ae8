// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lockstep-ft/lockstep/control/api"
)

func TestExplain(t *testing.T) {
	c := newCLI(t)
	want := `muted (drop)
  The primary must not transmit, because the secondary's kernel has not answered within heartbeat.lease, and might be taking over.
  To do: Look at the peer link and at the secondary's host; if it happens under load alone, raise heartbeat.lease and heartbeat.timeout.
`
	if code, stdout, stderr := c.run(t.Context(), "explain muted"); code != exitOK || stderr != "" || stdout != want {
		t.Errorf("exit %d, %s%s", code, stderr, cmp.Diff(want, stdout))
	}
	if code, stdout, _ := c.run(t.Context(), "explain payload differs"); code != exitOK || !strings.HasPrefix(stdout, "payload differs (checkpoint)\n") {
		t.Errorf("exit %d, %s", code, stdout)
	}
	code, stdout, stderr := c.run(t.Context(), "explain no_slots")
	if want := "lockstep: nothing is named \"no_slots\"; did you mean no_slot, or "; code != exitUsage || stdout != "" || !strings.HasPrefix(stderr, want) {
		t.Errorf("exit %d, %s%s", code, stdout, stderr)
	}
	code, stdout, stderr = c.run(t.Context(), "explain")
	if code != exitOK || stderr != "" || strings.Count(stdout, "\n  To do: ") != len(api.Reasons()) {
		t.Errorf("exit %d, %s%s", code, stderr, stdout)
	}
}
