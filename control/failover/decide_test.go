// SPDX-License-Identifier: Apache-2.0

package failover

import (
	"strings"
	"testing"

	"github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/state"
)

// TestDecide: what a node has to be when it starts (R19). Of all that it may find, only
// the arbiter's record makes it primary, and nothing makes it so against that.
func TestDecide(t *testing.T) {
	alpha, beta := arbiter.Entry{Term: 5, Speaker: "alpha"}, arbiter.Entry{Term: 5, Speaker: "beta"}
	covered := state.State{Role: "secondary", Term: 4, Covered: 4}
	for _, tc := range []struct {
		name  string
		role  datapath.Role
		st    state.State
		rec   arbiter.Entry
		found datapath.Pinned
		want  Begin
		err   string
	}{
		{name: "the speaker, after a boot", role: datapath.RolePrimary, rec: alpha, want: Begin{Role: datapath.RolePrimary, Discard: true}},
		{name: "whatever the command line says", role: datapath.RoleSecondary, rec: alpha, want: Begin{Role: datapath.RolePrimary, Discard: true}},
		{name: "alone", role: datapath.RolePrimary, rec: alpha, found: datapath.Pinned{Role: datapath.RolePrimary, Mode: datapath.ModeSolo}, want: Begin{Role: datapath.RolePrimary, primary: PrimarySolo}},
		{name: "with an S that may take over", role: datapath.RolePrimary, rec: alpha, st: state.State{Role: "primary", Term: 5, Covered: 5}, found: datapath.Pinned{Role: datapath.RolePrimary, Mode: datapath.ModeHold},
			want: Begin{Role: datapath.RolePrimary, primary: PrimaryPair, covered: true}},
		{name: "with an S that may not yet", role: datapath.RolePrimary, rec: alpha, st: state.State{Role: "primary", Term: 5}, found: datapath.Pinned{Role: datapath.RolePrimary, Mode: datapath.ModeHold},
			want: Begin{Role: datapath.RolePrimary, primary: PrimaryPair}},
		{name: "covered for an earlier term", role: datapath.RolePrimary, rec: alpha, st: state.State{Role: "primary", Term: 4, Covered: 4}, found: datapath.Pinned{Role: datapath.RolePrimary, Mode: datapath.ModeHold},
			want: Begin{Role: datapath.RolePrimary, primary: PrimaryPair}},
		{name: "shut", role: datapath.RolePrimary, rec: alpha, found: datapath.Pinned{Role: datapath.RolePrimary, Mode: datapath.ModeShut}, want: Begin{Role: datapath.RolePrimary}},
		{name: "fenced, with an S that may be about to take over", role: datapath.RolePrimary, rec: alpha, st: state.State{Role: "primary", Term: 5, Covered: 5}, found: datapath.Pinned{Role: datapath.RolePrimary, Mode: datapath.ModeShut},
			want: Begin{Role: datapath.RolePrimary, covered: true}},
		{name: "took over, not yet promoted", role: datapath.RoleSecondary, rec: alpha, st: covered, found: datapath.Pinned{Role: datapath.RoleSecondary, Mode: datapath.ModeSolo},
			want: Begin{Role: datapath.RolePrimary, primary: PrimarySolo}},
		{name: "won, and died before it spoke", role: datapath.RoleSecondary, rec: alpha, st: covered, found: datapath.Pinned{Role: datapath.RoleSecondary, Mode: datapath.ModeQuiet},
			want: Begin{Role: datapath.RoleSecondary, covered: true, takeOver: true}},
		{name: "won with a guest that is not the one that was covered", role: datapath.RoleSecondary, rec: alpha, st: state.State{Role: "secondary", Term: 4}, found: datapath.Pinned{Role: datapath.RoleSecondary, Mode: datapath.ModeQuiet},
			want: Begin{Role: datapath.RolePrimary, Discard: true, keep: true}},
		{name: "the speaker, whose tables are gone", role: datapath.RolePrimary, rec: alpha, st: state.State{Role: "primary", Term: 5, Covered: 5},
			want: Begin{Role: datapath.RolePrimary, Discard: true, orphan: true}},
		{name: "an earlier speaker's, whose tables are gone", role: datapath.RolePrimary, rec: alpha, st: state.State{Role: "primary", Term: 3},
			want: Begin{Role: datapath.RolePrimary, Discard: true}},
		{name: "an old primary in its old role", role: datapath.RolePrimary, rec: beta, found: datapath.Pinned{Role: datapath.RolePrimary, Mode: datapath.ModeHold}, err: "beta transmits for the guest"},
		{name: "an old primary that follows", role: datapath.RoleSecondary, rec: beta, found: datapath.Pinned{Role: datapath.RolePrimary, Mode: datapath.ModeSolo}, want: Begin{Role: datapath.RoleSecondary, Discard: true}},
		{name: "a new secondary", role: datapath.RoleSecondary, rec: beta, want: Begin{Role: datapath.RoleSecondary, Discard: true}},
		{name: "before there is a primary", role: datapath.RoleSecondary, want: Begin{Role: datapath.RoleSecondary, Discard: true}},
		{name: "a secondary again, covered", role: datapath.RoleSecondary, rec: arbiter.Entry{Term: 4, Speaker: "beta"}, st: covered, found: datapath.Pinned{Role: datapath.RoleSecondary, Mode: datapath.ModeRun},
			want: Begin{Role: datapath.RoleSecondary, covered: true}},
		{name: "parked", role: datapath.RoleSecondary, rec: arbiter.Entry{Term: 4, Speaker: "beta"}, st: covered, found: datapath.Pinned{Role: datapath.RoleSecondary, Mode: datapath.ModePark},
			want: Begin{Role: datapath.RoleSecondary, covered: true}},
		{name: "shut, when its daemon had just begun", role: datapath.RoleSecondary, rec: arbiter.Entry{Term: 4, Speaker: "beta"}, st: covered, found: datapath.Pinned{Role: datapath.RoleSecondary, Mode: datapath.ModeShut},
			want: Begin{Role: datapath.RoleSecondary, covered: true}},
		{name: "shut, uncovered", role: datapath.RoleSecondary, rec: beta, st: covered, found: datapath.Pinned{Role: datapath.RoleSecondary, Mode: datapath.ModeShut},
			want: Begin{Role: datapath.RoleSecondary, Discard: true}},
		{name: "about to claim", role: datapath.RoleSecondary, rec: arbiter.Entry{Term: 4, Speaker: "beta"}, st: covered, found: datapath.Pinned{Role: datapath.RoleSecondary, Mode: datapath.ModeQuiet},
			want: Begin{Role: datapath.RoleSecondary, covered: true, takeOver: true}},
		{name: "covered, and its tables are gone", role: datapath.RoleSecondary, rec: arbiter.Entry{Term: 4, Speaker: "beta"}, st: covered,
			want: Begin{Role: datapath.RoleSecondary, Discard: true, keep: true}},
		{name: "covered for an earlier term, and its tables are gone", role: datapath.RoleSecondary, rec: beta, st: covered,
			want: Begin{Role: datapath.RoleSecondary, Discard: true}},
		{name: "a secondary of an earlier term", role: datapath.RoleSecondary, rec: beta, st: covered, found: datapath.Pinned{Role: datapath.RoleSecondary, Mode: datapath.ModeRun},
			want: Begin{Role: datapath.RoleSecondary, Discard: true}},
		{name: "a secondary, not covered yet", role: datapath.RoleSecondary, rec: beta, st: state.State{Role: "secondary", Term: 5}, found: datapath.Pinned{Role: datapath.RoleSecondary, Mode: datapath.ModeRun},
			want: Begin{Role: datapath.RoleSecondary}},
		{name: "a secondary that lost", role: datapath.RoleSecondary, rec: beta, st: covered, found: datapath.Pinned{Role: datapath.RoleSecondary, Mode: datapath.ModeQuiet}, want: Begin{Role: datapath.RoleSecondary, Discard: true}},
		{name: "auto: this node served last", role: RoleAuto, rec: alpha, st: state.State{Role: "primary", Term: 5}, want: Begin{Role: datapath.RolePrimary, Discard: true, orphan: true}},
		{name: "auto: it won, and crashed before it noted that", role: RoleAuto, rec: alpha, st: covered, want: Begin{Role: datapath.RolePrimary, Discard: true}},
		{name: "auto: its daemon starts again", role: RoleAuto, rec: alpha, st: state.State{Role: "primary", Term: 5}, found: datapath.Pinned{Role: datapath.RolePrimary, Mode: datapath.ModeSolo},
			want: Begin{Role: datapath.RolePrimary, primary: PrimarySolo}},
		{name: "auto: the first start, here", role: RoleAuto, rec: arbiter.Entry{Term: 1, Speaker: "alpha"}, st: state.State{Role: "primary"}, want: Begin{Role: datapath.RolePrimary, Discard: true}},
		{name: "auto: named, and its state is lost", role: RoleAuto, rec: alpha, err: "state_dir was lost"},
		{name: "auto: named at the first start, and replaced since", role: RoleAuto, rec: arbiter.Entry{Term: 1, Speaker: "alpha"}, err: "this host was replaced"},
		{name: "auto: named, and its state is of a backup", role: RoleAuto, rec: alpha, st: state.State{Role: "primary", Term: 3}, err: "lockstep start --here --force"},
		{name: "whose state is lost, and whom an operator trusts", role: datapath.RolePrimary, rec: alpha, want: Begin{Role: datapath.RolePrimary, Discard: true}},
		{name: "auto: deposed", role: RoleAuto, rec: beta, st: state.State{Role: "primary", Term: 4, Covered: 4}, found: datapath.Pinned{Role: datapath.RolePrimary, Mode: datapath.ModeShut},
			want: Begin{Role: datapath.RoleSecondary, Discard: true}},
		{name: "auto: deposed, after a boot", role: RoleAuto, rec: beta, st: state.State{Role: "primary", Term: 4, Covered: 4}, want: Begin{Role: datapath.RoleSecondary, Discard: true}},
		{name: "auto: a replaced host, and the other serves", role: RoleAuto, rec: beta, want: Begin{Role: datapath.RoleSecondary, Discard: true}},
		{name: "auto: a secondary again, covered", role: RoleAuto, rec: arbiter.Entry{Term: 4, Speaker: "beta"}, st: covered, found: datapath.Pinned{Role: datapath.RoleSecondary, Mode: datapath.ModeRun},
			want: Begin{Role: datapath.RoleSecondary, covered: true}},
		{name: "auto: the pair never ran", role: RoleAuto, err: ErrNeverRan.Error()},
		{name: "auto: somebody else's record", role: RoleAuto, rec: arbiter.Entry{Term: 1, Speaker: "gamma"}, err: "names neither alpha nor beta"},
		{name: "somebody else's record", role: datapath.RoleSecondary, rec: arbiter.Entry{Term: 1, Speaker: "gamma"}, err: "names neither alpha nor beta"},
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
	rec := arbiter.Entry{Term: 4, Speaker: "beta"}
	for _, role := range []datapath.Role{datapath.RolePrimary, datapath.RoleSecondary} {
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
				if err == nil && b.Ends() != (role == datapath.RoleSecondary && discard) {
					t.Errorf("%+v ends the guest: %v", b, b.Ends())
				}
			}
		}
	}
}

// TestMutationKeep: without the rule the only guest that knows what clients were told is
// ended because its tables are gone.
func TestMutationKeep(t *testing.T) {
	b, err := Decide(datapath.RoleSecondary, "alpha", "beta", state.State{Role: "secondary", Term: 4, Covered: 4}, arbiter.Entry{Term: 4, Speaker: "beta"}, datapath.Pinned{})
	if err != nil || b.Meets(true) == nil {
		t.Fatalf("%+v, %v: it begins", b, err)
	}
	b.keep = false
	if b.Meets(true) != nil || !b.Ends() {
		t.Errorf("%+v: the guest lives without the rule, too", b)
	}
}

// TestMutationKnows: without the rule a replaced host that the entry names begins as the primary, with disks that
// the guest never wrote; with qemu.first_start: copy they would replace the other host's, which are the guest's.
func TestMutationKnows(t *testing.T) {
	rec := arbiter.Entry{Term: 2, Speaker: "alpha"}
	if _, err := Decide(RoleAuto, "alpha", "beta", state.State{}, rec, datapath.Pinned{}); err == nil {
		t.Fatal("it begins")
	}
	knows := func(state.State, arbiter.Entry) bool { return true }
	b, err := decide(RoleAuto, "alpha", "beta", state.State{}, rec, datapath.Pinned{}, knows)
	if err != nil || b.Role != datapath.RolePrimary {
		t.Errorf("%+v, %v: it does not begin without the rule, either", b, err)
	}
}
