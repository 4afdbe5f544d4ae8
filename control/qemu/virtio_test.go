// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"bufio"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestBrokenDevices: a device whose queue made no sense is found, and it is what a
// checkpoint does not mend.
func TestBrokenDevices(t *testing.T) {
	w := newWorldIn(t, 1, func(w *world) { w.memory = true })
	a := w.start("a", false)
	b := a.replicate("b", qemu.Options{})
	qemutest.Await(t, w.serial("a"), "ready")
	a.checkpoint()
	for _, g := range []*guest{a, b} {
		if broken, err := qemu.BrokenDevices(g.m); err != nil || len(broken) != 0 {
			t.Fatalf("%s: %v, %v", g.host, broken, err)
		}
	}
	lt.Eventually(t, 10*time.Second, func() (bool, string) { // it has to run to take the frame
		b.breakNIC()
		broken, err := qemu.BrokenDevices(b.m)
		return len(broken) == 1, fmt.Sprint(broken, err)
	})
	a.checkpoint()
	if broken, err := qemu.BrokenDevices(b.m); err != nil || len(broken) != 1 {
		t.Errorf("after a checkpoint %v are broken, %v", broken, err)
	}
	if broken, err := qemu.BrokenDevices(a.m); err != nil || len(broken) != 0 {
		t.Errorf("%s: %v, %v", a.host, broken, err)
	}
}

// breakNIC has the guest's receive queue promise more buffers than it has, and a frame
// come.
func (g *guest) breakNIC() {
	t := g.w.t
	t.Helper()
	var devices []struct{ Name, Path string }
	if err := g.m.Execute("x-query-virtio", nil, &devices); err != nil {
		t.Fatal(err)
	}
	for _, d := range devices {
		if d.Name != "virtio-net" {
			continue
		}
		var queue struct {
			Available uint64 `json:"vring-avail"` // address of the available ring: flags, index, …
		}
		if err := g.m.Execute("x-query-virtio-queue-status", map[string]any{"path": d.Path, "queue": 0}, &queue); err != nil {
			t.Fatal(err)
		}
		g.poke(queue.Available+2, 0x7777)
	}
	lt.In(t, g.w.ns(g.host), func() {
		c, err := net.Dial("udp", guestAddr+":9")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprint(c, "frame")
	})
}

// poke writes to the guest's memory, by QEMU's qtest protocol.
func (g *guest) poke(address uint64, value uint16) {
	t := g.w.t
	t.Helper()
	c, err := net.Dial("unix", g.w.memorySocket(g.host))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	fmt.Fprintf(c, "writew %#x %#x\n", address, value)
	if got, err := bufio.NewReader(c).ReadString('\n'); err != nil || got != "OK\n" {
		t.Fatalf("qtest answers %q, %v", got, err)
	}
}
