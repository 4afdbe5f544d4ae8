// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// smallDisk is a file system of its own that a test fills up and makes room on.
type smallDisk struct {
	t   *testing.T
	dir string
}

func newSmallDisk(t *testing.T, dir string, size int64) *smallDisk {
	t.Helper()
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil { // a QEMU may be on its way out
			t.Error(err)
		}
	})
	return &smallDisk{t, dir}
}

// take moves a file there, or has it made there, and leaves a link in its place.
func (d *smallDisk) take(path string) {
	d.t.Helper()
	to := filepath.Join(d.dir, filepath.Base(path))
	if b, err := os.ReadFile(path); err == nil {
		if err := os.WriteFile(to, b, 0o600); err != nil {
			d.t.Fatal(err)
		}
		if err := os.Remove(path); err != nil {
			d.t.Fatal(err)
		}
	} else if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		d.t.Fatal(err)
	}
	if err := os.Symlink(to, path); err != nil {
		d.t.Fatal(err)
	}
}

func (d *smallDisk) filler() string { return filepath.Join(d.dir, "filler") }

// fill leaves no room.
func (d *smallDisk) fill() { lt.FillUp(d.t, d.filler()) }

func (d *smallDisk) empty() {
	if err := os.Remove(d.filler()); err != nil {
		d.t.Error(err)
	}
}

// diskWriter writes files to the guest's disk, one after the other, and knows which of
// them the guest has confirmed.
type diskWriter struct {
	p         *livingPair
	mu        sync.Mutex
	confirmed int
	wrong     string
	why       error // why it ended
	stop      chan struct{}
	done      chan struct{}
}

func (p *livingPair) writes(patience time.Duration) *diskWriter {
	w := &diskWriter{p: p, stop: make(chan struct{}), done: make(chan struct{})}
	c := p.mustDial(lt.Guest4, portDisk)
	go func() {
		defer close(w.done)
		defer c.Close()
		r := bufio.NewReader(c)
		for n := 0; ; n++ {
			select {
			case <-w.stop:
				return
			default:
			}
			c.SetDeadline(time.Now().Add(patience))
			if _, err := fmt.Fprintf(c, "write f%d text %d\n", n, n); err != nil {
				return
			}
			got, err := r.ReadString('\n')
			if err != nil {
				w.why = err
				return // no host is left to answer; what was confirmed counts
			}
			w.mu.Lock()
			if want := fmt.Sprintf("wrote f%d <nil>\n", n); got != want {
				w.wrong = fmt.Sprintf("%q, want %q", got, want)
				w.mu.Unlock()
				return
			}
			w.confirmed = n + 1
			w.mu.Unlock()
		}
	}()
	return w
}

func (w *diskWriter) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.confirmed
}

// end stops writing.
func (w *diskWriter) end() (confirmed int) {
	close(w.stop)
	<-w.done
	w.p.t.Logf("%d writes confirmed, %v", w.confirmed, w.why)
	if w.wrong != "" {
		w.p.t.Error("the guest was told of an error: ", w.wrong)
	}
	return w.count()
}

// served waits for a host that serves the guest's disk; false: none does.
func (p *livingPair) served(within time.Duration) (net.Conn, bool) {
	for deadline := time.Now().Add(within); time.Now().Before(deadline); {
		c, err := p.dial(lt.Guest4, portDisk, "")
		if err != nil {
			continue
		}
		c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err = fmt.Fprintln(c, "read f0"); err == nil {
			if _, err = bufio.NewReader(c).ReadString('\n'); err == nil {
				return c, true
			}
		}
		c.Close()
	}
	return nil, false
}

// verify reads what was confirmed, from the survivor's disk and not from its cache.
func (p *livingPair) verify(c net.Conn, confirmed int) {
	p.t.Helper()
	r := bufio.NewReader(c)
	for n := range confirmed {
		c.SetDeadline(time.Now().Add(20 * time.Second))
		fmt.Fprintf(c, "read f%d\n", n)
		got, err := r.ReadString('\n')
		if want := fmt.Sprintf("text %d <nil>\n", n); err != nil || got != want {
			p.t.Fatalf("of %d confirmed files f%d is %q, %v", confirmed, n, got, err)
		}
	}
}

// diskFault is something that happens to a disk. It may not show before the next write.
type diskFault struct {
	name    string
	replica string // the node whose replica it is
	inject  func(*livingPair, *smallDisk)
	place   func(*livingPair, *smallDisk)
}

func fill(_ *livingPair, d *smallDisk) { d.fill() }

var diskFaults = []diskFault{
	{"primary image is full", "alpha", fill, func(p *livingPair, d *smallDisk) { d.take(filepath.Join(p.Dir, "alpha0.qcow2")) }},
	{"secondary image is full", "beta", fill, func(p *livingPair, d *smallDisk) { d.take(filepath.Join(p.Dir, "beta0.qcow2")) }},
	{"secondary overlays are full", "beta", fill, func(p *livingPair, d *smallDisk) {
		for _, kind := range []string{"active", "hidden"} {
			d.take(filepath.Join(p.Dir, "run/web1-beta-colo-disk0-"+kind+".qcow2"))
		}
	}},
	{"connection reset", "beta", func(p *livingPair, _ *smallDisk) {
		lt.Run(p.t, "nsenter", "--net=/run/netns/"+p.HostP, "ss", "-K", "dport", "=", "10809")
	}, func(*livingPair, *smallDisk) {}},
}

// newDiskPair is a pair with one disk, of which a part lies on a disk of the test's.
func newDiskPair(t *testing.T, x diskFault) (*livingPair, *smallDisk) {
	t.Helper()
	p := newLivingPair(t, 1, "checkpoint: {period: 500ms}\nmigration: {unix: migration.sock, nbd_port: 10809}")
	d := newSmallDisk(t, filepath.Join(p.Dir, "small"), 48<<20)
	x.place(p, d)
	p.start()
	return p, d
}

// TestDiskFaults: a replica of the disk fails at a random moment of a load of writes,
// and then a host dies or none. Nothing that was confirmed is missing on the host that serves
// then, and one does, unless the only good replica is gone (R24).
func TestDiskFaults(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 24))
	runs, first := (len(diskFaults)+1)/2, rng.IntN(len(diskFaults)) // half of them, other ones each time
	if os.Getenv("LOCKSTEP_SOAK") != "" {
		runs = 100
	}
	for i := range runs {
		x := diskFaults[(first+i)%len(diskFaults)]
		dies := []string{"alpha", "beta", ""}[(i+i/len(diskFaults)+int(seed))%3]
		wait, behind := time.Duration(rng.IntN(500))*time.Millisecond, time.Duration(rng.IntN(1500))*time.Millisecond
		name := fmt.Sprintf("%d %s then %s dies", i, x.name, dies)
		t.Run(name, func(t *testing.T) {
			t.Logf("after %v; %v later", wait, behind)
			p, d := newDiskPair(t, x)
			w := p.writes(10 * time.Second)
			lt.Eventually(t, 30*time.Second, func() (bool, string) { return w.count() > 20, "few writes" })
			<-time.After(wait) // a random moment
			x.inject(p, d)
			<-time.After(behind)
			if dies != "" {
				p.kill(dies)
				p.killQEMU(dies)
			}
			// Where its only good replica is gone the guest is not served.
			lost := dies != "" && dies != x.replica
			<-time.After(time.Second)
			confirmed := w.end()
			c, served := p.served(map[bool]time.Duration{true: 5 * time.Second, false: 30 * time.Second}[lost])
			if !served {
				if !lost {
					t.Fatalf("no host serves, with %d writes confirmed", confirmed)
				}
				t.Logf("%d writes confirmed, and the guest stands still", confirmed)
				return
			}
			defer c.Close()
			p.verify(c, confirmed)
			t.Logf("%d writes confirmed, and all are there", confirmed)
		})
		if t.Failed() {
			t.Logf("seed %d", seed)
			return
		}
	}
}

// TestDiskFaultSeen: what is reported to an operator of a disk that failed, and that a guest
// whose only disk is full goes on when there is room again.
func TestDiskFaultSeen(t *testing.T) {
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return // half a minute; TestDiskFaults stays
	}
	x := diskFaults[0]
	p, d := newDiskPair(t, x)
	w := p.writes(time.Minute)
	d.fill()
	ends(p.t, p.procs["alpha"]) // it hands over
	lt.Eventually(t, 30*time.Second, func() (bool, string) {
		s := p.status("beta")
		return s != nil && s.Role == "primary" && s.State == "solo", fmt.Sprintf("%+v", s)
	})
	out, err := p.order("alpha", "events")
	if err != nil || !strings.Contains(out, "a disk failed") || !strings.Contains(out, "host=alpha") || !strings.Contains(out, "No space left on device") {
		t.Errorf("events of alpha: %v\n%s", err, out)
	}
	before := w.count()
	lt.Eventually(t, 30*time.Second, func() (bool, string) { return w.count() > before+20, "no writes" })
	// It follows again only when its disk takes what is copied.
	d.empty()
	p.run("alpha", "secondary")
	p.covered()
	// The primary's is the full one now, with no secondary: the guest stands still, and
	// goes on.
	p.killQEMU("beta")
	p.rejoin("beta")
	p.await("alpha", func(s *api.Status) bool { return s.Role == "primary" })
	p.kill("beta")
	p.killQEMU("beta")
	p.await("alpha", func(s *api.Status) bool { return s.State == "solo" })
	before = w.count()
	lt.Eventually(t, 30*time.Second, func() (bool, string) { return w.count() > before, "no writes" })
	p.await("alpha", func(s *api.Status) bool { return !s.Unmerged })
	d.fill()
	s := p.await("alpha", func(s *api.Status) bool { return strings.Contains(s.Detail, "the guest stands still") })
	if len(s.DiskFaults) == 0 || s.DiskFaults[0].Disk != "colo-disk0" || s.DiskFaults[0].Host != "alpha" || !strings.Contains(s.Detail, "No space left on device") {
		t.Errorf("%q, %+v", s.Detail, s.DiskFaults)
	}
	d.empty()
	before = w.count()
	lt.Eventually(t, 30*time.Second, func() (bool, string) { return w.count() > before, "no writes" })
	confirmed := w.end()
	c, served := p.served(10 * time.Second)
	if !served {
		t.Fatal("no host serves")
	}
	defer c.Close()
	p.verify(c, confirmed)
}

// servesWritten waits for a pair that serves again, and checks that the guest has the n writes that were confirmed.
func servesWritten(t *testing.T, p *livingPair, n int) {
	t.Helper()
	p.covered()
	p.booted()
	c, served := p.served(time.Minute)
	if !served {
		t.Fatal("no host serves")
	}
	defer c.Close()
	p.verify(c, n)
}

// TestColdStart: everything on both hosts ends at once, in a pair or while one host has
// just taken over, and what was confirmed is there when the units have started their
// daemons again, in any order.
func TestColdStart(t *testing.T) {
	p := newLivingPair(t, 1, "")
	p.start()
	kill := func(nodes ...string) {
		for _, node := range nodes {
			p.procs[node].Process.Kill()
		}
		for _, node := range nodes {
			ends(p.t, p.procs[node])
			p.killQEMU(node)
		}
	}
	check := func(n int) { t.Helper(); servesWritten(t, p, n) }
	orders := [][2]string{{"alpha", "beta"}, {"beta", "alpha"}}
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		orders = orders[1:]
	}
	for _, order := range orders {
		w := p.writes(5 * time.Second)
		lt.Eventually(t, 30*time.Second, func() (bool, string) { return w.count() > 20, "few writes" })
		kill("alpha", "beta")
		confirmed := w.end()
		for _, node := range order {
			p.run(node, map[string]string{"alpha": "primary", "beta": "secondary"}[node])
		}
		check(confirmed)
	}
	// The secondary takes over, and ends before what it wrote is in its image.
	w := p.writes(5 * time.Second)
	lt.Eventually(t, 30*time.Second, func() (bool, string) { return w.count() > 20, "few writes" })
	kill("alpha")
	before := w.count()
	lt.Eventually(t, 30*time.Second, func() (bool, string) { return w.count() > before+1, "no writes" })
	kill("beta")
	confirmed := w.end()
	p.run("alpha", "secondary")
	p.run("beta", "primary")
	check(confirmed)
}
