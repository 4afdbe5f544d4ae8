// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/lockstep-ft/lockstep/control/journal"
)

func newEvents(e env) *cobra.Command {
	var t target
	var asJSON bool
	var last int
	cmd := &cobra.Command{
		Use:   "events -c pair.yaml --node NAME",
		Short: "List what happened on this host: checkpoints, failovers, changes of role",
		Long:  "events lists what this host's daemons have noted, across restarts. It needs no daemon.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, self, _, err := t.load(e)
			if err != nil {
				return err
			}
			events, err := journal.Read(c.StateDir, c.VM, self.Name, last)
			if err != nil {
				return err
			}
			if asJSON {
				enc := json.NewEncoder(e.stdout)
				for _, ev := range events {
					if err := enc.Encode(ev); err != nil {
						return err
					}
				}
				return nil
			}
			return printEvents(e.stdout, events)
		},
	}
	t.flags(cmd)
	cmd.Flags().IntVar(&last, "last", 0, "only so many of the newest; 0: all that are kept")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, one event a line")
	return cmd
}

func printEvents(out io.Writer, events []journal.Event) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "TIME\tKIND\tCAUSE\tMORE")
	for _, ev := range events {
		var more []string
		for _, k := range slices.Sorted(maps.Keys(ev.Fields)) {
			more = append(more, fmt.Sprintf("%s=%v", k, ev.Fields[k]))
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", ev.Time.Local().Format("2006-01-02 15:04:05.000"), ev.Kind, ev.Cause, strings.Join(more, " "))
	}
	return w.Flush()
}
