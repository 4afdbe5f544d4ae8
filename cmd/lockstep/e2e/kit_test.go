// SPDX-License-Identifier: Apache-2.0

// Package e2e tests lockstep as it is run: the built binary on two hosts, which are
// network namespaces, with guests that are namespaces too or QEMUs.
package e2e

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/loader"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// The test binary is also the guests' service and other processes of the tests, as this
// variable names them.
const actAs = "LOCKSTEP_TEST_ACT_AS"

func TestMain(m *testing.M) {
	switch as := os.Getenv(actAs); {
	case as == "real services":
		serveReal()
	case strings.HasPrefix(as, "guest"):
		serveGuest(as)
	case strings.HasPrefix(as, "held "):
		serveHeld(strings.TrimPrefix(as, "held "))
	case strings.HasPrefix(as, "hold "):
		holdOpen(strings.TrimPrefix(as, "hold "))
	case strings.HasPrefix(as, "dial "):
		fetch(strings.TrimPrefix(as, "dial "))
	default:
		code := m.Run()
		os.RemoveAll(binaries.dir)
		os.Exit(code)
	}
}

// exitUsage is lockstep's exit code for a command line or config that is wrong.
const exitUsage = 2

// binaries are the builds of lockstep that the tests run, made when they are needed.
var binaries struct {
	sync.Mutex
	dir     string
	without map[loader.Mutation]string // by the rule that is switched off; 0: none
}

// lockstepBinary is a lockstep without a rule, or, with 0, the whole one. That is the one
// that LOCKSTEP_BINARY names, if it is set.
func lockstepBinary(t *testing.T, without loader.Mutation) string {
	t.Helper()
	if named := os.Getenv("LOCKSTEP_BINARY"); named != "" && without == 0 {
		return named
	}
	binaries.Lock()
	defer binaries.Unlock()
	if b := binaries.without[without]; b != "" {
		return b
	}
	if binaries.dir == "" {
		dir, err := os.MkdirTemp("", "lockstep-e2e-")
		if err != nil {
			t.Fatal(err)
		}
		binaries.dir, binaries.without = dir, make(map[loader.Mutation]string)
	}
	b := filepath.Join(binaries.dir, fmt.Sprintf("lockstep%d", without))
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", fmt.Sprintf("-s -w -X main.mutation=%d", without), "-o", b, "github.com/lockstep-ft/lockstep/cmd/lockstep")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build lockstep: %v\n%s", err, out)
	}
	binaries.without[without] = b
	return b
}

// pair is two daemons over a World.
type pair struct {
	*lt.World
	t      *testing.T
	config string
	own    map[string]string // a node's config file, where it is not config
	procs  map[string]*exec.Cmd
	binary string // of the daemons

	patience time.Duration     // of await; 0: 20 s
	endGuest func(node string) // ends a node's guest; nil: the guests are not QEMUs
}

// newPair makes a world, starts the guests' services and both daemons and waits
// until they replicate. qmp gives the nodes' QMP sockets, if any. The control link
// has certificates unless extra has a tls key.
func newPair(t *testing.T, peer lt.Peer, qmpP, qmpS, extra string) *pair {
	t.Helper()
	return newPairWithout(t, 0, peer, qmpP, qmpS, extra)
}

// newPairWithout has daemons without a rule.
func newPairWithout(t *testing.T, rule loader.Mutation, peer lt.Peer, qmpP, qmpS, extra string) *pair {
	t.Helper()
	p := newWorldPair(t, peer, qmpP, qmpS, extra)
	p.binary = lockstepBinary(t, rule)
	p.start()
	return p
}

// start starts the guests' services and both daemons and waits until they
// replicate and the PVM may transmit (R20): a raw frame that is dropped as muted is not
// sent again.
func (p *pair) start() {
	p.t.Helper()
	p.serve("pvm", p.PVM)
	p.serve("svm", p.SVM)
	p.daemon("alpha", p.HostP, "primary")
	p.daemon("beta", p.HostS, "secondary")
	p.await("alpha", func(s *api.Status) bool { return s.State == "replicating" && s.Counters["echo_in"] > 0 })
	p.await("beta", func(s *api.Status) bool { return s.State == "replicating" })
}

// newWorldPair makes the world and the config, and starts nothing.
func newWorldPair(t *testing.T, peer lt.Peer, qmpP, qmpS, extra string) *pair {
	t.Helper()
	lt.NeedRoot(t)
	w := lt.NewWorld(t, peer)
	p := &pair{World: w, t: t, config: filepath.Join(w.Dir, "pair.yaml"), own: make(map[string]string), procs: make(map[string]*exec.Cmd), binary: lockstepBinary(t, 0)}
	peerOf := func(name, local, remote string) string {
		if peer != lt.VXLAN {
			return "{device: peer" + name + "}"
		}
		return fmt.Sprintf("{vxlan: {id: 77, port: 4790, local: %s, remote: %s, underlay: under%s}}", local, remote, name)
	}
	qmp := func(path string) string {
		if path == "" {
			return ""
		}
		return ", qmp: " + path
	}
	tls := "tls: {ca: certs/ca.pem, cert: 'certs/{node}.pem', key: 'certs/{node}.key'}"
	if strings.Contains(extra, "tls:") {
		tls = ""
	}
	yaml := fmt.Sprintf(`vm: web1
nodes:
  alpha: {control: "192.0.2.1:7700", nics: [{tap: tapP, peer: %s}]%s}
  beta:  {control: "192.0.2.2:7700", nics: [{tap: tapS, peer: %s}]%s}
pin_dir: bpf/lockstep
run_dir: run
%s
%s
`, peerOf("P", "198.51.100.1", "198.51.100.2"), qmp(qmpP), peerOf("S", "198.51.100.2", "198.51.100.1"), qmp(qmpS), tls, extra)
	if err := os.WriteFile(p.config, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := p.lockstep("keys", "-c", p.config, "-d", filepath.Join(w.Dir, "certs")).CombinedOutput(); err != nil {
		t.Fatalf("keys: %v\n%s", err, out)
	}
	return p
}

func (p *pair) self() string {
	exe, err := os.Executable()
	if err != nil {
		p.t.Fatal(err)
	}
	return exe
}

func (p *pair) serve(who, ns string) {
	p.t.Helper()
	w := p.work(ns, "guest "+who, "GODEBUG=cryptocustomrand=1")
	w.says("ready")
	p.procs[who] = w.cmd
}

// worker is something that talks by lines, mostly this test binary.
type worker struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
	err strings.Builder
}

// work starts a worker, which ends with the test.
func (p *pair) work(ns, act string, env ...string) *worker {
	p.t.Helper()
	cmd := lt.Command(ns, p.self())
	cmd.Env = append(append(os.Environ(), actAs+"="+act), env...)
	return converse(p, cmd)
}

// converse starts a program that talks by lines, which ends with the test.
func converse(p *pair, cmd *exec.Cmd) *worker {
	p.t.Helper()
	w := &worker{t: p.t, cmd: cmd}
	w.cmd.Stderr = &w.err
	var err error
	if w.in, err = w.cmd.StdinPipe(); err != nil {
		p.t.Fatal(err)
	}
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	w.out = bufio.NewReader(out)
	if err := w.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		w.in.Close()
		w.cmd.Process.Kill() // fails when it has ended
		w.cmd.Wait()
	})
	return w
}

// says waits for a line.
func (w *worker) says(want string) {
	w.t.Helper()
	if got, err := w.out.ReadString('\n'); got != want+"\n" {
		w.cmd.Process.Kill()
		w.cmd.Wait() // what it printed is whole then
		w.t.Fatalf("%q in place of %q, %v\n%s", got, want, err, w.err.String())
	}
}

// ask sends a line and returns the answer's.
func (w *worker) ask(line string) string {
	w.t.Helper()
	limit := time.AfterFunc(programLimit, func() { w.cmd.Process.Kill() })
	defer limit.Stop()
	if _, err := fmt.Fprintln(w.in, line); err != nil {
		w.t.Fatalf("%q: %v", line, err)
	}
	got, err := w.out.ReadString('\n')
	if err != nil {
		w.cmd.Process.Kill()
		w.cmd.Wait() // what it printed is whole then
		w.t.Fatalf("%q: %v\n%s", line, err, w.err.String())
	}
	return strings.TrimSpace(got)
}

func (p *pair) lockstep(args ...string) *exec.Cmd {
	return exec.Command(lockstepBinary(p.t, 0), args...)
}

// lockstepIn runs lockstep in a network namespace.
func (p *pair) lockstepIn(ns string, args ...string) *exec.Cmd {
	return lt.Command(ns, lockstepBinary(p.t, 0), args...)
}

func (p *pair) daemon(node, ns, role string) {
	p.t.Helper()
	log, err := os.OpenFile(p.logFile(node), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	defer log.Close()
	args := []string{"run", "-c", cmp.Or(p.own[node], p.config), "--node", node}
	if role != "" { // else the pair knows
		args = append(args, "--role", role)
	}
	cmd := lt.Command(ns, p.binary, args...)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.procs[node] = cmd
	p.t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM) // fails when the test killed it
		cmd.Wait()
		if p.t.Failed() {
			p.t.Logf("log of %s:\n%s", node, p.log(node))
		}
		if p.endGuest != nil {
			p.endGuest(node) // one that runs does not go on without lockstep
		}
		if out, err := p.lockstepIn(ns, "unload", "--force", "-c", p.config, "--node", node).CombinedOutput(); err != nil {
			p.t.Errorf("unload %s: %v\n%s", node, err, out)
		}
	})
}

func (p *pair) logFile(node string) string { return filepath.Join(p.Dir, node+".log") }

// log is what a node's daemons have logged.
func (p *pair) log(node string) string {
	p.t.Helper()
	b, err := os.ReadFile(p.logFile(node))
	if err != nil {
		p.t.Fatal(err)
	}
	return string(b)
}

// kill ends a process at once.
func (p *pair) kill(name string) {
	p.t.Helper()
	if err := p.procs[name].Process.Kill(); err != nil {
		p.t.Fatal(err)
	}
	p.procs[name].Wait()
}

// status is what `lockstep status --json` prints; nil when no daemon answers.
func (p *pair) status(node string) *api.Status {
	p.t.Helper()
	out, err := p.lockstep("status", "-c", p.config, "--node", node, "--json").Output()
	if err != nil {
		return nil
	}
	s := new(api.Status)
	if err := json.Unmarshal(out, s); err != nil {
		p.t.Fatalf("status of %s: %v\n%s", node, err, out)
	}
	return s
}

// await waits until a node's status is as wanted.
func (p *pair) await(node string, want func(*api.Status) bool) *api.Status {
	p.t.Helper()
	var s *api.Status
	lt.Eventually(p.t, cmp.Or(p.patience, time.Minute), func() (bool, string) {
		if s = p.status(node); s == nil {
			return false, "no status of " + node
		}
		text, _ := json.Marshal(s)
		return want(s), string(text)
	})
	return s
}

// dial connects from the client's namespace.
func (p *pair) dial(host, port, from string) (*net.TCPConn, error) {
	var (
		c   net.Conn
		err error
	)
	lt.In(p.t, p.Client, func() {
		d := net.Dialer{Timeout: 10 * time.Second}
		if from != "" {
			d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		c, err = d.DialContext(ctx, "tcp", net.JoinHostPort(host, port))
	})
	if err != nil {
		return nil, err
	}
	tc := c.(*net.TCPConn)
	return tc, tc.SetDeadline(time.Now().Add(60 * time.Second))
}

func (p *pair) mustDial(host, port string) *net.TCPConn {
	p.t.Helper()
	c, err := p.dial(host, port, "")
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { c.Close() })
	return c
}
