// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// livingPair is a pair of real guests that lockstep starts, on hosts that the client
// reaches over a switch.
type livingPair struct {
	*pair
	preload string
	record  uint64 // the arbiter's term when the guests began to answer alike
}

// newLivingPair makes hosts, images and the config, and starts nothing.
func newLivingPair(t *testing.T, disks int, extra string) *livingPair {
	t.Helper()
	return newLivingPairOf(t, disks, extra, qemutest.Guest{Env: []string{actAs + "=guest pvm"}}, qemutest.Memory)
}

// newLivingPairOf has another guest, with so many bytes of memory.
func newLivingPairOf(t *testing.T, disks int, extra string, g qemutest.Guest, memory int64) *livingPair {
	t.Helper()
	g.Service = (&pair{t: t}).self()
	m := machine{memory: memory, disks: disks, append: qemutest.Append([]string{lt.Guest4 + "/24," + lt.Guest6 + "/64"})}
	m.kernel, m.initrd = qemutest.Image(t, g)
	m.image = func(path string) { qemutest.Disk(t, path, 64<<20, true) }
	return newMachinePair(t, extra, m)
}

// machine is what the guests of a pair are made of.
type machine struct {
	kernel, initrd, append string
	memory                 int64 // bytes
	disks                  int
	image                  func(path string) // makes a disk's
}

// newMachinePair makes hosts, images and the config of such guests, and starts nothing.
func newMachinePair(t *testing.T, extra string, m machine) *livingPair {
	t.Helper()
	lt.NeedRoot(t)
	p := &livingPair{preload: qemutest.Preload(t)}
	w := lt.NewHosts(t)
	p.pair = &pair{World: w, t: t, config: filepath.Join(w.Dir, "pair.yaml"), own: make(map[string]string), binary: lockstepBinary(t, 0)}
	p.procs = make(map[string]*exec.Cmd)
	p.endGuest = p.killQEMU
	var images []string
	for i := range m.disks {
		images = append(images, fmt.Sprintf("{id: colo-disk%d, image: '{node}%d.qcow2', overlay_dir: 'overlays-{node}'}", i, i))
		image := func(node string) string { return filepath.Join(w.Dir, fmt.Sprintf("%s%d.qcow2", node, i)) }
		m.image(image("alpha"))
		lt.Run(t, "cp", image("alpha"), image("beta"))
	}
	if !strings.Contains(extra, "arbiter:") {
		extra += fmt.Sprintf("\narbiter: {type: file, path: %s}", filepath.Join(w.Dir, "arbiter"))
		if err := os.Mkdir(filepath.Join(w.Dir, "arbiter"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if !strings.Contains(extra, "migration:") {
		extra += "\nmigration: {unix: migration.sock}" // over TCP each checkpoint waits for a delayed ACK
	}
	yaml := fmt.Sprintf(`vm: web1
nodes:
  alpha: {control: "192.0.2.1:7700", nics: [{tap: tapP, bridge: br0, peer: {device: peerP}}]}
  beta:  {control: "192.0.2.2:7700", nics: [{tap: tapS, bridge: br0, peer: {device: peerS}}]}
pin_dir: bpf/lockstep
run_dir: run
state_dir: state
tls: {ca: certs/ca.pem, cert: 'certs/{node}.pem', key: 'certs/{node}.key'}
qemu:
  accel: tcg
  cpu: qemu64
  memory: %[6]dK
  smp: 1
  kernel: %[1]s
  initrd: %[2]s
  append: %[3]q
  macs: ["%[4]s"]
  disks: [%[5]s]
  extra: [-serial, "file:%[7]s/{node}.serial", -qmp, "unix:%[7]s/{node}.mon,server=on,wait=off"]
%[8]s
`, m.kernel, m.initrd, m.append, lt.GuestMAC, strings.Join(images, ", "), m.memory>>10, w.Dir, extra)
	if err := os.WriteFile(p.config, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := p.lockstep("keys", "-c", p.config, "-d", filepath.Join(w.Dir, "certs")).CombinedOutput(); err != nil {
		t.Fatalf("keys: %v\n%s", err, out)
	}
	t.Cleanup(func() {
		for _, node := range []string{"alpha", "beta"} {
			p.killQEMU(node)
		}
		if t.Failed() {
			for _, node := range []string{"alpha", "beta"} {
				serial, _ := os.ReadFile(filepath.Join(w.Dir, node+".serial"))
				qemu, _ := os.ReadFile(filepath.Join(w.Dir, "run/web1-"+node+".log"))
				t.Logf("QEMU on %s: %s\nconsole: %s", node, qemu, serial)
			}
		}
	})
	return p
}

// extra adds arguments to QEMU's command lines.
func (p *livingPair) extra(args ...string) {
	p.t.Helper()
	b, err := os.ReadFile(p.config)
	if err == nil {
		err = os.WriteFile(p.config, []byte(strings.Replace(string(b), "  extra: [", "  extra: ["+strings.Join(args, ", ")+", ", 1)), 0o600)
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// host is a node's namespace.
func (p *livingPair) host(node string) string {
	return map[string]string{"alpha": p.HostP, "beta": p.HostS}[node]
}

// run starts a node's daemon.
func (p *livingPair) run(node, role string) {
	p.t.Helper()
	p.t.Setenv(preloadName, strings.TrimPrefix(p.preload, preloadName+"="))
	p.daemon(node, p.host(node), role)
}

const preloadName = "LD_PRELOAD"

// qemu is the process of a node's QEMU; 0: there is none.
func (p *livingPair) qemu(node string) int {
	b, err := os.ReadFile(filepath.Join(p.Dir, "run/web1-"+node+".pid"))
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !strings.Contains(string(line), p.Dir) {
		return 0
	}
	return pid
}

// signal sends a signal to a node's QEMU.
func (p *livingPair) signal(node string, sig syscall.Signal) {
	p.t.Helper()
	if err := syscall.Kill(p.qemu(node), sig); err != nil {
		p.t.Fatalf("QEMU of %s: %v", node, err)
	}
}

// killQEMU ends a node's QEMU at once; nothing, when there is none.
func (p *livingPair) killQEMU(node string) { p.endQEMU(node, syscall.SIGKILL) }

// endQEMU ends a node's QEMU by a signal. Told to end by SIGTERM, QEMU 7.2 now and then waits for its COLO thread, which waits to
// be told who is lost: such a one is killed, as systemd does.
func (p *livingPair) endQEMU(node string, sig syscall.Signal) {
	pid := p.qemu(node)
	if pid == 0 {
		return
	}
	_ = syscall.Kill(pid, sig)
	if sig == syscall.SIGTERM {
		defer time.AfterFunc(10*time.Second, func() { _ = syscall.Kill(pid, syscall.SIGKILL) }).Stop()
	}
	lt.Eventually(p.t, 20*time.Second, func() (bool, string) {
		_, err := os.Stat(fmt.Sprintf("/proc/%d/cmdline", pid))
		return err != nil, "QEMU is there"
	})
}

// covered waits until the pair replicates and either may die.
func (p *livingPair) covered() {
	p.t.Helper()
	for _, node := range []string{"alpha", "beta"} {
		p.await(node, func(s *api.Status) bool { return s.State == "replicating" && s.Covered })
	}
}

// booted waits until the guest's service answers.
func (p *livingPair) booted() {
	p.t.Helper()
	lt.Eventually(p.t, time.Minute, func() (bool, string) {
		c, err := p.dial(lt.Guest4, portEcho, "")
		if err != nil {
			return false, err.Error()
		}
		defer c.Close()
		err = echo(c, 0)
		return err == nil, fmt.Sprint(err)
	})
}

// session is a client's connection that lasts through a test.
type session struct {
	t *testing.T
	c *net.TCPConn
	n int // answers so far
}

// open makes a session, with its first answer.
func (p *livingPair) open() *session {
	p.t.Helper()
	s := &session{t: p.t, c: p.mustDial(lt.Guest4, portEcho)}
	s.ask(1)
	return s
}

// ask gets so many answers more.
func (s *session) ask(times int) {
	s.t.Helper()
	for range times {
		s.c.SetDeadline(time.Now().Add(30 * time.Second))
		if err := echo(s.c, s.n); err != nil {
			s.t.Fatalf("request %d: %v", s.n, err)
		}
		s.n++
	}
}

// askLater gets one answer, and is not waited for. Nothing else asks meanwhile.
func (s *session) askLater() <-chan error {
	answered := make(chan error, 1)
	go func() { answered <- echo(s.c, s.n) }()
	return answered
}

// rejoin has a node whose daemon ends follow the other one.
func (p *livingPair) rejoin(node string) {
	p.t.Helper()
	p.procs[node].Wait()
	p.run(node, "secondary")
}

// signalDaemon sends a signal to a node's daemon.
func (p *livingPair) signalDaemon(node string, sig syscall.Signal) {
	p.t.Helper()
	if err := p.procs[node].Process.Signal(sig); err != nil {
		p.t.Fatal(err)
	}
}

// fenced waits until a node's daemon ends, because another host serves.
func (p *livingPair) fenced(node string) {
	p.t.Helper()
	if err := p.procs[node].Wait(); err == nil || !strings.Contains(p.log(node), "may not transmit for the guest any more") {
		p.t.Errorf("the daemon of %s ended with %v", node, err)
	}
}

// twoTurns checks that one host has transmitted after the other, and no more.
func twoTurns(t *testing.T, watch *lt.Transmitters) {
	t.Helper()
	if turns := watch.Turns(); len(turns) != 2 {
		t.Errorf("turns of speech: %v", turns)
	}
}

// ends waits for a daemon, which ends by itself, and returns how it did.
func ends(t *testing.T, daemon *exec.Cmd) error {
	t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- daemon.Wait() }()
	select {
	case err := <-ended:
		return err
	case <-time.After(time.Minute):
		t.Fatalf("the daemon does not end: %s", daemon)
		return nil
	}
}

// start brings a pair up with its guest.
func (p *livingPair) start() {
	p.t.Helper()
	p.run("beta", "secondary")
	p.run("alpha", "primary")
	p.covered()
	p.booted()
	p.lockstepped()
}

// lockstepped waits until both guests answer alike. Under emulation an SVM that got its
// first checkpoint early in its boot now and then never sends; it is given up and
// replaced.
func (p *livingPair) lockstepped() {
	p.t.Helper()
	lt.Eventually(p.t, time.Minute, func() (bool, string) {
		before := p.status("alpha")
		c, err := p.dial(lt.Guest4, portEcho, "")
		for i := 0; err == nil && i < 5; i++ {
			err = echo(c, i)
		}
		if err != nil {
			return false, err.Error()
		}
		c.Close()
		s, b := p.status("alpha"), p.status("beta")
		if s == nil || b == nil || before == nil {
			return false, "no status"
		}
		p.record = s.ArbiterTerm
		return s.State == "replicating" && s.Covered && b.Covered && s.CheckpointsRequested == before.CheckpointsRequested, fmt.Sprintf("%+v", s.Causes)
	})
}

// ask sends a line over c and returns the answer's.
func (p *livingPair) ask(c *net.TCPConn, line string) string {
	p.t.Helper()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := fmt.Fprintln(c, line); err != nil {
		p.t.Fatal(err)
	}
	got, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		p.t.Fatalf("%q: %v", line, err)
	}
	return strings.TrimSpace(got)
}
