// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control"
	"github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/journal"
)

// A node's roles follow each other as the arbiter's entry requires.
func TestRunLife(t *testing.T) {
	c := newCLI(t)
	dir := t.TempDir()
	c.write(t, "life.yaml", pairYAML+"arbiter: {type: file, path: "+dir+"}\nstate_dir: state\n")
	var parts []string
	ends := []error{control.ErrAfresh, control.ErrPromoted, control.ErrFenced}
	c.control = func(_ context.Context, o control.Options) error {
		b := o.Failover.Begin
		parts = append(parts, fmt.Sprintf("%s %s discard=%v", o.Role, b.Record, b.Discard))
		for _, n := range o.NICs {
			n.Close()
		}
		err := ends[0]
		if ends = ends[1:]; errors.Is(err, control.ErrPromoted) {
			// It won the arbiter before.
			rec := arbiter.Entry{Term: 2, Speaker: "alpha"}
			if _, won, err := o.Failover.Arbiter.Swap(t.Context(), b.Record, rec); !won || err != nil {
				t.Errorf("swap: %v, %v", won, err)
			}
		}
		return err
	}
	// The first to be primary has the record name it.
	run := func(line string, wantCode int, says string, want ...string) {
		t.Helper()
		parts = nil
		code, _, stderr := c.run(t.Context(), "run -c @/life.yaml "+line)
		if code != wantCode || !strings.Contains(lastLine(stderr), says) || !slices.Equal(parts, want) {
			t.Errorf("%s: exit %d, parts %q\nwant %d, %q\n%s", line, code, parts, wantCode, want, stderr)
		}
	}
	ends = []error{control.ErrFenced}
	c.write(t, "life.yaml", strings.Replace(pairYAML, "beta: {", "beta: {qmp: b.qmp, ", 1)+"arbiter: {type: file, path: "+dir+"}\nstate_dir: state\n")
	run("--node beta --role primary", 1, "may not transmit for the guest any more", `primary fencing term 1, speaker beta discard=true`)
	ends = []error{control.ErrAfresh, control.ErrPromoted, control.ErrFenced}
	run("--node alpha --role secondary", 1, "may not transmit",
		"secondary fencing term 1, speaker beta discard=true", "secondary fencing term 1, speaker beta discard=true", "primary fencing term 2, speaker alpha discard=true")
	run("--node beta --role primary", exitUsage, "beta is not primary any more: alpha transmits for the guest (fencing term 2, speaker alpha)")
	ends = []error{control.ErrFenced}
	run("--node alpha --role secondary", 1, "may not transmit", "primary fencing term 2, speaker alpha discard=true")

	// When a daemon began, and why it ended, is in the journal.
	events, err := journal.Read(filepath.Join(c.dir, "state"), "web1", "alpha", 0)
	if err != nil {
		t.Fatal(err)
	}
	var daemon []string
	for _, e := range events {
		if e.Kind == journal.Daemon {
			daemon = append(daemon, e.Cause)
		}
	}
	ended := "ended: " + control.ErrFenced.Error()
	if want := []string{"started", ended, "started", ended}; !slices.Equal(daemon, want) {
		t.Errorf("daemon events %q, want %q", daemon, want)
	}
}

// A daemon that is stopped while it asks the arbiter has done what it was told.
func TestStoppedBeforeARole(t *testing.T) {
	c := newCLI(t)
	missing := filepath.Join(t.TempDir(), "not-mounted")
	c.write(t, "stopped.yaml", pairYAML+"arbiter: {type: file, path: "+missing+"}\nstate_dir: state\n")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if code, _, stderr := c.run(ctx, "run -c @/stopped.yaml --node alpha --role primary"); code != exitOK || !strings.Contains(stderr, "the arbiter does not answer") {
		t.Errorf("exit %d, want 0:\n%s", code, stderr)
	}
	events, err := journal.Read(filepath.Join(c.dir, "state"), "web1", "alpha", 0)
	if err != nil || len(events) == 0 || events[len(events)-1].Cause != "ended: on request" {
		t.Errorf("the journal has %+v (%v)", events, err)
	}
}
