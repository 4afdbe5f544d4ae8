// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"

	"lockstep/control"
	lt "lockstep/loader/loadertest"
)

// TestRestart: a daemon that was killed and started again takes over its own
// pins, and the pair goes on.
func TestRestart(t *testing.T) {
	q := qemuPair(t)
	p := newPair(t, lt.Veth, q.Primary.Path(), q.Secondary.Path(), "checkpoint: {period: 1h}")
	p.await("alpha", ready)
	for _, x := range []struct{ node, ns, role string }{
		{"alpha", p.HostP, "primary"}, {"beta", p.HostS, "secondary"},
	} {
		p.keepAlive(lt.Guest4, 100)
		p.kill(x.node)
		if x.node == "beta" {
			p.await("alpha", func(s *control.Status) bool { return !s.Peer.Connected })
		}
		p.daemon(x.node, x.ns, x.role)
		p.await("alpha", func(s *control.Status) bool { return ready(s) && s.Peer.Connected })
		p.await("beta", func(s *control.Status) bool { return s.State == "replicating" })
		p.keepAlive(lt.Guest4, 100)
		p.keepAlive(lt.Guest6, 100)
	}
}
