// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"testing"

	"github.com/vishvananda/netlink"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// The probes find on this kernel what the other tests use, and leave nothing.
func TestProbes(t *testing.T) {
	lt.NewNetns(t)
	for _, l := range []netlink.Link{
		&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "a"}, PeerName: "b"}, &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br"}},
	} {
		if err := netlink.LinkAdd(l); err != nil {
			t.Fatal(err)
		}
	}
	for name, probe := range map[string]func() error{"tcx": TCX, "vxlan": VXLAN} {
		if err := probe(); err != nil {
			t.Errorf("%s: %+v", name, err)
		}
	}
	for device, want := range map[string]bool{"a": true, "br": false} {
		if got, err := NativeXDP(device); got != want || err != nil {
			t.Errorf("native XDP of %s: %v, %v, want %v", device, got, err, want)
		}
	}
	links, err := netlink.LinkList()
	if err != nil || len(links) != 4 {
		t.Errorf("%d devices after the probes (%v), want lo, a, b and br", len(links), err)
	}
}
