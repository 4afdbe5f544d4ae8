// SPDX-License-Identifier: Apache-2.0

package control

import (
	"fmt"

	"lockstep/control/arbiter"
	"lockstep/control/state"
)

// Found is what an earlier daemon of this node left in the kernel. The zero Found:
// nothing, or nothing that is whole.
type Found struct {
	Role Role
	Mode Mode
}

// Begin is how a node's part in a pair's life begins (R19).
type Begin struct {
	Role Role
	// Discard: what is found in the kernel and the guest that goes with it are of a
	// part that is over. They go. Else they are those of the daemon before this one.
	Discard bool
	Record  arbiter.Record // the pair's

	primary  lpState
	covered  bool
	takeOver bool // S: the daemon before this one won, and could not end what it began
}

// Decide says what a node has to be: role is what its command line says, st what it
// wrote down, rec the arbiter's record. A node that the arbiter names is primary,
// whatever the command line says; one that it does not name is never.
func Decide(role Role, self, peer string, st state.State, rec arbiter.Record, found Found) (Begin, error) {
	switch rec.Speaker {
	case self:
		return decideSpeaker(st, rec, found), nil
	case peer, "":
	default:
		return Begin{}, fmt.Errorf("the arbiter's record (%s) names neither %s nor %s: it is another pair's, or a node was renamed", rec, self, peer)
	}
	if role == RolePrimary {
		if rec.Speaker == "" {
			return Begin{}, fmt.Errorf("%s is to be primary and has not claimed the arbiter", self) // the caller's mistake
		}
		return Begin{}, fmt.Errorf("%s is not primary any more: %s speaks for the guest (%s). To have this node follow it, start it with --role secondary; its guest's memory and disks are replaced then",
			self, peer, rec)
	}
	b := Begin{Role: RoleSecondary, Record: rec}
	// The SVM follows on: parked, too, it is the one that P knows.
	b.Discard = found.Role != RoleSecondary || found.Mode != ModeRun && found.Mode != ModePark
	b.covered = !b.Discard && st.Role == string(RoleSecondary) && st.Covered != 0 && st.Covered == rec.Term
	return b, nil
}

func decideSpeaker(st state.State, rec arbiter.Record, found Found) Begin {
	b := Begin{Role: RolePrimary, Record: rec, Discard: found == Found{}}
	switch {
	case found.Role == RoleSecondary && found.Mode != ModeSolo:
		if st.Covered == rec.Term-1 && st.Covered != 0 {
			b.Role, b.covered, b.takeOver = RoleSecondary, true, true
			return b
		}
		// It cannot have won with a guest that nothing covers; whose tables these
		// are nobody knows.
		b.Discard = true
	case found.Mode == ModeSolo:
		b.primary = lpSolo
	case found.Mode == ModeHold:
		b.primary, b.covered = lpPair, st.Covered == rec.Term
	}
	return b
}
