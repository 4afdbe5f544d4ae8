// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"bytes"
	"slices"
	"testing"
)

// One request of the client and the guests' answers, through both hosts and their cores.
func BenchmarkRequest(b *testing.B) {
	r := newRig(b)
	r.open()
	b.ReportAllocs()
	for b.Loop() {
		r.now += rigMS
		r.send("request")
	}
	if len(r.client.got) < len("request") {
		b.Fatal("nothing came")
	}
}

// Frames through one NIC alone.
func BenchmarkFrames(b *testing.B) {
	r := newRig(b)
	r.open()
	pay := bytes.Repeat([]byte{7}, 1400)
	fromPVM := r.p.guest.segment(ack, r.p.guest.next, pay)
	fromSVM := r.s.guest.segment(ack, r.s.guest.next, pay)
	fromClient := r.client.segment(ack, r.client.next, pay)
	var record []byte
	r.p.n.m.host.ToGuest, r.s.n.m.host.ToGuest = func([]byte) {}, func([]byte) {}
	r.p.n.m.host.ToPeer, r.s.n.m.host.ToPeer = func([]byte) {}, func(b []byte) { record = b }
	r.s.n.FromGuest(slices.Clone(fromSVM), 0)
	for _, c := range []struct {
		name string
		s    *side
		f    func()
	}{
		{"hold", r.p, func() { r.p.n.FromGuest(slices.Clone(fromPVM), 0) }},
		{"mirror", r.p, func() { r.p.n.FromWire(slices.Clone(fromClient)) }},
		{"record in", r.p, func() { clear(r.p.n.m.windows); r.p.n.FromPeer(record) }},
		{"record out", r.s, func() { r.s.n.FromGuest(slices.Clone(fromSVM), 0) }},
		{"deliver", r.s, func() { r.s.n.FromPeer(slices.Clone(fromClient)) }},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				c.f()
				for {
					e := c.s.n.m.ring.next()
					if e == nil {
						break
					}
					if ev := e.frame(); ev.Type != 2 && ev.Slot != 0xffffffff {
						freeSlot(c.s.n.m.slots, ev.Slot)
					}
				}
			}
		})
	}
}
