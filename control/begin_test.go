// SPDX-License-Identifier: Apache-2.0

package control

import (
	"strings"
	"testing"

	"lockstep/control/arbiter"
	"lockstep/control/state"
)

// TestDecide: what a node has to be when it starts (R19). Of all that it may find, only
// the arbiter's record makes it primary, and nothing makes it so against that.
func TestDecide(t *testing.T) {
	alpha, beta := arbiter.Record{Term: 5, Speaker: "alpha"}, arbiter.Record{Term: 5, Speaker: "beta"}
	covered := state.State{Role: "secondary", Term: 4, Covered: 4}
	for _, tc := range []struct {
		name  string
		role  Role
		st    state.State
		rec   arbiter.Record
		found Found
		want  Begin
		err   string
	}{
		{name: "the speaker, after a boot", role: RolePrimary, rec: alpha, want: Begin{Role: RolePrimary, Discard: true}},
		{name: "whatever the command line says", role: RoleSecondary, rec: alpha, want: Begin{Role: RolePrimary, Discard: true}},
		{name: "alone", role: RolePrimary, rec: alpha, found: Found{RolePrimary, ModeSolo}, want: Begin{Role: RolePrimary, primary: lpSolo}},
		{name: "with an S that may take over", role: RolePrimary, rec: alpha, st: state.State{Role: "primary", Term: 5, Covered: 5}, found: Found{RolePrimary, ModeHold},
			want: Begin{Role: RolePrimary, primary: lpPair, covered: true}},
		{name: "with an S that may not yet", role: RolePrimary, rec: alpha, st: state.State{Role: "primary", Term: 5}, found: Found{RolePrimary, ModeHold},
			want: Begin{Role: RolePrimary, primary: lpPair}},
		{name: "covered for an earlier term", role: RolePrimary, rec: alpha, st: state.State{Role: "primary", Term: 4, Covered: 4}, found: Found{RolePrimary, ModeHold},
			want: Begin{Role: RolePrimary, primary: lpPair}},
		{name: "shut", role: RolePrimary, rec: alpha, found: Found{RolePrimary, ModeShut}, want: Begin{Role: RolePrimary}},
		{name: "took over, not yet promoted", role: RoleSecondary, rec: alpha, st: covered, found: Found{RoleSecondary, ModeSolo},
			want: Begin{Role: RolePrimary, primary: lpSolo}},
		{name: "won, and died before it spoke", role: RoleSecondary, rec: alpha, st: covered, found: Found{RoleSecondary, ModeQuiet},
			want: Begin{Role: RoleSecondary, covered: true, takeOver: true}},
		{name: "won with a guest that is not the one that was covered", role: RoleSecondary, rec: alpha, st: state.State{Role: "secondary", Term: 4}, found: Found{RoleSecondary, ModeQuiet},
			want: Begin{Role: RolePrimary, Discard: true, keep: true}},
		{name: "the speaker, whose tables are gone", role: RolePrimary, rec: alpha, st: state.State{Role: "primary", Term: 5, Covered: 5},
			want: Begin{Role: RolePrimary, Discard: true, orphan: true}},
		{name: "an earlier speaker's, whose tables are gone", role: RolePrimary, rec: alpha, st: state.State{Role: "primary", Term: 3},
			want: Begin{Role: RolePrimary, Discard: true}},
		{name: "an old primary in its old role", role: RolePrimary, rec: beta, found: Found{RolePrimary, ModeHold}, err: "beta speaks for the guest"},
		{name: "an old primary that follows", role: RoleSecondary, rec: beta, found: Found{RolePrimary, ModeSolo}, want: Begin{Role: RoleSecondary, Discard: true}},
		{name: "a new secondary", role: RoleSecondary, rec: beta, want: Begin{Role: RoleSecondary, Discard: true}},
		{name: "before there is a primary", role: RoleSecondary, want: Begin{Role: RoleSecondary, Discard: true}},
		{name: "a secondary again, covered", role: RoleSecondary, rec: arbiter.Record{Term: 4, Speaker: "beta"}, st: covered, found: Found{RoleSecondary, ModeRun},
			want: Begin{Role: RoleSecondary, covered: true}},
		{name: "parked", role: RoleSecondary, rec: arbiter.Record{Term: 4, Speaker: "beta"}, st: covered, found: Found{RoleSecondary, ModePark},
			want: Begin{Role: RoleSecondary, covered: true}},
		{name: "shut, when its daemon had just begun", role: RoleSecondary, rec: arbiter.Record{Term: 4, Speaker: "beta"}, st: covered, found: Found{RoleSecondary, ModeShut},
			want: Begin{Role: RoleSecondary, covered: true}},
		{name: "shut, uncovered", role: RoleSecondary, rec: beta, st: covered, found: Found{RoleSecondary, ModeShut},
			want: Begin{Role: RoleSecondary, Discard: true}},
		{name: "about to claim", role: RoleSecondary, rec: arbiter.Record{Term: 4, Speaker: "beta"}, st: covered, found: Found{RoleSecondary, ModeQuiet},
			want: Begin{Role: RoleSecondary, covered: true, takeOver: true}},
		{name: "covered, and its tables are gone", role: RoleSecondary, rec: arbiter.Record{Term: 4, Speaker: "beta"}, st: covered,
			want: Begin{Role: RoleSecondary, Discard: true, keep: true}},
		{name: "covered for an earlier term, and its tables are gone", role: RoleSecondary, rec: beta, st: covered,
			want: Begin{Role: RoleSecondary, Discard: true}},
		{name: "a secondary of an earlier term", role: RoleSecondary, rec: beta, st: covered, found: Found{RoleSecondary, ModeRun},
			want: Begin{Role: RoleSecondary, Discard: true}},
		{name: "a secondary, not covered yet", role: RoleSecondary, rec: beta, st: state.State{Role: "secondary", Term: 5}, found: Found{RoleSecondary, ModeRun},
			want: Begin{Role: RoleSecondary}},
		{name: "a secondary that lost", role: RoleSecondary, rec: beta, st: covered, found: Found{RoleSecondary, ModeQuiet}, want: Begin{Role: RoleSecondary, Discard: true}},
		{name: "somebody else's record", role: RoleSecondary, rec: arbiter.Record{Term: 1, Speaker: "gamma"}, err: "names neither alpha nor beta"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := Decide(tc.role, "alpha", "beta", tc.st, tc.rec, tc.found)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("%v, want %q", err, tc.err)
				}
				return
			}
			tc.want.Record = tc.rec
			if err != nil || got != tc.want {
				t.Errorf("%+v, %v\nwant %+v", got, err, tc.want)
			}
		})
	}
}

// TestBeginMeets: a guest that runs is ended only when it follows nobody, and a node does
// not begin where that is not known.
func TestBeginMeets(t *testing.T) {
	rec := arbiter.Record{Term: 4, Speaker: "beta"}
	for _, role := range []Role{RolePrimary, RoleSecondary} {
		for _, discard := range []bool{false, true} {
			for _, keep := range []bool{false, discard} {
				b := Begin{Role: role, Discard: discard, Record: rec, keep: keep}
				if err := b.Meets(false); err != nil {
					t.Errorf("%+v, nothing runs: %v", b, err)
				}
				err := b.Meets(true)
				if (err != nil) != keep || err != nil && !strings.Contains(err.Error(), "It is left as it is") && !strings.Contains(err.Error(), "it is left as it is") {
					t.Errorf("%+v, a guest runs: %v", b, err)
				}
				if err == nil && b.ends() != (role == RoleSecondary && discard) {
					t.Errorf("%+v ends the guest: %v", b, b.ends())
				}
			}
		}
	}
}

// TestMutationKeep: without the rule the only guest that knows what clients were told is
// ended because its tables are gone.
func TestMutationKeep(t *testing.T) {
	b, err := Decide(RoleSecondary, "alpha", "beta", state.State{Role: "secondary", Term: 4, Covered: 4}, arbiter.Record{Term: 4, Speaker: "beta"}, Found{})
	if err != nil || b.Meets(true) == nil {
		t.Fatalf("%+v, %v: it begins", b, err)
	}
	b.keep = false
	if b.Meets(true) != nil || !b.ends() {
		t.Errorf("%+v: the guest lives without the rule, too", b)
	}
}
