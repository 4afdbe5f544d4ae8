// SPDX-License-Identifier: Apache-2.0

package control

import (
	"cmp"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/peerlink/peerlinktest"
)

// files makes a node's files.
func files(a *peerlinktest.Authority, node, vm string) peerlink.Certificates {
	peer := map[string]string{"alpha": "beta"}[node]
	return a.Files(node, cmp.Or(peer, "alpha"), vm, nil)
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

// Who is not this pair's other node gets no session, and both logs and statuses
// name both and the fix.
func TestTLSRefusals(t *testing.T) {
	one, two := peerlinktest.NewAuthority(t, "CA one"), peerlinktest.NewAuthority(t, "CA two")
	alpha, beta := files(one, "alpha", "web1"), files(one, "beta", "web1")
	good := func(t *testing.T) (p, s *tls.Config) { return mustTLS(t, alpha), mustTLS(t, beta) }
	for name, tc := range map[string]struct {
		configs  func(*testing.T) (p, s *tls.Config)
		onP, onS string
	}{
		"other CA": {
			configs: func(t *testing.T) (p, s *tls.Config) {
				return mustTLS(t, alpha), mustTLS(t, files(two, "beta", "web1"))
			},
			onP: `"beta" refuses the certificate of "alpha", its log says why: give both nodes files of one CA`,
			onS: `the certificate of ["alpha.web1"] is signed by "CA one", and `,
		},
		"forged by another CA": {
			configs: func(t *testing.T) (p, s *tls.Config) {
				p, s = good(t)
				cert, key := two.Sign("beta.web1", nil)
				return p, showing(s, cert, key)
			},
			onP: `the certificate of ["beta.web1"] is signed by "CA two", and ` + alpha.CA + ` here is "CA one": give both`,
			onS: `"alpha" refuses the certificate of "beta"`,
		},
		"server forged by another CA": {
			configs: func(t *testing.T) (p, s *tls.Config) {
				p, s = good(t)
				cert, key := two.Sign("alpha.web1", nil)
				return showing(p, cert, key), s
			},
			onP: `"beta" refuses the certificate of "alpha"`,
			onS: `the certificate of ["alpha.web1"] is signed by "CA two", and ` + beta.CA + ` here is "CA one": give both`,
		},
		"other node": {
			configs: func(t *testing.T) (p, s *tls.Config) {
				return mustTLS(t, alpha), mustTLS(t, files(one, "gamma", "web1"))
			},
			onP: `the certificate there is that of ["gamma.web1"], and the peer of "alpha.web1" is "beta.web1": give each`,
			onS: `"alpha" refuses the certificate of "beta"`,
		},
		"other VM": {
			configs: func(t *testing.T) (p, s *tls.Config) {
				c := files(one, "beta", "db1")
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
				cert, key := one.Sign("gamma.web1", nil)
				return showing(p, cert, key), s
			},
			onP: `"beta" refuses the certificate of "alpha"`,
			onS: `that of ["gamma.web1"], and the peer of "beta.web1" is "alpha.web1"`,
		},
		"the node's own again": {
			configs: func(t *testing.T) (p, s *tls.Config) {
				p, s = good(t)
				cert, key := one.Sign("alpha.web1", nil)
				return p, showing(s, cert, key)
			},
			onP: `that of ["alpha.web1"], and the peer of "alpha.web1" is "beta.web1"`,
			onS: `"alpha" refuses the certificate of "beta"`,
		},
		"expired": {
			configs: func(t *testing.T) (p, s *tls.Config) {
				p, s = good(t)
				cert, key := one.Sign("beta.web1", peerlinktest.Expired)
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
	ca := peerlinktest.NewAuthority(t, "CA one")
	alpha, beta := files(ca, "alpha", "web1"), files(ca, "beta", "web1")
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
	next := peerlinktest.NewAuthority(t, "CA two")
	next.Fill(beta, nil)
	s.start()
	s.await("a refusal", func(st api.Status) bool { return strings.Contains(st.Peer.Error, `signed by "CA one"`) })
	next.Fill(alpha, nil)
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
	next.Fill(alpha, nil)
	p.replicating()
}

// What is wrong with a node's own files is said at the start.
func TestCertErrors(t *testing.T) {
	one, two := peerlinktest.NewAuthority(t, "CA one"), peerlinktest.NewAuthority(t, "CA two")
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
		"other key":      {func(c *peerlink.Certificates) { c.Key = files(one, "alpha", "web1").Key }, "key", "do not go together"},
		"other node":     {func(c *peerlink.Certificates) { c.Node = "beta" }, "cert", `is the certificate of ["alpha.web1"], and this node is "beta.web1"`},
		"other VM":       {func(c *peerlink.Certificates) { c.VM = "db1" }, "cert", `is the certificate of ["alpha.web1"], and this node is "alpha.db1"`},
		"other CA":       {func(c *peerlink.Certificates) { c.CA = files(two, "alpha", "web1").CA }, "cert", `is signed by "CA one", and `},
		"expired":        {func(c *peerlink.Certificates) { one.Fill(*c, peerlinktest.Expired) }, "cert", "holds from "},
		"not yet": {func(c *peerlink.Certificates) {
			one.Fill(*c, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) })
		}, "cert", "holds from "},
		"for mail only": {func(c *peerlink.Certificates) {
			one.Fill(*c, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection} })
		}, "cert", "incompatible key usage"},
	} {
		c := files(one, "alpha", "web1")
		tc.spoil(&c)
		_, err := c.TLS()
		var ce *peerlink.CertError
		if !errors.As(err, &ce) || ce.What != tc.what || !strings.Contains(ce.Reason, tc.want) || ce.Fix == "" {
			t.Errorf("%s: %v, want tls.%s: %s", name, err, tc.what, tc.want)
		}
	}
}

// What QEMU would not take of a certificate that the control link takes is said at the start
// too.
func TestCheckQEMU(t *testing.T) {
	one := peerlinktest.NewAuthority(t, "CA one")
	for name, tc := range map[string]struct {
		change func(*x509.Certificate)
		want   string // "": it is good
	}{
		"good":             {func(*x509.Certificate) {}, ""},
		"of any use":       {func(c *x509.Certificate) { c.KeyUsage, c.ExtKeyUsage = 0, nil }, ""},
		"older lockstep's": {func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }, "key encipherment"},
		"server's only":    {func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }, "both server and client"},
		"other subject":    {func(c *x509.Certificate) { c.Subject.Organization = []string{"x"} }, `subject is "CN=alpha.web1,O=x" and has to be "CN=alpha.web1"`},
		"CA's":             {func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }, "a CA's"},
	} {
		c := one.Files("alpha", "beta", "web1", tc.change)
		if _, err := c.TLS(); err != nil {
			t.Errorf("%s: the control link: %v", name, err)
		}
		var ce *peerlink.CertError
		if err := c.CheckQEMU(); (err == nil) != (tc.want == "") || err != nil && (!errors.As(err, &ce) || !strings.Contains(ce.Reason, tc.want) || !strings.Contains(ce.Fix, "lockstep keys")) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}
