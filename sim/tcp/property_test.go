// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

var seeds = flag.Int("seeds", 300, "how many schedules TestStreams tries")

// randomConfig is one that two stacks may meet with.
func randomConfig(r *rand.Rand) Config {
	one := func(n int) bool { return r.IntN(n) == 0 }
	c := Config{
		NoScale: one(4), NoSACK: one(4), NoTimestamps: one(4), ECN: one(2), Autocork: one(2),
		NoNagle: one(3), NoTLP: one(3), NoFRTO: one(4),
		RcvBuf: 2000 << r.IntN(8), SndBuf: 2000 << r.IntN(8), MSS: []int{0, 0, 536, 1000, 90}[r.IntN(5)],
	}
	if one(3) {
		c.WindowScale = uint8(r.IntN(15))
	}
	c.AccECN = one(2)
	if one(4) {
		c.SeqWrap, c.TSWrap = 1+r.Uint32N(50000), 1+r.Uint32N(2000)
	}
	return c
}

func randomLink(r *rand.Rand) link {
	l := link{delay: time.Duration(r.Int64N(int64(30 * time.Millisecond)))}
	if r.IntN(2) == 0 {
		l.loss = r.Float64() * 0.1
	}
	if r.IntN(2) == 0 {
		l.double = r.Float64() * 0.1
	}
	if r.IntN(2) == 0 {
		l.jitter = time.Duration(1 + r.Int64N(int64(30*time.Millisecond)))
	}
	return l
}

// Whatever the link does, streams arrive whole and in order, and both ends close.
func TestStreams(t *testing.T) {
	for seed := range uint64(*seeds) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 2))
			a, b := randomConfig(r), randomConfig(r)
			if r.IntN(4) == 0 {
				a.Addr, b.Addr = addrA6, addrB6
			}
			w := newWorld(t, a, b, randomLink(r), seed)
			w.exchange(r.IntN(60000), r.IntN(60000), 30*time.Minute, func(a, b *stream) {
				w.each = func() {
					for _, s := range w.stack {
						checkStack(t, s)
					}
				}
				if r.IntN(3) == 0 { // a reader that is away now and then
					a.lazy = func(now int64) bool { return now/1e9%3 != 0 }
					b.lazy = func(now int64) bool { return now/1e9%4 == 0 }
				}
			})
		})
	}
}

func TestTransfer(t *testing.T) {
	w := newWorld(t, Config{}, Config{}, link{delay: time.Millisecond}, 1)
	w.exchange(1<<20, 1<<20, time.Minute, nil)
}

// checkStack checks what has to hold at any time.
func checkStack(t *testing.T, s *Stack) {
	due := int64(never)
	for _, c := range s.live {
		checkSender(t, c)
		checkReceiver(t, c)
		due = min(due, c.deadline())
	}
	if s.NextDeadline() != due {
		t.Fatalf("the deadline is %d, want %d", s.NextDeadline(), due)
	}
}

func checkSender(t *testing.T, c *conn) {
	s := &c.snd
	if after(s.una, s.nxt) || s.inFlight() < 0 || s.cwnd < 1 || s.ssthresh < 2 {
		t.Fatalf("una %d, nxt %d, %d in flight, cwnd %d, ssthresh %d", s.una, s.nxt, s.inFlight(), s.cwnd, s.ssthresh)
	}
	if c.state < Established || c.state == TimeWait {
		return
	}
	sacked, lost, retrans := 0, 0, 0
	at := s.una
	for i := range s.segs[s.first:] {
		g := &s.segs[s.first+i]
		if g.from != at || !after(g.to, g.from) {
			t.Fatalf("a segment is %d:%d behind %d", g.from, g.to, at)
		}
		at = g.to
		sacked += int(g.marks & segSacked)
		lost += int(g.marks & segLost / segLost)
		retrans += int(g.marks & segRetrans / segRetrans)
		if g.is(segSacked) && g.is(segLost|segRetrans) {
			t.Fatalf("marks %x", g.marks)
		}
	}
	if s.reno() {
		sacked = s.sacked
	}
	if at != s.nxt || sacked != s.sacked || lost != s.lost || retrans != s.retrans {
		t.Fatalf("the queue ends at %d, nxt %d; %d %d %d counted, %d %d %d kept", at, s.nxt, sacked, lost, retrans, s.sacked, s.lost, s.retrans)
	}
	// Somebody has to come back to what is not acknowledged or not sent.
	if (s.packets() > 0 || s.pending()) && c.timers.kind == timerNone && !c.corked {
		t.Fatalf("%v: %d segments are in flight, %d bytes wait, and no timer runs", c.state, s.packets(), s.left())
	}
}

func checkReceiver(t *testing.T, c *conn) {
	r := &c.rcv
	if n := r.unread(); n > 3*r.room+c.s.cfg.MSS+1<<r.scale {
		t.Fatalf("the buffer of %d holds %d bytes", r.room, n)
	}
	at := r.nxt
	for i, b := range r.ooo {
		if !after(b.from, at) || int(b.to-b.from) != len(b.data) || i > 0 && b.from == at {
			t.Fatalf("block %d:%d with %d bytes, after %d", b.from, b.to, len(b.data), at)
		}
		at = b.to
	}
	if r.ackPending && c.timers.delayed == never && c.state >= Established && c.state < TimeWait {
		t.Fatal("an ACK is due, and no timer runs")
	}
}
