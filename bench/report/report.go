// SPDX-License-Identifier: Apache-2.0

// Package report holds what the benchmarks measured, and shows it: on a terminal, as
// JSON, and as one HTML page.
package report

import "time"

// Report is one run of the benchmarks.
type Report struct {
	Began   time.Time `json:"began"`
	Seconds float64   `json:"seconds"`
	Machine Machine   `json:"machine"`
	Parts   []Part    `json:"parts"`
}

// Machine is what the figures were measured on.
type Machine struct {
	CPU        string  `json:"cpu"`
	Cores      int     `json:"cores"`
	MemoryMB   int     `json:"memory_mb"`
	Kernel     string  `json:"kernel"`
	QEMU       string  `json:"qemu"`       // version; "" if none was used
	Lockstep   string  `json:"lockstep"`   // version
	Congestion string  `json:"congestion"` // TCP congestion control
	Noise      float64 `json:"noise"`      // spread of a fixed computation over the run: (slowest-fastest)/fastest
}

// Part is one of the benchmark's parts, measured in one go.
type Part struct {
	Name     string   `json:"name"`     // "A"
	Title    string   `json:"title"`    // "proxies alone, at native speed"
	Variants []string `json:"variants"` // what is compared, the floor first: "mirroring alone", "QEMU's chain", "lockstep"
	Cases    []Case   `json:"cases"`
	Notes    []string `json:"notes"`
}

// Case is one measure of all variants.
type Case struct {
	Group  string            `json:"group"`        // cases that belong together: "request/response, 1 connection"
	Name   string            `json:"name"`         // "p50"
	Unit   string            `json:"unit"`         // "µs", "Gbit/s", "1/s", "B", ""
	Less   bool              `json:"less"`         // less is better
	Stack  bool              `json:"stack"`        // adds up with the others of its group that do
	At     float64           `json:"at,omitempty"` // of what it was measured against, as connections; a group of such cases is drawn as lines
	Series map[string]Series `json:"series"`
}

// Series is what one variant did in a case.
type Series struct {
	Rounds  []float64    `json:"rounds"`            // one figure a round; its median counts
	CDF     [][2]float64 `json:"cdf,omitempty"`     // of latencies, all rounds: value, share of those at most as large
	Instead string       `json:"instead,omitempty"` // what it did when it could not carry the case; with Rounds: in some rounds
}
