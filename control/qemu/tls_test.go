// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/peerlink/peerlinktest"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// The secondary's ports.
const migrationPort, nbdPort = 9998, 9999

// text is what a test looks for on the wire, so often that no end of a frame hides it.
func text(word string) string { return strings.Repeat(word+".", 100) }

// captured returns how many bytes the wires' frames of a TCP port have, and how many of these
// frames hold word.
func captured(wires []*lt.Wire, port uint16, word string) (size, with int) {
	const ports = 14 + 20 // Ethernet's header, IPv4's
	for _, w := range wires {
		for _, f := range w.Frames(nil) {
			if len(f) < ports+4 || f[23] != 6 || binary.BigEndian.Uint16(f[ports:]) != port && binary.BigEndian.Uint16(f[ports+2:]) != port {
				continue
			}
			size += len(f)
			if bytes.Contains(f, []byte(word)) {
				with++
			}
		}
	}
	return size, with
}

// TestNothingInTheClear: a capture of the link between the hosts has nothing of the guest's
// memory or disk, from the copy of its disk on to the takeover. The mutation is a pair without
// TLS.
func TestNothingInTheClear(t *testing.T) {
	for name, inClear := range map[string]bool{"rule": false, "mutation": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorldIn(t, 1, func(w *world) { w.tcp, w.clear = true, inClear })
			a := w.start("a", false)
			if err := qemu.Cont(a.m); err != nil {
				t.Fatal(err)
			}
			qemutest.Await(t, w.serial("a"), "ready")
			wires := []*lt.Wire{lt.OpenWire(t, w.ns("b"), "ctl"), lt.OpenSent(t, w.ns("b"), "ctl")}
			look := func(when, memory, disk string) {
				t.Helper()
				for _, l := range []struct {
					port uint16
					word string
				}{{migrationPort, memory}, {nbdPort, disk}} {
					size, with := captured(wires, l.port, l.word)
					t.Logf("%s: port %d: %d bytes, %q in %d frames", when, l.port, size, l.word, with)
					if size < 4096 || (with > 0) != inClear {
						t.Errorf("%s: of %d bytes on port %d %d frames hold %q", when, size, l.port, with, l.word)
					}
				}
				for _, w := range wires {
					w.Forget()
				}
			}
			a.mustAsk("set "+text("first-in-memory"), "ok")
			a.mustWrite("vda", 1, text("first-on-disk"))
			b := a.replicate("b", qemu.Options{Resync: true})
			look("the copy", "first-in-memory", "first-on-disk")
			a.mustAsk("set "+text("second-in-memory"), "ok")
			a.mustWrite("vda", 2, text("second-on-disk"))
			a.checkpoint()
			look("a checkpoint", "second-in-memory", "second-on-disk")
			for _, g := range []*guest{a, b} {
				if clear, err := qemu.InClear(g.m); err != nil || clear != inClear {
					t.Errorf("%s: in the clear: %v, %v", g.host, clear, err)
				}
			}
			a.kill()
			b.takeOver()
			b.mustRead("vda", 2, text("second-on-disk"))
			b.mustAsk("get", text("second-in-memory"))
			for _, word := range []string{"first-in-memory", "second-in-memory", "first-on-disk", "second-on-disk"} {
				if wires[0].Count(word)+wires[1].Count(word) > 0 {
					t.Errorf("%q is on the wire at the takeover", word)
				}
			}
		})
	}
}

// TestOnlyThePeer: a secondary takes a migration and NBD clients of its pair's other node only,
// and a primary goes to no other secondary. QEMU's log has the reason, and what was refused
// disturbs nothing.
func TestOnlyThePeer(t *testing.T) {
	w := newWorld(t, 1)
	two := peerlinktest.NewAuthority(t, "CA two")
	named := func(c *x509.Certificate) { c.Subject.CommonName, c.DNSNames = "c.web1", []string{"c.web1"} }
	a, b := w.start("a", false), w.start("b", true)
	prepare := func() {
		t.Helper()
		if err := qemu.PrepareSecondary(t.Context(), b.m, b.caps, b.spec.Disks, *b.in); err != nil {
			t.Fatal(err)
		}
	}
	prepare()

	// Clients of the migration.
	said := func() string { return qemu.Log(b.spec) }
	for _, c := range []struct {
		name   string
		client *tls.Config // nil: no TLS
		log    string
	}{
		{"another CA's", showing(two.Sign("a.web1", nil)), "The certificate hasn't got a known issuer"},
		{"expired", showing(w.ca.Sign("a.web1", peerlinktest.Expired)), "The certificate is not trusted"},
		{"another node's", showing(w.ca.Sign("c.web1", nil)), "TLS x509 authz check for CN=c.web1 is denied"},
		{"the secondary's own", showing(w.ca.Sign("b.web1", nil)), "TLS x509 authz check for CN=b.web1 is denied"},
		{"no certificate", &tls.Config{InsecureSkipVerify: true}, "No certificate was found"},
		{"no TLS", nil, "TLS handshake failed"},
	} {
		conn, err := net.Dial("unix", strings.TrimPrefix(b.in.Migration, "unix:"))
		if err != nil {
			t.Fatal(err)
		}
		if c.client == nil {
			conn.Write([]byte("QEVM\x00\x00\x00\x03"))
		} else {
			conn = tls.Client(conn, c.client)
			conn.SetDeadline(time.Now().Add(20 * time.Second))
		}
		if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("%s: a byte came, %v", c.name, err)
		}
		if conn, ok := conn.(*tls.Conn); ok {
			if s := conn.ConnectionState(); s.Version != tls.VersionTLS13 || s.CipherSuite != tls.TLS_CHACHA20_POLY1305_SHA256 {
				t.Errorf("%s: version %x, %s", c.name, s.Version, tls.CipherSuiteName(s.CipherSuite))
			}
		}
		conn.Close()
		lt.Eventually(t, 10*time.Second, func() (bool, string) {
			return strings.Contains(said(), c.log), fmt.Sprintf("%s: no %q in %s", c.name, c.log, said())
		})
	}

	// Clients of the disks.
	for name, c := range map[string]struct {
		certs *qemu.TLS // nil: none
		want  string    // in what qemu-img prints; "": it has access
	}{
		"the peer's":     {w.tls("a"), ""},
		"another CA's":   {w.certsOf(two, "a", nil), "The certificate hasn't got a known issuer"},
		"another node's": {w.certsOf(w.ca, "a", named), "Failed to read"},
		"expired":        {w.certsOf(w.ca, "a", peerlinktest.Expired), "has expired"},
		"none":           {nil, "TLS negotiation required"},
	} {
		lt.In(t, w.ns("a"), func() {
			args, nbd := []string{"info"}, fmt.Sprintf("driver=raw,file.driver=nbd,file.host=%s,file.port=%d,file.export=parent0", b.in.NBD.Addr(), b.in.NBD.Port())
			if c.certs != nil {
				remove, err := qemu.TLSFolder(c.certs)
				if err != nil {
					t.Fatal(err)
				}
				defer remove()
				args = append(args, "--object", "tls-creds-x509,id=tls,endpoint=client,dir="+c.certs.Dir)
				nbd += ",file.tls-creds=tls,file.tls-hostname=b.web1"
			}
			out, err := exec.Command("qemu-img", append(args, "--image-opts", nbd)...).CombinedOutput()
			if (err == nil) != (c.want == "") || !strings.Contains(string(out), c.want) {
				t.Errorf("NBD, %s: %v, %s", name, err, out)
			}
		})
	}

	// Secondaries that are not the primary's.
	for _, c := range []struct {
		name   string
		server *tls.Config
		want   string
	}{
		{"another CA's", showing(two.Sign("b.web1", nil)), "The certificate hasn't got a known issuer"},
		{"expired", showing(w.ca.Sign("b.web1", peerlinktest.Expired)), "The certificate is not trusted"},
		{"another node's", showing(w.ca.Sign("c.web1", nil)), "Certificate does not match the hostname b.web1"},
	} {
		path := filepath.Join(w.dir, "wrong")
		l, err := tls.Listen("unix", path, c.server)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				go conn.Read(make([]byte, 1)) // the handshake
			}
		}()
		to := w.to("a", b.in)
		to.Migration = "unix:" + path
		if err := a.replicateTo(t.Context(), to, qemu.Options{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("a secondary whose certificate is %s: %v", c.name, err)
		}
		l.Close()
	}

	// A primary that the secondary refuses.
	to := w.to("a", b.in)
	to.TLS = w.certsOf(w.ca, "a", named)
	var refused error
	lt.In(t, w.ns("a"), func() { refused = qemu.Replicate(t.Context(), a.m, a.caps, nil, to, qemu.Options{}) })
	if refused == nil || !strings.Contains(refused.Error(), "its QEMU's log") {
		t.Errorf("with another node's certificate: %v", refused)
	}

	// QEMU does not take certificates of its own that are of no use.
	to.TLS = w.certsOf(w.ca, "a", peerlinktest.Expired)
	if err := a.replicateTo(t.Context(), to, qemu.Options{}); err == nil || !strings.Contains(err.Error(), "client certificate") || !strings.Contains(err.Error(), "has expired") {
		t.Errorf("with an expired certificate of its own: %v", err)
	}

	// Certificates that are renewed are taken without a new QEMU here, and what was refused
	// has left nothing.
	if err := a.replicateTo(t.Context(), w.to("a", b.in), qemu.Options{}); err != nil {
		t.Error(err)
	}
	b.kill()
	a.takeOver()
	w.certs["a"], w.certs["b"] = w.certsOf(two, "a", nil), w.certsOf(two, "b", nil)
	b = a.replicate("b", qemu.Options{Resync: true})
	a.kill()
	b.takeOver()
	if left, err := filepath.Glob(filepath.Join(w.dir, "*.tls")); err != nil || len(left) > 0 {
		t.Errorf("private keys are left: %v, %v", left, err)
	}
}

// showing shows a certificate, as client or as server, and asks for none.
func showing(cert *x509.Certificate, key any) *tls.Config {
	shown := tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
	return &tls.Config{
		InsecureSkipVerify: true, Certificates: []tls.Certificate{shown},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &shown, nil },
	}
}

// TestSilentHandshake: a secondary that accepts the connection and does not answer in the TLS
// handshake costs the guest that serves nothing, and the next try succeeds. The mutation is a
// QEMU that makes the connection itself: it halts until the secondary is gone.
func TestSilentHandshake(t *testing.T) {
	w := newWorld(t, 0)
	a := w.start("a", false)
	if err := qemu.Cont(a.m); err != nil {
		t.Fatal(err)
	}
	qemutest.Await(t, w.serial("a"), "ready")
	to := w.to("a", w.incoming("b"))
	to.Migration = "unix:" + filepath.Join(w.dir, "silent")
	// try begins to replicate there, and returns when QEMU waits for the handshake.
	try := func(o qemu.Options) (result chan error, hangUp func()) {
		l, err := net.Listen("unix", strings.TrimPrefix(to.Migration, "unix:"))
		if err != nil {
			t.Fatal(err)
		}
		result = make(chan error, 1)
		go func() { result <- qemu.Replicate(t.Context(), a.m, a.caps, nil, to, o) }()
		conn, err := l.Accept()
		if err == nil {
			_, err = conn.Read(make([]byte, 1))
		}
		if err != nil {
			t.Fatal(err)
		}
		return result, func() { conn.Close(); l.Close() }
	}
	o := qemu.Options{Limits: qemu.Limits{Stalled: 2 * time.Second}}
	result, hangUp := try(o)
	a.mustAsk("set one", "ok")
	if err := <-result; err == nil || !strings.Contains(err.Error(), "no progress") || strings.Contains(err.Error(), "could not be undone") {
		t.Errorf("got %v", err)
	}
	hangUp()
	b := a.replicate("b", qemu.Options{})
	a.checkpoint()
	b.kill()
	a.takeOver()

	result, hangUp = try(qemu.OwnConnection(o))
	select {
	case err := <-result:
		t.Errorf("with QEMU's own connection: %v", err)
	case <-time.After(3 * o.Stalled): // nothing of QEMU's or of lockstep's ends it
	}
	hangUp()
	<-result
}
