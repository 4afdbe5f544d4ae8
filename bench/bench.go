// SPDX-License-Identifier: Apache-2.0

// Package bench measures lockstep against QEMU's proxy and against mirroring alone, in one
// run on one machine. `lockstep bench` runs it.
package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/lockstep-ft/lockstep/bench/engines"
	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/bench/pairs"
	"github.com/lockstep-ft/lockstep/bench/proxies"
	"github.com/lockstep-ft/lockstep/bench/report"
	"github.com/lockstep-ft/lockstep/bench/scale"
)

// parts are the benchmark's parts by name, in the order in which they run.
var parts = []part{
	{name: "A", only: true, run: proxies.Part},
	{name: "B", qemu: true, run: func(ctx context.Context, o lab.Options, progress lab.Progress) (report.Part, error) {
		done := 0
		return engines.Run(ctx, engines.Options{QEMU: o.QEMU, Lockstep: o.Lockstep, Rounds: o.Rounds, Quick: o.Quick}, func(what string) {
			progress(done, 0, "part B, "+what)
			done++
		})
	}},
	{name: "C", qemu: true, only: true, guest: true, run: pairs.Part},
	{name: "D", only: true, run: scale.Part},
}

type part struct {
	name  string
	qemu  bool // measures nothing without QEMU
	guest bool // measures nothing without a real guest
	only  bool // knows lab.Options.Only
	run   func(context.Context, lab.Options, lab.Progress) (report.Part, error)
}

// cannot says why the part cannot be run with these options.
func (p *part) cannot(o *lab.Options) error {
	switch {
	case p.qemu && o.QEMU == "":
		return fmt.Errorf("part %s compares with QEMU, which is left out", p.name)
	case p.guest && o.Guest == "":
		return fmt.Errorf("part %s boots real guests, which takes a kernel and a C compiler: make deps gets them; --guest names the kernel's folder", p.name)
	case !p.only && o.Only != "":
		return fmt.Errorf("part %s runs as a whole or not at all", p.name)
	}
	return nil
}

// Parts are the names of all parts.
func Parts() (names []string) {
	for _, p := range parts {
		names = append(names, p.name)
	}
	return names
}

// Run runs the parts that are named, or all that these options allow. version is lockstep's. What the parts
// before a failed one measured is in the report.
func Run(ctx context.Context, o lab.Options, names []string, version string, progress lab.Progress) (r report.Report, err error) {
	for _, n := range names {
		if !slices.Contains(Parts(), n) {
			return r, fmt.Errorf("there is no part %q; the parts are %s", n, strings.Join(Parts(), ", "))
		}
	}
	if o.Rounds < 1 {
		return r, fmt.Errorf("%d rounds measure nothing; at least 1 is needed", o.Rounds)
	}
	r.Began = time.Now()
	if r.Machine, err = machine(ctx, o.QEMU, version); err != nil {
		return r, err
	}
	var n noise
	for _, p := range parts {
		named := slices.Contains(names, p.name)
		if cannot := p.cannot(&o); named && cannot != nil {
			return r, cannot
		} else if !named && (len(names) > 0 || cannot != nil) {
			continue
		}
		part, err := p.run(ctx, o, func(done, total int, what string) {
			n.sample()
			progress(done, total, what)
		})
		if errors.Is(err, lab.ErrNoMatch) && !named {
			continue
		}
		if err != nil {
			return r, fmt.Errorf("part %s: %w", p.name, err)
		}
		r.Parts = append(r.Parts, part)
	}
	if len(r.Parts) == 0 {
		return r, fmt.Errorf("%q: %w", o.Only, lab.ErrNoMatch)
	}
	n.sample()
	r.Machine.Noise = n.spread()
	r.Seconds = time.Since(r.Began).Seconds()
	return r, nil
}

// Act runs one of the roles in which the benchmark starts its own program: the program's main calls it
// with what follows "bench act".
func Act(in io.Reader, out io.Writer, args []string) error { return lab.Act(in, out, args) }
