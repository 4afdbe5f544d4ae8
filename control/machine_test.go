// SPDX-License-Identifier: Apache-2.0

package control

import (
	"strings"
	"testing"

	"github.com/lockstep-ft/lockstep/control/api"
)

// TestMachinesDiffer: two QEMUs that mean different machines by one name are refused at
// the greeting, and both hosts say why.
func TestMachinesDiffer(t *testing.T) {
	pair := newPair(t)
	p, s, _ := lives(t, pair)
	pair.Secondary.SetReply("qom-get", `"return": "pc-i440fx-10.0-machine"`)
	p.start()
	s.start()
	for _, x := range []*side{p, s} {
		st := x.await("the reason", func(st api.Status) bool { return strings.Contains(st.Peer.Error, "qemu.machine") })
		if st.Peer.Connected || !strings.Contains(st.Peer.Error, "pc-i440fx-7.2 here") || !strings.Contains(st.Peer.Error, "pc-i440fx-10.0 there") {
			t.Errorf("%s: %+v", st.Node, st.Peer)
		}
	}
}

// TestMutationMachines: without the comparison such QEMUs become a pair, whose secondary
// would load the state of other hardware than its own.
func TestMutationMachines(t *testing.T) {
	pair := newPair(t)
	p, s, _ := lives(t, pair)
	p.opt.Failover.anyMachine = true
	pair.Secondary.SetReply("qom-get", `"return": "pc-i440fx-10.0-machine"`)
	p.start()
	s.start()
	p.covered()
	s.covered()
}

// TestUnfitQEMU: a primary's QEMU that is known not to work is refused by name before a
// secondary's is told anything.
func TestUnfitQEMU(t *testing.T) {
	pair := newPair(t)
	p, s, _ := lives(t, pair)
	pair.Primary.SetReply("query-migrate-capabilities", `"return": []`)
	p.start()
	s.start()
	for _, x := range []*side{p, s} {
		x.await("the reason", func(st api.Status) bool { return strings.Contains(st.Peer.Error, "no migration capability x-colo") })
	}
}
