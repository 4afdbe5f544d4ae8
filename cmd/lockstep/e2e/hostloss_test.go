// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/qmp"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestFrozenQEMU: a primary's QEMU that stands still does not answer; its host shuts it
// out, and the other takes over. When it goes on, nothing of it leaves.
func TestFrozenQEMU(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	watch := lt.WatchTransmitters(t, p.Switch, "portP", "portS")
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
	twoTurns(t, watch)
}

// TestStopCont: an operator stops either QEMU's guest and lets it go on: meanwhile nothing
// leaves, and no host takes over (R15).
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
		p.await("alpha", func(s *api.Status) bool { return s.State == "checkpointing" })
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
		s := p.await("alpha", func(s *api.Status) bool { return s.State == "replicating" && s.Covered })
		if s.ArbiterTerm != p.record || s.CheckpointsDone == before.CheckpointsDone {
			t.Errorf("%s: the record is of term %d, and %d checkpoints were made", node, s.ArbiterTerm, s.CheckpointsDone-before.CheckpointsDone)
		}
	}
}

// TestHostLoss: a whole host is gone at once, without a sign.
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
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
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
