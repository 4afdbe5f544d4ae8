// SPDX-License-Identifier: Apache-2.0

package device

import (
	"errors"
	"fmt"
	"net"

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

	// Turns: the device may lead to another host than Remote, and is to lead there.
	Turns bool
}

// UnderlayMTU is the least MTU of the underlay, in bytes.
func (v *VXLAN) UnderlayMTU() int {
	if v.Local.To4() == nil {
		return v.GuestMTU + vxlanOverhead6
	}
	return v.GuestMTU + vxlanOverhead4
}

// CheckVXLAN returns why the device cannot be made, or one that exists is not as wanted, and behind "; " what mends
// that. made: it exists.
func CheckVXLAN(v *VXLAN) (made bool, err error) {
	under, err := netlink.LinkByName(v.Underlay)
	if err != nil {
		return false, fmt.Errorf("there is no VXLAN underlay %s: %w; name the device that has %s: ip -br addr", v.Underlay, err, v.Local)
	}
	if mtu, need := under.Attrs().MTU, v.UnderlayMTU(); mtu < need {
		return false, fmt.Errorf("VXLAN underlay %s has MTU %d, and a guest's of %d needs %d; ip link set %s mtu %d",
			v.Underlay, mtu, v.GuestMTU, need, v.Underlay, need)
	}
	old, err := netlink.LinkByName(v.Name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("VXLAN %s: %w", v.Name, err)
	}
	x, ok := old.(*netlink.Vxlan)
	switch {
	case !ok || x.VxlanId != v.ID || x.Port != v.Port || !x.SrcAddr.Equal(v.Local) || !v.Turns && !x.Group.Equal(v.Remote) || x.VtepDevIndex != under.Attrs().Index:
		return false, fmt.Errorf("device %s exists and is not the VXLAN that the configuration describes; remove it: ip link del %s", v.Name, v.Name)
	case x.MTU < v.GuestMTU:
		return false, fmt.Errorf("device %s has MTU %d, and the guest's is %d; ip link set %s mtu %d", v.Name, x.MTU, v.GuestMTU, v.Name, v.GuestMTU)
	}
	return true, nil
}

// DirectVXLAN has a device that EnsureVXLAN made lead to another host. It stays the same device, with the programs on it.
func DirectVXLAN(name string, remote net.IP) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("VXLAN %s: %w", name, err)
	}
	x, ok := l.(*netlink.Vxlan)
	if !ok {
		return fmt.Errorf("device %s exists and is not the VXLAN that the configuration describes; remove it: ip link del %s", name, name)
	}
	if x.Group.Equal(remote) {
		return nil
	}
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(x.Index)
	req.AddData(msg)
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated(x.Type()))
	data := info.AddRtAttr(nl.IFLA_INFO_DATA, nil)
	// Nothing but this: the kernel refuses a change that names the port, even as it is.
	if v4 := remote.To4(); v4 != nil {
		data.AddRtAttr(nl.IFLA_VXLAN_GROUP, v4)
	} else {
		data.AddRtAttr(nl.IFLA_VXLAN_GROUP6, remote.To16())
	}
	req.AddData(info)
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return fmt.Errorf("have VXLAN %s lead to %s: %w", name, remote, err)
	}
	return nil
}

// EnsureVXLAN makes the device, or accepts an existing one that is as wanted, and returns
// its name.
func EnsureVXLAN(v VXLAN) (string, error) {
	if made, err := CheckVXLAN(&v); err != nil {
		return v.Name, err
	} else if made {
		return v.Name, DirectVXLAN(v.Name, v.Remote)
	}
	under, err := netlink.LinkByName(v.Underlay)
	if err != nil {
		return "", fmt.Errorf("VXLAN underlay %s: %w", v.Underlay, err)
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
