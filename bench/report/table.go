// SPDX-License-Identifier: Apache-2.0

package report

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// subject is the variant that the others are compared with.
const subject = "lockstep"

// table is a part as both the terminal and the page show it.
type table struct {
	part   *Part
	others []string // the variants that lockstep is compared with
	groups []group
	notes  []string // what variants did instead; a cell has the number of one, from 1 on
}

type group struct {
	name string
	rows []row
}

type row struct {
	*Case
	cells  []cell   // by variant
	ratios []string // by table.others
}

// cell is one variant's figure.
type cell struct {
	value  string // "" if there is none
	spread string // "" with one round
	note   int    // 0 without
}

func newTable(p *Part) *table {
	t := &table{part: p}
	if slices.Contains(p.Variants, subject) {
		t.others = slices.DeleteFunc(slices.Clone(p.Variants), func(v string) bool { return v == subject })
	}
	for i := range p.Cases {
		c := &p.Cases[i]
		r := row{Case: c}
		for _, v := range p.Variants {
			r.cells = append(r.cells, t.cell(c, v))
		}
		for _, v := range t.others {
			r.ratios = append(r.ratios, ratio(c.Ratio(subject, v)))
		}
		at := slices.IndexFunc(t.groups, func(g group) bool { return g.name == c.Group })
		if at < 0 {
			at = len(t.groups)
			t.groups = append(t.groups, group{name: c.Group})
		}
		t.groups[at].rows = append(t.groups[at].rows, r)
	}
	return t
}

func (t *table) cell(c *Case, variant string) (out cell) {
	s := c.Series[variant]
	if len(s.Rounds) > 0 {
		out.value = number(s.Median())
	}
	if spread := s.Spread(); len(s.Rounds) > 1 && !math.IsNaN(spread) && !math.IsInf(spread, 0) {
		out.spread = fmt.Sprintf("±%.0f %%", 50*spread)
	}
	if s.Instead != "" {
		at := slices.Index(t.notes, s.Instead)
		if at < 0 {
			at = len(t.notes)
			t.notes = append(t.notes, s.Instead)
		}
		out.note = at + 1
	}
	return out
}

// number has three significant digits, and the digits before the point in groups of three.
func number(v float64) string {
	switch a := math.Abs(v); {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return "–"
	case a == 0:
		return "0"
	case a < 0.0995:
		return strconv.FormatFloat(v, 'g', 2, 64)
	case a < 0.995:
		return strconv.FormatFloat(v, 'f', 3, 64)
	case a < 9.95:
		return strconv.FormatFloat(v, 'f', 2, 64)
	case a < 99.5:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	digits := strconv.FormatFloat(math.Abs(v), 'f', 0, 64)
	var b strings.Builder
	if v < 0 {
		b.WriteByte('-')
	}
	for i, d := range digits {
		if i > 0 && (len(digits)-i)%3 == 0 {
			b.WriteRune('\u00a0') // does not break
		}
		b.WriteRune(d)
	}
	return b.String()
}

func ratio(v float64) string {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return "–"
	}
	return number(v) + "×"
}

// direction says which way is better.
func direction(less bool) string {
	if less {
		return "less is better"
	}
	return "more is better"
}

// arrow is short for direction.
func arrow(less bool) string {
	if less {
		return "↓"
	}
	return "↑"
}

// facts describe the machine and the run, each with its name.
func facts(r *Report) [][2]string {
	m := &r.Machine
	qemu := m.QEMU
	if qemu == "" {
		qemu = "none"
	}
	return [][2]string{
		{"lockstep", m.Lockstep},
		{"kernel", "Linux " + m.Kernel},
		{"QEMU", qemu},
		{"machine", fmt.Sprintf("%s, %d cores, %d MB", m.CPU, m.Cores, m.MemoryMB)},
		{"TCP", m.Congestion},
		{"noise", fmt.Sprintf("%.0f %% between the fastest and the slowest of a fixed computation during the run", 100*m.Noise)},
		{"run", fmt.Sprintf("%s, %.0f s", r.Began.UTC().Format("2006-01-02 15:04 UTC"), r.Seconds)},
	}
}

// rounds is how many rounds the part's cases have at most.
func rounds(p *Part) (most int) {
	for i := range p.Cases {
		for _, s := range p.Cases[i].Series {
			most = max(most, len(s.Rounds))
		}
	}
	return most
}
