// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/lockstep-ft/lockstep/control/qemu"
)

const example = `vm: web1
nodes:
  alpha: {control: "192.0.2.1:7700", nics: [{tap: tapP, queues: 4, vhost: true, peer: {device: peerP, xdp: on}}], qmp: run/alpha.qmp}
  beta:  {control: "192.0.2.2:7700", nics: [{tap: tapS, queues: 4, peer: {vxlan: {id: 77, port: 4790, local: 192.0.2.2, remote: 192.0.2.1, underlay: eth1}}}], qmp: run/beta.qmp}
tls:
  ca: certs/ca.pem
  cert: certs/{node}.pem
  key: "certs/{node}.key"
  rekey: 2h
heartbeat: {interval: 20ms, timeout: 300ms, lease: 200ms, restart: 900ms}
pin_dir: /sys/fs/bpf/lockstep
compare: {timeout: 2s, cut_delay: 3ms, max_connections: 100, slots: 200, gso_slots: 300, mptcp: true, primary_only: [{proto: udp, remote_port: 123}, {proto: 47}, {proto: udp, guest_port: 5353}, {proto: icmpv6}]}
checkpoint: {period: 4s, min_interval: 5ms, target_pause: 20ms, periodic_above: 30, epoch: 25ms}
run_dir: /tmp/run
state_dir: state
qemu:
  binary: /opt/qemu
  machine: q35
  accel: tcg,thread=single
  cpu: qemu64
  memory: 512M
  smp: 1
  kernel: boot/vmlinuz
  initrd: "boot/{node}.img"
  append: "console=ttyS0 host={node}"
  disks: [{id: disk0, image: "{node}/a.qcow2", overlay_dir: "/dev/shm/{node}"}, {id: disk1, image: /vms/b.raw, format: raw, cache: none, aio: native, discard: true}]
  first_start: copy
  nic_model: virtio-net-pci
  offloads: {host_tso4: false, mrg_rxbuf: true}
  macs: ["52:54:00:00:00:07"]
  extra: [-display, none, -name, "on {node}"]
migration: {port: 9001, nbd_port: 9002, bandwidth: 64M, auto_converge: true, timeout: 10m}
arbiter: {type: etcd, endpoints: ["192.0.2.9:2379", "etcd.example:2379"], tls: {ca: certs/etcd.pem, cert: "certs/{node}-etcd.pem", key: "certs/{node}-etcd.key"}}
`

const short = `vm: web1
nodes:
  alpha:
    control: 192.0.2.1:7700
    nics:
      - tap: tapP
        peer: {device: peerP}
  beta:
    control: 192.0.2.2:7700
    nics:
      - tap: tapS
        peer: {device: peerS}
tls: {insecure: true}
`

func TestParse(t *testing.T) {
	got, err := Parse("etc/pair.yaml", []byte(example))
	if err != nil {
		t.Fatal(err)
	}
	want := &Config{
		File: "etc/pair.yaml",
		VM:   "web1",
		Nodes: []Node{
			{Name: "alpha", Control: netip.MustParseAddrPort("192.0.2.1:7700"), QMP: "etc/run/alpha.qmp",
				NICs: []NIC{{Tap: "tapP", PeerDevice: "peerP", XDP: "on", Queues: 4, VHost: true}}},
			{Name: "beta", Control: netip.MustParseAddrPort("192.0.2.2:7700"), QMP: "etc/run/beta.qmp",
				NICs: []NIC{{Tap: "tapS", PeerVXLAN: &VXLAN{ID: 77, Port: 4790, Local: netip.MustParseAddr("192.0.2.2"), Remote: netip.MustParseAddr("192.0.2.1"), Underlay: "eth1"}, XDP: "auto", Queues: 4}}},
		},
		TLS:       TLS{CA: "etc/certs/ca.pem", Cert: "etc/certs/{node}.pem", Key: "etc/certs/{node}.key", Rekey: 2 * time.Hour, QEMU: true},
		Heartbeat: Heartbeat{Interval: 20 * time.Millisecond, Timeout: 300 * time.Millisecond, Lease: 200 * time.Millisecond, Restart: 900 * time.Millisecond},
		PinDir:    "/sys/fs/bpf/lockstep",
		RunDir:    "/tmp/run",
		StateDir:  "etc/state",
		Compare: Compare{Timeout: 2 * time.Second, CutDelay: 3 * time.Millisecond, MaxConnections: 100, Slots: 200, GSOSlots: 300,
			PrimaryOnly: []Rule{{Proto: 17, RemotePort: 123}, {Proto: 47}, {Proto: 17, GuestPort: 5353}, {Proto: 58}}, FastPath: true, MPTCP: true},
		Checkpoint: Checkpoint{Period: 4 * time.Second, MinInterval: 5 * time.Millisecond, TargetPause: 20 * time.Millisecond, PeriodicAbove: 30, Epoch: 25 * time.Millisecond},
		QEMU: &QEMU{
			Guest: qemu.Guest{
				Binary: "/opt/qemu", Machine: "q35", Accel: "tcg,thread=single", CPU: "qemu64", Memory: 512 << 20, SMP: 1,
				Kernel: "etc/boot/vmlinuz", Initrd: "etc/boot/{node}.img", Append: "console=ttyS0 host={node}",
				Disks:    []qemu.Disk{{ID: "disk0", Image: "etc/{node}/a.qcow2", OverlayDir: "/dev/shm/{node}"}, {ID: "disk1", Image: "/vms/b.raw", OverlayDir: "/tmp/run", Format: "raw", Cache: "none", AIO: "native", Discard: true}},
				NICModel: "virtio-net-pci", Offloads: map[string]bool{"host_tso4": false, "mrg_rxbuf": true}, Extra: []string{"-display", "none", "-name", "on {node}"},
			},
			FirstStart: "copy",
			MACs:       []net.HardwareAddr{{0x52, 0x54, 0, 0, 0, 7}},
		},
		Migration: Migration{Port: 9001, NBDPort: 9002, Limits: qemu.Limits{Bandwidth: 64 << 20, AutoConverge: true, Timeout: 10 * time.Minute}},
		Arbiter: Arbiter{Type: "etcd", Endpoints: []string{"192.0.2.9:2379", "etcd.example:2379"}, Timeout: 2 * time.Second,
			TLS: &TLSFiles{"etc/certs/etcd.pem", "etc/certs/{node}-etcd.pem", "etc/certs/{node}-etcd.key"}},
	}
	if d := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Config{}), cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
	if got, want := got.Socket("alpha"), "/tmp/run/web1-alpha.sock"; got != want {
		t.Errorf("socket %s, want %s", got, want)
	}
	if ca, cert, key := got.TLS.Files("beta"); ca != "etc/certs/ca.pem" || cert != "etc/certs/beta.pem" || key != "etc/certs/beta.key" {
		t.Errorf("certificates of beta: %s, %s, %s", ca, cert, key)
	}
	if got, want := got.Arbiter.TLS.On("beta"), (TLSFiles{"etc/certs/etcd.pem", "etc/certs/beta-etcd.pem", "etc/certs/beta-etcd.key"}); got != want {
		t.Errorf("certificates of beta for etcd: %v", got)
	}
	beta := &got.Nodes[1]
	on := got.Guest(beta)
	wantOn := qemu.Spec{
		VM: "web1", Node: "beta", Guest: want.QEMU.Guest, QMP: "etc/run/beta.qmp", Dir: "/tmp/run",
		NICs: []qemu.NIC{{Tap: "tapS", MAC: net.HardwareAddr{0x52, 0x54, 0, 0, 0, 7}, Queues: 4}},
	}
	wantOn.Initrd, wantOn.Append = "etc/boot/beta.img", "console=ttyS0 host=beta"
	wantOn.Disks = []qemu.Disk{{ID: "disk0", Image: "etc/beta/a.qcow2", OverlayDir: "/dev/shm/beta"}, {ID: "disk1", Image: "/vms/b.raw", OverlayDir: "/tmp/run", Format: "raw", Cache: "none", AIO: "native", Discard: true}}
	wantOn.Extra = []string{"-display", "none", "-name", "on beta"}
	if d := cmp.Diff(wantOn, on, cmpopts.IgnoreUnexported(qemu.Spec{})); d != "" {
		t.Errorf("the guest on beta: -want +got\n%s", d)
	}
	if in, want := got.Incoming(beta), (qemu.Incoming{Migration: "tcp:192.0.2.2:9001", NBD: netip.MustParseAddrPort("192.0.2.2:9002")}); in != want {
		t.Errorf("beta's QEMU waits at %v, want %v", in, want)
	}
	if d := cmp.Diff(want.QEMU, got.QEMU); d != "" {
		t.Errorf("Guest changed the config: -want +got\n%s", d)
	}
}

func TestDefaults(t *testing.T) {
	c, err := Parse("pair.yaml", []byte(short))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(Compare{DefaultTimeout, DefaultCutDelay, DefaultMaxConnections, DefaultSlots, DefaultGSOSlots, nil, true, false}, c.Compare); d != "" {
		t.Errorf("compare: -want +got\n%s", d)
	}
	if want := (Heartbeat{DefaultHeartbeatInterval, DefaultHeartbeatTimeout, DefaultHeartbeatLease, DefaultHeartbeatRestart}); c.Heartbeat != want {
		t.Errorf("heartbeat %+v, want %+v", c.Heartbeat, want)
	}
	if want := (TLS{Insecure: true, Rekey: DefaultRekey}); c.TLS != want || c.Nodes[0].NICs[0].XDP != XDPAuto {
		t.Errorf("tls %+v, want %+v; xdp %q", c.TLS, want, c.Nodes[0].NICs[0].XDP)
	}
	if want := (Checkpoint{DefaultPeriod, DefaultMinInterval, 0, DefaultPeriodicAbove, DefaultEpoch}); c.Checkpoint != want {
		t.Errorf("checkpoint %+v, want %+v", c.Checkpoint, want)
	}
	if c.PinDir != DefaultPinDir || c.RunDir != DefaultRunDir || c.StateDir != DefaultStateDir {
		t.Errorf("pin_dir %q, run_dir %q, state_dir %q", c.PinDir, c.RunDir, c.StateDir)
	}
	if c.QEMU != nil || c.Nodes[0].QMP != "" || c.Nodes[0].Starts || c.Arbiter.Type != "" {
		t.Errorf("qemu %+v, alpha %+v, arbiter %+v", c.QEMU, c.Nodes[0], c.Arbiter)
	}
	if want := (Migration{Port: 9998, NBDPort: 9999, Limits: qemu.Limits{Timeout: time.Hour}}); c.Migration != want {
		t.Errorf("migration %+v, want %+v", c.Migration, want)
	}
}

func TestGuestDefaults(t *testing.T) {
	parse := func(more string) *Config {
		t.Helper()
		c, err := Parse("pair.yaml", []byte(short+more))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	c := parse("run_dir: /r\nqemu: {disks: [{id: d, image: d.qcow2}]}\n")
	want := &QEMU{
		Guest: qemu.Guest{Binary: "qemu-system-x86_64", Machine: "pc", Accel: "kvm", CPU: "host", Memory: 4 << 30, SMP: 2, NICModel: "virtio-net-pci",
			Disks: []qemu.Disk{{ID: "d", Image: "d.qcow2", OverlayDir: "/r"}}},
		FirstStart: "compare", MACs: []net.HardwareAddr{MAC("web1", 0)},
	}
	if d := cmp.Diff(want, c.QEMU); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
	if n := c.Nodes[1]; !n.Starts || n.QMP != "/r/web1-beta.qmp" {
		t.Errorf("beta: starts %v, qmp %q", n.Starts, n.QMP)
	}
	// Whoever names a socket has started QEMU.
	attached := strings.Replace(short, "192.0.2.2:7700", "192.0.2.2:7700\n    qmp: /q", 1)
	c, err := Parse("pair.yaml", []byte(attached+"qemu: {}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if a, b := c.Nodes[0], c.Nodes[1]; !a.Starts || b.Starts || b.QMP != "/q" {
		t.Errorf("alpha %+v, beta %+v", a, b)
	}
	if c := parse("qemu: {accel: tcg}\n"); c.QEMU.CPU != "max" {
		t.Errorf("under TCG the CPU is %q", c.QEMU.CPU)
	}
	for typ, timeout := range map[string]time.Duration{
		"etcd, endpoints: [\"192.0.2.9:2379\"], tls: {}": 2 * time.Second,
		"file, path: /shared/web1":                       5 * time.Second,
		"exec, command: [fence-host, -x]":                time.Minute,
		"exec, command: [/bin/fence-host], timeout: 3s":  3 * time.Second,
		"none": 0,
	} {
		if c := parse("arbiter: {type: " + typ + "}\n"); c.Arbiter.Timeout != timeout || c.Arbiter.TLS != nil {
			t.Errorf("%s: %+v", typ, c.Arbiter)
		}
	}
}

// MACs are part of a guest's state: an upgrade must not change them.
func TestMAC(t *testing.T) {
	if got := MAC("web1", 0).String(); got != "52:54:00:39:72:73" {
		t.Errorf("NIC 0 of web1 is %s", got)
	}
	seen := make(map[string]bool)
	for _, vm := range []string{"web1", "web2"} {
		for i := range maxNICs {
			m := MAC(vm, i)
			if seen[m.String()] {
				t.Errorf("%s is there twice", m)
			}
			seen[m.String()] = true
		}
	}
}

// The documented examples must be valid ones.
func TestDocumentedExample(t *testing.T) {
	doc, err := os.ReadFile("../../docs/CONFIG.md")
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(string(doc), "```")
	if len(parts) != 5 {
		t.Fatalf("docs/CONFIG.md is in %d parts; a whole file and a qemu section make 5", len(parts))
	}
	whole, qemu := strings.TrimPrefix(parts[1], "yaml\n"), strings.TrimPrefix(parts[3], "yaml\n")
	c, err := Parse("pair.yaml", []byte(whole+qemu))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Warnings) > 0 {
		t.Error(c.Warnings)
	}
	if want := MAC(c.VM, 0).String(); c.QEMU.MACs[0].String() != want {
		t.Errorf("the MAC address that is the default is %s", want)
	}
}

// Each case of testdata/refused is a file and what is said about it, or a line
// that stands in the short example in place of the first with the same key.
func TestRefused(t *testing.T) {
	datadriven.RunTest(t, "testdata/refused", func(t *testing.T, d *datadriven.TestData) string {
		in := d.Input + "\n"
		switch d.Cmd {
		case "file":
		case "line":
			in = replaceLine(short, in)
		default:
			d.Fatalf(t, "unknown command %q", d.Cmd)
		}
		_, err := Parse("pair.yaml", []byte(in))
		if err == nil {
			return "accepted"
		}
		if es := (Errors)(nil); !errors.As(err, &es) {
			t.Errorf("%v is no Errors", err)
		}
		return err.Error()
	})
}

// replaceLine keeps the replaced line's indentation and dash; a line whose key
// is not in the file is put at its end.
func replaceLine(file, line string) string {
	key := func(s string) string {
		k, _, _ := strings.Cut(strings.TrimLeft(s, " -"), ":")
		return k
	}
	var out strings.Builder
	done := false
	for l := range strings.Lines(file) {
		if !done && key(l) == key(line) {
			out.WriteString(l[:len(l)-len(strings.TrimLeft(l, " -"))])
			l, done = line, true
		}
		out.WriteString(l)
	}
	if !done {
		out.WriteString(line)
	}
	return out.String()
}

func TestUser(t *testing.T) {
	with := func(user, migration string) (*Config, error) {
		file := strings.Replace(example, "\nmigration: {port: 9001,", "\n  user: "+user+"\nmigration: {port: 9001,"+migration, 1)
		return Parse("pair.yaml", []byte(file))
	}
	for _, user := range []string{"qemu", "libvirt-qemu", "107:107", "64055:0"} {
		if c, err := with(user, ""); err != nil || c.QEMU.User != user {
			t.Errorf("user %s: %v", user, err)
		}
	}
	for _, user := range []string{"root", `"0:0"`, `"0:5"`, `""`, "-x", "107", `"a,b"`} {
		if _, err := with(user, ""); err == nil || !strings.Contains(err.Error(), "user") {
			t.Errorf("user %s: %v", user, err)
		}
	}
	if _, err := with("qemu", " unix: /run/m,"); err == nil || !strings.Contains(err.Error(), "migration.unix") {
		t.Errorf("with migration.unix: %v", err)
	}
}

// A zero in the file is refused with its line, or is what it says: it never becomes
// the default.
func TestZero(t *testing.T) {
	type zero struct{ key, text string } // as in the file
	honoured := map[zero]func(*Config) bool{
		{"target_pause", "0s"}:  func(c *Config) bool { return c.Checkpoint.TargetPause == 0 },   // off
		{"periodic_above", "0"}: func(c *Config) bool { return c.Checkpoint.PeriodicAbove == 0 }, // off
		{"proto", "0"}:          func(c *Config) bool { return c.Compare.PrimaryOnly[1].Proto == 0 },
		{"primary_only", "[]"}:  func(c *Config) bool { return len(c.Compare.PrimaryOnly) == 0 },
		{"disks", "[]"}:         func(c *Config) bool { return len(c.QEMU.Disks) == 0 },
		{"extra", "[]"}:         func(c *Config) bool { return len(c.QEMU.Extra) == 0 },
		{"append", `""`}:        func(c *Config) bool { return c.QEMU.Append == "" },
	}
	file := strings.Replace(example, "tls: {ca: certs/etcd.pem", "timeout: 3s, tls: {ca: certs/etcd.pem", 1)
	used := make(map[zero]bool)
	try := func(at []int, text string) { // at: of the key, of the value
		t.Helper()
		key := file[at[0]:at[1]]
		c, err := Parse("pair.yaml", []byte(file[:at[2]]+text+file[at[3]:]))
		if holds := honoured[zero{key, text}]; err == nil && holds != nil && holds(c) {
			used[zero{key, text}] = true
			return
		}
		var errs Errors
		if line := 1 + strings.Count(file[:at[0]], "\n"); !errors.As(err, &errs) || errs[0].Pos.Line != line {
			t.Errorf("line %d, %s: %s: %v", line, key, text, err)
		}
	}
	tried := 0
	for pattern, text := range map[string]string{
		`(\w+): (\d+)[,}\n]`: "0", `(\w+): (\d+(?:ms|s|h))[,}\n]`: "0s", `(\w+): (\d+[MG])[,}\n]`: "0M",
		`(\w+): (\[[^]]*\])`: "[]", `(\w+): ("[^"]*")`: `""`, `(\w+): ([a-z/][^,}\n]*)[,}\n]`: `""`,
	} {
		for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatchIndex(file, -1) {
			tried++
			try(m[2:], text)
		}
	}
	if tried < 50 || len(used) != len(honoured) {
		t.Errorf("%d values tried, of %d that may be zero only %v", tried, len(honoured), used)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "pair.yaml")
	if _, err := Load(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	if err := os.WriteFile(file, []byte(example), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(dir, "run/alpha.qmp"); c.Nodes[0].QMP != want {
		t.Errorf("qmp %s, want %s", c.Nodes[0].QMP, want)
	}
	if err := os.WriteFile(file, []byte(strings.Repeat("# long\n", 10000)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(file); err == nil || !strings.Contains(err.Error(), "larger than 64 KiB") {
		t.Errorf("long file: %v", err)
	}
}

func TestRefuse(t *testing.T) {
	c, err := Parse("pair.yaml", []byte(short))
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{
		"nodes.alpha.nics[0].tap":          "pair.yaml:6:14: no such device; make it",
		"nodes.beta.nics[0].peer.device":   "pair.yaml:12:24: no such device; make it",
		"nodes.beta.nics[0].peer.vxlan.id": "pair.yaml:12:15: no such device; make it", // what is around it
		"compare.slots":                    "pair.yaml:1:1: no such device; make it",
	} {
		if got := c.Refuse(key, "no such device", "make it").Error(); got != want {
			t.Errorf("%s: %q, want %q", key, got, want)
		}
	}
}

// A key by its old name is read, with a warning that names the new one.
func TestRenamed(t *testing.T) {
	for old, now := range renamed {
		if old == now || old[:strings.LastIndexByte(old, '.')] != now[:strings.LastIndexByte(now, '.')] {
			t.Errorf("%s cannot become %s: it has to stay in its section", old, now)
		}
	}
	c, err := Parse("pair.yaml", []byte(strings.Replace(example, "lease: 200ms", "speak: 200ms", 1)))
	if err != nil {
		t.Fatal(err)
	}
	if want := "pair.yaml:10:45: heartbeat.speak is called heartbeat.lease now; rename it: the next release does not read the old name"; c.Warnings.Error() != want {
		t.Errorf("warns %q, want %q", c.Warnings, want)
	}
	new, err := Parse("pair.yaml", []byte(example))
	if err != nil || len(new.Warnings) > 0 {
		t.Fatal(err, new.Warnings)
	}
	c.Warnings = nil
	if d := cmp.Diff(new, c, cmpopts.IgnoreUnexported(Config{}), cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})); d != "" {
		t.Errorf("-new name +old name\n%s", d)
	}
	if c.Hash() != new.Hash() {
		t.Error("the old name gives another hash")
	}
	// What is wrong with the value is said at its place.
	if got, want := c.Refuse("heartbeat.lease", "no", "").Error(), "pair.yaml:10:52: no"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestNode(t *testing.T) {
	c, err := Parse("pair.yaml", []byte(short))
	if err != nil {
		t.Fatal(err)
	}
	self, other, err := c.Node("beta")
	if err != nil || self.Name != "beta" || other.Name != "alpha" {
		t.Errorf("beta: %v %v %v", self, other, err)
	}
	if _, _, err := c.Node("gamma"); err == nil || err.Error() != `pair.yaml has no node "gamma"; it has "alpha" and "beta"` {
		t.Errorf("gamma: %v", err)
	}
}
