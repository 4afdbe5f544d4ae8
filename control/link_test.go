// SPDX-License-Identifier: Apache-2.0

package control

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"lockstep/compare"
)

// dialLink connects to a primary, as a secondary or somebody else would.
func dialLink(t *testing.T, address string) *link {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	again := backoff{first: time.Millisecond, last: 10 * time.Millisecond}
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
		if err == nil {
			t.Cleanup(func() { conn.Close() })
			return newLink(conn, linkTiming{silence: patience, ping: patience})
		}
		if !again.wait(ctx) {
			t.Fatal(err)
		}
	}
}

func goodHello() hello {
	return hello{
		party: party{Version: linkVersion, VM: "web1", Node: "beta", Role: "secondary", NICs: []string{"02:00:00:00:00:02"}},
		Whole: true,
	}
}

// A peer that does not fit is refused, by both sides, with the reason; it is in
// the status too.
func TestRefusals(t *testing.T) {
	tests := []struct {
		name   string
		change func(*party)
		want   string
	}{
		{"version", func(p *party) { p.Version = 1 }, fmt.Sprintf("control protocol %d here, 1 there", linkVersion)},
		{"vm", func(p *party) { p.VM = "web2" }, `vm "web1" here, "web2" there`},
		{"node", func(p *party) { p.Node = "gamma" }, `but "gamma" is there`},
		{"role", func(p *party) { p.Role = "boss" }, `"boss" there: one is to be primary`},
		{"nics", func(p *party) { p.NICs = append(p.NICs, "02:00:00:00:00:09") }, "1 NICs here, 2 there"},
		{"mac", func(p *party) { p.NICs = []string{"nonsense"} }, "no MAC address"},
		{"qmp", func(p *party) { p.QMP = true }, "qmp is configured on one node only"},
		{"config", func(p *party) { p.Config = "other" }, "configs differ in what both must agree on"},
	}
	p, _ := hosts(t, nil)
	p.start()
	for _, tt := range tests {
		t.Run("by the primary: "+tt.name, func(t *testing.T) {
			l := dialLink(t, p.opt.Control)
			h := goodHello()
			tt.change(&h.party)
			if err := l.write(message{Type: "hello", Hello: &h}); err != nil {
				t.Fatal(err)
			}
			m, err := l.read(patience)
			if err != nil || m.Type != "refuse" || !strings.Contains(m.Cause, tt.want) {
				t.Errorf("got %+v, %v, want %q", m, err, tt.want)
			}
			p.await("the reason", func(st Status) bool { return strings.Contains(st.Peer.Error, tt.want) && st.State == "start" })
		})
	}
	p.end()

	// A primary that the test plays.
	ln, err := net.Listen("tcp", p.opt.Control)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, s := hosts(t, nil)
	s.opt.Control = p.opt.Control
	s.start()
	good := party{Version: linkVersion, VM: "web1", Node: "alpha", Role: "primary", Term: 5, NICs: []string{"02:00:00:00:00:01"}}
	seed, keys := make([]byte, seedLen), keyBytes(new(compare.Keys))
	offer := func(m message) *link {
		t.Helper()
		conn, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		l := newLink(conn, linkTiming{silence: patience, ping: patience})
		if m, err := l.read(patience); err != nil || m.Type != "hello" || m.Hello.Node != "beta" || !m.Hello.Whole {
			t.Fatalf("hello: %+v, %v", m, err)
		}
		if err := l.write(m); err != nil {
			t.Fatal(err)
		}
		return l
	}
	for _, tt := range tests {
		q := good
		q.NICs = append([]string(nil), good.NICs...)
		tt.change(&q)
		offer(message{Type: "session", Session: &session{party: q, Epoch: 1, Digest: keys, Sign: seed}})
		s.await(tt.want, func(st Status) bool { return strings.Contains(st.Peer.Error, tt.want) })
	}
	old := good
	old.Term = 0
	for want, m := range map[string]message{
		"out of date":          {Type: "session", Session: &session{party: old, Digest: keys, Sign: seed}},
		"wrong length":         {Type: "session", Session: &session{party: good, Digest: keys[1:], Sign: seed}},
		"refused: not you":     {Type: "refuse", Cause: "not you"},
		"in place of session":  {Type: "session"},
		`"prepare" in place o`: {Type: "prepare", Epoch: 1},
	} {
		offer(m)
		s.await(want, func(st Status) bool { return strings.Contains(st.Peer.Error, want) })
	}
	if st := s.await("start", func(st Status) bool { return st.State == "start" }); st.Peer.Connected {
		t.Errorf("status %+v", st)
	}
	l := offer(message{Type: "session", Session: &session{party: good, Epoch: 1, Digest: keys, Sign: seed}})
	if m, err := l.read(patience); err != nil || m.Type != "ok" {
		t.Errorf("got %+v, %v, want ok", m, err)
	}
	s.replicating()
}

// Whoever talks nonsense to the primary is cut off; the secondary's session goes on.
func TestNonsenseOnTheControlAddress(t *testing.T) {
	p, s := hosts(t, nil)
	p.opt.link.handshake = 100 * time.Millisecond
	p.start()
	s.start()
	p.replicating()
	for name, line := range map[string]string{
		"http": "GET / HTTP/1.1\r\n\r\n", "no hello": `{"type":"ready","epoch":1}` + "\n", "empty hello": `{"type":"hello"}` + "\n",
		"endless": strings.Repeat("x", 2*maxMessage), "binary": "\x16\x03\x01\x00\n", "silent": "",
	} {
		l := dialLink(t, p.opt.Control)
		if line != "" {
			if _, err := l.conn.Write([]byte(line)); err != nil {
				t.Fatal(err)
			}
		}
		if m, err := l.read(patience); err == nil {
			t.Errorf("%s: got %+v", name, m)
		}
	}
	// So many at once that some are not even heard.
	for range 3 * maxStrangers {
		dialLink(t, p.opt.Control)
	}
	if st := p.replicating(); st.Term != 1 {
		t.Errorf("term %d: the session was lost", st.Term)
	}
	s.replicating()
}

// A peer that is there but says nothing, or says what makes no sense, is lost.
func TestSilentPeer(t *testing.T) {
	p, _ := hosts(t, nil)
	p.opt.link.silence, p.opt.link.handshake = 100*time.Millisecond, time.Second
	p.start()
	join := func() *link {
		t.Helper()
		l := dialLink(t, p.opt.Control)
		h := goodHello()
		if err := l.write(message{Type: "hello", Hello: &h}); err != nil {
			t.Fatal(err)
		}
		m, err := l.read(patience)
		if err != nil || m.Type != "session" || m.Session.Digest == nil {
			t.Fatalf("session: %+v, %v", m, err)
		}
		return l
	}
	// Never says ok.
	join()
	p.await("a lost handshake", func(st Status) bool {
		return !st.Peer.Connected && strings.Contains(st.Peer.Error, "timeout") && st.State == "start"
	})
	// Says ok and no more. A slow machine's pings may come late, but these never do.
	if err := join().write(message{Type: "ok"}); err != nil {
		t.Fatal(err)
	}
	p.await("a lost peer", func(st Status) bool { return !st.Peer.Connected && st.State == "replicating" && st.Term == 2 })
	// Says nonsense.
	l := join()
	for _, m := range []message{{Type: "ok"}, {Type: "prepare", Epoch: 3}} {
		if err := l.write(m); err != nil {
			t.Fatal(err)
		}
	}
	p.await("a lost peer", func(st Status) bool { return strings.Contains(st.Peer.Error, `"prepare" makes no sense`) })
}

func TestSignKeys(t *testing.T) {
	var a [seedLen]byte
	p2s, s2p := signKeys(a)
	if q, r := signKeys(a); q != p2s || r != s2p || p2s == s2p {
		t.Error("signing keys do not follow the seed")
	}
}

// A session of as many NICs as are allowed fits into a line.
func TestMessageFits(t *testing.T) {
	s := session{Digest: keyBytes(new(compare.Keys)), Sign: make([]byte, seedLen)}
	for range maxNICs {
		s.NICs = append(s.NICs, "02:00:00:00:00:01")
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	sent := make(chan error, 1)
	go func() {
		sent <- newLink(a, linkTiming{silence: patience, ping: patience}).write(message{Type: "session", Session: &s})
	}()
	m, err := newLink(b, linkTiming{silence: patience, ping: patience}).read(patience)
	if err != nil || len(m.Session.NICs) != maxNICs || <-sent != nil {
		t.Errorf("%v", err)
	}
}

// FuzzMessage: no line brings the reader down.
func FuzzMessage(f *testing.F) {
	f.Add([]byte(`{"type":"hello","hello":{"version":1,"nics":["02:00:00:00:00:01"]}}`))
	f.Add([]byte(`{"type":"session","session":{"digest":"AAAA"}}`))
	f.Add([]byte("{\"type\":\"ping\"}\nnull\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		l := newLink(&bytesConn{Reader: bytes.NewReader(b)}, linkTiming{silence: time.Hour, ping: time.Hour})
		for {
			m, err := l.read(time.Hour)
			if err != nil {
				return
			}
			if m.Hello != nil {
				_ = checkPeer(goodHello().party, m.Hello.party, "beta", "secondary")
			}
			_ = fmt.Sprint(m)
		}
	})
}

// bytesConn is a connection that brings bytes and has no deadlines.
type bytesConn struct {
	net.Conn
	*bytes.Reader
}

func (c *bytesConn) Read(b []byte) (int, error)      { return c.Reader.Read(b) }
func (c *bytesConn) SetReadDeadline(time.Time) error { return nil }
