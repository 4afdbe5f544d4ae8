// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"encoding/binary"
	"testing"
	"time"
)

// handed plays segments to a Primary, and counts the offers that it makes of their connection.
type handed struct {
	p      *Primary
	now    int64
	offers int
}

var handedTuple = Tuple{GuestPort: 80, RemotePort: 20000, Proto: 6}

func (h *handed) step(kind EventKind, flags Flags, ack uint32, sacks ...block) {
	h.now += int64(2 * time.Millisecond)
	s := Segment{Tuple: handedTuple, Seq: 1001, Ack: ack, Win: 1000, Flags: flags, Slot: NoSlot, Inc: 1000, At: h.now}
	if flags&SYN != 0 {
		s.Seq, s.Opts = 1000, []byte{3, 3, 0, 1}
	}
	if kind == EvPVM {
		s.Inc, s.Header = 0, make([]byte, 34)
		if flags&SYN != 0 {
			s.Slot = 1
		}
	}
	if len(sacks) > 0 {
		s.Opts = []byte{1, 1, 5, byte(2 + 8*len(sacks))}
		for _, b := range sacks {
			s.Opts = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(s.Opts, b.left), b.right)
		}
	}
	for _, e := range h.p.Step(h.now, &Event{Kind: kind, Seg: s}, nil) {
		if e.Op == OpGrant {
			h.offers++
		}
	}
}

// offered reports what was offered since the last time, and refuses it.
func (h *handed) offered() (Handover, bool) {
	n := h.offers
	h.offers = 0
	if n == 0 {
		return Handover{}, false
	}
	out, ok := h.p.Owners().Offer(&handedTuple)
	h.p.Step(h.now, &Event{Kind: EvGranted, Seg: Segment{Tuple: handedTuple, Slot: NoSlot}}, nil)
	return out, ok
}

func newHanded() *handed {
	h := &handed{p: NewPrimary(Config{FastPath: true, OfferAfter: time.Millisecond}, testKeys(1)), now: 1}
	h.step(EvClient, SYN, 0)
	h.step(EvPVM, SYN|ACK, 501)
	h.step(EvSVM, SYN|ACK, 501)
	h.step(EvPVM, ACK, 501)
	h.step(EvSVM, ACK, 501)
	h.step(EvPVM, ACK, 601)
	return h
}

// R27: ACKs that one guest owes the other keep no connection from the kernel, which gets one that it can
// acknowledge in.
func TestOfferedUneven(t *testing.T) {
	h := newHanded()
	got, ok := h.offered()
	if !ok {
		t.Fatal("not offered")
	}
	if got.PVM.Ack != 601 || got.SVM.Ack != 501 || !got.HasPure || got.Pure != 601 || got.ACK.HdrLen != 34 || got.ACK.Flags != ACK {
		t.Errorf("offered with %+v", got)
	}
}

// R27: what a guest held out of order keeps a connection from the kernel no longer than it is missing something.
func TestOfferedAfterLoss(t *testing.T) {
	h := newHanded()
	h.offered()
	h.step(EvPVM, ACK, 601, block{701, 801})
	h.step(EvSVM, ACK, 601, block{701, 801})
	if _, ok := h.offered(); ok {
		t.Error("offered, though both guests miss something")
	}
	h.step(EvPVM, ACK, 801)
	h.step(EvSVM, ACK, 801)
	if _, ok := h.offered(); !ok {
		t.Error("not offered, though nothing is missing")
	}
}

// A connection that is busy all the time is offered again soon after each offer that came to nothing because an
// event was on its way.
func TestOfferedAgain(t *testing.T) {
	h := newHanded()
	for i := range uint32(20) {
		if _, ok := h.offered(); !ok {
			t.Fatalf("not offered after %d refusals", i)
		}
		h.step(EvSVM, ACK, 601+i)
		h.step(EvPVM, ACK, 602+i)
	}
}
