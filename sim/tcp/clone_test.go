// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// record runs one schedule and returns all frames. With clones, stacks are replaced by their clones
// again and again, and what was cloned is ruined.
func record(t *testing.T, seed uint64, clones bool) [][]byte {
	r := rand.New(rand.NewPCG(seed, 3))
	w := newWorld(t, randomConfig(r), randomConfig(r), randomLink(r), seed)
	w.keep = true
	w.exchange(r.IntN(30000), r.IntN(30000), time.Hour, func(a, b *stream) {
		n := 0
		w.each = func() {
			if n++; !clones || n%7 != 0 {
				return
			}
			for i, app := range []*stream{a, b} {
				old := w.stack[i]
				w.stack[i] = old.Clone()
				app.s = w.stack[i]
				ruin(old, w.now)
			}
		}
	})
	return w.sent
}

// ruin changes all that a stack has.
func ruin(s *Stack, now int64) {
	for id := range ID(len(s.conns)) {
		for _, b := range [][]byte{s.conns[id].snd.buf, s.conns[id].rcv.buf} {
			for i := range b[:cap(b)] {
				b[:cap(b)][i] ^= 0xff
			}
		}
		for _, b := range s.conns[id].rcv.ooo {
			for i := range b.data {
				b.data[i] ^= 0xff
			}
		}
		for i := range s.conns[id].snd.segs {
			s.conns[id].snd.segs[i] = seg{}
		}
		s.Write(now, id, make([]byte, 100))
		s.Abort(now, id)
	}
	s.Dial(now, netip.AddrPortFrom(addrB, 1), 0)
	s.Listen(9)
	s.Tick(math.MaxInt64 - 1)
	s.Take()
}

// The same seed gives the same frames, and so does a clone. A clone shares nothing with what it was made of.
func TestDeterminism(t *testing.T) {
	for seed := range uint64(100) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			first := record(t, seed, false)
			for _, clones := range []bool{false, true} {
				again := record(t, seed, clones)
				if !slices.EqualFunc(first, again, bytes.Equal) {
					t.Errorf("other frames, %d instead of %d; clones %v", len(again), len(first), clones)
				}
			}
		})
	}
	if slices.EqualFunc(record(t, 1, false), record(t, 2, false), bytes.Equal) {
		t.Error("another seed gives the same frames")
	}
}

// Frames that wait for Take belong to the clone, too: a checkpoint does not lose them.
func TestCloneKeepsFrames(t *testing.T) {
	w := newWorld(t, Config{}, Config{}, link{}, 1)
	id, _ := w.open()
	w.flush()
	w.stack[0].Write(w.now, id, []byte("to be sent"))
	w.stack[0].SendUDP(w.now, 5, netip.AddrPortFrom(addrB, 6), []byte("a datagram"))
	clone := w.stack[0].Clone()
	a, b := w.stack[0].Take(), clone.Take()
	if len(a) != 2 || !slices.EqualFunc(a, b, bytes.Equal) {
		t.Errorf("%x, and the clone %x", a, b)
	}
}
