// SPDX-License-Identifier: Apache-2.0

// Package peerlinktest makes certificates for tests, good ones and bad ones.
package peerlinktest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/peerlink"
)

// Authority is a CA.
type Authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewAuthority makes a CA of that name.
func NewAuthority(t *testing.T, name string) *Authority {
	a := &Authority{t: t}
	a.cert, a.key = a.Sign(name, func(c *x509.Certificate) {
		c.DNSNames, c.IsCA, c.BasicConstraintsValid, c.KeyUsage = nil, true, true, x509.KeyUsageCertSign
	})
	return a
}

// Sign makes a certificate and its key. change changes what is signed; nil: nothing.
func (a *Authority) Sign(name string, change func(*x509.Certificate)) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    peerlink.KeyUsage,
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

// Files makes a node's three files in a folder of its own.
func (a *Authority) Files(node, peer, vm string, change func(*x509.Certificate)) peerlink.Certificates {
	a.t.Helper()
	dir := a.t.TempDir()
	c := peerlink.Certificates{
		CA: filepath.Join(dir, "ca.pem"), Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem"),
		VM: vm, Node: node, Peer: peer,
	}
	a.Fill(c, change)
	return c
}

// Fill makes the files of c anew.
func (a *Authority) Fill(c peerlink.Certificates, change func(*x509.Certificate)) {
	a.t.Helper()
	cert, key := a.Sign(peerlink.CertName(c.Node, c.VM), change)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	for _, f := range []struct {
		path, kind string
		der        []byte
	}{{c.CA, "CERTIFICATE", a.cert.Raw}, {c.Cert, "CERTIFICATE", cert.Raw}, {c.Key, "PRIVATE KEY", der}} {
		if err := os.WriteFile(f.path, pem.EncodeToMemory(&pem.Block{Type: f.kind, Bytes: f.der}), 0o600); err != nil {
			a.t.Fatal(err)
		}
	}
}

// Expired changes a certificate into one that has ended.
func Expired(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }
