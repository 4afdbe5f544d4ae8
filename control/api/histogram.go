// SPDX-License-Identifier: Apache-2.0

package api

import "github.com/lockstep-ft/lockstep/compare"

// Histogram counts durations by their size, since the daemon's start.
type Histogram = compare.Histogram
