// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/spf13/cobra"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/config"
)

func newRoot(e env) *cobra.Command {
	root := &cobra.Command{
		Use:           "lockstep",
		Short:         "COLO proxy in the kernel",
		Long:          "lockstep keeps two QEMU guests on two hosts in step: the primary guest's\noutput leaves its host once the secondary guest has produced the same.",
		Args:          cobra.NoArgs,
		SilenceErrors: true, // run prints them
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usageError{errors.New("which command? `lockstep --help` lists them")}
		},
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.Version = versionString()
	root.SetVersionTemplate("lockstep {{.Version}}\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; `%s --help` lists the flags", err, cmd.CommandPath())}
	})
	root.AddCommand(newRun(e), newStatus(e), newFlows(e), newTop(e), newEvents(e), newDiverge(e), newExplain(e), newStart(e), newCheckpoint(e), newFailover(e), newUpgrade(e), newUnload(e), newDoctor(e), newKeys(e), newBench(e), newDemo(e), newVersion(e), newMan(root))
	for _, cmd := range append(root.Commands(), root) {
		args := cmd.Args
		cmd.Args = func(cmd *cobra.Command, a []string) error {
			if err := args(cmd, a); err != nil {
				return usageError{fmt.Errorf("%w; `%s --help` shows the usage", err, cmd.CommandPath())}
			}
			return nil
		}
	}
	return root
}

// target is the daemon that a command is about.
type target struct {
	file, node string
}

func (t *target) flags(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&t.file, "config", "c", "", "the pair's config file")
	cmd.Flags().StringVar(&t.node, "node", "", "this host's name in the config")
}

// load reads the config and finds the node in it.
func (t *target) load(e env) (c *config.Config, self, other *config.Node, err error) {
	switch {
	case t.file == "":
		return nil, nil, nil, usageError{errors.New("which pair? Name its config file with -c")}
	case t.node == "":
		return nil, nil, nil, usageError{fmt.Errorf("which of the hosts in %s is this one? Name it with --node", t.file)}
	}
	if c, err = loadConfig(e, t.file); err != nil {
		return nil, nil, nil, usageError{err}
	}
	if self, other, err = c.Node(t.node); err != nil {
		return nil, nil, nil, usageError{err}
	}
	return c, self, other, nil
}

// loadConfig reads a config, and warns of what the next release will refuse.
func loadConfig(e env, file string) (*config.Config, error) {
	c, err := config.Load(file)
	if err != nil {
		return nil, err
	}
	for _, w := range c.Warnings {
		fmt.Fprintf(e.stderr, "%s: warning: %s; %s\n", w.Pos, w.Reason, w.Fix)
	}
	return c, nil
}

// newAsk is a command that asks this host's daemon for something and shows it.
func newAsk[T any](e env, name, short string, fetch func(context.Context, string) (T, error), show func(io.Writer, T) error) *cobra.Command {
	var t target
	var asJSON bool
	cmd := &cobra.Command{
		Use:   name + " -c pair.yaml --node NAME",
		Short: short,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return ask(cmd.Context(), e, &t, fetch, asJSON, show)
		},
	}
	t.flags(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// ask prints what the daemon answers.
func ask[T any](ctx context.Context, e env, t *target, fetch func(context.Context, string) (T, error), asJSON bool, show func(io.Writer, T) error) error {
	c, self, _, err := t.load(e)
	if err != nil {
		return err
	}
	socket := c.Socket(self.Name)
	v, err := fetch(ctx, socket)
	switch {
	case errors.Is(err, api.ErrNoDaemon):
		return noDaemonError{vm: c.VM, node: self.Name, socket: socket}
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s is not yours to read; run this as root", socket)
	case err != nil:
		return err
	}
	if asJSON {
		enc := json.NewEncoder(e.stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	}
	return show(e.stdout, v)
}

// noDaemonError is control.ErrNoDaemon with a remedy.
type noDaemonError struct{ vm, node, socket string }

func (e noDaemonError) Error() string {
	return fmt.Sprintf("no daemon of %s runs on node %s (nobody answers on %s); start it with `lockstep run`", e.vm, e.node, e.socket)
}

func (noDaemonError) Unwrap() error { return api.ErrNoDaemon }
