// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"encoding/binary"
	"slices"
	"time"
)

// guest is what one guest transmitted so far.
type guest struct {
	data        []byte
	sent        int // new data ends here
	fin         bool
	syn         bool
	ack, edge   uint32  // highest acknowledged, and right edge offered
	buf         uint32  // right edge there is room for
	transmitted []bool  // data handed to its host, lost or not
	sack        []block // held above ack
}

func (g *guest) clone() guest {
	c := *g
	c.data, c.transmitted, c.sack = slices.Clone(g.data), slices.Clone(g.transmitted), slices.Clone(g.sack)
	return c
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
		g.transmitted[i] = true
	}
	return s
}

func (w *world) timestamp(b []byte) []byte {
	b = append(b, 1, 1, 8, 10)
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, uint32(w.now/1000)), 77)
}

// pvmSends captures a frame of the PVM.
func (w *world) pvmSends(from, to int, flags Flags) {
	s := w.segment(&w.pvm, from, to, flags)
	s.At = w.now
	if s.Len > 0 || flags&(SYN|FIN) != 0 {
		w.slotNo++
		s.Slot = w.slotNo
		w.slots[s.Slot] = &s
	}
	w.step(Event{Kind: EvPVM, Seg: s})
}

// svmSends makes a record and a copy of what the SVM transmits; the record arrives
// now, later or never.
func (w *world) svmSends(from, to int, flags Flags, fate int) {
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
		w.pvmSends(0, 0, SYN)
		w.svmSends(0, 0, SYN, 0)
	} else {
		w.pvmSends(0, 0, SYN)
		w.svmSends(0, 0, SYN, 1)
		w.pvmSends(0, 0, SYN) // a repetition
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
	case 0, 1: // the PVM transmits something new; one frame in eight is lost or overtaken
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
		w.pvmSends(from, g.sent, f)
	case 2: // or something old
		if from, to, f := again(&w.pvm); to > from || f != 0 {
			w.pvmSends(from, to, f)
		}
	case 3, 4:
		g := &w.svm
		if g.fin {
			return
		}
		from := g.sent
		g.sent += w.length(len(g.data) - from)
		w.svmSends(from, g.sent, fin(g), w.n(0, 2, "fate"))
	case 5:
		if from, to, f := again(&w.svm); to > from || f != 0 {
			w.svmSends(from, to, f, w.n(0, 2, "fate"))
		}
	case 6:
		w.acknowledge(&w.pvm)
		w.pvmSends(w.pvm.sent, w.pvm.sent, 0)
	case 7:
		w.acknowledge(&w.svm)
		w.svmSends(w.svm.sent, w.svm.sent, 0, w.n(0, 2, "fate"))
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

// adopt has P recover the connection, with what the remote has acknowledged.
func (w *world) adopt(off int) {
	una := w.isn + 1 + uint32(off)
	if w.gotFIN && off == len(w.got) {
		una++
	}
	w.step(Event{Kind: EvAdopt, Seg: Segment{Tuple: w.tup, Seq: una}})
}

// settle lets both guests transmit all they have to, as often as it takes.
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
		send := func(g *guest, transmit func(from, to int, f Flags)) {
			to, f := from+w.length(len(g.data)-from), Flags(0)
			if to == len(g.data) {
				f, g.fin = FIN, true
			}
			g.sent = max(g.sent, to)
			transmit(from, to, f)
		}
		send(&w.pvm, w.pvmSends)
		send(&w.svm, func(from, to int, f Flags) { w.svmSends(from, to, f, 0) })
	}
}

// checkpoint makes the SVM a copy of the PVM as it is at some point, with both
// still transmitting in between.
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
