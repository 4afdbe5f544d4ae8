// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// What the config says of NICs and disks is on QEMU's command line, and what it does not say is not.
func TestArgs(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		lt.Missing(t, "%v", err)
	}
	dir := t.TempDir()
	s := &Spec{
		VM: "web1", Node: "alpha",
		Guest: Guest{Memory: 1 << 30, SMP: 1, NICModel: "virtio-net-pci", Disks: []Disk{{ID: "a", Image: filepath.Join(dir, "a")}, {ID: "b", Image: filepath.Join(dir, "b"), Format: "raw"}}},
		NICs:  []NIC{{Tap: "t0", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}}, {Tap: "t,1", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 2}}},
	}
	for i := range s.Disks {
		if _, err := qemuImg("create", "-q", "-f", s.Disks[i].format(), s.Disks[i].Image, "1M"); err != nil {
			t.Fatal(err)
		}
	}
	values := func(option string) (all []string) {
		t.Helper()
		args, err := s.args(dialect{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i, a := range args {
			if a == option {
				all = append(all, args[i+1])
			}
		}
		return all
	}
	check := func(option string, want ...string) {
		t.Helper()
		if got := values(option); !slices.Equal(got, want) {
			t.Errorf("%s:\n got %s\nwant %s", option, strings.Join(got, "\n     "), strings.Join(want, "\n     "))
		}
	}
	check("-netdev", "tap,id=hn0,ifname=t0,script=no,downscript=no", "tap,id=hn1,ifname=t,,1,script=no,downscript=no")
	check("-device",
		"virtio-net-pci,id=e0,netdev=hn0,mac=02:00:00:00:00:01", "virtio-net-pci,id=e1,netdev=hn1,mac=02:00:00:00:00:02",
		"virtio-blk-pci,id=d0,drive=a,werror=stop,rerror=stop", "virtio-blk-pci,id=d1,drive=b,werror=stop,rerror=stop")
	for _, b := range values("-blockdev") {
		if strings.Contains(b, "aio") || strings.Contains(b, "cache") || strings.Contains(b, "discard") {
			t.Errorf("nobody asked for this: %s", b)
		}
	}

	s.NICs[0].Queues, s.NICs[0].VHost, s.NICs[1].VHost = 4, true, true
	s.Offloads = map[string]bool{"mrg_rxbuf": false, "csum": true}
	s.Disks[0].Cache, s.Disks[1].Cache = CacheWritethrough, CacheDirectsync
	s.Disks[1].AIO, s.Disks[1].Discard = "native", true
	check("-netdev", "tap,id=hn0,ifname=t0,script=no,downscript=no,queues=4,vhost=on", "tap,id=hn1,ifname=t,,1,script=no,downscript=no,vhost=on")
	check("-device",
		"virtio-net-pci,id=e0,netdev=hn0,mac=02:00:00:00:00:01,mq=on,vectors=10,csum=on,mrg_rxbuf=off", "virtio-net-pci,id=e1,netdev=hn1,mac=02:00:00:00:00:02,csum=on,mrg_rxbuf=off",
		"virtio-blk-pci,id=d0,drive=a,werror=stop,rerror=stop,write-cache=off", "virtio-blk-pci,id=d1,drive=b,werror=stop,rerror=stop,write-cache=off")
	nodes := make(map[string]map[string]any)
	for _, b := range values("-blockdev") {
		var n map[string]any
		if err := json.Unmarshal([]byte(b), &n); err != nil {
			t.Fatal(err)
		}
		nodes[n["node-name"].(string)] = n
	}
	if n := nodes["parent0"]; n["cache"] != nil || n["discard"] != nil || n["driver"] != "qcow2" {
		t.Errorf("the first image is %v", n)
	}
	for name, n := range map[string]any{"image": nodes["parent1"], "file": nodes["parent1"]["file"]} {
		m := n.(map[string]any)
		if c, _ := m["cache"].(map[string]any); c["direct"] != true || m["discard"] != "unmap" || (m["aio"] == "native") != (name == "file") {
			t.Errorf("the second disk's %s is %v", name, m)
		}
	}
	if n := nodes["b"]; n["detect-zeroes"] != "unmap" || n["discard"] != "unmap" {
		t.Errorf("the second quorum is %v", n)
	}
}

// A kernel without vhost-net is said before QEMU is started.
func TestCheckVHost(t *testing.T) {
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		lt.Missing(t, "%v", err)
	}
	s := &Spec{
		VM: "web1", Node: "alpha", Guest: Guest{Binary: "qemu-system-x86_64", Accel: "tcg", Memory: 1 << 30, SMP: 1},
		NICs: []NIC{{Tap: "lo", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, VHost: true}}, QMP: filepath.Join(t.TempDir(), "qmp"),
	}
	_, missing := os.Stat("/dev/vhost-net")
	err := s.Check(nil, nil)
	if said := err != nil && strings.Contains(err.Error(), "vhost: open /dev/vhost-net: no such file or directory; load the kernel's module vhost_net"); said != (missing != nil) {
		t.Errorf("/dev/vhost-net: %v; said: %v", missing, err)
	}
}
