// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"lockstep/control/qmp"
)

// cut ends the connections to the other host: what waits for it, and may hold up
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

// PrimaryFailover makes a primary whose secondary is dead go on alone. It returns
// when COLO is off and the guest runs, or stands still for a reason of its own. What
// it could not write to the secondary's disks is done again on its own.
func PrimaryFailover(ctx context.Context, m *qmp.Monitor, disks []Disk) error {
	// First of all: a guest's write that waits for a silent host can hold up
	// every other command.
	err := cut(m, disks)
	// A disk that keeps the secondary's image must not keep the guest in COLO.
	return errors.Join(err, detach(m, disks), lostHeartbeat(ctx, m, "primary"), Retry(m))
}

// SecondaryFailover makes a secondary whose primary is dead take over. It
// returns when COLO is off and the guest runs, or stands still for a reason of its own.
// A secondary whose guest is not in
// COLO yet cannot, and its QEMU may end.
func SecondaryFailover(ctx context.Context, m *qmp.Monitor, disks []Disk) error {
	// A QEMU that reads a checkpoint from a silent host answers nothing else.
	cutErr := cut(m, nil)
	_, state, err := m.Status()
	if err != nil {
		return err
	}
	if state == "inmigrate" {
		if mode, err := m.COLO(); err != nil || mode != "secondary" {
			return errors.Join(errors.New("this secondary has no guest that could take over: it still waits for the primary's"), err)
		}
	}
	if len(disks) > 0 {
		if err := m.ExecuteWithin(slow, "nbd-server-stop", nil, nil); err != nil && !strings.Contains(err.Error(), "not running") {
			return err
		}
	}
	return errors.Join(cutErr, lostHeartbeat(ctx, m, "secondary"))
}

// lostHeartbeat ends COLO.
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
		// It ended by itself meanwhile?
		if is, e := m.COLO(); e != nil || is != "none" {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, settle)
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

// ownState are the states of a guest that stands still for a reason of its own, not of
// COLO's.
var ownState = map[string]bool{
	"io-error": true, "guest-panicked": true, "watchdog": true, "internal-error": true, "shutdown": true, "suspended": true, "prelaunch": true,
}

// Retry has a guest go on that QEMU stopped because a disk failed: it tries the
// request again. When that fails, too, QEMU stops it again. Nothing, when the guest
// stands still for another reason, or runs.
func Retry(m *qmp.Monitor) error {
	_, state, err := m.Status()
	if err != nil || state != "io-error" {
		return err
	}
	return Cont(m)
}

// Announce has every switch on the way learn where the guest's addresses are now.
func Announce(m *qmp.Monitor) error {
	return m.Execute("announce-self", map[string]int{"initial": 50, "max": 550, "rounds": 5, "step": 50}, nil)
}
