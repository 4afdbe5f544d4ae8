// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestDaemonStaysDead: a primary's daemon ends on a living host and does not come back:
// the other host waits for it for heartbeat.restart.
func TestDaemonStaysDead(t *testing.T) {
	p := newLivingPair(t, 0, "heartbeat: {restart: 1s}")
	p.start()
	watch := lt.WatchTransmitters(t, p.Switch, "portP", "portS")
	c := p.open()
	p.kill("alpha")
	began := time.Now()
	p.await("beta", func(s *api.Status) bool { return s.State == "solo" }) // until its lease ends, alpha's kernel goes on
	t.Logf("the takeover took %v", time.Since(began))
	c.ask(50)
	twoTurns(t, watch)
	p.run("alpha", "secondary") // its QEMU is ended, and makes room for a new one
	p.covered()
	c.ask(1)
	twoTurns(t, watch)
}

// TestDaemonsRestart: daemons are killed and started again, in every state of the
// pair: no host takes over, no connection breaks.
func TestDaemonsRestart(t *testing.T) {
	p := newLivingPair(t, 0, "compare: {timeout: 10s}\nheartbeat: {restart: 20s}")
	p.start()
	c := p.open()
	for n, nodes := range [][]string{{"beta"}, {"alpha"}, {"beta", "alpha"}} {
		for i, x := range situations[1:3] {
			if os.Getenv("LOCKSTEP_SOAK") == "" && i != n%2 {
				continue // each, and each daemon, but not all of one with all of the other
			}
			t.Run(fmt.Sprintf("%v %s", nodes, x.name), func(t *testing.T) {
				q := *p
				q.pair = p.with(t)
				q.during(x, func() {
					for _, node := range nodes {
						p.kill(node)
					}
					for _, node := range nodes {
						p.run(node, map[string]string{"alpha": "primary", "beta": "secondary"}[node])
					}
					c.ask(1)
				})
				p.covered()
				if s := p.status("alpha"); s.ArbiterTerm != p.record {
					t.Errorf("%d: the record is of term %d, and was of %d: a host transmitted alone", i, s.ArbiterTerm, p.record)
				}
			})
			if t.Failed() {
				return
			}
		}
	}
	// Alone, too.
	p.kill("beta")
	p.killQEMU("beta")
	p.await("alpha", func(s *api.Status) bool { return s.State == "solo" })
	p.kill("alpha")
	c.ask(1) // the kernel goes on without a daemon
	p.run("alpha", "primary")
	p.await("alpha", func(s *api.Status) bool { return s.State == "solo" })
	c.ask(1)
	p.run("beta", "secondary")
	p.covered()
	c.ask(1)
}
