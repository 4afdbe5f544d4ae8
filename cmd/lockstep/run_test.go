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
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/lockstep-ft/lockstep/control"
	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader"
)

// What the config says reaches kernel and control.
func TestRunWiring(t *testing.T) {
	c := newCLI(t)
	var got control.Options
	c.control = func(_ context.Context, o control.Options) error {
		got = o
		for _, n := range o.NICs {
			n.Close()
		}
		return nil
	}
	for _, tc := range []struct {
		line  string
		calls []string
		want  control.Options
	}{
		{"run -c @/pair.yaml --node alpha --role primary",
			[]string{"bpffs /sys/fs/bpf/lockstep", "lock web1 alpha", "device tapP", "device peerP", "open 0 tapP peerP", "release"},
			control.Options{Node: "alpha", Peer: "beta", Role: datapath.RolePrimary, QMP: c.dir + "/alpha.qmp", StatusSocket: c.dir + "/run/web1-alpha.sock"}},
		{"run -c @/pair.yaml --node beta --role secondary",
			[]string{"bpffs /sys/fs/bpf/lockstep", "lock web1 beta", "tap tapS br0", "device tapS", "vxlan 7 1400", "open 0 tapS lsx7", "release"},
			control.Options{Node: "beta", Peer: "alpha", Role: datapath.RoleSecondary, StatusSocket: c.dir + "/run/web1-beta.sock"}},
	} {
		c.calls = nil
		code, _, stderr := c.run(t.Context(), tc.line)
		if code != 0 || !slices.Equal(c.calls, tc.calls) {
			t.Errorf("%s: exit %d, %s\ncalls %q\nwant  %q", tc.line, code, stderr, c.calls, tc.calls)
		}
		w := tc.want
		w.VM, w.Control, w.Fresh = "web1", "192.0.2.1:7700", true
		w.OwnAddr, w.PeerAddr = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
		if w.Role == datapath.RoleSecondary {
			w.OwnAddr, w.PeerAddr = w.PeerAddr, w.OwnAddr
		}
		w.Compare.Timeout, w.Compare.CutDelay, w.Compare.MaxConnections = config.DefaultTimeout, config.DefaultCutDelay, config.DefaultMaxConnections
		w.Compare.FastPath = true
		w.Copies.MaxCopies, w.Copies.MaxLarge = maxCopies/2, config.DefaultGSOSlots/2
		w.Compare.Slots, w.Compare.LargeSlots = config.DefaultSlots*3/4, config.DefaultGSOSlots*3/4
		if len(got.ConfigDigest) != 64 {
			t.Errorf("%s: config digest %q, want 32 bytes in hex", tc.line, got.ConfigDigest)
		}
		w.ConfigDigest = got.ConfigDigest
		w.Checkpoint = config.Checkpoint{Period: config.DefaultPeriod, MinInterval: config.DefaultMinInterval, PeriodicAbove: config.DefaultPeriodicAbove, Epoch: config.DefaultEpoch}
		w.Rekey = config.DefaultRekey
		w.Heartbeat = config.Heartbeat{Interval: config.DefaultHeartbeatInterval, Timeout: config.DefaultHeartbeatTimeout,
			Lease: config.DefaultHeartbeatLease, Restart: config.DefaultHeartbeatRestart}
		if diff := cmp.Diff(w, got, cmpopts.IgnoreUnexported(control.Options{}), cmpopts.IgnoreFields(control.Options{}, "NICs", "Log"), cmpopts.EquateComparable(netip.Addr{})); diff != "" || len(got.NICs) != 1 {
			t.Errorf("%s: %d NICs, -want +got\n%s", tc.line, len(got.NICs), diff)
		}
	}
}

// What is refused at the start is refused with its place in the config.
func TestRunRefused(t *testing.T) {
	const alpha, beta = "run -c @/pair.yaml --node alpha --role primary", "run -c @/pair.yaml --node beta --role secondary"
	missing := func(bad string) func(string) (*net.Interface, error) {
		return func(name string) (*net.Interface, error) {
			if name == bad {
				return nil, errors.New("no such network interface")
			}
			return &net.Interface{MTU: 1500}, nil
		}
	}
	for _, tc := range []struct {
		name string
		line string
		set  func(*kernel)
		code int
		want string
	}{
		{"bpffs", alpha, func(k *kernel) { k.checkBPFFS = func(string) error { return errors.New("not a bpffs; mount one") } }, 1,
			"@/pair.yaml:1:1: not a bpffs; mount one"},
		{"locked", alpha, func(k *kernel) {
			k.lock = func(string, string, string) (func(), error) { return nil, errors.New("a daemon runs") }
		}, 1, "lockstep: a daemon runs"},
		{"no tap", alpha, func(k *kernel) { k.device = missing("tapP") }, 1, // it may come later
			"@/pair.yaml:3:51: there is no device \"tapP\": no such network interface; make it first, with `ip tuntap add dev tapP mode tap`, or name the bridge that it is to be in: then lockstep makes it"},
		{"no peer", alpha, func(k *kernel) { k.device = missing("peerP") }, 1,
			"@/pair.yaml:3:72: there is no device \"peerP\": no such network interface; make it first, or have lockstep make a VXLAN: peer: {vxlan: {...}}"},
		{"small underlay", beta, func(k *kernel) {
			k.ensureVXLAN = func(*config.VXLAN, int) (string, error) {
				return "", errors.New("eth1 has MTU 1500; ip link set eth1 mtu 1550")
			}
		}, 1, "@/pair.yaml:4:138: eth1 has MTU 1500; ip link set eth1 mtu 1550"},
		{"managed tap", beta, func(k *kernel) {
			k.open = func(loader.Options) (datapath.NIC, bool, error) {
				return nil, false, errors.New("tapS is managed by vm db1; unload that")
			}
		}, 2, "@/pair.yaml:4:44: tapS is managed by vm db1; unload that"},
		{"verifier", beta, func(k *kernel) {
			k.open = func(loader.Options) (datapath.NIC, bool, error) {
				return nil, false, fmt.Errorf("load ls_mirror: %w", &ebpf.VerifierError{Cause: errors.New("permission denied"), Log: []string{"first", "last"}})
			}
		}, 1, "lockstep: load ls_mirror: : permission denied: last (1 line(s) omitted); --verifier-log prints the whole log"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newCLI(t)
			tc.set(&c.kernel)
			code, _, stderr := c.run(t.Context(), tc.line)
			if code != tc.code || lastLine(stderr) != tc.want {
				t.Errorf("exit %d, want %d\n%s\nwant %s", code, tc.code, stderr, tc.want)
			}
		})
	}
	t.Run("verifier log", func(t *testing.T) {
		c := newCLI(t)
		c.kernel.open = func(loader.Options) (datapath.NIC, bool, error) {
			return nil, false, &ebpf.VerifierError{Cause: errors.New("permission denied"), Log: []string{"first", "last"}}
		}
		if code, _, stderr := c.run(t.Context(), beta+" --verifier-log"); code != 1 || !strings.Contains(stderr, "first\n\tlast\n") {
			t.Errorf("exit %d\n%s", code, stderr)
		}
	})
}

// A pair that could not fail over is refused.
func TestRunUnfit(t *testing.T) {
	for _, tc := range []struct{ more, want string }{
		{"qemu: {memory: 1G}\n", "a pair that lockstep starts has to have an arbiter; name one; {type: none} lets either host transmit when it has lost the other"},
		{"arbiter: {type: none}\nqemu: {memory: 1G, extra: [-device, 'vfio-pci,host=01:10.0']}\n",
			"-device vfio-pci: a device of the host that the guest has to itself (PCI passthrough, SR-IOV) has a state that nothing copies, and as a NIC transmits without lockstep; use an emulated one, for a NIC give the guest a tap in a bridge and list it under nics"},
		{"arbiter: {type: none}\n", "without QEMU's socket no node can take over; describe the guest with qemu, or name its socket with nodes.beta.qmp"},
	} {
		c := newCLI(t)
		c.write(t, "pair.yaml", pairYAML+tc.more)
		code, _, stderr := c.run(t.Context(), "run -c @/pair.yaml --node beta --role secondary")
		if code != exitUsage || !strings.HasSuffix(lastLine(stderr), ": "+tc.want) {
			t.Errorf("%s: exit %d, %s\nwant %s", tc.more, code, stderr, tc.want)
		}
	}
	for _, arbiter := range []string{"", "arbiter: {type: none}\n"} {
		c := newCLI(t)
		c.write(t, "pair.yaml", pairYAML+arbiter)
		code, _, stderr := c.run(t.Context(), "run -c @/pair.yaml --node alpha")
		if code != exitUsage || !strings.HasSuffix(lastLine(stderr), ": nobody keeps which node served last, so this one cannot find out its role by itself; "+
			"name an arbiter (etcd, file or exec), or start each node with its --role, primary or secondary") {
			t.Errorf("%q, without a role: exit %d, %s", arbiter, code, stderr)
		}
	}
}

// A NIC that cannot be opened closes the others.
func TestRunClosesNICs(t *testing.T) {
	c := newCLI(t)
	c.write(t, "two.yaml", strings.NewReplacer(
		"{device: peerP}}", "{device: peerP}}, {tap: tapQ, peer: {device: peerQ}}",
		"eth1}}}", "eth1}}}, {tap: tapT, peer: {device: peerT}}").Replace(pairYAML))
	first := newFakePath()
	c.kernel.open = func(o loader.Options) (datapath.NIC, bool, error) {
		if o.NIC == 0 {
			return first, true, nil
		}
		return nil, false, errors.New("no memory")
	}
	code, _, stderr := c.run(t.Context(), "run -c @/two.yaml --node alpha --role primary")
	if want := "@/two.yaml:3:81: no memory"; code != 2 || lastLine(stderr) != want {
		t.Errorf("exit %d, %q, want 2, %q", code, lastLine(stderr), want)
	}
	select {
	case <-first.closed:
	default:
		t.Error("the first NIC stays open")
	}
}

// The whole program over a kernel that sees no frame: systemd is told, status
// and flows answer, and nobody does afterwards.
func TestDaemon(t *testing.T) {
	c := newCLI(t)
	pid := os.Getpid() // a loopback address of our own
	c.write(t, "pair.yaml", strings.Replace(pairYAML, "192.0.2.1:7700", fmt.Sprintf("127.77.%d.%d:7700", pid>>8&255, pid&255), 1))
	c.control = control.Run
	c.getenv = func(key string) string { return map[string]string{"JOURNAL_STREAM": "8:1"}[key] }
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(c.dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	t.Setenv("NOTIFY_SOCKET", notify.LocalAddr().String())
	heard := func(want string) {
		t.Helper()
		b := make([]byte, 100)
		notify.SetReadDeadline(time.Now().Add(10 * time.Second))
		if n, err := notify.Read(b); err != nil || string(b[:n]) != want {
			t.Errorf("systemd heard %q, %v, want %q", b[:n], err, want)
		}
	}

	// The unit's own command line.
	unit, err := os.ReadFile("../../packaging/lockstep@.service")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(unit), "\nExecStart=/usr/bin/lockstep ")
	line, _, _ := strings.Cut(rest, "\n")
	if !ok || !strings.Contains(string(unit), "\nType=notify\n") {
		t.Fatal("the unit has no ExecStart, or is not of Type=notify")
	}
	// A device that is not there yet is exit code 1 (TestRunRefused), which is tried again without end.
	for _, setting := range []string{"StartLimitIntervalSec=0", "Restart=on-failure", "RestartPreventExitStatus=2"} {
		if !strings.Contains(string(unit), "\n"+setting+"\n") {
			t.Errorf("the unit lacks %s", setting)
		}
	}
	// This pair has no arbiter, which would know the role.
	line = strings.NewReplacer("/etc/lockstep/%i.yaml", "@/pair.yaml", "${NODE}", "alpha", "$OPTIONS", "--role primary").Replace(line)

	ctx, cancel := context.WithCancel(t.Context())
	type result struct {
		code   int
		stderr string
	}
	ended := make(chan result, 1)
	go func() {
		code, _, stderr := c.run(ctx, line)
		ended <- result{code, stderr}
	}()
	heard("READY=1")

	code, stdout, stderr := c.run(t.Context(), "status -c @/pair.yaml --node alpha --json")
	var fields map[string]any
	if err := json.Unmarshal([]byte(stdout), &fields); err != nil || code != 0 || stderr != "" {
		t.Fatalf("status --json: exit %d, stderr %q, %v: %s", code, stderr, err, stdout)
	}
	for _, key := range strings.Fields("vm node role state epoch connections held_packets held_bytes released_packets checkpoints_requested checkpoints_done dropped programs") {
		if _, ok := fields[key]; !ok {
			t.Errorf("status --json lacks %s", key)
		}
	}
	want := map[string]any{"ls_fake": map[string]any{"device": "tapP", "attach": "tcx-ingress"}}
	if diff := cmp.Diff(want, fields["programs"]); diff != "" {
		t.Errorf("programs: -want +got\n%s", diff)
	}
	if code, stdout, stderr := c.run(t.Context(), "status -c @/pair.yaml --node alpha"); code != 0 || !strings.Contains(stdout, "beta, NOT CONNECTED") || !strings.Contains(stdout, "\nINSECURE: ") {
		t.Errorf("status: exit %d, %s%s", code, stdout, stderr)
	}
	if code, stdout, stderr := c.run(t.Context(), "flows -c @/pair.yaml --node alpha --json"); code != 0 || stdout != "[]\n" {
		t.Errorf("flows --json: exit %d, %q, %s", code, stdout, stderr)
	}

	cancel()
	heard("STOPPING=1")
	if r := <-ended; r.code != 0 || strings.Contains(r.stderr, "time=") || !strings.Contains(r.stderr, "the control link is INSECURE") {
		t.Errorf("%s: exit %d, %s", line, r.code, r.stderr)
	}
	if code, _, _ := c.run(t.Context(), "status -c @/pair.yaml --node alpha"); code != exitNoDaemon {
		t.Errorf("status behind the daemon's end: exit %d, want %d", code, exitNoDaemon)
	}
}
