// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/lockstep-ft/lockstep/control/api"
)

func newFlows(e env) *cobra.Command {
	return newAsk(e, "flows", "List the guest's connections: offset, compared position, what is held, age", api.FetchFlows, printFlows)
}

func printFlows(out io.Writer, flows []api.Flow) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "GUEST\tREMOTE\tVLAN\tSTATE\tOWNER\tOFFSET\tCOMPARED\tHELD\tAGE")
	for _, f := range flows {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d/%d B\t%v\n", f.Guest, f.Remote, dash(f.VLAN), f.State, cmp.Or(f.Owner, "-"),
			dash(f.Offset), dash(f.Compared), f.HeldPackets, f.HeldBytes,
			time.Duration(f.Age*float64(time.Second)).Round(time.Millisecond))
	}
	return w.Flush()
}

// dash prints what is not known, or does not apply, as a dash.
func dash[T any](v *T) string {
	if v == nil {
		return "-"
	}
	return fmt.Sprint(*v)
}
