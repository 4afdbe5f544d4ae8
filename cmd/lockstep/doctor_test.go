// SPDX-License-Identifier: Apache-2.0

package main

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

	"lockstep/control/config"
	"lockstep/control/qemu"
)

// healthy is beta's host, with everything there.
func healthy() machine {
	return machine{
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
		inFront:      func(string) (passOn, read []string, err error) { return nil, nil, nil },
		synchronised: func() (bool, error) { return true, nil },
		addresses:    func() ([]netip.Addr, error) { return []netip.Addr{netip.MustParseAddr("192.0.2.2")}, nil },
		route:        func(*config.VXLAN) error { return nil },
		dial:         func(context.Context, netip.AddrPort) error { return nil },
		command:      qemuOf("7.2.22", "raw replication vvfat"),
		arbiter:      func(context.Context, *config.Config, string) (string, error) { return "term 3, speaker alpha", nil },
		guest:        func(*config.Config, *config.Node) (string, error) { return "", nil },
		memory:       func() (int64, int64, error) { return 8 << 30, 4 << 30, nil },
		overlays:     roomOf(4<<30, 0),
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

const atBeta = "doctor -c @/pair.yaml --node beta"

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
	without := func(path string) func(string) bool { return func(p string) bool { return p != path } }
	for _, tc := range []struct {
		name, line string // line: atBeta
		spoil      func(*cli)
		state      string
		check      string
		found, fix string // parts of it
	}{
		{name: "old kernel", check: "kernel", state: "missing", found: "6.5.13", fix: "6.6 or later",
			spoil: func(c *cli) { c.machine.release = func() (string, error) { return "6.5.13-generic", nil } }},
		{name: "tcx", check: "tcx", state: "missing", found: "attach a program by tcx: invalid argument", fix: "6.6 or later",
			spoil: func(c *cli) { c.machine.tcx = fails("attach a program by tcx: invalid argument") }},
		{name: "btf", check: "btf", state: "missing", found: "/sys/kernel/btf/vmlinux", fix: "CONFIG_DEBUG_INFO_BTF=y",
			spoil: func(c *cli) { c.machine.exists = without("/sys/kernel/btf/vmlinux") }},
		{name: "verifier", check: "programs", state: "missing", found: "unknown func", fix: "--verifier-log",
			spoil: func(c *cli) { c.machine.programs = fails("load programs: program ls_mirror: unknown func") }},
		{name: "vxlan", check: "vxlan", state: "missing", found: "not supported", fix: "modprobe vxlan",
			spoil: func(c *cli) { c.machine.vxlan = fails("create a vxlan: operation not supported") }},
		{name: "bpffs", check: "bpffs", state: "missing", found: "is not on a bpffs", fix: "mount -t bpf bpf /sys/fs/bpf",
			spoil: func(c *cli) {
				c.kernel.checkBPFFS = func(string) error {
					return errors.New("pin_dir /x: / is not on a bpffs; mount one: mount -t bpf bpf /sys/fs/bpf")
				}
			}},
		{name: "clock", check: "clock", state: "warning", found: "nothing keeps it right", fix: "timedatectl set-ntp true",
			spoil: func(c *cli) { c.machine.synchronised = func() (bool, error) { return false, nil } }},
		{name: "kvm", check: "kvm", state: "warning", found: "/dev/kvm", fix: "modprobe kvm",
			spoil: func(c *cli) { c.machine.exists = without("/dev/kvm") }},
		{name: "vhost", check: "vhost-net", state: "warning", found: "/dev/vhost-net", fix: "modprobe vhost_net",
			spoil: func(c *cli) { c.machine.exists = without("/dev/vhost-net") }},
		{name: "no qemu", check: "qemu", state: "missing", found: "not found", fix: "apt install qemu-system-x86",
			spoil: func(c *cli) {
				c.machine.command = func(_ context.Context, name string, _ ...string) (string, error) {
					return "", fmt.Errorf("%s: executable file not found in $PATH", name)
				}
			}},
		{name: "no qemu-img", check: "qemu-img", state: "warning", found: "not found", fix: "apt install qemu-utils",
			spoil: func(c *cli) {
				whole := c.machine.command
				c.machine.command = func(ctx context.Context, name string, args ...string) (string, error) {
					if name == "qemu-img" {
						return "", errors.New("not found")
					}
					return whole(ctx, name, args...)
				}
			}},
		{name: "broken qemu", check: "qemu", state: "missing", found: "10.0.12 with kvm: COLO is broken in 10.0 before 10.0.13", fix: "10.0.13",
			spoil: func(c *cli) { c.machine.command = qemuOf("10.0.12", "replication") }},
		{name: "qemu broken under TCG", check: "qemu", state: "missing", found: "11.1.3 with tcg: under TCG", fix: "10.0.13", line: "doctor -c @/tcg.yaml",
			spoil: func(c *cli) { c.machine.command = qemuOf("11.1.3", "replication") }},
		{name: "emulated", check: "qemu", state: "warning", found: "7.2.22 with tcg: under TCG", fix: "accel: kvm", line: "doctor -c @/tcg.yaml",
			spoil: func(*cli) {}},
		{name: "qemu not tried", check: "qemu", state: "warning", found: "11.1.3 with kvm: newer", fix: "10.0.13", line: "doctor -c @/life.yaml",
			spoil: func(c *cli) { c.machine.command = qemuOf("11.1.3", "replication") }},
		{name: "machine", check: "machine", state: "missing", found: `no machine "pc-q35-9.9"`, fix: "-machine help", line: "doctor -c @/machine.yaml",
			spoil: func(*cli) {}},
		{name: "device", check: "devices", state: "missing", found: "vfio-pci,host=01:00.0: a device of the host", fix: "qemu.extra", line: "doctor -c @/device.yaml",
			spoil: func(*cli) {}},
		{name: "too little memory", check: "memory", state: "missing", found: "2048 MiB, and this host has 2000", fix: "qemu.memory", line: "doctor -c @/life.yaml",
			spoil: func(c *cli) {
				c.machine.memory = func() (int64, int64, error) { return 2000 << 20, 1000 << 20, nil }
			}},
		{name: "memory in use", check: "memory", state: "warning", found: "2048 MiB, and 2000 are free", fix: "qemu.memory", line: "doctor -c @/life.yaml",
			spoil: func(c *cli) {
				c.machine.memory = func() (int64, int64, error) { return 8 << 30, 2000 << 20, nil }
			}},
		{name: "no replication", check: "colo", state: "missing", found: "without replication", fix: "--disable-replication",
			spoil: func(c *cli) { c.machine.command = qemuOf("9.2.0", "raw replication-of-none") }},
		{name: "not this host", check: "control", state: "missing", found: "192.0.2.2 is not this host's", fix: "ip addr add 192.0.2.2/",
			spoil: func(c *cli) { c.machine.addresses = addresses("192.0.2.9") }},
		{name: "the other node", check: "control", state: "missing", found: "but alpha's is", fix: "--node alpha",
			spoil: func(c *cli) { c.machine.addresses = addresses("192.0.2.1") }},
		{name: "no node", check: "control", state: "missing", found: "it has neither", fix: "--node", line: "doctor -c @/pair.yaml",
			spoil: func(c *cli) { c.machine.addresses = addresses("192.0.2.9") }},
		{name: "peer silent", check: "peer", state: "missing", found: "does not answer", fix: "ip route get 192.0.2.1",
			spoil: func(c *cli) {
				c.machine.dial = func(context.Context, netip.AddrPort) error { return context.DeadlineExceeded }
			}},
		{name: "run_dir", check: "run_dir", state: "missing", found: "read-only", fix: "mkdir -p @/run",
			spoil: func(c *cli) {
				c.machine.writable = func(dir string) error { return fmt.Errorf("%s: read-only file system", dir) }
			}},
		{name: "no tap", check: "nics[0].tap", state: "missing", found: "no device tapS", fix: "ip tuntap add dev tapS mode tap",
			spoil: func(c *cli) { c.kernel.device = devices(map[string]int{"eth1": 9000}) }},
		{name: "no underlay", check: "nics[0].underlay", state: "missing", found: "no device eth1", fix: "192.0.2.2: ip -br addr",
			spoil: func(c *cli) { c.kernel.device = devices(map[string]int{"tapS": 1500}) }},
		{name: "small underlay", check: "nics[0].underlay", state: "missing", found: "MTU 1549", fix: "ip link set eth1 mtu 1550",
			spoil: func(c *cli) { c.kernel.device = devices(map[string]int{"tapS": 1500, "eth1": 1549}) }},
		{name: "no route", check: "nics[0].route", state: "missing", found: "network is unreachable", fix: "ip route add 192.0.2.1 dev eth1",
			spoil: func(c *cli) { c.machine.route = func(*config.VXLAN) error { return syscall.ENETUNREACH } }},
		{name: "no peer device", check: "nics[0].peer", state: "missing", found: "no device peerP", fix: "make the device first", line: "doctor -c @/pair.yaml --node alpha",
			spoil: func(c *cli) {
				c.machine.addresses = addresses("192.0.2.1")
				c.kernel.device = devices(map[string]int{"tapP": 1500})
			}},
		{name: "macvtap", check: "nics[0].tap", state: "missing", found: "is a macvtap", fix: "a tap in a bridge", line: atBeta,
			spoil: func(c *cli) {
				c.machine.tap = func(string) error { return errors.New("tap tapS is a macvtap; give the guest a tap in a bridge") }
			}},
		{name: "user-space switch", check: "nics[0].order", state: "missing", found: "process 7 (switch) passes on", fix: "take tapS out of it", line: atBeta,
			spoil: func(c *cli) {
				c.machine.inFront = func(tap string) (passOn, read []string, err error) {
					return []string{"process 7 (switch) passes on: take " + tap + " out of it"}, nil, nil
				}
			}},
		{name: "capture", check: "nics[0].order", state: "warning", found: "process 7 (tcpdump) reads", fix: "end it", line: atBeta,
			spoil: func(c *cli) {
				c.machine.inFront = func(string) (passOn, read []string, err error) {
					return nil, []string{"process 7 (tcpdump) reads"}, nil
				}
			}},
		{name: "small peer device", check: "nics[0].peer", state: "missing", found: "MTU 1400", fix: "ip link set peerP mtu 1500", line: "doctor -c @/pair.yaml",
			spoil: func(c *cli) {
				c.machine.addresses = addresses("192.0.2.1")
				c.kernel.device = devices(map[string]int{"tapP": 1500, "peerP": 1400})
			}},
		{name: "xdp wanted", check: "nics[0].xdp", state: "missing", found: "runs no XDP", fix: "xdp: auto", line: "doctor -c @/xdp.yaml",
			spoil: func(c *cli) {
				c.machine.addresses = addresses("192.0.2.1")
				c.machine.nativeXDP = func(string) (bool, error) { return false, nil }
				c.kernel.device = devices(map[string]int{"tapP": 1500, "peerP": 1500})
			}},
		{name: "certificates", check: "tls", state: "missing", found: "no such file", fix: "lockstep keys", line: "doctor -c @/tls.yaml",
			spoil: func(*cli) {}},
		{name: "arbiter", check: "arbiter", state: "missing", found: "file does not answer: no such directory", fix: "docs/ARBITER.md", line: "doctor -c @/life.yaml",
			spoil: func(c *cli) {
				c.machine.arbiter = func(context.Context, *config.Config, string) (string, error) {
					return "", errors.New("no such directory")
				}
			}},
		{name: "state_dir", check: "state_dir", state: "missing", found: "read-only", fix: "mkdir -p @/state", line: "doctor -c @/life.yaml",
			spoil: func(c *cli) {
				c.machine.writable = func(dir string) error {
					if strings.HasSuffix(dir, "/state") {
						return fmt.Errorf("%s: read-only file system", dir)
					}
					return nil
				}
			}},
		{name: "guest", check: "guest", state: "missing", found: "there is no image; no CPU", fix: "correct qemu", line: "doctor -c @/life.yaml",
			spoil: func(c *cli) {
				c.machine.guest = func(*config.Config, *config.Node) (string, error) {
					return "", errors.Join(errors.New("there is no image"), errors.New("no CPU"))
				}
			}},
		{name: "overlays", check: "overlay_dir", state: "missing", found: "beta: /o, of disk d0, d1, has 7 MiB, and no secondary starts", fix: "a larger overlay_dir", line: "doctor -c @/life.yaml",
			spoil: func(c *cli) { c.machine.overlays = roomOf(7<<20, 0) }},
		{name: "small overlays", check: "overlay_dir", state: "warning", found: "10s of writing 100 MB/s, and checkpoint.period is 20s", fix: "a larger overlay_dir", line: "doctor -c @/life.yaml",
			spoil: func(c *cli) { c.machine.overlays = roomOf(1<<30, 2<<30) }},
		{name: "overlay_dir", check: "overlay_dir", state: "missing", found: "beta: not a folder", fix: "a larger overlay_dir", line: "doctor -c @/life.yaml",
			spoil: func(c *cli) {
				c.machine.overlays = func(*config.Config, *config.Node) ([]overlayRoom, error) { return nil, errors.New("not a folder") }
			}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newCLI(t)
			c.write(t, "tls.yaml", strings.Replace(pairYAML, "{insecure: true}", "{ca: ca.pem, cert: '{node}.pem', key: '{node}.key'}", 1))
			c.write(t, "xdp.yaml", strings.Replace(pairYAML, "{device: peerP}", "{device: peerP, xdp: on}", 1))
			life := pairYAML + "arbiter: {type: file, path: /arbiter}\nstate_dir: state\n"
			c.write(t, "life.yaml", life+"qemu: {memory: 1G}\n")
			c.write(t, "tcg.yaml", life+"qemu: {memory: 1G, accel: tcg}\n")
			c.write(t, "machine.yaml", life+"qemu: {memory: 1G, machine: pc-q35-9.9}\n")
			c.write(t, "device.yaml", life+"qemu: {memory: 1G, extra: [-device, 'vfio-pci,host=01:00.0']}\n")
			c.machine = healthy()
			c.kernel.device = devices(map[string]int{"tapS": 1500, "eth1": 1550})
			tc.spoil(c)
			line := tc.line
			if line == "" {
				line = atBeta
			}
			code, stdout, stderr := c.run(t.Context(), line+" --json")
			var got checkup
			if err := json.Unmarshal([]byte(stdout), &got); err != nil {
				t.Fatalf("%v\n%s%s", err, stdout, stderr)
			}
			want, says := 1, "lockstep: cannot run here: 1 thing is missing\n"
			if tc.state == "warning" {
				want, says = 0, ""
			}
			if code != want || stderr != says || got.CanRun != (want == 0) {
				t.Errorf("exit %d, %q, can run %v; want %d, %q", code, stderr, got.CanRun, want, says)
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
			// The same for people.
			code, text, _ := c.run(t.Context(), line)
			if code != want || !strings.Contains(text, tc.state+"  ") || !strings.Contains(text, "to mend it: ") {
				t.Errorf("exit %d\n%s", code, text)
			}
		})
	}
}

// Without privileges what needs them is not tried, and counts once.
func TestDoctorUser(t *testing.T) {
	c := newCLI(t)
	c.machine = healthy()
	tried := func() error {
		t.Error("tried")
		return nil
	}
	c.machine.tcx, c.machine.programs, c.machine.vxlan = tried, tried, tried
	c.machine.capabilities = func() ([]string, error) { return []string{"CAP_NET_ADMIN", "CAP_BPF"}, nil }
	code, stdout, stderr := c.run(t.Context(), "doctor")
	if code != 1 || stderr != "lockstep: cannot run here: 1 thing is missing\n" || strings.Count(stdout, "sudo lockstep doctor") != 4 ||
		!strings.Contains(stdout, "this user has no CAP_NET_ADMIN, CAP_BPF") {
		t.Errorf("exit %d, %s\n%s", code, stderr, stdout)
	}
}

func TestDoctorUsage(t *testing.T) {
	c := newCLI(t)
	for line, want := range map[string]string{
		"doctor --node alpha":                   "lockstep: --node names a host of a config file; name the file with -c\n",
		"doctor -c @/pair.yaml --node gamma":    "lockstep: @/pair.yaml has no node \"gamma\"; it has \"alpha\" and \"beta\"\n",
		"doctor -c @/none.yaml":                 "lockstep: read config: open @/none.yaml: no such file or directory\n",
		"doctor all":                            "lockstep: unknown command \"all\" for \"lockstep doctor\"; `lockstep doctor --help` shows the usage\n",
		"doctor -c @/pair.yaml --node a --jsno": "lockstep: unknown flag: --jsno; `lockstep doctor --help` lists the flags\n",
	} {
		if code, stdout, stderr := c.run(t.Context(), line); code != 2 || stderr != want || stdout != "" {
			t.Errorf("%s: exit %d, %q, %q, want 2, %q", line, code, stdout, stderr, want)
		}
	}
}

func TestDoctorPeerRefuses(t *testing.T) {
	c := newCLI(t)
	c.machine = healthy()
	c.kernel.device = func(string) (*net.Interface, error) { return &net.Interface{MTU: 1500, Flags: net.FlagUp}, nil }
	c.machine.addresses = func() ([]netip.Addr, error) { return []netip.Addr{netip.MustParseAddr("192.0.2.1")}, nil }
	c.machine.dial = func(context.Context, netip.AddrPort) error {
		return &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	}
	code, stdout, stderr := c.run(t.Context(), "doctor -c @/pair.yaml")
	if code != 0 || !strings.Contains(stdout, "beta's host answers; no daemon listens on 192.0.2.2:7700") {
		t.Errorf("exit %d, %s\n%s", code, stderr, stdout)
	}
}

func TestCOLO(t *testing.T) {
	for version, want := range map[string]string{
		"6.2.0": stateMissing, "7.1.0": stateMissing, "7.2.0": stateOK, "7.2.22": stateOK, "8.1.0": stateOK, "9.2.4": stateOK,
		"10.0.0": stateMissing, "10.0.12": stateMissing, "10.0.13": stateOK, "10.1.0": stateMissing, "10.1.9": stateMissing,
		"10.2.0": stateWarning, "11.0.0": stateWarning,
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
