// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/arbiter/arbitertest"
	"github.com/lockstep-ft/lockstep/control/config"
)

func openEtcds(t testing.TB, node string, timeout time.Duration, endpoints ...string) *etcd {
	t.Helper()
	return open(t, node, config.Arbiter{Type: "etcd", Endpoints: endpoints, Timeout: timeout}).(*etcd)
}

func TestEtcd(t *testing.T) {
	e := arbitertest.StartEtcd(t, arbitertest.Options{})
	p := arbitertest.NewProxy(t, e)
	follow(t, openEtcds(t, "alpha", long, p.Addr()), openEtcds(t, "beta", long, p.Addr()))
}

func TestEtcdRace(t *testing.T) {
	p := arbitertest.NewProxy(t, arbitertest.StartEtcd(t, arbitertest.Options{}))
	race(t, openEtcds(t, "alpha", long, p.Addr()), openEtcds(t, "beta", long, p.Addr()), 100)
}

// caughtSwap begins beta's takeover from alpha, and returns when its transaction
// is on its way.
func caughtSwap(t *testing.T, p *arbitertest.Proxy, beta *etcd) (*arbitertest.Caught, <-chan error) {
	t.Helper()
	if now, ok := swap(t, beta, Entry{}, Entry{1, "alpha"}); !ok {
		t.Fatalf("there is %s", now)
	}
	c := p.Catch(`"speaker":"beta"`)
	result := make(chan error, 1)
	go func() {
		_, swapped, err := beta.Swap(context.WithoutCancel(t.Context()), Entry{1, "alpha"}, Entry{2, "beta"})
		if swapped && err != nil {
			t.Errorf("swapped, and %v", err)
		}
		result <- err
	}()
	c.Wait(t)
	return c, result
}

// The entry changed, and the reply was lost.
func TestEtcdAnswerLost(t *testing.T) {
	p := arbitertest.NewProxy(t, arbitertest.StartEtcd(t, arbitertest.Options{}))
	beta := openEtcds(t, "beta", long, p.Addr())
	c, result := caughtSwap(t, p, beta)
	c.Deliver(t)
	c.Break()
	unknown(t, result)
	if r := settle(t, beta); r != (Entry{2, "beta"}) {
		t.Errorf("settled as %s", r)
	}
	if now, ok := swap(t, beta, Entry{1, "alpha"}, Entry{2, "beta"}); !ok {
		t.Errorf("the same again is refused: %s", now)
	}
}

// A change that was sent before Settle, and comes after it, must not count. The
// mutation shows that Settle's write is what stops it.
func TestEtcdDelayedSwap(t *testing.T) {
	for name, mutate := range map[string]bool{"settled": false, "mutation": true} {
		t.Run(name, func(t *testing.T) {
			e := arbitertest.StartEtcd(t, arbitertest.Options{})
			p := arbitertest.NewProxy(t, e)
			beta := openEtcds(t, "beta", long, p.Addr())
			beta.noBump = mutate
			c, result := caughtSwap(t, p, beta)
			c.Break()
			unknown(t, result)
			settled := settle(t, beta)
			if settled != (Entry{1, "alpha"}) {
				t.Fatalf("settled as %s", settled)
			}
			c.Deliver(t)
			if now := read(t, beta); (now == settled) == mutate {
				t.Errorf("settled as %s, and now there is %s (mutation %v)", settled, now, mutate)
			}
		})
	}
}

// The same before the key exists, as in a pair's first start.
func TestEtcdDelayedFirst(t *testing.T) {
	p := arbitertest.NewProxy(t, arbitertest.StartEtcd(t, arbitertest.Options{}))
	beta := openEtcds(t, "beta", long, p.Addr())
	c := p.Catch(`"speaker":"beta"`)
	result := make(chan error, 1)
	go func() {
		_, _, err := beta.Swap(t.Context(), Entry{}, Entry{1, "beta"})
		result <- err
	}()
	c.Wait(t)
	c.Break()
	unknown(t, result)
	if r := settle(t, beta); r != (Entry{}) {
		t.Fatalf("settled as %s", r)
	}
	c.Deliver(t)
	if r := read(t, beta); r != (Entry{}) {
		t.Errorf("settled, and then there is %s", r)
	}
}

// The other host's Settle is no change that a Swap could lose against.
func TestEtcdSwapBesideSettle(t *testing.T) {
	p := arbitertest.NewProxy(t, arbitertest.StartEtcd(t, arbitertest.Options{}))
	alpha, beta := openEtcds(t, "alpha", long, p.Addr()), openEtcds(t, "beta", long, p.Addr())
	c, result := caughtSwap(t, p, beta)
	if r := settle(t, alpha); r != (Entry{1, "alpha"}) {
		t.Errorf("settled as %s", r)
	}
	c.Release(t)
	if err := <-result; err != nil {
		t.Error(err)
	}
	if r := read(t, alpha); r != (Entry{2, "beta"}) {
		t.Errorf("there is %s", r)
	}
}

// etcd halts while it has the request, the client gives up, and etcd goes on: what
// Settle returns then stays true, and the other host can continue from it.
func TestEtcdStoppedInSwap(t *testing.T) {
	e := arbitertest.StartEtcd(t, arbitertest.Options{})
	p := arbitertest.NewProxy(t, e)
	beta, patient := openEtcds(t, "beta", short, p.Addr()), openEtcds(t, "beta", long, p.Addr())
	alpha := openEtcds(t, "alpha", long, p.Addr())
	for range 5 {
		old := settle(t, alpha)
		from, to := Entry{old.Term + 1, "alpha"}, Entry{old.Term + 2, "beta"}
		if now, ok := swap(t, alpha, old, from); !ok {
			t.Fatalf("there is %s", now)
		}
		c := p.Catch(`"speaker":"beta"`)
		result := make(chan error, 1)
		go func() {
			_, _, err := beta.Swap(t.Context(), from, to)
			result <- err
		}()
		select {
		case <-c.Held:
		case err := <-result: // the short timeout can end before the change is sent
			t.Logf("not sent: %v", err)
			continue
		}
		e.Stop(t)
		c.Release(t)
		unknown(t, result)
		if _, err := beta.Read(t.Context()); err == nil {
			t.Fatal("a halted etcd answers")
		}
		if _, err := beta.Settle(t.Context()); err == nil {
			t.Fatal("a halted etcd settles")
		}
		e.Continue(t)
		settled := settle(t, patient)
		if settled != from && settled != to {
			t.Fatalf("settled as %s", settled)
		}
		t.Logf("settled as %s", settled)
		if r := read(t, alpha); r != settled {
			t.Fatalf("settled as %s, and alpha reads %s", settled, r)
		}
		if now, ok := swap(t, alpha, settled, Entry{settled.Term + 1, "alpha"}); !ok {
			t.Fatalf("settled as %s, and now there is %s", settled, now)
		}
	}
}

// etcd dies while it has the request.
func TestEtcdKilledInSwap(t *testing.T) {
	e := arbitertest.StartEtcd(t, arbitertest.Options{})
	p := arbitertest.NewProxy(t, e)
	beta := openEtcds(t, "beta", long, p.Addr())
	c, result := caughtSwap(t, p, beta)
	e.Stop(t)
	c.Release(t)
	e.Kill(t)
	unknown(t, result)
	e.Start(t)
	settled := settle(t, beta)
	if settled != (Entry{1, "alpha"}) && settled != (Entry{2, "beta"}) {
		t.Errorf("settled as %s", settled)
	}
	if r := read(t, beta); r != settled {
		t.Errorf("settled as %s, and then there is %s", settled, r)
	}
}

// A Swap that was reported as done outlives a crash.
func TestEtcdDurable(t *testing.T) {
	e := arbitertest.StartEtcd(t, arbitertest.Options{})
	p := arbitertest.NewProxy(t, e)
	beta := openEtcds(t, "beta", long, p.Addr())
	if _, ok := swap(t, beta, Entry{}, Entry{1, "beta"}); !ok {
		t.Fatal("not swapped")
	}
	e.Kill(t)
	e.Start(t)
	if r := settle(t, beta); r != (Entry{1, "beta"}) {
		t.Errorf("after a crash there is %s", r)
	}
}

func TestEtcdUnreachable(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // it takes connections, and never sends a byte
	a := openEtcds(t, "alpha", short, l.Addr().String())
	for _, ask := range []func() error{
		func() error { _, err := a.Read(t.Context()); return err },
		func() error { _, err := a.Settle(t.Context()); return err },
		func() error {
			_, ok, err := a.Swap(t.Context(), Entry{}, Entry{1, "alpha"})
			if ok {
				t.Error("swapped by nobody")
			}
			return err
		},
	} {
		if err := ask(); err == nil || !strings.Contains(err.Error(), "lockstep/web1") || !strings.Contains(err.Error(), l.Addr().String()) {
			t.Errorf("nobody's answer: %v", err)
		}
	}
	gone, done := context.WithCancel(t.Context())
	done()
	if _, err := a.Read(gone); err == nil {
		t.Error("read by one who was gone")
	}
}

// One member does not answer, as one on a host that died: the others do.
func TestEtcdSilentMember(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	e := arbitertest.StartEtcd(t, arbitertest.Options{})
	stopped := arbitertest.StartEtcd(t, arbitertest.Options{})
	p, dead := arbitertest.NewProxy(t, e), arbitertest.NewProxy(t, stopped)
	a := openEtcds(t, "alpha", 3*time.Second, l.Addr().String(), dead.Addr(), p.Addr())
	stopped.Stop(t)
	for term := uint64(1); term < 5; term++ {
		old := Entry{}
		if term > 1 {
			old = Entry{term - 1, "alpha"}
		}
		if now, ok := swap(t, a, old, Entry{term, "alpha"}); !ok {
			t.Fatalf("there is %s", now)
		}
	}
}

// A key that holds something else is not overwritten.
func TestEtcdForeignKey(t *testing.T) {
	p := arbitertest.NewProxy(t, arbitertest.StartEtcd(t, arbitertest.Options{}))
	a := openEtcds(t, "alpha", long, p.Addr())
	for _, value := range []string{"", "hello", `{"term":1}`, `{"term":1,"speaker":"alpha","lease":7}`, `{"term":1,"speaker":"alpha"} x`, strings.Repeat(" ", maxEntry+1)} {
		if _, err := a.client.Put(t.Context(), a.key, value); err != nil {
			t.Fatal(err)
		}
		_, err := a.Settle(t.Context())
		if err == nil || !strings.Contains(err.Error(), "another program writes there") {
			t.Errorf("%.20q: %v", value, err)
		}
		if _, ok, err := a.Swap(t.Context(), Entry{}, Entry{1, "alpha"}); ok || err == nil {
			t.Errorf("%.20q is overwritten", value)
		}
	}
}
