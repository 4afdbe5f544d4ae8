// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/peerlink"
)

// dialConn connects to a primary, as a secondary or somebody else would.
func dialConn(t *testing.T, address string) (*peerlink.Link, net.Conn) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	again := backoff{first: time.Millisecond, last: 10 * time.Millisecond}
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
		if err == nil {
			t.Cleanup(func() { conn.Close() })
			return peerlink.New(conn, peerlink.Timing{Silence: patience, Ping: patience}), conn
		}
		if !again.wait(ctx) {
			t.Fatal(err)
		}
	}
}

func dialLink(t *testing.T, address string) *peerlink.Link {
	t.Helper()
	l, _ := dialConn(t, address)
	return l
}

func goodHello() peerlink.Hello {
	return peerlink.Hello{
		Party: peerlink.Party{Version: peerlink.Version, VM: "web1", Node: "beta", Role: "secondary", NICs: []string{"02:00:00:00:00:02"}},
		Whole: true,
	}
}

// A peer that does not fit is refused, by both sides, with the reason; it is in
// the status too.
func TestRefusals(t *testing.T) {
	tests := []struct {
		name   string
		change func(*peerlink.Party)
		want   string
	}{
		{"version", func(p *peerlink.Party) { p.Version = 1 }, fmt.Sprintf("control protocol %d here, 1 there", peerlink.Version)},
		{"vm", func(p *peerlink.Party) { p.VM = "web2" }, `vm "web1" here, "web2" there`},
		{"node", func(p *peerlink.Party) { p.Node = "gamma" }, `but "gamma" is there`},
		{"role", func(p *peerlink.Party) { p.Role = "boss" }, `"boss" there: one is to be primary`},
		{"nics", func(p *peerlink.Party) { p.NICs = append(p.NICs, "02:00:00:00:00:09") }, "1 NICs here, 2 there"},
		{"mac", func(p *peerlink.Party) { p.NICs = []string{"nonsense"} }, "no MAC address"},
		{"qmp", func(p *peerlink.Party) { p.QMP = true }, "qmp is configured on one node only"},
		{"config", func(p *peerlink.Party) { p.Config = "other" }, "configs differ in what both must agree on"},
	}
	p, _ := hosts(t, nil)
	p.start()
	for _, tt := range tests {
		t.Run("by the primary: "+tt.name, func(t *testing.T) {
			l := dialLink(t, p.opt.Control)
			h := goodHello()
			tt.change(&h.Party)
			if err := l.Write(h); err != nil {
				t.Fatal(err)
			}
			m, err := l.Read(patience)
			r, _ := m.(peerlink.Refuse)
			if err != nil || !strings.Contains(r.Cause, tt.want) {
				t.Errorf("got %+v, %v, want %q", m, err, tt.want)
			}
			p.await("the reason", func(st api.Status) bool { return strings.Contains(st.Peer.Error, tt.want) && st.State == "start" })
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
	good := peerlink.Party{Version: peerlink.Version, VM: "web1", Node: "alpha", Role: "primary", Term: 5, NICs: []string{"02:00:00:00:00:01"}}
	seed, keys := make([]byte, peerlink.SeedLen), peerlink.KeyBytes(new(compare.Keys))
	offer := func(m peerlink.Message) *peerlink.Link {
		t.Helper()
		conn, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		l := peerlink.New(conn, peerlink.Timing{Silence: patience, Ping: patience})
		got, err := l.Read(patience)
		if h, _ := got.(peerlink.Hello); err != nil || h.Node != "beta" || !h.Whole {
			t.Fatalf("hello: %+v, %v", got, err)
		}
		if err := l.Write(m); err != nil {
			t.Fatal(err)
		}
		return l
	}
	for _, tt := range tests {
		q := good
		q.NICs = append([]string(nil), good.NICs...)
		tt.change(&q)
		offer(peerlink.Session{Party: q, Epoch: 1, Digest: keys, Sign: seed})
		s.await(tt.want, func(st api.Status) bool { return strings.Contains(st.Peer.Error, tt.want) })
	}
	old := good
	old.Term = 0
	for want, m := range map[string]peerlink.Message{
		"out of date":          peerlink.Session{Party: old, Digest: keys, Sign: seed},
		"wrong length":         peerlink.Session{Party: good, Digest: keys[1:], Sign: seed},
		"refused: not you":     peerlink.Refuse{Cause: "not you"},
		`"prepare" in place o`: peerlink.Prepare{Epoch: 1},
	} {
		offer(m)
		s.await(want, func(st api.Status) bool { return strings.Contains(st.Peer.Error, want) })
	}
	if st := s.await("start", func(st api.Status) bool { return st.State == "start" }); st.Peer.Connected {
		t.Errorf("status %+v", st)
	}
	l := offer(peerlink.Session{Party: good, Epoch: 1, Digest: keys, Sign: seed})
	if m, err := l.Read(patience); err != nil || m != (peerlink.OK{}) {
		t.Errorf("got %+v, %v, want ok", m, err)
	}
	s.replicating()
}

// Whoever talks nonsense to the primary is cut off; the secondary's session goes on.
func TestNonsenseOnTheControlAddress(t *testing.T) {
	p, s := hosts(t, nil)
	p.opt.link.Handshake = 100 * time.Millisecond
	p.start()
	s.start()
	p.replicating()
	for name, line := range map[string]string{
		"http": "GET / HTTP/1.1\r\n\r\n", "no hello": `{"type":"ready","epoch":1}` + "\n", "empty hello": `{"type":"hello"}` + "\n",
		"endless": strings.Repeat("x", 2*peerlink.MaxMessage), "binary": "\x16\x03\x01\x00\n", "silent": "",
	} {
		l, conn := dialConn(t, p.opt.Control)
		if line != "" {
			if _, err := conn.Write([]byte(line)); err != nil {
				t.Fatal(err)
			}
		}
		if m, err := l.Read(patience); err == nil {
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

// TestStrangers: clients that connect and say nothing do not keep the secondary out,
// neither those from its own address, whose oldest make room, nor others, who are not let in.
func TestStrangers(t *testing.T) {
	p, s := hosts(t, nil)
	p.opt.link.Handshake, s.opt.link.Handshake = patience, patience // whoever waits for that is late
	p.opt.PeerAddr, s.opt.OwnAddr = netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.1")
	p.start()
	silent := func(from string) net.Conn {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		conn, err := d.DialContext(t.Context(), "tcp", p.opt.Control)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	p.await("a status", func(api.Status) bool { return true }) // it listens
	for range 3 {
		conn := silent("127.0.0.2")
		conn.SetReadDeadline(time.Now().Add(patience / 2))
		if n, err := conn.Read(make([]byte, 1)); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("a client from elsewhere: %d bytes, %v", n, err)
		}
	}
	p.await("the reason", func(st api.Status) bool {
		return strings.Contains(st.Peer.Error, "beta is 127.0.0.1: that node has to connect from its control address")
	})
	for range 3 * maxStrangers {
		silent("127.0.0.1")
	}
	began := time.Now()
	s.start()
	p.replicating()
	if took := time.Since(began); took > patience/2 {
		t.Errorf("the session took %v", took)
	}
	// They do not end the session either.
	for range 3 * maxStrangers {
		silent("127.0.0.1")
	}
	if st := p.replicating(); st.Term != 1 {
		t.Errorf("term %d: the session was lost", st.Term)
	}
}

// A peer that is there but says nothing, or says what makes no sense, is lost.
func TestSilentPeer(t *testing.T) {
	p, _ := hosts(t, nil)
	p.opt.link.Silence, p.opt.link.Handshake = 100*time.Millisecond, time.Second
	p.start()
	join := func() *peerlink.Link {
		t.Helper()
		l := dialLink(t, p.opt.Control)
		h := goodHello()
		if err := l.Write(h); err != nil {
			t.Fatal(err)
		}
		m, err := l.Read(patience)
		if s, _ := m.(peerlink.Session); err != nil || s.Digest == nil {
			t.Fatalf("session: %+v, %v", m, err)
		}
		return l
	}
	// Never says ok.
	join()
	p.await("a lost handshake", func(st api.Status) bool {
		return !st.Peer.Connected && strings.Contains(st.Peer.Error, "timeout") && st.State == "start"
	})
	// Says ok and no more. A slow machine's pings may come late, but these never do.
	if err := join().Write(peerlink.OK{}); err != nil {
		t.Fatal(err)
	}
	p.await("a lost peer", func(st api.Status) bool { return !st.Peer.Connected && st.State == "replicating" && st.Term == 2 })
	// Says nonsense.
	l := join()
	for _, m := range []peerlink.Message{peerlink.OK{}, peerlink.Prepare{Epoch: 3}} {
		if err := l.Write(m); err != nil {
			t.Fatal(err)
		}
	}
	p.await("a lost peer", func(st api.Status) bool { return strings.Contains(st.Peer.Error, `"prepare" makes no sense`) })
}

// TestManyEdges: the primary tells of two million connections that an earlier host took
// over. It waits for a secondary that takes them slowly, its queue stays free for
// everything else, and the secondary is covered when it knows all, not before.
func TestManyEdges(t *testing.T) {
	const edges = 2_000_000
	pair := newPair(t)
	p, s, _ := calmLives(t, pair)
	p.opt.Heartbeat.Timeout, s.opt.Heartbeat.Timeout, p.opt.Failover.doubt = patience, patience, 10*patience // the test is of the queue, not of a slow machine
	p.opt.qmpTimeout, s.opt.qmpTimeout = patience, patience
	p.opt.link.Silence, s.opt.link.Silence = patience, patience
	p.edges = make([]datapath.Edge, edges)
	for i := range p.edges {
		p.edges[i] = datapath.Edge{Tuple: testTuple, Seq: uint32(i), TS: ^uint32(0)}
	}
	first, goOn := make(chan struct{}), make(chan struct{})
	s.known = func(n int) {
		if n == peerlink.MaxEdges {
			close(first)
			<-goOn
		}
	}
	p.start()
	s.start()
	select {
	case <-first:
	case <-time.After(patience):
		t.Fatal("the edges do not come")
	}
	queued, up := 0, false
	if err := p.d.ask(t.Context(), func() {
		if up = p.d.peer.linkUp; up {
			queued = p.d.peer.link.Queued()
		}
	}); err != nil {
		t.Fatal(err)
	}
	close(goOn)
	if !up || queued > 10 {
		t.Errorf("while the secondary takes nothing: link %v, %d messages queued", up, queued)
	}
	late, known := time.Now().Add(2*patience), 0
	for covered := false; !covered; {
		if time.Now().After(late) {
			t.Fatalf("the secondary is not covered, and knows %d edges of %d", known, edges)
		}
		covered = s.await("a status", func(api.Status) bool { return true }).Covered
		s.path.mu.Lock()
		n := len(s.path.edges)
		s.path.mu.Unlock()
		if covered && n != edges {
			t.Fatalf("covered with %d edges of %d", n, edges)
		}
		if n > known { // as many as there are take their time under the race detector
			late, known = time.Now().Add(2*patience), n
		}
	}
	for i, e := range s.path.edges {
		if e.Seq != uint32(i) {
			t.Fatalf("edge %d is %+v", i, e)
		}
	}
	if st := p.await("a commit", func(st api.Status) bool { return st.CheckpointsDone > 0 }); st.Term != 1 {
		t.Errorf("term %d: the link was lost on the way", st.Term)
	}
}

// The edges, and that it is covered, are told again to a secondary whose link broke.
func TestEdgesAgain(t *testing.T) {
	pair := newPair(t)
	p, s, _ := calmLives(t, pair)
	p.edges = []datapath.Edge{{Tuple: testTuple, Seq: 1}}
	p.start()
	s.start()
	s.covered()
	for want := 2; want < 4; want++ {
		if err := p.d.ask(t.Context(), func() { p.d.peer.unlink(p.d.peer.link, errors.New("cut by the test")) }); err != nil {
			t.Fatal(err)
		}
		s.await("the edges again", func(st api.Status) bool {
			s.path.mu.Lock()
			defer s.path.mu.Unlock()
			return len(s.path.edges) >= want && st.Covered
		})
	}
}
