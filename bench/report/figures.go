// SPDX-License-Identifier: Apache-2.0

package report

import (
	"math"
	"slices"
)

// Median is that of the rounds, NaN if there are none.
func (s *Series) Median() float64 {
	if len(s.Rounds) == 0 {
		return math.NaN()
	}
	v := slices.Sorted(slices.Values(s.Rounds))
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// Spread is the difference of the largest and the smallest round over the median, NaN if there are none.
func (s *Series) Spread() float64 {
	if len(s.Rounds) == 0 {
		return math.NaN()
	}
	return (slices.Max(s.Rounds) - slices.Min(s.Rounds)) / s.Median()
}

// Ratio is the median of variant a over that of b, NaN if one of them has none or b's is 0.
func (c *Case) Ratio(a, b string) float64 {
	x, y := c.Series[a], c.Series[b]
	if y.Median() == 0 {
		return math.NaN()
	}
	return x.Median() / y.Median()
}

// points is how many a CDF has at most below its last percent.
const points = 100

// CDF is the share of values at most as large as each of some of them. It sorts the values.
func CDF(values []float64) [][2]float64 {
	if len(values) == 0 {
		return nil
	}
	slices.Sort(values)
	var out [][2]float64
	last := -1
	add := func(share float64) {
		i := max(0, int(math.Ceil(share*float64(len(values))))-1)
		if i > last {
			out = append(out, [2]float64{values[i], float64(i+1) / float64(len(values))})
			last = i
		}
	}
	for i := range points {
		add(float64(i) / points)
	}
	for _, share := range []float64{0.99, 0.992, 0.994, 0.996, 0.998, 0.999, 0.9992, 0.9994, 0.9996, 0.9998, 0.9999, 1} {
		add(share)
	}
	return out
}
