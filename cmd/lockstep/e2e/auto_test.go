// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// unitPair is a pair whose daemons are started as the unit does.
type unitPair struct{ *livingPair }

// auto starts nodes' daemons without a role.
func (p *unitPair) auto(nodes ...string) {
	p.t.Helper()
	for _, node := range nodes {
		p.run(node, "")
	}
}

// lose ends all of lockstep and of the guest on hosts, at once.
func (p *unitPair) lose(nodes ...string) {
	p.t.Helper()
	for _, node := range nodes {
		p.kill(node)
	}
	for _, node := range nodes {
		p.killQEMU(node)
	}
}

// says waits until a node's daemon has logged something.
func (p *unitPair) says(node, what string) {
	p.t.Helper()
	lt.Eventually(p.t, time.Minute, func() (bool, string) { return strings.Contains(p.log(node), what), p.log(node) })
}

// ordered runs a command that has to succeed, and shows what it prints.
func (p *unitPair) ordered(node string, args ...string) string {
	p.t.Helper()
	out, err := p.orderHere(node, args...)
	if err != nil {
		p.t.Fatalf("%v: %v\n%s", args, err, out)
	}
	p.t.Logf("%s$ lockstep %s\n%s", node, strings.Join(args, " "), out)
	return out
}

// forget empties a node's log.
func (p *unitPair) forget(nodes ...string) {
	p.t.Helper()
	for _, node := range nodes {
		p.t.Logf("the log of %s so far:\n%s", node, p.log(node))
		lt.Run(p.t, "truncate", "-s", "0", p.logFile(node))
	}
}

// isPrimary waits until a node is the primary, and its guest serves.
func (p *unitPair) isPrimary(node string) {
	p.t.Helper()
	p.await(node, func(s *api.Status) bool { return s.Role == "primary" && s.State != "start" })
}

// newAutoPair brings a pair up by two units that are the same, and `lockstep start --here` on alpha.
func newAutoPair(t *testing.T) *unitPair {
	t.Helper()
	p := &unitPair{newLivingPair(t, 1, "")}
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

// notifications is in systemd's place, and counts what daemons tell it.
func notifications(t *testing.T) (told func(what string) int) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "n")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	var mu sync.Mutex
	count := make(map[string]int)
	go func() {
		b := make([]byte, 1000)
		for {
			n, err := l.Read(b)
			if err != nil {
				return
			}
			mu.Lock()
			count[string(b[:n])]++
			mu.Unlock()
		}
	}()
	return func(what string) int {
		mu.Lock()
		defer mu.Unlock()
		return count[what]
	}
}

// TestAutoRoles: neither unit names a role. Whatever ends on whichever host, what comes back is what it has to be, with
// the same command line, and a client's session lasts through all of it.
func TestAutoRoles(t *testing.T) {
	told := notifications(t)
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
	p.says("beta", `msg="taking over from alpha" vm=web1 node=beta role=secondary why="the primary's `) // which of the signs came first is open
	turns++
	p.auto("alpha")
	both()
	// A planned failover, and back: no daemon is started again.
	for _, to := range []string{"alpha", "beta"} {
		p.ordered(to, "failover")
		c.ask(1)
		p.isPrimary(to)
		p.says(to, `why="an operator ordered it"`)
		p.says(other(to), "this node may not transmit for the guest any more: an operator has the secondary take over")
		turns++
		both()
	}
	// The primary's QEMU dies, and its daemon goes on as the secondary's.
	p.killQEMU("beta")
	c.ask(1)
	p.isPrimary("alpha")
	p.says("alpha", `msg="taking over from beta" vm=web1 node=alpha role=secondary why="the primary's `)
	p.says("beta", "this node may not transmit for the guest any more: its QEMU is dead")
	turns++
	both()
	// The secondary's host is lost, and comes back.
	p.lose("beta")
	c.ask(1)
	p.await("alpha", func(s *api.Status) bool { return s.State == "solo" })
	p.says("alpha", `msg="going on without beta, if the arbiter lets it" vm=web1 node=alpha role=primary why="the secondary's `)
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
	if n := told("STOPPING=1"); n != 0 {
		t.Errorf("systemd was told %d times that a daemon stops, when its role ended: it would end it", n)
	}
	// What was healthy is no warning, and who is told to end says what becomes of the guest.
	for _, node := range []string{"beta", "alpha"} {
		p.signalDaemon(node, syscall.SIGTERM)
		if err := ends(p.t, p.procs[node]); err != nil {
			t.Errorf("the daemon of %s, told to end: %v", node, err)
		}
	}
	lt.Eventually(t, 10*time.Second, func() (bool, string) { return told("STOPPING=1") == 2, "systemd is not told that both stop" })
	p.says("beta", "told to end: the guest and the programs in the kernel go on without this daemon; alpha goes on alone after heartbeat.restart (3s), unless one is started again")
	p.says("alpha", "told to end: the guest and the programs in the kernel go on without this daemon; nothing leaves the guest until one is started again, and beta takes over after heartbeat.restart (3s)")
	for _, node := range []string{"beta", "alpha"} {
		if strings.Contains(p.log(node), "parked until a checkpoint") {
			t.Errorf("%s warns of the stop with which each pair begins", node)
		}
	}
	p.forget("alpha", "beta")
}

// TestAutoColdStart: everything on both hosts ends at once. Whatever comes back first, the guest boots from the disks of
// the node that served last, and from no other: one that was deposed waits for it, alone.
func TestAutoColdStart(t *testing.T) {
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return // it takes minutes; TestAutoRoles, cmd/lockstep.TestStartHere and control/failover.TestDecide stay
	}
	p := newAutoPair(t)
	write := func() *diskWriter {
		t.Helper()
		w := p.writes(5 * time.Second)
		lt.Eventually(t, 30*time.Second, func() (bool, string) { return w.count() > 20, "few writes" })
		return w
	}
	check := func(n int) { t.Helper(); servesWritten(t, p.livingPair, n) }
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
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return // it takes minutes; TestAutoRoles, cmd/lockstep.TestStartHere and control/failover.TestDecide stay
	}
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

// TestDayOfAnOperator goes through the procedures of docs/OPERATIONS.md that no other test does, with one client's session
// as long as the guest runs.
func TestDayOfAnOperator(t *testing.T) {
	p := &unitPair{newLivingPair(t, 1, "")}
	hosts := []string{"alpha", "beta"}
	// What `doctor` calls fit starts, though taps, run_dir and state_dir are still to be made.
	for _, node := range hosts {
		if out, err := p.orderHere(node, "doctor"); err != nil || !strings.Contains(out, "lockstep makes tap") {
			t.Errorf("doctor on %s: %v\n%s", node, err, out)
		}
	}
	p.ordered("alpha", "start", "--here")
	p.auto(hosts...)
	p.covered()
	p.booted()
	p.lockstepped()
	c := p.open()
	restart := func(node string) {
		t.Helper()
		p.signalDaemon(node, syscall.SIGTERM)
		ends(p.t, p.procs[node])
		p.auto(node)
		p.covered()
		c.ask(5)
	}
	// A setting that is one daemon's own; another lockstep.
	for _, node := range hosts {
		p.change(node, "migration:", "checkpoint: {period: 19s}\nmigration:")
		restart(node)
		p.ordered(node, "upgrade")
		restart(node)
	}
	if s := p.status("alpha"); s.Role != "primary" || s.ArbiterTerm != p.record {
		t.Errorf("alpha is %s in term %d, and was the primary in %d", s.Role, s.ArbiterTerm, p.record)
	}
	p.ordered("alpha", "status")
	// The secondary's host is shut down, and replaced by another one with an empty disk.
	disk := p.mustDial(lt.Guest4, portDisk)
	if got := p.ask(disk, "write kept text"); got != "wrote kept <nil>" {
		t.Fatal(got)
	}
	p.signalDaemon("beta", syscall.SIGTERM)
	ends(p.t, p.procs["beta"])
	p.killQEMU("beta")
	p.await("alpha", func(s *api.Status) bool { return s.State == "solo" })
	p.ordered("alpha", "status")
	c.ask(5)
	replace := func(node string) {
		t.Helper()
		lt.Run(t, "rm", "-r", "-f", fmt.Sprintf("%s/state/web1-%s.state", p.Dir, node), fmt.Sprintf("%s/overlays-%s", p.Dir, node))
		qemutest.Disk(t, fmt.Sprintf("%s/%s0.qcow2", p.Dir, node), 64<<20, false)
		p.auto(node)
		p.covered()
		c.ask(5)
	}
	replace("beta")
	// The primary's host is to be replaced: the other one takes over first.
	p.ordered("beta", "failover")
	p.covered()
	p.isPrimary("beta")
	c.ask(5)
	p.lose("alpha")
	c.ask(5)
	replace("alpha")
	if got := p.ask(disk, "read kept"); got != "text <nil>" {
		t.Errorf("the disks have %q", got)
	}
	p.ordered("beta", "events", "--last", "12")
	// The guest is shut down, and with it the pair.
	c.c.Close()
	disk.Close()
	p.end("poweroff")
	for _, node := range hosts {
		if err := ends(p.t, p.procs[node]); err != nil {
			t.Errorf("the daemon of %s ended with %v", node, err)
		}
	}
	for _, node := range hosts {
		p.ordered(node, "unload")
	}
	// Nothing boots it before an operator does, on the host that served last; the other one waits for that.
	p.auto(hosts...)
	if err := ends(p.t, p.procs["beta"]); err != nil || !strings.Contains(p.log("beta"), "powered off and stays off; `lockstep start") {
		t.Errorf("started again, the daemon of beta ended with %v", err)
	}
	p.await("alpha", func(s *api.Status) bool { return s.Role == "secondary" && s.QMP.State == "inmigrate" })
	p.ordered("beta", "start")
	p.auto("beta")
	p.covered()
	p.booted()
	c, served := p.open(), p.mustDial(lt.Guest4, portDisk)
	if got := p.ask(served, "read kept"); got != "text <nil>" {
		t.Errorf("after the start the disks have %q", got)
	}
	c.ask(5)
	p.forget(hosts...)
}
