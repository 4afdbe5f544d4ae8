// SPDX-License-Identifier: Apache-2.0

package main

import (
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/lockstep-ft/lockstep/control/journal"
)

func TestEvents(t *testing.T) {
	c := newCLI(t)
	c.write(t, "pair.yaml", pairYAML+"state_dir: state\n")
	j, err := journal.Open(filepath.Join(c.dir, "state"), "web1", "alpha", journal.DefaultLimit, discard)
	if err != nil {
		t.Fatal(err)
	}
	j.Add(journal.Event{Kind: journal.Daemon, Cause: "started", Fields: map[string]any{"version": "v1"}})
	j.Add(journal.Event{Kind: journal.Role, Fields: map[string]any{"term": 3, "role": "primary"}})
	j.Close()
	const line = "events -c @/pair.yaml --node alpha"
	code, stdout, stderr := c.run(t.Context(), line)
	want := regexp.MustCompile(`^TIME +KIND +CAUSE +MORE
\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}  daemon  started  version=v1
\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}  role             role=primary term=3
$`)
	if code != 0 || !want.MatchString(stdout) {
		t.Errorf("exit %d, %s\n%s", code, stderr, stdout)
	}
	// One JSON object a line, of which --last takes the newest.
	if code, stdout, _ := c.run(t.Context(), line+" --json --last 1"); code != 0 || strings.Count(stdout, "\n") != 1 || !strings.Contains(stdout, `"kind":"role"`) {
		t.Errorf("exit %d, %s", code, stdout)
	}
	// The other node's are its own, and there need not be any.
	if code, stdout, stderr := c.run(t.Context(), "events -c @/pair.yaml --node beta"); code != 0 || strings.Count(stdout, "\n") != 1 {
		t.Errorf("beta: exit %d, %s%s", code, stdout, stderr)
	}
}
