// SPDX-License-Identifier: Apache-2.0

package report

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// Charts are drawn on a canvas of this width, in units of SVG; a page scales it.
const (
	width   = 640.0
	labels  = 160.0 // left of bars, for the variants' names
	values  = 190.0 // right of bars, for figures
	barStep = 22.0
)

// chart is what a group of cases is drawn as.
type chart struct {
	Title         string
	Width, Height float64
	Legend        []swatch
	Bars          []bars
	Plot          *plot
}

// swatch explains a colour; its classes are those of the page's style.
type swatch struct {
	Class, Text string
}

// bars are the variants' bars of a case, or the stacked ones of a group.
type bars struct {
	Title string // "p50, µs, less is better"
	Y     float64
	Bars  []barOf
}

type barOf struct {
	Y        float64
	Label    string
	Segments []segment
	ValueX   float64
	Value    string // with the ratio, or a note's number
}

type segment struct {
	X, Width     float64
	Class, Title string
}

// plot is a chart of lines.
type plot struct {
	Left, Right, Top, Bottom float64
	Under                    string // what the horizontal axis shows
	Lines                    []line
	Dots                     []dot
	XTicks, YTicks           []axisTick
}

type line struct {
	Class, Points string
}

type dot struct {
	X, Y         float64
	Class, Title string
}

type axisTick struct {
	At   float64
	Text string
}

// left and right are where its text ends, when it is centred; a character is at most 8 wide.
func (t axisTick) left() float64  { return t.At - 4*float64(utf8.RuneCountInString(t.Text)+1) }
func (t axisTick) right() float64 { return t.At + 4*float64(utf8.RuneCountInString(t.Text)+1) }

// colour is the class of a variant.
func (t *table) colour(variant string) string {
	if variant == subject {
		return "subject"
	}
	palette, isQEMU := []string{"v0", "v3", "v4"}, func(v string) bool { return strings.Contains(v, "QEMU") }
	if isQEMU(variant) { // the same in all parts
		palette = []string{"v1", "v2"}
	}
	n := 0
	for _, v := range t.others[:max(0, slices.Index(t.others, variant))] {
		if isQEMU(v) == isQEMU(variant) {
			n++
		}
	}
	return palette[n%len(palette)]
}

// charts are those of a group.
func (t *table) charts(g *group) (out []chart) {
	if c := t.against(g); c != nil {
		return []chart{*c}
	}
	if t.nothing(g) {
		return nil
	}
	plain := slices.DeleteFunc(slices.Clone(g.rows), func(r row) bool { return r.Stack })
	stacked := slices.DeleteFunc(slices.Clone(g.rows), func(r row) bool { return !r.Stack })
	for _, r := range g.rows {
		if c := t.cdf(r.Case); c != nil {
			out = append(out, chart{Title: g.name + ": latency", Width: width, Height: 330, Legend: t.legend(), Plot: c})
		}
	}
	if len(stacked) > 0 {
		return append(out, t.stack(g.name, stacked)) // what does not add up is in the table
	}
	return append(out, t.bars(g.name, plain))
}

// nothing: all figures of a group that would be drawn as lines are 0, or there are none.
func (t *table) nothing(g *group) bool {
	return !slices.ContainsFunc(g.rows, func(r row) bool {
		return r.At <= 0 || slices.ContainsFunc(t.part.Variants, func(v string) bool {
			s := r.Series[v]
			return len(s.Rounds) > 0 && s.Median() != 0
		})
	})
}

func (t *table) legend() (out []swatch) {
	for _, v := range t.part.Variants {
		out = append(out, swatch{t.colour(v), v})
	}
	return out
}

// bars has a scale of its own for each case.
func (t *table) bars(name string, rows []row) chart {
	c, y := chart{Title: name, Width: width}, 0.0
	for _, r := range rows {
		b := bars{Title: strings.TrimPrefix(strings.Join([]string{r.Name, r.Unit, direction(r.Less)}, ", "), ", "), Y: y + 16}
		b.Title = strings.ReplaceAll(b.Title, ", , ", ", ")
		y += 24
		most := 0.0
		for _, v := range t.part.Variants {
			if s := r.Series[v]; len(s.Rounds) > 0 {
				most = max(most, s.Median())
			}
		}
		for i, v := range t.part.Variants {
			one := barOf{Y: y, Label: v, ValueX: labels + 6, Value: t.value(&r, i)}
			if s := r.Series[v]; len(s.Rounds) > 0 && most > 0 {
				w := max(1, (width-labels-values)*s.Median()/most)
				one.Segments = []segment{{labels, w, t.colour(v), one.Value}}
				one.ValueX += w
			}
			b.Bars = append(b.Bars, one)
			y += barStep
		}
		y += 10
		c.Bars = append(c.Bars, b)
	}
	c.Height = y
	return c
}

// value is a variant's figure, and how lockstep's relates to it.
func (t *table) value(r *row, variant int) string {
	c := r.cells[variant]
	words := []string{c.value}
	if c.value == "" {
		words = []string{"–"}
	}
	if c.note > 0 {
		words = append(words, fmt.Sprintf("[%d]", c.note))
	}
	if at := slices.Index(t.others, t.part.Variants[variant]); at >= 0 && r.ratios[at] != "–" {
		words = append(words, "· lockstep "+r.ratios[at])
	}
	return strings.Join(words, " ")
}

// stack has one bar for each variant, of the rows that add up.
func (t *table) stack(name string, rows []row) chart {
	sums, most := make(map[string]float64), 0.0
	for _, v := range t.part.Variants {
		for _, r := range rows {
			if s := r.Series[v]; len(s.Rounds) > 0 {
				sums[v] += s.Median()
			}
		}
		most = max(most, sums[v])
	}
	c := chart{Title: name}
	for i, r := range rows {
		c.Legend = append(c.Legend, swatch{fmt.Sprintf("p%d", i), r.Name})
	}
	b := bars{Title: rows[0].Unit + ", " + direction(rows[0].Less), Y: 16}
	y := 24.0
	for i, v := range t.part.Variants {
		one := barOf{Y: y, Label: v, ValueX: labels + 6, Value: "–"}
		x := labels
		for j, r := range rows {
			s := r.Series[v]
			if len(s.Rounds) == 0 || most == 0 {
				continue
			}
			w := (width - labels - values) * s.Median() / most
			one.Segments = append(one.Segments, segment{x, w, fmt.Sprintf("p%d", j), r.Name + ": " + number(s.Median()) + " " + r.Unit})
			x += w
		}
		if sums[v] > 0 {
			one.ValueX, one.Value = x+6, number(sums[v])
			if v != subject && slices.Contains(t.part.Variants, subject) && sums[subject] > 0 {
				one.Value += " · lockstep " + ratio(sums[subject]/sums[v])
			}
		}
		if note := rows[0].cells[i].note; note > 0 {
			one.Value += fmt.Sprintf(" [%d]", note)
		}
		b.Bars = append(b.Bars, one)
		y += barStep + 6
	}
	c.Bars, c.Width, c.Height = []bars{b}, width, y
	return c
}
