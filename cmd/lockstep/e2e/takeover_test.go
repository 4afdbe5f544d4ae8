// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/qmptest"
	"github.com/lockstep-ft/lockstep/loader"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Takeovers with guests that are no copies of each other: namespaces whose numbers are
// skewed, and QEMUs that are played. TestFailovers and others have real ones.

// coveredPair is a pair that may fail over.
func coveredPair(t *testing.T, without loader.Mutation, settings ...string) (*pair, *qmptest.Pair) {
	t.Helper()
	return coveredPairOn(t, without, lt.Reachable, settings...)
}

// coveredPairOn has a network on which the client reaches both hosts.
func coveredPairOn(t *testing.T, without loader.Mutation, peer lt.Peer, settings ...string) (*pair, *qmptest.Pair) {
	t.Helper()
	q := qemuPair(t)
	dir := t.TempDir()
	p := newPairWithout(t, without, peer, q.Primary.Path(), q.Secondary.Path(),
		fmt.Sprintf("compare: {timeout: 300ms}\nstate_dir: %s\narbiter: {type: file, path: %s}\n%s", filepath.Join(dir, "state"), dir, strings.Join(settings, "\n")))
	announces(p, q.Secondary)
	for _, node := range []string{"alpha", "beta"} {
		p.await(node, func(s *api.Status) bool { return ready(s) && s.Covered })
	}
	return p, q
}

// announces has the SVM do what its QEMU, which is played, would when it is told to announce-self:
// send a RARP from the NIC's address, so that the switches learn where the guest is now. Without it,
// clients reach it only if the takeover happens to repeat something.
func announces(p *pair, qemu *qmptest.Server) {
	wire := lt.OpenWire(p.t, p.SVM, "eth0")
	mac, err := net.ParseMAC(lt.GuestMAC)
	if err != nil {
		p.t.Fatal(err)
	}
	request := append([]byte{0, 1, 8, 0, 6, 4, 0, 3}, mac...) // Ethernet, IPv4, lengths, reverse request
	request = slices.Concat(request, make([]byte, 4), mac, make([]byte, 4+18))
	frame := slices.Concat(bytes.Repeat([]byte{0xff}, 6), mac, []byte{0x80, 0x35}, request)
	ctx, end := context.WithCancel(context.Background())
	var sender sync.WaitGroup
	sender.Go(func() {
		if qemu.Await(ctx, "announce-self", 1) == nil {
			wire.Send(p.t, frame)
		}
	})
	p.t.Cleanup(func() {
		end()
		sender.Wait()
	})
}

// TestTakeoverSkewed: the SVM takes over in the middle of transfers, with other numbers
// than the PVM's, and a clock that has lost time.
func TestTakeoverSkewed(t *testing.T) {
	for _, x := range situations {
		t.Run(x.name, func(t *testing.T) {
			p, q := coveredPair(t, 0)
			c := p.mustDial(lt.Guest4, portEcho)
			if err := echo(c, 0); err != nil {
				t.Fatal(err)
			}
			l := &livingPair{pair: p}
			l.during(x, func() {
				p.Skew.LoseTime(t, 5000)
				q.Primary.Close()
				if err := echo(c, 1); err != nil {
					t.Error(err)
				}
			})
			p.await("beta", func(s *api.Status) bool { return s.Role == "primary" && s.State == "solo" })
			if err := echo(c, 2); err != nil {
				t.Error(err)
			}
			// A connection of the days after.
			d := p.mustDial(lt.Guest6, portEcho)
			if err := echo(d, 0); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestTakeoverInDoubt: S's daemon dies in the middle of a checkpoint, and P's host before there is another, so S takes over
// and does not know whether its guest is a copy of P's. What the guest sends shows which numbers count.
func TestTakeoverInDoubt(t *testing.T) {
	for _, loaded := range []bool{true, false} {
		if !loaded && os.Getenv("LOCKSTEP_SOAK") == "" {
			continue // it costs another pair, and control/checkpoint and sim have it too
		}
		t.Run(fmt.Sprintf("loaded %t", loaded), func(t *testing.T) {
			p := newLivingPair(t, 0, "checkpoint: {period: 10m}\nheartbeat: {restart: 1s}")
			p.start()
			svm := p.monitor("beta")
			events, err := svm.Events(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			c := p.open()
			c.ask(3)
			hangs := map[bool]string{true: "beta", false: "alpha"}[loaded]
			p.signal(hangs, syscall.SIGSTOP)
			go p.order("alpha", "checkpoint") // ends without one
			if loaded {                       // its QEMU has been asked
				p.await("alpha", func(s *api.Status) bool { return s.State == "checkpointing" })
				pvm := p.monitor("alpha")
				lt.Eventually(t, 10*time.Second, func() (bool, string) {
					running, state, err := pvm.Status()
					return err == nil && !running, fmt.Sprint(state, err)
				})
			}
			p.await("beta", func(s *api.Status) bool { return s.State == "checkpointing" })
			p.kill("beta")
			if p.signalDaemon("alpha", syscall.SIGSTOP); loaded {
				p.signal("beta", syscall.SIGCONT)
			} else {
				for _, order := range []string{"stop", "cont"} {
					if err := svm.Execute(order, nil, nil); err != nil {
						t.Fatal(err)
					}
				}
			}
			for _, want := range []string{"STOP", "RESUME"} {
				for seen := ""; seen != want; {
					select {
					case ev := <-events:
						seen = ev.Event
					case <-time.After(20 * time.Second):
						t.Fatalf("the SVM's QEMU does not report %s", want)
					}
				}
			}
			p.kill("alpha")
			p.killQEMU("alpha")
			p.run("beta", "secondary")
			p.await("beta", func(s *api.Status) bool { return s.State == "solo" })
			c.ask(20)
			p.open().ask(3)
		})
	}
}

// TestGuardMicroseconds: a guest's timestamps may count microseconds. A clock of them that
// has lost twelve seconds is behind by more ticks than a slow one ever is.
func TestGuardMicroseconds(t *testing.T) {
	p, q := coveredPair(t, 0)
	c := p.mustDial(lt.Guest4, portEcho)
	if err := echo(c, 0); err != nil {
		t.Fatal(err)
	}
	p.Skew.LoseTime(t, 12_000_000)
	if err := echo(c, 1); err != nil { // no clock runs backwards: what is sent again has lost them too
		t.Fatal(err)
	}
	q.Primary.Close()
	p.await("beta", func(s *api.Status) bool { return s.Role == "primary" && s.State == "solo" })
	c.SetDeadline(time.Now().Add(3 * time.Second))
	for i := range 3 { // what echoes the guard, too
		if err := echo(c, i); err != nil {
			t.Fatal(err)
		}
	}
}

// TestMutationGuard: without the guard of R22 the client takes what the SVM sends for
// old, and drops it until its clock has caught up.
func TestMutationGuard(t *testing.T) {
	p, q := coveredPair(t, loader.MutateGuard)
	c := p.mustDial(lt.Guest4, portEcho)
	if err := echo(c, 0); err != nil {
		t.Fatal(err)
	}
	p.Skew.LoseTime(t, 20_000)
	q.Primary.Close()
	p.await("beta", func(s *api.Status) bool { return s.Role == "primary" && s.State == "solo" })
	c.SetDeadline(time.Now().Add(3 * time.Second))
	if err := echo(c, 1); !os.IsTimeout(err) {
		t.Errorf("an echo, %v, though the SVM's timestamps are older than the PVM's", err)
	}
}

// TestMuteSVM: an SVM that sends nothing, though checkpoint after checkpoint makes it
// the PVM's copy, could not take over. P goes on without it, also where periodic
// checkpoints release everything before a client has to wait.
func TestMuteSVM(t *testing.T) {
	for _, x := range []struct {
		name, settings string
		least, most    int // checkpoints before it is given up
	}{
		{"checkpoints at timeouts", "", 3, 4}, // in the first interval it still sent
		{"periodic checkpoints", "checkpoint: {period: 100ms}", 5, 100},
	} {
		t.Run(x.name, func(t *testing.T) {
			p, q := coveredPair(t, 0, x.settings)
			c := p.mustDial(lt.Guest4, portEcho)
			if err := echo(c, 0); err != nil {
				t.Fatal(err)
			}
			before := q.Checkpoints()
			p.SetLink(t, p.SVM, "eth0", false)
			i := 0
			p.await("alpha", func(s *api.Status) bool {
				if err := echo(c, i); err != nil {
					t.Fatal(err)
				}
				i++
				return s.ArbiterTerm == 2
			})
			if n := q.Checkpoints() - before; n < x.least || n > x.most {
				t.Errorf("%d checkpoints before it was given up", n)
			}
		})
	}
}
