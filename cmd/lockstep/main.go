// SPDX-License-Identifier: Apache-2.0

// Command lockstep is a COLO proxy in the kernel: the primary guest's output leaves its
// host once the secondary guest has produced the same.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/lockstep-ft/lockstep/cmd/lockstep/doctor"
	"github.com/lockstep-ft/lockstep/control"
	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/config"
)

// Exit codes, a contract with scripts and the systemd unit.
const (
	exitOK       = 0
	exitFailed   = 1
	exitUsage    = 2 // the command line or the config is wrong: a restart cannot help
	exitNoDaemon = 3
)

// env is what the program touches of its surroundings.
type env struct {
	args           []string // without the program's name
	stdout, stderr io.Writer
	getenv         func(string) string
	kernel         kernel
	examine        func(ctx context.Context, c *config.Config, node string) doctor.Report // doctor.Examine
	control        func(context.Context, control.Options) error                           // control.Run
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, env{
		args:    os.Args[1:],
		stdout:  os.Stdout,
		stderr:  os.Stderr,
		getenv:  os.Getenv,
		kernel:  realKernel,
		examine: doctor.Examine,
		control: control.Run,
	})
	stop()
	os.Exit(code)
}

// run is the whole program. It ends early when ctx does.
func run(ctx context.Context, e env) int {
	root := newRoot(e)
	root.SetArgs(e.args)
	root.SetOut(e.stdout)
	root.SetErr(e.stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	if mistakes := config.Errors(nil); errors.As(err, &mistakes) {
		fmt.Fprintln(e.stderr, mistakes) // each line begins with its place, as compilers write it
		if errors.As(err, new(notYetError)) {
			return exitFailed
		}
		return exitUsage
	}
	fmt.Fprintf(e.stderr, "lockstep: %v\n", err)
	switch {
	case errors.As(err, new(usageError)):
		return exitUsage
	case errors.Is(err, api.ErrNoDaemon):
		return exitNoDaemon
	}
	return exitFailed
}

// usageError is a mistake in the command line, or in what it names.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// notYetError is about what the config names and this host lacks now: at boot the bridge
// or a mount may come later, so the same start may succeed.
type notYetError struct{ error }

func (e notYetError) Unwrap() error { return e.error }

// discard is for what is only looked at.
var discard = slog.New(slog.DiscardHandler)

// newLogger writes for people, to stderr. The journal has its own clock.
func newLogger(e env, level slog.Level) *slog.Logger {
	opts := &slog.HandlerOptions{Level: level}
	if e.getenv("JOURNAL_STREAM") != "" {
		opts.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		}
	}
	return slog.New(slog.NewTextHandler(e.stderr, opts))
}
