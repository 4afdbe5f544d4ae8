// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
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
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/arbiter/arbitertest"
	"github.com/lockstep-ft/lockstep/control/config"
)

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
	if now, ok := swap(t, a, Entry{}, Entry{1, "alpha"}); !ok {
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
	c.Nodes = []config.Node{{Name: "alpha"}, {Name: "beta"}}
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
