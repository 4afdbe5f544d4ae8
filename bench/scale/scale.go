// SPDX-License-Identifier: Apache-2.0

// Package scale is part D of the benchmark: what many connections, and more than one pair on a host, cost,
// and what happens where a table or a ring is full.
package scale

import (
	"context"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/bench/report"
)

// The variants, as the report names them.
const (
	alone    = "mirroring alone"
	chain    = "QEMU's chain"
	lockstep = "lockstep"
)

// plan is what the options come to.
type plan struct {
	rounds int
	counts []int         // of connections
	sizes  []int         // of lockstep's tables
	qemu   []int         // connections through colo-compare alone
	pairs  []int         // on a host
	idle   time.Duration // for which nothing is asked of the connections
	single int           // exchanges one at a time
	many   int           // exchanges with some under way
}

func newPlan(o lab.Options) plan {
	if o.Quick {
		return plan{rounds: o.Rounds, counts: []int{10, 100}, sizes: []int{10, 100}, qemu: []int{10, 100}, pairs: []int{1, 2},
			idle: 200 * time.Millisecond, single: 100, many: 500}
	}
	return plan{rounds: o.Rounds, counts: []int{10, 100, 1000, 10_000, 17_000, 100_000}, sizes: []int{10, 100, 1000, 10_000, 100_000, 1_000_000},
		qemu: []int{1000, 10_000, 16_384, 16_385, 17_000}, pairs: []int{1, 2, 4},
		idle: 2 * time.Second, single: 5000, many: 50_000}
}

// fewRounds is for what shows how something is, and not how fast.
func (p *plan) fewRounds() int { return min(p.rounds, 3) }

// bench is one run of the part.
type bench struct {
	plan
	o        lab.Options
	variants []string
	cases    report.Collector
	progress func(what string)
}

// section is one of the things that are measured.
type section struct {
	name string
	run  func(*bench, context.Context) error
}

var sections = []section{
	{"connections", (*bench).connections},
	{"tables", (*bench).tables},
	{"colo-compare", (*bench).colo},
	{"limits", (*bench).limits},
	{"ring", (*bench).ring},
	{"pairs", (*bench).pairsOnHosts},
}

// Part measures.
func Part(ctx context.Context, o lab.Options, progress lab.Progress) (part report.Part, err error) {
	b := &bench{plan: newPlan(o), o: o}
	done := 0
	b.progress = func(what string) {
		progress(done, 0, "part D, "+what)
		done++
	}
	b.variants = []string{alone, chain, lockstep}
	if o.QEMU == "" {
		b.variants = []string{alone, lockstep}
	}
	part = report.Part{Name: "D", Title: "scale", Variants: b.variants}
	measured := false
	for _, s := range sections {
		if !strings.Contains(s.name, o.Only) {
			continue
		}
		measured = true
		if err := s.run(b, ctx); err != nil {
			return part, fmt.Errorf("%s: %w", s.name, err)
		}
	}
	if !measured {
		return part, fmt.Errorf("%q: %w", o.Only, lab.ErrNoMatch)
	}
	part.Cases, part.Notes = b.cases.Cases, notes
	return part, nil
}

var notes = []string{
	"connections are real ones, of processes with at most 12 500 each; 1 000 000 would take some 10 GB for the sockets of three namespaces, and so many are measured as entries of tables only",
	"mirroring alone and QEMU's chain are those of part A, started anew in each round; where QEMU's chain stalls, a pair with guests would make a checkpoint",
	"lockstep's QEMUs are played: they stop and go on at once, and copy nothing. What a checkpoint and a takeover take here comes on top of QEMU's own time",
	"lockstep's tables are made for a quarter more connections than there are; its maps hold, whatever the connections, 16 384 slots and 1 024 for GSO frames, 105 MB in all, unless a row says otherwise",
	"memory of a proxy is what is its own alone, without its program and the maps that it shares with the kernel",
	"colo-compare alone: each connection has one frame, then a further one; then the PVM is ahead on some, and the last connection comes. The frames that were held then are gone: neither compared nor released",
	"with few slots what has none is dropped, and the guest's TCP sends it again; with few slots for GSO frames that happens after each of its timeouts, one after the other, and a transfer takes as long",
}

// figure is one of what there are n of, as connections.
func figure(group, unit string, less bool, n int, of string) report.Case {
	return report.Case{Group: group, Name: count(n) + " " + of, Unit: unit, Less: less, At: float64(n)}
}

// alone adds a figure that only lockstep has.
func (b *bench) alone(of report.Case, value float64, others string) {
	b.cases.Add(of, lockstep, value)
	for _, v := range b.variants {
		if v != lockstep {
			b.cases.Instead(of, v, others)
		}
	}
}

// count has the digits in groups of three.
func count(n int) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "\u00a0" + s[i:]
	}
	return s
}

// percentile is in µs, of sorted ns.
func percentile(took []int64, share float64) float64 {
	if len(took) == 0 {
		return math.NaN()
	}
	return float64(took[int(share*float64(len(took)-1))]) / 1e3
}

const mb = 1e6
