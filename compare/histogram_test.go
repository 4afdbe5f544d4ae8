// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"testing"
	"time"
)

func TestHistogram(t *testing.T) {
	var h, more Histogram
	for _, d := range []time.Duration{0, 50 * time.Microsecond, 51 * time.Microsecond, time.Minute} {
		h.Observe(d)
	}
	more.Observe(time.Second)
	h.Add(&more)
	b := h.Buckets()
	for bound, want := range map[float64]uint64{0.00005: 2, 0.0001: 3, 0.5: 3, 1: 4, 2.5: 4, 10: 4} {
		if b[bound] != want {
			t.Errorf("at most %v s: %d, want %d", bound, b[bound], want)
		}
	}
	if h.Count != 5 || h.Seconds != 61.000101 || len(b) != len(histogramBounds) {
		t.Errorf("%+v", h)
	}
}
