// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestDivergenceAndDisks: guests with two disks; requests to which the guests have
// different answers are answered once each and cost checkpoints; what was written is on
// the survivor's disk, whichever host dies.
func TestDivergenceAndDisks(t *testing.T) {
	p := newLivingPair(t, 2, "")
	p.start()
	const requests = 100
	clock, disk := p.mustDial(lt.Guest4, portClock), p.mustDial(lt.Guest6, portDisk)
	before, last := p.status("alpha"), int64(0)
	for i := range requests {
		var n int
		var at int64
		if got := p.ask(clock, fmt.Sprint(i)); !sscan(got, &n, &at) || n != i || at <= last {
			t.Fatalf("request %d: %q, after %d", i, got, last)
		} else {
			last = at
		}
	}
	s := p.await("alpha", func(s *api.Status) bool { return s.State == "replicating" })
	if done := s.CheckpointsDone - before.CheckpointsDone; done < 1 || done > requests+s.CheckpointsRequested-before.CheckpointsRequested {
		t.Errorf("%d divergent requests made %d checkpoints", requests, done)
	} else {
		t.Logf("%d divergent requests, %d checkpoints", requests, done)
	}
	out, err := p.order("alpha", "diverge")
	if service := "port " + portClock + " "; err != nil || !strings.Contains(out, service) || !strings.Contains(out, "in bytes ") || !strings.Contains(out, "payload differs: ") {
		t.Errorf("%v, %s", err, out)
	} else {
		t.Log(out)
	}
	write := func(n int) {
		t.Helper()
		if got, want := p.ask(disk, fmt.Sprintf("write f%d text %d", n, n)), fmt.Sprintf("wrote f%d <nil>", n); got != want {
			t.Fatalf("%q, want %q", got, want)
		}
	}
	verify := func(n int) {
		t.Helper()
		for i := range n {
			if got, want := p.ask(disk, fmt.Sprintf("read f%d", i)), fmt.Sprintf("text %d <nil>", i); got != want {
				t.Fatalf("%q, want %q", got, want)
			}
		}
	}
	written := 0
	for range 10 {
		write(written)
		written++
	}
	primary := "alpha"
	for round, dies := range []string{"primary", "primary", "secondary", "primary"} {
		write(written)
		written++
		if dies == "primary" {
			p.killQEMU(primary)
			verify(written)
			p.rejoin(primary)
			primary = other(primary)
		} else {
			p.killQEMU(other(primary))
			verify(written)
		}
		write(written)
		written++
		p.covered()
		t.Logf("round %d: %d files, and the %s died", round, written, dies)
	}
	verify(written)
}

// quick is await for what does not last.
func (p *livingPair) quick(node string, want func(*api.Status) bool) {
	p.t.Helper()
	socket := filepath.Join(p.Dir, "run/web1-"+node+".sock")
	ctx, cancel := context.WithTimeout(p.t.Context(), 20*time.Second)
	defer cancel()
	for {
		s, err := api.FetchStatus(ctx, socket)
		if err == nil && want(&s) {
			return
		}
		if ctx.Err() != nil {
			p.t.Fatalf("%s never was as wanted: %+v, %v", node, s, err)
		}
	}
}

// TestMidCheckpoint: either host loses its QEMU between STOP and RESUME, the SVM with
// its new state loaded or not, or while it is parked and the PVM's state has not come.
func TestMidCheckpoint(t *testing.T) {
	p := newLivingPair(t, 1, "checkpoint: {period: 60s}")
	p.start()
	c, primary := p.open(), "alpha"
	// parked has a checkpoint begin that the SVM, which stands still, does not take.
	parked := func() {
		t.Helper()
		p.signal(other(primary), syscall.SIGSTOP)
		go p.order(primary, "checkpoint")
		p.quick(primary, func(s *api.Status) bool { return s.State == "checkpointing" })
		p.quick(other(primary), func(s *api.Status) bool { return s.State == "checkpointing" })
	}
	// halfway has a node's guest stopped for a checkpoint that takes its time.
	halfway := func(node string) {
		t.Helper()
		d := p.mustDial(lt.Guest4, portDirty)
		defer d.Close() // the guest receives the end of it when it goes on
		if got := p.ask(d, ""); got != "dirty" {
			t.Fatalf("%q in place of dirty", got)
		}
		go p.order(primary, "checkpoint")
		p.quick(node, func(s *api.Status) bool { return s.QMP.State == "paused" })
	}
	revive := func() {
		t.Helper()
		p.rejoin(primary)
		primary = other(primary)
	}
	for _, x := range []struct {
		name string
		f    func()
	}{
		{"parked, the secondary dies", func() {
			parked()
			p.killQEMU(other(primary))
		}},
		{"parked, the primary dies", func() {
			parked()
			p.killQEMU(primary)
			p.signal(other(primary), syscall.SIGCONT)
			c.ask(1)
			revive()
		}},
		{"half loaded, the secondary dies", func() {
			halfway(primary)
			p.killQEMU(other(primary))
		}},
		{"half loaded, the primary dies", func() {
			halfway(primary)
			p.killQEMU(primary)
			c.ask(1)
			revive()
		}},
		{"loaded, the primary dies", func() {
			halfway(other(primary))
			p.quick(other(primary), func(s *api.Status) bool { return s.QMP.State == "running" })
			p.killQEMU(primary)
			c.ask(1)
			revive()
		}},
	} {
		for range rounds(4) {
			t.Log(x.name)
			x.f()
			c.ask(1)
			p.covered()
			c.ask(1)
		}
	}
}

// rounds is 1, or n where time is no matter.
func rounds(n int) int {
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return 1
	}
	return n
}

// TestFailovers: in every situation one of the two QEMUs dies, the other goes on, no
// connection breaks and no byte is wrong; the host that lost its guest gets a new one. One
// client session lasts through all of it.
func TestFailovers(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	c, primary := p.open(), "alpha"
	for i := range 2 * rounds(5) {
		dies := []string{"primary", "secondary"}[i%2]
		for _, x := range situations {
			t.Run(dies+"/"+x.name, func(t *testing.T) {
				victim := map[string]string{"primary": primary, "secondary": other(primary)}[dies]
				q := *p
				q.pair = p.with(t)
				sig := syscall.SIGKILL
				if x.name == "idle" {
					sig = syscall.SIGTERM // QEMU reports it, and what it loses on its way
				}
				q.during(x, func() {
					p.endQEMU(victim, sig)
					c.ask(1)
				})
				if t.Failed() {
					return
				}
				if dies == "primary" {
					primary = other(primary)
					p.rejoin(victim)
				}
				p.covered()
				c.ask(1)
			})
			if t.Failed() {
				return
			}
		}
	}
}
