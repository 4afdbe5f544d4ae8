// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lockstep-ft/lockstep/control/api"
)

func newExplain(e env) *cobra.Command {
	return &cobra.Command{
		Use:   "explain [REASON]",
		Short: "Say what a reason or a counter means, and what to do about it",
		Long: "explain says what the cause of a checkpoint, the reason of a drop or a counter means that status, events\n" +
			"and the metrics name, and what to do about it. Without a name it lists all. It needs no daemon.",
		Example: "  lockstep explain payload differs\n  lockstep explain no_slot",
		Args:    cobra.ArbitraryArgs, // a name may have several words
		RunE: func(_ *cobra.Command, words []string) error {
			if len(words) == 0 {
				for i, r := range api.Reasons() {
					if i > 0 {
						fmt.Fprintln(e.stdout)
					}
					printReason(e.stdout, r)
				}
				return nil
			}
			name := strings.Join(words, " ")
			r, ok := api.Explain(name)
			if !ok {
				return usageError{fmt.Errorf("nothing is named %q; did you mean %s? `lockstep explain` lists all", name, strings.Join(api.Nearest(name), ", or "))}
			}
			printReason(e.stdout, r)
			return nil
		},
	}
}

func printReason(out io.Writer, r api.Reason) {
	fmt.Fprintf(out, "%s (%s)\n  %s\n  To do: %s\n", r.Name, r.Kind, r.Means, r.Do)
}
