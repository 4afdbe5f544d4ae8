// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/loader/device"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// watchName has this program be a stranger that reads the frames of the first device
// named, and has a packet socket on each of the others.
const watchName = "LOCKSTEP_TEST_WATCH"

func TestMain(m *testing.M) {
	if devices := os.Getenv(watchName); devices != "" {
		beWatcher(strings.Split(devices, ","))
		return
	}
	os.Exit(m.Run())
}

func beWatcher(devices []string) {
	protocol := uint16(unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8)
	for _, name := range devices {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		ifindex := 0
		if l, linkErr := netlink.LinkByName(name); linkErr == nil {
			ifindex = l.Attrs().Index
		} else if name != "any" {
			err = linkErr
		}
		if err := errors.Join(err, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: ifindex})); err != nil {
			fmt.Println(err)
			return
		}
		protocol = 0
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
}

// watch starts a stranger and returns how it is named, and what ends it.
func watch(t testing.TB, devices string) (name string, end func()) {
	t.Helper()
	self, err := os.Executable()
	check(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), watchName+"="+devices)
	in, err := cmd.StdinPipe()
	check(t, err)
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	end = func() {
		in.Close()
		cmd.Wait()
	}
	t.Cleanup(end)
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("a stranger on %s: %q, %v", devices, line, err)
	}
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cmd.Process.Pid))
	check(t, err)
	return fmt.Sprintf("process %d (%s)", cmd.Process.Pid, strings.TrimSpace(string(comm))), end
}

// Whoever reads the tap in front of lockstep's programs and can pass frames on is named
// apart from who only reads, and from what reads elsewhere.
func TestPacketSockets(t *testing.T) {
	h := newHosts(t)
	for _, c := range []struct {
		devices, passOn string
		n               *NIC
		tap             string
	}{
		{"tapP", "", h.p, "tapP"},
		{"any", "", h.p, "tapP"},
		{"tapP,client", "another packet socket", h.p, "tapP"},
		{"any,client", "another packet socket", h.s, "tapS"},
		{"tapS,tapP", "another packet socket", h.s, "tapS"},
	} {
		name, end := watch(t, c.devices)
		want := ""
		if c.passOn != "" {
			want = fmt.Sprintf("%s reads every frame of %s in front of lockstep's programs (a packet socket), and can pass them on (%s): take %[2]s out of it, and put it into a bridge", name, c.tap, c.passOn)
		}
		wantOrder(t, c.n, want, want != "")
		passOn, read, err := InFront(c.tap)
		if want != "" && (len(passOn) != 1 || passOn[0] != want || len(read) != 0) || want == "" && (len(passOn) != 0 || len(read) != 1 || !strings.HasPrefix(read[0], name)) || err != nil {
			t.Errorf("%s: in front: %q, %q, %v", c.devices, passOn, read, err)
		}
		end()
		wantOrder(t, c.n, "", false)
	}
	// What reads elsewhere sees nothing that has not been released.
	_, end := watch(t, "client,tapP")
	wantOrder(t, h.p, "", false)
	end()
}

// What such a socket reads is what lockstep has not released. With the tap down, as the
// daemon sets it, there is nothing to read.
func TestPacketSocketSeesUnreleased(t *testing.T) {
	h := newHosts(t)
	guest, client, stranger := newWire(t, "guestP"), newWire(t, "client"), newWire(t, "tapP")
	f := segment(false, 0, 1000, compare.ACK|compare.PSH, nil, randomBytes(10))
	guest.send(f)
	if got := stranger.recv(); string(got) != string(f) {
		t.Fatalf("the stranger reads % x, want what the guest has just sent", got)
	}
	apply(t, h.p, release(event(t, h.p, compare.EvPVM)))
	if got := client.recv(); string(got) != string(f) {
		t.Errorf("came % x, want % x", got, f)
	}
	// This process has sockets on other devices, too.
	if intruder, tap, err := h.p.CheckOrder(); !strings.Contains(intruder, "can pass them on (another packet socket)") || !tap || err != nil {
		t.Errorf("order: %q, %v, %v", intruder, tap, err)
	}
	check(t, h.p.SetTap(false))
	_, _ = unix.Write(guest.fd, segment(false, 0, 2000, compare.ACK|compare.PSH, nil, randomBytes(10)))
	check(t, unix.SetNonblock(stranger.fd, true))
	if n, err := unix.Read(stranger.fd, make([]byte, 2000)); !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.ENETDOWN) {
		t.Errorf("with the tap down the stranger reads %d bytes, %v", n, err)
	}
}

// TestMutationPacketSocket: were packet sockets not looked at, such a socket would read on
// what has not been released.
func TestMutationPacketSocket(t *testing.T) {
	h := newHosts(t)
	h.p.noWatch = true
	guest, stranger := newWire(t, "guestP"), newWire(t, "tapP")
	wantOrder(t, h.p, "", false)
	f := segment(false, 0, 1000, compare.ACK|compare.PSH, nil, randomBytes(10))
	guest.send(f)
	if got := stranger.recv(); string(got) != string(f) {
		t.Errorf("the stranger reads % x, want what the guest has just sent", got)
	}
}

// XDP on the tap sees frames before tcx does, and can send them anywhere.
func TestForeignXDP(t *testing.T) {
	h := newHosts(t)
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "foreign", Type: ebpf.XDP, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}, // XDP_PASS
	})
	check(t, err)
	defer prog.Close()
	info, err := prog.Info()
	check(t, err)
	id, _ := info.ID()
	for _, flags := range []link.XDPAttachFlags{link.XDPGenericMode, link.XDPDriverMode} {
		for _, c := range []struct {
			n   *NIC
			tap string
		}{{h.p, "tapP"}, {h.s, "tapS"}} {
			l, err := link.AttachXDP(link.XDPOptions{Program: prog, Interface: linkOf(t, c.tap).Attrs().Index, Flags: flags})
			check(t, err)
			want := fmt.Sprintf("XDP program foreign (id %d) is in front of lockstep's on %s: ip link set %[2]s xdp off", id, c.tap)
			wantOrder(t, c.n, want, true)
			if passOn, _, err := InFront(c.tap); len(passOn) != 1 || passOn[0] != want || err != nil {
				t.Errorf("in front: %q, %v", passOn, err)
			}
			check(t, l.Close())
			wantOrder(t, c.n, "", false)
		}
	}
}

// Devices by which a guest's frames do not come in are refused by name.
func TestCheckTap(t *testing.T) {
	lt.NewNetns(t)
	veth(t, "tap0", "guest0")
	check(t, device.CheckTap("tap0"))
	below := linkOf(t, "tap0").Attrs().Index
	for _, l := range []netlink.Link{
		&netlink.Macvtap{Macvlan: netlink.Macvlan{LinkAttrs: netlink.LinkAttrs{Name: "mv0", ParentIndex: below}, Mode: netlink.MACVLAN_MODE_BRIDGE}},
		&netlink.Macvlan{LinkAttrs: netlink.LinkAttrs{Name: "mv1", ParentIndex: below}, Mode: netlink.MACVLAN_MODE_BRIDGE},
	} {
		check(t, netlink.LinkAdd(l))
		err := device.CheckTap(l.Attrs().Name)
		if err == nil || !strings.Contains(err.Error(), "is a "+l.Type()+": ") || !strings.Contains(err.Error(), "give the guest a tap in a bridge") {
			t.Errorf("%s: %v", l.Type(), err)
		}
		if _, err := Open(Options{Tap: l.Attrs().Name, PeerDevice: "tap0"}); err == nil || !strings.Contains(err.Error(), l.Type()) {
			t.Errorf("open on a %s: %v", l.Type(), err)
		}
	}
	if err := device.CheckTap("none"); err == nil {
		t.Error("no device is a tap")
	}
}
