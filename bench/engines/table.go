// SPDX-License-Identifier: Apache-2.0

package engines

import (
	"math"
	"slices"
	"time"

	"github.com/lockstep-ft/lockstep/bench/report"
)

// figure is one that a load gives.
type figure struct {
	name, unit string
	less       bool
	of         func(*outcome) float64
}

const programsName = "CPU of the kernel programs, per packet"

var saturation = []figure{
	{"packets released", "1/s", false, func(o *outcome) float64 { return float64(o.released) / o.took.Seconds() }},
	{"payload released", "Gbit/s", false, func(o *outcome) float64 { return float64(o.bytes) * 8 / 1e9 / o.took.Seconds() }},
	{"released out of order", "%", true, func(o *outcome) float64 { return 100 * float64(o.reordered) / float64(o.released) }},
	{"CPU of the engine, per packet", "ns", true, func(o *outcome) float64 { return each(o.engine+o.kernel, o) }},
	{processesName, "ns", true, processes},
	{"CPU of engine and harness, per packet", "ns", true, func(o *outcome) float64 { return each(o.engine+o.harness+o.softirq, o) }},
}

var atRate = []figure{
	{"p50", "µs", true, percentile(0.5)},
	{"p99", "µs", true, percentile(0.99)},
	{"p99.9", "µs", true, percentile(0.999)},
	{processesName, "ns", true, processes},
}

const processesName = "CPU of the engine's processes, per packet"

func processes(o *outcome) float64 { return each(o.engine, o) }

// each is d per released frame, ns.
func each(d time.Duration, o *outcome) float64 { return float64(d) / float64(o.released) }

func percentile(share float64) func(*outcome) float64 {
	return func(o *outcome) float64 {
		sorted := slices.Sorted(slices.Values(o.latencies))
		return quantile(sorted, share) / 1e3
	}
}

// quantile is the smallest value that so large a share of them does not exceed.
func quantile(sorted []int64, share float64) float64 {
	i := int(math.Ceil(share*float64(len(sorted)))) - 1
	return float64(sorted[max(0, i)])
}

// table collects the cases.
type table struct {
	report.Collector
	all map[[3]string]*[]int64 // latencies by group, name and variant, of all rounds
}

func newTable() *table { return &table{all: make(map[[3]string]*[]int64)} }

// add adds a round's figure.
func (t *table) add(group, name, unit string, less bool, variant string, v float64) {
	t.Add(report.Case{Group: group, Name: name, Unit: unit, Less: less}, variant, v)
}

// instead notes what a variant did in a round without a figure.
func (t *table) instead(group, name, unit string, less bool, variant, what string) {
	t.Instead(report.Case{Group: group, Name: name, Unit: unit, Less: less}, variant, what)
}

// latencies adds a round's latencies, ns, to a case's distribution.
func (t *table) latencies(group, name, variant string, ns []int64) {
	key := [3]string{group, name, variant}
	all := t.all[key]
	if all == nil {
		all = new([]int64)
		t.all[key] = all
	}
	*all = append(*all, ns...)
}

// finish makes the distributions of what latencies collected, and puts the cases of a
// group together.
func (t *table) finish() {
	for key, all := range t.all {
		t.Change(report.Case{Group: key[0], Name: key[1]}, key[2], func(s *report.Series) { s.CDF = cdf(*all) })
	}
	first := make(map[string]int) // case of a group
	for i, c := range slices.Backward(t.Cases) {
		first[c.Group] = i
	}
	slices.SortStableFunc(t.Cases, func(a, b report.Case) int { return first[a.Group] - first[b.Group] })
}

// cdf is a distribution as steps in µs: percent by percent, and finer towards the end,
// where latencies are told apart.
func cdf(ns []int64) (points [][2]float64) {
	slices.Sort(ns)
	point := func(share float64) { points = append(points, [2]float64{quantile(ns, share) / 1e3, share}) }
	for i := range 99 {
		point(float64(i+1) / 100)
	}
	for _, share := range []float64{0.992, 0.994, 0.996, 0.998, 0.999, 0.9995, 0.9999, 1} {
		point(share)
	}
	return points
}
