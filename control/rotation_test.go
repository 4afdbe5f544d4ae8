// SPDX-License-Identifier: Apache-2.0

package control

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/nicloop"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/peerlink/peerlinktest"
)

func (f *fakePath) sessionNow() datapath.Session {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.session
}

// Terms rise while both sides go on: no freeze, no checkpoint, no new digest keys,
// and what is held is still released.
func TestRotation(t *testing.T) {
	for name, secured := range map[string]bool{"insecure": false, "tls": true} {
		t.Run(name, func(t *testing.T) {
			p, s := hosts(t, newPair(t))
			if secured {
				ca := peerlinktest.NewAuthority(t, "CA one")
				p.opt.TLS, s.opt.TLS = mustTLS(t, files(ca, "alpha", "web1")), mustTLS(t, files(ca, "beta", "web1"))
			}
			p.opt.Rekey, s.opt.Rekey = 20*time.Millisecond, time.Nanosecond // S has no say in it
			p.start()
			s.start()
			p.path.await(t, 0, "session 1")
			first := p.path.sessionNow()
			p.path.pvm(1000, "hello")
			p.path.await(t, 0, "rotated 2", "rotated 3", "rotated 4")
			s.path.await(t, 0, "session 1", "rotated 2", "rotated 3", "rotated 4")
			p.path.svm(1, 1000, "hello")
			p.path.await(t, 0, "send 1000+5")
			st := p.await("a later term", func(st api.Status) bool { return st.Term > 4 && st.Peer.Connected })
			if st.CheckpointsRequested != 0 || st.State != "replicating" {
				t.Errorf("status %+v", st)
			}
			for _, x := range []*side{p, s} {
				for _, line := range x.path.since(0) {
					if word, _, _ := strings.Cut(line, " "); word == "reset" || line == "mode park" || line == "mode shut" || line == "session 2" {
						t.Errorf("%s: %q in %q", x.opt.Node, line, x.path.since(0))
					}
				}
			}
			if now := p.path.sessionNow(); now.TxKey == first.TxKey || now.RxKey == first.RxKey || now.Digest != first.Digest || !now.Rotated {
				t.Error("signing keys kept, or digest keys not")
			}
			p.end()
			s.end() // both stand still now
			a, b := p.path.sessionNow(), s.path.sessionNow()
			if a.Term == b.Term && (a.TxKey != b.RxKey || a.RxKey != b.TxKey) {
				t.Errorf("the keys of term %d do not fit together", a.Term)
			}
			if a.Digest != b.Digest || a.PeerMAC.String() != s.path.mac.String() || b.PeerMAC.String() != p.path.mac.String() {
				t.Error("digest keys or addresses do not fit together")
			}
		})
	}
}

// A checkpoint under way and a rotation do not see each other: the epoch that a
// NIC has is the checkpoint's.
func TestRotationInACheckpoint(t *testing.T) {
	pair := newPair(t)
	p, s := hosts(t, pair)
	p.opt.Rekey = 5 * time.Millisecond
	p.start()
	s.start()
	p.replicating()
	s.replicating()
	for n := uint64(1); n <= 5; n++ {
		p.d.checkpoints.want(nicloop.Request{NIC: -1, Reason: "test"})
		p.await("a commit", func(st api.Status) bool { return st.CheckpointsDone == n && st.State == "replicating" })
	}
	st := p.replicating()
	if st.Term < 2 || st.Epoch != 6 {
		t.Errorf("term %d, epoch %d", st.Term, st.Epoch)
	}
	for _, c := range st.Checkpoints {
		if c.Result != "committed" {
			t.Errorf("checkpoint %+v", c)
		}
	}
}

// join plays the secondary up to its ok.
func join(t *testing.T, p *side, term uint32) (*peerlink.Link, peerlink.Session) {
	t.Helper()
	l := dialLink(t, p.opt.Control)
	h := goodHello()
	h.Term = term
	if err := l.Write(h); err != nil {
		t.Fatal(err)
	}
	m, err := l.Read(patience)
	s, ok := m.(peerlink.Session)
	if err != nil || !ok {
		t.Fatalf("session: %+v, %v", m, err)
	}
	if err := l.Write(peerlink.OK{}); err != nil {
		t.Fatal(err)
	}
	return l, s
}

// The secondary is lost in mid-rotation, by its silence or with its link: the link
// is given up, nothing else, and the next session is behind both terms.
func TestRotationFails(t *testing.T) {
	for name, hangUp := range map[string]bool{"no answer": false, "link loss": true} {
		t.Run(name, func(t *testing.T) {
			p, _ := hosts(t, newPair(t))
			p.opt.QMP = ""
			p.opt.Rekey = 20 * time.Millisecond
			p.opt.link.Handshake = time.Second
			p.start()
			l, _ := join(t, p, 0)
			m, err := l.Read(patience)
			if r, _ := m.(peerlink.Rekey); err != nil || r.Term != 2 || len(r.Sign) != peerlink.SeedLen {
				t.Fatalf("rekey: %+v, %v", m, err)
			}
			p.path.await(t, 0, "session 1", "rotated 2")
			old := p.path.sessionNow()
			want := "did not answer to new keys in time"
			if hangUp {
				want = "beta's daemon has ended, or closed it"
				l.Close(errors.New("cut by the test"))
			} else {
				go func() { // alive all the same
					for l.Write(peerlink.Ping{}) == nil {
						<-time.After(10 * time.Millisecond)
					}
				}()
				for {
					m, err := l.Read(patience)
					if err != nil {
						break
					}
					if m != (peerlink.Ping{}) {
						t.Errorf("%+v before the answer", m) // no second rotation beside the first
					}
				}
			}
			st := p.await("a lost link", func(st api.Status) bool { return !st.Peer.Connected && strings.Contains(st.Peer.Error, want) })
			if st.Term != 2 || st.CheckpointsRequested != 0 || st.State != "replicating" {
				t.Errorf("status %+v", st)
			}
			// S may or may not have had the new keys.
			_, s := join(t, p, 1)
			p.path.await(t, 0, "rotated 2", "session 3")
			if now := p.path.sessionNow(); s.Term != 3 || now.Rotated && now.Term == 3 || now.TxKey == old.TxKey {
				t.Errorf("session %d, installed %d, rotated %v", s.Term, now.Term, now.Rotated)
			}
		})
	}
}

// A restart begins a session of its own, behind all rotations: frames of the terms
// before it are refused at once.
func TestRestartAfterRotation(t *testing.T) {
	for _, who := range []string{"alpha", "beta"} {
		t.Run(who, func(t *testing.T) {
			p, s := hosts(t, nil)
			p.opt.Rekey = 20 * time.Millisecond
			p.start()
			s.start()
			s.path.await(t, 0, "rotated 2", "rotated 3")
			gone := map[string]*side{"alpha": p, "beta": s}[who]
			gone.end()
			stays := map[string]*side{"alpha": s, "beta": p}[who]
			stays.await("a lost peer", func(st api.Status) bool { return !st.Peer.Connected })
			last := stays.path.sessionNow().Term
			p.opt.Rekey = 0
			mark := stays.path.mark()
			if who == "beta" { // P goes on with its rotations
				gone.start()
				gone.path.await(t, 0, fmt.Sprintf("session %d", last+1))
			} else {
				gone.start()
			}
			stays.path.await(t, mark, fmt.Sprintf("session %d", last+1))
		})
	}
}

// Keys that do not follow are refused, and the link with them.
func TestRekeyRefused(t *testing.T) {
	seed := make([]byte, peerlink.SeedLen)
	for name, m := range map[string]peerlink.Message{
		"empty":          peerlink.Rekey{},
		"the same term":  peerlink.Rekey{Term: 1, Sign: seed},
		"a term skipped": peerlink.Rekey{Term: 3, Sign: seed},
		"short":          peerlink.Rekey{Term: 2, Sign: seed[1:]},
	} {
		t.Run(name, func(t *testing.T) {
			p, s := hosts(t, nil)
			p.start()
			s.start()
			p.replicating()
			s.replicating()
			mark := s.path.mark()
			p.d.post(func() { p.d.peer.send(m) })
			s.path.await(t, mark, "session 2")
			for _, line := range s.path.since(0) {
				if strings.HasPrefix(line, "rotated") {
					t.Errorf("the secondary did %q", line)
				}
			}
		})
	}
	// Nor does the secondary give the primary keys.
	p, _ := hosts(t, nil)
	p.start()
	l, _ := join(t, p, 0)
	if err := l.Write(peerlink.Rekey{Term: 2, Sign: seed}); err != nil {
		t.Fatal(err)
	}
	p.await("a lost link", func(st api.Status) bool { return strings.Contains(st.Peer.Error, `"rekey" makes no sense`) })
}
