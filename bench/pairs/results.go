// SPDX-License-Identifier: Apache-2.0

package pairs

import (
	"fmt"

	"github.com/lockstep-ft/lockstep/bench/report"
)

// results are the report's cases as they come to be.
type results struct {
	variants []variant
	series   map[string]*series // by variant
}

// series are a variant's figures.
type series struct {
	of     map[key]report.Series
	took   map[key][]float64 // of all rounds
	failed map[key]int       // rounds
}

func newResults(vs []variant) *results {
	rs := &results{variants: vs, series: make(map[string]*series)}
	for _, v := range vs {
		rs.series[v.name] = &series{make(map[key]report.Series), make(map[key][]float64), make(map[key]int)}
	}
	return rs
}

func (rs *results) of(variant string) *series { return rs.series[variant] }

func (s *series) put(k key, value float64, took []float64) {
	one := s.of[k]
	one.Rounds = append(one.Rounds, value)
	s.of[k] = one
	s.took[k] = append(s.took[k], took...)
}

// instead keeps what was done for want of figures.
func (s *series) instead(ks []key, text string) {
	for _, k := range ks {
		one := s.of[k]
		if one.Instead == "" {
			one.Instead = text
		}
		s.of[k] = one
		s.failed[k]++
	}
}

// ratio has TCP's pauses over a Unix socket's, round by round.
func (s *series) ratio(group string) {
	of := func(way string) []float64 { return s.of[key{group, way + ": guest's pause, p50"}].Rounds }
	over, under := of(tcp), of(unixSocket)
	for i := range min(len(over), len(under)) {
		s.put(key{ratios, group}, over[i]/under[i], nil)
	}
}

// finish are the cases of which at least one variant has something.
func (rs *results) finish(rounds int) (out []report.Case) {
	for _, s := range rs.series {
		s.ratio(idle)
		s.ratio(busy)
	}
	for _, c := range cases() {
		k, any := key{c.Group, c.Name}, false
		for _, v := range rs.variants {
			s := rs.series[v.name]
			one := s.of[k]
			one.CDF = report.CDF(s.took[k])
			if n := s.failed[k]; n > 0 && rounds > 1 {
				one.Instead = fmt.Sprintf("in %d of %d rounds: %s", n, rounds, one.Instead)
			}
			any = any || len(one.Rounds) > 0 || one.Instead != ""
			if len(one.Rounds) == 0 && one.Instead == "" {
				one.Instead = v.lacks(k)
			}
			c.Series[v.name] = one
		}
		if any {
			out = append(out, c)
		}
	}
	return out
}

var notes = []string{
	"the guests are emulated (TCG) on this machine's cores, which the client, both hosts and both guests share: compare variants, not with guests under KVM",
	"QEMU's COLO has no heartbeat: here its failover is ordered right after the kill",
	"no guest has a disk but in the rows that say so",
	"QEMU's COLO has guests without TCP timestamps, which filter-rewriter does not translate, and sockets between the hosts that send at once (nodelay)",
	"where a variant did not carry a case, it was started anew for the next",
}
