// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
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

	"lockstep/compare"
	"lockstep/control"
	"lockstep/control/arbiter"
	"lockstep/control/config"
	"lockstep/control/journal"
)

const pairYAML = `vm: web1
nodes:
  alpha: {control: "192.0.2.1:7700", nics: [{tap: tapP, peer: {device: peerP}}], qmp: alpha.qmp}
  beta: {control: "192.0.2.2:7700", nics: [{tap: tapS, bridge: br0, peer: {vxlan: {id: 7, local: 192.0.2.2, remote: 192.0.2.1, underlay: eth1}}}]}
tls: {insecure: true}
run_dir: run
`

// cli is one call of the program, in a host whose devices all exist.
type cli struct {
	dir     string // where pair.yaml and the sockets are
	getenv  func(string) string
	kernel  kernel
	machine machine
	control func(context.Context, control.Options) error
	calls   []string // of the kernel's
}

func newCLI(t *testing.T) *cli {
	t.Helper()
	// A short folder: t.TempDir names it after the test, and socket paths are short.
	dir, err := os.MkdirTemp("", "ls")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	c := &cli{
		dir:    dir,
		getenv: func(string) string { return "" },
		control: func(context.Context, control.Options) error {
			t.Error("control runs")
			return nil
		},
	}
	call := func(format string, a ...any) { c.calls = append(c.calls, fmt.Sprintf(format, a...)) }
	c.kernel = kernel{
		checkBPFFS: func(dir string) error {
			call("bpffs %s", dir)
			return nil
		},
		lock: func(_, vm, node string) (func(), error) {
			call("lock %s %s", vm, node)
			return func() { call("release") }, nil
		},
		device: func(name string) (*net.Interface, error) {
			call("device %s", name)
			return &net.Interface{Name: name, MTU: 1400}, nil
		},
		ensureVXLAN: func(v *config.VXLAN, mtu int) (string, error) {
			call("vxlan %d %d", v.ID, mtu)
			return v.Device(), nil
		},
		removeVXLAN: func(device string) error {
			call("remove %s", device)
			return nil
		},
		ensureTap: func(tap, bridge string) error {
			call("tap %s %s", tap, bridge)
			return nil
		},
		removeTap: func(tap string) error {
			call("remove tap %s", tap)
			return nil
		},
		inUse: func(string) (bool, error) { return false, nil },
		mute: func(tap string) error {
			call("mute %s", tap)
			return nil
		},
		upgradable: func(o nicOptions) (string, error) {
			call("upgradable %d %s", o.index, o.tap)
			return "v1.2", nil
		},
		open: func(o nicOptions) (control.DataPath, bool, error) {
			call("open %d %s %s", o.index, o.tap, o.peer)
			return newFakePath(), true, nil
		},
		found: func(nicOptions) (control.Found, error) { return control.Found{}, nil },
		unload: func(_, vm, node string, force bool) error {
			call("unload %s %s %v", vm, node, force)
			return nil
		},
		letGo: func(_, vm, node string, force bool) error {
			call("let go %s %s %v", vm, node, force)
			return nil
		},
	}
	c.write(t, "pair.yaml", pairYAML)
	return c
}

func (c *cli) write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(c.dir, name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// run calls the program; "@" in the command line stands for the folder, in the
// output too.
func (c *cli) run(ctx context.Context, line string) (code int, stdout, stderr string) {
	args := strings.Fields(strings.ReplaceAll(line, "@", c.dir))
	var out, errs bytes.Buffer
	code = run(ctx, env{args: args, stdout: &out, stderr: &errs, getenv: c.getenv, kernel: c.kernel, machine: c.machine, control: c.control})
	clean := func(b bytes.Buffer) string { return strings.ReplaceAll(b.String(), c.dir, "@") }
	return code, clean(out), clean(errs)
}

// lastLine is what the program says in the end, behind its log.
func lastLine(s string) string {
	s = strings.TrimRight(s, "\n")
	return s[strings.LastIndexByte(s, '\n')+1:]
}

func TestMistakes(t *testing.T) {
	c := newCLI(t)
	c.write(t, "bad.yaml", strings.ReplaceAll(pairYAML, "tls:", "tsl:"))
	c.write(t, "twice.yaml", strings.ReplaceAll(strings.ReplaceAll(pairYAML, "tapP", "no tap"), "insecure", "secure"))
	for _, tc := range []struct {
		args string
		code int
		want string
	}{
		{"", 2, "lockstep: which command? `lockstep --help` lists them\n"},
		{"rum", 2, "lockstep: unknown command \"rum\" for \"lockstep\"; `lockstep --help` shows the usage\n"},
		{"status", 2, "lockstep: which pair? Name its config file with -c\n"},
		{"status -c @/pair.yaml", 2, "lockstep: which of the hosts in @/pair.yaml is this one? Name it with --node\n"},
		{"status -c @/pair.yaml --node gamma", 2, "lockstep: @/pair.yaml has no node \"gamma\"; it has \"alpha\" and \"beta\"\n"},
		{"status -c @/none.yaml --node alpha", 2, "lockstep: read config: open @/none.yaml: no such file or directory\n"},
		{"status -c @/bad.yaml --node alpha", 2, "@/bad.yaml:1:1: tls is missing; name the files that `lockstep keys` makes (ca, cert, key), or write `tls: {insecure: true}` to let session keys travel in the clear\n" +
			"@/bad.yaml:5:1: unknown key \"tsl\"; did you mean \"tls\"?\n"},
		{"run -c @/twice.yaml --node alpha --role primary", 2, "@/twice.yaml:3:51: \"no tap\" cannot be a network device's name; a name has 1 to 15 characters, no blanks, '/' or ':'\n" +
			"@/twice.yaml:5:7: unknown key \"secure\"; did you mean \"insecure\"?\n"},
		{"status -c @/pair.yaml --node alpha --jsn", 2, "lockstep: unknown flag: --jsn; `lockstep status --help` lists the flags\n"},
		{"status -c @/pair.yaml --node alpha now", 2, "lockstep: unknown command \"now\" for \"lockstep status\"; `lockstep status --help` shows the usage\n"},
		{"status -c @/pair.yaml --node alpha", 3, "lockstep: no daemon of web1 runs on node alpha (nobody answers on @/run/web1-alpha.sock); start it with `lockstep run`\n"},
		{"flows -c @/pair.yaml --node beta --json", 3, "lockstep: no daemon of web1 runs on node beta (nobody answers on @/run/web1-beta.sock); start it with `lockstep run`\n"},
		{"keys -d @/certs", 2, "lockstep: which pair? Name its config file with -c\n"},
		{"keys -c @/pair.yaml", 2, "lockstep: where to? Name the certificates' folder with -d\n"},
		{"keys -c @/bad.yaml -d @/certs", 2, "@/bad.yaml:1:1: tls is missing; name the files that `lockstep keys` makes (ca, cert, key), or write `tls: {insecure: true}` to let session keys travel in the clear\n" +
			"@/bad.yaml:5:1: unknown key \"tsl\"; did you mean \"tls\"?\n"},
		{"run -c @/pair.yaml --node alpha", 2, "lockstep: role \"\" is neither primary nor secondary; --role says which guest this host begins with\n"},
		{"run -c @/pair.yaml --node alpha --role first", 2, "lockstep: role \"first\" is neither primary nor secondary; --role says which guest this host begins with\n"},
		{"run -c @/pair.yaml --node alpha --role primary --log-level loud", 2, "lockstep: log level \"loud\" is none of debug, info, warn, error\n"},
	} {
		code, stdout, stderr := c.run(t.Context(), tc.args)
		if code != tc.code || stderr != tc.want || stdout != "" {
			t.Errorf("lockstep %s: exit %d, want %d\nstdout %q\nstderr %q\nwant   %q", tc.args, code, tc.code, stdout, stderr, tc.want)
		}
	}
	if len(c.calls) > 0 {
		t.Errorf("the kernel was asked for %v", c.calls)
	}
}

func TestHelpAndVersion(t *testing.T) {
	c := newCLI(t)
	code, stdout, _ := c.run(t.Context(), "--help")
	if code != 0 {
		t.Errorf("--help: exit %d", code)
	}
	for _, cmd := range []string{"run", "status", "flows", "upgrade", "unload", "doctor", "keys", "version"} {
		if !strings.Contains(stdout, "\n  "+cmd+" ") {
			t.Errorf("--help does not list %s", cmd)
		}
	}
	if code, stdout, _ := c.run(t.Context(), "version"); code != 0 || !strings.HasPrefix(stdout, "lockstep ") || len(stdout) < len("lockstep x\n") {
		t.Errorf("version: exit %d, %q", code, stdout)
	}
}

func TestUnload(t *testing.T) {
	c := newCLI(t)
	if code, _, stderr := c.run(t.Context(), "unload -c @/pair.yaml --node beta --force"); code != 0 || stderr != "" {
		t.Errorf("exit %d, %s", code, stderr)
	}
	if want := []string{"mute tapS", "unload web1 beta true", "remove lsx7", "remove tap tapS"}; !slices.Equal(c.calls, want) {
		t.Errorf("%v, want %v", c.calls, want)
	}
	c.kernel.unload = func(string, string, string, bool) error { return errors.New("the daemon lives; stop it first") }
	if code, _, stderr := c.run(t.Context(), "unload -c @/pair.yaml --node alpha"); code != 1 || stderr != "lockstep: the daemon lives; stop it first\n" {
		t.Errorf("exit %d, %s", code, stderr)
	}
}

// TestUnloadRunning: a guest that runs is not let loose, but where the arbiter says that
// it alone speaks.
func TestUnloadRunning(t *testing.T) {
	alone, holds := control.Found{Role: control.RolePrimary, Mode: control.ModeSolo}, control.Found{Role: control.RolePrimary, Mode: control.ModeHold}
	for name, x := range map[string]struct {
		arbiter  string // config
		record   string // of the arbiter
		found    control.Found
		foundErr error
		goesOn   bool
		says     string
	}{
		"no arbiter, primary":      {found: holds, goesOn: true, says: "nothing compares"},
		"no arbiter, secondary":    {found: control.Found{Role: control.RoleSecondary, Mode: control.ModeRun}, says: "not the primary's"},
		"alone":                    {arbiter: "exec", record: "3 beta", found: alone, goesOn: true, says: "has this node speak"},
		"another speaks":           {arbiter: "exec", record: "4 alpha", found: alone, says: "does not have this node speak"},
		"replicates":               {arbiter: "exec", record: "3 beta", found: holds, says: "did not speak alone"},
		"the arbiter is silent":    {arbiter: "exec", record: "", found: alone, says: "does not tell who may speak"},
		"no tables":                {arbiter: "exec", record: "3 beta", says: "did not speak alone"},
		"tables of another config": {arbiter: "exec", record: "3 beta", foundErr: errors.New("another ABI"), says: "another ABI"},
		"nobody keeps a record":    {arbiter: "none", found: alone, says: "does not have this node speak"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCLI(t)
			yaml := pairYAML
			switch x.arbiter {
			case "exec":
				c.write(t, "fence", "#!/bin/sh\necho "+x.record+"\n")
				if err := os.Chmod(filepath.Join(c.dir, "fence"), 0o700); err != nil {
					t.Fatal(err)
				}
				yaml = pairYAML + "arbiter: {type: exec, command: [" + filepath.Join(c.dir, "fence") + "]}\n"
			case "none":
				yaml += "arbiter: {type: none}\n"
			}
			c.write(t, "pair.yaml", yaml)
			c.kernel.inUse = func(tap string) (bool, error) { return tap == "tapS", nil }
			c.kernel.found = func(nicOptions) (control.Found, error) { return x.found, x.foundErr }
			code, _, stderr := c.run(t.Context(), "unload -c @/pair.yaml --node beta")
			if code != 1 || len(c.calls) > 0 || !strings.Contains(stderr, "a process has tap tapS open") || !strings.Contains(stderr, "Changing a setting") {
				t.Errorf("without --force: exit %d, %v, %s", code, c.calls, stderr)
			}
			code, stdout, stderr := c.run(t.Context(), "unload -c @/pair.yaml --node beta --force")
			want := []string{"mute tapS", "unload web1 beta true", "remove lsx7", "remove tap tapS"}
			if x.goesOn {
				want = []string{"let go web1 beta true", "remove lsx7", "remove tap tapS"}
			}
			if code != 0 || !slices.Equal(c.calls, want) || !strings.Contains(stderr, x.says) || strings.Contains(stdout, "is muted") == x.goesOn {
				t.Errorf("exit %d, %v\n%s%s", code, c.calls, stdout, stderr)
			}
			// Nobody knows whether a guest runs.
			c.calls = nil
			c.kernel.inUse = func(string) (bool, error) { return false, errors.New("no netlink") }
			if code, _, stderr := c.run(t.Context(), "unload -c @/pair.yaml --node beta --force"); code != 1 || len(c.calls) > 0 || !strings.Contains(stderr, "is not known: no netlink") {
				t.Errorf("exit %d, %v, %s", code, c.calls, stderr)
			}
		})
	}
	// What cannot be muted keeps its programs.
	c := newCLI(t)
	c.kernel.mute = func(string) error { return errors.New("not permitted") }
	if code, _, stderr := c.run(t.Context(), "unload -c @/pair.yaml --node beta --force"); code != 1 || len(c.calls) > 0 || !strings.Contains(stderr, "not permitted") {
		t.Errorf("exit %d, %v, %s", code, c.calls, stderr)
	}
}

func TestUpgrade(t *testing.T) {
	c := newCLI(t)
	code, stdout, stderr := c.run(t.Context(), "upgrade -c @/pair.yaml --node alpha")
	if code != 0 || stderr != "" || !slices.Equal(c.calls, []string{"upgradable 0 tapP"}) {
		t.Errorf("exit %d, %s, calls %q", code, stderr, c.calls)
	}
	for _, want := range []string{"can take over web1 on alpha from lockstep v1.2", "Next: restart the daemon", "at most 7s"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("%q does not say %q", stdout, want)
		}
	}
	c.kernel.upgradable = func(nicOptions) (string, error) {
		return "", errors.New("pinned by v1.2 with ABI 1; this is v1.3 with ABI 2")
	}
	code, stdout, stderr = c.run(t.Context(), "upgrade -c @/pair.yaml --node beta")
	if code != 1 || stdout != "" || stderr != "lockstep: nic 0: pinned by v1.2 with ABI 1; this is v1.3 with ABI 2\n" {
		t.Errorf("exit %d, %q, %q", code, stdout, stderr)
	}
}

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
			control.Options{Node: "alpha", Peer: "beta", Role: control.RolePrimary, QMP: c.dir + "/alpha.qmp", StatusSocket: c.dir + "/run/web1-alpha.sock"}},
		{"run -c @/pair.yaml --node beta --role secondary",
			[]string{"bpffs /sys/fs/bpf/lockstep", "lock web1 beta", "tap tapS br0", "device tapS", "vxlan 7 1400", "open 0 tapS lsx7", "release"},
			control.Options{Node: "beta", Peer: "alpha", Role: control.RoleSecondary, StatusSocket: c.dir + "/run/web1-beta.sock"}},
	} {
		c.calls = nil
		code, _, stderr := c.run(t.Context(), tc.line)
		if code != 0 || !slices.Equal(c.calls, tc.calls) {
			t.Errorf("%s: exit %d, %s\ncalls %q\nwant  %q", tc.line, code, stderr, c.calls, tc.calls)
		}
		w := tc.want
		w.VM, w.Control, w.Fresh = "web1", "192.0.2.1:7700", true
		w.OwnAddr, w.PeerAddr = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
		if w.Role == control.RoleSecondary {
			w.OwnAddr, w.PeerAddr = w.PeerAddr, w.OwnAddr
		}
		w.Compare.Timeout, w.Compare.CutDelay, w.Compare.MaxConnections = config.DefaultTimeout, config.DefaultCutDelay, config.DefaultMaxConnections
		w.Compare.KeepYoung, w.Copies.MaxCopies = true, maxCopies/2
		w.Compare.Slots, w.Compare.LargeSlots = config.DefaultSlots*3/4, config.DefaultGSOSlots*3/4
		if len(got.ConfigDigest) != 64 {
			t.Errorf("%s: config digest %q, want 32 bytes in hex", tc.line, got.ConfigDigest)
		}
		w.ConfigDigest = got.ConfigDigest
		w.Period, w.MinInterval = config.DefaultPeriod, config.DefaultMinInterval
		w.Rekey, w.EchoEvery, w.SpeakFor = config.DefaultRekey, config.DefaultHeartbeatInterval, config.DefaultHeartbeatSpeak
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
			k.open = func(nicOptions) (control.DataPath, bool, error) {
				return nil, false, errors.New("tapS is managed by vm db1; unload that")
			}
		}, 2, "@/pair.yaml:4:44: tapS is managed by vm db1; unload that"},
		{"verifier", beta, func(k *kernel) {
			k.open = func(nicOptions) (control.DataPath, bool, error) {
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
		c.kernel.open = func(nicOptions) (control.DataPath, bool, error) {
			return nil, false, &ebpf.VerifierError{Cause: errors.New("permission denied"), Log: []string{"first", "last"}}
		}
		if code, _, stderr := c.run(t.Context(), beta+" --verifier-log"); code != 1 || !strings.Contains(stderr, "first\n\tlast\n") {
			t.Errorf("exit %d\n%s", code, stderr)
		}
	})
}

// A node's parts in a pair's life follow each other, as the arbiter's record says.
func TestRunLife(t *testing.T) {
	c := newCLI(t)
	dir := t.TempDir()
	c.write(t, "life.yaml", pairYAML+"arbiter: {type: file, path: "+dir+"}\nstate_dir: state\n")
	var parts []string
	ends := []error{control.ErrAfresh, control.ErrPromoted, control.ErrFenced}
	c.control = func(_ context.Context, o control.Options) error {
		b := o.Life.Begin
		parts = append(parts, fmt.Sprintf("%s %s discard=%v", o.Role, b.Record, b.Discard))
		for _, n := range o.NICs {
			n.Close()
		}
		err := ends[0]
		if ends = ends[1:]; errors.Is(err, control.ErrPromoted) {
			// It won the arbiter before.
			rec := arbiter.Record{Term: 2, Speaker: "alpha"}
			if _, won, err := o.Life.Arbiter.Swap(t.Context(), b.Record, rec); !won || err != nil {
				t.Errorf("swap: %v, %v", won, err)
			}
		}
		return err
	}
	// The first to be primary has the record name it.
	run := func(line string, wantCode int, says string, want ...string) {
		t.Helper()
		parts = nil
		code, _, stderr := c.run(t.Context(), "run -c @/life.yaml "+line)
		if code != wantCode || !strings.Contains(lastLine(stderr), says) || !slices.Equal(parts, want) {
			t.Errorf("%s: exit %d, parts %q\nwant %d, %q\n%s", line, code, parts, wantCode, want, stderr)
		}
	}
	ends = []error{control.ErrFenced}
	c.write(t, "life.yaml", strings.Replace(pairYAML, "beta: {", "beta: {qmp: b.qmp, ", 1)+"arbiter: {type: file, path: "+dir+"}\nstate_dir: state\n")
	run("--node beta --role primary", 1, "does not speak for the guest any more", `primary term 1, speaker beta discard=true`)
	ends = []error{control.ErrAfresh, control.ErrPromoted, control.ErrFenced}
	run("--node alpha --role secondary", 1, "does not speak",
		"secondary term 1, speaker beta discard=true", "secondary term 1, speaker beta discard=true", "primary term 2, speaker alpha discard=true")
	run("--node beta --role primary", exitUsage, "beta is not primary any more: alpha speaks for the guest (term 2, speaker alpha)")
	ends = []error{control.ErrFenced}
	run("--node alpha --role secondary", 1, "does not speak", "primary term 2, speaker alpha discard=true")

	// When a daemon began, and why it ended, is in the journal.
	events, err := journal.Read(filepath.Join(c.dir, "state"), "web1", "alpha", 0)
	if err != nil {
		t.Fatal(err)
	}
	var daemon []string
	for _, e := range events {
		if e.Kind == journal.Daemon {
			daemon = append(daemon, e.Cause)
		}
	}
	ended := "ended: " + control.ErrFenced.Error()
	if want := []string{"started", ended, "started", ended}; !slices.Equal(daemon, want) {
		t.Errorf("daemon events %q, want %q", daemon, want)
	}
}

// A pair that could not fail over is refused.
func TestRunUnfit(t *testing.T) {
	for _, tc := range []struct{ more, want string }{
		{"qemu: {memory: 1G}\n", "a pair that lockstep starts has to have an arbiter; name one; {type: none} lets either host speak when it has lost the other"},
		{"arbiter: {type: none}\nqemu: {memory: 1G, extra: [-device, 'vfio-pci,host=01:10.0']}\n",
			"-device vfio-pci: a device of the host that the guest has to itself (PCI passthrough, SR-IOV) has a state that nothing copies, and as a NIC speaks past lockstep; use an emulated one, for a NIC give the guest a tap in a bridge and list it under nics"},
		{"arbiter: {type: none}\n", "without QEMU's socket nobody can take over; describe the guest with qemu, or name its socket with nodes.beta.qmp"},
	} {
		c := newCLI(t)
		c.write(t, "pair.yaml", pairYAML+tc.more)
		code, _, stderr := c.run(t.Context(), "run -c @/pair.yaml --node beta --role secondary")
		if code != exitUsage || !strings.HasSuffix(lastLine(stderr), ": "+tc.want) {
			t.Errorf("%s: exit %d, %s\nwant %s", tc.more, code, stderr, tc.want)
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
	c.kernel.open = func(o nicOptions) (control.DataPath, bool, error) {
		if o.index == 0 {
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

func ptr[T any](v T) *T { return &v }

func TestPrintStatus(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.Local)
	s := control.Status{
		VM: "web1", Node: "alpha", Role: "primary", State: "checkpointing", Detail: "the PVM stopped unasked", Epoch: 7,
		Connections: 2, HeldPackets: 3, HeldBytes: 4500, ReleasedPackets: 1 << 33,
		CheckpointsRequested: 5, CheckpointsDone: 4,
		Dropped: map[string]uint64{"muted": 2, "no_slot": 9, "shut": 0},
		Programs: map[string]control.ProgramStatus{
			"ls_mirror":  {Device: "tapP", Attach: "tcx-egress"},
			"ls_pri_out": {Device: "tapP", Attach: "tcx-ingress"},
		},
		Peer:   control.PeerStatus{Node: "beta", Connected: true, Since: at},
		QMP:    control.QMPStatus{Configured: true, Connected: true, Since: at, State: "running"},
		Causes: []control.Cause{{At: at, Reason: "payload differs", Flow: "10.0.0.2:80>10.0.0.9:40000"}, {At: at, Reason: "timeout"}},
	}
	var out bytes.Buffer
	if err := printStatus(&out, s); err != nil {
		t.Fatal(err)
	}
	want := `web1 on alpha:  primary, checkpointing, epoch 7: the PVM stopped unasked
peer:           beta, connected since 2026-01-02 03:04:05
qemu:           connected since 2026-01-02 03:04:05: running
connections:    2
held:           3 packets, 4500 bytes
released:       8589934592 packets
checkpoints:    5 requested, 4 done
last causes:    03:04:05 payload differs 10.0.0.2:80>10.0.0.9:40000
                03:04:05 timeout 
dropped:        9 no_slot
                2 muted
programs:       ls_mirror   tapP  tcx-egress
                ls_pri_out  tapP  tcx-ingress
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}

	out.Reset()
	s.Peer.Connected, s.Peer.Insecure, s.Dropped, s.QMP = false, true, nil, control.QMPStatus{}
	s.Peer.Error = "connection refused"
	if err := printStatus(&out, s); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"peer:           beta, NOT CONNECTED since 2026-01-02 03:04:05: connection refused\n",
		"INSECURE:       the control link is not protected (tls: {insecure: true}); `lockstep keys` makes certificates\n",
		"qemu:           no qmp socket in the config\n", "dropped:        nothing\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}

func TestPrintFlows(t *testing.T) {
	var out bytes.Buffer
	err := printFlows(&out, []control.Flow{
		{Guest: "10.0.0.2:80", Remote: "10.0.0.9:40000", State: "open", Compared: ptr(uint32(0xfffffff0)), HeldPackets: 2, HeldBytes: 2896, Age: 1.25},
		{Guest: "[fd00::2]:80", Remote: "[fd00::9]:40000", State: "closing", VLAN: ptr(uint16(12)), Offset: ptr(uint32(99))},
	})
	want := `GUEST         REMOTE           VLAN  STATE    OFFSET  COMPARED    HELD      AGE
10.0.0.2:80   10.0.0.9:40000   -     open     -       4294967280  2/2896 B  1.25s
[fd00::2]:80  [fd00::9]:40000  12    closing  99      -           0/0 B     0s
`
	if diff := cmp.Diff(want, out.String()); err != nil || diff != "" {
		t.Errorf("%v, -want +got\n%s", err, diff)
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
	line = strings.NewReplacer("/etc/lockstep/%i.yaml", "@/pair.yaml", "${NODE}", "alpha", "${ROLE}", "primary").Replace(line)

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

// fakePath is a data path without frames.
type fakePath struct {
	wake, closed chan struct{}
}

func newFakePath() *fakePath {
	return &fakePath{wake: make(chan struct{}, 1), closed: make(chan struct{})}
}

func (p *fakePath) Poll(wait time.Duration, evs []compare.Event) ([]compare.Event, error) {
	select {
	case <-p.wake:
	case <-time.After(wait):
	}
	return evs, nil
}

func (p *fakePath) Wake() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (p *fakePath) Close() error {
	close(p.closed)
	return nil
}

func (p *fakePath) Programs() []control.Program {
	return []control.Program{{Name: "ls_fake", Device: "tapP", Attach: "tcx-ingress"}}
}

func (p *fakePath) Now() int64                                        { return time.Now().UnixNano() }
func (p *fakePath) MAC() net.HardwareAddr                             { return net.HardwareAddr{2, 0, 0, 0, 0, 1} }
func (p *fakePath) Apply([]compare.Effect) error                      { return nil }
func (p *fakePath) SetMode(control.Mode) error                        { return nil }
func (p *fakePath) SetEpoch(uint32) error                             { return nil }
func (p *fakePath) SetSpeakUntil(int64) error                         { return nil }
func (p *fakePath) SetSpeakFor(time.Duration) error                   { return nil }
func (p *fakePath) Echo() error                                       { return nil }
func (p *fakePath) Echoed() int64                                     { return 0 }
func (p *fakePath) TakeOver(uint32) error                             { return nil }
func (p *fakePath) Edges() ([]control.Edge, error)                    { return nil, nil }
func (p *fakePath) AddEdges([]control.Edge) error                     { return nil }
func (p *fakePath) Mark() error                                       { return nil }
func (p *fakePath) InstallSession(control.Session) error              { return nil }
func (p *fakePath) ResetOffsets() error                               { return nil }
func (p *fakePath) Sweep(_, _ time.Duration) (int, error)             { return 0, nil }
func (p *fakePath) DrainTap(context.Context) error                    { return nil }
func (p *fakePath) Counters() (map[string]uint64, error)              { return map[string]uint64{}, nil }
func (p *fakePath) Offsets(func(compare.Tuple, control.Offset)) error { return nil }
func (p *fakePath) Adopted() *control.Adopted                         { return nil }
func (p *fakePath) CheckOrder() (string, bool, error)                 { return "", false, nil }
func (p *fakePath) SetTap(bool) error                                 { return nil }
func (p *fakePath) Acked(compare.Tuple) (uint32, bool)                { return 0, false }
