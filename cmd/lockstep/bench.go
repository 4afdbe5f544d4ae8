// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/lockstep-ft/lockstep/bench"
	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/bench/report"
	"github.com/lockstep-ft/lockstep/control/qemu/guestimage"
)

// noQEMU as --qemu leaves QEMU out.
const noQEMU = "none"

func newBench(e env) *cobra.Command {
	var o lab.Options
	var parts []string
	var jsonFile, htmlFile string
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure lockstep against QEMU's proxy and against mirroring alone",
		Long: "bench measures lockstep, QEMU's chain of filters and mirroring alone in turns, on this machine, in network\n" +
			"namespaces of its own, and real pairs under emulation, and prints medians and ratios. It needs root and a machine that does nothing else.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			for _, p := range parts {
				if !slices.Contains(bench.Parts(), p) {
					return usageError{fmt.Errorf("there is no part %q; the parts are %s", p, strings.Join(bench.Parts(), ", "))}
				}
			}
			if o.Rounds < 1 {
				return usageError{errors.New("--rounds has to be at least 1")}
			}
			if o.QEMU == noQEMU {
				o.QEMU = ""
			} else if o.QEMU, err = exec.LookPath(o.QEMU); err != nil {
				return fmt.Errorf("%w; install QEMU, name it with --qemu, or leave it out with --qemu %s", err, noQEMU)
			}
			if o.Lockstep == "" {
				if o.Lockstep, err = os.Executable(); err != nil {
					return fmt.Errorf("look up this program: %w", err)
				}
			}
			if o.Guest == "" {
				if beside := filepath.Join(filepath.Dir(o.Lockstep), "guest"); guestimage.Missing(beside) == nil {
					o.Guest = beside
				}
			} else if err := guestimage.Missing(o.Guest); err != nil {
				return err
			}
			progress, done := benchProgress(e.stderr)
			r, err := bench.Run(cmd.Context(), o, parts, versionString(), progress)
			done()
			if err != nil && len(r.Parts) == 0 {
				return err
			}
			return errors.Join(err, writeReport(e.stdout, &r, jsonFile, htmlFile))
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&parts, "parts", nil, "which parts to run, of "+strings.Join(bench.Parts(), ",")+" (default all)")
	f.IntVar(&o.Rounds, "rounds", 5, "how often to measure each case; the median counts")
	f.BoolVar(&o.Quick, "quick", false, "small counts, to see that it works; the figures mean nothing")
	f.StringVar(&o.Only, "only", "", "of the measurements of parts A and C run only those whose names have this in them, as \"bulk\"")
	f.StringVar(&o.QEMU, "qemu", "qemu-system-x86_64", "the QEMU to compare with, or "+noQEMU)
	f.StringVar(&o.Lockstep, "lockstep", "", "the lockstep binary to measure (default this one)")
	f.StringVar(&o.Guest, "guest", "", "the folder with a guest's kernel, as make deps makes it (default guest, beside the lockstep binary)")
	f.StringVar(&jsonFile, "json", "", "write the report to this file, as JSON")
	f.StringVar(&htmlFile, "html", "", "write the report to this file, as a page with charts")
	cmd.AddCommand(&cobra.Command{
		Use:    "act",
		Short:  "Be a part of a running benchmark",
		Hidden: true,
		Args:   cobra.ArbitraryArgs,
		RunE:   func(_ *cobra.Command, args []string) error { return bench.Act(os.Stdin, e.stdout, args) },
	})
	return cmd
}

// benchProgress shows a line on a terminal, and nothing elsewhere.
func benchProgress(w io.Writer) (p lab.Progress, done func()) {
	terminal, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(terminal.Fd())) {
		return func(int, int, string) {}, func() {}
	}
	var bar *progressbar.ProgressBar
	return func(n, total int, what string) {
			if total == 0 {
				total = -1 // a spinner
			}
			if bar == nil || bar.GetMax() != total {
				bar = progressbar.NewOptions(total, progressbar.OptionSetWriter(terminal), progressbar.OptionSetPredictTime(false),
					progressbar.OptionSetWidth(20), progressbar.OptionClearOnFinish(), progressbar.OptionThrottle(time.Nanosecond))
			}
			bar.Describe(what)
			_ = bar.Set(n)
		}, func() {
			if bar != nil {
				_ = bar.Finish()
			}
		}
}

// writeReport prints a report, and writes those files that have a name.
func writeReport(out io.Writer, r *report.Report, jsonFile, htmlFile string) error {
	err := report.Text(out, r)
	for _, f := range []struct {
		name  string
		write func(io.Writer, *report.Report) error
	}{{jsonFile, report.JSON}, {htmlFile, report.HTML}} {
		if f.name != "" {
			err = errors.Join(err, writeFile(f.name, func(w io.Writer) error { return f.write(w, r) }))
		}
	}
	return err
}

func writeFile(name string, write func(io.Writer) error) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	return errors.Join(write(f), f.Close())
}
