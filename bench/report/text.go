// SPDX-License-Identifier: Apache-2.0

package report

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// JSON writes a report for programs.
func JSON(w io.Writer, r *Report) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", " ")
	if err := enc.Encode(r); err != nil {
		return fmt.Errorf("write the report as JSON: %w", err)
	}
	return nil
}

// Text writes a report for a terminal.
func Text(w io.Writer, r *Report) error {
	var b strings.Builder
	for _, f := range facts(r) {
		fmt.Fprintf(&b, "%-9s %s\n", f[0], f[1])
	}
	for i := range r.Parts {
		text(&b, &r.Parts[i])
	}
	if _, err := io.WriteString(w, b.String()); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return nil
}

func text(b *strings.Builder, p *Part) {
	t := newTable(p)
	fmt.Fprintf(b, "\nPart %s: %s\nMedians of the rounds (%d), ± half of the spread. ↓ less is better, ↑ more is better. ÷: lockstep's figure divided by that variant's.\n\n", p.Name, p.Title, rounds(p))
	w := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	line := func(cells ...string) { fmt.Fprintln(w, strings.Join(cells, "\t")) }
	head := append([]string{"", ""}, p.Variants...)
	for _, v := range t.others {
		head = append(head, "÷ "+v)
	}
	line(head...)
	for _, g := range t.groups {
		line(append([]string{g.name}, make([]string, len(head)-1)...)...)
		for _, r := range g.rows {
			cells := []string{"  " + r.Name, strings.TrimSpace(r.Unit + " " + arrow(r.Less))}
			for _, c := range r.cells {
				cells = append(cells, c.text())
			}
			line(append(cells, r.ratios...)...)
		}
	}
	w.Flush() // into memory
	b.WriteByte('\n')
	for i, n := range t.notes {
		fmt.Fprintf(b, "[%d] %s\n", i+1, n)
	}
	for _, n := range p.Notes {
		fmt.Fprintf(b, "- %s\n", n)
	}
}

func (c cell) text() string {
	var words []string
	switch {
	case c.value != "":
		words = append(words, c.value)
	case c.note == 0:
		words = append(words, "–")
	}
	if c.spread != "" {
		words = append(words, c.spread)
	}
	if c.note > 0 {
		words = append(words, fmt.Sprintf("[%d]", c.note))
	}
	return strings.Join(words, " ")
}
