// SPDX-License-Identifier: Apache-2.0

package report

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

func newPlot(under string) *plot {
	return &plot{Left: 60, Right: width - 45, Top: 10, Bottom: 290, Under: under}
}

// xTick adds a tick if there is room for its text.
func (p *plot) xTick(t axisTick) {
	n := len(p.XTicks)
	if t.left() >= 0 && t.right() <= width && (n == 0 || t.left() > p.XTicks[n-1].right()) {
		p.XTicks = append(p.XTicks, t)
	}
}

// decades are 1, 2 and 5 of each power of ten within bounds.
func decades(lo, hi float64) (out []float64) {
	for decade := math.Floor(math.Log10(lo)); decade <= math.Log10(hi); decade++ {
		for _, m := range []float64{1, 2, 5} {
			if v := m * math.Pow(10, decade); v >= lo && v <= hi {
				out = append(out, v)
			}
		}
	}
	return out
}

// steps are some round values from 0 to most.
func steps(most float64) (out []float64) {
	unit := math.Pow(10, math.Floor(math.Log10(most)))
	for _, part := range []float64{1, 0.5, 0.2} {
		if most >= 3*part*unit {
			unit *= part
			break
		}
	}
	for i := 0.0; i*unit <= most && len(out) < 10; i++ {
		out = append(out, i*unit)
	}
	return out
}

// maxDecades is how many powers of ten a logarithmic axis of figures shows.
const maxDecades = 12

// against is a chart of the cases that say at what they were measured, as connections: that on a
// logarithmic scale to the right, and the figure upwards, on one too if it grows a hundredfold. nil if
// the group's cases do not say, or there are not two of them with figures.
func (t *table) against(g *group) *chart {
	if slices.ContainsFunc(g.rows, func(r row) bool { return r.At <= 0 }) {
		return nil
	}
	var at, figures []float64
	for _, r := range g.rows {
		for _, v := range t.part.Variants {
			if s := r.Series[v]; len(s.Rounds) > 0 && s.Median() >= 0 {
				at, figures = append(at, r.At), append(figures, s.Median())
			}
		}
	}
	if len(at) == 0 || slices.Min(at) == slices.Max(at) || slices.Max(figures) == 0 {
		return nil
	}
	unit := g.rows[0].Unit
	of := strings.TrimLeft(g.rows[0].Name, "0123456789 \u00a0") // "connections"
	out := newPlot(of)
	lo, hi := slices.Min(at), slices.Max(at)
	x := func(v float64) float64 { return out.Left + (out.Right-out.Left)*math.Log(v/lo)/math.Log(hi/lo) }
	least, most := slices.Min(figures), slices.Max(figures)
	logarithmic := least > 0 && most > 100*least
	if logarithmic {
		// What is less by more than maxDecades lies at the bottom: the quotient of any two figures is finite.
		bottom, top := math.Floor(math.Log10(least)), math.Ceil(math.Log10(most))
		least, most = math.Pow(10, max(bottom, top-maxDecades)), math.Pow(10, top)
	}
	y := func(v float64) float64 {
		share := v / most
		if logarithmic {
			share = math.Log(max(v, least)/least) / math.Log(most/least)
		}
		return out.Bottom - (out.Bottom-out.Top)*share
	}
	var legend []swatch
	for _, v := range t.part.Variants {
		var points []string
		for _, r := range g.rows {
			s := r.Series[v]
			if len(s.Rounds) == 0 || s.Median() < 0 {
				continue
			}
			d := dot{x(r.At), y(s.Median()), t.colour(v), v + ", " + r.Name + ": " + number(s.Median()) + " " + unit}
			out.Dots, points = append(out.Dots, d), append(points, fmt.Sprintf("%.1f,%.1f", d.X, d.Y))
		}
		if len(points) > 0 {
			legend = append(legend, swatch{t.colour(v), v})
		}
		if len(points) > 1 {
			out.Lines = append(out.Lines, line{t.colour(v), strings.Join(points, " ")})
		}
	}
	for _, r := range g.rows {
		if r.At >= lo && r.At <= hi {
			out.xTick(axisTick{x(r.At), strings.TrimSpace(strings.TrimSuffix(r.Name, of))})
		}
	}
	ticks := steps(most)
	if logarithmic {
		ticks = nil
		for v := least; v < 1.5*most; v *= 10 {
			ticks = append(ticks, v)
		}
	}
	for _, v := range ticks {
		out.YTicks = append(out.YTicks, axisTick{y(v), number(v)})
	}
	title := strings.TrimSuffix(g.name+", "+unit, ", ") + ", " + direction(g.rows[0].Less)
	return &chart{Title: title, Width: width, Height: 330, Legend: legend, Plot: out}
}

// nines is how many nines the axis of shares shows.
const nines = 3.3

// cdf is a chart of latencies on logarithmic scales: to the right the latency, upwards the share of
// slower ones. nil without latencies.
func (t *table) cdf(c *Case) *plot {
	lo, hi := math.Inf(1), 0.0
	for _, s := range c.Series {
		for _, p := range s.CDF {
			if p[0] > 0 && p[1] <= 0.9995 {
				lo, hi = min(lo, p[0]), max(hi, p[0])
			}
		}
	}
	if hi == 0 {
		return nil
	}
	if hi < 2*lo {
		hi = 2 * lo
	}
	out := newPlot("share of those that took at most so long")
	x := func(v float64) float64 {
		return out.Left + (out.Right-out.Left)*math.Log(min(hi, max(lo, v))/lo)/math.Log(hi/lo)
	}
	y := func(share float64) float64 {
		up := -math.Log10(max(1-share, 1e-9))
		return out.Bottom - (out.Bottom-out.Top)*min(up, nines)/nines
	}
	for _, v := range t.part.Variants {
		var b strings.Builder
		for _, p := range c.Series[v].CDF {
			if p[1] <= 0.9995 {
				fmt.Fprintf(&b, "%.1f,%.1f ", x(p[0]), y(p[1]))
			}
		}
		if b.Len() > 0 {
			out.Lines = append(out.Lines, line{t.colour(v), strings.TrimSpace(b.String())})
		}
	}
	for _, v := range decades(lo, hi) {
		out.xTick(axisTick{x(v), number(v) + " " + c.Unit})
	}
	for _, share := range []struct {
		share float64
		text  string
	}{{0, "0 %"}, {0.5, "50 %"}, {0.9, "90 %"}, {0.99, "99 %"}, {0.999, "99.9 %"}} {
		out.YTicks = append(out.YTicks, axisTick{y(share.share), share.text})
	}
	return out
}
