// SPDX-License-Identifier: Apache-2.0

package compare

import "time"

// histogramBounds are the upper bounds of a [Histogram]'s buckets.
var histogramBounds = [...]time.Duration{
	50 * time.Microsecond, 100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond,
	1 * time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond,
	50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2500 * time.Millisecond, 10 * time.Second,
}

// Histogram counts durations by their size, since the daemon's start.
type Histogram struct {
	Count   uint64  `json:"count"`
	Seconds float64 `json:"seconds"` // their sum
	// How many took at most 50, 100, 250, 500 µs, 1, 2.5, 5, 10, 25, 50, 100, 250, 500 ms, 1, 2.5, 10 s.
	AtMost [len(histogramBounds)]uint64 `json:"at_most"`
}

// Observe adds a duration.
func (h *Histogram) Observe(d time.Duration) {
	h.Count++
	h.Seconds += d.Seconds()
	for i := len(histogramBounds) - 1; i >= 0 && d <= histogramBounds[i]; i-- {
		h.AtMost[i]++
	}
}

// Add adds another one's.
func (h *Histogram) Add(o *Histogram) {
	h.Count += o.Count
	h.Seconds += o.Seconds
	for i, n := range o.AtMost {
		h.AtMost[i] += n
	}
}

// Buckets are h's as Prometheus has them: how many took at most so many seconds.
func (h *Histogram) Buckets() map[float64]uint64 {
	b := make(map[float64]uint64, len(histogramBounds))
	for i, bound := range histogramBounds {
		b[bound.Seconds()] = h.AtMost[i]
	}
	return b
}
