// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"testing"

	"github.com/vishvananda/netlink"
)

// The probes find on this kernel what the other tests use, and leave nothing.
func TestProbes(t *testing.T) {
	newNetns(t)
	veth(t, "a", "b")
	check(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br"}}))
	for name, probe := range map[string]func() error{"tcx": CheckTCX, "programs": CheckPrograms, "vxlan": CheckVXLAN} {
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
	check(t, err)
	if len(links) != 4 {
		t.Errorf("%d devices after the probes, want lo, a, b and br", len(links))
	}
}
