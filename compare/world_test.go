// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"pgregory.net/rapid"
)

// world is two guests with one connection, a lossy link between P and S, and a
// remote that checks all that reaches it. Offsets count from the first byte of
// the stream, so that position = isn + 1 + offset.
type world struct {
	t    *rapid.T
	keys *Keys
	p    *Primary
	s    *Secondary
	now  int64
	dice *rand.Rand

	cfg     Config
	isn     uint32 // of the PVM
	cliISN  uint32
	dials   uint32
	scale   uint8
	pvm     guest
	svm     guest
	late    []Event // records on their way
	tup     Tuple
	slots   map[Slot]*Segment // of P, not freed
	sSlots  map[Slot]bool     // of S
	slotNo  Slot
	got     []bool // by the remote
	gotFIN  bool
	gotSYN  bool
	lastAck uint32
	lastTS  uint32
	reasons []Reason // of checkpoints
	epoch   uint32
	inherit bool // the SVM's connection came with a checkpoint
	adopts  bool // a restarted P hears of the connections that there are (R23)
}

func newWorld(t *rapid.T, cfg Config, data []byte) *world {
	k := testKeys(3)
	w := &world{
		t: t, keys: k, p: NewPrimary(cfg, k), s: NewSecondary(SecondaryConfig{}, k), now: 1e9, scale: 7,
		cfg: cfg, tup: Tuple{GuestPort: 80, RemotePort: 4711, Proto: 6},
		slots: map[Slot]*Segment{}, sSlots: map[Slot]bool{},
	}
	// rapid likes small numbers, which shrink well. What many steps do together
	// even ones find sooner.
	if seed := rapid.Uint64().Draw(t, "even dice, seed"); seed%4 != 0 {
		w.dice = rand.New(rand.NewPCG(seed, 0))
	}
	w.dial(data)
	return w
}

// n draws a number of [lo, hi].
func (w *world) n(lo, hi int, label string) int {
	if w.dice != nil {
		return lo + w.dice.IntN(hi-lo+1)
	}
	return rapid.IntRange(lo, hi).Draw(w.t, label)
}

// dial begins a new connection in which the guests will transmit data.
func (w *world) dial(data []byte) {
	w.dials++
	w.isn = (w.dials-1)<<28 + rapid.SampledFrom([]uint32{1000, math.MaxUint32 - 500, 1<<31 - 700, math.MaxUint32, 4095}).Draw(w.t, "isn")
	w.cliISN += rapid.SampledFrom([]uint32{7, math.MaxUint32 - 300}).Draw(w.t, "cliISN")
	w.pvm = guest{data: data, transmitted: make([]bool, len(data))}
	w.svm = w.pvm.clone()
	w.got, w.gotSYN, w.gotFIN, w.inherit = make([]bool, len(data)), false, false, false
	w.lastAck, w.lastTS = 0, 0
}

func (w *world) fatalf(format string, args ...any) {
	w.t.Helper()
	w.t.Fatalf("at %v: %s", time.Duration(w.now), fmt.Sprintf(format, args...))
}

// step gives P an event and carries out the effects.
func (w *world) step(ev Event) {
	for _, e := range w.p.Step(w.now, &ev, nil) {
		w.effect(&e)
	}
	if d := w.p.NextDeadline(); ev.Kind == EvTick && d <= w.now {
		w.fatalf("after a tick the next deadline is %d, %d ago", d, w.now-d)
	}
}

func (w *world) effect(e *Effect) {
	switch e.Op {
	case OpSend:
		w.sent(e)
	case OpFree:
		w.free(e.Slot)
	case OpCheckpoint:
		w.reasons = append(w.reasons, e.Reason)
	case OpAdopt:
		w.adopt(w.next())
	case OpAsk:
		if e.To == 0 || e.To > 1<<24 {
			w.fatalf("ask for %d bytes", e.To)
		}
		ask := Event{Kind: EvAsk, Seg: Segment{Tuple: e.Tuple, Seq: e.Seq, Len: e.To, Inc: e.Inc, Inherited: e.Inherited}}
		w.secondary(ask)
	}
}

func (w *world) secondary(ev Event) {
	for _, e := range w.s.Step(w.now, &ev, nil) {
		switch e.Op {
		case OpFree:
			if !w.sSlots[e.Slot] {
				w.fatalf("S frees slot %d, which it does not have", e.Slot)
			}
			delete(w.sSlots, e.Slot)
		case OpAnswer:
			w.late = append(w.late, Event{Kind: EvAnswer, Seg: Segment{
				Tuple: e.Tuple, Seq: e.Seq, Len: e.To, Sum: e.Sum, Inc: e.Inc, Inherited: e.Inherited, Epoch: w.epoch}})
		}
	}
}

func (w *world) free(s Slot) {
	if w.slots[s] == nil {
		w.fatalf("slot %d freed, which is not held", s)
	}
	delete(w.slots, s)
}

func (w *world) off(pos uint32) int { return int(int32(pos - w.isn - 1)) }

// sent checks a frame that leaves: what the SVM did not transmit, or acknowledge, must
// not be in it.
func (w *world) sent(e *Effect) {
	if e.Flags&SYN != 0 {
		if !w.svm.syn {
			w.fatalf("SYN left before the SVM's")
		}
		w.gotSYN = true
	}
	if e.Flags&FIN != 0 {
		if !w.svm.fin {
			w.fatalf("FIN left before the SVM's")
		}
		w.gotFIN = true
	}
	if e.Slot != NoSlot {
		seg := w.slots[e.Slot]
		if seg == nil {
			w.fatalf("frame sent from slot %d, which is not held", e.Slot)
		}
		b := seg.Payload[e.From:e.To]
		if want := seg.PayloadStart() + e.From; e.Flags&SYN == 0 && e.Seq != want {
			w.fatalf("payload of position %d sent at %d", want, e.Seq)
		}
		for i, c := range b {
			at := w.off(e.Seq) + i
			if !w.svm.transmitted[at] {
				w.fatalf("byte %d left before the SVM transmitted it", at)
			}
			if w.svm.data[at] != c {
				w.fatalf("byte %d left as %d, the SVM transmitted %d", at, c, w.svm.data[at])
			}
			w.got[at] = true
		}
		if e.Free {
			w.free(e.Slot)
		}
	}
	if e.Flags&ACK == 0 {
		return
	}
	scale := w.scale
	if e.Flags&SYN != 0 {
		scale = 0
	}
	edge := e.Ack + uint32(e.Win)<<scale
	for _, g := range []*guest{&w.pvm, &w.svm} {
		if after(e.Ack, g.ack) || after(edge, g.edge) {
			w.fatalf("acknowledged %d to %d, a guest only %d to %d", e.Ack, edge, g.ack, g.edge)
		}
	}
	blocks := sackBlocks(nil, e.Opts[:e.OptLen])
	for _, b := range blocks {
		for _, g := range []*guest{&w.pvm, &w.svm} {
			set := sackSet{}
			for _, o := range g.sack {
				set.add(o, g.ack)
			}
			if !set.has(b, g.ack) {
				w.fatalf("SACK block %v left, a guest has %d and %v", b, g.ack, g.sack)
			}
		}
	}
	if ts := tsOpt(e.Opts[:e.OptLen]); ts == nil {
		w.fatalf("the timestamp was lost: %x", e.Opts[:e.OptLen])
	} else if v := be32(ts[2:]); w.lastTS != 0 && before(v, w.lastTS) {
		w.fatalf("the timestamp goes back from %d to %d", w.lastTS, v)
	} else {
		w.lastTS = v
	}
	if w.gotSYN && w.lastAck != 0 && before(e.Ack, w.lastAck) {
		w.fatalf("ACK goes back from %d to %d", w.lastAck, e.Ack)
	}
	w.lastAck = e.Ack
}

// whole reports whether the remote has got everything.
func (w *world) whole() bool { return w.gotFIN && !slices.Contains(w.got, false) }
