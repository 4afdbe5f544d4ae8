// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/journal"
)

func newDiverge(e env) *cobra.Command {
	var t target
	var since time.Duration
	cmd := &cobra.Command{
		Use:   "diverge -c pair.yaml --node NAME",
		Short: "List which services of the guest cost checkpoints, and why",
		Long: "diverge adds up the checkpoints that connections of the guest asked for, by service and cause, and says\n" +
			"what to do about each cause. It reads what this host's daemons have noted, on the host whose guest was the\n" +
			"primary then, and needs no daemon. WHERE says in what the guests differed the last time, as far as digests and\n" +
			"headers tell; bytes are counted from 0 in what the guest has sent on the connection.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, self, _, err := t.load(e)
			if err != nil {
				return err
			}
			events, err := journal.Read(c.StateDir, c.VM, self.Name, 0)
			if err != nil {
				return err
			}
			if since > 0 {
				from := time.Now().Add(-since)
				events = slices.DeleteFunc(events, func(ev journal.Event) bool { return ev.Time.Before(from) })
			}
			return printDivergences(e.stdout, events)
		},
	}
	t.flags(cmd)
	cmd.Flags().DurationVar(&since, "since", 0, "only those of so long ago at most; 0: all that are kept")
	return cmd
}

// divergence is what the connections of one service cost for one cause.
type divergence struct {
	service, cause string
	count          int
	frozen         float64 // ms in which nothing left
	last           time.Time
	flow, where    string // those of the last
}

// serviceOf names what a connection, guest>remote, is about: the guest's port, or the remote's where that is the
// lower one, since clients have high ports.
func serviceOf(flow string) string {
	guest, remote, _ := strings.Cut(flow, ">")
	g, err := netip.ParseAddrPort(guest)
	r, err2 := netip.ParseAddrPort(remote)
	switch {
	case err != nil || err2 != nil:
		return flow
	case r.Port() < g.Port():
		return "client of " + remote
	}
	return fmt.Sprintf("port %d", g.Port())
}

// divergences adds the checkpoints up that connections asked for; others counts those of other causes.
func divergences(events []journal.Event) (out []*divergence, others int) {
	for _, ev := range events {
		if ev.Kind != journal.Checkpoint {
			continue
		}
		flow, _ := ev.Fields["flow"].(string)
		if flow == "" {
			others++
			continue
		}
		service := serviceOf(flow)
		i := slices.IndexFunc(out, func(d *divergence) bool { return d.service == service && d.cause == ev.Cause })
		if i < 0 {
			i = len(out)
			out = append(out, &divergence{service: service, cause: ev.Cause})
		}
		d := out[i]
		if n, ok := ev.Fields["frozen_ms"].(json.Number); ok {
			ms, _ := n.Float64()
			d.frozen += ms
		}
		d.count++
		d.last, d.flow = ev.Time, flow
		d.where, _ = ev.Fields["where"].(string)
	}
	slices.SortStableFunc(out, func(a, b *divergence) int { return cmp.Compare(b.frozen, a.frozen) })
	return out, others
}

func printDivergences(out io.Writer, events []journal.Event) error {
	ds, others := divergences(events)
	if len(ds) == 0 {
		_, err := fmt.Fprintf(out, "No connection asked for a checkpoint. Checkpoints for other causes: %d.\n", others)
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "SERVICE\tCAUSE\tCHECKPOINTS\tOUTPUT HELD\tLAST\tCONNECTION\tWHERE")
	var causes []string
	for _, d := range ds {
		fmt.Fprintf(w, "%s\t%s\t%d\t%.1f s\t%s\t%s\t%s\n", d.service, d.cause, d.count, d.frozen/1e3, d.last.Local().Format("2006-01-02 15:04:05"), d.flow, d.where)
		if !slices.Contains(causes, d.cause) {
			causes = append(causes, d.cause)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(out, "\nCheckpoints for other causes: %d.\n", others)
	for _, cause := range causes {
		if r, ok := api.Explain(cause); ok {
			fmt.Fprintf(out, "\n%s: %s\n  To do: %s\n", r.Name, r.Means, r.Do)
		}
	}
	return nil
}
