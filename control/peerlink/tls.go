// SPDX-License-Identifier: Apache-2.0

package peerlink

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

// CertName is the name that a node's certificate must have as a DNS name: the
// VM is in it, so that one CA may serve many pairs. Neither name holds a dot.
func CertName(node, vm string) string { return node + "." + vm }

// Certificates are the files that protect one node's control link, and whose
// they are.
type Certificates struct {
	CA, Cert, Key  string // PEM files
	VM, Node, Peer string
}

// CertError is which of a node's own files is no good.
type CertError struct {
	What        string // "ca", "cert", "key"
	Reason, Fix string
}

func (e *CertError) Error() string { return "tls." + e.What + ": " + e.Reason + "; " + e.Fix }

const makeKeys = "`lockstep keys` makes certificates"

// TLS reads and checks the files; an error is a [CertError]. With the result
// this node is client or server to its peer and to nobody else: both show
// certificates, over TLS 1.3. The files are read anew at each handshake, so that
// a renewal needs no restart.
func (c Certificates) TLS() (*tls.Config, error) {
	if _, err := c.own(); err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true, // a resumed session would outlive a renewed CA
		ClientAuth:             tls.RequestClientCert,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.own() },
		GetClientCertificate:   func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.own() },
		// The library would compare the name with the dialled address, take a CA as
		// it was at the start, and ask a client for no name at all. VerifyConnection
		// takes the place of all three checks, on both sides.
		InsecureSkipVerify: true,
		VerifyConnection:   c.verifyPeer,
	}, nil
}

// authority is what the CA file holds.
type authority struct {
	pool  *x509.CertPool
	names string
}

func (c Certificates) authority() (*authority, error) {
	data, err := os.ReadFile(c.CA)
	if err != nil {
		return nil, &CertError{"ca", err.Error(), makeKeys}
	}
	a := &authority{pool: x509.NewCertPool()}
	var names []string
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil || !cert.IsCA {
			return nil, &CertError{"ca", fmt.Sprintf("%s holds what is no CA's certificate", c.CA), makeKeys}
		}
		a.pool.AddCert(cert)
		names = append(names, fmt.Sprintf("%q", cert.Subject.CommonName))
	}
	if names == nil {
		return nil, &CertError{"ca", fmt.Sprintf("%s holds no certificate", c.CA), makeKeys}
	}
	a.names = strings.Join(names, ", ")
	return a, nil
}

// own reads this node's certificate and finds out whether the peer will take it.
func (c Certificates) own() (*tls.Certificate, error) {
	a, err := c.authority()
	if err != nil {
		return nil, err
	}
	certPEM, err := os.ReadFile(c.Cert)
	if err != nil {
		return nil, &CertError{"cert", err.Error(), makeKeys}
	}
	keyPEM, err := os.ReadFile(c.Key)
	if err != nil {
		return nil, &CertError{"key", err.Error(), makeKeys}
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, &CertError{"key", fmt.Sprintf("%s and %s do not go together: %v", c.Cert, c.Key, err), makeKeys}
	}
	var chain []*x509.Certificate
	for _, der := range pair.Certificate {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, &CertError{"cert", fmt.Sprintf("%s: %v", c.Cert, err), makeKeys}
		}
		chain = append(chain, cert)
	}
	name := CertName(c.Node, c.VM)
	if !slices.Contains(chain[0].DNSNames, name) {
		return nil, &CertError{"cert", fmt.Sprintf("%s is the certificate of %q, and this node is %q", c.Cert, chain[0].DNSNames, name), makeKeys}
	}
	if err := a.verify(chain, c.CA); err != nil {
		return nil, &CertError{"cert", fmt.Sprintf("%s: %v", c.Cert, err), "or make new files with `lockstep keys`"}
	}
	return &pair, nil
}

// KeyUsage is that of a node's certificate: QEMU (7.2) demands both, though TLS 1.3 needs
// signatures alone.
const KeyUsage = x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment

// CheckQEMU finds out whether the two hosts' QEMUs can use this node's certificate too;
// an error is a [CertError]. A QEMU knows its client by the certificate's subject, and demands more of
// its own than the control link does.
func (c Certificates) CheckQEMU() error {
	pair, err := c.own()
	if err != nil {
		return err
	}
	leaf, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		return &CertError{"cert", fmt.Sprintf("%s: %v", c.Cert, err), makeKeys}
	}
	why, subject := "", "CN="+CertName(c.Node, c.VM)
	purpose := func(p x509.ExtKeyUsage) bool {
		return leaf.ExtKeyUsage == nil || slices.Contains(leaf.ExtKeyUsage, p) || slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageAny)
	}
	switch got := leaf.Subject.String(); {
	case got != subject:
		why = fmt.Sprintf("its subject is %q and has to be %q", got, subject)
	case leaf.KeyUsage != 0 && leaf.KeyUsage&KeyUsage != KeyUsage:
		why = "its key usage has to be both digital signature and key encipherment"
	case !purpose(x509.ExtKeyUsageServerAuth) || !purpose(x509.ExtKeyUsageClientAuth):
		why = "its extended key usage has to be both server and client"
	case leaf.IsCA:
		why = "it is a CA's"
	case len(pair.Certificate) > 1:
		why = fmt.Sprintf("it has to be signed by a CA in %s, without another between them", c.CA)
	default:
		return nil
	}
	return &CertError{"cert", fmt.Sprintf("QEMU cannot use %s: %s", c.Cert, why),
		"make new files with `lockstep keys`, those of an older lockstep among them; or write `tls.qemu: false`, which lets memory and disks travel in the clear"}
}

// verifyPeer lets in the peer node of this VM only.
func (c Certificates) verifyPeer(s tls.ConnectionState) error {
	peer := CertName(c.Peer, c.VM)
	if len(s.PeerCertificates) == 0 {
		return fmt.Errorf("no certificate was shown, and %q expects that of %q: name its files under tls in the config there", CertName(c.Node, c.VM), peer)
	}
	a, err := c.authority()
	if err != nil {
		return err
	}
	if err := a.verify(s.PeerCertificates, c.CA); err != nil {
		return err
	}
	if got := s.PeerCertificates[0].DNSNames; !slices.Contains(got, peer) {
		return fmt.Errorf("the certificate there is that of %q, and the peer of %q is %q: give each node its own files (%s), or correct the address",
			got, CertName(c.Node, c.VM), peer, makeKeys)
	}
	return nil
}

// verify checks a chain, leaf first: signed by the CA in file, and in time.
func (a *authority) verify(chain []*x509.Certificate, file string) error {
	leaf, between := chain[0], x509.NewCertPool()
	for _, cert := range chain[1:] {
		between.AddCert(cert)
	}
	// The name is the node's; client or server is the role's matter.
	now := time.Now()
	_, err := leaf.Verify(x509.VerifyOptions{
		Roots: a.pool, Intermediates: between, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, new(x509.UnknownAuthorityError)):
		return fmt.Errorf("the certificate of %q is signed by %q, and %s here is %s: give both nodes files of one CA", leaf.DNSNames, leaf.Issuer.CommonName, file, a.names)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return fmt.Errorf("the certificate of %q, signed by %q, holds from %s to %s, and the clock here says %s: set the clock, or renew it with `lockstep keys`",
			leaf.DNSNames, leaf.Issuer.CommonName, leaf.NotBefore.Format(time.RFC3339), leaf.NotAfter.Format(time.RFC3339), now.Format(time.RFC3339))
	case err != nil:
		return fmt.Errorf("the certificate of %q: %w", leaf.DNSNames, err)
	}
	return nil
}

// Security protects a link with TLS, or not.
type Security struct {
	TLS        *tls.Config // nil: not protected
	Server     bool        // the primary is
	Node, Peer string
	Timeout    time.Duration // of the handshake
}

// Secure makes a TLS connection of conn. Without certificates it stays as it is.
func (s *Security) Secure(ctx context.Context, conn net.Conn) (net.Conn, error) {
	if s.TLS == nil {
		return conn, nil
	}
	t := tls.Client(conn, s.TLS)
	if s.Server {
		t = tls.Server(conn, s.TLS)
	}
	ctx, cancel := context.WithTimeout(ctx, s.Timeout)
	defer cancel()
	err := t.HandshakeContext(ctx)
	switch {
	case err == nil:
		return t, nil
	case errors.As(err, new(tls.RecordHeaderError)), hungUp(err):
		return nil, fmt.Errorf("tls: %q expects a certificate, and its peer %q speaks no TLS (`tls: {insecure: true}`), or is gone: %s (%w)",
			s.Node, s.Peer, sameConfig, err)
	}
	return nil, s.Explain(fmt.Errorf("tls: %w", err))
}

const sameConfig = "give both nodes the same config"

func hungUp(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// Explain names both sides of a link that did not come about because only one of
// them protects it, or because the peer refused this side's certificate.
func (s *Security) Explain(err error) error {
	var op *net.OpError
	switch {
	case s.TLS == nil && (errors.Is(err, errSpeaksTLS) || !s.Server && hungUp(err)):
		return fmt.Errorf("%q has `tls: {insecure: true}`, and its peer %q expects a certificate, or is gone: %s (%w)", s.Node, s.Peer, sameConfig, err)
	case s.TLS != nil && errors.As(err, &op) && op.Op == "remote error":
		return fmt.Errorf("%q refuses the certificate of %q, its log says why: give both nodes files of one CA (%s) (%w)", s.Peer, s.Node, makeKeys, err)
	}
	return err
}
