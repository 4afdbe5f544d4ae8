// SPDX-License-Identifier: Apache-2.0

package report

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"html"
	"io"
	"math"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// sample has what a report may have: latencies, stacked figures, rounds that failed, none at all.
func sample() *Report {
	var took []float64
	for i := range 2000 {
		took = append(took, 20+float64(i*i%977))
	}
	one := func(v ...float64) Series { return Series{Rounds: v} }
	return &Report{
		Began: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Seconds: 61.5,
		Machine: Machine{CPU: "Some <CPU>", Cores: 2, MemoryMB: 2048, Kernel: "6.18", QEMU: "7.2.22", Lockstep: "v1", Congestion: "cubic", Noise: 0.031},
		Parts: []Part{{Name: "A", Title: "proxies", Variants: []string{"floor", "peer's", "lockstep"}, Notes: []string{"a note & more"}, Cases: []Case{
			{Group: "latency", Name: "p50", Unit: "µs", Less: true, Series: map[string]Series{
				"floor": {Rounds: []float64{10, 30, 20}, CDF: CDF(slices.Clone(took))}, "peer's": {Rounds: []float64{100}, Instead: "stalled in 2 of 3 rounds"}, "lockstep": {Rounds: []float64{30, 50, 40}, CDF: CDF(took)}}},
			{Group: "latency", Name: "exchanges", Unit: "1/s", Series: map[string]Series{"floor": one(80_000), "peer's": {Instead: "stalled"}, "lockstep": one(40_000)}},
			{Group: "CPU", Name: "guest", Unit: "µs", Less: true, Stack: true, Series: map[string]Series{"floor": one(5), "peer's": one(0), "lockstep": one(6)}},
			{Group: "CPU", Name: "proxy", Unit: "µs", Less: true, Stack: true, Series: map[string]Series{"floor": {}, "peer's": one(12), "lockstep": one(3)}},
			{Group: "memory", Name: "10 connections", At: 10, Unit: "MB", Less: true, Series: map[string]Series{"lockstep": one(3), "floor": {Instead: "stalled"}}},
			{Group: "memory", Name: "1000 connections", At: 1000, Unit: "MB", Less: true, Series: map[string]Series{"lockstep": one(900)}},
			{Group: "frames", Name: "cut", Unit: "%", Series: map[string]Series{"lockstep": one(0)}},
		}}},
	}
}

func render(t *testing.T, write func(io.Writer, *Report) error, r *Report) string {
	t.Helper()
	var b bytes.Buffer
	if err := write(&b, r); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestEveryCaseAppears: in the table and on the page, with its ratios and what happened instead.
func TestEveryCaseAppears(t *testing.T) {
	r := sample()
	text, page := render(t, Text, r), html.UnescapeString(render(t, HTML, r))
	for _, want := range []string{
		"p50", "exchanges", "guest", "proxy", "cut", "latency", "CPU", "frames", "stalled", "stalled in 2 of 3 rounds", "a note & more",
		"floor", "peer's", "÷ floor", "6.18", "7.2.22", "v1", "cubic", "Some <CPU>", "3 %",
		"2.00×", // p50: 40 over 20
		"0.400×",
		"0.500×", // exchanges
		"1.20×",  // guest
		"0.250×", // proxy
		"80\u00a0000",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the table lacks %q:\n%s", want, text)
		}
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	if strings.Contains(text+page, "NaN") || strings.Contains(text+page, "Inf") {
		t.Error("what has no figure is shown as a number")
	}
}

// TestPageStandsAlone: it needs nothing from elsewhere, and is well-formed where it draws.
func TestPageStandsAlone(t *testing.T) {
	page := render(t, HTML, sample())
	if m := regexp.MustCompile(`(?i)https?:|//[a-z]|\bsrc\s*=|@import|url\(|<script|<link`).FindString(page); m != "" {
		t.Errorf("the page refers to something outside: %q", m)
	}
	drawings := regexp.MustCompile(`(?s)<svg.*?</svg>`).FindAllString(page, -1)
	if len(drawings) != 5 { // latencies, the bars of two groups, a stack, what grows with the connections
		t.Errorf("%d drawings, want 5", len(drawings))
	}
	for _, d := range drawings {
		for dec := xml.NewDecoder(strings.NewReader(d)); ; {
			if _, err := dec.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Errorf("%v in %s", err, d)
				break
			}
		}
	}
	for _, id := range regexp.MustCompile(`href="#(\w+)"`).FindAllStringSubmatch(page, -1) {
		if !strings.Contains(page, `id="`+id[1]+`"`) {
			t.Errorf("the page refers to %q, which it does not have", id[1])
		}
	}
	for _, class := range regexp.MustCompile(`class="((?:v|p)\d)"`).FindAllStringSubmatch(page, -1) {
		if strings.Count(page, "--"+class[1]+":") != 2 {
			t.Errorf("the colour %s is not there for light and for dark", class[1])
		}
	}
}

// TestDrawingsStayInside: no bar and no label leaves its drawing.
func TestDrawingsStayInside(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := &Part{Variants: []string{"a", "b", subject}}
		at := rapid.Bool().Draw(t, "at")
		for i := range rapid.IntRange(1, 4).Draw(t, "cases") {
			c := Case{Group: "g", Name: fmt.Sprint(i), Stack: rapid.Bool().Draw(t, "stack"), Series: make(map[string]Series)}
			for _, v := range p.Variants {
				c.Series[v] = Series{Rounds: rapid.SliceOfN(rapid.Float64Range(0, 1e12), 0, 3).Draw(t, "rounds")}
			}
			c.Series["a"] = Series{CDF: CDF(rapid.SliceOfN(rapid.Float64Range(1, 1e9), 0, 50).Draw(t, "latencies"))}
			if at {
				c.At = rapid.Float64Range(1, 1e7).Draw(t, "connections")
			}
			p.Cases = append(p.Cases, c)
		}
		table := newTable(p)
		for _, g := range table.groups {
			for _, c := range table.charts(&g) {
				for _, b := range c.Bars {
					for _, one := range b.Bars {
						if one.Y+barStep > c.Height+10 {
							t.Fatalf("a bar at %v in a drawing of %v", one.Y, c.Height)
						}
						// A digit is at most 8 units wide.
						if end := one.ValueX + 8*float64(len([]rune(one.Value))); one.ValueX > width-values+labels || len(one.Value) < 24 && end > width+8 {
							t.Fatalf("%q ends at %v", one.Value, end)
						}
						for _, s := range one.Segments {
							if s.X < 0 || s.Width < 0 || s.X+s.Width > width-values+1 || math.IsNaN(s.X+s.Width) {
								t.Fatalf("segment %+v", s)
							}
						}
					}
				}
				if p := c.Plot; p != nil {
					for i, x := range p.XTicks {
						if x.At < p.Left-0.01 || x.At > p.Right+0.01 || x.left() < 0 || x.right() > width || i > 0 && x.left() < p.XTicks[i-1].right() {
							t.Fatalf("ticks %v", p.XTicks)
						}
					}
					for _, y := range p.YTicks {
						if !(y.At > p.Top-0.01 && y.At < p.Bottom+0.01) {
							t.Fatalf("ticks %v", p.YTicks)
						}
					}
					for _, d := range p.Dots {
						if !(d.X > p.Left-0.01 && d.X < p.Right+0.01 && d.Y > p.Top-0.01 && d.Y < p.Bottom+0.01) {
							t.Fatalf("dot %+v", d)
						}
					}
				}
			}
		}
	})
}

// TestJSON: a report that was written is the same when it is read.
func TestJSON(t *testing.T) {
	want := sample()
	var got Report
	if err := json.Unmarshal([]byte(render(t, JSON, want)), &got); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(&got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestCDF(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := rapid.SliceOfN(rapid.Float64Range(0, 1e6), 1, 3000).Draw(t, "values")
		points := CDF(v) // sorts v
		for i, p := range points {
			if below, _ := slices.BinarySearchFunc(v, p[0], func(x, y float64) int {
				if x <= y {
					return -1
				}
				return 1
			}); float64(below) < p[1]*float64(len(v))-1e-6 {
				t.Fatalf("at most %v are %d of %d, not a share of %v", p[0], below, len(v), p[1])
			}
			if i > 0 && (p[0] < points[i-1][0] || p[1] <= points[i-1][1]) {
				t.Fatalf("points %v and %v", points[i-1], p)
			}
		}
		if last := points[len(points)-1]; last != [2]float64{v[len(v)-1], 1} {
			t.Fatalf("the last point is %v", last)
		}
	})
	if CDF(nil) != nil {
		t.Error("a CDF of nothing has points")
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.0123: "0.012", 0.5: "0.500", 1: "1.00", 12.34: "12.3", 99.6: "100", 1234567: "1\u00a0234\u00a0567", math.NaN(): "–", -1500: "-1\u00a0500"} {
		if got := number(v); got != want {
			t.Errorf("%v is shown as %q, want %q", v, got, want)
		}
	}
}

// TestSteps: an axis has a few round values, whatever the largest figure is.
func TestSteps(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		most := rapid.Float64Range(1e-9, 1e12).Draw(t, "most")
		got := steps(most)
		if len(got) < 3 || len(got) > 10 || got[0] != 0 || got[len(got)-1] > most || got[len(got)-1] < most/2 {
			t.Fatalf("%v of %v", got, most)
		}
	})
}
