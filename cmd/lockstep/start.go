// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/lockstep-ft/lockstep/control/state"
)

func newStart(e env) *cobra.Command {
	var t target
	cmd := &cobra.Command{
		Use:   "start -c pair.yaml --node NAME",
		Short: "Have a guest that powered off boot again with the next run",
		Long: "start forgets that the guest powered off while this host was its primary. `lockstep run`, or\n" +
			"the unit that runs it, boots the guest then. It changes nothing else, and needs no daemon.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, self, _, err := t.load(e)
			if err != nil {
				return err
			}
			release, err := e.kernel.lock(c.PinDir, c.VM, self.Name)
			if err != nil {
				return err
			}
			defer release()
			store, err := state.Open(c.StateDir, c.VM, self.Name)
			if err != nil {
				return err
			}
			st, err := store.Load()
			if err != nil {
				return err
			}
			if !st.Off {
				return fmt.Errorf("%s did not power off while %s was its primary, so there is nothing to forget: start the daemon", c.VM, self.Name)
			}
			st.Off = false
			if err := store.Save(st); err != nil {
				return err
			}
			_, err = fmt.Fprintf(e.stdout, "The next `lockstep run` on %s boots %s.\n", self.Name, c.VM)
			return err
		},
	}
	t.flags(cmd)
	return cmd
}
