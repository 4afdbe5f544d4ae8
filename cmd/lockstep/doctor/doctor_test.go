// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/qemu"
)

// healthy is beta's host, with everything there.
func healthy() machine {
	return machine{
		checkBPFFS:   func(string) error { return nil },
		device:       func(name string) (*net.Interface, error) { return &net.Interface{Name: name, MTU: 1400}, nil },
		arch:         "amd64",
		release:      func() (string, error) { return "6.6.0-1-amd64", nil },
		capabilities: func() ([]string, error) { return nil, nil },
		exists:       func(string) bool { return true },
		writable:     func(string) error { return nil },
		tcx:          func() error { return nil },
		programs:     func() error { return nil },
		vxlan:        func() error { return nil },
		nativeXDP:    func(string) (bool, error) { return true, nil },
		tap:          func(string) error { return nil },
		queues:       func(string, string, int) error { return nil },
		inFront:      func(string) (passOn, read []string, err error) { return nil, nil, nil },
		synchronised: func() (bool, error) { return true, nil },
		addresses:    func() ([]netip.Addr, error) { return []netip.Addr{netip.MustParseAddr("192.0.2.2")}, nil },
		bridge:       func(string) error { return nil },
		vxlanFits:    func(*config.VXLAN, int) error { return nil },
		route:        func(*config.VXLAN) error { return nil },
		dial:         func(context.Context, netip.AddrPort) error { return nil },
		command:      qemuOf("7.2.22", "raw replication vvfat"),
		arbiter: func(context.Context, *config.Config, string) (string, error) {
			return "fencing term 3, speaker alpha", nil
		},
		guest:    func(*config.Config, *config.Node) (string, error) { return "", nil },
		memory:   func() (int64, int64, error) { return 8 << 30, 4 << 30, nil },
		overlays: roomOf(4<<30, 0),
	}
}

// roomOf is a machine whose overlay_dir has so many bytes; a disk's overlays may take most.
func roomOf(free, most int64) func(*config.Config, *config.Node) ([]overlayRoom, error) {
	return func(*config.Config, *config.Node) ([]overlayRoom, error) {
		return []overlayRoom{{qemu.OverlaySpace{Dir: "/o", Disks: []string{"d0", "d1"}, Free: free}, most}}, nil
	}
}

func qemuOf(version, formats string) func(context.Context, string, ...string) (string, error) {
	return func(_ context.Context, name string, args ...string) (string, error) {
		switch line := name + " " + strings.Join(args, " "); line {
		case "qemu-system-x86_64 --version":
			return "QEMU emulator version " + version + " (Debian)\n", nil
		case "qemu-system-x86_64 -drive format=help":
			return "Supported formats: " + formats + "\n", nil
		case "qemu-system-x86_64 -machine help":
			return "Supported machines are:\npc   Standard PC (alias of pc-i440fx-7.2)\npc-i440fx-7.2   Standard PC (default)\n", nil
		case "qemu-img --version":
			return "qemu-img version " + version, nil
		default:
			return "", fmt.Errorf("unexpected %q", line)
		}
	}
}

const pairYAML = `vm: web1
nodes:
  alpha: {control: "192.0.2.1:7700", nics: [{tap: tapP, peer: {device: peerP}}], qmp: alpha.qmp}
  beta: {control: "192.0.2.2:7700", nics: [{tap: tapS, bridge: br0, peer: {vxlan: {id: 7, local: 192.0.2.2, remote: 192.0.2.1, underlay: eth1}}}]}
tls: {insecure: true}
run_dir: run
`

// parse reads a config whose folder is "@".
func parse(t *testing.T, yaml string) *config.Config {
	t.Helper()
	c, err := config.Parse("@/pair.yaml", []byte(yaml))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func text(t *testing.T, r Report, asJSON bool) string {
	t.Helper()
	var out strings.Builder
	if err := r.Write(&out, asJSON); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// Whatever is missing is named with what mends it, and nothing else is.
func TestDoctorMisses(t *testing.T) {
	fails := func(text string) func() error { return func() error { return errors.New(text) } }
	devices := func(mtu map[string]int) func(string) (*net.Interface, error) {
		return func(name string) (*net.Interface, error) {
			if mtu[name] == 0 {
				return nil, errors.New("no such network interface")
			}
			return &net.Interface{Name: name, MTU: mtu[name], Flags: net.FlagUp}, nil
		}
	}
	addresses := func(list ...string) func() ([]netip.Addr, error) {
		return func() (out []netip.Addr, _ error) {
			for _, a := range list {
				out = append(out, netip.MustParseAddr(a))
			}
			return out, nil
		}
	}
	noQEMU := func(m *machine) {
		m.command = func(_ context.Context, name string, _ ...string) (string, error) {
			return "", fmt.Errorf("%s: executable file not found in $PATH", name)
		}
	}
	without := func(path string) func(string) bool { return func(p string) bool { return p != path } }
	for _, tc := range []struct {
		name       string
		file, node string // of the config; "": pair.yaml, and beta
		spoil      func(*machine)
		state      string
		check      string
		found, fix string // parts of it
	}{
		{name: "old kernel", check: "kernel", state: "missing", found: "6.5.13", fix: "6.6 or later",
			spoil: func(m *machine) { m.release = func() (string, error) { return "6.5.13-generic", nil } }},
		{name: "tcx", check: "tcx", state: "missing", found: "attach a program by tcx: invalid argument", fix: "6.6 or later",
			spoil: func(m *machine) { m.tcx = fails("attach a program by tcx: invalid argument") }},
		{name: "btf", check: "btf", state: "missing", found: "/sys/kernel/btf/vmlinux", fix: "CONFIG_DEBUG_INFO_BTF=y",
			spoil: func(m *machine) { m.exists = without("/sys/kernel/btf/vmlinux") }},
		{name: "verifier", check: "programs", state: "missing", found: "unknown func", fix: "--verifier-log",
			spoil: func(m *machine) { m.programs = fails("load programs: program ls_mirror: unknown func") }},
		{name: "vxlan", check: "vxlan", state: "missing", found: "not supported", fix: "modprobe vxlan",
			spoil: func(m *machine) { m.vxlan = fails("create a vxlan: operation not supported") }},
		{name: "bpffs", check: "bpffs", state: "missing", found: "is not on a bpffs", fix: "mount -t bpf bpf /sys/fs/bpf",
			spoil: func(m *machine) {
				m.checkBPFFS = func(string) error {
					return errors.New("pin_dir /x: / is not on a bpffs; mount one: mount -t bpf bpf /sys/fs/bpf")
				}
			}},
		{name: "clock", check: "clock", state: "warning", found: "nothing keeps it right", fix: "timedatectl set-ntp true",
			spoil: func(m *machine) { m.synchronised = func() (bool, error) { return false, nil } }},
		{name: "kvm", check: "kvm", state: "warning", found: "/dev/kvm", fix: "modprobe kvm",
			spoil: func(m *machine) { m.exists = without("/dev/kvm") }},
		{name: "vhost", check: "vhost-net", state: "warning", found: "/dev/vhost-net", fix: "modprobe vhost_net",
			spoil: func(m *machine) { m.exists = without("/dev/vhost-net") }},
		{name: "no qemu", check: "qemu", state: "missing", found: "not found", fix: "apt install qemu-system-x86", file: "life.yaml", spoil: noQEMU},
		{name: "no qemu, and none is started", check: "qemu", state: "warning", found: "not found", fix: "apt install qemu-system-x86", spoil: noQEMU},
		{name: "no qemu-img", check: "qemu-img", state: "warning", found: "not found", fix: "apt install qemu-utils",
			spoil: func(m *machine) {
				whole := m.command
				m.command = func(ctx context.Context, name string, args ...string) (string, error) {
					if name == "qemu-img" {
						return "", errors.New("not found")
					}
					return whole(ctx, name, args...)
				}
			}},
		{name: "broken qemu", check: "qemu", state: "missing", found: "10.0.12 with kvm: COLO is broken in 10.0 before 10.0.13", fix: "10.0.13",
			spoil: func(m *machine) { m.command = qemuOf("10.0.12", "replication") }},
		{name: "qemu broken under TCG", check: "qemu", state: "missing", found: "11.1.3 with tcg: under TCG", fix: "10.0.13", file: "tcg.yaml",
			spoil: func(m *machine) { m.command = qemuOf("11.1.3", "replication") }},
		{name: "emulated", check: "qemu", state: "warning", found: "7.2.22 with tcg: under TCG", fix: "accel: kvm", file: "tcg.yaml",
			spoil: func(*machine) {}},
		{name: "qemu not tried", check: "qemu", state: "warning", found: "11.1.3 with kvm: newer", fix: "10.0.13", file: "life.yaml",
			spoil: func(m *machine) { m.command = qemuOf("11.1.3", "replication") }},
		{name: "machine", check: "machine", state: "missing", found: `no machine "pc-q35-9.9"`, fix: "-machine help", file: "machine.yaml",
			spoil: func(*machine) {}},
		{name: "device", check: "config", state: "missing", found: "-device vfio-pci: a device of the host that the guest has to itself", fix: "use an emulated one", file: "device.yaml",
			spoil: func(*machine) {}},
		{name: "too little memory", check: "memory", state: "missing", found: "2048 MiB, and this host has 2000", fix: "qemu.memory", file: "life.yaml",
			spoil: func(m *machine) {
				m.memory = func() (int64, int64, error) { return 2000 << 20, 1000 << 20, nil }
			}},
		{name: "memory in use", check: "memory", state: "warning", found: "2048 MiB, and 2000 are free", fix: "qemu.memory", file: "life.yaml",
			spoil: func(m *machine) {
				m.memory = func() (int64, int64, error) { return 8 << 30, 2000 << 20, nil }
			}},
		{name: "no replication", check: "colo", state: "missing", found: "without replication", fix: "--disable-replication",
			spoil: func(m *machine) { m.command = qemuOf("9.2.0", "raw replication-of-none") }},
		{name: "not this host", check: "control", state: "missing", found: "192.0.2.2 is not this host's", fix: "ip addr add 192.0.2.2/",
			spoil: func(m *machine) { m.addresses = addresses("192.0.2.9") }},
		{name: "the other node", check: "control", state: "missing", found: "but alpha's is", fix: "--node alpha",
			spoil: func(m *machine) { m.addresses = addresses("192.0.2.1") }},
		{name: "no node", check: "control", state: "missing", found: "it has neither", fix: "--node", file: "pair.yaml",
			spoil: func(m *machine) { m.addresses = addresses("192.0.2.9") }},
		{name: "peer silent", check: "peer", state: "missing", found: "does not answer", fix: "ip route get 192.0.2.1",
			spoil: func(m *machine) {
				m.dial = func(context.Context, netip.AddrPort) error { return context.DeadlineExceeded }
			}},
		{name: "run_dir", check: "run_dir", state: "missing", found: "read-only", fix: "mkdir -p @/run",
			spoil: func(m *machine) {
				m.writable = func(dir string) error { return fmt.Errorf("%s: read-only file system", dir) }
			}},
		{name: "no tap", check: "nics[0].tap", state: "missing", found: `no device "tapP"`, fix: "ip tuntap add dev tapP mode tap", file: "pair.yaml", node: "alpha",
			spoil: func(m *machine) {
				m.addresses = addresses("192.0.2.1")
				m.device = devices(map[string]int{"peerP": 9000})
			}},
		{name: "no bridge", check: "nics[0].bridge", state: "missing", found: "no bridge br0", fix: "make it",
			spoil: func(m *machine) {
				m.bridge = func(b string) error { return errors.New("there is no bridge " + b + "; make it") }
			}},
		{name: "vxlan of a tap that is to be made", check: "nics[0].underlay", state: "missing", found: "lsx7 does not take 1500", fix: "ip link set eth1 mtu 1550",
			spoil: func(m *machine) {
				m.device = devices(map[string]int{"eth1": 1500})
				m.vxlanFits = func(v *config.VXLAN, mtu int) error {
					return fmt.Errorf("%s does not take %d; ip link set %s mtu 1550", v.Device(), mtu, v.Underlay)
				}
			}},
		{name: "underlay down", check: "nics[0].underlay", state: "warning", found: "eth1 is down", fix: "ip link set eth1 up",
			spoil: func(m *machine) {
				m.device = func(name string) (*net.Interface, error) { return &net.Interface{Name: name, MTU: 1550}, nil }
			}},
		{name: "unfit", check: "config", state: "missing", found: "without QEMU's socket no node can take over", fix: "describe the guest", file: "unfit.yaml", node: "beta",
			spoil: func(*machine) {}},
		{name: "no route", check: "nics[0].route", state: "missing", found: "network is unreachable", fix: "ip route add 192.0.2.1 dev eth1",
			spoil: func(m *machine) { m.route = func(*config.VXLAN) error { return syscall.ENETUNREACH } }},
		{name: "no peer device", check: "nics[0].peer", state: "missing", found: `no device "peerP"`, fix: "make it first, or have lockstep make a VXLAN", file: "pair.yaml", node: "alpha",
			spoil: func(m *machine) {
				m.addresses = addresses("192.0.2.1")
				m.device = devices(map[string]int{"tapP": 1500})
			}},
		{name: "macvtap", check: "nics[0].tap", state: "missing", found: "is a macvtap", fix: "a tap in a bridge",
			spoil: func(m *machine) {
				m.tap = func(string) error { return errors.New("tap tapS is a macvtap; give the guest a tap in a bridge") }
			}},
		{name: "user-space switch", check: "nics[0].order", state: "missing", found: "process 7 (switch) passes on", fix: "take tapS out of it",
			spoil: func(m *machine) {
				m.inFront = func(tap string) (passOn, read []string, err error) {
					return []string{"process 7 (switch) passes on: take " + tap + " out of it"}, nil, nil
				}
			}},
		{name: "capture", check: "nics[0].order", state: "warning", found: "process 7 (tcpdump) reads", fix: "end it",
			spoil: func(m *machine) {
				m.inFront = func(string) (passOn, read []string, err error) {
					return nil, []string{"process 7 (tcpdump) reads"}, nil
				}
			}},
		{name: "small peer device", check: "nics[0].peer", state: "missing", found: "MTU 1400", fix: "ip link set peerP mtu 1500", file: "pair.yaml",
			spoil: func(m *machine) {
				m.addresses = addresses("192.0.2.1")
				m.device = devices(map[string]int{"tapP": 1500, "peerP": 1400})
			}},
		{name: "xdp wanted", check: "nics[0].xdp", state: "missing", found: "runs no XDP", fix: "xdp: auto", file: "xdp.yaml",
			spoil: func(m *machine) {
				m.addresses = addresses("192.0.2.1")
				m.nativeXDP = func(string) (bool, error) { return false, nil }
				m.device = devices(map[string]int{"tapP": 1500, "peerP": 1500})
			}},
		{name: "certificates", check: "tls", state: "missing", found: "no such file", fix: "lockstep keys", file: "tls.yaml",
			spoil: func(*machine) {}},
		{name: "arbiter", check: "arbiter", state: "missing", found: "file does not answer: no such directory", fix: "docs/ARBITER.md", file: "life.yaml",
			spoil: func(m *machine) {
				m.arbiter = func(context.Context, *config.Config, string) (string, error) {
					return "", errors.New("no such directory")
				}
			}},
		{name: "state_dir", check: "state_dir", state: "missing", found: "read-only", fix: "mkdir -p @/state", file: "life.yaml",
			spoil: func(m *machine) {
				m.writable = func(dir string) error {
					if strings.HasSuffix(dir, "/state") {
						return fmt.Errorf("%s: read-only file system", dir)
					}
					return nil
				}
			}},
		{name: "guest", check: "guest", state: "missing", found: "there is no image; no CPU", fix: "correct qemu", file: "life.yaml",
			spoil: func(m *machine) {
				m.guest = func(*config.Config, *config.Node) (string, error) {
					return "", errors.Join(errors.New("there is no image"), errors.New("no CPU"))
				}
			}},
		{name: "overlays", check: "overlay_dir", state: "missing", found: "beta: /o, of disk d0, d1, has 7 MiB, and no secondary starts", fix: "a larger overlay_dir", file: "life.yaml",
			spoil: func(m *machine) { m.overlays = roomOf(7<<20, 0) }},
		{name: "small overlays", check: "overlay_dir", state: "warning", found: "10s of writing 100 MB/s, and checkpoint.period is 20s", fix: "a larger overlay_dir", file: "life.yaml",
			spoil: func(m *machine) { m.overlays = roomOf(1<<30, 2<<30) }},
		{name: "overlay_dir", check: "overlay_dir", state: "missing", found: "beta: not a folder", fix: "a larger overlay_dir", file: "life.yaml",
			spoil: func(m *machine) {
				m.overlays = func(*config.Config, *config.Node) ([]overlayRoom, error) { return nil, errors.New("not a folder") }
			}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			more := "arbiter: {type: file, path: /arbiter}\nstate_dir: state\n"
			yaml := map[string]string{
				"":             pairYAML,
				"pair.yaml":    pairYAML,
				"tls.yaml":     strings.Replace(pairYAML, "{insecure: true}", "{ca: ca.pem, cert: '{node}.pem', key: '{node}.key'}", 1),
				"xdp.yaml":     strings.Replace(pairYAML, "{device: peerP}", "{device: peerP, xdp: on}", 1),
				"unfit.yaml":   pairYAML + more,
				"life.yaml":    pairYAML + more + "qemu: {memory: 1G}\n",
				"tcg.yaml":     pairYAML + more + "qemu: {memory: 1G, accel: tcg}\n",
				"machine.yaml": pairYAML + more + "qemu: {memory: 1G, machine: pc-q35-9.9}\n",
				"device.yaml":  pairYAML + more + "qemu: {memory: 1G, extra: [-device, 'vfio-pci,host=01:00.0']}\n",
			}[tc.file]
			if tc.file == "" {
				tc.node = "beta"
			}
			m := healthy()
			m.device = devices(map[string]int{"tapS": 1500, "eth1": 1550})
			tc.spoil(&m)
			r := examine(t.Context(), m, parse(t, yaml), tc.node)
			var got Report
			if err := json.Unmarshal([]byte(text(t, r, true)), &got); err != nil {
				t.Fatal(err)
			}
			want := "cannot run here: 1 thing is missing"
			if tc.state == Warning {
				want = "<nil>"
			}
			if err := r.Err(); fmt.Sprint(err) != want || got.CanRun != (err == nil) {
				t.Errorf("%v, can run %v; want %s", err, got.CanRun, want)
			}
			there := false
			for _, k := range got.Checks {
				switch {
				case k.Name == tc.check:
					there = true
					if k.State != tc.state || !strings.Contains(k.Found, tc.found) || !strings.Contains(k.Fix, tc.fix) {
						t.Errorf("%+v, want %s, found %q, fix %q", k, tc.state, tc.found, tc.fix)
					}
				case k.State != "ok" && k.Name != "tls" && k.Name != "arbiter":
					t.Errorf("also %+v", k)
				}
			}
			if !there {
				t.Errorf("no check %q in %+v", tc.check, got.Checks)
			}
			if people := text(t, r, false); !strings.Contains(people, tc.state+"  ") || !strings.Contains(people, "to fix it: ") {
				t.Errorf("for people:\n%s", people)
			}
		})
	}
}

// With spare nodes each of the others is looked at, and the way there. One that is off is no reason not to start.
func TestDoctorSpares(t *testing.T) {
	yaml := "vm: web1\nnodes:\n"
	for i, node := range []string{"alpha", "beta", "gamma"} {
		yaml += fmt.Sprintf("  %s: {control: '192.0.2.%d:7700', nics: [{tap: tapS, peer: {vxlan: {id: 7, local: 198.51.100.%[2]d, underlay: eth1}}}], qmp: q}\n", node, i+1)
	}
	yaml += "tls: {insecure: true}\narbiter: {type: file, path: /a}\n"
	m := healthy()
	m.dial = func(_ context.Context, to netip.AddrPort) error {
		if to.Addr() == netip.MustParseAddr("192.0.2.3") {
			return errors.New("no route to host")
		}
		return nil
	}
	r := examine(t.Context(), m, parse(t, yaml), "")
	if err := r.Err(); err != nil {
		t.Error(err)
	}
	shown := text(t, r, false)
	for _, want := range []string{
		"this host is beta: it has 192.0.2.2", "alpha's daemon listens", "gamma's host does not answer: no route to host",
		"from 198.51.100.2 to 198.51.100.1 by eth1", "from 198.51.100.2 to 198.51.100.3 by eth1",
	} {
		if !strings.Contains(shown, want) {
			t.Errorf("no %q in\n%s", want, shown)
		}
	}
	m.addresses = func() ([]netip.Addr, error) { return nil, nil }
	if shown := text(t, examine(t.Context(), m, parse(t, yaml), ""), false); !strings.Contains(shown, "which of alpha and beta and gamma is this host?") {
		t.Error(shown)
	}
}

// Without privileges what needs them is not tried, and counts once.
func TestDoctorUser(t *testing.T) {
	m := healthy()
	tried := func() error {
		t.Error("tried")
		return nil
	}
	m.tcx, m.programs, m.vxlan = tried, tried, tried
	m.capabilities = func() ([]string, error) { return []string{"CAP_NET_ADMIN", "CAP_BPF"}, nil }
	r := examine(t.Context(), m, nil, "")
	got := text(t, r, false)
	if err := r.Err(); err == nil || err.Error() != "cannot run here: 1 thing is missing" || strings.Count(got, "sudo lockstep doctor") != 4 ||
		!strings.Contains(got, "this user has no CAP_NET_ADMIN, CAP_BPF") {
		t.Errorf("%v\n%s", err, got)
	}
}

func TestDoctorPeerRefuses(t *testing.T) {
	m := healthy()
	m.device = func(string) (*net.Interface, error) { return &net.Interface{MTU: 1500, Flags: net.FlagUp}, nil }
	m.addresses = func() ([]netip.Addr, error) { return []netip.Addr{netip.MustParseAddr("192.0.2.1")}, nil }
	m.dial = func(context.Context, netip.AddrPort) error {
		return &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	}
	r := examine(t.Context(), m, parse(t, pairYAML), "")
	if got := text(t, r, false); r.Err() != nil || !strings.Contains(got, "beta's host answers; no daemon listens on 192.0.2.2:7700") {
		t.Errorf("%v\n%s", r.Err(), got)
	}
}

func TestCOLO(t *testing.T) {
	for version, want := range map[string]string{
		"6.2.0": Missing, "7.1.0": Missing, "7.2.0": OK, "7.2.22": OK, "8.1.0": OK, "9.2.4": OK,
		"10.0.0": Missing, "10.0.12": Missing, "10.0.13": OK, "10.1.0": Missing, "10.1.9": Missing,
		"10.2.0": Warning, "11.0.0": Warning,
	} {
		if why, got := colo(version, "kvm"); got != want {
			t.Errorf("%s: %s (%s), want %s", version, got, why, want)
		}
	}
}

func TestWritable(t *testing.T) {
	dir := t.TempDir()
	if err := writable(dir + "/a/b"); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(dir+"/file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writable(dir + "/file/run"); err == nil {
		t.Error("a folder below a file passed")
	}
}
