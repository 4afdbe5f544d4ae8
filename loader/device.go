// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// vxlanOverhead is what VXLAN adds to a guest's frame: outer Ethernet (not
// counted in the underlay's MTU), IP, UDP, VXLAN, and the inner Ethernet header.
const (
	vxlanOverhead4 = 20 + 8 + 8 + 14
	vxlanOverhead6 = 40 + 8 + 8 + 14
)

// VXLAN describes a peer device that lockstep makes itself.
type VXLAN struct {
	Name          string
	ID            int
	Port          int
	Local, Remote net.IP
	Underlay      string
	GuestMTU      int // bytes of IP packet the guest's NIC may send
}

// UnderlayMTU is the least MTU of the underlay, in bytes.
func (v *VXLAN) UnderlayMTU() int {
	if v.Local.To4() == nil {
		return v.GuestMTU + vxlanOverhead6
	}
	return v.GuestMTU + vxlanOverhead4
}

// EnsureVXLAN makes the device, or takes an existing one that is exactly as
// wanted, and returns its name.
func EnsureVXLAN(v VXLAN) (string, error) {
	under, err := netlink.LinkByName(v.Underlay)
	if err != nil {
		return "", fmt.Errorf("vxlan underlay %s: %w", v.Underlay, err)
	}
	if mtu, need := under.Attrs().MTU, v.UnderlayMTU(); mtu < need {
		return "", fmt.Errorf("vxlan underlay %s has MTU %d, a guest MTU of %d needs %d: ip link set %s mtu %d",
			v.Underlay, mtu, v.GuestMTU, need, v.Underlay, need)
	}
	want := &netlink.Vxlan{
		LinkAttrs:    netlink.LinkAttrs{Name: v.Name, MTU: v.GuestMTU},
		VxlanId:      v.ID,
		VtepDevIndex: under.Attrs().Index,
		SrcAddr:      v.Local,
		Group:        v.Remote,
		Port:         v.Port,
		Learning:     false,
	}
	if old, err := netlink.LinkByName(v.Name); err == nil {
		x, ok := old.(*netlink.Vxlan)
		if !ok || x.VxlanId != v.ID || x.Port != v.Port || !x.SrcAddr.Equal(v.Local) || !x.Group.Equal(v.Remote) || x.VtepDevIndex != want.VtepDevIndex {
			return "", fmt.Errorf("device %s exists and is not the VXLAN that the configuration describes; remove it: ip link del %s", v.Name, v.Name)
		}
		return v.Name, nil
	}
	if err := netlink.LinkAdd(want); err != nil {
		return "", fmt.Errorf("create vxlan %s: %w", v.Name, err)
	}
	return v.Name, nil
}

// RemoveVXLAN removes a device EnsureVXLAN made; none is no error.
func RemoveVXLAN(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			return nil
		}
		return fmt.Errorf("remove vxlan %s: %w", name, err)
	}
	if l.Type() != "vxlan" {
		return fmt.Errorf("remove vxlan %s: it is a %s, which lockstep did not make", name, l.Type())
	}
	if err := netlink.LinkDel(l); err != nil {
		return fmt.Errorf("remove vxlan %s: %w", name, err)
	}
	return nil
}

// tapAlias marks taps that EnsureTap made.
const tapAlias = "made by lockstep"

// EnsureTap makes a tap that outlives who uses it, where there is none, and puts it into
// the bridge. It does not set it up: who is behind it must not be heard before the
// programs are in their place ([datapath.NIC].SetTap).
func EnsureTap(name, bridge string) error {
	br, err := netlink.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("there is no bridge %s: %w; make it: ip link add %[1]s type bridge", bridge, err)
	}
	if br.Type() != "bridge" {
		return fmt.Errorf("%s is a %s, not a bridge", bridge, br.Type())
	}
	tap, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		made := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TAP}
		if err := netlink.LinkAdd(made); err != nil {
			return fmt.Errorf("create tap %s: %w", name, err)
		}
		tap = made
		if err := netlink.LinkSetAlias(tap, tapAlias); err != nil {
			return fmt.Errorf("tap %s: set alias: %w", name, err)
		}
	} else if err != nil {
		return fmt.Errorf("tap %s: %w", name, err)
	}
	if tap.Attrs().MasterIndex != br.Attrs().Index {
		if err := netlink.LinkSetMaster(tap, br); err != nil {
			return fmt.Errorf("put tap %s into bridge %s: %w", name, bridge, err)
		}
	}
	return nil
}

// TapInUse reports whether a process has the tap open: a QEMU, then. What is no tap is
// in use by nobody, and neither is what does not exist.
func TapInUse(name string) (bool, error) {
	l, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("tap %s: %w", name, err)
	}
	if _, ok := l.(*netlink.Tuntap); !ok {
		return false, nil
	}
	return carrier(l)
}

// carrier is what the driver says of the device, which has to be down for it as well as
// up: the flag LOWER_UP goes with either. The kernel gives a tap its carrier when
// somebody opens it, and takes it when the last one closes it.
func carrier(l netlink.Link) (bool, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(l.Attrs().Index)
	req.AddData(msg)
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil {
		return false, fmt.Errorf("carrier of %s: %w", l.Attrs().Name, err)
	}
	for _, m := range msgs {
		attrs, err := nl.ParseRouteAttr(m[unix.SizeofIfInfomsg:])
		if err != nil {
			return false, fmt.Errorf("carrier of %s: %w", l.Attrs().Name, err)
		}
		for _, a := range attrs {
			if a.Attr.Type == unix.IFLA_CARRIER && len(a.Value) == 1 {
				return a.Value[0] != 0, nil
			}
		}
	}
	return false, fmt.Errorf("carrier of %s: the kernel does not tell it", l.Attrs().Name)
}

// RemoveTap removes a tap that EnsureTap made and that nobody uses.
func RemoveTap(name string) error {
	l, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove tap %s: %w", name, err)
	}
	if l.Attrs().Alias != tapAlias {
		return nil
	}
	if used, err := TapInUse(name); used || err != nil {
		return err
	}
	if err := netlink.LinkDel(l); err != nil {
		return fmt.Errorf("remove tap %s: %w", name, err)
	}
	return nil
}

// preparePeer makes a device fit to be a peer link: everything on it is the
// other host's, so it takes frames for any address and this host's own stack
// stays silent on it (its neighbour discovery would reach the SVM as if a
// client had sent it).
func preparePeer(l netlink.Link) error {
	name := l.Attrs().Name
	// The device may come without IPv6; then there is nothing to silence.
	sysctl := filepath.Join("/proc/sys/net/ipv6/conf", name, "disable_ipv6")
	if err := os.WriteFile(sysctl, []byte("1"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("peer device %s: %w", name, err)
	}
	if err := netlink.SetPromiscOn(l); err != nil {
		return fmt.Errorf("peer device %s: set promiscuous: %w", name, err)
	}
	if err := netlink.LinkSetARPOff(l); err != nil {
		return fmt.Errorf("peer device %s: switch ARP off: %w", name, err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("peer device %s: set up: %w", name, err)
	}
	return nil
}
