// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// orderHere runs lockstep on a node's host, as unload has to.
func (p *livingPair) orderHere(node string, args ...string) (string, error) {
	out, err := p.lockstepIn(p.host(node), append(args, "-c", p.config, "--node", node)...).CombinedOutput()
	return string(out), err
}

// unmount takes a node's pins away, as the unmounting of the bpffs does: they go without
// anybody's being asked. The daemon is gone.
func (p *livingPair) unmount(node string) {
	p.t.Helper()
	nics, err := filepath.Glob(filepath.Join(p.Pins, "lockstep/web1", node, "nic*"))
	if err != nil || len(nics) == 0 {
		p.t.Fatalf("pins of %s: %v, %v", node, nics, err)
	}
	for _, nic := range nics {
		if err := os.RemoveAll(nic); err != nil {
			p.t.Fatal(err)
		}
	}
}

// tapUp reports whether a node's tap, if it is there, is up.
func (p *livingPair) tapUp(node string) (is, there bool) {
	out, err := lt.Command(p.host(node), "ip", "-o", "link", "show", map[string]string{"alpha": "tapP", "beta": "tapS"}[node]).Output()
	flags, _, _ := strings.Cut(string(out), ">")
	return slices.Contains(strings.FieldsFunc(flags, func(r rune) bool { return r == '<' || r == ',' }), "UP"), err == nil
}

// wantTap fails unless a node's tap is there, up or down.
func (p *livingPair) wantTap(node string, up bool) {
	p.t.Helper()
	if is, there := p.tapUp(node); !there || is != up {
		p.t.Errorf("the tap of %s is there: %v, up: %v; want it there, up: %v", node, there, is, up)
	}
}

// sameGuest fails unless a node's QEMU is still the process that it was.
func (p *livingPair) sameGuest(node string, pid int) {
	p.t.Helper()
	if now := p.qemu(node); now != pid || pid == 0 {
		p.t.Errorf("the QEMU of %s was process %d, and is %d", node, pid, now)
	}
}

// refused fails unless a node's daemon ended at once and has logged why.
func (p *livingPair) refused(node, why string) {
	p.t.Helper()
	if err := p.procs[node].Wait(); err == nil || p.procs[node].ProcessState.ExitCode() != exitUsage {
		p.t.Errorf("the daemon of %s ended with %v", node, err)
	}
	if !strings.Contains(p.log(node), why) {
		p.t.Errorf("the daemon of %s does not say %q", node, why)
	}
}

// TestUnloadSpeakers: whatever an operator does with unload, run and upgrade on either
// host, and when the pins are gone, two guests never transmit beside each other, a guest
// that may be needed is not ended, and the tap that a QEMU uses stays.
func TestUnloadSpeakers(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	watch := lt.WatchTransmitters(t, p.Switch, "portP", "portS")
	c := p.open()
	pvm, svm := p.qemu("alpha"), p.qemu("beta")

	// While a daemon lives, and while the guest runs, unload refuses.
	if out, err := p.orderHere("alpha", "unload", "--force"); err == nil || !strings.Contains(out, "stop it first") {
		t.Errorf("unload under a daemon: %v\n%s", err, out)
	}
	p.kill("beta")
	if out, err := p.orderHere("beta", "unload"); err == nil || !strings.Contains(out, fmt.Sprintf("QEMU is process %d", svm)) {
		t.Errorf("unload of an SVM: %v\n%s", err, out)
	}
	c.ask(5)
	// With force the SVM is muted. It could have taken over, so it is not ended either.
	if out, err := p.orderHere("beta", "unload", "--force"); err != nil || !strings.Contains(out, "its taps are down. So the guest") {
		t.Errorf("unload --force of an SVM: %v\n%s", err, out)
	}
	p.wantTap("beta", false)
	p.sameGuest("beta", svm)
	c.ask(5)
	p.await("alpha", func(s *api.Status) bool { return s.State == "solo" }) // it was covered
	// The primary has claimed since: now the SVM follows no primary, and a new one begins.
	p.run("beta", "secondary")
	p.covered()
	p.wantTap("beta", true)
	c.ask(5)
	if now := p.qemu("beta"); now == svm {
		t.Error("the old secondary's guest still runs")
	}

	// The primary's daemon dies, its guest is muted, and the secondary takes over. Whatever
	// is tried on the old primary's host, its guest is muted.
	p.kill("alpha")
	if out, err := p.orderHere("alpha", "unload"); err == nil {
		t.Errorf("unload of a PVM:\n%s", out)
	}
	if out, err := p.orderHere("alpha", "unload", "--force"); err != nil || !strings.Contains(out, "is muted") {
		t.Errorf("unload --force of a PVM: %v\n%s", err, out)
	}
	p.wantTap("alpha", false)
	p.sameGuest("alpha", pvm)
	c.ask(20)
	p.await("beta", func(s *api.Status) bool { return s.State == "solo" })
	p.run("alpha", "primary")
	p.refused("alpha", "is not primary any more: beta transmits")
	p.sameGuest("alpha", pvm)
	if out, err := p.orderHere("alpha", "upgrade"); err == nil {
		t.Errorf("upgrade without pins:\n%s", out)
	}
	for range 2 {
		if out, err := p.orderHere("alpha", "unload", "--force"); err != nil {
			t.Errorf("unload again: %v\n%s", err, out)
		}
	}
	p.wantTap("alpha", false)
	c.ask(20)
	p.run("alpha", "secondary") // the arbiter names beta: this guest follows no primary
	p.covered()
	c.ask(5)
	twoTurns(t, watch)
}

// TestPinsGone: a host's pins vanish under its guest. A QEMU that clients know goes on,
// once the arbiter allows it; a covered secondary's is left for an operator to
// decide; neither transmits beside the other.
func TestPinsGone(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	watch := lt.WatchTransmitters(t, p.Switch, "portP", "portS")
	c := p.open()
	pvm, svm := p.qemu("alpha"), p.qemu("beta")
	// The covered secondary's, while there is no host to take over from it: both daemons are
	// dead. Alpha's kernel holds what its guest sends.
	p.kill("alpha")
	p.kill("beta")
	p.SetLink(t, p.HostS, "uplink", false) // what is loose until the daemon begins is not this test's
	p.unmount("beta")
	p.run("beta", "secondary")
	p.refused("beta", "its tables in the kernel are gone")
	p.sameGuest("beta", svm)
	p.wantTap("beta", false)
	p.SetLink(t, p.HostS, "uplink", true)
	// The primary's as well. It goes on alone with the guest that runs.
	p.unmount("alpha")
	p.run("alpha", "primary")
	p.await("alpha", func(s *api.Status) bool { return s.State == "solo" })
	p.sameGuest("alpha", pvm)
	p.wantTap("alpha", true)
	c.ask(20)
	// It has claimed: the old secondary's guest follows no primary.
	p.run("beta", "secondary")
	p.covered()
	c.ask(5)
	if turns := watch.Turns(); len(turns) != 1 {
		t.Errorf("turns of speech: %v", turns)
	}
}

// change gives a node a config of its own, with what the last one had and another text in
// place of old. Its daemon takes it up when it is started again.
func (p *livingPair) change(node, old, text string) {
	p.t.Helper()
	b, err := os.ReadFile(cmp.Or(p.own[node], p.config))
	if err != nil || !strings.Contains(string(b), old) {
		p.t.Fatalf("no %q in the config of %s: %v", old, node, err)
	}
	p.own[node] = filepath.Join(p.Dir, node+".yaml")
	if err := os.WriteFile(p.own[node], []byte(strings.Replace(string(b), old, text, 1)), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// TestChangeSettings: the settings of a running pair are changed as docs/CONFIG.md describes,
// and one session lives through all of it; so does it when lockstep is taken away from the
// one guest that transmits, and comes back.
func TestChangeSettings(t *testing.T) {
	p := newLivingPair(t, 0, "compare: {timeout: 10s, slots: 16384}\ncheckpoint: {period: 20s}\nheartbeat: {interval: 50ms, timeout: 500ms, lease: 400ms, restart: 15s}")
	p.start()
	watch := lt.WatchTransmitters(t, p.Switch, "portP", "portS")
	c := p.open()
	pvm, svm := p.qemu("alpha"), p.qemu("beta")
	// A daemon's own settings: on either host, in any order.
	for node, role := range map[string]string{"alpha": "primary", "beta": "secondary"} {
		p.change(node, "timeout: 10s", "timeout: 9s")
		p.change(node, "period: 20s", "period: 19s")
		p.kill(node)
		p.run(node, role)
		c.ask(5)
		p.covered()
	}
	if s := p.status("alpha"); s.ArbiterTerm != p.record {
		t.Errorf("the record is of term %d, and was of %d: a host transmitted alone", s.ArbiterTerm, p.record)
	}
	// Those that both must agree on are refused, by name, while the pair replicates.
	p.kill("alpha")
	p.change("alpha", "timeout: 500ms", "timeout: 600ms")
	p.run("alpha", "primary")
	p.refused("alpha", "another heartbeat")
	p.change("alpha", "timeout: 600ms", "timeout: 500ms")
	p.run("alpha", "primary")
	c.ask(5)
	p.sameGuest("alpha", pvm)
	p.sameGuest("beta", svm)
	p.covered()
	// The secondary goes; the primary, alone, takes them up.
	p.kill("beta")
	p.killQEMU("beta")
	p.await("alpha", func(s *api.Status) bool { return s.State == "solo" })
	p.kill("alpha")
	p.change("alpha", "timeout: 500ms", "timeout: 600ms")
	p.run("alpha", "primary")
	p.await("alpha", func(s *api.Status) bool { return s.State == "solo" })
	c.ask(5)
	// Lockstep is taken away from it, and comes back.
	p.kill("alpha")
	if out, err := p.orderHere("alpha", "unload", "--force"); err != nil || !strings.Contains(out, "the guest goes on") {
		t.Fatalf("%v\n%s", err, out)
	}
	p.wantTap("alpha", true)
	c.ask(5)
	p.run("alpha", "primary")
	p.await("alpha", func(s *api.Status) bool { return s.State == "solo" })
	p.sameGuest("alpha", pvm)
	c.ask(5)
	// A new secondary with tables of another size, and then the old primary.
	p.change("beta", "timeout: 500ms", "timeout: 600ms")
	p.change("beta", "slots: 16384", "slots: 4096, max_connections: 5000")
	p.run("beta", "secondary")
	p.covered()
	c.ask(5)
	if out, err := p.order("beta", "failover"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	c.ask(5)
	p.change("alpha", "slots: 16384", "slots: 4096, max_connections: 5000")
	p.rejoin("alpha")
	p.covered()
	c.ask(5)
	twoTurns(t, watch)
}
