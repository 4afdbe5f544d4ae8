// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/qmp"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

func TestCheckExtra(t *testing.T) {
	for line, want := range map[string]string{
		"-display none -serial file:x":                        "",
		"-device virtio-rng-pci -device virtio-net-pci,id=e9": "",
		"-nic none":                                        "",
		"-netdev vhost-user,id=n,chardev=c":                "0 -netdev vhost-user: another process",
		"-display none -netdev vhost-vdpa,x=y":             "2 -netdev vhost-vdpa: another process",
		"--netdev user,id=n":                               "0 --netdev user: what the guest sends there does not pass lockstep",
		"-nic tap,ifname=t":                                "0 -nic tap: a tap that is not under nics",
		`-netdev {"id":"n","type":"stream"}`:               "0 -netdev stream: ",
		"-net socket,listen=:1":                            "0 -net socket: ",
		"-device vfio-pci,host=01:10.0":                    "0 -device vfio-pci: a device of the host",
		"-device driver=vfio-pci-nohotplug":                "0 -device vfio-pci-nohotplug: a device",
		`-device {"driver":"vhost-user-fs-pci","tag":"x"}`: "0 -device vhost-user-fs-pci: another process has a part",
		"-netdev":                                  "0 -netdev : ",
		"-device usb-host,hostbus=1 -S":            "0 -device usb-host: the other host",
		"-device virtio-9p-pci,fsdev=f":            "0 -device virtio-9p-pci: QEMU cannot migrate",
		"-drive file=x.img,if=virtio":              "0 -drive file=x.img: it is not replicated",
		"-drive file=x.iso,media=cdrom":            "",
		"-drive if=pflash,file=vars.fd,format=raw": "",
		"-hda x.img":                               "0 -hda x.img: it is not replicated",
		"-display none -m 2G":                      "2 -m contradicts the rest of the config; give the size as qemu.memory",
		"--enable-kvm":                             "0 --enable-kvm contradicts the rest of the config; give the accelerator as qemu.accel",
		"-cpu host,+invtsc":                        "0 -cpu contradicts",
		"-loadvm s":                                "0 -loadvm contradicts",
		"-snapshot":                                "0 -snapshot contradicts the rest of the config; what the guest writes would be lost",
		"-run-with async-teardown=on":              "",
		"-run-with user=me":                        "0 -run-with user=me: lockstep decides; name the user as qemu.user",
		"-action panic=pause":                      "",
		"-action panic=pause,shutdown=poweroff":    "0 -action panic=pause,shutdown=poweroff: QEMU stays",
		"-serial -S":                               "1 -S contradicts",
		"-name -m -display none":                   "1 -m contradicts",
	} {
		i, err := CheckExtra(strings.Fields(line))
		got := ""
		if err != nil {
			got = string(rune('0'+i)) + " " + err.Error()
		}
		if !strings.HasPrefix(got, want) || want == "" && got != "" {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
}

// A QEMU that lockstep did not start is asked for its NICs and devices.
func TestCheckNICs(t *testing.T) {
	binary, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		lt.Missing(t, "no QEMU to ask: %v", err)
	}
	dir := t.TempDir()
	for name, c := range map[string]struct {
		nics int
		args string
		want string
	}{
		"none":       {0, "", ""},
		"two":        {2, "-device virtio-net-pci,id=n0 -device e1000", ""},
		"one unsaid": {1, "-device virtio-net-pci,id=n0 -device e1000", "has 2 NICs, and the config lists 1"},
		"user":       {1, "-netdev user,id=u0 -device virtio-net-pci,netdev=u0", "backend u0 is a user: what the guest sends there does not pass lockstep"},
		"socket":     {1, "-netdev dgram,id=s0,local.type=unix,local.path=" + dir + "/a,remote.type=unix,remote.path=" + dir + "/b -device e1000,netdev=s0", "backend s0 is a dgram: "},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, name)
			args := append([]string{"-accel", "tcg", "-nodefaults", "-display", "none", "-m", "16M", "-S", "-qmp", "unix:" + path + ",server=on,wait=off"}, strings.Fields(c.args)...)
			cmd := exec.CommandContext(t.Context(), binary, args...)
			said := new(strings.Builder)
			cmd.Stderr = said
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Wait()
			defer cmd.Process.Kill()
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			m, err := qmp.Dial(ctx, path, 30*time.Second)
			for ; err != nil; m, err = qmp.Dial(ctx, path, 30*time.Second) {
				select {
				case <-tick.C:
				case <-ctx.Done():
					t.Fatalf("%v: %s", err, said)
				}
			}
			defer m.Disconnect()
			if models, err := devices(m); name == "two" && (models["n0"] != "virtio-net-pci" || len(models) != 2) || err != nil {
				t.Errorf("devices %v, %v", models, err)
			}
			switch err := CheckNICs(m, c.nics); {
			case c.want == "" && err != nil:
				t.Error(err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}
