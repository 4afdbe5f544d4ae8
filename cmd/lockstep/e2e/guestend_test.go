// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/qmp"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// end asks the guests to power off or to reboot.
func (p *livingPair) end(how string) {
	p.t.Helper()
	c := p.mustDial(lt.Guest4, portEnd)
	defer c.Close()
	if _, err := fmt.Fprintln(c, how); err != nil {
		p.t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(10 * time.Second))
	_, _ = c.Read(make([]byte, 1)) // until it is gone
}

// monitor is a connection to the second monitor of a node's QEMU.
func (p *livingPair) monitor(node string) *qmp.Monitor {
	p.t.Helper()
	m, err := qmp.Dial(p.t.Context(), filepath.Join(p.Dir, node+".mon"), 5*time.Second)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { m.Disconnect() })
	return m
}

// TestPowerOff: a guest that powers off is off on both hosts, and stays so when the units
// start their daemons again, until an operator starts it (R25).
func TestPowerOff(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	watch := lt.WatchTransmitters(t, p.Switch, "portP", "portS")
	c := p.open()
	c.c.Close()
	p.end("poweroff")
	for _, node := range []string{"alpha", "beta"} {
		if err := ends(p.t, p.procs[node]); err != nil {
			t.Errorf("the daemon of %s ended with %v", node, err)
		}
		lt.Eventually(t, 10*time.Second, func() (bool, string) { return p.qemu(node) == 0, "its QEMU is there" })
	}
	if turns := watch.Turns(); len(turns) > 1 {
		t.Errorf("a host took over: %v", turns)
	}
	p.run("alpha", "primary")
	if err := ends(p.t, p.procs["alpha"]); err != nil || p.qemu("alpha") != 0 {
		t.Errorf("started again, the daemon ended with %v, QEMU's process is %d", err, p.qemu("alpha"))
	}
	if log := p.log("alpha"); !strings.Contains(log, "powered off and stays off; `lockstep start") {
		t.Error("no log says how to start it")
	}
	if out, err := p.order("beta", "start"); err == nil {
		t.Errorf("start on the secondary: %q", out)
	}
	if out, err := p.order("alpha", "start"); err != nil || !strings.Contains(out, "boots web1") {
		t.Errorf("start: %q, %v", out, err)
	}
	p.start()
	if s := p.status("alpha"); s.ArbiterTerm != 1 {
		t.Errorf("the arbiter's entry is of term %d", s.ArbiterTerm)
	}
}

// TestReboot: a guest that reboots, by itself or by an order to QEMU, stays a pair, which
// a checkpoint makes equal (R25).
func TestReboot(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	for _, how := range []string{"reboot", "system_reset"} {
		before := p.status("alpha")
		if how == "reboot" {
			p.end(how)
		} else if err := p.monitor("alpha").Execute(how, nil, nil); err != nil {
			t.Fatal(err)
		}
		p.await("alpha", func(s *api.Status) bool {
			for _, c := range s.Causes {
				if c.Reason == "the guest was reset" && (len(before.Causes) == 0 || c.At.After(before.Causes[len(before.Causes)-1].At)) {
					return true
				}
			}
			return false
		})
		p.booted()
		p.lockstepped()
		if s := p.status("alpha"); s.ArbiterTerm != before.ArbiterTerm || s.CheckpointsDone == before.CheckpointsDone {
			t.Errorf("%s: the record is of term %d, %d checkpoints", how, s.ArbiterTerm, s.CheckpointsDone-before.CheckpointsDone)
		}
	}
}

// TestPanic: a primary's guest that panics is dead, though its QEMU lives: a covered
// secondary takes over (R25).
func TestPanic(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.extra("-device", "pvpanic", "-action", "panic=pause")
	p.start()
	watch := lt.WatchTransmitters(t, p.Switch, "portP", "portS")
	c := p.open()
	if err := p.monitor("alpha").Execute("human-monitor-command", map[string]string{"command-line": "o/b 0x505 1"}, nil); err != nil {
		t.Fatal(err)
	}
	c.ask(50)
	p.rejoin("alpha")
	p.covered()
	c.ask(1)
	twoTurns(t, watch)
	out, err := p.order("alpha", "events")
	if err != nil || !strings.Contains(out, "the guest panicked") {
		t.Errorf("events: %v\n%s", err, out)
	}
}

// TestSecondaryOff: the secondary's guest powers off, as one that shuts down some seconds
// before the primary's, or alone. A checkpoint makes it the primary's copy again, and
// it can take over (R25).
func TestSecondaryOff(t *testing.T) {
	p := newLivingPair(t, 1, "")
	p.start()
	c := p.open()
	before := p.status("alpha")
	// What ACPI has a guest write to the PM1a control register of QEMU's PC.
	if err := p.monitor("beta").Execute("human-monitor-command", map[string]string{"command-line": "o/w 0x604 0x2000"}, nil); err != nil {
		t.Fatal(err)
	}
	c.ask(50)
	s := p.await("alpha", func(s *api.Status) bool { return s.State == "replicating" && s.Covered })
	if s.ArbiterTerm != before.ArbiterTerm {
		t.Errorf("the arbiter's entry is of term %d, and was of term %d: the secondary was given up", s.ArbiterTerm, before.ArbiterTerm)
	}
	if log := p.log("beta"); !strings.Contains(log, "the secondary's guest powered off") {
		t.Error("the secondary's guest did not power off")
	}
	p.await("beta", func(s *api.Status) bool { return s.Covered })
	p.killQEMU("alpha")
	c.ask(50)
	p.rejoin("alpha")
	p.covered()
	c.ask(1)
}
