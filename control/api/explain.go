// SPDX-License-Identifier: Apache-2.0

package api

import (
	"cmp"
	"regexp"
	"slices"
	"strings"

	"github.com/lockstep-ft/lockstep/control/config"
)

// ReasonKind is where a reason's name is seen.
type ReasonKind string

const (
	// KindCause: in Causes and Checkpoints, why a checkpoint was asked for, or why one failed. A frame
	// that is dropped for the same reason counts under this name in Dropped.
	KindCause   ReasonKind = "checkpoint"
	KindDrop    ReasonKind = "drop"    // in Dropped; those of the kernel in Counters, too
	KindCounter ReasonKind = "counter" // in Counters alone
)

// Reason explains a name to operators.
type Reason struct {
	Name  string // "…" in it stands for a part that differs from time to time
	Kind  ReasonKind
	Means string
	Do    string
}

// Reasons are all that a daemon reports by name, by kind.
func Reasons() []Reason { return slices.Concat(causes, drops, kernelDrops, kernelCounts) }

var kinds = func() map[string]ReasonKind {
	m := make(map[string]ReasonKind)
	for _, r := range Reasons() {
		m[r.Name] = r.Kind
	}
	return m
}()

// IsDrop reports whether the counter name is of frames that were dropped. One that has no explanation is.
func IsDrop(name string) bool { return kinds[name] != KindCounter }

// Explain finds the reason of a name. Case does not matter, nor whether words are joined by a space, "_" or "-".
func Explain(name string) (Reason, bool) {
	for _, r := range Reasons() {
		pattern := strings.ReplaceAll(regexp.QuoteMeta(plain(r.Name)), "…", ".+")
		if regexp.MustCompile("^" + pattern + "$").MatchString(plain(name)) {
			return r, true
		}
	}
	return Reason{}, false
}

func plain(name string) string {
	return strings.ToLower(strings.Join(strings.FieldsFunc(name, func(r rune) bool { return strings.ContainsRune(" _-", r) }), " "))
}

// nearest is how many names Nearest gives.
const nearest = 3

// Nearest gives the known names that are most like name: those that it is a part of, then those that need the fewest changes.
func Nearest(name string) []string {
	name = plain(name)
	var names []string
	for _, r := range Reasons() {
		names = append(names, r.Name)
	}
	distance := func(known string) int {
		if known = plain(known); strings.Contains(known, name) {
			return -1
		}
		return config.Distance(name, known)
	}
	slices.SortStableFunc(names, func(a, b string) int { return cmp.Compare(distance(a), distance(b)) })
	return names[:nearest]
}
