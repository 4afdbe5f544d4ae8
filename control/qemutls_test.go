// SPDX-License-Identifier: Apache-2.0

package control

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/peerlink/peerlinktest"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qmptest"
)

// secure gives both sides' QEMUs certificates.
func secure(t *testing.T, p, s *side) {
	t.Helper()
	ca := peerlinktest.NewAuthority(t, "CA one")
	for _, x := range []*side{p, s} {
		c := files(ca, x.opt.Node, "web1")
		tls := &qemu.TLS{CA: c.CA, Cert: c.Cert, Key: c.Key, Peer: peerlink.CertName(c.Peer, "web1"), Dir: filepath.Join(t.TempDir(), "tls")}
		x.opt.Failover.Own.TLS, x.opt.Failover.Peers.TLS = tls, tls
	}
}

// What the QEMUs send each other in the clear is in status: because no certificates are
// used, or because the pair began when none were.
func TestInsecureQEMU(t *testing.T) {
	for name, tc := range map[string]struct {
		certs bool
		creds string // QEMU's parameter
		want  bool
	}{
		"off":                {false, "", true},
		"on":                 {true, "lockstep-tls-client", false},
		"began in the clear": {true, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			pair := newPair(t)
			p, s, _ := lives(t, pair)
			if tc.certs {
				secure(t, p, s)
			}
			for _, q := range []*qmptest.Server{pair.Primary, pair.Secondary} {
				q.SetReply("query-migrate-parameters", `"return": {"tls-creds": "`+tc.creds+`"}`)
			}
			p.start()
			s.start()
			for _, x := range []*side{p, s} {
				st := x.await("QEMU", func(st api.Status) bool { return st.QMP.Connected })
				if st.QMP.Insecure != tc.want {
					t.Errorf("%s: insecure %t, want %t", x.opt.Node, st.QMP.Insecure, tc.want)
				}
			}
		})
	}
}

// A QEMU that does not take its certificates is no part of a pair; status says why, and it is
// tried again.
func TestQEMURefusesCertificate(t *testing.T) {
	pair := newPair(t)
	p, s, _ := lives(t, pair)
	secure(t, p, s)
	p.opt.Failover.again = backoff{first: 20 * time.Millisecond, last: 20 * time.Millisecond}
	pair.Primary.SetCOLO("none")
	pair.Primary.SetReply("query-migrate", `"return": {"status": "none"}`)
	pair.Secondary.SetCOLO(qmptest.Incoming)
	pair.Secondary.SetReply("migrate-incoming", `"return": {}`)
	const expired = `"error": {"class": "GenericError", "desc": "The certificate has expired"}`
	for _, q := range []*qmptest.Server{pair.Primary, pair.Secondary} {
		q.SetReply("object-add", expired)
	}
	p.start()
	s.start()
	s.await("why it is not ready", func(st api.Status) bool {
		return !st.Peer.Connected && strings.Contains(st.Peer.Error, "QEMU is not ready for a primary") && strings.Contains(st.Peer.Error, "The certificate has expired")
	})
	pair.Secondary.SetReply("object-add", "")
	p.await("why replication does not begin", func(st api.Status) bool {
		return st.Replication != nil && strings.Contains(st.Replication.Why, "The certificate has expired")
	})
	s.ends(ErrAfresh)
}
