// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	"github.com/lockstep-ft/lockstep/control/api"
)

// daemonOf answers on alpha's status socket until the test ends.
func (c *cli) daemonOf(t *testing.T, s api.Source) {
	t.Helper()
	l, err := api.Listen(t.Context(), filepath.Join(c.dir, "run/web1-alpha.sock"))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	ctx, stop := context.WithCancel(context.Background())
	go func() { ended <- api.Serve(ctx, l, s, discard) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// orders are a daemon's answers to orders.
type orders struct {
	api.Source
	checkpoint func() (api.Checkpoint, error)
	failover   func(force bool) (api.FailoverDone, error)
}

func (o orders) Checkpoint(context.Context) (api.Checkpoint, error) { return o.checkpoint() }

func (o orders) Failover(_ context.Context, force bool) (api.FailoverDone, error) {
	return o.failover(force)
}

func TestFailover(t *testing.T) {
	c := newCLI(t)
	c.daemonOf(t, orders{failover: func(force bool) (api.FailoverDone, error) {
		if !force {
			return api.FailoverDone{}, errors.New("no checkpoint covers this secondary")
		}
		return api.FailoverDone{Node: "alpha", Result: "transmits alone", Seconds: 0.25}, nil
	}})
	const line = "failover -c @/pair.yaml --node alpha"
	if code, stdout, stderr := c.run(t.Context(), line); code != exitFailed || stdout != "" || stderr != "lockstep: no checkpoint covers this secondary\n" {
		t.Errorf("exit %d, %q, %q", code, stdout, stderr)
	}
	if code, stdout, stderr := c.run(t.Context(), line+" --force"); code != 0 || stdout != "alpha transmits alone, after 0.250 s.\n" {
		t.Errorf("--force: exit %d, %q, %q", code, stdout, stderr)
	}
}
