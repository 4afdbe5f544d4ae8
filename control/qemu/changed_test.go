// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// sameDisks checks that both hosts' images are the same, byte for byte. The guest is stopped
// for it.
func (g *guest) sameDisks(s *guest) {
	t := g.w.t
	t.Helper()
	if err := qemu.Stop(g.m); err != nil {
		t.Fatal(err)
	}
	var sizes []int64
	for range g.spec.Disks {
		sizes = append(sizes, diskSize)
	}
	err := g.inNamespace(func() error {
		return qemu.CompareImages(t.Context(), g.m, g.spec.Disks, sizes, g.w.to(g.host, s.in), filepath.Join(g.w.dir, "compare.sock"), func(qemu.Progress) {})
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := qemu.Cont(g.m); err != nil {
		t.Fatal(err)
	}
}

// TestCopiesWhatChanged: a secondary that was killed in the middle of writes, and is
// replicated to again while the guest goes on writing, gets only what was written since
// the point that it is known to be at, and its images are the primary's then (R24).
func TestCopiesWhatChanged(t *testing.T) {
	w := newWorld(t, 2)
	a := w.start("a", false)
	first := qemu.NewPoint(time.Now())
	b := a.replicate("b", qemu.Options{})
	if err := qemu.AddPoint(a.m, a.spec.Disks, first); err != nil {
		t.Fatal(err)
	}
	qemutest.Await(t, w.serial("a"), "ready")
	a.mustWrite("vda", 100, "before")
	a.checkpoint()
	last := qemu.SetLastChanges(1 << 20) // some is copied while the guest runs
	t.Cleanup(func() { qemu.SetLastChanges(last) })
	for range 2 {
		a.mustAsk("churn vda", "ok")
		b.kill()
		a.takeOver()
		a.mustWrite("vdb", 100, "alone")
		var copied []qemu.Copied
		b = a.replicate("b", qemu.Options{Resync: true, Since: first, Copied: func(c qemu.Copied) { copied = append(copied, c) }})
		a.mustAsk("rest", "ok")
		t.Log(copied)
		if len(copied) != 2 || copied[0].Bytes == 0 || copied[1].Bytes == 0 || copied[1].Bytes > diskSize/8 || copied[0].Since.IsZero() || !strings.Contains(copied[0].String(), "only what changed since") {
			t.Errorf("copied: %+v", copied)
		}
		a.sameDisks(b)
		a.checkpoint()
	}
	// What this QEMU did not record is copied whole.
	b.kill()
	a.takeOver()
	if err := qemu.KeepPoints(a.m, a.spec.Disks); err != nil {
		t.Fatal(err)
	}
	var copied []qemu.Copied
	b = a.replicate("b", qemu.Options{Resync: true, Since: first, Copied: func(c qemu.Copied) { copied = append(copied, c) }})
	if len(copied) != 2 || slices.ContainsFunc(copied, func(c qemu.Copied) bool { return !c.Since.IsZero() || c.Why == "" }) {
		t.Errorf("copied: %+v", copied)
	}
	a.checkpoint()
	a.kill()
	b.takeOver()
	b.mustRead("vda", 100, "before")
	b.mustRead("vdb", 100, "alone")
	b.mustAsk("verify vda", "good")
}

func (g *guest) inNamespace(f func() error) (err error) {
	lt.In(g.w.t, g.w.ns(g.host), func() { err = f() })
	return err
}

// TestChangesNotTaken: a secondary that stands still while what changed is copied to it costs the
// guest that serves no more than a pause, and the next try still gets by with what changed (R26).
func TestChangesNotTaken(t *testing.T) {
	w := newWorld(t, 1)
	a := w.start("a", false)
	point := qemu.NewPoint(time.Now())
	b := a.replicate("b", qemu.Options{})
	if err := qemu.AddPoint(a.m, a.spec.Disks, point); err != nil {
		t.Fatal(err)
	}
	qemutest.Await(t, w.serial("a"), "ready")
	a.checkpoint()
	a.mustAsk("churn vda", "ok")
	b.kill()
	a.takeOver()
	last := qemu.SetLastChanges(0)
	t.Cleanup(func() { qemu.SetLastChanges(last) })
	b = w.start("b", true)
	if err := qemu.PrepareSecondary(t.Context(), b.m, b.caps, b.spec.Disks, *b.in); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	halts := a.halts()
	err := a.replicateTo(t.Context(), w.to("a", b.in), qemu.Options{Resync: true, Since: point, Limits: qemu.Limits{Bandwidth: 256 << 10},
		Progress: func(p qemu.Progress) {
			if p.Done > 0 {
				once.Do(func() { freeze(b) })
			}
		}})
	if err == nil || strings.Contains(err.Error(), "undone") {
		t.Fatalf("got %v", err)
	}
	t.Logf("%v; the guest stood still for %v", err, halts())
	if halts() > 10*time.Second {
		t.Error("that is too long")
	}
	if running, state, err := a.m.Status(); err != nil || !running {
		t.Fatalf("the guest is %s, %v", state, err)
	}
	a.mustAsk("verify vda", "good")
	b.kill()
	qemu.SetLastChanges(last)
	var copied []qemu.Copied
	b = a.replicate("b", qemu.Options{Resync: true, Since: point, Copied: func(c qemu.Copied) { copied = append(copied, c) }})
	if len(copied) != 1 || copied[0].Since.IsZero() {
		t.Errorf("copied: %+v", copied)
	}
	a.mustAsk("rest", "ok")
	a.sameDisks(b)
}
