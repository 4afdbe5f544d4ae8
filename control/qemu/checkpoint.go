// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/lockstep-ft/lockstep/control/qmp"
)

const (
	// pausedMark is the ID of an object that is in QEMU while its guest is stopped for a
	// checkpoint that has not been asked for yet. It does nothing, and is there as long as
	// that QEMU, whatever becomes of the daemon.
	pausedMark = "lockstep-pause"
	// drainTimeout is how long a guest's I/O under way may take to end at a checkpoint
	// before the connections to the secondary's disks are closed, and cutTimeout how long
	// it may take from then on. QEMU answers nothing else meanwhile.
	drainTimeout = 3 * time.Second
	cutTimeout   = time.Second
)

// Checkpoint has COLO begin a checkpoint of a primary. The guest is stopped first, and QEMU
// resumes it at the checkpoint's end: if a disk's error or a panic stopped it after QEMU
// began and before QEMU stops it itself, QEMU would abort (7.2 to 11), and a guest that is
// paused stays paused. If Checkpoint fails, a guest that ran goes on.
func Checkpoint(m *qmp.Monitor, disks []Disk) error {
	running, state, err := m.Status()
	if err != nil {
		return err
	}
	if !running {
		return fmt.Errorf("the guest is stopped: %s", state)
	}
	if err := m.Execute("object-add", map[string]string{"qom-type": "rng-builtin", "id": pausedMark}, nil); err != nil {
		return err
	}
	if err := pauseAndAsk(m, disks); err != nil {
		return errors.Join(err, Unpause(m))
	}
	return m.Execute("object-del", map[string]string{"id": pausedMark}, nil)
}

func pauseAndAsk(m *qmp.Monitor, disks []Disk) error {
	hangs := time.AfterFunc(drainTimeout, func() { _ = cut(m, disks) }) // Stop reports whether that helped
	err := m.ExecuteWithin(drainTimeout+cutTimeout, "stop", nil, nil)
	if hangs.Stop(); err != nil {
		return err
	}
	if _, state, err := m.Status(); err != nil {
		return err
	} else if state != "paused" { // QEMU would abort in most others, one being that of a guest that was reset just now
		return fmt.Errorf("the guest is stopped: %s", state)
	}
	if err := m.Checkpoint(); err != nil {
		return err
	}
	// QEMU takes the request without a word when COLO has ended, and nothing follows.
	mode, err := m.COLO()
	if err == nil && mode != "primary" {
		err = fmt.Errorf("COLO mode is %q", mode)
	}
	return err
}

// Unpause resumes a guest that [Checkpoint] stopped, if it did not come to ask for the
// checkpoint: it failed, or its daemon died.
func Unpause(m *qmp.Monitor) error {
	var objects []struct{ Name string }
	if err := m.Execute("qom-list", map[string]string{"path": "/objects"}, &objects); err != nil {
		return err
	}
	if !slices.ContainsFunc(objects, func(o struct{ Name string }) bool { return o.Name == pausedMark }) {
		return nil
	}
	_, state, err := m.Status()
	if err == nil && (state == "paused" || state == "prelaunch") { // prelaunch: it was reset meanwhile
		err = Cont(m)
	}
	if err != nil {
		return err
	}
	return m.Execute("object-del", map[string]string{"id": pausedMark}, nil)
}
