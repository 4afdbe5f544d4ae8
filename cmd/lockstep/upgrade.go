// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/peerlink"
)

func newUpgrade(e env) *cobra.Command {
	var t target
	cmd := &cobra.Command{
		Use:   "upgrade -c pair.yaml --node NAME",
		Short: "Check whether this lockstep can take over from the daemon that runs",
		Long: "upgrade checks that this lockstep would go on from the tables that this host's daemon\n" +
			"has pinned: that it has the same ABI and sizes and a config that fits, that it takes\n" +
			"the certificates, that the kernel takes its programs over them, and that the peer\n" +
			"will have it. It changes nothing and prints what to do next. Run it in the daemon's\n" +
			"network namespace.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, self, other, err := t.load(e)
			if err != nil {
				return err
			}
			if err := protect(&runOptions{config: c, self: self, other: other}); err != nil {
				return err
			}
			from := ""
			for i := range self.NICs {
				if from, err = e.kernel.upgradable(tables(c, self, i, discard)); err != nil {
					return fmt.Errorf("nic %d: %w", i, err)
				}
			}
			digest := c.Hash()
			switch s, err := api.FetchStatus(cmd.Context(), c.Socket(self.Name)); {
			case errors.Is(err, api.ErrNoDaemon): // it is gone already; who starts one finds out
			case err != nil:
				return err
			default:
				if err := s.Takes(peerlink.Version, hex.EncodeToString(digest[:])); err != nil {
					return fmt.Errorf("%w; docs/CONFIG.md describes under \"Changing a setting\" in which order both nodes get it", err)
				}
			}
			_, err = fmt.Fprintf(e.stdout, "lockstep %s can take over %s on %s from lockstep %s.\n"+
				"Next: restart the daemon with this binary and the same command line. No checkpoint is needed.\n"+
				"Until the new daemon has its session, at most %v after it started while the peer is well,\n"+
				"the guest receives but does not transmit; TCP retransmits what is lost.\n",
				versionString(), c.VM, self.Name, from, peerlink.MaxRejoin)
			return err
		},
	}
	t.flags(cmd)
	return cmd
}
