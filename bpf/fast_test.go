// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/lockstep-ft/lockstep/compare"
)

// The fast path (R27) is held against package compare: the same schedule of segments and digest records goes
// to a compare.Primary alone, and to the programs with a Primary that hands the connection over and takes it
// back as the daemon does. The same frames have to leave, in the same order.

// leaver is one of the two: what has left of it.
type leaver interface {
	pvm(now int64, s seg)
	svm(now int64, s seg)
	client(now int64, s seg)
	tick(now int64)
	left() []string
}

// left describes a frame that leaves.
func left(s seg) string {
	return fmt.Sprintf("seq %d ack %d win %d flags %#x opts %x payload %x", s.seq, s.ack, s.win, s.flags, s.opts, s.payload)
}

// guestSide is what one guest has sent and received.
type guestSide struct {
	at  int // segments sent
	ack uint32
	win uint16
	ts  uint32
}

// The ISNs of a schedule. The PVM's numbers wrap soon.
const clientISN, scheduleISN = 5000, 0xfffffff0

// schedule plays random segments of both guests to both. It returns what happened, for a failure.
func schedule(r *rand.Rand, f flow, both []leaver) (log []string) {
	now := int64(1e9)
	ts := r.IntN(4) > 0
	odd := r.IntN(3) == 0 // things that are not the common case
	var stream []seg      // the PVM's segments
	client := uint32(clientISN)
	pos := uint32(scheduleISN + 1)
	p, s := guestSide{ack: client, win: 500, ts: 100}, guestSide{ack: client, win: 500, ts: 90}
	echo := uint32(7)
	say := func(who string, g seg, to func(leaver) func(int64, seg)) {
		now += 1000
		log = append(log, fmt.Sprintf("%s %d..%d flags %#x ack %d win %d opts %x", who, g.seq, g.end(), g.flags, g.ack, g.win, g.opts))
		for _, l := range both {
			to(l)(now, g)
		}
	}
	pvm := func(l leaver) func(int64, seg) { return l.pvm }
	svm := func(l leaver) func(int64, seg) { return l.svm }
	segOf := func(g *guestSide, seq uint32, payload []byte) seg {
		out := seg{seq: seq, ack: g.ack, win: g.win, flags: ack, payload: payload}
		if len(payload) > 0 {
			out.flags |= psh
		}
		if ts {
			g.ts++
			out.opts = timestamps(g.ts, echo)
		}
		return out
	}
	posOf := func(g *guestSide) uint32 {
		if g.at == len(stream) {
			return pos
		}
		return stream[g.at].seq
	}
	opened := seg{seq: scheduleISN, ack: client, win: 500, flags: syn | ack, opts: []byte{2, 4, 5, 180, 1, 3, 3, 7}}
	if ts { // as Linux has them
		opened.opts = slices.Concat([]byte{2, 4, 5, 180, 4, 2}, timestamps(p.ts, echo)[2:], []byte{1, 3, 3, 7})
	}
	say("pvm", opened, pvm)
	if odd && r.IntN(4) == 0 {
		say("pvm", opened, pvm)
	}
	if ts {
		opened.opts = slices.Concat(opened.opts[:6], timestamps(s.ts, echo)[2:], opened.opts[16:])
	}
	if n := r.IntN(12); odd && n == 0 {
		opened.win = 480
	} else if n == 1 {
		opened.opts = bytes.Clone(opened.opts)
		opened.opts[3]-- // another MSS: nothing leaves
	}
	say("svm", opened, svm)
	for range 60 + r.IntN(200) {
		switch n := r.IntN(20); {
		case n < 5: // the PVM sends data
			var payload []byte
			if p.at == len(stream) {
				payload = randBytes(r, 1+r.IntN(40))
				stream = append(stream, seg{seq: pos, payload: payload})
				pos += uint32(len(payload))
			}
			g := stream[p.at]
			p.at++
			say("pvm", segOf(&p, g.seq, g.payload), pvm)
		case n < 10:
			if s.at == len(stream) {
				payload := randBytes(r, 1+r.IntN(40))
				stream = append(stream, seg{seq: pos, payload: payload})
				pos += uint32(len(payload))
			}
			g := stream[s.at]
			s.at++
			if odd && s.at < len(stream) && r.IntN(10) == 0 { // two segments in one
				g.payload = append(bytes.Clone(g.payload), stream[s.at].payload...)
				s.at++
			}
			say("svm", segOf(&s, g.seq, g.payload), svm)
		case n < 13: // the client sends
			client += uint32(r.IntN(100))
			echo++
		case n < 15:
			p.ack, p.win = client, uint16(400+r.IntN(200))
			say("pvm", segOf(&p, posOf(&p), nil), pvm)
		case n < 17:
			s.ack, s.win = client, uint16(400+r.IntN(200))
			say("svm", segOf(&s, posOf(&s), nil), svm)
		case n == 17 && odd && p.at > 0: // the PVM repeats
			g := stream[p.at-1-r.IntN(min(p.at, 3))]
			say("pvm", segOf(&p, g.seq, g.payload), pvm)
		case n == 18 && odd:
			g := segOf(&s, posOf(&s), nil)
			say("svm", g, svm)
		case n == 19: // both catch up, and time passes
			for p.at < len(stream) {
				g := stream[p.at]
				p.at++
				p.ack = client
				say("pvm", segOf(&p, g.seq, g.payload), pvm)
			}
			for s.at < len(stream) {
				g := stream[s.at]
				s.at++
				s.ack = client
				say("svm", segOf(&s, g.seq, g.payload), svm)
			}
			which := r.IntN(4) // one of them may owe an ACK
			if which != 0 {
				p.ack = client
				say("pvm", segOf(&p, pos, nil), pvm)
			}
			if which != 1 {
				s.ack = client
				say("svm", segOf(&s, pos, nil), svm)
			}
			now += 5e6
			for _, l := range both {
				l.tick(now)
			}
		}
	}
	for p.at < len(stream) {
		g := stream[p.at]
		p.at++
		say("pvm", segOf(&p, g.seq, g.payload), pvm)
	}
	for s.at < len(stream) {
		g := stream[s.at]
		s.at++
		say("svm", segOf(&s, g.seq, g.payload), svm)
	}
	if r.IntN(2) == 0 { // both close, or one of them does and the other sends another byte
		closing := func() {
			say("client", seg{seq: client, ack: pos, win: 500, flags: fin | ack}, func(l leaver) func(int64, seg) { return l.client })
			client++
		}
		first := r.IntN(2) == 0 // the client closes first
		if first {
			closing()
		}
		payload := randBytes(r, r.IntN(3))
		ends := []func(){func() {
			if first && r.IntN(2) == 0 {
				p.ack = client
			}
			g := segOf(&p, pos, payload)
			g.flags |= fin
			say("pvm", g, pvm)
			if odd && r.IntN(4) == 0 {
				say("pvm", g, pvm)
			}
		}, func() {
			if first && r.IntN(2) == 0 {
				s.ack = client
			}
			g := segOf(&s, pos, payload)
			if r.IntN(4) == 0 {
				g.payload = append(bytes.Clone(payload), 0)
			} else {
				g.flags |= fin
			}
			say("svm", g, svm)
			if odd && r.IntN(4) == 0 {
				say("svm", g, svm)
			}
		}}
		i := r.IntN(2)
		ends[i]()
		ends[1-i]()
		pos += uint32(len(payload)) + 1
		if !first {
			closing()
		}
		p.ack, s.ack = client, client
		acks := []func(){func() { say("pvm", segOf(&p, pos, nil), pvm) }, func() { say("svm", segOf(&s, pos, nil), svm) }}
		acks[i]()
		acks[1-i]()
		now += 200e6
		for _, l := range both {
			l.tick(now)
		}
		if r.IntN(2) == 0 {
			g := segOf(&p, pos-1, nil)
			g.flags |= fin
			say("pvm", g, pvm)
		}
		return log
	}
	one, other := []byte("one guest says this"), []byte("the other says that")
	if r.IntN(2) == 0 {
		say("pvm", segOf(&p, pos, one), pvm)
		say("svm", segOf(&s, pos, other), svm)
	} else {
		say("svm", segOf(&s, pos, other), svm)
		say("pvm", segOf(&p, pos, one), pvm)
	}
	return log
}

func TestFastPathEquals(t *testing.T) {
	seeds := 200
	passed, taken, grants, opened := 0, 0, 0, 0
	for name, f := range flows {
		t.Run(name, func(t *testing.T) {
			k := newKit(t, func(s *ebpf.CollectionSpec) { s.Maps["ls_slots"].MaxEntries = 4096 }, variable("ls_nslots", 4096), variable("ls_fast_on", 1), variable("ls_fast_wait", 60e6))
			k.setMode(hold)
			for seed := range seeds {
				f.remote = netip.AddrPortFrom(f.remote.Addr(), uint16(20000+seed))
				a := &alone{t: t, f: f, p: compare.NewPrimary(fastConfig(false), k.digest), keys: k.digest, slots: make(map[compare.Slot][]byte)}
				g, m := newTogether(t, k, f), newSimulated(t, k, f)
				log := schedule(rand.New(rand.NewPCG(uint64(seed), 1)), f, []leaver{a, g, m})
				passed, taken, grants, opened = passed+g.kernel, taken+g.taken, grants+g.grants, opened+g.opened
				for name, out := range map[string][]string{"programs": g.out, "model": m.out} {
					i := 0
					for i < min(len(a.out), len(out)) && a.out[i] == out[i] {
						i++
					}
					if i == len(a.out) && i == len(out) {
						continue
					}
					t.Logf("%s", strings.Join(log, "\n"))
					for j := max(0, i-3); j < i+3; j++ {
						for who, of := range map[string][]string{"compare": a.out, name: out} {
							if j < len(of) {
								t.Logf("%s %d: %s", who, j, of[j])
							}
						}
					}
					t.Fatalf("seed %d, %s: frame %d of %d and %d differs", seed, name, i, len(a.out), len(out))
				}
			}
		})
	}
	t.Logf("the kernel owned a connection %d times, and %d more from its SYN|ACK on, let %d frames leave, and was relieved %d times", grants, opened, passed, taken)
	if passed < 1000 || taken < 100 || opened < 100 {
		t.Error("that is next to nothing")
	}
}
