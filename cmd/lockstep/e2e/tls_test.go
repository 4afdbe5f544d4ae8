// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"testing"
	"time"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

const portTLS = "8443" // the pattern, 5 MB

// sameBytes is the randomness of both guests' TLS servers. Only for tests, and
// only under GODEBUG=cryptocustomrand=1, which the guests' service sets.
type sameBytes struct{}

func (sameBytes) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = 0x5a
	}
	return len(b), nil
}

// serveTLS is a TLS server that sends the same in both guests.
func serveTLS(c *net.TCPConn) {
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Unix(1<<33, 0), DNSNames: []string{"guest"}}
	der, err := x509.CreateCertificate(sameBytes{}, template, template, key.Public(), key)
	if err != nil {
		return
	}
	s := tls.Server(c, &tls.Config{
		Rand: sameBytes{}, SessionTicketsDisabled: true, CurvePreferences: []tls.CurveID{tls.X25519},
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
	})
	defer s.Close()
	io.CopyN(onlyWriter{s}, &pattern{}, 5_000_000)
}

// TestTLS: real cryptography at both ends, its randomness the same in both guests.
func TestTLS(t *testing.T) {
	p := newPair(t, lt.VXLAN, "", "", "")
	for _, host := range []string{lt.Guest4, lt.Guest6} {
		c := tls.Client(p.mustDial(host, portTLS), &tls.Config{InsecureSkipVerify: true}) // the bytes are what is tested
		p.expectPattern(c, 5_000_000)
		if v := c.ConnectionState().Version; v != tls.VersionTLS13 {
			t.Errorf("%s: TLS version %x", host, v)
		}
		c.Close()
	}
	if s := p.status("alpha"); s.CheckpointsRequested != 0 {
		t.Errorf("%d checkpoints requested: %+v", s.CheckpointsRequested, s.Causes)
	}
}
