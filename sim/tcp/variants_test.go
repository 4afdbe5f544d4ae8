// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"net/netip"
	"testing"
	"time"
)

// TestWraps: sequence numbers and timestamps that wrap early in a connection.
func TestWraps(t *testing.T) {
	cfg := Config{SeqWrap: 5000, TSWrap: 50}
	w := newWorld(t, cfg, cfg, link{delay: 20 * time.Millisecond, loss: 0.02}, 1)
	w.exchange(200_000, 200_000, time.Minute, func(a, b *stream) {
		for _, x := range []*stream{a, b} {
			c := x.s.conns[x.id]
			if c.iss < 1<<32-5000 || c.tsNow(w.now) < 1<<32-60 && c.tsNow(w.now) > 60 {
				t.Errorf("ISN %d, timestamp %d", c.iss, c.tsNow(w.now))
			}
		}
	})
}

// TestExtensionHeaders: IPv6 with options in front of TCP.
func TestExtensionHeaders(t *testing.T) {
	cfg := Config{Addr: addrA6, HopOptions: true, DestOptions: true}
	other := cfg
	other.Addr = addrB6
	w := newWorld(t, cfg, other, link{delay: time.Millisecond}, 1)
	w.keep = true
	w.exchange(10_000, 10_000, time.Minute, nil)
	for _, f := range w.sent {
		if f[etherLen+6] != protoHopByHop || f[etherLen+ipv6Len] != protoDestOptions || f[etherLen+ipv6Len+extLen] != protoTCP {
			t.Fatalf("% x", f[:etherLen+ipv6Len+2*extLen])
		}
	}
}

// TestSynCookies: what the SYN|ACK's timestamp says of the options comes back, without timestamps there are none.
func TestSynCookies(t *testing.T) {
	for _, plain := range []bool{false, true} {
		cfg := Config{SynCookies: true, NoTimestamps: plain, ECN: true}
		w := newWorld(t, cfg, cfg, link{delay: 5 * time.Millisecond, loss: 0.02}, 1)
		w.each = func() {
			if s := w.stack[1]; s.Open() > 0 && s.live[0].state == SynReceived {
				t.Error("something is kept of a SYN")
			}
		}
		w.exchange(50_000, 50_000, time.Minute, func(a, b *stream) {
			if c := b.s.conns[b.id]; c.timestamps == plain || c.sack == plain || c.scaling == plain || c.ecn == plain || c.snd.mss != 1460 {
				t.Errorf("timestamps %v, SACK %v, scaling %v, ECN %v, MSS %d", c.timestamps, c.sack, c.scaling, c.ecn, c.snd.mss)
			}
		})
	}
}

// TestSynCookieKeys: two copies of a stack draw their keys for themselves.
func TestSynCookieKeys(t *testing.T) {
	s := New(Config{Addr: addrA}, 1)
	other := s.Clone()
	s.now, other.now = 1e9, 1e9+1000
	at := tuple{addrB, 1, 2}
	if synCookie(s, at, 5, 0, 0) == synCookie(other, at, 5, 0, 0) {
		t.Error("both make the same cookie")
	}
	if again := s.Clone(); synCookie(s, at, 5, 0, 0) != synCookie(again, at, 5, 0, 0) {
		t.Error("a copy has lost the key")
	}
}

// TestFastOpen: the first connection gets the cookie, the second one's SYN has data, which is answered at once.
func TestFastOpen(t *testing.T) {
	cfg := Config{FastOpen: true}
	for _, lossy := range []bool{false, true} {
		w := newWorld(t, cfg, cfg, link{delay: 5 * time.Millisecond}, 1)
		w.exchange(5000, 5000, time.Minute, nil)
		w.drop = func(from int, _ []byte) bool { return lossy && w.count%3 == 0 }
		a := w.stack[0].Dial(w.now, netip.AddrPortFrom(addrB, port), 0)
		ask, answer := []byte("ask"), randomBytes(w.rng, 9000)
		w.stack[0].Write(w.now, a, ask)
		var b ID
		early := false
		for accepted := false; !accepted; w.step(w.now + 1e9) {
			if b, accepted = w.stack[1].Accept(port); accepted {
				early = w.stack[1].State(b) == SynReceived
				w.stack[1].Write(w.now, b, answer)
			}
		}
		w.run(time.Minute)
		var got [10000]byte
		if n, _ := w.stack[1].Read(w.now, b, got[:]); string(got[:n]) != string(ask) {
			t.Errorf("%q was read", got[:n])
		}
		if n, _ := w.stack[0].Read(w.now, a, got[:]); string(got[:n]) != string(answer) {
			t.Errorf("%d of %d were answered", n, len(answer))
		}
		if !early && !lossy {
			t.Error("the connection was accepted after the handshake only")
		}
	}
}

// TestAccECN: marked segments are counted, and both ends know of all.
func TestAccECN(t *testing.T) {
	cfg := Config{ECN: true, AccECN: true}
	w := newWorld(t, cfg, cfg, link{delay: 5 * time.Millisecond}, 1)
	marks := 0
	w.drop = func(_ int, f []byte) bool {
		if f[15]&ecnMask == ecnECT0 && w.count%7 == 0 {
			sum := uint32(^be.Uint16(f[24:])) + 1
			f[15] |= ecnCE
			be.PutUint16(f[24:], ^uint16(sum+sum>>16))
			marks++
		}
		return false
	}
	var ends [2]*conn
	w.exchange(300_000, 300_000, time.Minute, func(a, b *stream) { ends = [2]*conn{a.s.conns[a.id], b.s.conns[b.id]} })
	counted := 0
	for i, c := range ends {
		other := ends[1-i]
		if !c.acc.on || c.acc.ce-other.acc.seen > 1 { // the last ones may not have been acknowledged
			t.Errorf("%d: AccECN %v, %d marks were counted, and %d told", i, c.acc.on, c.acc.ce-firstCE, other.acc.seen-firstCE)
		}
		counted += int(c.acc.ce - firstCE)
	}
	if counted != marks || marks == 0 {
		t.Errorf("%d of %d marks were counted", counted, marks)
	}
}
