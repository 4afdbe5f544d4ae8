// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// auto starts a node's daemon as the unit does: without a role.
func (p *livingPair) auto(nodes ...string) {
	p.t.Helper()
	for _, node := range nodes {
		p.run(node, "")
	}
}

// lose ends all of lockstep and of the guest on hosts, at once.
func (p *livingPair) lose(nodes ...string) {
	p.t.Helper()
	for _, node := range nodes {
		p.kill(node)
	}
	for _, node := range nodes {
		p.killQEMU(node)
	}
}

// says waits until a node's daemon has logged something.
func (p *livingPair) says(node, what string) {
	p.t.Helper()
	lt.Eventually(p.t, time.Minute, func() (bool, string) { return strings.Contains(p.log(node), what), p.log(node) })
}

// ordered runs a command that has to succeed, and shows what it prints.
func (p *livingPair) ordered(node string, args ...string) string {
	p.t.Helper()
	out, err := p.order(node, args...)
	if err != nil {
		p.t.Fatalf("%v: %v", args, err)
	}
	p.t.Logf("%s$ lockstep %s\n%s", node, strings.Join(args, " "), out)
	return out
}

// forget empties a node's log.
func (p *livingPair) forget(nodes ...string) {
	p.t.Helper()
	for _, node := range nodes {
		p.t.Logf("the log of %s so far:\n%s", node, p.log(node))
		lt.Run(p.t, "truncate", "-s", "0", p.logFile(node))
	}
}

// isPrimary waits until a node is the primary, and its guest serves.
func (p *livingPair) isPrimary(node string) {
	p.t.Helper()
	p.await(node, func(s *api.Status) bool { return s.Role == "primary" && s.State != "start" })
}

// newAutoPair brings a pair up by two units that are the same, and `lockstep start --here` on alpha.
func newAutoPair(t *testing.T) *livingPair {
	t.Helper()
	p := newLivingPair(t, 1, "")
	p.auto("alpha", "beta")
	for _, node := range []string{"alpha", "beta"} {
		p.says(node, "waiting: the pair has never run, and nobody has said which node has the guest's disks")
	}
	if out, err := p.order("alpha", "start", "--here"); err == nil || !strings.Contains(err.Error(), "stop it first") {
		t.Errorf("start under a daemon: %s, %v", out, err)
	}
	p.kill("alpha")
	p.ordered("alpha", "start", "--here")
	p.auto("alpha")
	p.covered()
	p.booted()
	p.lockstepped()
	return p
}

// TestAutoRoles: neither unit names a role. Whatever ends on whichever host, what comes back is what it has to be, with
// the same command line, and a client's session lasts through all of it.
func TestAutoRoles(t *testing.T) {
	p := newAutoPair(t)
	watch := lt.WatchTransmitters(t, p.Switch, "portP", "portS")
	c, turns := p.open(), 1
	both := func() {
		t.Helper()
		p.covered()
		c.ask(5)
	}
	// The primary's host is lost, and comes back.
	p.lose("alpha")
	c.ask(1)
	p.isPrimary("beta")
	turns++
	p.auto("alpha")
	both()
	// A planned failover, and back: no daemon is started again.
	for _, to := range []string{"alpha", "beta"} {
		p.ordered(to, "failover")
		c.ask(1)
		p.isPrimary(to)
		turns++
		both()
	}
	// The primary's QEMU dies, and its daemon goes on as the secondary's.
	p.killQEMU("beta")
	c.ask(1)
	p.isPrimary("alpha")
	turns++
	both()
	// The secondary's host is lost, and comes back.
	p.lose("beta")
	c.ask(1)
	p.await("alpha", func(s *api.Status) bool { return s.State == "solo" })
	p.auto("beta")
	both()
	// Both daemons, but not their guests.
	p.kill("alpha")
	p.kill("beta")
	p.auto("beta", "alpha")
	both()
	if got := watch.Turns(); len(got) != turns {
		t.Errorf("turns of speech: %v, want %d", got, turns)
	}
	p.forget("alpha", "beta")
}

// TestAutoColdStart: everything on both hosts ends at once. Whatever comes back first, the guest boots from the disks of
// the node that served last, and from no other: one that was deposed waits for it, alone.
func TestAutoColdStart(t *testing.T) {
	p := newAutoPair(t)
	write := func() *diskWriter {
		t.Helper()
		w := p.writes(5 * time.Second)
		lt.Eventually(t, 30*time.Second, func() (bool, string) { return w.count() > 20, "few writes" })
		return w
	}
	check := func(n int) {
		t.Helper()
		p.covered()
		p.booted()
		c, served := p.served(time.Minute)
		if !served {
			t.Fatal("no host serves")
		}
		defer c.Close()
		p.verify(c, n)
	}
	for _, order := range [][]string{{"alpha", "beta"}, {"beta", "alpha"}} {
		w := write()
		p.lose("alpha", "beta")
		confirmed := w.end()
		p.auto(order...)
		check(confirmed)
		p.isPrimary("alpha")
	}
	// Beta takes over, and what is written then is on its disk alone.
	w := write()
	p.lose("alpha")
	before := w.count()
	lt.Eventually(t, 30*time.Second, func() (bool, string) { return w.count() > before+5, "no writes" })
	p.lose("beta")
	confirmed := w.end()
	p.forget("alpha", "beta")
	p.auto("alpha")
	s := p.await("alpha", func(s *api.Status) bool { return s.QMP.State == "inmigrate" && s.Peer.Error != "" })
	if s.Role != "secondary" || s.State != "start" || s.Covered {
		t.Errorf("the deposed host alone is %s, %s", s.Role, s.State)
	}
	if out, err := p.order("alpha", "failover", "--force"); err == nil {
		t.Errorf("it takes over: %s", out)
	}
	if c, served := p.served(3 * time.Second); served {
		c.Close()
		t.Error("a guest is served without what beta has written")
	}
	p.says("alpha", "the arbiter names beta")
	p.auto("beta")
	check(confirmed)
	p.isPrimary("beta")
	p.forget("alpha", "beta")
}

// TestHostLostForGood: both hosts ended, and the one that served last does not come back. The other one boots the guest
// when an operator says so, from a disk that has all that was confirmed where it was covered to the end.
func TestHostLostForGood(t *testing.T) {
	p := newAutoPair(t)
	w := p.writes(5 * time.Second)
	lt.Eventually(t, 30*time.Second, func() (bool, string) { return w.count() > 20, "few writes" })
	p.lose("alpha", "beta")
	confirmed := w.end()
	alone := func(node string) {
		t.Helper()
		p.auto(node)
		p.await(node, func(s *api.Status) bool { return s.Role == "primary" && s.QMP.Connected })
		p.ordered(node, "failover")
		p.booted()
	}
	p.ordered("beta", "start", "--here") // it was covered
	alone("beta")
	c, served := p.served(time.Minute)
	if !served {
		t.Fatal("no host serves")
	}
	p.verify(c, confirmed)
	c.Close()
	// Now beta is lost, and alpha was not even there.
	p.lose("beta")
	if out, err := p.order("alpha", "start", "--here"); err == nil || !strings.Contains(err.Error(), "beta served last") {
		t.Errorf("start --here: %s, %v", out, err)
	}
	p.ordered("alpha", "start", "--here", "--force")
	alone("alpha")
	// What was thought lost comes back: it follows, whatever it has.
	p.auto("beta")
	p.covered()
	p.isPrimary("alpha")
	// A host that was replaced, disk and state_dir, under the name of the one that served last.
	p.lose("alpha", "beta")
	lt.Run(t, "rm", fmt.Sprintf("%s/state/web1-alpha.state", p.Dir))
	p.auto("alpha")
	p.refused("alpha", "this host was replaced, and its disks may not be the guest's")
	p.forget("alpha", "beta")
}
