// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/lockstep-ft/lockstep/control/qmp"
)

// cut closes the connections to the other host, so that what waits for it, and may block
// the whole QEMU, fails.
func cut(m *qmp.Monitor, disks []Disk) error {
	return m.Yank(func(l qmp.Link) bool {
		if isMigration(l) {
			return true
		}
		for i := range disks {
			if l.Type == "block-node" && l.Node == nbdNode(i) {
				return true
			}
		}
		return false
	})
}

// PrimaryFailover has a primary go on without its secondary. It returns when COLO is
// off and the guest runs, or is stopped for a reason of its own. Writes that failed on
// the secondary's disks are repeated on this host's alone.
func PrimaryFailover(ctx context.Context, m *qmp.Monitor, disks []Disk) error {
	// This comes first: a write of the guest's that waits for a host which does not answer
	// can block every other command.
	err := cut(m, disks)
	// If a disk cannot be detached, COLO has to be ended all the same.
	return errors.Join(err, detach(m, disks), lostHeartbeat(ctx, m, "primary"), Retry(m))
}

// LeavePrimary ends what a secondary receives of its primary, and reports whether its guest runs.
// A checkpoint that has come whole is loaded all the same.
func LeavePrimary(m *qmp.Monitor) (running bool, err error) {
	// A QEMU that reads a checkpoint from a host which does not answer runs no command.
	cutErr := cut(m, nil)
	running, _, err = m.Status()
	return running, errors.Join(err, cutErr)
}

// SecondaryFailover has a secondary take over from its primary. It returns when COLO is
// off and the guest runs, or is stopped for a reason of its own. A secondary whose guest
// is not in COLO yet cannot take over, and its QEMU may end.
func SecondaryFailover(ctx context.Context, m *qmp.Monitor, disks []Disk) error {
	// A QEMU that reads a checkpoint from a host which does not answer runs no command.
	cutErr := cut(m, nil)
	_, state, err := m.Status()
	if err != nil {
		return err
	}
	if state == "inmigrate" {
		if mode, err := m.COLO(); err != nil || mode != "secondary" {
			return errors.Join(errors.New("this secondary has no guest that could take over: it still waits for the primary's memory"), err)
		}
	}
	if len(disks) > 0 {
		if err := m.ExecuteWithin(ioTimeout, "nbd-server-stop", nil, nil); err != nil && !strings.Contains(err.Error(), "not running") {
			return err
		}
	}
	return errors.Join(cutErr, lostHeartbeat(ctx, m, "secondary"))
}

// lostHeartbeat ends COLO on a guest that is in it as mode, "primary" or "secondary".
func lostHeartbeat(ctx context.Context, m *qmp.Monitor, mode string) error {
	is, err := m.COLO()
	if err != nil {
		return err
	}
	if is == "none" {
		return nil
	}
	if is != mode {
		return fmt.Errorf("the guest is %s in COLO, not %s", is, mode)
	}
	if err := m.Execute("x-colo-lost-heartbeat", nil, nil); err != nil {
		// The command is refused when COLO has ended meanwhile, which is as good.
		if is, e := m.COLO(); e != nil || is != "none" {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, stateTimeout)
	defer cancel()
	return until(ctx, "COLO has ended", func() (bool, error) {
		mode, err := m.COLO()
		if err != nil || mode != "none" {
			return false, err
		}
		running, state, err := m.Status()
		return running || ownState[state], err
	})
}

// ownState are the states of a guest that is stopped for another reason than COLO.
var ownState = map[string]bool{
	"io-error": true, "guest-panicked": true, "watchdog": true, "internal-error": true, "shutdown": true, "suspended": true, "prelaunch": true,
}

// Retry resumes a guest that QEMU stopped because of an I/O error. QEMU repeats the
// request, and stops the guest again if that fails too. A guest that runs, or is stopped
// for another reason, is left as it is.
func Retry(m *qmp.Monitor) error {
	_, state, err := m.Status()
	if err != nil || state != "io-error" {
		return err
	}
	return Cont(m)
}

// Announce has the guest's NICs announce their addresses, so that every switch learns
// where they are now.
func Announce(m *qmp.Monitor) error {
	return m.Execute("announce-self", map[string]int{"initial": 50, "max": 550, "rounds": 5, "step": 50}, nil)
}
