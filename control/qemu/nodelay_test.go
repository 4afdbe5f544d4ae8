// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
)

// TestNoDelay: between two hosts no part of a checkpoint waits for a delayed ACK.
func TestNoDelay(t *testing.T) {
	w := newWorldIn(t, 1, func(w *world) { w.tcp = true })
	a := w.start("a", false)
	b := a.replicate("b", qemu.Options{})
	qemutest.Await(t, w.serial("a"), "ready")
	a.checkpoint()
	delays := func() (n int) {
		t.Helper()
		for _, g := range []*guest{a, b} {
			d, err := qemu.Delays(g.m, *w.incoming("b"))
			if err != nil {
				t.Fatal(err)
			}
			n += d
		}
		return n
	}
	pauses := func() (sum time.Duration) {
		const n = 10
		for range n {
			longest := a.halts()
			a.checkpoint()
			sum += longest()
		}
		return sum / n
	}
	if n := delays(); n == 0 {
		t.Errorf("Nagle's algorithm is on at %d ends before anybody asked; is NoDelay needed?", n)
	}
	before := pauses()
	for _, g := range []*guest{a, b} {
		if err := qemu.NoDelay(g.m, *w.incoming("b")); err != nil {
			t.Fatal(err)
		}
	}
	if n := delays(); n != 0 {
		t.Errorf("Nagle's algorithm is still on at %d ends", n)
	}
	t.Logf("a checkpoint stops the guest for %v, with Nagle's algorithm for %v", pauses(), before)
	if err := qemu.NoDelay(a.m, qemu.Incoming{Migration: "tcp:192.0.2.9:1"}); err == nil {
		t.Error("no error without a connection")
	}
	if err := qemu.NoDelay(a.m, qemu.Incoming{Migration: "unix:/x"}); err != nil {
		t.Error(err)
	}
}
