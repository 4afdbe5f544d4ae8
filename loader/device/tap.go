// SPDX-License-Identifier: Apache-2.0

// Package device makes, prepares and checks the network devices that lockstep works on:
// the guests' taps and the peer devices. It knows nothing of the programs on them.
package device

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// tapAlias marks taps that EnsureTap made.
const tapAlias = "made by lockstep"

// TapMTU is the MTU of a tap that EnsureTap makes.
const TapMTU = 1500

// NoTap is what to do about a tap that is missing.
func NoTap(name string, queues int) string {
	return fmt.Sprintf("make it first, with `%s`, or name the bridge that it is to be in: then lockstep makes it", makeTap(name, queues))
}

func makeTap(name string, queues int) string {
	order := fmt.Sprintf("ip tuntap add dev %s mode tap", name)
	if queues > 1 {
		order += " multi_queue"
	}
	return order
}

// NoPeer is what to do about a peer device that is missing.
const NoPeer = "make it first, or have lockstep make a VXLAN: peer: {vxlan: {...}}"

// CheckBridge returns why a tap cannot be put into the bridge, and behind "; " what mends that.
func CheckBridge(name string) error {
	_, err := bridgeOf(name)
	return err
}

func bridgeOf(name string) (netlink.Link, error) {
	br, err := netlink.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("there is no bridge %s: %w; make it: ip link add %[1]s type bridge", name, err)
	}
	if br.Type() != "bridge" {
		return nil, fmt.Errorf("%s is a %s, not a bridge; name a bridge, or leave the tap to whoever makes it", name, br.Type())
	}
	return br, nil
}

// EnsureTap makes a persistent tap for a QEMU that opens so many queues, if there is none of the name, and
// puts it into the bridge. It does not set it up: the guest must not transmit before the programs are
// attached.
func EnsureTap(name, bridge string, queues int) error {
	br, err := bridgeOf(bridge)
	if err != nil {
		return err
	}
	tap, err := netlink.LinkByName(name)
	if err == nil && tap.Attrs().Alias == tapAlias && checkQueues(tap, queues) != nil { // the config had another number
		if err := RemoveTap(name); err != nil {
			return err
		}
		tap, err = netlink.LinkByName(name)
	}
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		made := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TAP}
		if queues > 1 {
			made.Flags = netlink.TUNTAP_MULTI_QUEUE_DEFAULTS
		}
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

// CheckQueues returns why a QEMU cannot open so many queues of a tap, and behind "; " what mends that. What EnsureTap
// mends, where there is a bridge, is no error.
func CheckQueues(name, bridge string, queues int) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("tap %s: %w", name, err)
	}
	if bridge != "" && l.Attrs().Alias == tapAlias {
		if used, err := TapInUse(name); !used || err != nil {
			return err
		}
	}
	return checkQueues(l, queues)
}

// checkQueues: the kernel takes a tap either for one queue or for several (tun_set_iff).
func checkQueues(l netlink.Link, queues int) error {
	name := l.Attrs().Name
	tap, ok := l.(*netlink.Tuntap)
	if many := ok && tap.Flags&netlink.TUNTAP_MULTI_QUEUE != 0; !ok || many == (queues > 1) {
		return nil
	} else if many {
		return fmt.Errorf("tap %s was made for several queues, and QEMU is to open one; make it with `%s`, or give the NIC queues", name, makeTap(name, queues))
	}
	return fmt.Errorf("tap %s was made for one queue, and QEMU is to open %d; make it with `%s`", name, queues, makeTap(name, queues))
}

// TapInUse reports whether a process, a QEMU, has the tap open. A device that is no tap
// or does not exist is not in use.
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

// carrier is the driver's carrier state, whether the device is up or down; the flag
// LOWER_UP would depend on that. The kernel gives a tap its carrier when a process opens
// it, and takes it away when the last one closes it.
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
	return false, fmt.Errorf("carrier of %s: the kernel does not report it", l.Attrs().Name)
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

// CheckTap refuses a device to which lockstep's programs cannot be attached, because the
// guest's output does not arrive there.
func CheckTap(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("tap %s: %w", name, err)
	}
	const instead = "give the guest a tap in a bridge: nics: [{tap: NAME, bridge: NAME}]"
	switch kind := l.Type(); kind {
	case "macvtap", "macvlan", "ipvtap", "ipvlan":
		return fmt.Errorf("tap %s is a %s: the guest's output goes straight to the card below it, past lockstep's programs; %s", name, kind, instead)
	}
	at := "/sys/class/net/" + name
	if _, err := os.Stat(at + "/device/physfn"); err == nil {
		return fmt.Errorf("tap %s is an SR-IOV virtual function: a guest that has it transmits past the host's kernel; %s", name, instead)
	}
	if _, err := os.Stat(at + "/device"); err == nil {
		return fmt.Errorf("tap %s is a card of this host, not the guest's tap; %s", name, instead)
	}
	return nil
}

// SetDown sets a guest's tap down.
func SetDown(tap netlink.Link) error {
	if err := netlink.LinkSetDown(tap); err != nil {
		return fmt.Errorf("set the guest's tap %s down: %w", tap.Attrs().Name, err)
	}
	return nil
}

// Mute sets a tap down, so that its guest cannot transmit, whatever is attached to it. No
// such tap is no error.
func Mute(tap string) error {
	l, err := netlink.LinkByName(tap)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("tap %s: %w", tap, err)
	}
	return SetDown(l)
}
