// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"strings"
	"testing"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// order runs lockstep with a node's command and returns what it printed.
func (p *livingPair) order(node string, args ...string) (string, error) {
	cmd := p.lockstep(append(args, "-c", p.config, "--node", node)...)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, errs.String())
	}
	return string(out), err
}

// TestOperator: what an operator may ask a pair for.
func TestOperator(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	watch := lt.WatchTransmitters(t, p.Switch, "portP", "portS")
	c := p.open()
	out, err := p.order("alpha", "checkpoint")
	if err != nil || !strings.Contains(out, "is committed") {
		t.Errorf("checkpoint: %q, %v", out, err)
	}
	if out, err := p.order("beta", "checkpoint"); err == nil || !strings.Contains(err.Error(), "checkpoints are the primary's: ask alpha") {
		t.Errorf("checkpoint on the secondary: %q, %v", out, err)
	}
	// A planned takeover.
	if out, err = p.order("beta", "failover"); err != nil || !strings.Contains(out, "beta transmits alone") {
		t.Fatalf("failover: %q, %v", out, err)
	}
	t.Log(out)
	c.ask(1)
	p.procs["alpha"].Wait()
	// A unit that starts the old primary in its old role (R19).
	p.run("alpha", "primary")
	if err := p.procs["alpha"].Wait(); err == nil || p.procs["alpha"].ProcessState.ExitCode() != exitUsage {
		t.Errorf("the old primary, started as one: %v", err)
	}
	if log := p.log("alpha"); !strings.Contains(log, "is not primary any more: beta transmits") {
		t.Error("the old primary does not say why it does not start")
	}
	p.run("alpha", "secondary")
	p.covered()
	c.ask(1)
	// The primary goes on alone, and its secondary starts again.
	if out, err = p.order("beta", "failover"); err != nil || !strings.Contains(out, "beta transmits alone") {
		t.Errorf("failover of the primary: %q, %v", out, err)
	}
	p.covered()
	c.ask(1)
	twoTurns(t, watch)
	out, err = p.order("beta", "events", "--json")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"kind":"failover","cause":"took over"`, `"role":"primary"`, `"kind":"checkpoint"`, `"kind":"sync"`} {
		if !strings.Contains(out, want) {
			t.Errorf("no %s among the events:\n%s", want, out)
		}
	}
}
