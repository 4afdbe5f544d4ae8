// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestCheck: everything that would keep a guest from starting is reported before anything
// is started, all of it at once and by name.
func TestCheck(t *testing.T) {
	for _, tool := range []string{"qemu-system-x86_64", "qemu-img"} {
		if _, err := exec.LookPath(tool); err != nil {
			lt.Missing(t, "%v", err)
		}
	}
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	create := func(name, format, size string) {
		t.Helper()
		if _, err := qemuImg("create", "-q", "-f", format, at(name), size); err != nil {
			t.Fatal(err)
		}
	}
	create("a.qcow2", "qcow2", "8M")
	create("b.raw", "raw", "4M")
	if err := os.WriteFile(at("file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	qmp, err := net.Listen("unix", at("taken.qmp"))
	if err != nil {
		t.Fatal(err)
	}
	defer qmp.Close()

	good := func() (*Spec, *Incoming) {
		s := &Spec{
			VM: "web1", Node: "alpha",
			Guest: Guest{
				Binary: "qemu-system-x86_64", Machine: "pc", Accel: "tcg,thread=single", CPU: "qemu64", Memory: 1 << 30, SMP: 1, NICModel: "virtio-net-pci",
				Disks: []Disk{{ID: "colo-disk0", Image: at("a.qcow2"), OverlayDir: at("new")}, {ID: "d1", Image: at("b.raw"), Format: "raw", OverlayDir: dir}},
			},
			NICs: []NIC{{Tap: "lo", MAC: net.HardwareAddr{0x52, 0x54, 0, 0, 0, 1}}},
			QMP:  at("qmp"), Dir: dir,
		}
		return s, &Incoming{Migration: "tcp:127.0.0.1:0", NBD: netip.MustParseAddrPort("127.0.0.1:0")}
	}
	sizes := []int64{8 << 20, 4 << 20}

	s, in := good()
	if got, err := s.DiskSizes(); err != nil || !slices.Equal(got, sizes) {
		t.Errorf("sizes %v, %v", got, err)
	}
	for _, in := range []*Incoming{nil, in, {Migration: "unix:" + at("mig"), NBD: in.NBD}} {
		if err := s.Check(in, sizes); err != nil {
			t.Error(err)
		}
	}

	for name, tt := range map[string]struct {
		do   func(s *Spec, in *Incoming)
		peer []int64
		want []string
	}{
		"no binary":   {do: func(s *Spec, _ *Incoming) { s.Binary = "no-qemu" }, want: []string{"no-qemu", "install"}},
		"accelerator": {do: func(s *Spec, _ *Incoming) { s.Accel = "vax" }, want: []string{`no accelerator "vax"`}},
		"memory":      {do: func(s *Spec, _ *Incoming) { s.Memory = 1<<30 + 1 }, want: []string{"1073741825 bytes"}},
		"no CPU":      {do: func(s *Spec, _ *Incoming) { s.SMP = 0 }, want: []string{"CPU"}},
		"kernel":      {do: func(s *Spec, _ *Incoming) { s.Kernel = at("vmlinuz") }, want: []string{at("vmlinuz")}},
		"tap":         {do: func(s *Spec, _ *Incoming) { s.NICs[0].Tap = "no-tap" }, want: []string{"no tap no-tap"}},
		"MAC":         {do: func(s *Spec, _ *Incoming) { s.NICs[0].MAC[0] = 1 }, want: []string{"MAC"}},
		"QMP taken":   {do: func(s *Spec, _ *Incoming) { s.QMP = at("taken.qmp") }, want: []string{"answers at", "taken.qmp"}},
		"image":       {do: func(s *Spec, _ *Incoming) { s.Disks[1].Image = at("gone") }, want: []string{"disk d1", at("gone")}},
		"not qcow2":   {do: func(s *Spec, _ *Incoming) { s.Disks[1].Format = "" }, want: []string{"disk d1", "not in qcow2 format"}},
		"format":      {do: func(s *Spec, _ *Incoming) { s.Disks[1].Format = "vmdk" }, want: []string{"disk d1", "vmdk"}},
		"two of one":  {do: func(s *Spec, _ *Incoming) { s.Disks[1].ID = "colo-disk0" }, want: []string{`"colo-disk0"`}},
		"ID":          {do: func(s *Spec, _ *Incoming) { s.Disks[1].ID = "a,b" }, want: []string{`"a,b"`}},
		"overlay_dir": {do: func(s *Spec, _ *Incoming) { s.Disks[0].OverlayDir = at("file") }, want: []string{"no folder"}},
		"other size":  {peer: []int64{8 << 20, 5 << 20}, want: []string{"disk d1", "4194304", "5242880", "one size"}},
		"other count": {peer: []int64{8 << 20}, want: []string{"2 here", "1 on the other"}},
		"NBD port": {do: func(_ *Spec, in *Incoming) { in.NBD = netip.MustParseAddrPort(busy.Addr().String()) },
			want: []string{"NBD port", busy.Addr().String(), "in use"}},
		"no NBD port":      {do: func(_ *Spec, in *Incoming) { in.NBD = netip.AddrPort{} }, want: []string{"NBD port"}},
		"migration port":   {do: func(_ *Spec, in *Incoming) { in.Migration = "tcp:" + busy.Addr().String() }, want: []string{"migration port", "in use"}},
		"migration socket": {do: func(_ *Spec, in *Incoming) { in.Migration = "unix:" + at("nowhere/mig") }, want: []string{"migration socket"}},
		"migration":        {do: func(_ *Spec, in *Incoming) { in.Migration = "exec:cat" }, want: []string{`"exec:cat"`}},
		"several": {do: func(s *Spec, in *Incoming) { s.SMP = 0; s.Disks[0].Image = at("gone"); in.Migration = "x" },
			want: []string{"CPU", "colo-disk0", `"x"`}},
	} {
		t.Run(name, func(t *testing.T) {
			s, in := good()
			if tt.do != nil {
				tt.do(s, in)
			}
			peer := sizes
			if tt.peer != nil {
				peer = tt.peer
			}
			err := s.Check(in, peer)
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("no %q in: %v", want, err)
				}
			}
			t.Log(err)
		})
	}
	if _, err := os.Stat(at("new")); err == nil {
		t.Error("a check made the folder of the overlays")
	}
}

func TestBrokenCOLO(t *testing.T) {
	for version, broken := range map[string]string{ // under which accelerators
		"7.2.22": "", "8.1.0": "", "9.2.4": "", "10.0.0": "kvm tcg", "10.0.12": "kvm tcg", "10.0.13": "", "10.0.14": "",
		"10.1.0": "kvm tcg", "10.1.9": "kvm tcg", "10.2.0": "", "11.0.0": "tcg", "11.1.3": "tcg",
	} {
		for _, accel := range []string{"kvm", "tcg"} {
			if got := BrokenCOLO(ParseVersion(version), accel); (got != "") != strings.Contains(broken, accel) {
				t.Errorf("%s under %s: %q", version, accel, got)
			}
		}
	}
}

func TestVersionedMachine(t *testing.T) {
	const list = `Supported machines are:
microvm              microvm (i386)
pc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-7.2)
pc-i440fx-7.2        Standard PC (i440FX + PIIX, 1996) (default)
q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)
pc-q35-7.2           Standard PC (Q35 + ICH9, 2009)
`
	for machine, want := range map[string]string{
		"pc": "pc-i440fx-7.2", "q35,usb=off,vmport=off": "pc-q35-7.2,usb=off,vmport=off", "type=q35": "pc-q35-7.2",
		"pc-q35-5.0": "pc-q35-5.0", "microvm": "microvm", "p": "p",
	} {
		if got, known := Machine(machine, list); got != want || known != (machine != "pc-q35-5.0" && machine != "p") {
			t.Errorf("%s is %s, %v; want %s", machine, got, known, want)
		}
	}
}

func TestSameMachine(t *testing.T) {
	a := Caps{Version: "7.2.22", Machine: "pc-i440fx-7.2"}
	if err := SameMachine(a, Caps{Version: "10.0.13", Machine: "pc-i440fx-7.2"}); err != nil {
		t.Error(err)
	}
	err := SameMachine(a, Caps{Version: "10.0.13", Machine: "pc-i440fx-10.0"})
	if err == nil || !strings.Contains(err.Error(), "pc-i440fx-10.0 there (QEMU 10.0.13)") || !strings.Contains(err.Error(), "qemu.machine") {
		t.Errorf("got %v", err)
	}
}

func TestCredential(t *testing.T) {
	c, err := credential("64055:64056")
	if err != nil || c.Uid != 64055 || c.Gid != 64056 {
		t.Errorf("%+v, %v", c, err)
	}
	if c, err = credential("root"); err != nil || c.Uid != 0 || c.Gid != 0 {
		t.Errorf("%+v, %v", c, err)
	}
	// What names no user is not taken for root, whose number is 0.
	for _, name := range []string{"qemu:kvm", "1:", ":1", ":", "-1:0", "no-such-user"} {
		if c, err := credential(name); err == nil {
			t.Errorf("%s is %+v", name, c)
		}
	}
}
