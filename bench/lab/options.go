// SPDX-License-Identifier: Apache-2.0

// Package lab is what the parts of the benchmark share: what a run is asked for, network
// namespaces, and processes in them.
package lab

import "errors"

// Options are what a run is asked for.
type Options struct {
	Rounds   int    // of each measurement; at least 1
	Quick    bool   // small counts: shows that everything works, the figures mean nothing
	Only     string // of the measurements only those whose names have this in them; "" for all
	QEMU     string // path of qemu-system-*; "" leaves QEMU out
	Lockstep string // path of the lockstep binary
	Guest    string // folder of a guest's kernel, as `make deps` makes it; "" leaves real guests out
}

// ErrNoMatch means that no measurement of a part has Options.Only in its name.
var ErrNoMatch = errors.New("no measurement has that in its name")

// Progress is told what comes next, and how much of all is done; total is 0 while that is
// not known. It is called between measurements, never during one.
type Progress func(done, total int, what string)
