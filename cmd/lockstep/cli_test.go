// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"lockstep/control"
	"lockstep/control/config"
)

const pairYAML = `vm: web1
nodes:
  alpha: {control: "192.0.2.1:7700", nics: [{tap: tapP, peer: {device: peerP}}]}
  beta: {control: "192.0.2.2:7700", nics: [{tap: tapS, peer: {device: peerS}}]}
tls: {insecure: true}
run_dir: run
`

// cli is one call of the program.
type cli struct {
	dir    string // where pair.yaml and the sockets are
	getenv func(string) string
	start  func(startOptions) (daemon, error)
	unload func(*config.Config, *config.Node, bool) error
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
		start: func(startOptions) (daemon, error) {
			t.Error("started")
			return nil, errors.New("not to be started")
		},
		unload: func(*config.Config, *config.Node, bool) error {
			t.Error("unloaded")
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

// run calls the program; "@" in an argument stands for the folder. Output comes
// back with "@" too.
func (c *cli) run(ctx context.Context, args ...string) (code int, stdout, stderr string) {
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "@", c.dir)
	}
	var out, errs bytes.Buffer
	code = run(ctx, env{args: args, stdout: &out, stderr: &errs, getenv: c.getenv, start: c.start, unload: c.unload})
	clean := func(b bytes.Buffer) string { return strings.ReplaceAll(b.String(), c.dir, "@") }
	return code, clean(out), clean(errs)
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
		{"status -c @/bad.yaml --node alpha", 2, "@/bad.yaml:1:1: tls is missing; write `tls: {insecure: true}` to let the control link's session keys travel in the clear\n" +
			"@/bad.yaml:5:1: unknown key \"tsl\"; did you mean \"tls\"?\n"},
		{"run -c @/twice.yaml --node alpha --role primary", 2, "@/twice.yaml:3:51: \"no tap\" cannot be a network device's name; a name has 1 to 15 characters, no blanks, '/' or ':'\n" +
			"@/twice.yaml:5:6: tls.insecure is missing; write `tls: {insecure: true}`: the control link knows no certificates\n" +
			"@/twice.yaml:5:7: unknown key \"secure\"; did you mean \"insecure\"?\n"},
		{"status -c @/pair.yaml --node alpha --jsn", 2, "lockstep: unknown flag: --jsn; `lockstep status --help` lists the flags\n"},
		{"status -c @/pair.yaml --node alpha now", 2, "lockstep: unknown command \"now\" for \"lockstep status\"; `lockstep status --help` shows the usage\n"},
		{"status -c @/pair.yaml --node alpha", 3, "lockstep: no daemon runs for web1 on node alpha (@/run/web1-alpha.sock: no such file or directory); start it with `lockstep run`\n"},
		{"flows -c @/pair.yaml --node beta --json", 3, "lockstep: no daemon runs for web1 on node beta (@/run/web1-beta.sock: no such file or directory); start it with `lockstep run`\n"},
		{"run -c @/pair.yaml --node alpha", 2, "lockstep: role \"\" is neither primary nor secondary; --role says which guest this host begins with\n"},
		{"run -c @/pair.yaml --node alpha --role first", 2, "lockstep: role \"first\" is neither primary nor secondary; --role says which guest this host begins with\n"},
		{"run -c @/pair.yaml --node alpha --role primary --log-level loud", 2, "lockstep: log level \"loud\" is none of debug, info, warn, error\n"},
	} {
		code, stdout, stderr := c.run(t.Context(), strings.Fields(tc.args)...)
		if code != tc.code || stderr != tc.want || stdout != "" {
			t.Errorf("lockstep %s: exit %d, want %d\nstdout %q\nstderr %q\nwant   %q", tc.args, code, tc.code, stdout, stderr, tc.want)
		}
	}
}

func TestHelpAndVersion(t *testing.T) {
	c := newCLI(t)
	code, stdout, _ := c.run(t.Context(), "--help")
	if code != 0 {
		t.Errorf("--help: exit %d", code)
	}
	for _, cmd := range []string{"run", "status", "flows", "unload", "version"} {
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
	var got string
	var fail error
	c.unload = func(cfg *config.Config, n *config.Node, force bool) error {
		got = fmt.Sprintln(cfg.VM, n.Name, force)
		return fail
	}
	if code, _, stderr := c.run(t.Context(), "unload", "-c", "@/pair.yaml", "--node", "beta", "--force"); code != 0 || stderr != "" || got != "web1 beta true\n" {
		t.Errorf("exit %d, unloaded %q, %s", code, got, stderr)
	}
	fail = errors.New("the daemon lives")
	if code, _, stderr := c.run(t.Context(), "unload", "-c", "@/pair.yaml", "--node", "alpha"); code != 1 || stderr != "lockstep: the daemon lives\n" || got != "web1 alpha false\n" {
		t.Errorf("exit %d, unloaded %q, %s", code, got, stderr)
	}
}

// fakeDaemon runs until its context ends, or fail says otherwise.
type fakeDaemon struct {
	running chan struct{}
	fail    chan error
	status  Status
	flows   []Flow
	mu      sync.Mutex
	broken  error // what Status and Flows answer
}

func (d *fakeDaemon) Run(ctx context.Context) error {
	close(d.running)
	select {
	case <-ctx.Done():
		return ctx.Err()
	case err := <-d.fail:
		return err
	}
}

func (d *fakeDaemon) Status() (Status, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.status, d.broken
}

func (d *fakeDaemon) Flows() ([]Flow, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.flows, d.broken
}

func ptr[T any](v T) *T { return &v }

func newFake() *fakeDaemon {
	d := &fakeDaemon{
		running: make(chan struct{}),
		fail:    make(chan error, 1),
		status: Status{
			VM: "web1", Node: "alpha", Role: "primary", State: "replicating", Epoch: 7,
			Connections: 2, HeldPackets: 3, HeldBytes: 4500, ReleasedPackets: 1 << 33,
			CheckpointsRequested: 5, CheckpointsDone: 4,
			Dropped: map[string]uint64{"muted": 2, "no_slot": 9, "shut": 0},
			Programs: []control.Program{
				{Name: "ls_mirror", Device: "tapP", Attach: "tcx-egress"},
				{Name: "ls_pri_out", Device: "tapP", Attach: "tcx-ingress"},
			},
		},
		flows: []Flow{
			{Guest: "10.0.0.2:80", Remote: "10.0.0.9:40000", State: "open", Compared: ptr(uint32(0xfffffff0)), HeldPackets: 2, HeldBytes: 2896, Age: 1.25},
			{Guest: "[fd00::2]:80", Remote: "[fd00::9]:40000", State: "closing", VLAN: ptr(uint16(12)), Offset: ptr(uint32(99))},
		},
	}
	d.status.Peer.Node, d.status.Peer.Connected = "beta", true
	return d
}

// background runs the daemon; the returned function stops it and checks its end.
func (c *cli) background(t *testing.T, d *fakeDaemon) (stop func() (code int, stderr string)) {
	t.Helper()
	c.start = func(startOptions) (daemon, error) { return d, nil }
	ctx, cancel := context.WithCancel(t.Context())
	var code int
	var stderr string
	done := make(chan struct{})
	go func() {
		defer close(done)
		code, _, stderr = c.run(ctx, "run", "-c", "@/pair.yaml", "--node", "alpha", "--role", "primary")
	}()
	t.Cleanup(func() { cancel(); <-done })
	select {
	case <-d.running:
	case <-done:
		t.Fatalf("ended: exit %d, %s", code, stderr)
	}
	return func() (int, string) {
		cancel()
		<-done
		return code, stderr
	}
}

func TestStatus(t *testing.T) {
	c := newCLI(t)
	d := newFake()
	stop := c.background(t, d)

	code, stdout, stderr := c.run(t.Context(), "status", "-c", "@/pair.yaml", "--node", "alpha")
	want := `web1 on alpha:  primary, replicating, epoch 7
peer:           beta, connected
connections:    2
held:           3 packets, 4500 bytes
released:       8589934592 packets
checkpoints:    5 requested, 4 done
dropped:        9 no_slot
                2 muted
programs:       ls_mirror   tapP  tcx-egress
                ls_pri_out  tapP  tcx-ingress
`
	if diff := cmp.Diff(want, stdout); code != 0 || stderr != "" || diff != "" {
		t.Errorf("status: exit %d, stderr %q, -want +got\n%s", code, stderr, diff)
	}

	code, stdout, stderr = c.run(t.Context(), "status", "-c", "@/pair.yaml", "--node", "alpha", "--json")
	var fields map[string]any
	if err := json.Unmarshal([]byte(stdout), &fields); err != nil || code != 0 || stderr != "" {
		t.Fatalf("status --json: exit %d, stderr %q, %v: %s", code, stderr, err, stdout)
	}
	for _, key := range strings.Fields("vm node role state epoch connections held_packets held_bytes released_packets checkpoints_requested checkpoints_done dropped programs") {
		if _, ok := fields[key]; !ok {
			t.Errorf("status --json lacks %s", key)
		}
	}

	code, stdout, stderr = c.run(t.Context(), "flows", "-c", "@/pair.yaml", "--node", "alpha")
	want = `GUEST         REMOTE           VLAN  STATE    OFFSET  COMPARED    HELD      AGE
10.0.0.2:80   10.0.0.9:40000   -     open     -       4294967280  2/2896 B  1.25s
[fd00::2]:80  [fd00::9]:40000  12    closing  99      -           0/0 B     0s
`
	if diff := cmp.Diff(want, stdout); code != 0 || stderr != "" || diff != "" {
		t.Errorf("flows: exit %d, stderr %q, -want +got\n%s", code, stderr, diff)
	}
	code, stdout, _ = c.run(t.Context(), "flows", "-c", "@/pair.yaml", "--node", "alpha", "--json")
	var flows []Flow
	if err := json.Unmarshal([]byte(stdout), &flows); code != 0 || err != nil || cmp.Diff(d.flows, flows) != "" {
		t.Errorf("flows --json: exit %d, %v: %s", code, err, stdout)
	}

	// Nothing dropped, peer gone.
	d.mu.Lock()
	d.status.Peer.Connected, d.status.Dropped = false, nil
	d.mu.Unlock()
	_, stdout, _ = c.run(t.Context(), "status", "-c", "@/pair.yaml", "--node", "alpha")
	for _, want := range []string{"peer:           beta, NOT CONNECTED\n", "dropped:        nothing\n"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("status lacks %q:\n%s", want, stdout)
		}
	}

	d.mu.Lock()
	d.broken = errors.New("map gone")
	d.mu.Unlock()
	if code, _, stderr := c.run(t.Context(), "flows", "-c", "@/pair.yaml", "--node", "alpha"); code != 1 || stderr != "lockstep: the daemon refused to tell its flows: map gone\n" {
		t.Errorf("broken flows: exit %d, %q", code, stderr)
	}

	if code, stderr := stop(); code != 0 {
		t.Errorf("stopped daemon: exit %d, %s", code, stderr)
	}
	if code, _, _ := c.run(t.Context(), "status", "-c", "@/pair.yaml", "--node", "alpha"); code != exitNoDaemon {
		t.Errorf("status behind the daemon's end: exit %d, want %d", code, exitNoDaemon)
	}
}

func TestRunOptions(t *testing.T) {
	c := newCLI(t)
	var got startOptions
	c.start = func(o startOptions) (daemon, error) {
		got = o
		return nil, errors.New("no such tap")
	}
	code, _, stderr := c.run(t.Context(), "run", "-c", "@/pair.yaml", "--node", "beta", "--role", "secondary", "--verifier-log", "--log-level", "debug")
	if code != 1 || stderr != "lockstep: no such tap\n" {
		t.Errorf("exit %d, %q", code, stderr)
	}
	if got.self.Name != "beta" || got.other.Name != "alpha" || got.primary || !got.verifierLog || got.config.VM != "web1" {
		t.Errorf("started with %+v", got)
	}
	c.start = func(o startOptions) (daemon, error) {
		return nil, o.config.Refuse("nodes.beta.nics[0].tap", "device tapS does not exist", "make it first")
	}
	code, _, stderr = c.run(t.Context(), "run", "-c", "@/pair.yaml", "--node", "beta", "--role", "secondary")
	if want := "@/pair.yaml:4:50: device tapS does not exist; make it first\n"; code != 2 || stderr != want {
		t.Errorf("exit %d, %q, want 2, %q", code, stderr, want)
	}
}

func TestDaemonFails(t *testing.T) {
	c := newCLI(t)
	d := newFake()
	d.fail <- errors.New("the tap is gone")
	c.start = func(startOptions) (daemon, error) { return d, nil }
	code, _, stderr := c.run(t.Context(), "run", "-c", "@/pair.yaml", "--node", "alpha", "--role", "primary")
	if code != 1 || !strings.HasSuffix(stderr, "lockstep: the tap is gone\n") {
		t.Errorf("exit %d, %s", code, stderr)
	}
}

// A second daemon leaves the first one's socket alone; a dead one's is replaced.
func TestSocket(t *testing.T) {
	c := newCLI(t)
	stop := c.background(t, newFake())
	second := newFake()
	c.start = func(startOptions) (daemon, error) { return second, nil }
	code, _, stderr := c.run(t.Context(), "run", "-c", "@/pair.yaml", "--node", "alpha", "--role", "primary")
	if want := "lockstep: a daemon already answers for web1 on node alpha (@/run/web1-alpha.sock); stop it first"; code != 1 || !strings.HasPrefix(stderr, want) {
		t.Errorf("second daemon: exit %d, %s", code, stderr)
	}
	select {
	case <-second.running:
	default:
		t.Error("the second daemon was not given back")
	}
	if code, _, _ := c.run(t.Context(), "status", "-c", "@/pair.yaml", "--node", "alpha"); code != 0 {
		t.Errorf("status of the first daemon: exit %d", code)
	}
	stop()

	path := filepath.Join(c.dir, "run", "web1-alpha.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if code, _, stderr := c.run(t.Context(), "status", "-c", "@/pair.yaml", "--node", "alpha"); code != exitNoDaemon || !strings.Contains(stderr, "connection refused") {
		t.Errorf("status on a dead socket: exit %d, %s", code, stderr)
	}
	stop = c.background(t, newFake())
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", info, err)
	}
	if code, _, stderr := c.run(t.Context(), "status", "-c", "@/pair.yaml", "--node", "alpha"); code != 0 {
		t.Errorf("status: exit %d, %s", code, stderr)
	}
	stop()
}

// The unit's command is one that the program takes, and the program tells
// systemd when it is ready.
func TestUnit(t *testing.T) {
	unit, err := os.ReadFile("../../packaging/lockstep@.service")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(unit), "\nExecStart=/usr/bin/lockstep ")
	line, _, _ := strings.Cut(rest, "\n")
	if !ok || !strings.Contains(string(unit), "\nType=notify\n") {
		t.Fatal("no ExecStart, or no Type=notify")
	}
	c := newCLI(t)
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(c.dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	t.Setenv("NOTIFY_SOCKET", notify.LocalAddr().String())
	d := newFake()
	d.fail <- nil
	c.start = func(startOptions) (daemon, error) { return d, nil }
	c.getenv = func(key string) string { return map[string]string{"JOURNAL_STREAM": "8:1"}[key] }
	args := strings.NewReplacer("/etc/lockstep/%i.yaml", "@/pair.yaml", "${NODE}", "alpha", "${ROLE}", "primary").Replace(line)
	code, _, stderr := c.run(t.Context(), strings.Fields(args)...)
	if code != 0 || strings.Contains(stderr, "time=") || !strings.Contains(stderr, "msg=running") {
		t.Errorf("%s: exit %d, %s", args, code, stderr)
	}
	for _, want := range []string{"READY=1", "STOPPING=1"} {
		b := make([]byte, 100)
		n, err := notify.Read(b)
		if err != nil || string(b[:n]) != want {
			t.Errorf("systemd heard %q, %v, want %q", b[:n], err, want)
		}
	}
}
