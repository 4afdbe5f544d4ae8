// SPDX-License-Identifier: Apache-2.0

package config

import (
	"encoding/hex"
	"slices"
	"strings"
	"testing"
)

func TestHash(t *testing.T) {
	hash := func(s string) [32]byte {
		t.Helper()
		c, err := Parse("pair.yaml", []byte(s))
		if err != nil {
			t.Fatal(err)
		}
		return c.Hash()
	}
	if len(sections)*part != len([32]byte{}) {
		t.Fatalf("%d sections do not fill the hash", len(sections))
	}
	base := hash(example)
	// Pinned tables and the other host's daemon may be of the release before, which did not know these keys.
	before := hash(strings.NewReplacer(", queues: 4", "", ", vhost: true", "", "virtio-net-pci\n  offloads: {host_tso4: false, mrg_rxbuf: true}", "e1000",
		", format: raw, cache: none, aio: native, discard: true", "").Replace(example))
	if got, want := hex.EncodeToString(before[:]), "bf601a3d0f067a8f6fb76cfcc9bc9751fcbcf16542e44ef3639bca6b7390d44e"; got != want {
		t.Errorf("the hash is %s, and was %s", got, want)
	}
	replace := func(old, new string) string {
		t.Helper()
		s := strings.Replace(example, old, new, 1)
		if s == example {
			t.Fatalf("example has no %q", old)
		}
		return s
	}
	lines := strings.SplitAfter(example, "\n")
	for name, s := range map[string]string{
		"order of nodes": strings.Join([]string{lines[0], lines[1], lines[3], lines[2], strings.Join(lines[4:], "")}, ""),
		"pin_dir":        replace("/sys/fs/bpf/lockstep", "/sys/fs/bpf/other"),
		"tap":            replace("tapP", "tap7"),
		"qmp":            replace("run/alpha.qmp", "alpha.qmp"),
		"slots":          replace("slots: 200", "slots: 400"),
		"certificate":    replace("certs/{node}.pem", "/etc/beta.pem"),
		"rekey":          replace("rekey: 2h", "rekey: 3h"),
		"xdp":            replace("xdp: on", "xdp: off"),
		"state_dir":      replace("state_dir: state", "state_dir: other"),
		"binary":         replace("/opt/qemu", "/opt/qemu7"),
		"kernel":         replace("boot/vmlinuz", "vmlinuz"),
		"image":          replace("/vms/b.raw", "/vms/c.raw"),
		"format":         replace("format: raw", "format: qcow2"),
		"access":         replace("cache: none, aio: native, discard: true", "cache: writeback"),
		"vhost":          replace(", vhost: true", ""),
		"first start":    replace("first_start: copy", "first_start: trust"),
		"overlay_dir":    replace("/dev/shm", "/tmp"),
		"argument":       replace("-display, none", "-display, gtk"),
		"order of etcds": replace(`"192.0.2.9:2379", "etcd.example:2379"`, `"etcd.example:2379", "192.0.2.9:2379"`),
		"etcd's CA":      replace("certs/etcd.pem", "etcd.pem"),
		"patience":       replace("{type: etcd,", "{type: etcd, timeout: 1s,"),
		"timeout":        replace("timeout: 2s", "timeout: 3s"),
		"cut_delay":      replace("cut_delay: 3ms", "cut_delay: 4ms"),
		"connections":    replace("max_connections: 100", "max_connections: 101"),
		"period":         replace("period: 4s", "period: 6s"),
		"min_interval":   replace("min_interval: 5ms", "min_interval: 6ms"),
		"old name":       replace("lease: 200ms", "speak: 200ms"),
		"pause":          replace("target_pause: 20ms", "target_pause: 21ms"),
	} {
		if hash(s) != base {
			t.Errorf("another %s gives another hash", name)
		}
	}
	for name, x := range map[string]struct{ config, section string }{
		"vm":      {replace("web1", "web2"), "vm"},
		"node":    {replace("alpha", "gamma"), "nodes"},
		"control": {replace("192.0.2.1:7700", "192.0.2.1:7701"), "nodes"},
		"vxlan":   {replace("id: 77", "id: 78"), "nodes"},
		"beat":    {replace("interval: 20ms", "interval: 21ms"), "heartbeat"},
		"silence": {replace("timeout: 300ms", "timeout: 301ms"), "heartbeat"},
		"lease":   {replace("lease: 200ms", "lease: 201ms"), "heartbeat"},
		"restart": {replace("restart: 900ms", "restart: 901ms"), "heartbeat"},
		"rule":    {replace("remote_port: 123", "guest_port: 123"), "compare.primary_only or compare.mptcp"},
		"rules":   {replace("{proto: 47}, ", ""), "compare.primary_only or compare.mptcp"},
		"port":    {replace("port: 9001", "port: 9003"), "migration"},
		"nbd":     {replace("nbd_port: 9002", "nbd_port: 9003"), "migration"},
		"unix":    {replace("{port: 9001,", "{port: 9001, unix: sock,"), "migration"},
		"mac":     {replace("00:00:07", "00:00:08"), "qemu"},
		"disk":    {replace("id: disk1", "id: disk2"), "qemu"},
		"disks":   {replace(example[strings.Index(example, ", {id: disk1"):strings.Index(example, "]\n  first_start")], ""), "qemu"},
		"cache":   {replace("cache: none", "cache: directsync"), "qemu"},
		"queues":  {strings.ReplaceAll(example, "queues: 4", "queues: 3"), "qemu"},
		"offload": {replace("host_tso4: false", "host_tso4: true"), "qemu"},
		"memory":  {replace("512M", "513M"), "qemu"},
		"machine": {replace("q35", "pc"), "qemu"},
		"etcd":    {replace("192.0.2.9", "192.0.2.8"), "arbiter"},
		"arbiter": {replace(example[strings.Index(example, "arbiter:"):], "arbiter: {type: none}\n"), "arbiter"},
		"exec":    {replace(example[strings.Index(example, "arbiter:"):], "arbiter: {type: exec, command: [x]}\n"), "arbiter"},
		"file":    {replace(example[strings.Index(example, "arbiter:"):], "arbiter: {type: file, path: /x}\n"), "arbiter"},
		"secrecy": {replace(example[strings.Index(example, ", tls: {ca: certs/etcd"):], "}\n"), "arbiter"},
		"tls":     {replace(example[strings.Index(example, "tls:"):strings.Index(example, "heartbeat:")], "tls: {insecure: true}\n"), "tls.insecure or tls.qemu"},
		"clear":   {replace("tls:\n", "tls:\n  qemu: false\n"), "tls.insecure or tls.qemu"},
	} {
		other := hash(x.config)
		if got := Differ(base, other); !slices.Equal(got, []string{x.section}) {
			t.Errorf("another %s differs in %q, want %s", name, got, x.section)
		}
		if got := DifferHex(hex.EncodeToString(base[:]), hex.EncodeToString(other[:])); !slices.Equal(got, []string{x.section}) {
			t.Errorf("another %s differs, in hex, in %q", name, got)
		}
		fixed := slices.Contains([]string{"vm", "arbiter", "qemu"}, x.section)
		if got := DifferFixed(base, other); (len(got) == 1) != fixed {
			t.Errorf("another %s differs, while the guest runs, in %q", name, got)
		}
	}
	if got := Differ(base, base); len(got) > 0 {
		t.Errorf("the same differs in %q", got)
	}
	if got := DifferHex("other", hex.EncodeToString(base[:])); got != nil {
		t.Errorf("no hash differs in %q", got)
	}
}
