// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/compare"
)

// Verdicts of a tcx program.
const (
	tcxNext = -1
	tcxPass = 0
	tcxDrop = 2
)

// foreign attaches a program that is not ours and does nothing but give a verdict. It
// returns the program's id and a function that detaches it.
func foreign(t testing.TB, dev string, at ebpf.AttachType, where link.Anchor, verdict int32) (ebpf.ProgramID, func()) {
	t.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "foreign", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, verdict), asm.Return()},
	})
	check(t, err)
	info, err := prog.Info()
	check(t, err)
	id, _ := info.ID()
	l, err := link.AttachTCX(link.TCXOptions{Interface: linkOf(t, dev).Attrs().Index, Program: prog, Attach: at, Anchor: where})
	check(t, errors.Join(err, prog.Close()))
	return id, func() {
		t.Helper()
		check(t, l.Close())
	}
}

func wantOrder(t testing.TB, n *NIC, intruder string, tap bool) {
	t.Helper()
	got, onTap, err := n.CheckOrder()
	if got != intruder || onTap != tap || err != nil {
		t.Errorf("order: %q, at the tap: %v, %v; want %q, %v", got, onTap, err, intruder, tap)
	}
}

func TestCheckOrder(t *testing.T) {
	h := newHosts(t)
	wantOrder(t, h.p, "", false)
	wantOrder(t, h.s, "", false)

	for _, c := range []struct {
		n         *NIC
		ours, dev string
		at        ebpf.AttachType
		tap       bool
	}{
		{h.p, "ls_pri_out", "tapP", ebpf.AttachTCXIngress, true},
		{h.p, "ls_mirror", "tapP", ebpf.AttachTCXEgress, true},
		{h.p, "ls_digest_rx", "peerP", ebpf.AttachTCXIngress, false},
		{h.s, "ls_sec_gate", "tapS", ebpf.AttachTCXEgress, true},
		{h.s, "ls_sec_out", "tapS", ebpf.AttachTCXIngress, true},
		{h.s, "ls_sec_in", "peerS", ebpf.AttachTCXIngress, false},
	} {
		_, leave := foreign(t, c.dev, c.at, link.Tail(), tcxNext)
		wantOrder(t, c.n, "", false)
		id, detach := foreign(t, c.dev, c.at, link.Head(), tcxNext)
		wantOrder(t, c.n, fmt.Sprintf("program foreign (id %d) is in front of %s on %s (%s)", id, c.ours, c.dev, hook(c.at)), c.tap)
		detach()
		wantOrder(t, c.n, "", false)
		leave()
	}

	// The one at the tap counts for more.
	_, away1 := foreign(t, "peerP", ebpf.AttachTCXIngress, link.Head(), tcxNext)
	_, away2 := foreign(t, "tapP", ebpf.AttachTCXEgress, link.Head(), tcxNext)
	if got, tap, err := h.p.CheckOrder(); !tap || err != nil {
		t.Errorf("order: %q, at the tap: %v, %v", got, tap, err)
	}
	away1()
	away2()

	check(t, h.s.attached[0].link.Detach())
	wantOrder(t, h.s, "ls_sec_gate is not attached to tapS any more", true)
	check(t, netlink.LinkDel(linkOf(t, "tapP")))
	if _, tap, err := h.p.CheckOrder(); err == nil || !tap {
		t.Errorf("order of a tap that is gone: %v, %v", tap, err)
	}
}

// A daemon that is out of descriptors knows who is first all the same: it does not shut
// a guest for that.
func TestOrderWithoutDescriptors(t *testing.T) {
	h := newHosts(t)
	var before unix.Rlimit
	check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &before))
	check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: before.Max}))
	intruder, tap, err := h.p.CheckOrder()
	down, up := h.p.SetTap(false), h.p.SetTap(true)
	_, none := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &before))
	if intruder != "" || tap || err != nil || down != nil || up != nil || !errors.Is(none, unix.EMFILE) {
		t.Errorf("order %q, %v, %v; tap down %v, up %v; a socket: %v", intruder, tap, err, down, up, none)
	}
}

// A firewall behind ours works on what leaves; one in front would let everything
// out, which the tap's being down prevents.
func TestForeignPrograms(t *testing.T) {
	h := newHosts(t)
	guest, client := newWire(t, "guestP"), newWire(t, "client")
	send := func(seq uint32) []byte {
		f := segment(false, 0, seq, compare.ACK|compare.PSH, nil, randomBytes(10))
		guest.send(f)
		return f
	}
	_, detach := foreign(t, "tapP", ebpf.AttachTCXIngress, link.Tail(), tcxDrop)
	send(1000)
	apply(t, h.p, release(event(t, h.p, compare.EvPVM)))
	counts(t, h.p, "released_out", 1)
	detach()

	_, detach = foreign(t, "tapP", ebpf.AttachTCXIngress, link.Head(), tcxPass)
	leaks := send(2000)
	if got := client.recv(); string(got) != string(leaks) {
		// The dropped one would have come first.
		t.Fatalf("came % x, want what the program in front let out", got)
	}
	check(t, h.p.SetTap(false))
	// Refused or lost, as the device finds out.
	_, _ = unix.Write(guest.fd, segment(false, 0, 3000, compare.ACK|compare.PSH, nil, randomBytes(10)))
	detach()
	check(t, h.p.SetTap(true))
	want := segment(false, 0, 4000, compare.ACK|compare.PSH, nil, randomBytes(10))
	var evs []compare.Event
	for deadline := time.Now().Add(patience); len(evs) == 0; {
		// Again, until the guest's end knows that the tap is up.
		_, _ = unix.Write(guest.fd, want)
		var err error
		evs, err = h.p.Poll(10*time.Millisecond, nil)
		if check(t, err); time.Now().After(deadline) {
			t.Fatal("nothing comes from the guest")
		}
	}
	apply(t, h.p, release(evs[0].Seg))
	if got := client.recv(); string(got) != string(want) {
		t.Errorf("came % x, want % x", got, want)
	}
}
