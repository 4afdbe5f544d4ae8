// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/lockstep-ft/lockstep/control/api"
)

func newCheckpoint(e env) *cobra.Command {
	cmd := newAsk(e, "checkpoint", "Bring the secondary guest up to date now", api.OrderCheckpoint, func(out io.Writer, c api.Checkpoint) error {
		_, err := fmt.Fprintf(out, "Checkpoint %d is committed: the primary's output was held for %.1f ms, its guest stood still for %.1f ms, the secondary's for %.1f ms.\n",
			c.Epoch, c.FrozenMS, c.PVMPauseMS, c.SVMPauseMS)
		return err
	})
	cmd.Long = "checkpoint orders a checkpoint from the primary's daemon and returns when it is committed."
	return cmd
}
