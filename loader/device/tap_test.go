// SPDX-License-Identifier: Apache-2.0

package device

import (
	"net"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantError(t testing.TB, err error, words ...string) {
	t.Helper()
	for _, w := range words {
		if err == nil || !strings.Contains(err.Error(), w) {
			t.Errorf("error %v, want one with %q", err, w)
		}
	}
}

func linkOf(t testing.TB, name string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	check(t, err)
	return l
}

// QEMU opens as many queues as the config says, and the kernel lets it only where the tap was made for
// several. A tap of lockstep's own is made anew, unless it is in use.
func TestQueues(t *testing.T) {
	lt.NewNetns(t)
	check(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}))
	open := func(flags uint16) (int, error) {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR, 0)
		check(t, err)
		ifr, err := unix.NewIfreq("tap0")
		check(t, err)
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | flags)
		return fd, unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	for _, queues := range []int{1, 4, 1} {
		check(t, EnsureTap("tap0", "br0", queues))
		check(t, CheckQueues("tap0", "", queues))
		wantError(t, CheckQueues("tap0", "", 5-queues), "; make it with `ip tuntap add dev tap0 mode tap")
		check(t, CheckQueues("tap0", "br0", 5-queues)) // lockstep makes it anew
		var fds []int
		for range queues {
			fd, err := open(map[bool]uint16{true: unix.IFF_MULTI_QUEUE}[queues > 1])
			check(t, err)
			fds = append(fds, fd)
		}
		fd, err := open(map[bool]uint16{true: unix.IFF_MULTI_QUEUE}[queues == 1])
		if err == nil {
			t.Errorf("a tap for %d queues is opened for another number", queues)
		}
		check(t, unix.Close(fd))
		wantError(t, CheckQueues("tap0", "br0", 5-queues), "tap tap0 was made for")
		check(t, EnsureTap("tap0", "br0", 5-queues)) // it is left as it is: the QEMU that has it goes on
		for _, fd := range fds {
			check(t, unix.Close(fd))
		}
	}
}

// A tap of lockstep's own is made once, and goes when nobody uses it; one of somebody
// else's stays.
func TestTap(t *testing.T) {
	lt.NewNetns(t)
	wantError(t, EnsureTap("tap0", "br0", 1), "there is no bridge br0")
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
	check(t, netlink.LinkAdd(br))
	wantError(t, EnsureTap("tap0", "lo", 1), "not a bridge")
	for range 2 {
		check(t, EnsureTap("tap0", "br0", 1))
	}
	tap, err := netlink.LinkByName("tap0")
	check(t, err)
	if a := tap.Attrs(); tap.Type() != "tuntap" && tap.Type() != "tun" || a.MasterIndex != br.Attrs().Index || linkOf(t, "tap0").Attrs().Flags&net.FlagUp != 0 {
		t.Errorf("made a %s: %+v", tap.Type(), a)
	}
	// QEMU has it open.
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR, 0)
	check(t, err)
	ifr, err := unix.NewIfreq("tap0")
	check(t, err)
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	check(t, unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr))
	used := func(want bool) {
		t.Helper()
		if used, err := TapInUse("tap0"); used != want || err != nil {
			t.Errorf("in use: %v, %v", used, err)
		}
	}
	for _, set := range []func(netlink.Link) error{netlink.LinkSetDown, netlink.LinkSetUp, netlink.LinkSetDown} {
		check(t, set(tap))
		used(true)
		check(t, RemoveTap("tap0"))
		if _, err := netlink.LinkByName("tap0"); err != nil {
			t.Fatal("a tap that is in use is gone")
		}
	}
	check(t, unix.Close(fd))
	used(false)
	check(t, RemoveTap("tap0"))
	if _, err := netlink.LinkByName("tap0"); err == nil {
		t.Error("it is still there")
	}
	check(t, RemoveTap("tap0"))
	other := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tap1"}, Mode: netlink.TUNTAP_MODE_TAP}
	check(t, netlink.LinkAdd(other))
	check(t, EnsureTap("tap1", "br0", 1))
	wantError(t, CheckQueues("tap1", "br0", 4), "made for one queue", "; make it with `ip tuntap add dev tap1 mode tap multi_queue`")
	check(t, RemoveTap("tap1"))
	if _, err := netlink.LinkByName("tap1"); err != nil {
		t.Error("somebody else's tap is gone")
	}
}
