// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/arbiter/arbitertest"
	"github.com/lockstep-ft/lockstep/control/config"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

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

// mutedSince waits for the time in which a host would transmit that must not, and checks
// that none has transmitted since before, and nothing was answered.
func mutedSince(t *testing.T, watch *lt.Transmitters, before []lt.Turn, answered <-chan error, wait time.Duration) {
	t.Helper()
	select {
	case err := <-answered:
		t.Errorf("an answer, %v, though no host may transmit", err)
	case <-time.After(wait):
	}
	if now := watch.Turns(); len(now) != len(before) || now[len(now)-1].Frames != before[len(before)-1].Frames {
		t.Errorf("a host transmitted: %v, and then %v", before, now)
	}
}

// TestPartitions: the hosts lose each other, and both guests live. One host goes on,
// where the arbiter can be reached; the other's guest never transmits, and follows again
// when the partition is over.
func TestPartitions(t *testing.T) {
	for _, x := range []struct {
		cut, arbiter string
		soak         bool
	}{
		{"control peer", "", false},
		{"control peer", "still", false}, // it answers later what it was asked, when the request was given up already
		{"control", "", true}, {"peer", "", true}, {"control peer", "gone", true},
	} {
		if x.soak && os.Getenv("LOCKSTEP_SOAK") == "" {
			continue // package sim draws them
		}
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
			watch := lt.WatchTransmitters(t, p.Switch, "portP", "portS")
			c := p.open()
			if lost.hide != nil {
				lost.hide(t)
			}
			p.partition(x.cut, true)
			if lost.hide != nil {
				// Neither host can know whether it may transmit. Both ask, and neither does.
				answered := c.askLater()
				for _, node := range []string{"alpha", "beta"} {
					p.await(node, func(s *api.Status) bool { return s.State == "failover" })
				}
				mutedSince(t, watch, watch.Turns(), answered, 2*time.Second)
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
				return speaker != "", "no host transmits alone"
			})
			c.ask(50)
			p.partition(x.cut, false)
			if speaker == "beta" {
				p.rejoin("alpha")
			}
			p.covered()
			c.ask(1)
			turns := watch.Turns()
			for _, turn := range turns {
				t.Log(turn)
			}
			if want := map[string]int{"alpha": 1, "beta": 2}[speaker]; len(turns) != want {
				t.Errorf("%d turns of speech, want %d", len(turns), want)
			}
		})
	}
}

// TestFrozen: a daemon that stands still is one that is gone. When it goes on, it
// finds out that another host transmits, and does not.
func TestFrozen(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	watch := lt.WatchTransmitters(t, p.Switch, "portP", "portS")
	c := p.open()
	p.signalDaemon("alpha", syscall.SIGSTOP)
	began := time.Now()
	c.ask(1)
	t.Logf("the first answer took %v", time.Since(began))
	c.ask(49)
	p.await("beta", func(s *api.Status) bool { return s.State == "solo" })
	p.signalDaemon("alpha", syscall.SIGCONT)
	p.fenced("alpha")
	c.ask(50)
	twoTurns(t, watch)
	// The same with a secondary: the primary goes on, and the SVM is replaced.
	p.run("alpha", "secondary")
	p.covered()
	p.signalDaemon("alpha", syscall.SIGSTOP)
	c.ask(50)
	p.await("beta", func(s *api.Status) bool { return s.State == "solo" })
	p.signalDaemon("alpha", syscall.SIGCONT)
	p.covered()
	c.ask(1)
	twoTurns(t, watch)
}

// TestStarved: neither daemon gets its CPU for two timeouts. Whoever transmits
// afterwards, it is one host, and at most one has taken over from the other.
func TestStarved(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	watch := lt.WatchTransmitters(t, p.Switch, "portP", "portS")
	c := p.open()
	for _, node := range []string{"alpha", "beta"} {
		p.signalDaemon(node, syscall.SIGSTOP)
	}
	<-time.After(time.Second) // what is tested: two timeouts without a CPU
	for _, node := range []string{"alpha", "beta"} {
		p.signalDaemon(node, syscall.SIGCONT)
	}
	c.ask(50)
	turns := watch.Turns()
	t.Log(turns)
	if len(turns) > 2 {
		t.Errorf("turns: %v", turns)
	}
}

// TestHangingWinner: the primary's host dies while the secondary's QEMU stands still, for longer than one counts as
// alive otherwise. There is no other guest, so the secondary waits for it.
func TestHangingWinner(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	watch := lt.WatchTransmitters(t, p.Switch, "portP", "portS")
	c := p.open()
	p.signal("beta", syscall.SIGSTOP)
	p.kill("alpha")
	p.killQEMU("alpha")
	p.await("beta", func(s *api.Status) bool { return s.State == "failover" })
	answered := c.askLater()
	mutedSince(t, watch, watch.Turns(), answered, 12*time.Second) // several commands' time
	p.signal("beta", syscall.SIGCONT)
	if err := <-answered; err != nil {
		t.Fatal(err)
	}
	c.ask(50)
	twoTurns(t, watch)
}

// TestFrozenWinner: a secondary that has won the arbiter stands still before its guest
// transmits, for longer than QEMU has for an answer. The old primary, woken first, does
// not transmit; the winner, woken later, does.
func TestFrozenWinner(t *testing.T) {
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return // half a minute; TestHangingWinner, TestFrozen and control/failover.TestHangingWinner stay
	}
	p := newLivingPair(t, 0, "")
	p.start()
	watch := lt.WatchTransmitters(t, p.Switch, "portP", "portS")
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
	before := watch.Turns()
	p.signalDaemon("alpha", syscall.SIGCONT)
	p.fenced("alpha")
	mutedSince(t, watch, before, answered, 3*time.Second) // more than a QMP command may take
	p.signal("beta", syscall.SIGCONT)
	p.signalDaemon("beta", syscall.SIGCONT)
	if err := <-answered; err != nil {
		t.Fatal(err)
	}
	c.ask(50)
	p.run("alpha", "secondary")
	p.covered()
	c.ask(1)
	twoTurns(t, watch)
}
