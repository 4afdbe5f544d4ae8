// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netns"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestNS: devices are where they were asked for, and the caller is where it was.
func TestNS(t *testing.T) {
	lt.NeedRoot(t)
	var ns [2]*NS
	for i := range ns {
		n, err := NewNS()
		if err != nil {
			t.Fatal(err)
		}
		defer n.Close()
		ns[i] = n
	}
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	tap := func() error {
		f, err := ns[0].Tap("tap0")
		if err == nil {
			t.Cleanup(func() { f.Close() })
		}
		return err
	}
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 9}
	if err := errors.Join(ns[0].Veth("a", ns[1], "b"), ns[0].Bridge("br0"), ns[0].Enslave("a", "br0"), tap(),
		ns[1].MAC("b", mac), ns[1].Addr("b", net.IPv4(10, 0, 0, 1)), ns[1].Neighbour("b", net.IPv4(10, 0, 0, 2), mac)); err != nil {
		t.Fatal(err)
	}
	for i, names := range []string{"a br0 tap0", "b"} {
		for name := range strings.FieldsSeq(names) {
			if _, err := ns[i].Device(name); err != nil {
				t.Error(err)
			}
			if _, err := ns[1-i].Device(name); err == nil {
				t.Errorf("%s is in the other namespace", name)
			}
			if _, err := net.InterfaceByName(name); err == nil && name != "br0" {
				t.Errorf("%s is in the caller's namespace", name)
			}
		}
	}
	failed := errors.New("f failed")
	if err := ns[0].Do(func() error { return failed }); !errors.Is(err, failed) {
		t.Errorf("Do returns %v, want what its function did", err)
	}
	if now, err := netns.Get(); err != nil || !now.Equal(home) {
		t.Errorf("the caller is in %v, was in %v (%v)", now, home, err)
	} else {
		now.Close()
	}
}

// TestProcess: its log, its usage and its end are known.
func TestProcess(t *testing.T) {
	lt.NeedRoot(t)
	n, err := NewNS()
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	p, err := n.Start(exec.Command("sh", "-c", "trap 'echo asked >&2; exit 3' TERM; echo began >&2; while :; do :; done"))
	if err != nil {
		t.Fatal(err)
	}
	lt.Eventually(t, 10*time.Second, func() (bool, string) {
		u, err := UsageOf(p.PID())
		return err == nil && u.CPU > 0 && strings.Contains(p.Log(), "began"), p.Log()
	})
	err = p.Stop()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 || !strings.Contains(err.Error(), "asked") {
		t.Errorf("it ended with %v", err)
	}
	if _, err := UsageOf(p.PID()); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("the usage of a process that has ended: %v", err)
	}
}

// TestChardev: frames come whole, however the socket cuts them, and none is no error.
func TestChardev(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := DialChardev(t.Context(), path, func() string { return "" })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	qemu, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer qemu.Close()
	none := func() {
		t.Helper()
		if f, err := c.Receive(time.Millisecond); err != nil || f != nil {
			t.Errorf("%q, %v, though half of a frame came", f, err)
		}
	}
	for _, part := range []string{"\x00\x00", "\x00\x03on", "e\x00\x00\x00\x03two\x00\x00\x00\x05thr"} {
		none()
		if _, err := qemu.Write([]byte(part)); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []string{"one", "two"} {
		if f, err := c.Receive(time.Minute); err != nil || string(f) != want {
			t.Errorf("%q, %v; want %q", f, err, want)
		}
	}
	none()
	if err := c.Send([]byte("four")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 8)
	if _, err := io.ReadFull(qemu, got); err != nil || string(got) != "\x00\x00\x00\x04four" {
		t.Errorf("QEMU got %q, %v", got, err)
	}
}

// TestPairThatFails: what was made for a pair that does not come up is taken away again.
func TestPairThatFails(t *testing.T) {
	lt.NeedRoot(t)
	n, err := NewNS()
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	dir := t.TempDir()
	const text = "vm: x\nnodes:\n  alpha: {control: \"127.0.0.1:1\", nics: [{tap: a, peer: {device: pa}}]}\n  beta: {control: \"127.0.0.2:1\", nics: [{tap: b, peer: {device: pb}}]}\n" + PairConfig
	if _, err := StartPair(t.Context(), dir, "/bin/false", text, n, n); err == nil || !strings.Contains(err.Error(), "it ended") {
		t.Errorf("daemons that end at once: %v", err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), dir) {
		t.Errorf("a bpffs is left behind (%v)", err)
	}
}

// TestMapMemory: what a map takes is counted once, however often it is open.
func TestMapMemory(t *testing.T) {
	lt.NeedRoot(t)
	before, err := MapMemory(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 1 << 10, MaxEntries: 1 << 10})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	again, err := m.Clone()
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	after, err := MapMemory(os.Getpid())
	if more := after - before; err != nil || more < 1<<20 || more > 3<<19 {
		t.Errorf("a map of 1 MiB takes %d bytes (%v)", more, err)
	}
	if own, err := Resident(os.Getpid()); err != nil || own < 1<<20 {
		t.Errorf("this process has %d bytes (%v)", own, err)
	}
}
