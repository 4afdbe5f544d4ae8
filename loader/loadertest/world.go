// SPDX-License-Identifier: Apache-2.0

// Package loadertest makes the surroundings that tests of the data path need:
// two hosts, two guests and a client as network namespaces, a skew on the
// secondary guest's link, and a bad peer link.
package loadertest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Addresses of a World.
const (
	Guest4, Guest6   = "10.77.0.2", "fd77::2"
	Client4, Client6 = "10.77.0.1", "fd77::1"
	ClientMAC        = "02:00:00:00:77:01"
	GuestMAC         = "02:00:00:00:77:02"
)

// ClientAddrs4 are the client's IPv4 addresses: one alone runs out of ports.
var ClientAddrs4 = []string{Client4, "10.77.0.11", "10.77.0.12", "10.77.0.13"}

// World is one test's namespaces: a client, the two hosts with their bridges,
// and the two guests with the same addresses.
type World struct {
	Client, HostP, HostS, PVM, SVM string // namespace names
	Mid                            string // the namespace between the hosts' peer devices, if any
	Switch                         string // the namespace between hosts and client, of NewHosts
	Dir                            string // for files
	Pins                           string // a bpffs
	Skew                           *Skew
	Impair                         *Impair // of an Impaired world

	id string
}

// Peer is how the hosts reach each other.
type Peer int

// Kinds of peer link.
const (
	Veth           Peer = iota // devices peerP, peerS
	VXLAN                      // underlay devices underP, underS with 198.51.100.1, .2
	Impaired                   // devices peerP, peerS with a namespace between them
	Jumbo                      // as Veth; every device takes 9000 bytes
	Reachable                  // as Veth; the client reaches both hosts
	JumboReachable             // as both
)

var worlds atomic.Int32

// NewWorld makes a World that is gone with the test. It needs root.
func NewWorld(t testing.TB, peer Peer) *World {
	t.Helper()
	w := newWorld(t)
	w.namespaces(t, w.PVM, w.SVM)
	link := func(a, nsA, b, nsB string) { w.link(t, a, nsA, b, nsB) }
	for _, host := range []string{w.HostP, w.HostS} {
		w.bridge(t, host)
	}
	link("vc", w.HostP, "eth0", w.Client)
	link("tapP", w.HostP, "eth0", w.PVM)
	link("tapS", w.HostS, "eth0", w.SVM)
	link("ctl", w.HostP, "ctl", w.HostS)
	w.ip(t, w.HostP, "link set vc master br0")
	w.ip(t, w.HostP, "link set tapP master br0")
	w.ip(t, w.HostS, "link set tapS master br0")
	w.ip(t, w.HostP, "addr add 192.0.2.1/24 dev ctl")
	w.ip(t, w.HostS, "addr add 192.0.2.2/24 dev ctl")
	switch peer {
	case Veth, Jumbo, Reachable, JumboReachable:
		link("peerP", w.HostP, "peerS", w.HostS)
	case Impaired:
		w.Mid = w.id + "m"
		Run(t, "ip", "netns", "add", w.Mid)
		t.Cleanup(func() { Run(t, "ip", "netns", "del", w.Mid) })
		// It has no voice of its own.
		Run(t, "nsenter", "--net=/run/netns/"+w.Mid, "sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
		link("peerP", w.HostP, MidP, w.Mid)
		link("peerS", w.HostS, MidS, w.Mid)
		link(slowP, w.Mid, slowS, w.Mid)
		for _, dev := range []string{MidP, MidS, slowP, slowS} {
			w.ip(t, w.Mid, "link set "+dev+" mtu 9100")
		}
		// As a NIC does: what is lost is segments, not 64 KiB at once.
		Run(t, "nsenter", "--net=/run/netns/"+w.HostP, "ethtool", "-K", "peerP", "tso", "off", "gso", "off")
		w.Impair = addImpair(t, w.Mid)
	case VXLAN:
		link("underP", w.HostP, "underS", w.HostS)
		w.ip(t, w.HostP, "link set underP mtu 1600")
		w.ip(t, w.HostS, "link set underS mtu 1600")
		w.ip(t, w.HostP, "addr add 198.51.100.1/24 dev underP")
		w.ip(t, w.HostS, "addr add 198.51.100.2/24 dev underS")
	}
	w.client(t)
	for _, guest := range []string{w.PVM, w.SVM} {
		w.ip(t, guest, "link set eth0 down") // or the link-local address is of another MAC
		w.ip(t, guest, "link set eth0 address "+GuestMAC+" up")
		w.ip(t, guest, "addr add "+Guest4+"/24 dev eth0")
		w.ip(t, guest, "addr add "+Guest6+"/64 dev eth0 nodad")
	}
	// Real pairs share neighbour entries by their checkpoints.
	for _, a := range append([]string{Client6}, ClientAddrs4...) {
		w.ip(t, w.SVM, "neigh replace "+a+" lladdr "+ClientMAC+" dev eth0 nud permanent")
	}
	if peer == Jumbo || peer == JumboReachable {
		for ns, devices := range map[string]string{
			w.Client: "eth0", w.HostP: "vc tapP peerP br0", w.HostS: "tapS peerS br0", w.PVM: "eth0", w.SVM: "eth0",
		} {
			for dev := range strings.FieldsSeq(devices) {
				w.ip(t, ns, "link set "+dev+" mtu 9000")
			}
		}
	}
	w.pins(t)
	w.Skew = AddSkew(t, w.SVM, "eth0")
	if peer == Reachable || peer == JumboReachable {
		link("toS", w.HostP, "toP", w.HostS)
		w.ip(t, w.HostP, "link set toS master br0")
		w.ip(t, w.HostS, "link set toP master br0")
	}
	if peer == JumboReachable {
		w.ip(t, w.HostP, "link set toS mtu 9000")
		w.ip(t, w.HostS, "link set toP mtu 9000")
	}
	return w
}

// NewHosts makes a World for QEMU guests: hosts with a bridge each, and a switch to
// which both and the client are connected, portP and portS. The switch's
// namespace has the address 198.51.100.9, the hosts .1 and .2. There are no PVM and SVM.
func NewHosts(t testing.TB) *World {
	t.Helper()
	w := newWorld(t)
	w.Switch = w.id + "n"
	w.namespaces(t, w.Switch)
	w.bridge(t, w.Switch)
	w.link(t, "vc", w.Switch, "eth0", w.Client)
	w.ip(t, w.Switch, "link set vc master br0")
	for host, side := range map[string]string{w.HostP: "P", w.HostS: "S"} {
		w.bridge(t, host)
		w.link(t, "port"+side, w.Switch, "uplink", host)
		w.ip(t, w.Switch, "link set port"+side+" master br0")
		w.ip(t, host, "link set uplink master br0")
	}
	w.ip(t, w.HostP, "addr add 198.51.100.1/24 dev br0")
	w.ip(t, w.HostS, "addr add 198.51.100.2/24 dev br0")
	w.ip(t, w.Switch, "addr add 198.51.100.9/24 dev br0")
	w.link(t, "ctl", w.HostP, "ctl", w.HostS)
	w.ip(t, w.HostP, "addr add 192.0.2.1/24 dev ctl")
	w.ip(t, w.HostS, "addr add 192.0.2.2/24 dev ctl")
	w.link(t, "peerP", w.HostP, "peerS", w.HostS)
	w.client(t)
	w.pins(t)
	return w
}

// Underlay is the device by which the hosts of a World with AddSpare reach each other, besides the bridge.
const Underlay = "under"

// AddSpare gives a World of NewHosts a third host, connected to the switch by portT, and all hosts and the switch a
// second network, with devices of 1600 bytes: 203.0.113.1 and .2 are the hosts', .3 the new one's, .9 the switch's.
// It returns the host's namespace.
func (w *World) AddSpare(t testing.TB) (host string) {
	t.Helper()
	host = w.id + "t"
	w.namespaces(t, host)
	w.bridge(t, host)
	w.link(t, "portT", w.Switch, "uplink", host)
	w.ip(t, w.Switch, "link set portT master br0")
	w.ip(t, host, "link set uplink master br0")
	w.ip(t, w.Switch, "link add br1 type bridge mcast_snooping 0")
	w.ip(t, w.Switch, "link set br1 up")
	for i, ns := range []string{w.HostP, w.HostS, host} {
		port := fmt.Sprint("under", i)
		w.link(t, port, w.Switch, Underlay, ns)
		w.ip(t, w.Switch, "link set "+port+" mtu 1600 master br1")
		w.ip(t, ns, "link set "+Underlay+" mtu 1600")
		w.ip(t, ns, fmt.Sprintf("addr add 203.0.113.%d/24 dev %s", i+1, Underlay))
	}
	w.ip(t, w.Switch, "addr add 203.0.113.9/24 dev br1")
	return host
}

// newWorld has the client's and the hosts' namespaces.
func newWorld(t testing.TB) *World {
	t.Helper()
	id := fmt.Sprintf("ls%x-%d", os.Getpid(), worlds.Add(1))
	w := &World{id: id, Client: id + "c", HostP: id + "p", HostS: id + "s", PVM: id + "g", SVM: id + "h", Dir: t.TempDir()}
	w.namespaces(t, w.Client, w.HostP, w.HostS)
	return w
}

func (w *World) namespaces(t testing.TB, names ...string) {
	t.Helper()
	for _, ns := range names {
		Run(t, "ip", "netns", "add", ns)
		t.Cleanup(func() { Run(t, "ip", "netns", "del", ns) })
		w.ip(t, ns, "link set lo up")
		Run(t, "nsenter", "--net=/run/netns/"+ns, "sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0",
			"net.ipv6.conf.default.router_solicitations=0", "net.ipv6.conf.default.accept_ra=0")
	}
}

func (w *World) link(t testing.TB, a, nsA, b, nsB string) {
	t.Helper()
	Run(t, "ip", "link", "add", a, "netns", nsA, "type", "veth", "peer", "name", b, "netns", nsB)
	w.ip(t, nsA, "link set "+a+" up")
	w.ip(t, nsB, "link set "+b+" up")
}

func (w *World) bridge(t testing.TB, ns string) {
	t.Helper()
	w.ip(t, ns, "link add br0 type bridge mcast_snooping 0")
	w.ip(t, ns, "link set br0 up")
}

// client gives the client its addresses.
func (w *World) client(t testing.TB) {
	t.Helper()
	w.ip(t, w.Client, "link set eth0 address "+ClientMAC)
	for _, a := range ClientAddrs4 {
		w.ip(t, w.Client, "addr add "+a+"/24 dev eth0")
	}
	w.ip(t, w.Client, "addr add "+Client6+"/64 dev eth0 nodad")
}

// pins mounts a bpffs.
func (w *World) pins(t testing.TB) {
	t.Helper()
	w.Pins = filepath.Join(w.Dir, "bpf")
	if err := os.Mkdir(w.Pins, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("bpf", w.Pins, "bpf", 0, ""); err != nil {
		t.Fatalf("mount bpffs: %v", err)
	}
	t.Cleanup(func() {
		if left, _ := filepath.Glob(filepath.Join(w.Pins, "*/*/*")); len(left) > 0 {
			t.Errorf("pins left behind: %v", left)
		}
		if err := unix.Unmount(w.Pins, 0); err != nil {
			t.Errorf("unmount bpffs: %v", err)
		}
	})
}

// SetLink sets a device of namespace ns up or down.
func (w *World) SetLink(t testing.TB, ns, device string, up bool) {
	t.Helper()
	w.ip(t, ns, "link set "+device+map[bool]string{true: " up", false: " down"}[up])
}

func (w *World) ip(t testing.TB, ns, args string) {
	t.Helper()
	Run(t, "ip", append([]string{"-n", ns}, strings.Fields(args)...)...)
}

// SegmentDifferently makes the SVM cut its output in other places than the PVM.
func (w *World) SegmentDifferently(t testing.TB) {
	t.Helper()
	w.ip(t, w.SVM, "link set eth0 gso_max_size 9000")
	for _, subnet := range []string{"10.77.0.0/24", "fd77::/64"} {
		w.ip(t, w.SVM, "route replace "+subnet+" dev eth0 proto kernel mtu lock 1280 advmss "+map[bool]string{true: "1460", false: "1440"}[strings.Contains(subnet, ".")])
	}
}

// Run runs a command and fails the test with its output when it fails.
func Run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// In runs f with its goroutine's thread in namespace ns. Sockets that f makes
// stay there.
func In(t testing.TB, ns string, f func()) {
	t.Helper()
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	target, err := netns.GetFromName(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	if err := netns.Set(target); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := netns.Set(home); err != nil {
			panic(err) // the thread stays in a namespace that is not its own
		}
		runtime.UnlockOSThread()
	}()
	f()
}

// NewNetns puts the test's thread into a network namespace of its own. The thread is
// never unlocked, so it ends with the test, and the namespace with it. There is no IPv6:
// no device transmits unasked. It needs root.
func NewNetns(t testing.TB) {
	t.Helper()
	NeedRoot(t)
	runtime.LockOSThread()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	if err := ns.Close(); err != nil {
		t.Fatal(err)
	}
	for _, which := range []string{"all", "default"} {
		err := os.WriteFile("/proc/sys/net/ipv6/conf/"+which+"/disable_ipv6", []byte("1"), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
}

// Index is a device's number in namespace ns.
func Index(t testing.TB, ns, device string) (index int) {
	t.Helper()
	In(t, ns, func() {
		dev, err := net.InterfaceByName(device)
		if err != nil {
			t.Fatalf("%s in %s: %v", device, ns, err)
		}
		index = dev.Index
	})
	return index
}

// Command is a command in namespace ns. Not `ip netns exec`, which hides the
// bpffs behind a mount namespace of its own.
func Command(ns, name string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=/run/netns/" + ns, name}, args...)...)
}

// Eventually waits until cond holds and fails the test, with what it says, when
// it does not within limit.
func Eventually(t testing.TB, limit time.Duration, cond func() (ok bool, state string)) {
	t.Helper()
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, state := cond()
		if ok {
			return
		}
		select {
		case <-deadline.C:
			t.Fatalf("not within %v: %s", limit, state)
		case <-tick.C:
		}
	}
}

// FillUp makes a file that leaves no room in its file system.
func FillUp(t testing.TB, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for b := make([]byte, 64<<10); len(b) > 0; {
		if _, err := f.Write(b); err != nil {
			b = b[:len(b)/2]
		}
	}
}

// OneCPU keeps the test, and what is done for the frames that it sends, on one CPU until it ends.
func OneCPU(t testing.TB) {
	t.Helper()
	runtime.LockOSThread()
	var home, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &home); err != nil {
		t.Fatal(err)
	}
	for cpu := 0; one.Count() == 0; cpu++ {
		if home.IsSet(cpu) {
			one.Set(cpu)
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.SchedSetaffinity(0, &home); err != nil {
			t.Error(err)
			return // the thread ends with the goroutine
		}
		runtime.UnlockOSThread()
	})
}
