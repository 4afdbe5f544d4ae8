// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"

	"lockstep/control"
	"lockstep/control/config"
)

// version is set by the Makefile.
var version string

func newRoot(e env) *cobra.Command {
	root := &cobra.Command{
		Use:           "lockstep",
		Short:         "COLO proxy in the kernel",
		Long:          "lockstep keeps two QEMU guests on two hosts in step: what the primary guest says\nleaves its host once the secondary guest has said the same.",
		Args:          cobra.NoArgs,
		SilenceErrors: true, // run prints them
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usageError{errors.New("which command? `lockstep --help` lists them")}
		},
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; `%s --help` lists the flags", err, cmd.CommandPath())}
	})
	root.AddCommand(newRun(e), newStatus(e), newFlows(e), newEvents(e), newStart(e), newCheckpoint(e), newFailover(e), newUpgrade(e), newUnload(e), newDoctor(e), newKeys(e), newVersion(e))
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
func (t *target) load() (c *config.Config, self, other *config.Node, err error) {
	switch {
	case t.file == "":
		return nil, nil, nil, usageError{errors.New("which pair? Name its config file with -c")}
	case t.node == "":
		return nil, nil, nil, usageError{fmt.Errorf("which of the hosts in %s is this one? Name it with --node", t.file)}
	}
	if c, err = config.Load(t.file); err != nil {
		return nil, nil, nil, usageError{err}
	}
	if self, other, err = c.Node(t.node); err != nil {
		return nil, nil, nil, usageError{err}
	}
	return c, self, other, nil
}

func newRun(e env) *cobra.Command {
	var (
		t           target
		role, level string
		metrics     string
		verifierLog bool
	)
	cmd := &cobra.Command{
		Use:   "run -c pair.yaml --node NAME --role primary|secondary",
		Short: "Run the daemon of this host in the foreground",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, self, other, err := t.load()
			if err != nil {
				return err
			}
			if role != string(control.RolePrimary) && role != string(control.RoleSecondary) {
				return usageError{fmt.Errorf("role %q is neither primary nor secondary; --role says which guest this host begins with", role)}
			}
			var lv slog.Level
			if err := lv.UnmarshalText([]byte(level)); err != nil {
				return usageError{fmt.Errorf("log level %q is none of debug, info, warn, error", level)}
			}
			return runDaemon(cmd.Context(), e, runOptions{
				config: c, self: self, other: other,
				primary:     role == string(control.RolePrimary),
				log:         newLogger(e, lv).With("vm", c.VM, "node", self.Name),
				verifierLog: verifierLog,
				metrics:     metrics,
			})
		},
	}
	t.flags(cmd)
	cmd.Flags().StringVar(&role, "role", "", "the role to begin with: primary or secondary")
	cmd.Flags().StringVar(&level, "log-level", "info", "debug, info, warn or error")
	cmd.Flags().StringVar(&metrics, "metrics", "", "serve Prometheus metrics at this address, like 127.0.0.1:9177; off by default")
	cmd.Flags().BoolVar(&verifierLog, "verifier-log", false, "print the whole verifier log when the kernel refuses a program")
	return cmd
}

func newStatus(e env) *cobra.Command {
	return newAsk(e, "status", "Show what this host's daemon is doing", control.FetchStatus, printStatus)
}

func newFlows(e env) *cobra.Command {
	return newAsk(e, "flows", "List the guest's connections: offset, compared position, what is held, age", control.FetchFlows, printFlows)
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
			return ask(cmd.Context(), &t, fetch, asJSON, e.stdout, show)
		},
	}
	t.flags(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newUpgrade(e env) *cobra.Command {
	var t target
	cmd := &cobra.Command{
		Use:   "upgrade -c pair.yaml --node NAME",
		Short: "Check whether this lockstep can take over from the daemon that runs",
		Long: "upgrade checks that this lockstep would go on from the tables that this host's daemon\n" +
			"has pinned: that it has the same ABI and sizes and a config that fits, that the kernel\n" +
			"takes its programs over them, and that the peer will have it. It changes nothing and\n" +
			"says what to do next. Run it in the daemon's network namespace.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, self, _, err := t.load()
			if err != nil {
				return err
			}
			from := ""
			for i, nic := range self.NICs {
				if from, err = e.kernel.upgradable(nicOptions{
					pinDir: c.PinDir, vm: c.VM, node: self.Name, index: i, tap: nic.Tap, compare: c.Compare, hash: c.Hash(), log: discard,
				}); err != nil {
					return fmt.Errorf("nic %d: %w", i, err)
				}
			}
			digest := c.Hash()
			switch s, err := control.FetchStatus(cmd.Context(), c.Socket(self.Name)); {
			case errors.Is(err, control.ErrNoDaemon): // it is gone already; who starts one finds out
			case err != nil:
				return err
			default:
				if err := s.Takes(hex.EncodeToString(digest[:])); err != nil {
					return fmt.Errorf("%w; docs/CONFIG.md says under \"Changing a setting\" in which order both nodes get it", err)
				}
			}
			_, err = fmt.Fprintf(e.stdout, "lockstep %s can take over %s on %s from lockstep %s.\n"+
				"Next: restart the daemon with this binary, in the same role. No checkpoint is needed.\n"+
				"Until the new daemon has its session, at most %v after it started while the peer is well,\n"+
				"the guest hears its clients but is not heard; what is lost both guests repeat.\n",
				versionString(), c.VM, self.Name, from, control.MaxRejoin)
			return err
		},
	}
	t.flags(cmd)
	return cmd
}

func newVersion(e env) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintln(e.stdout, "lockstep", versionString())
			return err
		},
	}
}

// versionString falls back to what the Go tool recorded.
func versionString() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return strings.TrimSpace(s.Value)
			}
		}
	}
	return "devel"
}
