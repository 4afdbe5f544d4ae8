// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Memory without disks: after any failover the guest's memory is that of the last
// checkpoint or newer, and the survivor replicates again, to either host.
func TestDiskless(t *testing.T) {
	w := newWorld(t, 0)
	a := w.start("a", false)
	if running, state, err := a.m.Status(); err != nil || running {
		t.Fatalf("a primary starts %s, %v", state, err)
	}
	b := a.replicate("b", qemu.Options{})
	qemutest.Await(t, w.serial("a"), "ready")
	a.mustAsk("set one", "ok")
	a.checkpoint()
	a.mustAsk("set two", "ok")

	b.kill()
	a.takeOver()
	a.mustAsk("get", "two")

	b = a.replicate("b", qemu.Options{})
	a.checkpoint()
	a.mustAsk("set three", "ok") // after the last checkpoint
	a.kill()
	b.takeOver()
	b.mustAsk("get", "two")

	a = b.replicate("a", qemu.Options{})
	b.mustAsk("set four", "ok")
	b.checkpoint()
	b.kill()
	a.takeOver()
	a.mustAsk("get", "four")
}

// Two disks through both failovers and the replication to a new secondary after each:
// what was on the disks at the checkpoint is there, and what the dead primary wrote after
// it is not, because the SVM's memory knows nothing of it.
func TestDisks(t *testing.T) {
	w := newWorld(t, 2)
	a := w.start("a", false)
	other := w.spec("a")
	other.Node, other.QMP = "c", filepath.Join(w.dir, "c.qmp")
	if err := other.Check(nil, nil); err == nil || !strings.Contains(err.Error(), "lock") {
		t.Errorf("an image that another QEMU uses: %v", err)
	}
	seen := make(map[string]qemu.Progress)
	copied := qemu.Options{Resync: true, Progress: func(p qemu.Progress) { seen[p.What] = p }}

	// The images are the same: both are empty.
	b := a.replicate("b", qemu.Options{})
	qemutest.Await(t, w.serial("a"), "ready")
	for _, disk := range []string{"vda", "vdb"} {
		a.mustWrite(disk, 1, disk+"-one")
		a.mustWrite(disk, 2, disk+"-both")
	}
	a.checkpoint()
	a.mustWrite("vda", 1, "lost")
	a.mustWrite("vda", 3, "lost")
	a.kill()
	b.takeOver()
	for _, disk := range []string{"vda", "vdb"} {
		b.mustRead(disk, 1, disk+"-one")
		b.mustRead(disk, 2, disk+"-both")
	}
	b.mustRead("vda", 3, "")
	b.mustWrite("vda", 4, "alone")

	// The promoted secondary has a new one, whose image holds the lost writes.
	a = b.replicate("a", copied)
	for i := range w.disks {
		id := a.spec.Disks[i].ID
		if p := seen[id]; p.Total < diskSize || p.Done != p.Total {
			t.Errorf("progress of %s ends with %+v", id, p)
		}
	}
	b.mustWrite("vdb", 5, "again")
	b.checkpoint()
	b.mustWrite("vdb", 5, "lost")
	b.kill()
	a.takeOver()
	a.mustRead("vda", 1, "vda-one")
	a.mustRead("vda", 3, "")
	a.mustRead("vda", 4, "alone")
	a.mustRead("vdb", 5, "again")

	// The secondary dies; the primary keeps all it wrote, and has a new one.
	b = a.replicate("b", copied)
	a.mustWrite("vda", 6, "six")
	b.kill()
	written := a.waitingWrite(7, "seven") // before the failover
	a.takeOver()
	written()
	a.mustWrite("vda", 8, "eight")
	b = a.replicate("b", copied)
	a.checkpoint()
	a.kill()
	b.takeOver()
	b.mustRead("vda", 6, "six")
	b.mustRead("vda", 7, "seven")
	b.mustRead("vda", 8, "eight")
	b.mustRead("vdb", 2, "vdb-both")
	b.mustWrite("vdb", 9, "nine")

	// After the merge the images alone are the disks.
	b.awaitMerged()
	if err := qemu.Quit(b.m); err != nil {
		t.Error(err)
	}
	<-b.p.Done()
	b = w.start("b", false)
	if err := qemu.Cont(b.m); err != nil {
		t.Fatal(err)
	}
	qemutest.Await(t, w.serial("b"), "ready")
	b.mustRead("vda", 8, "eight")
	b.mustRead("vda", 1, "vda-one")
	b.mustRead("vdb", 9, "nine")
}

// QEMUs that lockstep did not start, with the disk as in QEMU's docs/COLO-FT.txt.
func TestAttached(t *testing.T) {
	w := newWorld(t, 1)
	w.seed = true
	a := w.start("a", false)
	b := a.replicate("b", qemu.Options{})
	qemutest.Await(t, w.serial("a"), "ready")
	a.mustWrite("vda", 1, "one")
	b.kill()
	a.takeOver()
	b = a.replicate("b", qemu.Options{Resync: true})
	a.mustWrite("vda", 2, "two")
	a.checkpoint()
	a.mustWrite("vda", 2, "lost")
	a.kill()
	b.takeOver()
	b.mustRead("vda", 2, "two")
	b.mustAsk("churn vda", "ok")
	a = b.replicate("a", qemu.Options{Resync: true})
	b.checkpoint()
	b.kill()
	a.takeOver()
	a.mustRead("vda", 1, "one")
	a.mustRead("vda", 2, "two")
	a.mustAsk("verify vda", "good")
}

// A guest that writes all the time, while it is replicated, at checkpoints, and
// when a side dies in the middle of one: its memory and its disk always agree, and
// with the guest at rest the two hosts' images do.
func TestDiskUnderLoad(t *testing.T) {
	w := newWorld(t, 1)
	a := w.start("a", false)
	if err := qemu.Cont(a.m); err != nil {
		t.Fatal(err)
	}
	qemutest.Await(t, w.serial("a"), "ready")
	a.mustAsk("churn vda", "ok")
	hosts := []*guest{a}
	for round := range 4 {
		p := hosts[0]
		s := p.replicate(map[string]string{"a": "b", "b": "a"}[p.host], qemu.Options{Resync: true})
		for range 3 {
			p.checkpoint()
		}
		p.mustAsk("verify vda", "good")
		survivor, dead := s, p
		if round%2 == 1 {
			survivor, dead = p, s
		}
		p.drainStops()
		if err := p.m.Checkpoint(); err != nil {
			t.Fatal(err)
		}
		<-p.stopped
		dead.kill()
		survivor.takeOver()
		survivor.mustAsk("verify vda", "good")
		hosts = []*guest{survivor, dead}
	}

	p := hosts[0]
	s := p.replicate(hosts[1].host, qemu.Options{Resync: true})
	p.mustAsk("rest", "ok")
	p.checkpoint()
	p.kill()
	s.takeOver()
	s.mustAsk("verify vda", "good")
	s.awaitMerged()
	if err := qemu.Quit(s.m); err != nil {
		t.Error(err)
	}
	<-s.p.Done()
	lt.Run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", w.image("a", 0), w.image("b", 0))
}

// A host that hangs instead of dying: its QEMU is stopped with all its connections open.
// Writes and checkpoints hang then, and failover ends that.
func TestSilentHost(t *testing.T) {
	w := newWorld(t, 1)
	a := w.start("a", false)
	b := a.replicate("b", qemu.Options{})
	qemutest.Await(t, w.serial("a"), "ready")
	a.mustAsk("churn vda", "ok")
	a.checkpoint()
	freeze(b)
	if err := a.m.Checkpoint(); err != nil {
		t.Fatal(err)
	}
	// Stopping the guest waits for its writes, and so for the other host.
	hangs := make(chan error, 1)
	go func() { hangs <- qemu.Stop(a.m) }()
	a.takeOver()
	if err := <-hangs; err != nil {
		t.Errorf("the command that hung: %v", err)
	}
	if err := qemu.Cont(a.m); err != nil {
		t.Error(err)
	}
	a.mustAsk("verify vda", "good")
	b.kill()

	b = a.replicate("b", qemu.Options{Resync: true})
	a.checkpoint()
	if err := a.m.Checkpoint(); err != nil {
		t.Fatal(err)
	}
	freeze(a)
	b.takeOver()
	b.mustAsk("verify vda", "good")
}

// A secondary that has no guest yet does not take over.
func TestSecondaryWithoutGuest(t *testing.T) {
	w := newWorld(t, 0)
	b := w.start("b", true)
	if err := qemu.SecondaryFailover(t.Context(), b.m, nil); err == nil || !strings.Contains(err.Error(), "no guest") {
		t.Errorf("got %v", err)
	}
}

// A first migration that ended while its try was taken back leaves a guest that has never run in the state of one that
// has gone elsewhere, from which QEMU migrates none.
func TestUnmigrate(t *testing.T) {
	w := newWorld(t, 0)
	a := w.start("a", false)
	elsewhere, err := net.Listen("unix", filepath.Join(w.dir, "elsewhere"))
	if err != nil {
		t.Fatal(err)
	}
	defer elsewhere.Close()
	go func() {
		if c, err := elsewhere.Accept(); err == nil {
			io.Copy(io.Discard, c)
		}
	}()
	if err := a.m.Execute("migrate", map[string]any{"uri": "unix:" + elsewhere.Addr().String()}, nil); err != nil {
		t.Fatal(err)
	}
	lt.Eventually(t, time.Minute, func() (bool, string) {
		_, state, err := a.m.Status()
		return state == "postmigrate", fmt.Sprint(state, err)
	})
	a.replicate("b", qemu.Options{Unstarted: true})
	qemutest.Await(t, w.serial("a"), "ready")
	a.mustAsk("set one", "ok")
	a.checkpoint()
}
