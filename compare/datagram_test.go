// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// what is transmitted: a datagram of a flow.
type what struct {
	tuple Tuple
	key   dgramKey
}

// dgramWorld is two guests that transmit datagrams of a few flows, each in its own
// order. What leaves is checked against what both have transmitted so far.
type dgramWorld struct {
	t       *rapid.T
	p       *Primary
	now     int64
	slot    Slot
	held    map[Slot]Segment
	order   map[Tuple][]Slot // not released yet, as captured
	svmSent map[what]int     // by the SVM, more than has left
	ready   bool             // a commit: the SVM is a copy
	left    int
	reasons []Reason
}

func (w *dgramWorld) step(ev Event) {
	for _, e := range w.p.Step(w.now, &ev, nil) {
		switch e.Op {
		case OpCheckpoint:
			w.reasons = append(w.reasons, e.Reason)
		case OpForward:
			s, ok := w.held[e.Slot]
			if !ok || !e.Free || e.Tuple != s.Tuple {
				w.t.Fatalf("forward of %+v, which is not held (%v)", e, ok)
			}
			delete(w.held, e.Slot)
			if o := w.order[s.Tuple]; o[0] != e.Slot {
				w.t.Fatalf("slot %d left before slot %d", e.Slot, o[0])
			}
			w.order[s.Tuple] = w.order[s.Tuple][1:]
			w.left++
			k := what{s.Tuple, s.key()}
			if w.svmSent[k]--; w.svmSent[k] < 0 && !w.ready {
				w.t.Fatalf("slot %d left although the SVM has not transmitted it", e.Slot)
			}
		case OpFree:
			w.t.Fatalf("slot %d dropped: %v", e.Slot, e.Reason)
		}
	}
	if d := w.p.NextDeadline(); ev.Kind == EvTick && d <= w.now {
		w.t.Fatalf("after a tick the next deadline is %d, %d ago", d, w.now-d)
	}
}

func (w *dgramWorld) pvm(s Segment) {
	w.slot++
	s.Slot, s.At = w.slot, w.now
	w.held[s.Slot] = s
	w.order[s.Tuple] = append(w.order[s.Tuple], s.Slot)
	w.step(Event{Kind: EvPVM, Seg: s})
}

func (w *dgramWorld) svm(s Segment) {
	w.svmSent[what{s.Tuple, s.key()}]++
	w.step(Event{Kind: EvSVM, Seg: s})
}

// TestDatagrams: whatever way the guests' datagrams are mixed, one leaves only when
// the SVM has transmitted as many equal ones, and in the PVM's order. When it transmitted all,
// all leave and nobody asks for a checkpoint; else one is asked for, and with its
// commit the rest leaves.
func TestDatagrams(t *testing.T) {
	keys := testKeys(7)
	rapid.Check(t, func(t *rapid.T) {
		w := &dgramWorld{
			t: t, p: NewPrimary(Config{}, keys), now: 1e9,
			held: map[Slot]Segment{}, order: map[Tuple][]Slot{}, svmSent: map[what]int{},
		}
		gen := rapid.Custom(func(t *rapid.T) Segment {
			b := []byte{byte(rapid.IntRange(0, 3).Draw(t, "content"))}
			return Segment{
				Tuple:    Tuple{Proto: 17, GuestPort: uint16(rapid.IntRange(0, 2).Draw(t, "flow"))},
				Datagram: true, Len: 1, Payload: b, Sum: keys.Sum(0, b), Slot: NoSlot,
			}
		})
		pvm := rapid.SliceOfN(gen, 0, 40).Draw(t, "pvm")
		svm := rapid.Permutation(pvm).Draw(t, "svm")
		lost := rapid.IntRange(0, min(2, len(svm))).Draw(t, "lost")
		svm = append(svm[lost:len(svm):len(svm)], rapid.SliceOfN(gen, 0, 3).Draw(t, "more than the PVM")...)
		total := len(pvm)
		missing, differ := map[what]int{}, false
		for _, s := range pvm {
			missing[what{s.Tuple, s.key()}]++
		}
		for _, s := range svm {
			missing[what{s.Tuple, s.key()}]--
		}
		for _, n := range missing {
			differ = differ || n > 0
		}
		frozen := false
		for len(pvm)+len(svm) > 0 {
			w.now += int64(rapid.IntRange(0, 1e6).Draw(t, "ns"))
			switch n := rapid.IntRange(0, 9).Draw(t, "who"); {
			case n == 0:
				frozen = !frozen
				w.step(Event{Kind: map[bool]EventKind{true: EvFreeze, false: EvThaw}[frozen]})
			case n == 1:
				w.step(Event{Kind: EvTick})
			case n < 6 && len(pvm) > 0 || len(svm) == 0:
				w.pvm(pvm[0])
				pvm = pvm[1:]
			default:
				w.svm(svm[0])
				svm = svm[1:]
			}
		}
		w.step(Event{Kind: EvThaw})
		if !differ && w.left != total || len(w.reasons) > 0 {
			t.Fatalf("%d of %d left, %v", w.left, total, w.reasons)
		}
		w.now += int64(time.Second)
		w.step(Event{Kind: EvTick})
		if asked := slices.Contains(w.reasons, ReasonDatagram); asked != differ {
			t.Fatalf("differ %v, asked for %v", differ, w.reasons)
		}
		w.ready = true
		w.step(Event{Kind: EvFreeze})
		w.step(Event{Kind: EvCommit, Epoch: 1, At: w.now + 1})
		if st := w.p.Stats(); w.left != total || len(w.held) > 0 || st.HeldPackets != 0 || st.Flows != 0 || w.p.datagrams.svm != 0 {
			t.Fatalf("%d of %d left, %d held, %+v", w.left, total, len(w.held), st)
		}
	})
}

// TestDatagramsAllocateNothing: in both orders, one at a time and out of order.
func TestDatagramsAllocateNothing(t *testing.T) {
	for name, lines := range map[string][]string{
		"pvm first":    {"pvm udp 0..1400", "svm udp 0..1400"},
		"svm first":    {"svm udp 0..1400", "pvm udp 0..1400"},
		"out of order": {"pvm udp 0..9 id=1", "pvm udp 0..9 id=2", "pvm udp 0..9 id=3", "svm udp 0..9 id=3", "svm udp 0..9 id=1", "svm udp 0..9 id=2"},
	} {
		x := newTranscript(t, 0)
		var evs []Event
		for _, l := range lines {
			ev := x.parse(l)
			ev.Seg.Slot = Slot(len(evs))
			evs = append(evs, ev)
		}
		out := make([]Effect, 0, 8)
		n := testing.AllocsPerRun(1000, func() {
			out = out[:0]
			for i := range evs {
				x.now += 1000
				out = x.p.Step(x.now, &evs[i], out)
			}
			if 2*len(out) != len(evs) || out[0].Op != OpForward {
				t.Fatalf("%s: %+v", name, out)
			}
		})
		if n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}
