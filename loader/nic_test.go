// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/datapath"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// attached are the names of the tcx programs on a device, ingress before egress.
func attached(t testing.TB, name string) []string {
	t.Helper()
	var names []string
	for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
		q, err := link.QueryPrograms(link.QueryOptions{Target: linkOf(t, name).Attrs().Index, Attach: at})
		check(t, err)
		for _, p := range q.Programs {
			prog, err := ebpf.NewProgramFromID(p.ID)
			check(t, err)
			info, err := prog.Info()
			check(t, errors.Join(err, prog.Close()))
			names = append(names, info.Name)
		}
	}
	return names
}

func wantAttached(t testing.TB, name string, want ...string) {
	t.Helper()
	if got := attached(t, name); !slices.Equal(got, want) {
		t.Errorf("attached to %s: %v, want %v", name, got, want)
	}
}

// wantError fails unless err contains all of words.
func wantError(t testing.TB, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want one with %q", words)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not contain %q", err, w)
		}
	}
}

func entries(t testing.TB, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	check(t, err)
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

func up(t testing.TB, name string) bool {
	t.Helper()
	return linkOf(t, name).Attrs().Flags&net.FlagUp != 0
}

func TestOpenPrimary(t *testing.T) {
	devices(t)
	pins := mountBPFFS(t)
	o := options(pins, "a.lab", Primary)
	first, err := Open(o)
	check(t, err)
	want := []datapath.Program{
		{Name: "ls_pri_out", Device: "tapP", Attach: "tcx-ingress"},
		{Name: "ls_digest_rx", Device: "peerP", Attach: "tcx-ingress"},
		{Name: "ls_mirror", Device: "tapP", Attach: "tcx-egress"},
	}
	if got := first.Programs(); !slices.Equal(got, want) {
		t.Errorf("programs %v, want %v", got, want)
	}
	guards := func() {
		t.Helper()
		wantAttached(t, "tapP", "ls_pri_out", "ls_mirror")
		wantAttached(t, "peerP", "ls_digest_rx")
		if got := entries(t, nodeDir(pins, o.VM, o.Node)); !slices.Equal(got, []string{"nic0"}) {
			t.Errorf("pins %v, want nic0 alone", got)
		}
	}
	guards()

	// Another node's programs on the same tap, or another VM's: refused, nothing changes.
	other := o
	other.Node = "c"
	_, err = Open(other)
	wantError(t, err, "tapP", "already managed", "lockstep unload")
	other = o
	other.VM = "two"
	_, err = Open(other)
	wantError(t, err, "already managed")
	guards()

	// A daemon that ended leaves its programs; the next one replaces them.
	check(t, first.SetMode(datapath.ModeHold))
	check(t, first.Close())
	guards()
	second, err := Open(o)
	check(t, err)
	guards()
	if second.conf.Mode != uint32(datapath.ModeShut) {
		t.Errorf("opened in mode %d, not shut", second.conf.Mode)
	}
	check(t, second.Close())

	// One that ended while it put its pins in place is replaced as well.
	dir := nicDir(pins, o.VM, o.Node, 0)
	check(t, os.Rename(string(dir), string(dir.staging())))
	third, err := Open(o)
	check(t, err)
	guards()
	check(t, third.Close())
	for _, suffix := range []string{"-new", "-left"} {
		check(t, os.Mkdir(string(dir)+suffix, 0o700))
	}
	fourth, err := Open(o)
	check(t, err)
	guards()
	check(t, fourth.Close())

	check(t, Unload(pins, o.VM, o.Node, false))
	wantAttached(t, "tapP")
	wantAttached(t, "peerP")
	if _, err := os.Stat(nodeDir(pins, o.VM, o.Node)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("pins are left: %v", err)
	}
	if up(t, "tapP") {
		t.Error("the primary's tap is still up")
	}
}

func TestOpenRefuses(t *testing.T) {
	devices(t)
	pins := mountBPFFS(t)
	o := options(pins, "a", Primary)
	o.Tap = "none"
	_, err := Open(o)
	wantError(t, err, "tap none")
	o = options(pins, "a", Primary)
	o.PeerDevice = "none"
	_, err = Open(o)
	wantError(t, err, "peer device none")
	o = options(pins, "a", Primary)
	check(t, netlink.LinkSetMTU(linkOf(t, "peerP"), 1400))
	_, err = Open(o)
	wantError(t, err, "peerP", "1400", "ip link set peerP mtu 1500")
	wantAttached(t, "tapP")

	// Pins outside of a bpffs fail; nothing stays attached.
	check(t, netlink.LinkSetMTU(linkOf(t, "peerP"), 1500))
	o.PinDir = t.TempDir()
	_, err = Open(o)
	wantError(t, err, "pin map")
	wantAttached(t, "tapP")
	wantAttached(t, "peerP")
}

func TestPeerDevicePrepared(t *testing.T) {
	h := newHosts(t)
	for _, name := range []string{"peerP", "peerS"} {
		a := linkOf(t, name).Attrs()
		if a.RawFlags&unix.IFF_NOARP == 0 || a.Promisc == 0 || a.Flags&net.FlagUp == 0 {
			t.Errorf("%s: flags %v, promiscuity %d", name, a.Flags, a.Promisc)
		}
	}
	if got, want := h.p.MAC().String(), linkOf(t, "peerP").Attrs().HardwareAddr.String(); got != want {
		t.Errorf("MAC %s, want %s", got, want)
	}
}

func TestUnloadSecondary(t *testing.T) {
	devices(t)
	pins := mountBPFFS(t)
	o := options(pins, "b.lab", Secondary)
	n, err := Open(o)
	check(t, err)
	wantAttached(t, "tapS", "ls_sec_out", "ls_sec_gate")
	wantAttached(t, "peerS", "ls_sec_in")
	check(t, n.SetLeaseUntil(math.MaxInt64))
	check(t, n.Close())

	release, err := Lock(pins, o.VM, o.Node)
	check(t, err)
	if err := Unload(pins, o.VM, o.Node, true); !errors.Is(err, ErrLocked) {
		t.Errorf("unload while a daemon lives: %v", err)
	}
	wantAttached(t, "tapS", "ls_sec_out", "ls_sec_gate")
	release()

	check(t, Unload(pins, o.VM, o.Node, false))
	if up(t, "tapS") {
		t.Error("the secondary's tap is still up")
	}
	wantAttached(t, "tapS")
	wantAttached(t, "peerS")
	if got := entries(t, filepath.Join(pins, pinName.Replace(o.VM))); len(got) != 0 {
		t.Errorf("pins are left: %v", got)
	}
	// Nothing to unload is no error.
	check(t, Unload(pins, o.VM, o.Node, false))
}

func TestLock(t *testing.T) {
	dir := t.TempDir()
	release, err := Lock(dir, "vm.one", "a")
	check(t, err)
	if _, err := Lock(dir, "vm.one", "a"); !errors.Is(err, ErrLocked) {
		t.Errorf("second lock: %v", err)
	}
	// Names that would fall together if a dot were just replaced do not.
	for _, other := range [][2]string{{"vm.one", "b"}, {"vm%2eone", "a"}, {"vm-one", "a"}} {
		also, err := Lock(dir, other[0], other[1])
		if err != nil {
			t.Errorf("lock of %s: %v", other, err)
			continue
		}
		also()
	}
	release()
	release, err = Lock(dir, "vm.one", "a")
	check(t, err)
	release()
}

func TestCheckBPFFS(t *testing.T) {
	plain := t.TempDir()
	for _, dir := range []string{plain, filepath.Join(plain, "not", "there")} {
		wantError(t, CheckBPFFS(dir), dir, "not on a bpffs", "mount -t bpf bpf "+filepath.Dir(dir))
	}
	if got := mountBPF("/sys/fs/bpf/lockstep"); got != "mount -t bpf bpf /sys/fs/bpf" {
		t.Errorf("the usual one is mounted by %s", got)
	}
	lt.NeedRoot(t)
	pins := mountBPFFS(t)
	for _, dir := range []string{pins, filepath.Join(pins, "lockstep", "deeper")} {
		if err := CheckBPFFS(dir); err != nil {
			t.Error(err)
		}
	}
}

// All programs load with the smallest maps.
func TestCheckPrograms(t *testing.T) {
	lt.NeedRoot(t)
	if err := CheckPrograms(); err != nil {
		t.Errorf("%+v", err)
	}
}
