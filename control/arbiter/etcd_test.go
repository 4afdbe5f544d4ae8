// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"lockstep/control/arbiter/arbitertest"
	"lockstep/control/config"
)

// long is a timeout that a test does not wait for; short one that it does.
const (
	long  = 20 * time.Second
	short = 300 * time.Millisecond
)

func open(t testing.TB, node string, a config.Arbiter) Arbiter {
	t.Helper()
	c := &config.Config{File: "pair.yaml", VM: "web1", Arbiter: a}
	c.Nodes[0].Name, c.Nodes[1].Name = "alpha", "beta"
	arb, err := Open(c, node)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { arb.Close() })
	return arb
}

func openEtcds(t testing.TB, node string, timeout time.Duration, endpoints ...string) *etcd {
	t.Helper()
	return open(t, node, config.Arbiter{Type: "etcd", Endpoints: endpoints, Timeout: timeout}).(*etcd)
}

func read(t testing.TB, a Arbiter) Record {
	t.Helper()
	r, err := a.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func settle(t testing.TB, a Arbiter) Record {
	t.Helper()
	r, err := a.Settle(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func swap(t testing.TB, a Arbiter, old, next Record) (Record, bool) {
	t.Helper()
	now, swapped, err := a.Swap(t.Context(), old, next)
	if err != nil {
		t.Fatal(err)
	}
	return now, swapped
}

// follow checks what every arbiter must do, with two hosts' views of one record.
func follow(t *testing.T, alpha, beta Arbiter) {
	t.Helper()
	if r := read(t, alpha); r != (Record{}) {
		t.Fatalf("at first there is %s", r)
	}
	if r := settle(t, beta); r != (Record{}) {
		t.Fatalf("nothing is settled as %s", r)
	}
	first := Record{1, "alpha"}
	if now, ok := swap(t, alpha, Record{}, first); !ok || now != first {
		t.Fatalf("the first record: %s, %v", now, ok)
	}
	if now, ok := swap(t, alpha, Record{}, first); !ok || now != first {
		t.Fatalf("the same again: %s, %v", now, ok)
	}
	if r := read(t, beta); r != first {
		t.Fatalf("beta reads %s", r)
	}
	if now, ok := swap(t, beta, Record{}, Record{1, "beta"}); ok || now != first {
		t.Fatalf("beta, who knew of no record: %s, %v", now, ok)
	}
	if r := settle(t, beta); r != first {
		t.Fatalf("settled as %s", r)
	}
	second := Record{2, "beta"}
	if now, ok := swap(t, beta, first, second); !ok || now != second {
		t.Fatalf("beta takes over: %s, %v", now, ok)
	}
	if now, ok := swap(t, alpha, first, Record{2, "alpha"}); ok || now != second {
		t.Fatalf("alpha, who lost: %s, %v", now, ok)
	}
	for _, bad := range []Record{{}, {1, "alpha"}, {2, "alpha"}, {4, "alpha"}, {3, ""}} {
		if _, ok, err := alpha.Swap(t.Context(), second, bad); ok || err == nil {
			t.Errorf("%s is followed by %s", second, bad)
		}
	}
	// A record that went back in time decides nothing.
	if _, ok, err := alpha.Swap(t.Context(), Record{7, "beta"}, Record{8, "alpha"}); ok || err == nil || !strings.Contains(err.Error(), "lost it") {
		t.Errorf("an arbiter that forgot: %v, %v", ok, err)
	}
	if r := read(t, alpha); r != second {
		t.Errorf("at last there is %s", r)
	}
}

// race lets two hosts claim the same term, again and again: one wins each time.
func race(t *testing.T, alpha, beta Arbiter, rounds int) {
	t.Helper()
	type claim struct {
		now Record
		won bool
		err error
	}
	old := settle(t, alpha)
	wins := map[string]int{}
	for i := range rounds {
		start := make(chan struct{})
		results := make(chan claim, 2)
		for name, a := range map[string]Arbiter{"alpha": alpha, "beta": beta} {
			go func() {
				<-start
				now, won, err := a.Swap(t.Context(), old, Record{old.Term + 1, name})
				results <- claim{now, won, err}
			}()
		}
		close(start)
		x, y := <-results, <-results
		if x.err != nil || y.err != nil {
			t.Fatalf("round %d: %v, %v", i, x.err, y.err)
		}
		if x.won == y.won || x.now != y.now {
			t.Fatalf("round %d: %+v and %+v", i, x, y)
		}
		if r := read(t, alpha); r != x.now {
			t.Fatalf("round %d: %s won, and the record says %s", i, x.now, r)
		}
		old = x.now
		wins[old.Speaker]++
	}
	t.Logf("wins: %v", wins)
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
	if now, ok := swap(t, beta, Record{}, Record{1, "alpha"}); !ok {
		t.Fatalf("there is %s", now)
	}
	c := p.Catch(`"speaker":"beta"`)
	result := make(chan error, 1)
	go func() {
		_, swapped, err := beta.Swap(context.WithoutCancel(t.Context()), Record{1, "alpha"}, Record{2, "beta"})
		if swapped && err != nil {
			t.Errorf("swapped, and %v", err)
		}
		result <- err
	}()
	c.Wait(t)
	return c, result
}

func unknown(t *testing.T, result <-chan error) {
	t.Helper()
	err := <-result
	if err == nil {
		t.Fatal("a change without an answer has an outcome")
	}
	t.Logf("told: %v", err)
}

// The record changed, and nobody said so.
func TestEtcdAnswerLost(t *testing.T) {
	p := arbitertest.NewProxy(t, arbitertest.StartEtcd(t, arbitertest.Options{}))
	beta := openEtcds(t, "beta", long, p.Addr())
	c, result := caughtSwap(t, p, beta)
	c.Deliver(t)
	c.Break()
	unknown(t, result)
	if r := settle(t, beta); r != (Record{2, "beta"}) {
		t.Errorf("settled as %s", r)
	}
	if now, ok := swap(t, beta, Record{1, "alpha"}, Record{2, "beta"}); !ok {
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
			if settled != (Record{1, "alpha"}) {
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
		_, _, err := beta.Swap(t.Context(), Record{}, Record{1, "beta"})
		result <- err
	}()
	c.Wait(t)
	c.Break()
	unknown(t, result)
	if r := settle(t, beta); r != (Record{}) {
		t.Fatalf("settled as %s", r)
	}
	c.Deliver(t)
	if r := read(t, beta); r != (Record{}) {
		t.Errorf("settled, and then there is %s", r)
	}
}

// The other host's Settle is no change that a Swap could lose against.
func TestEtcdSwapBesideSettle(t *testing.T) {
	p := arbitertest.NewProxy(t, arbitertest.StartEtcd(t, arbitertest.Options{}))
	alpha, beta := openEtcds(t, "alpha", long, p.Addr()), openEtcds(t, "beta", long, p.Addr())
	c, result := caughtSwap(t, p, beta)
	if r := settle(t, alpha); r != (Record{1, "alpha"}) {
		t.Errorf("settled as %s", r)
	}
	c.Release(t)
	if err := <-result; err != nil {
		t.Error(err)
	}
	if r := read(t, alpha); r != (Record{2, "beta"}) {
		t.Errorf("there is %s", r)
	}
}

// etcd halts with the change in its hands, is given up on, and wakes: what Settle
// says then stays true, and the other host can go on from it.
func TestEtcdStoppedInSwap(t *testing.T) {
	e := arbitertest.StartEtcd(t, arbitertest.Options{})
	p := arbitertest.NewProxy(t, e)
	beta, patient := openEtcds(t, "beta", short, p.Addr()), openEtcds(t, "beta", long, p.Addr())
	alpha := openEtcds(t, "alpha", long, p.Addr())
	for range 5 {
		old := settle(t, alpha)
		from, to := Record{old.Term + 1, "alpha"}, Record{old.Term + 2, "beta"}
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
		if now, ok := swap(t, alpha, settled, Record{settled.Term + 1, "alpha"}); !ok {
			t.Fatalf("settled as %s, and now there is %s", settled, now)
		}
	}
}

// etcd dies with the change in its hands.
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
	if settled != (Record{1, "alpha"}) && settled != (Record{2, "beta"}) {
		t.Errorf("settled as %s", settled)
	}
	if r := read(t, beta); r != settled {
		t.Errorf("settled as %s, and then there is %s", settled, r)
	}
}

// What was said to be done outlives a crash.
func TestEtcdDurable(t *testing.T) {
	e := arbitertest.StartEtcd(t, arbitertest.Options{})
	p := arbitertest.NewProxy(t, e)
	beta := openEtcds(t, "beta", long, p.Addr())
	if _, ok := swap(t, beta, Record{}, Record{1, "beta"}); !ok {
		t.Fatal("not swapped")
	}
	e.Kill(t)
	e.Start(t)
	if r := settle(t, beta); r != (Record{1, "beta"}) {
		t.Errorf("after a crash there is %s", r)
	}
}

func TestEtcdUnreachable(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // it takes connections, and never says a word
	a := openEtcds(t, "alpha", short, l.Addr().String())
	for _, ask := range []func() error{
		func() error { _, err := a.Read(t.Context()); return err },
		func() error { _, err := a.Settle(t.Context()); return err },
		func() error {
			_, ok, err := a.Swap(t.Context(), Record{}, Record{1, "alpha"})
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

// One member is silent, as one on the host that died is: the others answer.
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
		old := Record{}
		if term > 1 {
			old = Record{term - 1, "alpha"}
		}
		if now, ok := swap(t, a, old, Record{term, "alpha"}); !ok {
			t.Fatalf("there is %s", now)
		}
	}
}

// A key that holds something else is not overwritten.
func TestEtcdForeignKey(t *testing.T) {
	p := arbitertest.NewProxy(t, arbitertest.StartEtcd(t, arbitertest.Options{}))
	a := openEtcds(t, "alpha", long, p.Addr())
	for _, value := range []string{"", "hello", `{"term":1}`, `{"term":1,"speaker":"alpha","lease":7}`, `{"term":1,"speaker":"alpha"} x`, strings.Repeat(" ", maxRecord+1)} {
		if _, err := a.client.Put(t.Context(), a.key, value); err != nil {
			t.Fatal(err)
		}
		_, err := a.Settle(t.Context())
		if err == nil || !strings.Contains(err.Error(), "somebody else writes there") {
			t.Errorf("%.20q: %v", value, err)
		}
		if _, ok, err := a.Swap(t.Context(), Record{}, Record{1, "alpha"}); ok || err == nil {
			t.Errorf("%.20q is overwritten", value)
		}
	}
}

func TestEtcdTLS(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t, dir, "ca")
	ca.issue(t, "server")
	ca.issue(t, "alpha")
	other := newAuthority(t, dir, "other")
	other.issue(t, "stranger")
	file := func(name string) string { return filepath.Join(dir, name) }
	e := arbitertest.StartEtcd(t, arbitertest.Options{CA: file("ca.pem"), Cert: file("server.pem"), Key: file("server.key")})
	p := arbitertest.NewProxy(t, e)
	with := func(tls *config.TLSFiles, timeout time.Duration) Arbiter {
		return open(t, "alpha", config.Arbiter{Type: "etcd", Endpoints: []string{p.Addr()}, Timeout: timeout, TLS: tls})
	}
	a := with(&config.TLSFiles{CA: file("ca.pem"), Cert: file("{node}.pem"), Key: file("{node}.key")}, long)
	if now, ok := swap(t, a, Record{}, Record{1, "alpha"}); !ok {
		t.Errorf("there is %s", now)
	}
	for name, tls := range map[string]*config.TLSFiles{
		"in the clear":         nil,
		"no certificate":       {CA: file("ca.pem")},
		"another's":            {CA: file("ca.pem"), Cert: file("stranger.pem"), Key: file("stranger.key")},
		"another server is it": {CA: file("other.pem"), Cert: file("alpha.pem"), Key: file("alpha.key")},
	} {
		if r, err := with(tls, short).Read(t.Context()); err == nil {
			t.Errorf("%s: read %s", name, r)
		} else {
			t.Logf("%s: %v", name, err)
		}
	}
	c := &config.Config{VM: "web1", Arbiter: config.Arbiter{Type: "etcd", Endpoints: []string{p.Addr()}, Timeout: short}}
	c.Nodes[0].Name = "alpha"
	for _, tls := range []config.TLSFiles{{CA: file("none.pem")}, {CA: file("alpha.key")}, {CA: file("ca.pem"), Cert: file("none.pem"), Key: file("alpha.key")}} {
		c.Arbiter.TLS = &tls
		if _, err := Open(c, "alpha"); err == nil {
			t.Errorf("opened with %+v", tls)
		}
	}
}

type authority struct {
	dir, name string
	cert      *x509.Certificate
	key       *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, dir, name string) *authority {
	a := &authority{dir: dir, name: name}
	a.cert, a.key = a.make(t, name, &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

func (a *authority) issue(t *testing.T, name string) {
	a.make(t, name, &x509.Certificate{
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
}

func (a *authority) make(t *testing.T, name string, c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	c.SerialNumber, c.Subject = big.NewInt(time.Now().UnixNano()), pkix.Name{CommonName: name}
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	must(err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	must(err)
	must(os.WriteFile(filepath.Join(a.dir, name+".pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	must(os.WriteFile(filepath.Join(a.dir, name+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
	cert, err := x509.ParseCertificate(der)
	must(err)
	return cert, key
}
