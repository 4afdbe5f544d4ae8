// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"testing"

	"github.com/lockstep-ft/lockstep/control/api"
)

func TestCheckpoint(t *testing.T) {
	c := newCLI(t)
	err := errors.New("checkpoints are the primary's: ask beta")
	c.daemonOf(t, orders{checkpoint: func() (api.Checkpoint, error) {
		return api.Checkpoint{Epoch: 9, FrozenMS: 12.34, PVMPauseMS: 5, SVMPauseMS: 7.5}, err
	}})
	const line = "checkpoint -c @/pair.yaml --node alpha"
	if code, stdout, stderr := c.run(t.Context(), line); code != exitFailed || stdout != "" || stderr != "lockstep: "+err.Error()+"\n" {
		t.Errorf("exit %d, %q, %q", code, stdout, stderr)
	}
	err = nil
	const want = "Checkpoint 9 is committed: the primary's output was held for 12.3 ms, its guest stood still for 5.0 ms, the secondary's for 7.5 ms.\n"
	if code, stdout, stderr := c.run(t.Context(), line); code != 0 || stdout != want {
		t.Errorf("exit %d, %q, %q, want %q", code, stdout, stderr, want)
	}
}
