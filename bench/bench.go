// SPDX-License-Identifier: Apache-2.0

// Package bench measures lockstep against QEMU's proxy and against mirroring alone, in one
// run on one machine. `lockstep bench` runs it.
package bench

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/bench/proxies"
	"github.com/lockstep-ft/lockstep/bench/report"
)

// parts are the benchmark's parts by name, in the order in which they run.
var parts = []struct {
	name string
	run  func(context.Context, lab.Options, lab.Progress) (report.Part, error)
}{
	{"A", proxies.Part},
}

// Parts are the names of all parts.
func Parts() (names []string) {
	for _, p := range parts {
		names = append(names, p.name)
	}
	return names
}

// Run runs the parts that are named, and all if none is. version is lockstep's. What the parts
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
		if len(names) > 0 && !slices.Contains(names, p.name) {
			continue
		}
		part, err := p.run(ctx, o, func(done, total int, what string) {
			n.sample()
			progress(done, total, what)
		})
		if err != nil {
			return r, fmt.Errorf("part %s: %w", p.name, err)
		}
		r.Parts = append(r.Parts, part)
	}
	n.sample()
	r.Machine.Noise = n.spread()
	r.Seconds = time.Since(r.Began).Seconds()
	return r, nil
}

// Act runs one of the roles in which the benchmark starts its own program: the program's main calls it
// with what follows "bench act".
func Act(in io.Reader, out io.Writer, args []string) error { return proxies.Act(in, out, args) }
