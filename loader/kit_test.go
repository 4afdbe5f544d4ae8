// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader/core"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// patience is how long a test waits for what must come.
const patience = 5 * time.Second

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mountBPFFS returns a folder that is a bpffs.
func mountBPFFS(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	check(t, unix.Mount("bpf", dir, "bpf", 0, "mode=0700"))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// veth makes a pair of devices that are up.
func veth(t testing.TB, a, b string) {
	t.Helper()
	check(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: a, MTU: 1500}, PeerName: b, PeerMTU: 1500}))
	for _, name := range []string{a, b} {
		check(t, netlink.LinkSetUp(linkOf(t, name)))
	}
}

func linkOf(t testing.TB, name string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	check(t, err)
	return l
}

// noOffload makes the kernel finish checksums and cut GSO frames before they
// enter the device.
func noOffload(t testing.TB, name string) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	defer unix.Close(fd)
	value := struct{ cmd, data uint32 }{unix.ETHTOOL_STXCSUM, 0}
	var req struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(req.name[:], name)
	req.data = unsafe.Pointer(&value)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
		t.Fatalf("switch checksum offload of %s off: %v", name, errno)
	}
}

// wire sends and receives whole frames on a device.
type wire struct {
	testing.TB
	fd int
}

func newWire(t testing.TB, name string) *wire {
	t.Helper()
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	check(t, unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1))
	check(t, unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1))
	check(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(patience / time.Second)}))
	all := uint16(unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8)
	check(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: linkOf(t, name).Attrs().Index}))
	return &wire{t, fd}
}

func (w *wire) send(frame []byte) {
	w.Helper()
	if _, err := unix.Write(w.fd, frame); err != nil {
		w.Fatal(err)
	}
}

// recv returns the next frame of the test, with the tag that the kernel took out
// of it. Frames of others are passed over.
func (w *wire) recv() []byte {
	w.Helper()
	buf, oob := make([]byte, 1<<16), make([]byte, 256)
	n, oobn, _, _, err := unix.Recvmsg(w.fd, buf, oob, 0)
	if err != nil {
		w.Fatalf("no frame came: %v", err)
	}
	frame := buf[:n]
	if n < 12 || !bytes.Equal(frame[6:12], macA) {
		return w.recv()
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	check(w, err)
	for _, m := range msgs {
		// struct tpacket_auxdata: status, len, snaplen; mac, net, vlan_tci, vlan_tpid.
		if m.Header.Type == unix.PACKET_AUXDATA && binary.NativeEndian.Uint32(m.Data)&unix.TP_STATUS_VLAN_VALID != 0 {
			tagged := binary.BigEndian.AppendUint16(bytes.Clone(frame[:12]), core.EthVLAN)
			tagged = binary.BigEndian.AppendUint16(tagged, binary.NativeEndian.Uint16(m.Data[16:]))
			frame = append(tagged, frame[12:]...)
		}
	}
	return frame
}

// hosts are a primary and a secondary whose peer devices are a veth pair. tapP
// is a port of a bridge; "client" is the far end of another port. guestP and
// guestS are the guests' ends of the taps.
type hosts struct {
	testing.TB
	pins string
	p, s *NIC
	at   map[*NIC]datapath.Session
	dead map[*NIC]bool
}

func options(pins, node string, role Role) Options {
	o := Options{
		PinDir: pins, VM: "vm.one", Node: node, Role: role, Tap: "tapP", PeerDevice: "peerP",
		MaxConnections: 64, Slots: 8, GSOSlots: 2, Log: slog.New(slog.DiscardHandler),
	}
	if role == Secondary {
		o.Tap, o.PeerDevice = "tapS", "peerS"
	}
	return o
}

func devices(t testing.TB) {
	t.Helper()
	lt.NewNetns(t)
	veth(t, "tapP", "guestP")
	veth(t, "tapS", "guestS")
	veth(t, "peerP", "peerS")
	veth(t, "up", "client")
	noOffload(t, "up")
	snoop := false // with it, the bridge sends IGMP at any time
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br"}, MulticastSnooping: &snoop}
	check(t, netlink.LinkAdd(bridge))
	check(t, netlink.LinkSetUp(bridge))
	for _, port := range []string{"tapP", "up"} {
		check(t, netlink.LinkSetMaster(linkOf(t, port), bridge))
	}
}

func newHosts(t testing.TB) *hosts {
	t.Helper()
	devices(t)
	return openHosts(t)
}

// openHosts makes the hosts of devices that are there.
func openHosts(t testing.TB) *hosts {
	t.Helper()
	h := &hosts{TB: t, pins: mountBPFFS(t), dead: make(map[*NIC]bool)}
	h.p, h.s = h.open(options(h.pins, "a.lab", Primary)), h.open(options(h.pins, "b.lab", Secondary))
	keys, err := compare.NewKeys(rand.NewChaCha8([32]byte{1}))
	check(t, err)
	k1, k2 := [2]uint64{1, 2}, [2]uint64{3, 4}
	h.at = map[*NIC]datapath.Session{
		h.p: {Term: 7, Epoch: 40, PeerMAC: h.s.MAC(), TxKey: k1, RxKey: k2, Digest: *keys},
		h.s: {Term: 7, Epoch: 40, PeerMAC: h.p.MAC(), TxKey: k2, RxKey: k1, Digest: *keys},
	}
	for n, s := range h.at {
		check(t, n.InstallSession(s))
		check(t, n.SetLeaseUntil(math.MaxInt64))
	}
	check(t, h.p.SetMode(datapath.ModeHold))
	check(t, h.s.SetMode(datapath.ModeRun))
	return h
}

func (h *hosts) open(o Options) *NIC {
	h.Helper()
	n, err := Open(o)
	check(h, err)
	h.Cleanup(func() {
		if !h.dead[n] {
			h.die(n)
		}
	})
	return n
}

// die is what becomes of a NIC when its daemon does.
func (h *hosts) die(n *NIC) {
	h.Helper()
	h.dead[n] = true
	if err := n.Close(); err != nil {
		h.Error(err)
	}
}

// event polls for one event of the kind.
func event(t testing.TB, n *NIC, kind compare.EventKind) compare.Segment {
	t.Helper()
	evs, err := n.Poll(patience, nil)
	check(t, err)
	if len(evs) != 1 || evs[0].Kind != kind {
		t.Fatalf("events %+v, want one of kind %d", evs, kind)
	}
	return evs[0].Seg
}

// counts waits until the counter has reached want.
func counts(t testing.TB, n *NIC, name string, want uint64) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; runtime.Gosched() {
		c, err := n.Counters()
		check(t, err)
		if c[name] == want {
			return
		}
		if c[name] > want || time.Now().After(deadline) {
			t.Fatalf("%s is %d, want %d; %v", name, c[name], want, c)
		}
	}
}

// addr is an IPv4 address as tuples have it.
func addr(a, b, c, d byte) (out [16]byte) {
	copy(out[:], net.IPv4(a, b, c, d).To16())
	return out
}
