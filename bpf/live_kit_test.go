// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
)

// What PROG_TEST_RUN cannot do goes through a live tap: GSO frames above 3700
// bytes, partial checksums, VLAN tags beside the bytes, redirects.
//
//	guest ── lstap ─┬─ bridge ── lsup│lsout (remote)
//	                └─ lspeer│lsfar (the other host)

const vnetLen = 10

// vnet is struct virtio_net_hdr.
type vnet struct {
	flags, gsoType                         uint8
	hdrLen, gsoSize, csumStart, csumOffset uint16
}

func (v vnet) bytes() []byte {
	b := []byte{v.flags, v.gsoType}
	for _, x := range []uint16{v.hdrLen, v.gsoSize, v.csumStart, v.csumOffset} {
		b = binary.NativeEndian.AppendUint16(b, x)
	}
	return b
}

func parseVnet(b []byte) vnet {
	u := binary.NativeEndian.Uint16
	return vnet{b[0], b[1], u(b[2:]), u(b[4:]), u(b[6:]), u(b[8:])}
}

// lab is a namespace with devices. A test that has one must not use t.Run: the
// goroutine's thread is in the namespace.
type lab struct {
	testing.TB
	tap              int // the guest's end
	out, far         int // packet sockets
	tapLink, upLink  netlink.Link
	peerLink, farDev netlink.Link
}

func newLab(t testing.TB) *lab {
	t.Helper()
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatalf("new network namespace (root needed): %v", err)
	}
	t.Cleanup(func() {
		ns.Close()
		if err := netns.Set(home); err != nil {
			t.Error(err) // the thread stays locked and ends with its goroutine
			return
		}
		home.Close()
		runtime.UnlockOSThread()
	})
	l := &lab{TB: t}
	for _, conf := range []string{"all", "default"} { // no ND of the host's own
		err := os.WriteFile("/proc/sys/net/ipv6/conf/"+conf+"/disable_ipv6", []byte("1"), 0)
		l.must(err)
	}

	l.tap, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	l.must(err)
	t.Cleanup(func() { unix.Close(l.tap) })
	ifr, err := unix.NewIfreq("lstap")
	l.must(err)
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	l.must(unix.IoctlIfreq(l.tap, unix.TUNSETIFF, ifr))
	l.offloads(unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6)
	for _, name := range [][2]string{{"lspeer", "lsfar"}, {"lsup", "lsout"}} {
		l.must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name[0]}, PeerName: name[1]}))
	}
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "lsbr"}, MulticastSnooping: new(bool)} // no reports of its own
	l.must(netlink.LinkAdd(bridge))
	for name, dev := range map[string]*netlink.Link{"lstap": &l.tapLink, "lsup": &l.upLink, "lspeer": &l.peerLink, "lsfar": &l.farDev, "lsout": nil, "lsbr": nil} {
		d, err := netlink.LinkByName(name)
		l.must(err)
		if dev != nil {
			*dev = d
		}
		if name == "lstap" || name == "lsup" {
			l.must(netlink.LinkSetMaster(d, bridge))
		}
		l.must(netlink.LinkSetUp(d))
	}
	l.out, l.far = l.socket("lsout"), l.socket("lsfar")
	return l
}

func (l *lab) must(err error) {
	l.Helper()
	if err != nil {
		l.Fatal(err)
	}
}

// offloads tells the tap what its reader, the guest, can take.
func (l *lab) offloads(features int) {
	l.Helper()
	l.must(unix.IoctlSetInt(l.tap, unix.TUNSETOFFLOAD, features))
}

// socket opens a packet socket with vnet headers on a device.
func (l *lab) socket(dev string) int {
	l.Helper()
	d, err := netlink.LinkByName(dev)
	l.must(err)
	const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, all)
	l.must(err)
	l.Cleanup(func() { unix.Close(fd) })
	l.must(unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1))
	l.must(unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1))
	l.must(unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1))
	l.must(unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: d.Attrs().Index}))
	return fd
}

func (l *lab) attach(prog *ebpf.Program, dev netlink.Link, where ebpf.AttachType) {
	l.Helper()
	at, err := link.AttachTCX(link.TCXOptions{Interface: dev.Attrs().Index, Program: prog, Attach: where})
	l.must(err)
	l.Cleanup(func() { at.Close() })
}

// kit loads the programs for the lab's devices.
func (l *lab) kit(tune ...func(*ebpf.CollectionSpec)) *kit {
	l.Helper()
	k := newKit(l.TB, append(tune, variable("ls_tap", uint32(l.tapLink.Attrs().Index)), variable("ls_peer", uint32(l.peerLink.Attrs().Index)))...)
	k.live = true
	return k
}

// jumbo lets the peer link carry frames of any sample's size.
func (l *lab) jumbo() {
	l.Helper()
	l.must(netlink.LinkSetMTU(l.peerLink, 9000))
	l.must(netlink.LinkSetMTU(l.farDev, 9000))
}

// write gives a frame to a socket or to the tap as its guest.
func (l *lab) write(fd int, v vnet, frame []byte) {
	l.Helper()
	if _, err := unix.Write(fd, append(v.bytes(), frame...)); err != nil {
		l.Fatalf("write %d bytes: %v", len(frame), err)
	}
}

// read takes the next frame from a socket or the tap.
func (l *lab) read(fd int) (vnet, []byte) {
	l.Helper()
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for deadline := time.Now().Add(5 * time.Second); ; {
		n, err := unix.Poll(fds, int(time.Until(deadline).Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		l.must(err)
		if n == 0 {
			l.Fatal("no frame came")
		}
		break
	}
	b := make([]byte, 70000)
	n, err := unix.Read(fd, b)
	l.must(err)
	return parseVnet(b), b[vnetLen:n]
}

// empty fails when a frame waits.
func (l *lab) empty(fd int) {
	l.Helper()
	b := make([]byte, 70000)
	if n, err := unix.Read(fd, b); err != unix.EAGAIN {
		l.Errorf("unexpected frame (%v): % x", err, b[:max(n, 0)])
	}
}

// offloaded leaves the checksum of a frame of f to the device, and its cutting
// into segments of gso bytes, 0 for no cutting.
func (f flow) offloaded(s seg, frame []byte, gso int) (vnet, []byte) {
	l4, b := f.l4(s), bytes.Clone(frame)
	be.PutUint16(b[l4+16:], onesSum(pseudo(f.guest.Addr(), f.remote.Addr(), 20+len(s.opts)+len(s.payload)), nil))
	v := vnet{flags: unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, csumStart: uint16(l4), csumOffset: 16}
	if gso > 0 {
		v.hdrLen, v.gsoSize, v.gsoType = uint16(l4+20+len(s.opts)), uint16(gso), unix.VIRTIO_NET_HDR_GSO_TCPV4
		if f.guest.Addr().Is6() {
			v.gsoType = unix.VIRTIO_NET_HDR_GSO_TCPV6
		}
	}
	return v, b
}

// tagged puts an 802.1Q tag into a frame's bytes.
func tagged(frame []byte, tci uint16) []byte {
	b := append(bytes.Clone(frame[:12]), 0x81, 0)
	return append(be.AppendUint16(b, tci), frame[12:]...)
}

// liveEvent takes the only event, fails unless its offload fields are v's.
func (l *lab) liveEvent(k *kit, want *bpf.LockstepLsEv, v vnet) *bpf.LockstepLsEv {
	l.Helper()
	ev := one[*bpf.LockstepLsEv](k)
	want.Slot, want.GsoSize, want.CsumStart, want.CsumOffset = ev.Slot, v.gsoSize, v.csumStart, v.csumOffset
	if v.flags != 0 {
		want.Flags |= uint8(bpf.LockstepLsEvFlagLS_EV_PARTIAL)
	}
	k.same(ev, want)
	return ev
}
