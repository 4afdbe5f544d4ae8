// SPDX-License-Identifier: Apache-2.0

package api

import "time"

// phaseBounds are the upper bounds of a [Histogram]'s buckets, in seconds.
var phaseBounds = [...]float64{0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10}

// Histogram counts durations by their size, since the daemon's start.
type Histogram struct {
	Count   uint64                   `json:"count"`
	Seconds float64                  `json:"seconds"` // their sum
	AtMost  [len(phaseBounds)]uint64 `json:"at_most"` // how many took at most 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500 ms, 1, 2.5, 10 s
}

// Observe adds a duration.
func (h *Histogram) Observe(d time.Duration) {
	h.Count++
	h.Seconds += d.Seconds()
	for i, bound := range phaseBounds {
		if d.Seconds() <= bound {
			h.AtMost[i]++
		}
	}
}

// buckets are h's as Prometheus has them.
func (h *Histogram) buckets() map[float64]uint64 {
	b := make(map[float64]uint64, len(phaseBounds))
	for i, bound := range phaseBounds {
		b[bound] = h.AtMost[i]
	}
	return b
}
