// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/lockstep-ft/lockstep/control/api"
)

// TestSickSecondary: the secondary's QEMU stands still each time its guest is to be
// copied. The guest that serves goes on, tries are made less often and report why they
// failed, and when the secondary is well again the pair replicates.
func TestSickSecondary(t *testing.T) {
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return // half a minute; control.TestTriesBackOff and control/qemu.TestReplicateFails stay
	}
	p := newLivingPair(t, 1, "")
	p.start()
	c := p.open()
	p.killQEMU("beta")
	failed := 0
	for range 2 {
		p.quick("alpha", func(s *api.Status) bool { return s.State == "resync" })
		p.signal("beta", syscall.SIGSTOP)
		c.ask(1)
		s := p.await("alpha", func(s *api.Status) bool {
			return s.State == "solo" && s.Replication != nil && s.Replication.Failed > failed
		})
		failed = s.Replication.Failed
		if s.Replication.Why == "" || s.Replication.Next == nil || !strings.Contains(s.Detail, s.Replication.Why) {
			t.Errorf("try %d: %+v, %q", failed, s.Replication, s.Detail)
		}
		t.Log(s.Detail)
		c.ask(1)
	}
	p.covered()
	c.ask(10)
	if s := p.status("alpha"); s.Role != "primary" || s.ArbiterTerm != p.record+1 {
		t.Errorf("alpha is %s, and the record is of term %d, which was %d", s.Role, s.ArbiterTerm, p.record)
	}
}
