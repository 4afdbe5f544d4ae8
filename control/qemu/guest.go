// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"fmt"
	"time"

	"lockstep/control/qmp"
)

const (
	poll = 20 * time.Millisecond
	// slow is the deadline of commands that wait for the guest's I/O.
	slow = 15 * time.Second
	// settle is how long QEMU may take between two states that follow by
	// themselves.
	settle = 15 * time.Second
	// nbdConnect bounds in seconds how long QEMU, and its guest with it, waits
	// for the secondary's NBD server.
	nbdConnect = 1
)

// Stop stops the guest's CPUs, when its I/O under way is done.
func Stop(m *qmp.Monitor) error { return m.ExecuteWithin(slow, "stop", nil, nil) }

// Cont lets a guest that was stopped go on.
func Cont(m *qmp.Monitor) error { return m.ExecuteWithin(slow, "cont", nil, nil) }

// Shutdown asks the guest to shut down, as its power button does.
func Shutdown(m *qmp.Monitor) error { return m.Execute("system_powerdown", nil, nil) }

// Quit ends QEMU, with its images written back.
func Quit(m *qmp.Monitor) error { return m.ExecuteWithin(slow, "quit", nil, nil) }

// until asks again and again until it is done, fails or ctx ends.
func until(ctx context.Context, what string, done func() (bool, error)) error {
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting until %s: %w", what, context.Cause(ctx))
		}
	}
}
