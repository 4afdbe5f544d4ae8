// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"fmt"
	"time"

	"github.com/lockstep-ft/lockstep/control/qmp"
)

const (
	pollInterval = 20 * time.Millisecond
	// ioTimeout is the deadline of commands that wait for the guest's I/O.
	ioTimeout = 15 * time.Second
	// stateTimeout is how long QEMU may take for a change of state that needs no further
	// command.
	stateTimeout = 15 * time.Second
	// nbdTimeout is how many seconds QEMU waits for the secondary's NBD server. The
	// guest waits too.
	nbdTimeout = 1
)

// Stop stops the guest once its I/O under way is done.
func Stop(m *qmp.Monitor) error { return m.ExecuteWithin(ioTimeout, "stop", nil, nil) }

// Cont resumes a guest that was stopped.
func Cont(m *qmp.Monitor) error { return m.ExecuteWithin(ioTimeout, "cont", nil, nil) }

// Shutdown presses the guest's power button (ACPI).
func Shutdown(m *qmp.Monitor) error { return m.Execute("system_powerdown", nil, nil) }

// Quit ends QEMU after a flush of its images.
func Quit(m *qmp.Monitor) error { return m.ExecuteWithin(ioTimeout, "quit", nil, nil) }

// until polls done until it is true or fails, or ctx ends. what completes "waiting until".
func until(ctx context.Context, what string, done func() (bool, error)) error {
	tick := time.NewTicker(pollInterval)
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
