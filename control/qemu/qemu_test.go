// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"lockstep/control/qemu"
	"lockstep/control/qemu/qemutest"
	"lockstep/control/qmp"
	lt "lockstep/loader/loadertest"
)

// In a guest the test binary is the service.
func TestMain(m *testing.M) {
	if os.Getenv("TEST_GUEST") == "" {
		os.Exit(m.Run())
	}
	serve()
}

// serve answers lines: "set V", "get", "write DISK BLOCK WORD", "read DISK BLOCK",
// "churn DISK", "rest", "verify DISK". A value is in the guest's memory, blocks are on
// its disks and in no cache.
func serve() {
	l, err := net.Listen("tcp", ":7000")
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("ready")
	var value atomic.Value
	value.Store("nothing")
	var load churn
	for {
		c, err := l.Accept()
		if err != nil {
			os.Exit(1)
		}
		go func() {
			defer c.Close()
			for r := bufio.NewScanner(c); r.Scan(); {
				var disk, word string
				var block int64
				switch f := strings.Fields(r.Text()); f[0] {
				case "set":
					value.Store(f[1])
					fmt.Fprintln(c, "ok")
				case "get":
					fmt.Fprintln(c, value.Load())
				case "write":
					fmt.Sscan(strings.Join(f[1:], " "), &disk, &block, &word)
					_, err := onDisk(disk, block, word)
					fmt.Fprintln(c, "wrote", err)
				case "churn":
					load.on.Store(true)
					go load.run(f[1])
					fmt.Fprintln(c, "ok")
				case "rest":
					load.on.Store(false)
					load.mu.Lock()
					load.mu.Unlock()
					fmt.Fprintln(c, "ok")
				case "verify":
					fmt.Fprintln(c, load.verify(f[1]))
				case "read":
					fmt.Sscan(strings.Join(f[1:], " "), &disk, &block)
					word, err := onDisk(disk, block, "")
					fmt.Fprintln(c, word, err)
				}
			}
		}()
	}
}

// churn keeps writing, and keeps in memory what the disk must hold.
type churn struct {
	on   atomic.Bool
	mu   sync.Mutex // a write, and what memory says of it, or verify
	want map[int64]string
}

// Its blocks.
const churnFrom, churnTo = 1000, 1500

func (l *churn) run(disk string) {
	for n := int64(0); l.on.Load(); n++ {
		block, word := churnFrom+n*7919%(churnTo-churnFrom), fmt.Sprint("n", n)
		l.mu.Lock()
		if _, err := onDisk(disk, block, word); err != nil {
			word = err.Error()
		}
		if l.want == nil {
			l.want = make(map[int64]string)
		}
		l.want[block] = word
		l.mu.Unlock()
	}
}

func (l *churn) verify(disk string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	for block, want := range l.want {
		if got, err := onDisk(disk, block, ""); err != nil || got != want {
			return fmt.Sprintf("block %d is %q, %v; memory says %q", block, got, err, want)
		}
	}
	if len(l.want) == 0 {
		return "nothing was written"
	}
	return "good"
}

// onDisk writes a word into a block of 4 KiB, or reads it.
func onDisk(disk string, block int64, word string) (string, error) {
	fd, err := unix.Open("/dev/"+disk, unix.O_RDWR|unix.O_DIRECT|unix.O_SYNC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	const size = 4096
	b := make([]byte, 2*size)
	b = b[size-int(uintptr(unsafe.Pointer(&b[0]))%size):][:size] // O_DIRECT wants it aligned
	if word == "" {
		_, err := unix.Pread(fd, b, block*size)
		return strings.TrimRight(string(b), "\x00"), err
	}
	copy(b, word)
	_, err = unix.Pwrite(fd, b, block*size)
	return word, err
}

const guestAddr = "10.77.0.2"

var guestMAC = net.HardwareAddr{0x52, 0x54, 0, 0x77, 0, 2}

// world is two hosts, on each of which a guest is reached over its tap.
type world struct {
	t              *testing.T
	dir            string
	kernel, initrd string
	preload        string
	disks          int
	images         map[string]string // folders of the hosts' images; "": dir
	overlays       map[string]string // of their overlays
	user           string            // that QEMU becomes
	mask           bool              // a mutation: one replica's word is enough
	seed           bool              // QEMU's command lines have the disks as COLO-FT.txt does
}

const diskSize = 32 << 20

func newWorld(t *testing.T, disks int) *world { return newWorldIn(t, disks, func(*world) {}) }

// newWorldIn has choose say where things are, before they are made.
func newWorldIn(t *testing.T, disks int, choose func(*world)) *world {
	lt.NeedRoot(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, dir: t.TempDir(), disks: disks, preload: qemutest.Preload(t)}
	choose(w)
	w.kernel, w.initrd = qemutest.Image(t, qemutest.Guest{Service: self, Env: []string{"TEST_GUEST=1"}})
	ip := func(args string) { lt.Run(t, "ip", strings.Fields(args)...) }
	for _, host := range []string{"a", "b"} {
		lt.Run(t, "ip", "netns", "add", w.ns(host))
		t.Cleanup(func() { lt.Run(t, "ip", "netns", "del", w.ns(host)) })
		in := "-n " + w.ns(host) + " "
		ip(in + "link set lo up")
		ip(in + "tuntap add tap0 mode tap")
		// The guest knows its client by the same MAC on both hosts.
		ip(in + "link set tap0 address 02:00:00:00:77:01 up")
		ip(in + "addr add 10.77.0.1/24 dev tap0")
		// While there is no guest, nobody finds out that there is none.
		ip(in + "neigh replace " + guestAddr + " lladdr " + guestMAC.String() + " dev tap0 nud permanent")
	}
	for i := range disks {
		qemutest.Disk(t, w.image("a", i), diskSize, false)
		lt.Run(t, "cp", w.image("a", i), w.image("b", i))
	}
	ip("link add ctl netns " + w.ns("a") + " type veth peer name ctl netns " + w.ns("b"))
	for i, host := range []string{"a", "b"} {
		ip(fmt.Sprintf("-n %s addr add 192.0.2.%d/24 dev ctl", w.ns(host), i+1))
		ip("-n " + w.ns(host) + " link set ctl up")
	}
	return w
}

// runAs has the QEMUs become a user, who may use their images.
func (w *world) runAs(name string) {
	w.t.Helper()
	w.user = name
	for _, dir := range []string{w.dir, filepath.Dir(w.dir)} {
		if err := os.Chmod(dir, 0o755); err != nil {
			w.t.Fatal(err)
		}
	}
	for _, host := range []string{"a", "b"} {
		for i := range w.disks {
			lt.Run(w.t, "chown", name, w.image(host, i))
		}
	}
}

func (w *world) ns(host string) string { return fmt.Sprintf("lsq%x%s", os.Getpid(), host) }

func (w *world) image(host string, i int) string {
	return filepath.Join(cmp.Or(w.images[host], w.dir), fmt.Sprintf("%s%d.qcow2", host, i))
}

// guest is one QEMU on one host.
type guest struct {
	w    *world
	host string
	spec *qemu.Spec
	in   *qemu.Incoming
	p    *qemu.Process
	m    *qmp.Monitor
	caps qemu.Caps

	resumes atomic.Int32
	stopped chan struct{} // a STOP came
	halted  atomic.Int64  // the longest time from STOP to RESUME, ns
}

func (w *world) spec(host string) *qemu.Spec {
	s := &qemu.Spec{
		VM: "web1", Node: host,
		Guest: qemu.Guest{
			Binary: "qemu-system-x86_64", Machine: "pc", Accel: "tcg", CPU: "qemu64",
			Memory: qemutest.Memory, SMP: 1,
			Kernel: w.kernel, Initrd: w.initrd, Append: qemutest.Append([]string{guestAddr + "/24"}),
			NICModel: "virtio-net-pci",
			Extra:    []string{"-serial", "file:" + w.serial(host)},
		},
		NICs: []qemu.NIC{{Tap: "tap0", MAC: guestMAC}},
		Env:  []string{w.preload},
		QMP:  filepath.Join(w.dir, host+", its.qmp"), Dir: w.dir,
	}
	for i := range w.disks {
		s.Disks = append(s.Disks, qemu.Disk{ID: fmt.Sprintf("colo-disk%d", i), Image: w.image(host, i), OverlayDir: cmp.Or(w.overlays[host], filepath.Join(w.dir, "overlays, "+host))})
	}
	s.User = w.user
	qemu.SetMask(s, w.mask)
	return s
}

// seedDrives has the disk as docs/COLO-FT.txt of QEMU starts it.
func (w *world) seedDrives(host string, secondary bool) []string {
	image, active, hidden := w.image(host, 0), filepath.Join(w.dir, "active"), filepath.Join(w.dir, "hidden")
	device := []string{"-device", "virtio-blk-pci,drive=colo-disk0"}
	const quorum = "if=none,id=colo-disk0,driver=quorum,read-pattern=fifo,vote-threshold=1,"
	if !secondary {
		return append([]string{"-drive", quorum + "children.0.file.filename=" + image + ",children.0.driver=qcow2"}, device...)
	}
	for _, path := range []string{active, hidden} {
		qemutest.Disk(w.t, path, diskSize, false)
	}
	return append([]string{
		"-drive", "if=none,id=parent0,file.filename=" + image + ",driver=qcow2",
		"-drive", "if=none,id=childs0,driver=replication,mode=secondary,file.driver=qcow2,top-id=colo-disk0," +
			"file.file.filename=" + active + ",file.backing.driver=qcow2,file.backing.file.filename=" + hidden + ",file.backing.backing=parent0",
		"-drive", quorum + "children.0=childs0"}, device...)
}

func (w *world) serial(host string) string { return filepath.Join(w.dir, host+".serial") }

// incoming is where a host's secondary waits.
func (w *world) incoming(host string) *qemu.Incoming {
	addr := map[string]string{"a": "192.0.2.1", "b": "192.0.2.2"}[host]
	return &qemu.Incoming{Migration: "unix:" + filepath.Join(w.dir, host+".mig"), NBD: netip.AddrPortFrom(netip.MustParseAddr(addr), 9999)}
}

// start starts a primary, or with in a secondary.
func (w *world) start(host string, secondary bool) *guest {
	t := w.t
	t.Helper()
	g := &guest{w: w, host: host, spec: w.spec(host)}
	if secondary {
		g.in = w.incoming(host)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	disks := g.spec.Disks
	if w.seed {
		g.spec.Extra, g.spec.Disks = append(g.spec.Extra, w.seedDrives(host, secondary)...), nil
	}
	lt.In(t, w.ns(host), func() {
		sizes, err := g.spec.DiskSizes()
		if err == nil {
			err = g.spec.Check(g.in, sizes)
		}
		if err == nil {
			g.p, err = qemu.Start(ctx, g.spec, g.in)
		}
		if err != nil {
			t.Fatalf("%s: %v", host, err)
		}
	})
	g.spec.Disks = disks
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(w.serial(host))
			t.Logf("QEMU on %s: %s\nconsole: %s", host, qemu.Log(g.spec), b)
		}
		g.kill()
		g.p.Release()
	})
	g.dial()
	return g
}

func (g *guest) dial() {
	t := g.w.t
	t.Helper()
	var err error
	if g.m, err = qmp.Dial(t.Context(), g.spec.QMP, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.m.Disconnect() })
	events, err := g.m.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	g.stopped = make(chan struct{}, 1)
	go func() {
		var at time.Time
		for e := range events {
			switch e.Event {
			case "RESUME":
				g.resumes.Add(1)
				g.halted.Store(max(g.halted.Load(), int64(qmp.Time(e).Sub(at))))
			case "STOP":
				at = qmp.Time(e)
				select {
				case g.stopped <- struct{}{}:
				default:
				}
			}
		}
	}()
	if g.caps, err = qemu.Probe(g.m); err != nil {
		t.Fatal(err)
	}
}

// drainStops forgets the STOPs so far.
func (g *guest) drainStops() {
	select {
	case <-g.stopped:
	default:
	}
}

func freeze(g *guest) {
	g.w.t.Helper()
	if err := unix.Kill(g.p.Pid(), unix.SIGSTOP); err != nil {
		g.w.t.Fatal(err)
	}
}

// halts measures from now on for how long the guest stands still at a time.
func (g *guest) halts() (longest func() time.Duration) {
	g.halted.Store(0)
	return func() time.Duration { return time.Duration(g.halted.Load()) }
}

func (g *guest) kill() {
	g.w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := g.p.Kill(ctx); err != nil {
		g.w.t.Error(err)
	}
}

// replicate starts a secondary on host and replicates g to it.
func (g *guest) replicate(host string, o qemu.Options) *guest {
	t := g.w.t
	t.Helper()
	s := g.w.start(host, true)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for range 2 { // once more changes nothing
		if err := qemu.PrepareSecondary(ctx, s.m, s.caps, s.spec.Disks, s.in.NBD); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	for range 2 {
		if err := qemu.Replicate(ctx, g.m, g.caps, g.spec.Disks, *s.in, o); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%s replicates to %s after %v", g.host, host, time.Since(began).Round(time.Millisecond))
	return s
}

// checkpoint makes one and waits for it.
func (g *guest) checkpoint() {
	t := g.w.t
	t.Helper()
	before := g.resumes.Load()
	if err := g.m.Checkpoint(); err != nil {
		t.Fatal(err)
	}
	lt.Eventually(t, time.Minute, func() (bool, string) {
		return g.resumes.Load() > before, "no RESUME behind the order for a checkpoint"
	})
}

// takeOver is the failover of a survivor.
func (g *guest) takeOver() {
	t := g.w.t
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	began := time.Now()
	for range 2 {
		failover := qemu.PrimaryFailover
		if g.in != nil {
			failover = qemu.SecondaryFailover
		}
		if err := failover(ctx, g.m, g.spec.Disks); err != nil {
			t.Fatal(err)
		}
	}
	g.in = nil // from here on it is the primary
	t.Logf("%s is alone after %v", g.host, time.Since(began).Round(time.Millisecond))
}

// ask sends a line to the guest over its host's tap.
func (g *guest) ask(line string) (string, error) {
	var answer string
	var err error
	lt.In(g.w.t, g.w.ns(g.host), func() {
		var c net.Conn
		if c, err = net.DialTimeout("tcp", guestAddr+":7000", 20*time.Second); err != nil {
			return
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		fmt.Fprintln(c, line)
		answer, err = bufio.NewReader(c).ReadString('\n')
	})
	return strings.TrimSuffix(answer, "\n"), err
}

func (g *guest) mustAsk(line, want string) {
	g.w.t.Helper()
	if got, err := g.ask(line); err != nil || got != want {
		g.w.t.Fatalf("%s: %q answers %q, %v; want %q", g.host, line, got, err, want)
	}
}

// Memory without disks: what the guest knew at the checkpoint it knows behind any
// failover, and a survivor replicates again, to either host.
func TestDiskless(t *testing.T) {
	w := newWorld(t, 0)
	a := w.start("a", false)
	if running, state, err := a.m.Status(); err != nil || running {
		t.Fatalf("a primary starts %s, %v", state, err)
	}
	b := a.replicate("b", qemu.Options{})
	qemutest.Await(t, w.serial("a"), "ready")
	a.mustAsk("set one", "ok")
	a.checkpoint()
	a.mustAsk("set two", "ok")

	b.kill()
	a.takeOver()
	a.mustAsk("get", "two")

	b = a.replicate("b", qemu.Options{})
	a.checkpoint()
	a.mustAsk("set three", "ok") // the secondary's guest never hears of it
	a.kill()
	b.takeOver()
	b.mustAsk("get", "two")

	a = b.replicate("a", qemu.Options{})
	b.mustAsk("set four", "ok")
	b.checkpoint()
	b.kill()
	a.takeOver()
	a.mustAsk("get", "four")
}

// A process is found again by whoever comes later, and only when it is the one.
func TestProcess(t *testing.T) {
	w := newWorld(t, 0)
	g := w.start("a", false)
	found, err := qemu.Find(g.spec)
	if err != nil || found.Pid() != g.p.Pid() || !found.Alive() {
		t.Fatalf("found %+v, %v", found, err)
	}
	lt.In(t, w.ns("a"), func() {
		if _, err := qemu.Start(t.Context(), g.spec, nil); err == nil || !strings.Contains(err.Error(), "runs on this host already") {
			t.Errorf("started twice: %v", err)
		}
	})
	g.kill()
	<-found.Done()
	if found.Alive() || g.p.Alive() {
		t.Error("alive behind its death")
	}
	found.Release()
	if _, err := qemu.Find(g.spec); !errors.Is(err, qemu.ErrNotRunning) {
		t.Errorf("the dead was found: %v", err)
	}
	// The number may be another process's by now.
	pid := filepath.Join(g.spec.Dir, g.spec.VM+"-"+g.spec.Node+".pid")
	for _, is := range []string{fmt.Sprint(os.Getpid()), "", "x", "-1", "999999999"} {
		if err := os.WriteFile(pid, []byte(is+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := qemu.Find(g.spec); !errors.Is(err, qemu.ErrNotRunning) {
			t.Errorf("pid file %q: %v", is, err)
		}
	}
	for device, says := range map[string]string{"no-such-device": "no-such-device", "usb-mtp,rootdir=/": "not migratable"} {
		bad := *g.spec
		bad.Extra = []string{"-device", "usb-ehci", "-device", device}
		if _, err := qemu.Start(t.Context(), &bad, nil); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("QEMU's own words about %s are missing: %v", device, err)
		}
	}
}

func (g *guest) mustRead(disk string, block int, want string) {
	g.w.t.Helper()
	g.mustAsk(fmt.Sprintf("read %s %d", disk, block), want+" <nil>")
}

func (g *guest) mustWrite(disk string, block int, word string) {
	g.w.t.Helper()
	g.mustAsk(fmt.Sprintf("write %s %d %s", disk, block, word), "wrote <nil>")
}

// awaitMerged waits until a guest that took over has no overlays any more.
func (g *guest) awaitMerged() {
	g.w.t.Helper()
	lt.Eventually(g.w.t, time.Minute, func() (bool, string) {
		ok, err := qemu.Merged(g.m, g.spec.Disks)
		return ok, fmt.Sprint("not merged ", err)
	})
}

// Two disks through both failovers and the replication to a new secondary behind
// each: what was on the disks at the checkpoint is there, and what the dead primary
// wrote behind it is not, because the SVM's memory does not know of it.
func TestDisks(t *testing.T) {
	w := newWorld(t, 2)
	a := w.start("a", false)
	other := w.spec("a")
	other.Node, other.QMP = "c", filepath.Join(w.dir, "c.qmp")
	if err := other.Check(nil, nil); err == nil || !strings.Contains(err.Error(), "lock") {
		t.Errorf("an image that another QEMU uses: %v", err)
	}
	seen := make(map[string]qemu.Progress)
	copied := qemu.Options{Resync: true, Progress: func(p qemu.Progress) { seen[p.What] = p }}

	// The images are the same: both are empty.
	b := a.replicate("b", qemu.Options{})
	qemutest.Await(t, w.serial("a"), "ready")
	for _, disk := range []string{"vda", "vdb"} {
		a.mustWrite(disk, 1, disk+"-one")
		a.mustWrite(disk, 2, disk+"-both")
	}
	a.checkpoint()
	a.mustWrite("vda", 1, "lost")
	a.mustWrite("vda", 3, "lost")
	a.kill()
	b.takeOver()
	for _, disk := range []string{"vda", "vdb"} {
		b.mustRead(disk, 1, disk+"-one")
		b.mustRead(disk, 2, disk+"-both")
	}
	b.mustRead("vda", 3, "")
	b.mustWrite("vda", 4, "alone")

	// The promoted secondary has a new one, whose image holds the lost writes.
	a = b.replicate("a", copied)
	for i := range w.disks {
		id := a.spec.Disks[i].ID
		if p := seen[id]; p.Total < diskSize || p.Done != p.Total {
			t.Errorf("progress of %s ends with %+v", id, p)
		}
	}
	b.mustWrite("vdb", 5, "again")
	b.checkpoint()
	b.mustWrite("vdb", 5, "lost")
	b.kill()
	a.takeOver()
	a.mustRead("vda", 1, "vda-one")
	a.mustRead("vda", 3, "")
	a.mustRead("vda", 4, "alone")
	a.mustRead("vdb", 5, "again")

	// The secondary dies; the primary keeps all it wrote, and has a new one.
	b = a.replicate("b", copied)
	a.mustWrite("vda", 6, "six")
	b.kill()
	written := a.waitingWrite(7, "seven") // before anybody noticed
	a.takeOver()
	written()
	a.mustWrite("vda", 8, "eight")
	b = a.replicate("b", copied)
	a.checkpoint()
	a.kill()
	b.takeOver()
	b.mustRead("vda", 6, "six")
	b.mustRead("vda", 7, "seven")
	b.mustRead("vda", 8, "eight")
	b.mustRead("vdb", 2, "vdb-both")
	b.mustWrite("vdb", 9, "nine")

	// Behind the merge the images alone are the disks.
	b.awaitMerged()
	if err := qemu.Quit(b.m); err != nil {
		t.Error(err)
	}
	<-b.p.Done()
	b = w.start("b", false)
	if err := qemu.Cont(b.m); err != nil {
		t.Fatal(err)
	}
	qemutest.Await(t, w.serial("b"), "ready")
	b.mustRead("vda", 8, "eight")
	b.mustRead("vda", 1, "vda-one")
	b.mustRead("vdb", 9, "nine")
}

// QEMUs that somebody else started, with the disk as QEMU's own guide has it.
func TestAttached(t *testing.T) {
	w := newWorld(t, 1)
	w.seed = true
	a := w.start("a", false)
	b := a.replicate("b", qemu.Options{})
	qemutest.Await(t, w.serial("a"), "ready")
	a.mustWrite("vda", 1, "one")
	b.kill()
	a.takeOver()
	b = a.replicate("b", qemu.Options{Resync: true})
	a.mustWrite("vda", 2, "two")
	a.checkpoint()
	a.mustWrite("vda", 2, "lost")
	a.kill()
	b.takeOver()
	b.mustRead("vda", 2, "two")
	b.mustAsk("churn vda", "ok")
	a = b.replicate("a", qemu.Options{Resync: true})
	b.checkpoint()
	b.kill()
	a.takeOver()
	a.mustRead("vda", 1, "one")
	a.mustRead("vda", 2, "two")
	a.mustAsk("verify vda", "good")
}

// A guest that writes all the time, while it is replicated, at checkpoints, and
// when a side dies in the middle of one: its memory and its disk always agree, and
// with the guest at rest the two hosts' images do.
func TestDiskUnderLoad(t *testing.T) {
	w := newWorld(t, 1)
	a := w.start("a", false)
	if err := qemu.Cont(a.m); err != nil {
		t.Fatal(err)
	}
	qemutest.Await(t, w.serial("a"), "ready")
	a.mustAsk("churn vda", "ok")
	hosts := []*guest{a}
	for round := range 4 {
		p := hosts[0]
		s := p.replicate(map[string]string{"a": "b", "b": "a"}[p.host], qemu.Options{Resync: true})
		for range 3 {
			p.checkpoint()
		}
		p.mustAsk("verify vda", "good")
		survivor, dead := s, p
		if round%2 == 1 {
			survivor, dead = p, s
		}
		p.drainStops()
		if err := p.m.Checkpoint(); err != nil {
			t.Fatal(err)
		}
		<-p.stopped
		dead.kill()
		survivor.takeOver()
		survivor.mustAsk("verify vda", "good")
		hosts = []*guest{survivor, dead}
	}

	p := hosts[0]
	s := p.replicate(hosts[1].host, qemu.Options{Resync: true})
	p.mustAsk("rest", "ok")
	p.checkpoint()
	p.kill()
	s.takeOver()
	s.mustAsk("verify vda", "good")
	s.awaitMerged()
	if err := qemu.Quit(s.m); err != nil {
		t.Error(err)
	}
	<-s.p.Done()
	lt.Run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", w.image("a", 0), w.image("b", 0))
}

// A host that is silent instead of dead: its QEMU stands still with all its
// connections open. Writes and checkpoints hang then, and failover frees them.
func TestSilentHost(t *testing.T) {
	w := newWorld(t, 1)
	a := w.start("a", false)
	b := a.replicate("b", qemu.Options{})
	qemutest.Await(t, w.serial("a"), "ready")
	a.mustAsk("churn vda", "ok")
	a.checkpoint()
	freeze(b)
	if err := a.m.Checkpoint(); err != nil {
		t.Fatal(err)
	}
	// Something that waits for the guest's writes, and so for the other host.
	hangs := make(chan error, 1)
	go func() { hangs <- qemu.Stop(a.m) }()
	a.takeOver()
	if err := <-hangs; err != nil {
		t.Errorf("the command that hung: %v", err)
	}
	if err := qemu.Cont(a.m); err != nil {
		t.Error(err)
	}
	a.mustAsk("verify vda", "good")
	b.kill()

	b = a.replicate("b", qemu.Options{Resync: true})
	a.checkpoint()
	if err := a.m.Checkpoint(); err != nil {
		t.Fatal(err)
	}
	freeze(a)
	b.takeOver()
	b.mustAsk("verify vda", "good")
}

// Whatever goes wrong before COLO is on, the guest goes on alone, with nothing
// left of the try, and the next one succeeds.
func TestReplicateFails(t *testing.T) {
	w := newWorld(t, 1)
	a := w.start("a", false)
	if err := qemu.Cont(a.m); err != nil {
		t.Fatal(err)
	}
	qemutest.Await(t, w.serial("a"), "ready")
	a.mustAsk("churn vda", "ok")
	// Slow enough that memory is not there at once.
	bandwidth := func(bytes int64) {
		if err := a.m.Execute("migrate-set-parameters", map[string]any{"max-bandwidth": bytes}, nil); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name, at string
		do       func(cancel context.CancelFunc, s *guest)
	}{
		{"dies while the disk is copied", "colo-disk0", func(_ context.CancelFunc, s *guest) { s.kill() }},
		{"dies while memory is copied", "memory", func(_ context.CancelFunc, s *guest) { s.kill() }},
		{"given up while the disk is copied", "colo-disk0", func(cancel context.CancelFunc, _ *guest) { cancel() }},
		{"given up while memory is copied", "memory", func(cancel context.CancelFunc, _ *guest) { cancel() }},
		{"silent while memory is copied", "memory", func(cancel context.CancelFunc, s *guest) {
			freeze(s)
			cancel()
		}},
		{"stands still from the start", "", func(_ context.CancelFunc, s *guest) { freeze(s) }},
		{"stands still while the disk is copied", "colo-disk0", func(_ context.CancelFunc, s *guest) { freeze(s) }},
		{"stands still at the end of the disk's copy", "colo-disk0 copied", func(_ context.CancelFunc, s *guest) { freeze(s) }},
		{"stands still while the guest waits for it", "", func(_ context.CancelFunc, s *guest) {
			a.drainStops()
			go func() {
				<-a.stopped
				freeze(s)
			}()
		}},
		{"stands still while memory is copied", "memory", func(_ context.CancelFunc, s *guest) { freeze(s) }},
		{"memory is not copied in time", "slow", func(context.CancelFunc, *guest) {}},
		{"is not there", "", nil},
	} {
		ok := t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			bandwidth(4 << 20)
			to, o := *w.incoming("b"), qemu.Options{Resync: true, Limits: qemu.Limits{Stalled: 2 * time.Second}}
			if tt.at == "slow" {
				o.Timeout, o.Stalled = 2*time.Second, 0 // the disk has its time
			}
			if tt.do != nil {
				s := w.start("b", true)
				defer s.kill()
				if err := qemu.PrepareSecondary(ctx, s.m, s.caps, s.spec.Disks, s.in.NBD); err != nil {
					t.Fatal(err)
				}
				var once sync.Once
				o.Progress = func(p qemu.Progress) {
					if p.What == tt.at || p.What+" copied" == tt.at && p.Done >= diskSize {
						once.Do(func() { tt.do(cancel, s) })
					}
				}
				if tt.at == "" {
					tt.do(cancel, s)
				}
			}
			halts, began := a.halts(), time.Now()
			err := qemu.Replicate(ctx, a.m, a.caps, a.spec.Disks, to, o)
			if err == nil || strings.Contains(err.Error(), "could not be undone") || errors.Is(ctx.Err(), context.DeadlineExceeded) {
				t.Fatalf("got %v", err)
			}
			if o.Timeout != 0 && !strings.Contains(err.Error(), "not copied within 2s") {
				t.Errorf("got %v", err)
			}
			t.Logf("after %v: %v; the guest stood still for %v", time.Since(began), err, halts())
			if longest := halts(); longest > 10*time.Second {
				t.Errorf("the guest stood still for %v", longest)
			}
			if running, state, err := a.m.Status(); err != nil || !running {
				t.Errorf("the guest is %s, %v", state, err)
			}
			a.mustAsk("verify vda", "good")
			var nodes []struct {
				Name string `json:"node-name"`
			}
			if err := a.m.Execute("query-named-block-nodes", map[string]any{"flat": true}, &nodes); err != nil {
				t.Fatal(err)
			}
			if slices.ContainsFunc(nodes, func(n struct {
				Name string `json:"node-name"`
			}) bool {
				return n.Name == "nbd0"
			}) {
				t.Error("the secondary's image is still there")
			}
		})
		if !ok {
			return // what it left is the next one's trouble
		}
	}
	bandwidth(1 << 30)
	b := a.replicate("b", qemu.Options{Resync: true})
	a.checkpoint()
	a.kill()
	b.takeOver()
	b.mustAsk("verify vda", "good")
}

// A secondary that has no guest yet does not take over.
func TestSecondaryWithoutGuest(t *testing.T) {
	w := newWorld(t, 0)
	b := w.start("b", true)
	if err := qemu.SecondaryFailover(t.Context(), b.m, nil); err == nil || !strings.Contains(err.Error(), "no guest") {
		t.Errorf("got %v", err)
	}
}
