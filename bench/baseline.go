// SPDX-License-Identifier: Apache-2.0

// Package bench measures lockstep against mirroring alone, in the namespaces of
// loadertest: what a guest's request, a bulk transfer, a byte of output and a
// packet cost. `make bench-smoke` runs it.
package bench

import (
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -go-package bench -target bpfel -output-stem baseline baseline baseline.bpf.c -- -std=gnu11 -O2 -g -Wall -Werror -mcpu=v3 -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu

// attachBaseline has a World only mirror, until the test ends.
func attachBaseline(t testing.TB, w *lt.World) {
	t.Helper()
	var objs baselineObjects
	spec, err := loadBaseline()
	if err != nil {
		t.Fatalf("read baseline: %v", err)
	}
	index := func(ns, device string) (i int) {
		lt.In(t, ns, func() {
			l, err := netlink.LinkByName(device)
			if err != nil {
				t.Fatalf("%s in %s: %v", device, ns, err)
			}
			i = l.Attrs().Index
		})
		return i
	}
	for name, i := range map[string]int{baselineVarPeerP: index(w.HostP, "peerP"), baselineVarTapS: index(w.HostS, "tapS")} {
		if err := spec.Variables[name].Set(uint32(i)); err != nil {
			t.Fatalf("set %s: %v", name, err)
		}
	}
	if err := spec.LoadAndAssign(&objs, nil); err != nil {
		t.Fatalf("load baseline: %v", err)
	}
	t.Cleanup(func() { objs.Close() })
	for _, a := range []struct {
		prog       *ebpf.Program
		ns, device string
		attach     ebpf.AttachType
	}{
		{objs.BaseMirror, w.HostP, "tapP", ebpf.AttachTCXEgress},
		{objs.BasePriOut, w.HostP, "tapP", ebpf.AttachTCXIngress},
		{objs.BaseSecIn, w.HostS, "peerS", ebpf.AttachTCXIngress},
		{objs.BaseSecOut, w.HostS, "tapS", ebpf.AttachTCXIngress},
	} {
		lt.In(t, a.ns, func() {
			dev, err := netlink.LinkByName(a.device)
			if err != nil {
				t.Fatalf("%s in %s: %v", a.device, a.ns, err)
			}
			l, err := link.AttachTCX(link.TCXOptions{Interface: dev.Attrs().Index, Program: a.prog, Attach: a.attach})
			if err != nil {
				t.Fatalf("attach %s: %v", a.prog, err)
			}
			t.Cleanup(func() { l.Close() })
		})
	}
}
