// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"encoding/binary"
	"slices"
	"testing"
	"time"
)

// newOpened is a Primary that has heard of a connection that the kernel owns from the PVM's SYN|ACK on.
func newOpened(t *testing.T) *handed {
	t.Helper()
	h := &handed{p: NewPrimary(Config{FastPath: true}, testKeys(1)), now: 1}
	h.event(EvClient, SYN, 500, 0)
	h.event(EvOpened, SYN|ACK, 1000, 501)
	if !h.p.Owners().Kernel(&handedTuple) {
		t.Fatal("the kernel does not own it")
	}
	return h
}

func (h *handed) event(kind EventKind, flags Flags, seq, ack uint32) []Effect {
	h.now += int64(time.Millisecond)
	s := Segment{Tuple: handedTuple, Seq: seq, Ack: ack, Win: 1000, Flags: flags, Slot: NoSlot, Inc: 1000, At: h.now}
	if flags&SYN != 0 {
		s.Opts = []byte{1, 3, 3, 7}
	}
	if kind == EvPVM || kind == EvOpened {
		s.Header = make([]byte, 34)
	}
	if kind == EvPVM && flags&(SYN|FIN) != 0 {
		s.Slot = 1
	}
	return h.p.Step(h.now, &Event{Kind: kind, Seg: s}, nil)
}

func (h *handed) taken(k *Handover) []Effect {
	return h.p.Step(h.now, &Event{Kind: EvTaken, Seg: Segment{Tuple: handedTuple, Slot: NoSlot}, Handover: k}, nil)
}

func (h *handed) flow(t *testing.T) Flow {
	t.Helper()
	w := h.p.WalkFlows()
	fs, _ := w.Next(h.p, 2, nil)
	if len(fs) != 1 {
		t.Fatalf("knows %+v", fs)
	}
	return fs[0]
}

func has(es []Effect, op Op) bool {
	return slices.ContainsFunc(es, func(e Effect) bool { return e.Op == op })
}

// R27: a SYN|ACK that waits in the kernel comes back, and is compared here.
func TestOpenedWaits(t *testing.T) {
	h := newOpened(t)
	h.taken(&Handover{Inc: 1000, Released: 1000, SYN: true, Waiting: 1})
	if has(h.event(EvPVM, SYN|ACK, 1000, 501), OpSend) {
		t.Error("the SYN|ACK leaves without the SVM's")
	}
	if !has(h.event(EvSVM, SYN|ACK, 1000, 501), OpSend) {
		t.Error("the SYN|ACK does not leave")
	}
}

// R27: the core goes on from where the kernel was, also if it has seen no segment but the SYN|ACK: with a FIN it knows the
// end, and makes ACKs of what the kernel knows.
func TestOpenedTaken(t *testing.T) {
	acked := Acked{Ack: 601, Edge: 2000}
	more := acked
	more.Ack = 701
	for name, c := range map[string]struct {
		k     Handover
		state string
		half  int
	}{
		"nothing but the SYN|ACK": {Handover{Inc: 1000, Released: 1001, PVM: acked, SVM: acked, Sent: acked, Frames: 1, Records: 1}, "syn", 1},
		"data":                    {Handover{Inc: 1000, Released: 1101, PVM: more, SVM: acked, Sent: acked, Frames: 2, Bytes: 100, Records: 2}, "established", 0},
		"both FINs":               {Handover{Inc: 1000, Released: 1102, PVM: more, SVM: acked, Sent: acked, Frames: 3, Bytes: 100, Records: 3, FIN: true}, "closing", 0},
	} {
		t.Run(name, func(t *testing.T) {
			h := newOpened(t)
			es := h.taken(&c.k)
			if f := h.flow(t); f.State != c.state || f.Released != c.k.Released || f.Compared != c.k.Released || h.p.conns.half.n != c.half {
				t.Errorf("%+v, and %d are half-open", f, h.p.conns.half.n)
			}
			if has(es, OpForget) != (c.state != "established") {
				t.Errorf("%+v", es)
			}
			if c.state == "syn" {
				return
			}
			es = h.event(EvSVM, ACK, c.k.Released, 701)
			if i := slices.IndexFunc(es, func(e Effect) bool { return e.Op == OpSend }); i < 0 || es[i].Ack != 701 || es[i].HdrLen != 34 || es[i].Seq != c.k.Released {
				t.Errorf("an ACK of both guests leaves as %+v", es)
			}
		})
	}
}

// The remote's FIN takes no connection from the kernel, but has it looked at soon.
func TestRemoteClosed(t *testing.T) {
	h := newOpened(t)
	fin := Event{Kind: EvClient, Seg: Segment{Tuple: handedTuple, Seq: 600, Flags: FIN | ACK}}
	reset := fin
	reset.Seg.Flags = RST
	if h.p.Owners().Holds(&fin) || !h.p.Owners().Holds(&reset) {
		t.Error("a FIN takes it from the kernel, or a RST does not")
	}
	h.event(EvClient, FIN|ACK, 600, 1001)
	if at := h.p.NextDeadline(); at > h.now+int64(2*closedFor) {
		t.Errorf("looked at after %v", time.Duration(at-h.now))
	}
	acked := Acked{Ack: 601, Edge: 2000}
	h.taken(&Handover{Inc: 1000, Released: 1002, PVM: acked, SVM: acked, Sent: acked, Frames: 2, Records: 2, FIN: true, HasPure: true, Pure: 601})
	if f := h.flow(t); f.State != "closed" {
		t.Errorf("%+v", f)
	}
}

// R11: what the kernel owns from its SYN|ACK on counts as half-open, and the oldest is asked for.
func TestOpenedFlood(t *testing.T) {
	const most = 4
	p := NewPrimary(Config{FastPath: true, MaxHalfOpen: most}, testKeys(1))
	tuples := 0
	for i := range uint16(20) {
		s := Segment{Tuple: handedTuple, Seq: 1000, Ack: 501, Flags: SYN | ACK, Slot: NoSlot, Header: make([]byte, 34), Opts: []byte{1, 3, 3, 7}}
		s.Tuple.RemotePort = 30000 + i
		binary.BigEndian.PutUint16(s.Tuple.Remote[14:], i)
		es := p.Step(int64(i), &Event{Kind: EvOpened, Seg: s}, nil)
		for n := 0; n < len(es); n++ {
			if es[n].Op == OpTake {
				tuples++
				es = p.Step(int64(i), &Event{Kind: EvTaken, Seg: Segment{Tuple: es[n].Tuple, Slot: NoSlot}, Handover: &Handover{Inc: 1000, Released: 1001}}, es)
			}
		}
		if got := p.Stats().Connections; got > most {
			t.Fatalf("%d connections", got)
		}
	}
	if tuples == 0 {
		t.Error("none was asked for")
	}
}
