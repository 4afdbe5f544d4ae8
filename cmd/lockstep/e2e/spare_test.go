// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/arbiter/arbitertest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// trio is a pair and a spare.
type trio struct {
	*unitPair
	hosts map[string]string // namespaces
	said  map[string]int    // how often a node has to have logged something
}

// newTrio makes three hosts, an etcd and the config, and starts nothing else.
func newTrio(t *testing.T) *trio {
	t.Helper()
	p := &trio{said: make(map[string]int), unitPair: &unitPair{newLivingPair(t, 1, "arbiter: {type: etcd, endpoints: ['203.0.113.9:2379'], timeout: 1s}\nmigration: {port: 9998, nbd_port: 9999}")}}
	p.hosts = map[string]string{"alpha": p.HostP, "beta": p.HostS, "gamma": p.AddSpare(t)}
	arbitertest.StartEtcd(t, arbitertest.Options{Listen: "203.0.113.9:2379", Command: func(name string, args ...string) *exec.Cmd {
		return lt.Command(p.Switch, name, args...)
	}})
	// Each host has a tap and an address of its own; the rest is the pair's.
	b, err := os.ReadFile(p.config)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, _ := strings.Cut(string(b), "nodes:\n")
	_, rest, _ = strings.Cut(rest, "pin_dir:")
	nodes := "nodes:\n"
	for i, node := range []string{"alpha", "beta", "gamma"} {
		nodes += fmt.Sprintf("  %s: {control: '203.0.113.%d:7700', nics: [{tap: tap0, bridge: br0, peer: {vxlan: {id: 77, local: 203.0.113.%[2]d, underlay: %s}}}]}\n", node, i+1, lt.Underlay)
	}
	if err := os.WriteFile(p.config, []byte(before+nodes+"pin_dir:"+rest), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := p.lockstep("keys", "-c", p.config, "-d", filepath.Join(p.Dir, "certs")).CombinedOutput(); err != nil { // gamma's
		t.Fatalf("keys: %v\n%s", err, out)
	}
	lt.Run(t, "cp", filepath.Join(p.Dir, "alpha0.qcow2"), filepath.Join(p.Dir, "gamma0.qcow2"))
	t.Cleanup(func() { p.killQEMU("gamma") })
	return p
}

// auto starts nodes' daemons without a role.
func (p *trio) auto(nodes ...string) {
	p.t.Helper()
	p.t.Setenv(preloadName, strings.TrimPrefix(p.preload, preloadName+"="))
	for _, node := range nodes {
		p.daemon(node, p.hosts[node], "")
	}
}

// cut takes a host off all networks, or gives it back.
func (p *trio) cut(node string, off bool) {
	p.t.Helper()
	for _, dev := range []string{"uplink", lt.Underlay} {
		p.SetLink(p.t, p.hosts[node], dev, !off)
	}
}

// lose is the loss of a whole host, at once and without a sign.
func (p *trio) lose(node string) {
	p.t.Helper()
	p.cut(node, true)
	p.unitPair.lose(node)
}

// pair waits until two nodes replicate, and either may die.
func (p *trio) pair(primary, secondary string) {
	p.t.Helper()
	both := func(s *api.Status) bool { return s.State == "replicating" && s.Covered }
	p.await(primary, func(s *api.Status) bool { return both(s) && s.Role == "primary" && s.Peer.Node == secondary })
	p.await(secondary, func(s *api.Status) bool { return both(s) && s.Role == "secondary" && s.Peer.Node == primary })
}

// spare waits until a node says that it waits, and why.
func (p *trio) spare(node, primary, secondary string) {
	p.t.Helper()
	said := fmt.Sprintf("this node is a spare: %s's secondary is %s", primary, secondary)
	p.await(node, func(s *api.Status) bool { return s.State == "spare" && s.Detail == said && s.Peer.Error == "" })
	p.said[node+said]++
	if n := strings.Count(p.log(node), said); n != p.said[node+said] {
		p.t.Errorf("%s logged %d times, want %d: %q", node, n, p.said[node+said], said)
	}
}

// confirmed writes a number to the guest's disk over c, once it reads there what was written before.
func (p *trio) confirmed(c *net.TCPConn, n int) {
	p.t.Helper()
	if got, want := p.ask(c, strings.TrimSuffix(fmt.Sprintf(requestLine, 'r', 0, 0, 0, false), "\n")), strings.TrimSuffix(fmt.Sprintf(answerLine, n-1, true), "\n"); got != want {
		p.t.Errorf("the guest's disk has %q, want %q", got, want)
	}
	if got, want := p.ask(c, strings.TrimSuffix(fmt.Sprintf(requestLine, 'w', 0, n, 0, false), "\n")), strings.TrimSuffix(fmt.Sprintf(answerLine, 0, true), "\n"); got != want {
		p.t.Errorf("a write was answered %q, want %q", got, want)
	}
}

// TestSpare: the secondary's host is lost, and the spare follows in its place; then the primary's is, and the spare that
// was takes over, with all that was confirmed. What comes back follows, or waits as a spare.
func TestSpare(t *testing.T) {
	p := newTrio(t)
	p.ordered("alpha", "start", "--here")
	p.auto("alpha", "beta")
	p.pair("alpha", "beta")
	p.auto("gamma")
	p.spare("gamma", "alpha", "beta")
	p.booted()
	watch := lt.WatchTransmitters(t, p.Switch, "portP", "portS", "portT")
	c, disk := p.open(), p.mustDial(lt.Guest4, portCAS)
	writes := 0
	works := func() {
		t.Helper()
		writes++
		c.ask(5)
		p.confirmed(disk, writes)
	}
	works()

	p.lose("beta")
	works()
	p.pair("alpha", "gamma")
	works()

	p.lose("alpha")
	works()
	p.isPrimary("gamma")
	p.await("gamma", func(s *api.Status) bool { return s.State == "solo" })
	if turns := watch.Turns(); len(turns) != 2 {
		t.Errorf("turns of speech: %v, want alpha's and gamma's", turns)
	}
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return
	}

	// Both come back, the first as the secondary.
	p.cut("alpha", false)
	p.auto("alpha")
	p.pair("gamma", "alpha")
	works()
	p.cut("beta", false)
	p.auto("beta")
	p.spare("beta", "gamma", "alpha")
	works()

	// The spare learns who is the primary now, and follows that one.
	p.lose("gamma")
	works()
	p.pair("alpha", "beta")
	works()
	// A secondary that was cut off has lost its place, whatever it knows. It waits when it is back.
	p.cut("gamma", false)
	p.auto("gamma")
	p.spare("gamma", "alpha", "beta")
	p.cut("beta", true)
	works()
	p.pair("alpha", "gamma")
	p.cut("beta", false)
	p.spare("beta", "alpha", "gamma")
	works()
	// A daemon that is started again knows whose the pair is: the spare is there at once, and is not taken.
	term := func() uint64 {
		return p.await("alpha", func(s *api.Status) bool { return s.Role == "primary" && s.ArbiterTerm > 0 }).ArbiterTerm
	}
	before := term()
	for _, node := range []string{"alpha", "gamma"} {
		p.kill(node)
		p.auto(node)
		p.pair("alpha", "gamma")
		works()
	}
	if now := term(); now != before {
		t.Errorf("the arbiter's term was %d and is %d", before, now)
	}
	if turns := watch.Turns(); len(turns) != 3 {
		t.Errorf("turns of speech: %v, want alpha's, gamma's and alpha's", turns)
	}
}
