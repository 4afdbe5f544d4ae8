// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"encoding/binary"
	"slices"
	"testing"
	"time"
)

// fuzzInput turns bytes into events; an input that is used up gives zeroes.
type fuzzInput struct{ b []byte }

func (f *fuzzInput) byte() byte {
	if len(f.b) == 0 {
		return 0
	}
	c := f.b[0]
	f.b = f.b[1:]
	return c
}

// pos is near the start of a stream, or anywhere.
func (f *fuzzInput) pos() uint32 {
	c := f.byte()
	if c == 255 {
		return uint32(f.byte())<<24 | uint32(f.byte())<<8
	}
	return 1000 + uint32(c)
}

func (f *fuzzInput) event(keys *Keys) Event {
	kinds := []EventKind{EvPVM, EvPVM, EvPVM, EvSVM, EvSVM, EvSVM, EvAnswer, EvClient, EvTick, EvFreeze, EvThaw, EvCommit,
		EvCopy, EvAsk, EvPark, EvMark, EvUnpark, EvReset, EvNeigh, EvAdopt, 0, 99, EvUnsure}
	k := f.byte()
	ev := Event{Kind: kinds[int(k)%len(kinds)], Epoch: uint32(f.byte() % 4)}
	switch k { // what ends a role is rare
	case 77:
		ev.Kind = EvSolo
	case 78:
		ev.Kind = EvTakeOver
	}
	s := &ev.Seg
	s.GuestPort = uint16(f.byte() % 3)
	s.Seq, s.Ack = f.pos(), f.pos()
	s.Flags = Flags(f.byte())
	if k&128 != 0 {
		s.Flags = ACK
	}
	s.Slot, s.Win, s.GSO = NoSlot, uint16(f.byte()), uint16(f.byte())
	s.Large = k&64 != 0
	s.Payload = make([]byte, f.byte()%64)
	s.Len = uint32(len(s.Payload))
	if c := f.byte(); c > 240 {
		s.Len = uint32(c-240) << 28 // a lie
	}
	s.Sum = keys.Sum(s.PayloadStart(), s.Payload)
	for n := f.byte() % 12; n > 0; n-- {
		s.Opts = append(s.Opts, f.byte())
	}
	if f.byte()%4 == 0 {
		s.Opts = append(s.Opts, 1, 1, 8, 10, 0, 0, 0, f.byte(), 0, 0, 0, 0, 5, 10, 0, 0, 3, f.byte(), 0, 0, 3, f.byte())
	}
	for n := f.byte() % 3; n > 0; n-- {
		s.Bounds = append(s.Bounds, Bound{f.pos(), Sum{uint64(f.byte())}})
	}
	s.Inc, s.Inherited, s.Epoch = f.pos(), f.byte()%2 == 0, uint32(f.byte()%4)
	s.ClientAck = f.pos()
	if f.byte()%3 == 0 {
		s.Datagram, s.Frag, s.Proto = true, uint16(f.byte()%2), []uint8{1, 17, 58}[f.byte()%3]
	}
	if f.byte()%8 != 0 {
		s.Header = make([]byte, f.byte()%100)
	}
	return ev
}

// FuzzStep: no event makes Step panic or break what always has to hold, the bounds are kept,
// and every slot given in is freed exactly once, in the end at the latest.
func FuzzStep(f *testing.F) {
	for seed := range byte(20) {
		b := make([]byte, 4000)
		x := uint32(seed) + 1
		for i := range b {
			x = x*1664525 + 1013904223
			b[i] = byte(x >> 24)
		}
		f.Add(slices.Clone(b))
		// The same, but mostly plain ACK segments of one connection.
		for i := 0; i+25 < len(b); i += 25 {
			b[i] |= 128
			binary.LittleEndian.PutUint16(b[i+2:], 0)
		}
		f.Add(b)
	}
	keys := testKeys(9)
	f.Fuzz(func(t *testing.T, b []byte) {
		in := fuzzInput{b}
		p := NewPrimary(Config{
			MaxConnections: 2, ConnPoints: 6, MaxNext: 3,
			MaxHalfOpen: int(in.byte() % 4), MaxFlows: 3, MaxDatagrams: 5, FlowDatagrams: 3, MaxUnmatched: 4, Slots: 16, LargeSlots: 4, MaxPoints: 9,
		}, keys)
		s := NewSecondary(SecondaryConfig{MaxCopies: 3, MaxLarge: 2}, keys)
		slots := map[Slot]bool{}
		now := int64(time.Second)
		var next Slot
		step := func(ev Event) {
			switch ev.Kind {
			case EvPVM, EvCopy, EvPark:
				if in.byte()%8 != 0 {
					next++
					ev.Seg.Slot, ev.Seg.At = next, now
					slots[next] = true
				}
			}
			var effs []Effect
			switch ev.Kind {
			case EvCopy, EvAsk, EvPark, EvMark, EvUnpark, EvUnsure, EvReset, EvTakeOver:
				effs = s.Step(now, &ev, nil)
			default:
				effs = p.Step(now, &ev, nil)
			}
			for _, e := range effs {
				if e.Slot == NoSlot {
					continue
				}
				if !slots[e.Slot] {
					t.Fatalf("effect %d on slot %d, which is not held", e.Op, e.Slot)
				}
				if e.Free || e.Op == OpFree {
					delete(slots, e.Slot)
				}
			}
			ps, ss := p.Stats(), s.Stats()
			if ps.Connections > p.cfg.MaxConnections || ps.Flows > p.cfg.MaxFlows || len(p.next) > p.cfg.MaxNext || p.points.used > p.cfg.MaxPoints || ss.Copies > s.cfg.MaxCopies || s.large > s.cfg.MaxLarge {
				t.Fatalf("beyond the bounds: %+v, %d points, %d records to come, %+v", ps, p.points.used, len(p.next), ss)
			}
			if ev.Kind == EvTick && p.NextDeadline() <= now {
				t.Fatalf("deadline %d is not after %d", p.NextDeadline(), now)
			}
		}
		for len(in.b) > 0 {
			ev := in.event(keys)
			ev.At = now - int64(in.byte())*1e6
			step(ev)
			now += int64(in.byte()) * 1e5
		}
		if fs, st := p.Flows(), p.Stats(); len(fs) != st.Connections+st.Flows {
			t.Fatalf("%d flows, %+v", len(fs), st)
		}
		for _, k := range []EventKind{EvThaw, EvTick, EvSolo, EvReset, EvUnpark, EvTakeOver} {
			step(Event{Kind: k})
		}
		if st := p.Stats(); len(slots) > 0 || st.HeldPackets != 0 || st.HeldBytes != 0 || p.points.used != 0 || len(p.opens) != 0 || st.Flows != 0 || p.datagrams.held != 0 || p.datagrams.svm != 0 || len(p.timers) != 0 || p.conns.half != (list[*conn]{}) {
			t.Fatalf("left over: slots %v, %d points, %d opens, %+v", slots, p.points.used, len(p.opens), st)
		}
	})
}
