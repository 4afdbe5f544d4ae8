// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"strings"
	"testing"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestInsecure: a pair without certificates works, and status says so each time.
func TestInsecure(t *testing.T) {
	p := newPair(t, lt.Veth, "", "", "tls: {insecure: true}")
	p.keepAlive(lt.Guest4, 10)
	for _, node := range []string{"alpha", "beta"} {
		out, err := p.lockstep("status", "-c", p.config, "--node", node).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "\nINSECURE: ") {
			t.Errorf("status of %s: %v\n%s", node, err, out)
		}
	}
}

// TestRotation: keys rotate under a transfer with certificates, and nothing is lost
// for it but frames that are repeated.
func TestRotation(t *testing.T) {
	p := newPair(t, lt.Veth, "", "", "tls: {ca: certs/ca.pem, cert: 'certs/{node}.pem', key: 'certs/{node}.key', rekey: 1s}")
	for _, term := range []uint32{2, 3, 4} {
		p.keepAlive(lt.Guest4, 10)
		s := p.await("alpha", func(s *api.Status) bool { return s.Term >= term })
		if s.Peer.Insecure || !s.Peer.Connected || s.CheckpointsRequested != 0 {
			t.Errorf("status %+v", s)
		}
	}
	p.keepAlive(lt.Guest6, 10)
}
