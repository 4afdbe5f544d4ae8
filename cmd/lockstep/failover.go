// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/lockstep-ft/lockstep/control/api"
)

func newFailover(e env) *cobra.Command {
	var force bool
	order := func(ctx context.Context, path string) (api.FailoverDone, error) {
		return api.OrderFailover(ctx, path, force)
	}
	cmd := newAsk(e, "failover", "Have this host's guest transmit alone", order, func(out io.Writer, f api.FailoverDone) error {
		_, err := fmt.Fprintf(out, "%s %s, after %.3f s.\n", f.Node, f.Result, f.Seconds)
		return err
	})
	cmd.Long = "failover on the secondary has it take over: the primary is muted, its guest stops, and\n" +
		"clients go on with this one. On the primary it ends replication: the guest goes on alone,\n" +
		"and the secondary starts again. A primary that has no secondary yet begins alone.\n" +
		"A takeover that would lose what the guest has sent to clients is refused without --force."
	cmd.Flags().BoolVar(&force, "force", false, "take over even if no checkpoint covers this secondary")
	return cmd
}
