// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"encoding/binary"
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

// guest is what one guest said so far.
type guest struct {
	data      []byte
	sent      int // new data ends here
	fin       bool
	syn       bool
	ack, edge uint32  // highest acknowledged, and right edge said
	buf       uint32  // right edge there is room for
	said      []bool  // data handed to its host, lost or not
	sack      []block // held above ack
}

func (g *guest) clone() guest {
	c := *g
	c.data, c.said, c.sack = slices.Clone(g.data), slices.Clone(g.said), slices.Clone(g.sack)
	return c
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

// dial begins a new connection in which the guests will say data.
func (w *world) dial(data []byte) {
	w.dials++
	w.isn = (w.dials-1)<<28 + rapid.SampledFrom([]uint32{1000, math.MaxUint32 - 500, 1<<31 - 700, math.MaxUint32, 4095}).Draw(w.t, "isn")
	w.cliISN += rapid.SampledFrom([]uint32{7, math.MaxUint32 - 300}).Draw(w.t, "cliISN")
	w.pvm = guest{data: data, said: make([]bool, len(data))}
	w.svm = w.pvm.clone()
	w.got, w.gotSYN, w.gotFIN, w.inherit = make([]bool, len(data)), false, false, false
	w.lastAck, w.lastTS = 0, 0
}

func (w *world) fatalf(format string, args ...any) {
	w.t.Helper()
	w.t.Fatalf("at %v: %s", time.Duration(w.now), fmt.Sprintf(format, args...))
}

// step gives P an event and carries out what it says.
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

// sent checks a frame that leaves: what the SVM did not say, or acknowledge, must
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
			if !w.svm.said[at] {
				w.fatalf("byte %d left before the SVM said it", at)
			}
			if w.svm.data[at] != c {
				w.fatalf("byte %d left as %d, the SVM said %d", at, c, w.svm.data[at])
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

// segment makes a segment of g's stream.
func (w *world) segment(g *guest, from, to int, flags Flags) Segment {
	s := Segment{
		Tuple: w.tup, Seq: w.isn + 1 + uint32(from), Len: uint32(to - from),
		Ack: g.ack, Win: uint16((g.buf - g.ack) >> w.scale), Flags: flags | ACK,
		Slot: NoSlot, Inc: w.isn, Epoch: w.epoch, Header: []byte("ethernet and ip"),
		Payload: slices.Clone(g.data[from:to]),
	}
	if flags&SYN != 0 {
		s.Seq = w.isn
		s.Opts = w.timestamp([]byte{2, 4, 5, 180, 1, 3, 3, w.scale})
		s.Win = uint16(min(g.buf-g.ack, 0xffff))
		g.edge = g.ack + uint32(s.Win)
	} else {
		s.Opts = w.timestamp(nil)
		if len(g.sack) > 0 {
			s.Opts = append(s.Opts, 1, 1, 5, byte(2+8*len(g.sack)))
			for _, b := range g.sack {
				s.Opts = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(s.Opts, b.left), b.right)
			}
		}
	}
	if e := g.ack + uint32(s.Win)<<w.scale; flags&SYN == 0 && after(e, g.edge) {
		g.edge = e
	}
	if to > from && w.n(0, 2, "gso") == 0 {
		s.GSO = uint16(w.n(1, 1448, "mss"))
	}
	s.Sum = w.keys.Sum(s.PayloadStart(), s.Payload)
	for i := from; i < to; i++ {
		g.said[i] = true
	}
	return s
}

func (w *world) timestamp(b []byte) []byte {
	b = append(b, 1, 1, 8, 10)
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, uint32(w.now/1000)), 77)
}

// pvmSays captures a frame of the PVM.
func (w *world) pvmSays(from, to int, flags Flags) {
	s := w.segment(&w.pvm, from, to, flags)
	s.At = w.now
	if s.Len > 0 || flags&(SYN|FIN) != 0 {
		w.slotNo++
		s.Slot = w.slotNo
		w.slots[s.Slot] = &s
	}
	w.step(Event{Kind: EvPVM, Seg: s})
}

// svmSays makes a record and a copy of what the SVM says; the record arrives
// now, later or never.
func (w *world) svmSays(from, to int, flags Flags, fate int) {
	s := w.segment(&w.svm, from, to, flags)
	if flags&FIN != 0 {
		w.svm.fin = true
	}
	if flags&SYN != 0 {
		w.svm.syn = true
	}
	s.Inherited = w.inherit
	if s.Len > 0 {
		k := s
		w.slotNo++
		k.Slot, k.ClientAck = w.slotNo, w.isn
		w.sSlots[k.Slot] = true
		k.Inherited = w.inherit
		w.secondary(Event{Kind: EvCopy, Seg: k})
	}
	if s.GSO > 0 {
		stride := uint32(s.GSO)
		for s.Len/stride > 48 {
			stride += uint32(s.GSO)
		}
		start := s.PayloadStart()
		for at := stride; at < s.Len; at += stride {
			s.Bounds = append(s.Bounds, Bound{start + at, w.keys.Sum(start, s.Payload[:at])})
		}
	}
	s.Payload, s.GSO = nil, 0
	switch ev := (Event{Kind: EvSVM, Seg: s}); fate {
	case 0:
		w.step(ev)
	case 1:
		w.late = append(w.late, ev)
	}
}

func (w *world) tick(d time.Duration) {
	w.now += int64(d)
	w.step(Event{Kind: EvTick})
}

// arrive delivers one of the late records.
func (w *world) arrive() {
	if len(w.late) == 0 {
		return
	}
	i := w.n(0, len(w.late)-1, "which")
	ev := w.late[i]
	w.late = slices.Delete(w.late, i, i+1)
	w.step(ev)
}

// acknowledge lets g's ACK and edge grow.
func (w *world) acknowledge(g *guest) {
	g.ack += uint32(w.n(0, 3000, "acked"))
	g.sack = slices.DeleteFunc(g.sack, func(b block) bool {
		if !after(b.left, g.ack) {
			g.ack = maxSeq(g.ack, b.right)
			return true
		}
		return false
	})
	if n := uint32(w.n(0, 3, "sack")); n > 0 && len(g.sack) < 3 {
		left := g.ack + n*2000
		g.sack = append(g.sack, block{left, left + uint32(w.n(1, 1500, "sacked"))})
	}
	win := uint32(w.n(0, 0xffff, "win")) << w.scale
	g.buf = maxSeq(g.buf, g.ack+win)
}

// open brings the connection to the point where data flows.
func (w *world) open() {
	for _, g := range []*guest{&w.pvm, &w.svm} {
		g.ack = w.cliISN + 1
		g.buf = g.ack + 60000
	}
	if w.n(0, 1, "svm slow") == 0 {
		w.pvmSays(0, 0, SYN)
		w.svmSays(0, 0, SYN, 0)
	} else {
		w.pvmSays(0, 0, SYN)
		w.svmSays(0, 0, SYN, 1)
		w.pvmSays(0, 0, SYN) // a repetition
		for !w.gotSYN && len(w.late) > 0 {
			w.arrive()
		}
	}
	if !w.gotSYN {
		w.fatalf("the SYN did not leave")
	}
}

// piece draws a range of up to longest bytes.
func (w *world) length(longest int) int {
	n := []int{1, 7, 100, 1448, 5000}[w.n(0, 4, "length")]
	return min(n, longest)
}

// act does one random thing.
func (w *world) act() {
	w.now += int64(w.n(0, 300, "µs")) * 1000
	fin := func(g *guest) Flags {
		if g.sent == len(g.data) {
			g.fin = true
			return FIN | PSH
		}
		return []Flags{0, PSH}[w.n(0, 1, "psh")]
	}
	again := func(g *guest) (from, to int, f Flags) {
		from = w.n(0, g.sent, "from")
		to = from + w.length(g.sent-from)
		if to == len(g.data) && g.fin {
			f = FIN
		}
		return from, to, f
	}
	switch w.n(0, 9, "act") {
	case 0, 1: // the PVM says something new; one frame in eight is lost or overtaken
		g := &w.pvm
		if g.fin {
			return
		}
		from := g.sent
		g.sent += w.length(len(g.data) - from)
		f := fin(g)
		if w.n(0, 7, "lost") == 0 {
			w.segment(g, from, g.sent, f)
			return
		}
		w.pvmSays(from, g.sent, f)
	case 2: // or something old
		if from, to, f := again(&w.pvm); to > from || f != 0 {
			w.pvmSays(from, to, f)
		}
	case 3, 4:
		g := &w.svm
		if g.fin {
			return
		}
		from := g.sent
		g.sent += w.length(len(g.data) - from)
		w.svmSays(from, g.sent, fin(g), w.n(0, 2, "fate"))
	case 5:
		if from, to, f := again(&w.svm); to > from || f != 0 {
			w.svmSays(from, to, f, w.n(0, 2, "fate"))
		}
	case 6:
		w.acknowledge(&w.pvm)
		w.pvmSays(w.pvm.sent, w.pvm.sent, 0)
	case 7:
		w.acknowledge(&w.svm)
		w.svmSays(w.svm.sent, w.svm.sent, 0, w.n(0, 2, "fate"))
	case 8:
		w.arrive()
	case 9:
		w.tick(time.Duration(w.n(0, 20000, "tick µs")) * time.Microsecond)
	}
}

// next is the offset of what the remote waits for.
func (w *world) next() int {
	if i := slices.Index(w.got, false); i >= 0 {
		return i
	}
	return len(w.got)
}

// adopt tells P of the connection, with what the remote has acknowledged.
func (w *world) adopt(off int) {
	una := w.isn + 1 + uint32(off)
	if w.gotFIN && off == len(w.got) {
		una++
	}
	w.step(Event{Kind: EvAdopt, Seg: Segment{Tuple: w.tup, Seq: una}})
}

// settle lets both guests say all they have to, as often as it takes.
func (w *world) settle() {
	for range 400 {
		for len(w.late) > 0 {
			w.arrive()
		}
		if len(w.reasons) > 0 {
			return
		}
		w.tick(100 * time.Millisecond)
		from := w.next()
		if from == len(w.got) && w.gotFIN {
			return
		}
		say := func(g *guest, says func(from, to int, f Flags)) {
			to, f := from+w.length(len(g.data)-from), Flags(0)
			if to == len(g.data) {
				f, g.fin = FIN, true
			}
			g.sent = max(g.sent, to)
			says(from, to, f)
		}
		say(&w.pvm, w.pvmSays)
		say(&w.svm, func(from, to int, f Flags) { w.svmSays(from, to, f, 0) })
	}
}

// checkpoint makes the SVM a copy of the PVM as it is at some point, with both
// going on to speak in between.
func (w *world) checkpoint() {
	chat := func(what string) {
		for range w.n(0, 6, what) {
			w.act()
		}
	}
	w.step(Event{Kind: EvFreeze})
	released := w.p.Stats()
	chat("while frozen")
	if st := w.p.Stats(); st.ReleasedPackets != released.ReleasedPackets || st.SentACKs != released.SentACKs {
		w.fatalf("frames left while frozen")
	}
	if w.n(0, 3, "fails") == 0 {
		w.step(Event{Kind: EvThaw})
		return
	}
	w.now += 1e6
	at := w.now
	w.now += 1e6
	w.svm = w.pvm.clone() // here both are stopped
	w.epoch++
	w.inherit = true
	w.secondary(Event{Kind: EvReset})
	chat("before the commit")
	w.step(Event{Kind: EvCommit, Epoch: w.epoch, At: at})
}

// restart makes P forget all it knew, as a daemon does that starts again (R23).
// What was on its way to it is lost too. The remote's last ACKs may be on their way.
func (w *world) restart() {
	w.late = nil
	w.p = NewPrimary(w.cfg, w.keys)
	w.p.epoch = w.epoch
	clear(w.slots)
	w.lastAck, w.lastTS = 0, 0
	if w.adopts && w.gotSYN {
		w.adopt(w.n(max(0, w.next()-3000), w.next(), "acknowledged"))
	}
}

// whole reports whether the remote has got everything.
func (w *world) whole() bool { return w.gotFIN && !slices.Contains(w.got, false) }
