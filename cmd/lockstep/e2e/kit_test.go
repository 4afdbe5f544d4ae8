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
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lockstep/control"
	lt "lockstep/loader/loadertest"
)

// The test binary is also the guests' service and other processes of the tests, told
// apart by this variable.
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
	without map[string]string // by the rule that is left out; "": none
}

// lockstepBinary is a lockstep without a rule, as mutation in cmd/lockstep names it. The whole
// one is the one that LOCKSTEP_BINARY names, if it is set.
func lockstepBinary(t *testing.T, without string) string {
	t.Helper()
	if named := os.Getenv("LOCKSTEP_BINARY"); named != "" && without == "" {
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
		binaries.dir, binaries.without = dir, make(map[string]string)
	}
	b := filepath.Join(binaries.dir, "lockstep"+without)
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -X main.mutation="+without, "-o", b, "lockstep/cmd/lockstep")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build lockstep: %v\n%s", err, out)
	}
	binaries.without[without] = b
	return b
}

// Ports of the guests' service.
const (
	portEcho   = "7000" // what comes goes back
	portSource = "7001" // "N\n": N bytes of pattern, then FIN
	portSink   = "7002" // counts until FIN, answers "OK N\n"
	portDiffer = "7003" // a line: a line that differs between the guests
	portCut    = "7004" // "a,b n\n": n bytes, cut at a by the PVM and at b by the SVM
	portAhead  = "7005" // "pvm n\n" or "svm n\n": n bytes, from that guest at once, from the other later
	portClock  = "7006" // a line: the guest's clock, which no other guest's agrees with
	portDirty  = "7008" // 16 MiB of the guest's memory change, over and over, until the connection closes; a line when all have
	portEnd    = "7009" // "poweroff\n", "reboot\n": the guest's end
	portDial   = "7019" // "ADDRESS LOCALPORT\n": the guest connects there, and says what came of it
	portDisk   = "7007" // "write NAME TEXT\n": a file on the guest's disk, and it is there when the answer comes; "fill NAME MIB\n": so much; "read NAME\n"
)

// serveGuest is the service inside a guest; as is "guest pvm" or "guest svm".
func serveGuest(as string) {
	svm := as == "guest svm"
	for port, f := range map[string]func(*net.TCPConn){
		portEcho: func(c *net.TCPConn) { io.Copy(onlyWriter{c}, onlyReader{c}) },
		portSource: func(c *net.TCPConn) {
			var n int64
			if _, err := fmt.Fscanln(c, &n); err == nil {
				io.Copy(onlyWriter{c}, io.LimitReader(&pattern{}, n))
			}
		},
		portSink: func(c *net.TCPConn) {
			n, _ := io.Copy(io.Discard, c)
			fmt.Fprintf(c, "OK %d\n", n)
		},
		portDiffer: func(c *net.TCPConn) {
			for r := bufio.NewScanner(c); r.Scan(); {
				fmt.Fprintln(c, "answer of", as)
			}
		},
		portHTTP: serveHTTP,
		portAhead: func(c *net.TCPConn) {
			var first string
			var n int64
			for {
				if _, err := fmt.Fscanln(c, &first, &n); err != nil {
					return
				}
				if as != "guest "+first {
					time.Sleep(150 * time.Millisecond) // being behind is what is tested
				}
				io.Copy(onlyWriter{c}, io.LimitReader(&pattern{}, n))
			}
		},
		portTLS: serveTLS,
		portClock: func(c *net.TCPConn) {
			for r := bufio.NewScanner(c); r.Scan(); {
				fmt.Fprintln(c, r.Text(), time.Now().UnixNano())
			}
		},
		portDisk: serveDisk,
		portEnd: func(c *net.TCPConn) {
			for r := bufio.NewScanner(c); r.Scan(); {
				how := map[string]int{"poweroff": unix.LINUX_REBOOT_CMD_POWER_OFF, "reboot": unix.LINUX_REBOOT_CMD_RESTART}[r.Text()]
				fmt.Fprintln(c, r.Text(), unix.Reboot(how))
			}
		},
		portDial: func(c *net.TCPConn) {
			for r := bufio.NewScanner(c); r.Scan(); {
				to, port, _ := strings.Cut(r.Text(), " ")
				fmt.Fprintln(c, dialFrom(to, port))
			}
		},
		portDirty: func(c *net.TCPConn) {
			b := dirty()
			stop := make(chan struct{})
			go func() { io.Copy(io.Discard, c); close(stop) }()
			for i := byte(1); ; i++ {
				for at := 0; at < len(b); at += 4096 {
					b[at] = i
				}
				if i == 1 {
					fmt.Fprintln(c, "dirty")
				}
				select {
				case <-stop:
					return
				case <-time.After(10 * time.Millisecond):
				}
			}
		},
		portCut: func(c *net.TCPConn) {
			var p, s, n int
			for {
				if _, err := fmt.Fscanf(c, "%d,%d %d\n", &p, &s, &n); err != nil {
					return
				}
				cut := p
				if svm {
					cut = s
				}
				b := make([]byte, n)
				(&pattern{}).Read(b)
				for ; len(b) > 0; b = b[min(cut, len(b)):] {
					c.Write(b[:min(cut, len(b))])
				}
			}
		},
	} {
		servePort(port, f)
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin) // until the test closes it
}

// dialFrom connects from a port that both guests take, and closes at once.
func dialFrom(to, port string) error {
	local, err := net.ResolveTCPAddr("tcp", ":"+port)
	if err != nil {
		return err
	}
	d := net.Dialer{LocalAddr: local, Timeout: 20 * time.Second}
	c, err := d.Dial("tcp", to)
	if err != nil {
		return err
	}
	return c.Close()
}

// dirty is memory that the guest, which has little, allocates once.
var dirty = sync.OnceValue(func() []byte { return make([]byte, 16<<20) })

// serveDisk writes and reads files on the guest's first disk.
func serveDisk(c *net.TCPConn) {
	for r := bufio.NewScanner(c); r.Scan(); {
		what, rest, _ := strings.Cut(r.Text(), " ")
		name, text, _ := strings.Cut(rest, " ")
		path := filepath.Join("/disk", name)
		if what == "read" {
			// The disk is asked, not the guest's memory.
			if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
				fmt.Fprintln(c, err)
				continue
			}
			b, err := os.ReadFile(path)
			fmt.Fprintf(c, "%s %v\n", b, err)
			continue
		}
		f, err := os.Create(path)
		if mib, bad := strconv.Atoi(text); err == nil && what == "fill" && bad == nil {
			_, err = io.Copy(onlyWriter{f}, io.LimitReader(&pattern{}, int64(mib)<<20))
		} else if err == nil {
			_, err = f.WriteString(text)
		}
		if err == nil {
			err = f.Sync()
		}
		if err == nil {
			err = f.Close()
		}
		fmt.Fprintln(c, "wrote", name, err)
	}
}

// servePort gives f each connection to a port, until the process ends.
func servePort(port string, f func(*net.TCPConn)) {
	l, err := net.Listen("tcp", ":"+port)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	go acceptAll(l, f)
}

// acceptAll gives f each connection, and closes it behind f, until l closes.
func acceptAll(l net.Listener, f func(*net.TCPConn)) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			f(c.(*net.TCPConn))
		}()
	}
}

// Hide the splice paths, whose segmentation is the kernel's.
type onlyReader struct{ io.Reader }
type onlyWriter struct{ io.Writer }

// pattern is an endless stream in which no two places nearby look alike.
type pattern struct{ pos uint64 }

func (p *pattern) Read(b []byte) (int, error) {
	for i := range b {
		x := (p.pos >> 3) * 0x9e3779b97f4a7c15
		b[i] = byte(x >> (8 * (p.pos & 7)))
		p.pos++
	}
	return len(b), nil
}

// pair is two daemons over a World.
type pair struct {
	*lt.World
	t      *testing.T
	config string
	own    map[string]string // a node's config file, where it is not config
	procs  map[string]*exec.Cmd
	binary string // of the daemons

	endGuest func(node string) // ends a node's guest; nil: the guests are not QEMUs
}

// newPair makes a world, starts the guests' services and both daemons and waits
// until they replicate. qmp gives the nodes' QMP sockets, if any. The control link
// has certificates unless extra has a tls key.
func newPair(t *testing.T, peer lt.Peer, qmpP, qmpS, extra string) *pair {
	t.Helper()
	return newPairWithout(t, "", peer, qmpP, qmpS, extra)
}

// newPairWithout has daemons without a rule.
func newPairWithout(t *testing.T, rule string, peer lt.Peer, qmpP, qmpS, extra string) *pair {
	t.Helper()
	p := newWorldPair(t, peer, qmpP, qmpS, extra)
	p.binary = lockstepBinary(t, rule)
	p.start()
	return p
}

// start starts the guests' services and both daemons and waits until they
// replicate and the PVM may speak (R20): a raw frame that is dropped as muted is not
// sent again.
func (p *pair) start() {
	p.t.Helper()
	p.serve("pvm", p.PVM)
	p.serve("svm", p.SVM)
	p.daemon("alpha", p.HostP, "primary")
	p.daemon("beta", p.HostS, "secondary")
	p.await("alpha", func(s *control.Status) bool { return s.State == "replicating" && s.Counters["echo_in"] > 0 })
	p.await("beta", func(s *control.Status) bool { return s.State == "replicating" })
}

// newWorldPair makes the world and the config, and starts nothing.
func newWorldPair(t *testing.T, peer lt.Peer, qmpP, qmpS, extra string) *pair {
	t.Helper()
	lt.NeedRoot(t)
	w := lt.NewWorld(t, peer)
	p := &pair{World: w, t: t, config: filepath.Join(w.Dir, "pair.yaml"), own: make(map[string]string), procs: make(map[string]*exec.Cmd), binary: lockstepBinary(t, "")}
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

// worker is this test binary acting as something that talks by lines.
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
	w := &worker{t: p.t, cmd: lt.Command(ns, p.self())}
	w.cmd.Env = append(append(os.Environ(), actAs+"="+act), env...)
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

func (p *pair) lockstep(args ...string) *exec.Cmd {
	return exec.Command(lockstepBinary(p.t, ""), args...)
}

// lockstepIn runs lockstep in a network namespace.
func (p *pair) lockstepIn(ns string, args ...string) *exec.Cmd {
	return lt.Command(ns, lockstepBinary(p.t, ""), args...)
}

func (p *pair) daemon(node, ns, role string) {
	p.t.Helper()
	log, err := os.OpenFile(p.logFile(node), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	defer log.Close()
	cmd := lt.Command(ns, p.binary, "run", "-c", cmp.Or(p.own[node], p.config), "--node", node, "--role", role)
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
			p.endGuest(node) // one that runs is not let loose
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
func (p *pair) status(node string) *control.Status {
	p.t.Helper()
	out, err := p.lockstep("status", "-c", p.config, "--node", node, "--json").Output()
	if err != nil {
		return nil
	}
	s := new(control.Status)
	if err := json.Unmarshal(out, s); err != nil {
		p.t.Fatalf("status of %s: %v\n%s", node, err, out)
	}
	return s
}

// await waits until a node's status is as wanted.
func (p *pair) await(node string, want func(*control.Status) bool) *control.Status {
	p.t.Helper()
	var s *control.Status
	lt.Eventually(p.t, 20*time.Second, func() (bool, string) {
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
