// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/lockstep-ft/lockstep/control/config"
)

func newDoctor(e env) *cobra.Command {
	var t target
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor [-c pair.yaml [--node NAME]]",
		Short: "Report what this host lacks to run lockstep, and how to fix it",
		Long: "doctor looks at this host, and with -c at what the config requires of it. It changes\n" +
			"nothing. It exits with 0 when lockstep can run here, with 1 when it cannot.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var c *config.Config
			if t.file == "" && t.node != "" {
				return usageError{errors.New("--node names a host of a config file; name the file with -c")}
			}
			if t.file != "" {
				var err error
				if c, err = loadConfig(e, t.file); err != nil {
					return usageError{err}
				}
				if t.node != "" {
					if _, _, err := c.Node(t.node); err != nil {
						return usageError{err}
					}
				}
			}
			r := e.examine(cmd.Context(), c, t.node)
			if err := r.Write(e.stdout, asJSON); err != nil {
				return err
			}
			return r.Err()
		},
	}
	t.flags(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}
