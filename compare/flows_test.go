// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"
)

// manyConnections is a primary that has met n connections.
func manyConnections(n int) *Primary {
	p := NewPrimary(Config{MaxConnections: n}, new(Keys))
	p.asserts = false // they would look at all of them for each
	for i := range n {
		t := Tuple{GuestPort: 80, RemotePort: uint16(i), Proto: 6}
		binary.BigEndian.PutUint32(t.Remote[12:], uint32(i))
		p.Step(int64(i), &Event{Kind: EvAdopt, Seg: Segment{Tuple: t, Seq: 1, Slot: NoSlot}}, nil)
	}
	return p
}

// Whoever shows flows has them in the order in which they were made, connections first.
func TestSortFlows(t *testing.T) {
	const n = 1000
	fs := manyConnections(n).Flows()
	if len(fs) != n {
		t.Fatalf("%d flows of %d", len(fs), n)
	}
	fs = append(fs, Flow{State: stateDatagram, no: 2}, Flow{State: stateDatagram, no: 1})
	r := rand.New(rand.NewPCG(1, 2))
	r.Shuffle(len(fs), func(i, j int) { fs[i], fs[j] = fs[j], fs[i] })
	SortFlows(fs)
	for i, f := range fs[:n] {
		if f.Tuple.RemotePort != uint16(i) {
			t.Fatalf("flow %d is connection %d", i, f.Tuple.RemotePort)
		}
	}
	if !slices.EqualFunc(fs[n:], []uint64{1, 2}, func(f Flow, no uint64) bool { return f.no == no }) {
		t.Errorf("datagrams last: %+v", fs[n:])
	}
}

// A walk goes on while connections end and others take their place: what is there all
// the time comes once, and nothing comes twice.
func TestWalkFlows(t *testing.T) {
	const n = 1000
	p := manyConnections(n)
	w := p.WalkFlows()
	fs, more := w.Next(p, n/2, nil)
	if len(fs) != n/2 || !more {
		t.Fatalf("%d flows, more %v", len(fs), more)
	}
	ended := make(map[Tuple]bool)
	for i, c := range p.conns.all() {
		if i%3 == 0 {
			ended[c.tuple] = true
			p.conns.remove(c, ReasonVoid)
		}
	}
	for i := range n / 10 { // in the place of some
		p.Step(n, &Event{Kind: EvAdopt, Seg: Segment{Tuple: Tuple{RemotePort: uint16(i), Proto: 6}, Seq: 1, Slot: NoSlot}}, nil)
	}
	fs, more = w.Next(p, n, fs)
	if more {
		t.Error("more than there were")
	}
	seen := make(map[Tuple]int)
	for _, f := range fs {
		seen[f.Tuple]++
	}
	for _, c := range p.conns.all() {
		if c.tuple.GuestPort == 80 && seen[c.tuple] != 1 {
			t.Errorf("connection %v came %d times", c.tuple, seen[c.tuple])
		}
	}
	for tuple, times := range seen {
		if times != 1 {
			t.Errorf("connection %v (ended %v) came %d times", tuple, ended[tuple], times)
		}
	}
}

// What `flows` costs where frames are released, and what it costs elsewhere.
func BenchmarkFlows(b *testing.B) {
	p := manyConnections(100_000)
	b.Run("begin", func(b *testing.B) {
		for b.Loop() {
			p.WalkFlows()
		}
	})
	b.Run("next 1000", func(b *testing.B) {
		all := p.WalkFlows()
		for fs := make([]Flow, 0, 1000); b.Loop(); {
			w := all
			w.Next(p, 1000, fs)
		}
	})
	fs := p.Flows()
	b.Run("sort", func(b *testing.B) {
		for b.Loop() {
			SortFlows(slices.Clone(fs))
		}
	})
}
