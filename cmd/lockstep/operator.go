// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"lockstep/control"
	"lockstep/control/journal"
	"lockstep/control/state"
)

func newCheckpoint(e env) *cobra.Command {
	cmd := newAsk(e, "checkpoint", "Bring the secondary guest up to date now", control.OrderCheckpoint, func(out io.Writer, c control.Checkpoint) error {
		_, err := fmt.Fprintf(out, "Checkpoint %d is committed: the primary's output was held for %.1f ms, its guest stood still for %.1f ms, the secondary's for %.1f ms.\n",
			c.Epoch, c.FrozenMS, c.PVMPauseMS, c.SVMPauseMS)
		return err
	})
	cmd.Long = "checkpoint orders a checkpoint from the primary's daemon and returns when it is committed."
	return cmd
}

func newFailover(e env) *cobra.Command {
	var force bool
	order := func(ctx context.Context, path string) (control.FailoverDone, error) {
		return control.OrderFailover(ctx, path, force)
	}
	cmd := newAsk(e, "failover", "Have this host's guest speak alone", order, func(out io.Writer, f control.FailoverDone) error {
		_, err := fmt.Fprintf(out, "%s %s, after %.3f s.\n", f.Node, f.Result, f.Seconds)
		return err
	})
	cmd.Long = "failover on the secondary has it take over: the primary falls silent, its guest stops, and\n" +
		"clients go on with this one. On the primary it ends replication: the guest goes on alone,\n" +
		"and the secondary's begins afresh. A primary that has no secondary yet begins alone.\n" +
		"A takeover that would lose what the guest has told clients is refused without --force."
	cmd.Flags().BoolVar(&force, "force", false, "take over even if no checkpoint covers this secondary")
	return cmd
}

func newStart(e env) *cobra.Command {
	var t target
	cmd := &cobra.Command{
		Use:   "start -c pair.yaml --node NAME",
		Short: "Have a guest that powered off boot again with the next run",
		Long: "start forgets that the guest powered off while this host was its primary. `lockstep run`, or\n" +
			"the unit that runs it, boots the guest then. It changes nothing else, and needs no daemon.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, self, _, err := t.load()
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
			c, self, _, err := t.load()
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

// serveMetrics serves them over all parts of a daemon's life, and while there is none.
func serveMetrics(ctx context.Context, o runOptions) (stop func(), err error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", o.metrics)
	if err != nil {
		return nil, usageError{fmt.Errorf("--metrics %s: %w", o.metrics, err)}
	}
	socket := o.config.Socket(o.self.Name)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", control.MetricsHandler(o.config.VM, o.self.Name, func() *control.Status {
		s, err := control.FetchStatus(ctx, socket)
		if err != nil {
			return nil
		}
		return &s
	}))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, ErrorLog: slog.NewLogLogger(o.log.Handler(), slog.LevelWarn)}
	go srv.Serve(l)
	o.log.Info("metrics", "address", l.Addr())
	return func() { srv.Close() }, nil
}
