// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
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

	"lockstep/control"
	"lockstep/control/arbiter"
	"lockstep/control/arbiter/arbitertest"
	"lockstep/control/config"
	"lockstep/control/qemu/qemutest"
	"lockstep/control/qmp"
	lt "lockstep/loader/loadertest"
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
	lt.NeedRoot(t)
	p := &livingPair{preload: qemutest.Preload(t)}
	w := lt.NewHosts(t)
	p.pair = &pair{World: w, t: t, config: filepath.Join(w.Dir, "pair.yaml"), own: make(map[string]string), binary: lockstepBinary(t, "")}
	p.procs = make(map[string]*exec.Cmd)
	p.endGuest = p.killQEMU
	g.Service = p.self()
	kernel, initrd := qemutest.Image(t, g)
	var images []string
	for i := range disks {
		images = append(images, fmt.Sprintf("{id: colo-disk%d, image: '{node}%d.qcow2', overlay_dir: 'overlays-{node}'}", i, i))
		image := func(node string) string { return filepath.Join(w.Dir, fmt.Sprintf("%s%d.qcow2", node, i)) }
		qemutest.Disk(t, image("alpha"), 64<<20, true)
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
  memory: 128M
  smp: 1
  kernel: %s
  initrd: %s
  append: %q
  macs: ["%s"]
  disks: [%s]
  extra: [-m, %dK, -serial, "file:%[7]s/{node}.serial", -qmp, "unix:%[7]s/{node}.mon,server=on,wait=off"]
%s
`, kernel, initrd, qemutest.Append([]string{lt.Guest4 + "/24," + lt.Guest6 + "/64"}), lt.GuestMAC, strings.Join(images, ", "), memory>>10, w.Dir, extra)
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

// endQEMU ends a node's QEMU by a signal.
func (p *livingPair) endQEMU(node string, sig syscall.Signal) {
	pid := p.qemu(node)
	if pid == 0 {
		return
	}
	_ = syscall.Kill(pid, sig)
	lt.Eventually(p.t, 10*time.Second, func() (bool, string) {
		_, err := os.Stat(fmt.Sprintf("/proc/%d/cmdline", pid))
		return err != nil, "QEMU is there"
	})
}

// covered waits until the pair replicates and either may die.
func (p *livingPair) covered() {
	p.t.Helper()
	for _, node := range []string{"alpha", "beta"} {
		p.await(node, func(s *control.Status) bool { return s.State == "replicating" && s.Covered })
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

// fenced waits until a node's daemon ends, because another host speaks.
func (p *livingPair) fenced(node string) {
	p.t.Helper()
	if err := p.procs[node].Wait(); err == nil || !strings.Contains(p.log(node), "does not speak for the guest any more") {
		p.t.Errorf("the daemon of %s ended with %v", node, err)
	}
}

// twoTurns checks that one host has spoken after the other, and no more.
func twoTurns(t *testing.T, heard *lt.Speakers) {
	t.Helper()
	if turns := heard.Turns(); len(turns) != 2 {
		t.Errorf("turns of speech: %v", turns)
	}
}

// TestFrozenQEMU: a primary's QEMU that stands still does not answer; its host shuts it
// out, and the other takes over. When it goes on, nobody hears it.
func TestFrozenQEMU(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	heard := lt.WatchSpeakers(t, p.Switch, "portP", "portS")
	c := p.open()
	p.signal("alpha", syscall.SIGSTOP)
	began := time.Now()
	c.ask(1)
	t.Logf("the first answer took %v", time.Since(began))
	p.signal("alpha", syscall.SIGCONT)
	c.ask(50)
	p.rejoin("alpha")
	p.covered()
	c.ask(1)
	twoTurns(t, heard)
}

// TestStopCont: somebody stops either QEMU's guest and lets it go on: meanwhile nothing
// leaves, and nobody takes over (R15).
func TestStopCont(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	c := p.open()
	for _, node := range []string{"alpha", "beta"} {
		m, err := qmp.Dial(t.Context(), filepath.Join(p.Dir, node+".mon"), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Disconnect()
		before := p.status("alpha")
		if err := m.Execute("stop", nil, nil); err != nil {
			t.Fatal(err)
		}
		p.await("alpha", func(s *control.Status) bool { return s.State == "checkpointing" })
		answered := c.askLater()
		select {
		case err := <-answered:
			t.Errorf("an answer, %v, while %s's guest stands still", err, node)
		case <-time.After(time.Second): // the time in which it would come
		}
		if err := m.Execute("cont", nil, nil); err != nil {
			t.Fatal(err)
		}
		if err := <-answered; err != nil {
			t.Fatal(err)
		}
		s := p.await("alpha", func(s *control.Status) bool { return s.State == "replicating" && s.Covered })
		if s.Record != p.record || s.CheckpointsDone == before.CheckpointsDone {
			t.Errorf("%s: the record is of term %d, and %d checkpoints were made", node, s.Record, s.CheckpointsDone-before.CheckpointsDone)
		}
	}
}

// TestHostLoss: a whole host is gone at once, and says nothing about it.
func TestHostLoss(t *testing.T) {
	p := newLivingPair(t, 1, "migration: {port: 9998, nbd_port: 9999}")
	p.start()
	c := p.open()
	devices := []string{"ctl", "peerP", "uplink"}
	for _, dev := range devices {
		p.SetLink(t, p.HostP, dev, false)
	}
	p.kill("alpha")
	p.killQEMU("alpha")
	began := time.Now()
	c.ask(1)
	t.Logf("the first answer took %v", time.Since(began))
	c.ask(49)
	// It comes back, with what its kernel held.
	for _, dev := range devices {
		p.SetLink(t, p.HostP, dev, true)
	}
	p.run("alpha", "secondary")
	p.covered()
	for _, dev := range []string{"ctl", "peerS", "uplink"} { // the secondary's
		p.SetLink(t, map[string]string{"ctl": p.HostP, "peerS": p.HostS, "uplink": p.HostP}[dev], dev, false)
	}
	p.kill("alpha")
	p.killQEMU("alpha")
	began = time.Now()
	c.ask(1)
	t.Logf("without the secondary the first answer took %v", time.Since(began))
	c.ask(49)
}

// situation is what a pair may be doing when a host dies: load calls under way when it
// is, goes on until stop is closed or it is done, and fails the test when anything is
// wrong or missing.
type situation struct {
	name string
	load func(p *livingPair, underWay func(), stop <-chan struct{})
}

var situations = []situation{
	{"idle", func(p *livingPair, underWay func(), stop <-chan struct{}) { underWay(); <-stop }},
	{"keep-alive", func(p *livingPair, underWay func(), stop <-chan struct{}) { p.keepAsking(underWay, stop) }},
	{"to client", func(p *livingPair, underWay func(), stop <-chan struct{}) {
		c := p.mustDial(lt.Guest4, portSource)
		fmt.Fprintln(c, transferred)
		p.expectPattern(&wayPoint{Reader: c, at: transferred / 4, f: underWay}, transferred)
		if _, err := c.Read(make([]byte, 1)); err != io.EOF {
			p.t.Errorf("after the last byte: %v, want EOF", err)
		}
	}},
	{"to guest", func(p *livingPair, underWay func(), stop <-chan struct{}) {
		c := p.mustDial(lt.Guest6, portSink)
		if _, err := io.Copy(onlyWriter{c}, &wayPoint{Reader: io.LimitReader(&pattern{}, transferred), at: transferred / 4, f: underWay}); err != nil {
			p.t.Error(err)
		}
		c.CloseWrite()
		got, err := io.ReadAll(c)
		if want := fmt.Sprintf("OK %d\n", transferred); err != nil || string(got) != want {
			p.t.Errorf("%q, %v; want %q", got, err, want)
		}
	}},
}

const transferred = 20_000_000

// wayPoint calls f once at bytes were read.
type wayPoint struct {
	io.Reader
	at int64
	f  func()
}

func (r *wayPoint) Read(b []byte) (int, error) {
	n, err := r.Reader.Read(b)
	if r.at > 0 {
		if r.at -= int64(n); r.at <= 0 {
			r.f()
		}
	}
	return n, err
}

// keepAsking asks until stop is closed, over one connection.
func (p *livingPair) keepAsking(underWay func(), stop <-chan struct{}) {
	c := p.mustDial(lt.Guest4, portEcho)
	var longest time.Duration
	for i := 0; ; i++ {
		began := time.Now()
		if err := echo(c, i); err != nil {
			p.t.Errorf("request %d: %v", i, err)
			return
		}
		longest = max(longest, time.Since(began))
		if i == 200 {
			underWay()
		}
		select {
		case <-stop:
			p.t.Logf("%d answers, the longest took %v", i, longest)
			return
		default:
		}
	}
}

// during has f happen in the middle of a situation.
func (p *livingPair) during(x situation, f func()) {
	p.t.Helper()
	stop, begun := make(chan struct{}), make(chan struct{})
	var w sync.WaitGroup
	w.Go(func() { x.load(p, func() { close(begun) }, stop) })
	select {
	case <-begun:
	case <-time.After(time.Minute):
		p.t.Fatal("no load")
	}
	f()
	close(stop)
	w.Wait()
}

// other is the other node.
func other(node string) string { return map[string]string{"alpha": "beta", "beta": "alpha"}[node] }

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
// first checkpoint early in its boot now and then stays mute; it is given up and
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
		p.record = s.Record
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

// TestDivergenceAndDisks: guests with two disks; requests to which the guests have
// different answers are answered once each and cost checkpoints; what was written is on
// the survivor's disk, whichever host dies.
func TestDivergenceAndDisks(t *testing.T) {
	p := newLivingPair(t, 2, "")
	p.start()
	const requests = 100
	clock, disk := p.mustDial(lt.Guest4, portClock), p.mustDial(lt.Guest6, portDisk)
	before, last := p.status("alpha"), int64(0)
	for i := range requests {
		var n int
		var at int64
		if got := p.ask(clock, fmt.Sprint(i)); !sscan(got, &n, &at) || n != i || at <= last {
			t.Fatalf("request %d: %q, after %d", i, got, last)
		} else {
			last = at
		}
	}
	s := p.await("alpha", func(s *control.Status) bool { return s.State == "replicating" })
	if done := s.CheckpointsDone - before.CheckpointsDone; done < 1 || done > requests+s.CheckpointsRequested-before.CheckpointsRequested {
		t.Errorf("%d divergent requests made %d checkpoints", requests, done)
	} else {
		t.Logf("%d divergent requests, %d checkpoints", requests, done)
	}
	write := func(n int) {
		t.Helper()
		if got, want := p.ask(disk, fmt.Sprintf("write f%d text %d", n, n)), fmt.Sprintf("wrote f%d <nil>", n); got != want {
			t.Fatalf("%q, want %q", got, want)
		}
	}
	verify := func(n int) {
		t.Helper()
		for i := range n {
			if got, want := p.ask(disk, fmt.Sprintf("read f%d", i)), fmt.Sprintf("text %d <nil>", i); got != want {
				t.Fatalf("%q, want %q", got, want)
			}
		}
	}
	written := 0
	for range 10 {
		write(written)
		written++
	}
	primary := "alpha"
	for round, dies := range []string{"primary", "primary", "secondary", "primary"} {
		write(written)
		written++
		if dies == "primary" {
			p.killQEMU(primary)
			verify(written)
			p.rejoin(primary)
			primary = other(primary)
		} else {
			p.killQEMU(other(primary))
			verify(written)
		}
		write(written)
		written++
		p.covered()
		t.Logf("round %d: %d files, and the %s died", round, written, dies)
	}
	verify(written)
}

func sscan(text string, into ...any) bool {
	n, err := fmt.Sscan(text, into...)
	return err == nil && n == len(into)
}

// partition cuts what is between the hosts, or mends it.
func (p *livingPair) partition(what string, cut bool) {
	p.t.Helper()
	for _, link := range strings.Fields(what) {
		switch link {
		case "control":
			p.SetLink(p.t, p.HostP, "ctl", !cut)
		case "peer":
			p.SetLink(p.t, p.HostP, "peerP", !cut)
		}
	}
}

// silentSince waits for the time in which a host would speak that should not, and checks
// that nobody has spoken since before, and nothing was answered.
func silentSince(t *testing.T, heard *lt.Speakers, before []lt.Turn, answered <-chan error, wait time.Duration) {
	t.Helper()
	select {
	case err := <-answered:
		t.Errorf("an answer, %v, though nobody may speak", err)
	case <-time.After(wait):
	}
	if now := heard.Turns(); len(now) != len(before) || now[len(now)-1].Frames != before[len(before)-1].Frames {
		t.Errorf("somebody spoke: %v, and then %v", before, now)
	}
}

// TestPartitions: the hosts lose each other, and both guests live. One host speaks on,
// where the arbiter can be reached; the other's guest is never heard, and follows again
// when the partition is over.
func TestPartitions(t *testing.T) {
	for _, x := range []struct{ cut, arbiter string }{
		{"control", ""}, {"peer", ""}, {"control peer", ""},
		{"control peer", "gone"},
		{"control peer", "still"}, // it answers later what it was asked, when nobody waits for the answer any more
	} {
		name := "cut " + x.cut
		if x.arbiter != "" {
			name += " with arbiter " + x.arbiter
		}
		t.Run(name, func(t *testing.T) {
			var etcd *arbitertest.Etcd
			p := newLivingPair(t, 0, "arbiter: {type: etcd, endpoints: ['198.51.100.9:2379'], timeout: 1s}")
			etcd = arbitertest.StartEtcd(t, arbitertest.Options{Listen: "198.51.100.9:2379", Command: func(name string, args ...string) *exec.Cmd {
				return lt.Command(p.Switch, name, args...)
			}})
			lost := map[string]struct{ hide, show func(testing.TB) }{"gone": {etcd.Kill, etcd.Start}, "still": {etcd.Stop, etcd.Continue}}[x.arbiter]
			p.start()
			heard := lt.WatchSpeakers(t, p.Switch, "portP", "portS")
			c := p.open()
			if lost.hide != nil {
				lost.hide(t)
			}
			p.partition(x.cut, true)
			if lost.hide != nil {
				// Nobody can know who may speak. Both ask, and nobody does.
				answered := c.askLater()
				for _, node := range []string{"alpha", "beta"} {
					p.await(node, func(s *control.Status) bool { return s.State == "failover" })
				}
				silentSince(t, heard, heard.Turns(), answered, 2*time.Second)
				lost.show(t)
				if err := <-answered; err != nil {
					t.Fatal(err)
				}
			}
			c.ask(50)
			var speaker string
			lt.Eventually(t, 20*time.Second, func() (bool, string) {
				for _, node := range []string{"alpha", "beta"} {
					if s := p.status(node); s != nil && s.Role == "primary" && s.State == "solo" {
						speaker = node
					}
				}
				return speaker != "", "nobody speaks alone"
			})
			c.ask(50)
			p.partition(x.cut, false)
			if speaker == "beta" {
				p.rejoin("alpha")
			}
			p.covered()
			c.ask(1)
			turns := heard.Turns()
			for _, turn := range turns {
				t.Log(turn)
			}
			if want := map[string]int{"alpha": 1, "beta": 2}[speaker]; len(turns) != want {
				t.Errorf("%d turns of speech, want %d", len(turns), want)
			}
		})
	}
}

// order runs lockstep with a node's command and returns what it printed.
func (p *livingPair) order(node string, args ...string) (string, error) {
	cmd := p.lockstep(append(args, "-c", p.config, "--node", node)...)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, errs.String())
	}
	return string(out), err
}

// TestOperator: what an operator may ask a pair for.
func TestOperator(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	heard := lt.WatchSpeakers(t, p.Switch, "portP", "portS")
	c := p.open()
	out, err := p.order("alpha", "checkpoint")
	if err != nil || !strings.Contains(out, "is committed") {
		t.Errorf("checkpoint: %q, %v", out, err)
	}
	if out, err := p.order("beta", "checkpoint"); err == nil || !strings.Contains(err.Error(), "checkpoints are the primary's: ask alpha") {
		t.Errorf("checkpoint on the secondary: %q, %v", out, err)
	}
	// A planned takeover.
	if out, err = p.order("beta", "failover"); err != nil || !strings.Contains(out, "beta transmits alone") {
		t.Fatalf("failover: %q, %v", out, err)
	}
	t.Log(out)
	c.ask(1)
	p.procs["alpha"].Wait()
	// A unit that starts the old primary in its old role (R19).
	p.run("alpha", "primary")
	if err := p.procs["alpha"].Wait(); err == nil || p.procs["alpha"].ProcessState.ExitCode() != exitUsage {
		t.Errorf("the old primary, started as one: %v", err)
	}
	if log := p.log("alpha"); !strings.Contains(log, "is not primary any more: beta speaks") {
		t.Error("the old primary does not say why it does not start")
	}
	p.run("alpha", "secondary")
	p.covered()
	c.ask(1)
	// The primary goes on alone, and its secondary begins afresh.
	if out, err = p.order("beta", "failover"); err != nil || !strings.Contains(out, "beta transmits alone") {
		t.Errorf("failover of the primary: %q, %v", out, err)
	}
	p.covered()
	c.ask(1)
	twoTurns(t, heard)
	out, err = p.order("beta", "events", "--json")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"kind":"failover","cause":"took over"`, `"role":"primary"`, `"kind":"checkpoint"`, `"kind":"sync"`} {
		if !strings.Contains(out, want) {
			t.Errorf("no %s among the events:\n%s", want, out)
		}
	}
}

// TestFrozen: a daemon that stands still is one that is gone. When it goes on, it
// finds out that another host speaks, and says nothing.
func TestFrozen(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	heard := lt.WatchSpeakers(t, p.Switch, "portP", "portS")
	c := p.open()
	p.signalDaemon("alpha", syscall.SIGSTOP)
	began := time.Now()
	c.ask(1)
	t.Logf("the first answer took %v", time.Since(began))
	c.ask(49)
	p.await("beta", func(s *control.Status) bool { return s.State == "solo" })
	p.signalDaemon("alpha", syscall.SIGCONT)
	p.fenced("alpha")
	c.ask(50)
	twoTurns(t, heard)
	// The same with a secondary: the primary goes on, and the SVM is replaced.
	p.run("alpha", "secondary")
	p.covered()
	p.signalDaemon("alpha", syscall.SIGSTOP)
	c.ask(50)
	p.await("beta", func(s *control.Status) bool { return s.State == "solo" })
	p.signalDaemon("alpha", syscall.SIGCONT)
	p.covered()
	c.ask(1)
	twoTurns(t, heard)
}

// TestStarved: neither daemon gets its CPU for two timeouts. Whoever transmits
// afterwards, it is one host, and at most one has taken over from the other.
func TestStarved(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	heard := lt.WatchSpeakers(t, p.Switch, "portP", "portS")
	c := p.open()
	for _, node := range []string{"alpha", "beta"} {
		p.signalDaemon(node, syscall.SIGSTOP)
	}
	<-time.After(time.Second) // what is tested: two timeouts without a CPU
	for _, node := range []string{"alpha", "beta"} {
		p.signalDaemon(node, syscall.SIGCONT)
	}
	c.ask(50)
	turns := heard.Turns()
	t.Log(turns)
	if len(turns) > 2 {
		t.Errorf("turns: %v", turns)
	}
}

// TestDaemonStaysDead: a primary's daemon ends on a living host and does not come back:
// the other host waits for it as long as heartbeat.restart says.
func TestDaemonStaysDead(t *testing.T) {
	p := newLivingPair(t, 0, "heartbeat: {restart: 1s}")
	p.start()
	heard := lt.WatchSpeakers(t, p.Switch, "portP", "portS")
	c := p.open()
	p.kill("alpha")
	began := time.Now()
	c.ask(1)
	t.Logf("the first answer took %v", time.Since(began))
	c.ask(49)
	twoTurns(t, heard)
	p.run("alpha", "secondary") // its QEMU is ended, and makes room for a new one
	p.covered()
	c.ask(1)
	twoTurns(t, heard)
}

// TestFrozenWinner: a secondary that has won the arbiter stands still before its guest
// speaks, for longer than QEMU has for an answer. The old primary, woken first, does
// not speak; the winner, woken later, does.
func TestFrozenWinner(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	heard := lt.WatchSpeakers(t, p.Switch, "portP", "portS")
	c := p.open()
	p.signal("beta", syscall.SIGSTOP) // so that winning is as far as it gets
	p.signalDaemon("alpha", syscall.SIGSTOP)
	cfg, err := config.Load(p.config)
	if err != nil {
		t.Fatal(err)
	}
	a, err := arbiter.Open(cfg, "alpha")
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	lt.Eventually(t, 20*time.Second, func() (bool, string) {
		now, err := a.Read(t.Context())
		return now.Speaker == "beta", fmt.Sprint(now, err)
	})
	p.signalDaemon("beta", syscall.SIGSTOP)
	answered := c.askLater()
	before := heard.Turns()
	p.signalDaemon("alpha", syscall.SIGCONT)
	p.fenced("alpha")
	silentSince(t, heard, before, answered, 3*time.Second) // more than a QMP command may take
	p.signal("beta", syscall.SIGCONT)
	p.signalDaemon("beta", syscall.SIGCONT)
	if err := <-answered; err != nil {
		t.Fatal(err)
	}
	c.ask(50)
	p.run("alpha", "secondary")
	p.covered()
	c.ask(1)
	twoTurns(t, heard)
}

// quick is await for what does not last.
func (p *livingPair) quick(node string, want func(*control.Status) bool) {
	p.t.Helper()
	socket := filepath.Join(p.Dir, "run/web1-"+node+".sock")
	ctx, cancel := context.WithTimeout(p.t.Context(), 20*time.Second)
	defer cancel()
	for {
		s, err := control.FetchStatus(ctx, socket)
		if err == nil && want(&s) {
			return
		}
		if ctx.Err() != nil {
			p.t.Fatalf("%s never was as wanted: %+v, %v", node, s, err)
		}
	}
}

// TestMidCheckpoint: either host loses its QEMU between STOP and RESUME, the SVM with
// its new state loaded or not, or while it is parked and the PVM's state has not come.
func TestMidCheckpoint(t *testing.T) {
	p := newLivingPair(t, 1, "checkpoint: {period: 60s}")
	p.start()
	c, primary := p.open(), "alpha"
	// parked has a checkpoint begin that the SVM, which stands still, does not take.
	parked := func() {
		t.Helper()
		p.signal(other(primary), syscall.SIGSTOP)
		go p.order(primary, "checkpoint")
		p.quick(primary, func(s *control.Status) bool { return s.State == "checkpointing" })
		p.quick(other(primary), func(s *control.Status) bool { return s.State == "checkpointing" })
	}
	// halfway has a node's guest stopped for a checkpoint that takes its time.
	halfway := func(node string) {
		t.Helper()
		d := p.mustDial(lt.Guest4, portDirty)
		defer d.Close() // the guest hears of it when it goes on
		if got := p.ask(d, ""); got != "dirty" {
			t.Fatalf("%q in place of dirty", got)
		}
		go p.order(primary, "checkpoint")
		p.quick(node, func(s *control.Status) bool { return s.QMP.State == "paused" })
	}
	revive := func() {
		t.Helper()
		p.rejoin(primary)
		primary = other(primary)
	}
	for _, x := range []struct {
		name string
		f    func()
	}{
		{"parked, the secondary dies", func() {
			parked()
			p.killQEMU(other(primary))
		}},
		{"parked, the primary dies", func() {
			parked()
			p.killQEMU(primary)
			p.signal(other(primary), syscall.SIGCONT)
			c.ask(1)
			revive()
		}},
		{"half loaded, the secondary dies", func() {
			halfway(primary)
			p.killQEMU(other(primary))
		}},
		{"half loaded, the primary dies", func() {
			halfway(primary)
			p.killQEMU(primary)
			c.ask(1)
			revive()
		}},
		{"loaded, the primary dies", func() {
			halfway(other(primary))
			p.quick(other(primary), func(s *control.Status) bool { return s.QMP.State == "running" })
			p.killQEMU(primary)
			c.ask(1)
			revive()
		}},
	} {
		for range rounds(4) {
			t.Log(x.name)
			x.f()
			c.ask(1)
			p.covered()
			c.ask(1)
		}
	}
}

// TestDaemonsRestart: daemons are killed and started again, in every state of the
// pair: nobody takes over, no connection breaks.
func TestDaemonsRestart(t *testing.T) {
	p := newLivingPair(t, 0, "compare: {timeout: 10s}\nheartbeat: {restart: 20s}")
	p.start()
	c := p.open()
	for _, nodes := range [][]string{{"beta"}, {"alpha"}, {"beta", "alpha"}} {
		for i, x := range situations[1:3] {
			t.Run(fmt.Sprintf("%v %s", nodes, x.name), func(t *testing.T) {
				q := *p
				q.pair = p.with(t)
				q.during(x, func() {
					for _, node := range nodes {
						p.kill(node)
					}
					for _, node := range nodes {
						p.run(node, map[string]string{"alpha": "primary", "beta": "secondary"}[node])
					}
					c.ask(1)
				})
				p.covered()
				if s := p.status("alpha"); s.Record != p.record {
					t.Errorf("%d: the record is of term %d, and was of %d: somebody spoke alone", i, s.Record, p.record)
				}
			})
			if t.Failed() {
				return
			}
		}
	}
	// Alone, too.
	p.kill("beta")
	p.killQEMU("beta")
	p.await("alpha", func(s *control.Status) bool { return s.State == "solo" })
	p.kill("alpha")
	c.ask(1) // the kernel goes on without a daemon
	p.run("alpha", "primary")
	p.await("alpha", func(s *control.Status) bool { return s.State == "solo" })
	c.ask(1)
	p.run("beta", "secondary")
	p.covered()
	c.ask(1)
}

// rounds is 1, or n where time is no matter.
func rounds(n int) int {
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return 1
	}
	return n
}

// TestFailovers: in every situation one of the two QEMUs dies, the other goes on, no
// connection breaks and no byte is wrong; the host that lost its guest gets a new one. One
// client session lasts through all of it.
func TestFailovers(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	c, primary := p.open(), "alpha"
	for i := range 2 * rounds(5) {
		dies := []string{"primary", "secondary"}[i%2]
		for _, x := range situations {
			t.Run(dies+"/"+x.name, func(t *testing.T) {
				victim := map[string]string{"primary": primary, "secondary": other(primary)}[dies]
				q := *p
				q.pair = p.with(t)
				sig := syscall.SIGKILL
				if x.name == "idle" {
					sig = syscall.SIGTERM // QEMU tells of it, and of what it loses on its way
				}
				q.during(x, func() {
					p.endQEMU(victim, sig)
					c.ask(1)
				})
				if t.Failed() {
					return
				}
				if dies == "primary" {
					primary = other(primary)
					p.rejoin(victim)
				}
				p.covered()
				c.ask(1)
			})
			if t.Failed() {
				return
			}
		}
	}
}
