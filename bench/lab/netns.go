// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// NS is a network namespace without a name: nothing of it is left when this process and
// those that run in it are gone, however they ended. There is no IPv6, so nothing is sent
// unasked.
type NS struct {
	ns   netns.NsHandle
	link *netlink.Handle
}

// NewNS makes a namespace, which only root may.
func NewNS() (n *NS, err error) {
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		return nil, fmt.Errorf("look up this network namespace: %w", err)
	}
	defer home.Close()
	n = new(NS)
	if n.ns, err = netns.New(); err != nil {
		runtime.UnlockOSThread()
		return nil, fmt.Errorf("make a network namespace (run this as root): %w", err)
	}
	for _, which := range []string{"all", "default"} {
		e := os.WriteFile("/proc/sys/net/ipv6/conf/"+which+"/disable_ipv6", []byte("1"), 0)
		if e != nil && !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, fmt.Errorf("turn IPv6 off: %w", e))
		}
	}
	if back := netns.Set(home); back != nil { // the thread stays locked, so it ends with the goroutine
		return nil, errors.Join(err, fmt.Errorf("go back to this process's network namespace: %w", back))
	}
	runtime.UnlockOSThread()
	if err == nil {
		n.link, err = netlink.NewHandleAt(n.ns, unix.NETLINK_ROUTE)
	}
	if err == nil {
		err = n.Up("lo")
	}
	if err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// Close lets go of the namespace.
func (n *NS) Close() {
	if n.link != nil {
		n.link.Close()
	}
	n.ns.Close()
}

// Path is where other processes find the namespace, as long as this one lives and has not closed it.
func (n *NS) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.ns) }

// Do runs f in the namespace. Sockets, devices and processes that f makes stay there.
func (n *NS) Do(f func() error) error {
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("look up this network namespace: %w", err)
	}
	defer home.Close()
	if err := netns.Set(n.ns); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter a network namespace: %w", err)
	}
	err = f()
	if back := netns.Set(home); back != nil { // as in NewNS
		return errors.Join(err, fmt.Errorf("go back to this process's network namespace: %w", back))
	}
	runtime.UnlockOSThread()
	return err
}

// Veth joins two namespaces by a pair of devices, which are up.
func (n *NS) Veth(name string, other *NS, otherName string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: otherName, PeerNamespace: netlink.NsFd(other.ns)}
	if err := n.link.LinkAdd(veth); err != nil {
		return fmt.Errorf("make the devices %s and %s: %w", name, otherName, err)
	}
	return errors.Join(n.Up(name), other.Up(otherName))
}

// Tap makes a tap without vnet headers, which is up as long as the file is open in some process.
func (n *NS) Tap(name string) (f *os.File, err error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	tap := &netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_NO_PI, Queues: 1, NonPersist: true}
	if err := n.Do(func() error { return netlink.LinkAdd(tap) }); err != nil {
		return nil, fmt.Errorf("make the tap %s: %w", name, err)
	}
	return tap.Fds[0], n.Up(name)
}

// Bridge makes a bridge, which is up.
func (n *NS) Bridge(name string) error {
	attrs, snooping := netlink.NewLinkAttrs(), false
	attrs.Name = name
	if err := n.link.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}); err != nil {
		return fmt.Errorf("make the bridge %s: %w", name, err)
	}
	return n.Up(name)
}

// change does something to a device.
func (n *NS) change(name, what string, f func(netlink.Link) error) error {
	l, err := n.link.LinkByName(name)
	if err == nil {
		err = f(l)
	}
	if err != nil {
		return fmt.Errorf("%s the device %s: %w", what, name, err)
	}
	return nil
}

// Up sets a device up.
func (n *NS) Up(name string) error { return n.change(name, "set up", n.link.LinkSetUp) }

// Enslave puts a device into a bridge.
func (n *NS) Enslave(name, bridge string) error {
	return n.change(bridge, "look up", func(b netlink.Link) error {
		return n.change(name, "put into "+bridge, func(l netlink.Link) error { return n.link.LinkSetMaster(l, b) })
	})
}

// MAC sets a device's hardware address.
func (n *NS) MAC(name string, mac net.HardwareAddr) error {
	return n.change(name, "set the MAC of", func(l netlink.Link) error { return n.link.LinkSetHardwareAddr(l, mac) })
}

// Addr gives a device an IPv4 address of a /24.
func (n *NS) Addr(name string, ip net.IP) error {
	return n.change(name, "give "+ip.String()+" to", func(l netlink.Link) error {
		return n.link.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: net.CIDRMask(24, 32)}})
	})
}

// Neighbour adds a permanent neighbour entry, so that nobody has to ask for it.
func (n *NS) Neighbour(name string, ip net.IP, mac net.HardwareAddr) error {
	return n.change(name, "add a neighbour to", func(l netlink.Link) error {
		return n.link.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, State: netlink.NUD_PERMANENT, IP: ip, HardwareAddr: mac})
	})
}

// Sysctl sets a setting of the namespace, as "net/ipv4/tcp_timestamps".
func (n *NS) Sysctl(name, value string) error {
	return n.Do(func() error {
		if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
		return nil
	})
}

// Device looks up a device with its counters.
func (n *NS) Device(name string) (attrs *netlink.LinkAttrs, err error) {
	err = n.change(name, "look up", func(l netlink.Link) error {
		attrs = l.Attrs()
		return nil
	})
	return attrs, err
}
