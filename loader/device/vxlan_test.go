// SPDX-License-Identifier: Apache-2.0

package device

import (
	"errors"
	"net"
	"testing"

	"github.com/vishvananda/netlink"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

func TestEnsureVXLAN(t *testing.T) {
	lt.NewNetns(t)
	check(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "under", MTU: 1500}, PeerName: "far"}))
	v := VXLAN{
		Name: "vx", ID: 77, Port: 4790, Local: net.IPv4(192, 0, 2, 1), Remote: net.IPv4(192, 0, 2, 2), Underlay: "under", GuestMTU: 1450,
	}
	for _, c := range []struct {
		local, remote net.IP
		mtu           int
		fix           string
	}{
		{v.Local, v.Remote, 1451, "ip link set under mtu 1501"},
		{net.ParseIP("fd00::1"), net.ParseIP("fd00::2"), 1431, "ip link set under mtu 1501"},
	} {
		small := v
		small.Local, small.Remote, small.GuestMTU = c.local, c.remote, c.mtu
		_, err := EnsureVXLAN(small)
		wantError(t, err, "under has MTU 1500", c.fix)
	}
	if _, err := netlink.LinkByName("vx"); !errors.As(err, new(netlink.LinkNotFoundError)) {
		t.Errorf("a refused device was made: %v", err)
	}
	for range 2 { // the second time it is there already
		name, err := EnsureVXLAN(v)
		check(t, err)
		if mtu := linkOf(t, "vx").Attrs().MTU; name != "vx" || mtu != 1450 {
			t.Errorf("device %s with MTU %d", name, mtu)
		}
	}
	other := v
	other.ID++
	_, err := EnsureVXLAN(other)
	wantError(t, err, "ip link del vx")
	other = v
	other.Underlay = "none"
	_, err = EnsureVXLAN(other)
	wantError(t, err, "underlay none")
	// One that turns is the same device, with all but its other end as it was.
	was := linkOf(t, "vx").(*netlink.Vxlan)
	other = v
	other.Remote = net.IPv4(192, 0, 2, 3)
	_, err = EnsureVXLAN(other)
	wantError(t, err, "ip link del vx")
	other.Turns = true
	for range 2 {
		_, err = EnsureVXLAN(other)
		check(t, err)
	}
	now := linkOf(t, "vx").(*netlink.Vxlan)
	if !now.Group.Equal(other.Remote) || now.Index != was.Index || !now.SrcAddr.Equal(was.SrcAddr) || now.Port != was.Port || now.VxlanId != was.VxlanId || now.Learning != was.Learning {
		t.Errorf("it was %+v and is %+v", was, now)
	}
	wantError(t, DirectVXLAN("under", v.Remote), "is not the VXLAN")
	for range 2 {
		check(t, RemoveVXLAN("vx"))
	}
	if _, err := netlink.LinkByName("vx"); err == nil {
		t.Error("the device is still there")
	}
}
