// SPDX-License-Identifier: Apache-2.0

package control

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/peerlink"
)

// authorityOf is a CA that a test made.
type authorityOf struct {
	t    *testing.T
	name string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, name string) *authorityOf {
	a := &authorityOf{t: t, name: name}
	a.cert, a.key = a.sign(name, func(c *x509.Certificate) {
		c.DNSNames, c.IsCA, c.BasicConstraintsValid, c.KeyUsage = nil, true, true, x509.KeyUsageCertSign
	})
	return a
}

func (a *authorityOf) sign(name string, change func(*x509.Certificate)) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if change != nil {
		change(tmpl)
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = tmpl, key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

func (a *authorityOf) write(file, kind string, der []byte) {
	a.t.Helper()
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
}

// files makes a node's three files in a folder of its own.
func (a *authorityOf) files(node, vm string, change func(*x509.Certificate)) peerlink.Certificates {
	a.t.Helper()
	dir := a.t.TempDir()
	c := peerlink.Certificates{
		CA: filepath.Join(dir, "ca.pem"), Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem"),
		VM: vm, Node: node, Peer: map[string]string{"alpha": "beta"}[node],
	}
	if c.Peer == "" {
		c.Peer = "alpha"
	}
	a.fill(c, change)
	return c
}

func (a *authorityOf) fill(c peerlink.Certificates, change func(*x509.Certificate)) {
	a.t.Helper()
	cert, key := a.sign(peerlink.CertName(c.Node, c.VM), change)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	a.write(c.CA, "CERTIFICATE", a.cert.Raw)
	a.write(c.Cert, "CERTIFICATE", cert.Raw)
	a.write(c.Key, "PRIVATE KEY", der)
}

func mustTLS(t *testing.T, c peerlink.Certificates) *tls.Config {
	t.Helper()
	cfg, err := c.TLS()
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// showing is a config that shows another certificate than its own check would let
// it, or, with nil, none.
func showing(cfg *tls.Config, cert *x509.Certificate, key *ecdsa.PrivateKey) *tls.Config {
	shown := new(tls.Certificate)
	if cert != nil {
		shown = &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
	}
	cfg = cfg.Clone()
	cfg.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return shown, nil }
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return shown, nil }
	return cfg
}

func expired(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }

// Who is not this pair's other node gets no session, and both logs and statuses
// name both and the fix.
func TestTLSRefusals(t *testing.T) {
	one, two := newAuthority(t, "CA one"), newAuthority(t, "CA two")
	alpha, beta := one.files("alpha", "web1", nil), one.files("beta", "web1", nil)
	good := func(t *testing.T) (p, s *tls.Config) { return mustTLS(t, alpha), mustTLS(t, beta) }
	for name, tc := range map[string]struct {
		configs  func(*testing.T) (p, s *tls.Config)
		onP, onS string
	}{
		"other CA": {
			configs: func(t *testing.T) (p, s *tls.Config) {
				return mustTLS(t, alpha), mustTLS(t, two.files("beta", "web1", nil))
			},
			onP: `"beta" refuses the certificate of "alpha", its log says why: give both nodes files of one CA`,
			onS: `the certificate of ["alpha.web1"] is signed by "CA one", and `,
		},
		"forged by another CA": {
			configs: func(t *testing.T) (p, s *tls.Config) {
				p, s = good(t)
				cert, key := two.sign("beta.web1", nil)
				return p, showing(s, cert, key)
			},
			onP: `the certificate of ["beta.web1"] is signed by "CA two", and ` + alpha.CA + ` here is "CA one": give both`,
			onS: `"alpha" refuses the certificate of "beta"`,
		},
		"server forged by another CA": {
			configs: func(t *testing.T) (p, s *tls.Config) {
				p, s = good(t)
				cert, key := two.sign("alpha.web1", nil)
				return showing(p, cert, key), s
			},
			onP: `"beta" refuses the certificate of "alpha"`,
			onS: `the certificate of ["alpha.web1"] is signed by "CA two", and ` + beta.CA + ` here is "CA one": give both`,
		},
		"other node": {
			configs: func(t *testing.T) (p, s *tls.Config) {
				return mustTLS(t, alpha), mustTLS(t, one.files("gamma", "web1", nil))
			},
			onP: `the certificate there is that of ["gamma.web1"], and the peer of "alpha.web1" is "beta.web1": give each`,
			onS: `"alpha" refuses the certificate of "beta"`,
		},
		"other VM": {
			configs: func(t *testing.T) (p, s *tls.Config) {
				c := one.files("beta", "db1", nil)
				cfg := mustTLS(t, c)
				cfg.VerifyConnection = nil
				return mustTLS(t, alpha), cfg
			},
			onP: `that of ["beta.db1"], and the peer of "alpha.web1" is "beta.web1"`,
			onS: `"alpha" refuses the certificate of "beta"`,
		},
		"the server is another node": {
			configs: func(t *testing.T) (p, s *tls.Config) {
				p, s = good(t)
				cert, key := one.sign("gamma.web1", nil)
				return showing(p, cert, key), s
			},
			onP: `"beta" refuses the certificate of "alpha"`,
			onS: `that of ["gamma.web1"], and the peer of "beta.web1" is "alpha.web1"`,
		},
		"the node's own again": {
			configs: func(t *testing.T) (p, s *tls.Config) {
				p, s = good(t)
				cert, key := one.sign("alpha.web1", nil)
				return p, showing(s, cert, key)
			},
			onP: `that of ["alpha.web1"], and the peer of "alpha.web1" is "beta.web1"`,
			onS: `"alpha" refuses the certificate of "beta"`,
		},
		"expired": {
			configs: func(t *testing.T) (p, s *tls.Config) {
				p, s = good(t)
				cert, key := one.sign("beta.web1", expired)
				return p, showing(s, cert, key)
			},
			onP: `the certificate of ["beta.web1"], signed by "CA one", holds from `,
			onS: `"alpha" refuses the certificate of "beta"`,
		},
		"no certificate": {
			configs: func(t *testing.T) (p, s *tls.Config) {
				p, s = good(t)
				return p, showing(s, nil, nil)
			},
			onP: `no certificate was shown, and "alpha.web1" expects that of "beta.web1": name its files`,
			onS: `"alpha" refuses the certificate of "beta"`,
		},
		"plaintext secondary": {
			configs: func(t *testing.T) (p, s *tls.Config) { return mustTLS(t, alpha), nil },
			onP:     "\"alpha\" expects a certificate, and its peer \"beta\" speaks no TLS (`tls: {insecure: true}`), or is gone: give both",
			onS:     "\"beta\" has `tls: {insecure: true}`, and its peer \"alpha\" expects a certificate, or is gone: give both",
		},
		"plaintext primary": {
			configs: func(t *testing.T) (p, s *tls.Config) { return nil, mustTLS(t, beta) },
			onP:     "\"alpha\" has `tls: {insecure: true}`, and its peer \"beta\" expects a certificate, or is gone: give both",
			onS:     "\"beta\" expects a certificate, and its peer \"alpha\" speaks no TLS (`tls: {insecure: true}`), or is gone: give both",
		},
	} {
		t.Run(name, func(t *testing.T) {
			p, s := hosts(t, nil)
			p.opt.TLS, s.opt.TLS = tc.configs(t)
			p.start()
			s.start()
			for _, x := range []struct {
				*side
				want string
			}{{p, tc.onP}, {s, tc.onS}} {
				st := x.await(x.want, func(st api.Status) bool { return st.Peer.Error != "" && strings.Contains(st.Peer.Error, x.want) })
				if st.Peer.Connected || st.Term != 0 {
					t.Errorf("%s: a session: %+v", x.opt.Node, st)
				}
			}
			if trace := s.path.since(0); len(trace) > 0 {
				t.Errorf("the secondary did %q", trace)
			}
		})
	}
}

func TestTLS(t *testing.T) {
	ca := newAuthority(t, "CA one")
	alpha, beta := ca.files("alpha", "web1", nil), ca.files("beta", "web1", nil)
	p, s := hosts(t, nil)
	p.opt.TLS, s.opt.TLS = mustTLS(t, alpha), mustTLS(t, beta)
	p.start()
	s.start()
	if st := p.replicating(); st.Peer.Insecure {
		t.Error("insecure with TLS")
	}
	s.end()
	p.await("a lost peer", func(st api.Status) bool { return !st.Peer.Connected })

	// A renewal needs no restart: a new CA, of which P hears only after S.
	next := newAuthority(t, "CA two")
	next.fill(beta, nil)
	s.start()
	s.await("a refusal", func(st api.Status) bool { return strings.Contains(st.Peer.Error, `signed by "CA one"`) })
	next.fill(alpha, nil)
	if st := p.replicating(); st.Term != 2 {
		t.Errorf("term %d", st.Term)
	}
	s.replicating()
	s.end()
	p.await("a lost peer", func(st api.Status) bool { return !st.Peer.Connected })

	// A file that is gone is named, until it is there again.
	if err := os.Remove(alpha.Key); err != nil {
		t.Fatal(err)
	}
	s.start()
	p.await("a missing key", func(st api.Status) bool { return strings.Contains(st.Peer.Error, alpha.Key+": no such file") })
	next.fill(alpha, nil)
	p.replicating()
}

// What is wrong with a node's own files is said at the start.
func TestCertErrors(t *testing.T) {
	one, two := newAuthority(t, "CA one"), newAuthority(t, "CA two")
	for name, tc := range map[string]struct {
		spoil func(c *peerlink.Certificates)
		what  string
		want  string
	}{
		"no CA":          {func(c *peerlink.Certificates) { os.Remove(c.CA) }, "ca", "ca.pem: no such file"},
		"empty CA":       {func(c *peerlink.Certificates) { os.WriteFile(c.CA, []byte("-----\n"), 0o600) }, "ca", "ca.pem holds no certificate"},
		"no CA's":        {func(c *peerlink.Certificates) { c.CA = c.Cert }, "ca", "cert.pem holds what is no CA's certificate"},
		"key as CA":      {func(c *peerlink.Certificates) { c.CA = c.Key }, "ca", "key.pem holds what is no CA's certificate"},
		"no certificate": {func(c *peerlink.Certificates) { os.Remove(c.Cert) }, "cert", "cert.pem: no such file"},
		"no key":         {func(c *peerlink.Certificates) { os.Remove(c.Key) }, "key", "key.pem: no such file"},
		"other key":      {func(c *peerlink.Certificates) { c.Key = one.files("alpha", "web1", nil).Key }, "key", "do not go together"},
		"other node":     {func(c *peerlink.Certificates) { c.Node = "beta" }, "cert", `is the certificate of ["alpha.web1"], and this node is "beta.web1"`},
		"other VM":       {func(c *peerlink.Certificates) { c.VM = "db1" }, "cert", `is the certificate of ["alpha.web1"], and this node is "alpha.db1"`},
		"other CA":       {func(c *peerlink.Certificates) { c.CA = two.files("alpha", "web1", nil).CA }, "cert", `is signed by "CA one", and `},
		"expired":        {func(c *peerlink.Certificates) { one.fill(*c, expired) }, "cert", "holds from "},
		"not yet": {func(c *peerlink.Certificates) {
			one.fill(*c, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) })
		}, "cert", "holds from "},
		"for mail only": {func(c *peerlink.Certificates) {
			one.fill(*c, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection} })
		}, "cert", "incompatible key usage"},
	} {
		c := one.files("alpha", "web1", nil)
		tc.spoil(&c)
		_, err := c.TLS()
		var ce *peerlink.CertError
		if !errors.As(err, &ce) || ce.What != tc.what || !strings.Contains(ce.Reason, tc.want) || ce.Fix == "" {
			t.Errorf("%s: %v, want tls.%s: %s", name, err, tc.what, tc.want)
		}
	}
}
