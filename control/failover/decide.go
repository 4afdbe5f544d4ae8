// SPDX-License-Identifier: Apache-2.0

package failover

import (
	"errors"
	"fmt"

	"github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/state"
)

// Begin is how a node begins in a role (R19).
type Begin struct {
	Role datapath.Role
	// Discard: the tables that are found in the kernel are of a part that is over, or
	// there are none. They are made anew. Else they are those of the daemon before this
	// one.
	Discard bool
	Record  arbiter.Entry // the pair's
	// Anew: this daemon has given up the SVM that it found or had. lockstep ends its own; one that somebody else
	// started has to be replaced by him.
	Anew bool

	primary  PrimaryState
	covered  bool
	takeOver bool // S: the daemon before this one had begun to, and could not end it
	keep     bool // a guest that runs may be the only one that knows what clients have received
	orphan   bool // P: if a guest runs, clients know it, but nothing in the kernel does
}

// Ends reports whether a guest that runs is one that follows nobody any more: a former
// primary's, which the arbiter does not name, or an SVM that could not take over.
func (b *Begin) Ends() bool { return b.Role == datapath.RoleSecondary && b.Discard }

// Meets decides whether a node may begin at all: runs is whether its guest runs already.
// What is not known to be of no use is not ended, so then it does not begin.
func (b Begin) Meets(runs bool) error {
	if !runs || !b.keep {
		return nil
	}
	if b.Role == datapath.RolePrimary {
		return fmt.Errorf("the arbiter (%s) has this node transmit, but the guest that runs here is a secondary's that no checkpoint covers; it is left as it is, and is muted. "+
			"If no better one runs on the other node, end its QEMU and start again: the guest boots from this node's disks then", b.Record)
	}
	return fmt.Errorf("the guest that runs here could take over (%s), but its tables in the kernel are gone: it may be the only one that knows what clients were told. "+
		"It is left as it is, and is muted. If %s serves the guest, end the QEMU on this node and start again: a new secondary begins", b.Record, b.Record.Speaker)
}

// RoleAuto is of a command line alone: the arbiter's entry and what the node stored decide.
const RoleAuto datapath.Role = "auto"

// ErrNeverRan: the arbiter has no entry, so no node has the guest's disks yet.
var ErrNeverRan = errors.New("the pair has never run, and nobody has said which node has the guest's disks")

// Decide is what a node has to be: role is what its command line asks for, st what it
// stored, rec the arbiter's entry. A node that the arbiter names is primary,
// whatever the command line asks for; one that it does not name is never.
func Decide(role datapath.Role, self, peer string, st state.State, rec arbiter.Entry, found datapath.Pinned) (Begin, error) {
	return decide(role, self, peer, st, rec, found, knows)
}

// knows reports whether a node that the entry names has served the guest, or was about to: its disks are
// the guest's. One that lost its state, or was replaced, has others. A takeover that a crash cut short is
// one term ahead of what is stored.
func knows(st state.State, rec arbiter.Entry) bool { return st.Role != "" && st.Term+1 >= rec.Term }

func decide(role datapath.Role, self, peer string, st state.State, rec arbiter.Entry, found datapath.Pinned, knows func(state.State, arbiter.Entry) bool) (Begin, error) {
	switch rec.Speaker {
	case self:
		if role == RoleAuto && !knows(st, rec) {
			return Begin{}, fmt.Errorf("the arbiter (%s) names %s, but the state that is stored here is not that of a node which served then: state_dir was lost, or this host was replaced, and its disks may not be the guest's. "+
				"If they are, call `lockstep start --here --force`; if %s's are, call it there", rec, self, peer)
		}
		return decideSpeaker(st, rec, found), nil
	case peer, "":
	default:
		return Begin{}, fmt.Errorf("the arbiter's entry (%s) names neither %s nor %s: it is another pair's, or a node was renamed", rec, self, peer)
	}
	if role == RoleAuto && rec.Speaker == "" {
		return Begin{}, ErrNeverRan
	}
	if role == datapath.RolePrimary {
		if rec.Speaker == "" {
			return Begin{}, fmt.Errorf("%s is to be primary and has not claimed the arbiter", self) // the caller's mistake
		}
		return Begin{}, fmt.Errorf("%s is not primary any more: %s transmits for the guest (%s). To have this node follow it, start it without --role; its guest's memory and disks are replaced then",
			self, peer, rec)
	}
	b := Begin{Role: datapath.RoleSecondary, Record: rec}
	covered := st.Role == string(datapath.RoleSecondary) && st.Covered != 0 && st.Covered == rec.Term
	switch {
	case found.Role != datapath.RoleSecondary, st.Term < rec.Term:
		b.Discard = true // nothing, a former primary's, or an SVM's that followed an earlier term
	case found.Mode == datapath.ModeRun, found.Mode == datapath.ModePark:
		// The SVM follows on: parked, too, it is the one that P knows.
	case covered && found.Mode == datapath.ModeQuiet:
		b.takeOver = true // it had not claimed yet, and P may be dead
	default:
		// Shut while a daemon began, or for a foreign program, it follows on as well.
		b.Discard = !covered || found.Mode != datapath.ModeShut
	}
	b.covered, b.keep = covered && !b.Discard, covered && b.Discard
	return b, nil
}

func decideSpeaker(st state.State, rec arbiter.Entry, found datapath.Pinned) Begin {
	b := Begin{Role: datapath.RolePrimary, Record: rec, Discard: found == datapath.Pinned{}}
	b.orphan = b.Discard && st.Role == string(datapath.RolePrimary) && st.Term == rec.Term
	switch {
	case found.Role == datapath.RoleSecondary && found.Mode != datapath.ModeSolo:
		if st.Covered == rec.Term-1 && st.Covered != 0 {
			b.Role, b.covered, b.takeOver = datapath.RoleSecondary, true, true
			return b
		}
		// It cannot have won with a guest that nothing covers; whose tables these
		// are nobody knows.
		b.Discard, b.keep = true, true
	case found.Mode == datapath.ModeSolo:
		b.primary = PrimarySolo
	case found.Mode == datapath.ModeHold:
		b.primary, b.covered = PrimaryPair, st.Covered == rec.Term
	case !b.Discard: // a part of this pair that ended; the secondary may still be about to take over from it
		b.covered = st.Covered == rec.Term
	}
	return b
}

// HasGuest reports whether the daemon before this one had a guest, so that its absence is
// its death.
func (b *Begin) HasGuest() bool {
	return b.primary != PrimaryStart || b.Role == datapath.RoleSecondary && b.covered
}

// Orphan reports whether a guest that runs here is one that clients know, while nothing in
// the kernel does (P).
func (b *Begin) Orphan() bool { return b.orphan }

// ResumesTakeOver reports whether the daemon before this one had begun to take over (S).
func (b *Begin) ResumesTakeOver() bool { return b.takeOver }

// Primary is P's machine as it begins at now, boottime ns.
func (b *Begin) Primary(cfg Config, now int64) *Primary {
	return NewPrimary(cfg, b.Record.Term, b.primary, b.covered, now)
}

// Secondary is S's machine as it begins at now, boottime ns, on the node self.
func (b *Begin) Secondary(cfg Config, self string, now int64) *Secondary {
	term := b.Record.Term
	if b.takeOver && b.Record.Speaker == self {
		term-- // the pair's
	}
	return NewSecondary(cfg, term, b.covered, now)
}
