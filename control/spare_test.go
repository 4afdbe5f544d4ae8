// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/state"
)

// withSpare are a primary, alpha, which a pair of beta and gamma may follow, and the side of the node that is called second.
// The other of the two is the test's.
func withSpare(t *testing.T, second string) (p, s *side, a *sharedArbiter) {
	t.Helper()
	p, s, a = lives(t, newPair(t))
	at := map[string]string{"beta": "127.0.0.2", "gamma": "127.0.0.3"}
	for node, addr := range at {
		p.opt.Spares = append(p.opt.Spares, Peer{Name: node, Addr: netip.MustParseAddr(addr)})
		if node != second {
			s.opt.Spares = append(s.opt.Spares, Peer{Name: node})
		}
	}
	s.opt.Spares = append(s.opt.Spares, Peer{Name: "alpha"})
	s.opt.Node, s.opt.OwnAddr = second, netip.MustParseAddr(at[second])
	store, err := state.Open(t.TempDir(), "web1", second)
	if err != nil {
		t.Fatal(err)
	}
	s.opt.Failover.Store = store
	p.opt.entryEvery, s.opt.entryEvery = 5*time.Millisecond, 5*time.Millisecond
	return p, s, a
}

// greet has a node at an address say hello to the primary, and returns the answer and the link.
func greet(t *testing.T, p *side, node, from string) (peerlink.Message, *peerlink.Link) {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	conn, err := d.DialContext(t.Context(), "tcp", p.opt.Control)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	l := peerlink.New(conn, peerlink.Timing{Silence: patience, Ping: patience})
	h := goodHello()
	h.Node, h.QMP = node, true
	if err := l.Write(h); err != nil {
		t.Fatal(err)
	}
	m, err := l.Read(patience)
	if err != nil {
		t.Fatal(err)
	}
	return m, l
}

// A pair is two nodes: a third waits until the arbiter has let the primary go on alone, under a new fencing term. Then
// one comes in, and the secondary that was is the one that waits.
func TestSpareWaits(t *testing.T) {
	p, s, a := withSpare(t, "beta")
	startCovered(p, s)
	spare := func(node, from, secondary string) {
		t.Helper()
		m, _ := greet(t, p, node, from)
		if r, ok := m.(peerlink.Refuse); !ok || !r.Spare || r.Cause != "alpha's secondary is "+secondary {
			t.Errorf("%s was answered %+v", node, m)
		}
	}
	spare("gamma", "127.0.0.3", "beta")
	if m, _ := greet(t, p, "gamma", "127.0.0.2"); !strings.Contains(m.(peerlink.Refuse).Cause, `the peer of "alpha" is "beta"`) {
		t.Errorf("a node at another's address was answered %+v", m)
	}
	if st := p.await("the pair", func(api.Status) bool { return true }); st.Peer.Node != "beta" || !st.Peer.Connected || !st.Covered || st.Peer.Error != "" {
		t.Errorf("the pair is disturbed: %+v", st.Peer)
	}
	s.stop()
	p.await("solo", func(st api.Status) bool { return st.State == "solo" })
	m, _ := greet(t, p, "gamma", "127.0.0.3")
	if session, ok := m.(peerlink.Session); !ok || session.Record != 2 {
		t.Fatalf("the spare was answered %+v", m)
	}
	p.await("the new peer", func(st api.Status) bool { return st.Peer.Node == "gamma" })
	spare("beta", "127.0.0.2", "gamma") // however covered it was
	// What it would ask the arbiter with was the pair's term.
	if now, won, err := a.Swap(t.Context(), arbiter.Entry{Term: 1, Speaker: "alpha"}, arbiter.Entry{Term: 2, Speaker: "beta"}); won || err != nil {
		t.Errorf("the secondary of an earlier pair has won: %v, %v", now, err)
	}
}

// bound starts a primary whose guest has died, with a spare there and the former secondary not, which may be covered.
func bound(t *testing.T, mutation bool) (p, s *side, a *sharedArbiter) {
	t.Helper()
	p, s, a = withSpare(t, "gamma")
	p.opt.Failover.unbound = mutation
	if err := p.opt.Failover.Store.Save(state.State{Role: "primary", Term: 1, Replicated: true, Peer: "beta", PairTerm: 1}); err != nil {
		t.Fatal(err)
	}
	p.start()
	s.start()
	return p, s, a
}

// TestSpareBound: where a former secondary can win the arbiter still, no other one is taken until it cannot.
func TestSpareBound(t *testing.T) {
	p, s, a := bound(t, false)
	s.await("the reason", func(st api.Status) bool {
		return st.State == "spare" && st.Detail == "this node is a spare: beta may be able to take over from alpha still, so alpha waits for that node; if it is lost, `lockstep failover` on alpha goes on without it"
	})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := p.d.Failover(ctx, false); err != nil {
		t.Fatal(err)
	}
	p.await("the spare", func(st api.Status) bool { return st.Peer.Node == "gamma" })
	s.ends(ErrAfresh) // it is let in; its QEMU follows in COLO from the beginning, and so has to be replaced
	if _, won, err := a.Swap(ctx, arbiter.Entry{Term: 1, Speaker: "alpha"}, arbiter.Entry{Term: 2, Speaker: "beta"}); won || err != nil {
		t.Errorf("beta has won: %v", err)
	}
}

// Without the rule the primary transmits with a secondary's leases, while another one wins.
func TestSpareBoundMutation(t *testing.T) {
	p, s, a := bound(t, true)
	s.covered()
	p.covered()
	if _, won, err := a.Swap(t.Context(), arbiter.Entry{Term: 1, Speaker: "alpha"}, arbiter.Entry{Term: 2, Speaker: "beta"}); !won || err != nil {
		t.Errorf("the mutation is not noticed: beta has not won, %v", err)
	}
	p.ends(ErrFenced) // it finds that out late
	s.ends(ErrAfresh)
}

// TestSparePassedBy: a spare follows the primary that the arbiter names.
func TestSparePassedBy(t *testing.T) {
	_, s, a := withSpare(t, "gamma")
	s.start()
	// Neither a node that is not in the config nor its own primary at a later term is a reason.
	for _, now := range []arbiter.Entry{{Term: 2, Speaker: "omega"}, {Term: 3, Speaker: "alpha"}} {
		a.await(t, a.set(now)+3)
	}
	select {
	case err := <-s.done:
		t.Fatalf("it ended: %v", err)
	default:
	}
	a.set(arbiter.Entry{Term: 4, Speaker: "beta"})
	s.ends(ErrAfresh)
}

// A peer link that cannot be led to a node keeps that node out, and says why.
func TestSpareNotReached(t *testing.T) {
	p, _, _ := withSpare(t, "beta")
	for i := range p.opt.Spares {
		p.opt.Spares[i].Direct = func() error { return errors.New("no such device") }
	}
	p.start()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("127.0.0.3")}}
	p.await("the reason", func(st api.Status) bool {
		conn, err := d.DialContext(t.Context(), "tcp", p.opt.Control)
		if err != nil {
			return false
		}
		defer conn.Close()
		h := goodHello()
		h.Node, h.QMP = "gamma", true
		l := peerlink.New(conn, peerlink.Timing{Silence: patience, Ping: patience})
		if err := l.Write(h); err != nil {
			return false
		}
		if m, err := l.Read(patience); err == nil {
			if _, refused := m.(peerlink.Refuse); !refused {
				t.Fatalf("it was answered %+v", m)
			}
		}
		return st.Peer.Node == "beta" && strings.Contains(st.Peer.Error, "no such device")
	})
}

// TestLateDiskReport: what QEMU reports late of a former secondary's replica, since it sends one such event a second, says
// nothing about the one that follows it.
func TestLateDiskReport(t *testing.T) {
	p, s, _ := lives(t, newPair(t))
	startCovered(p, s)
	report := func(at time.Time) {
		if err := p.d.ask(t.Context(), func() {
			p.d.failover.Disks, p.d.repl.begun = []qemu.Disk{{ID: "disk0"}}, time.Unix(2000, 0)
			p.d.guest.guestEvent("QUORUM_REPORT_BAD", at, map[string]any{"node-name": "nbd0", "type": "flush", "error": "gone"})
		}); err != nil {
			t.Fatal(err)
		}
	}
	report(time.Unix(1999, 0))
	if st := p.await("the status", func(api.Status) bool { return true }); st.State != "replicating" || len(st.DiskFaults) > 0 {
		t.Errorf("a late report has the pair end: %s, %+v", st.State, st.DiskFaults)
	}
	report(time.Unix(2001, 0))
	p.await("solo", func(st api.Status) bool { return st.State == "solo" && len(st.DiskFaults) == 1 })
	s.ends(ErrAfresh)
}
