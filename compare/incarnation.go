// SPDX-License-Identifier: Apache-2.0

package compare

// incarnation tells connections apart that use one tuple after each other (R8): by the
// PVM's ISN, or not at all where a checkpoint has made the guests' numbers the same.
type incarnation struct {
	isn       uint32
	named     bool // isn is the PVM's
	settled   bool // isn, or inherited, holds
	inherited bool
}

// names reports whether a digest record names i.
func (i *incarnation) names(s *Segment) bool {
	return i.settled && s.Inherited == i.inherited && (s.Inherited || s.Inc == i.isn)
}

// named again: a connection that was half open at a commit may get an offset, of 0,
// afterwards: its records name the incarnation again.
func (i *incarnation) namesAgain(s *Segment) bool {
	return i.named && !s.Inherited && i.isn == s.Inc
}

// take makes i the incarnation that a digest record names.
func (i *incarnation) take(s *Segment) {
	*i = incarnation{isn: s.Inc, named: !s.Inherited, settled: true, inherited: s.Inherited}
}
