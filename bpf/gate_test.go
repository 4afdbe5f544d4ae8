// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func second(_ int, err error) error { return err }

// udpTo is a datagram for the guest, its checksum and cutting left to the device.
func (f flow) udpTo(payload []byte, kind uint8, size int) (vnet, []byte) {
	s := seg{payload: payload}
	frame, l4 := f.to(s), f.l4(s)
	udp := be.AppendUint16(nil, f.remote.Port())
	udp = be.AppendUint16(udp, f.guest.Port())
	udp = be.AppendUint16(udp, uint16(8+len(payload)))
	udp = be.AppendUint16(udp, onesSum(uint32(onesSum(onesSumWide(17+8+uint32(len(payload))),
		append(f.remote.Addr().AsSlice(), f.guest.Addr().AsSlice()...))), nil))
	frame = append(append(frame[:l4:l4], udp...), payload...)
	if f.guest.Addr().Is4() {
		be.PutUint16(frame[16:], uint16(20+8+len(payload)))
		frame[23], frame[24], frame[25] = 17, 0, 0
		be.PutUint16(frame[24:], ^onesSum(0, frame[14:34]))
	} else {
		be.PutUint16(frame[18:], uint16(8+len(payload)))
		frame[20] = 17
	}
	v := vnet{flags: unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, csumStart: uint16(l4), csumOffset: 6}
	if kind != 0 {
		v.hdrLen, v.gsoSize, v.gsoType = uint16(l4+8), uint16(size), kind
	}
	return v, frame
}

// R13: S's gate counts what it lets in as the tap does, whatever the tap's reader takes
// and whoever made the frame: else the difference of the two, which reports whether the
// SVM has read everything, would be wrong for ever.
func TestLiveGateCounts(t *testing.T) {
	const (
		tso  = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
		uso  = unix.TUN_F_USO4 | unix.TUN_F_USO6
		size = 1200
	)
	l := newLab(t)
	k := l.kit(variable("ls_mark_in", markIn))
	k.setMode(run)
	l.attach(k.LsSecGate, l.tapLink, ebpf.AttachTCXEgress)
	in := l.socket("lstap")
	l.must(unix.SetsockoptInt(in, unix.SOL_SOCKET, unix.SO_MARK, markIn))
	r := rand.New(rand.NewPCG(41, 42))
	// read takes as many frames as the gate counted, and no more come.
	read := func(name string, before counts, cut *int) {
		t.Helper()
		n := int(k.moved(before)["let_in"])
		if n == 0 {
			t.Fatalf("%s: not let in: %v", name, k.moved(before))
		}
		for range n {
			l.read(l.tap)
		}
		if b := make([]byte, 70000); !errors.Is(second(unix.Read(l.tap, b)), unix.EAGAIN) {
			t.Fatalf("%s: counted %d, and the tap has more", name, n)
		}
		if n > 1 {
			*cut++
		}
	}
	for _, c := range []struct {
		offloads, cut int // how many of the kinds below are cut up
	}{
		{0, 18}, {unix.TUN_F_CSUM, 18}, {unix.TUN_F_CSUM | unix.TUN_F_TSO4, 13}, {unix.TUN_F_CSUM | unix.TUN_F_TSO6, 13}, {tso, 8}, {tso | uso, 4},
	} {
		l.offloads(c.offloads)
		cut := 0
		for family, f := range flows {
			pay := randBytes(r, 20000)
			for _, tci := range []uint16{0, 5} {
				for _, kind := range []string{"plain", "TCP", "TCP, a byte more than a segment", "TCP, checksum whole", "UDP", "UFO", "USO"} {
					var v vnet
					var frame []byte
					s := seg{seq: 1, ack: 2, flags: ack, opts: timestamps(1, 2), payload: pay}
					switch kind {
					case "plain":
						s.payload = pay[:1000]
						frame = f.to(s)
					case "TCP":
						v, frame = f.offloaded(s, f.to(s), size)
					case "TCP, a byte more than a segment":
						s.payload = pay[:size+1]
						v, frame = f.offloaded(s, f.to(s), size)
					case "TCP, checksum whole":
						frame = f.to(s)
						v, _ = f.offloaded(s, frame, size)
						v.flags, v.csumStart, v.csumOffset = 0, 0, 0
					case "UDP":
						v, frame = f.udpTo(pay[:1000], 0, 0)
					case "UFO":
						v, frame = f.udpTo(pay, unix.VIRTIO_NET_HDR_GSO_UDP, size)
					case "USO":
						v, frame = f.udpTo(pay, unix.VIRTIO_NET_HDR_GSO_UDP_L4, size)
					}
					if tci != 0 {
						if kind == "TCP, checksum whole" {
							continue // the kernel takes none from a socket
						}
						frame = tagged(frame, tci)
						if v.hdrLen += 4; v.flags != 0 {
							v.csumStart += 4
						}
					}
					before := k.counters()
					l.write(in, v, frame)
					read(fmt.Sprintf("offloads %#x, %s, tag %d, %s", c.offloads, family, tci, kind), before, &cut)
				}
			}
		}
		if cut != c.cut {
			t.Errorf("offloads %#x: %d kinds of frames were cut up, want %d", c.offloads, cut, c.cut)
		}
	}

	// A stack's own frames carry their number of segments.
	l.offloads(0)
	f := flows["IPv4"]
	out, err := netlink.LinkByName("lsout")
	l.must(err)
	guest := net.HardwareAddr{2, 1, 1, 1, 1, 1}
	l.must(netlink.AddrAdd(out, &netlink.Addr{IPNet: &net.IPNet{IP: f.remote.Addr().AsSlice(), Mask: net.CIDRMask(32, 32)}}))
	l.must(netlink.RouteAdd(&netlink.Route{LinkIndex: out.Attrs().Index, Dst: &net.IPNet{IP: f.guest.Addr().AsSlice(), Mask: net.CIDRMask(32, 32)}, Scope: netlink.SCOPE_LINK}))
	l.must(netlink.NeighSet(&netlink.Neigh{LinkIndex: out.Attrs().Index, State: netlink.NUD_PERMANENT, IP: f.guest.Addr().AsSlice(), HardwareAddr: guest}))
	udp, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	l.must(err)
	defer unix.Close(udp)
	l.must(unix.SetsockoptInt(udp, unix.SOL_SOCKET, unix.SO_MARK, markIn))
	l.must(unix.SetsockoptInt(udp, unix.SOL_UDP, unix.UDP_SEGMENT, 1000))
	l.must(unix.Connect(udp, &unix.SockaddrInet4{Port: int(f.guest.Port()), Addr: f.guest.Addr().As4()}))
	k.expect(counts{"let_in": 20}, func() {
		if _, err := unix.Write(udp, bytes.Repeat([]byte("0123456789"), 2000)); err != nil {
			t.Fatal(err)
		}
	})
	for range 20 {
		l.read(l.tap)
	}
	l.empty(l.tap)
}
