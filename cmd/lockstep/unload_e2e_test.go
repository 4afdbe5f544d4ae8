// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"lockstep/control"
	lt "lockstep/loader/loadertest"
)

// orderHere runs lockstep on a node's host, as unload has to.
func (p *livingPair) orderHere(node string, args ...string) (string, error) {
	cmd := lt.Command(p.host(node), p.self(), append(args, "-c", p.config, "--node", node)...)
	cmd.Env = append(os.Environ(), actAs+"=lockstep")
	out, err := cmd.CombinedOutput()
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

// refused fails unless a node's daemon ended at once and has said why.
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
// host, and when the pins are gone, two guests are never heard beside each other, a guest
// that somebody may need is not ended, and the tap that a QEMU uses stays.
func TestUnloadSpeakers(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	heard := lt.WatchSpeakers(t, p.Switch, "portP", "portS")
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
	if out, err := p.orderHere("beta", "unload", "--force"); err != nil || !strings.Contains(out, "is muted: its taps are down") {
		t.Errorf("unload --force of an SVM: %v\n%s", err, out)
	}
	p.wantTap("beta", false)
	p.sameGuest("beta", svm)
	c.ask(5)
	p.await("alpha", func(s *control.Status) bool { return s.State == "solo" }) // it was covered
	// The primary has claimed since: now the SVM follows nobody, and a new one begins.
	p.run("beta", "secondary")
	p.covered()
	p.wantTap("beta", true)
	c.ask(5)
	svm = p.qemu("beta")

	// The primary's daemon dies, its guest is muted, and the secondary takes over. Whatever
	// is tried on the old primary's host, its guest is not heard.
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
	p.await("beta", func(s *control.Status) bool { return s.State == "solo" })
	p.run("alpha", "primary")
	p.refused("alpha", "is not primary any more: beta speaks")
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
	p.run("alpha", "secondary") // the arbiter names beta: this guest follows nobody
	p.covered()
	c.ask(5)
	twoTurns(t, heard)
}

// TestPinsGone: a host's pins vanish under its guest. A QEMU that clients know goes on,
// once the arbiter has said that it may; a covered secondary's is left for somebody to
// decide; neither is heard beside the other.
func TestPinsGone(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	heard := lt.WatchSpeakers(t, p.Switch, "portP", "portS")
	c := p.open()
	pvm, svm := p.qemu("alpha"), p.qemu("beta")
	// The covered secondary's, while nobody is there to take over from it: both daemons are
	// dead. Alpha's kernel holds what its guest says.
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
	p.await("alpha", func(s *control.Status) bool { return s.State == "solo" })
	p.sameGuest("alpha", pvm)
	p.wantTap("alpha", true)
	c.ask(20)
	// It has claimed: the old secondary's guest follows nobody.
	p.run("beta", "secondary")
	p.covered()
	c.ask(5)
	if turns := heard.Turns(); len(turns) != 1 {
		t.Errorf("turns of speech: %v", turns)
	}
}

// TestUnloadAlone: the one guest that speaks goes on when lockstep is taken away from it,
// and when it comes back; the other host cannot speak beside it.
func TestUnloadAlone(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	heard := lt.WatchSpeakers(t, p.Switch, "portP", "portS")
	c := p.open()
	pvm := p.qemu("alpha")
	p.killQEMU("beta")
	p.kill("beta")
	p.await("alpha", func(s *control.Status) bool { return s.State == "solo" })
	p.kill("alpha")
	if out, err := p.orderHere("alpha", "unload", "--force"); err != nil || !strings.Contains(out, "the guest goes on") {
		t.Fatalf("%v\n%s", err, out)
	}
	p.wantTap("alpha", true)
	c.ask(20)
	p.run("beta", "secondary") // it finds nobody to follow
	c.ask(5)
	p.run("alpha", "primary")
	p.covered()
	p.sameGuest("alpha", pvm)
	c.ask(20)
	if turns := heard.Turns(); len(turns) != 1 {
		t.Errorf("turns of speech: %v", turns)
	}
}
