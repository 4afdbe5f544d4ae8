// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/cmd/lockstep/doctor"
	"github.com/lockstep-ft/lockstep/control"
	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader"
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
	examine func(context.Context, *config.Config, string) doctor.Report
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
		ensureTap: func(tap, bridge string, queues int) error {
			call("tap %s %s", tap, bridge)
			return nil
		},
		checkQueues: func(string, string, int) error { return nil },
		removeTap: func(tap string) error {
			call("remove tap %s", tap)
			return nil
		},
		inUse: func(string) (bool, error) { return false, nil },
		mute: func(tap string) error {
			call("mute %s", tap)
			return nil
		},
		upgradable: func(o loader.Options) (string, error) {
			call("upgradable %d %s", o.NIC, o.Tap)
			return "v1.2", nil
		},
		open: func(o loader.Options) (datapath.NIC, bool, error) {
			call("open %d %s %s", o.NIC, o.Tap, o.PeerDevice)
			return newFakePath(), true, nil
		},
		found: func(loader.Options) (datapath.Pinned, error) { return datapath.Pinned{}, nil },
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
	code = run(ctx, env{args: args, stdout: &out, stderr: &errs, getenv: c.getenv, kernel: c.kernel, examine: c.examine, control: c.control})
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
		{"run -c @/pair.yaml --node alpha --role first", 2, "lockstep: role \"first\" is none of auto, primary, secondary\n"},
		{"start -c @/pair.yaml --node alpha --force", 2, "lockstep: --force goes with --here: without, start forces nothing\n"},
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

// Each command that reads a config warns of a key by an old name, on stderr alone.
func TestOldNames(t *testing.T) {
	c := newCLI(t)
	c.write(t, "pair.yaml", pairYAML+"heartbeat: {speak: 300ms}\n")
	c.control = func(_ context.Context, o control.Options) error {
		if o.Heartbeat.Lease != 300*time.Millisecond {
			t.Errorf("the lease is %v, want 300ms", o.Heartbeat.Lease)
		}
		return o.NICs[0].Close()
	}
	c.examine = func(context.Context, *config.Config, string) doctor.Report { return doctor.Report{CanRun: true} }
	const want = "@/pair.yaml:7:13: warning: heartbeat.speak is called heartbeat.lease now; rename it: the next release does not read the old name\n"
	for _, line := range []string{
		"run -c @/pair.yaml --node alpha --role primary", "status -c @/pair.yaml --node alpha", "upgrade -c @/pair.yaml --node alpha",
		"doctor -c @/pair.yaml", "keys -c @/pair.yaml -d @/certs", "events -c @/pair.yaml --node alpha", "unload -c @/pair.yaml --node alpha",
	} {
		if _, stdout, stderr := c.run(t.Context(), line); !strings.HasPrefix(stderr, want) || strings.Contains(stdout, "warning") {
			t.Errorf("%s: %q, %q", line, stdout, stderr)
		}
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
	code, version, _ := c.run(t.Context(), "version")
	if code != 0 || !strings.HasPrefix(version, "lockstep ") || len(version) < len("lockstep x\n") {
		t.Errorf("version: exit %d, %q", code, version)
	}
	if code, stdout, _ := c.run(t.Context(), "--version"); code != 0 || stdout != version {
		t.Errorf("--version: exit %d, %q, want %q", code, stdout, version)
	}
}
