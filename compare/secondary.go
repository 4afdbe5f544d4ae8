// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"cmp"
	"math"
	"sort"
)

// SecondaryConfig bounds a [Secondary]. Zero fields take the default. The slots
// that copies leave over are for parked frames.
type SecondaryConfig struct {
	MaxCopies int // 4096
	MaxLarge  int // of those the ones in large slots; 512
}

// SecondaryStats counts events since the start, but for Copies, Bytes and Parked, which
// are as of now.
type SecondaryStats struct {
	Copies, Bytes, Parked      int
	Asked, Answered, Delivered uint64
	Replayed                   uint64
	Drops                      [ReasonCount]uint64
}

// Secondary keeps copies of what the SVM transmitted, answers P's questions about them
// (R5), and queues the input parked for the SVM (R16).
type Secondary struct {
	cfg    SecondaryConfig
	keys   *Keys
	flows  map[Tuple]*copies
	copies list[*frameCopy] // all of them, in the order they came
	large  int              // of copies, those in large slots
	parked []parkedFrame
	mark   parkMark
	loaded parkReset
	alone  bool // it took over
	mut    mutation
	stats  SecondaryStats
	out    []Effect
}

// parkedFrame is input that the SVM has not got.
type parkedFrame struct {
	slot     Slot
	datagram bool
}

// parkMark is P's newest mark: what is in the queue from at on the PVM had not
// received when it stopped for epoch. again: there was one before, so nobody knows which stop
// was the checkpoint's.
type parkMark struct {
	ok    bool
	again bool
	epoch uint32
	at    int
}

// parkReset notes that the SVM became a copy of the PVM, or may have, for epoch, since the queue was
// last delivered. Epoch 0: nobody knows when the PVM stopped.
type parkReset struct {
	ok    bool
	epoch uint32
}

// copies are those of one incarnation of a connection, by position.
type copies struct {
	tuple     Tuple
	inc       uint32
	inherited bool
	goesOn    bool // EvRemote has named it
	byPos     deque[*frameCopy]
}

type frameCopy struct {
	of         *copies
	start, end uint32
	payload    []byte
	slot       Slot
	large      bool // of the slot
	syn        bool
	link       link[*frameCopy]
}

// NewSecondary makes the decision core of S. keys are those of the kernel.
func NewSecondary(cfg SecondaryConfig, keys *Keys) *Secondary {
	cfg.MaxCopies = cmp.Or(cfg.MaxCopies, 4096)
	cfg.MaxLarge = cmp.Or(cfg.MaxLarge, 512)
	return &Secondary{cfg: cfg, keys: keys, flows: make(map[Tuple]*copies)}
}

// NextDeadline is always math.MaxInt64: S has no timers.
func (s *Secondary) NextDeadline() int64 { return math.MaxInt64 }

// Stats gives the counters.
func (s *Secondary) Stats() SecondaryStats {
	st := s.stats
	st.Copies, st.Parked = s.copies.n, len(s.parked)
	return st
}

// Step takes in one event and appends to out what is to be done, in order.
func (s *Secondary) Step(_ int64, ev *Event, out []Effect) []Effect {
	s.out = out
	switch ev.Kind {
	case EvCopy:
		s.keep(&ev.Seg)
	case EvAsk:
		s.answer(&ev.Seg)
	case EvPark:
		if ev.Seg.Slot != NoSlot {
			s.parked = append(s.parked, parkedFrame{ev.Seg.Slot, ev.Seg.Datagram})
		}
	case EvMark:
		// A second mark of one attempt: the PVM has gone on since the first. An attempt that failed left its mark behind.
		if !s.mark.ok || !after(s.mark.epoch, ev.Epoch) {
			s.mark = parkMark{true, s.mark.ok && s.mark.epoch == ev.Epoch, ev.Epoch, len(s.parked)}
		}
	case EvUnpark:
		s.unpark()
	case EvRemote:
		// Others are of a connection that had the same ports before.
		if f := s.flows[ev.Seg.Tuple]; f != nil && f.inherited == ev.Seg.Inherited && (f.inherited || f.inc == ev.Seg.Inc) {
			f.goesOn = true
			s.acked(f, ev.Seg.ClientAck)
		}
	case EvTakeOver:
		s.alone = true
		for s.copies.first != nil { // in the order in which the SVM transmitted them
			switch k := s.copies.first.of; {
			case k.syn:
				s.free(k, ReasonVoid) // the tables would take it for a new connection's; the guest repeats it
			case k.of.goesOn || s.off(mutEnded):
				s.replay(s.remove(k))
			default:
				s.free(k, ReasonVoid) // the connection is over, and may be another one's by now
			}
		}
		s.unpark()
	case EvUnsure:
		s.loaded = parkReset{ok: true}
	case EvReset:
		s.loaded = parkReset{true, ev.Epoch}
		for s.copies.first != nil {
			s.free(s.copies.first.of, ReasonVoid)
		}
	}
	out, s.out = s.out, nil
	return out
}

// unpark delivers what was parked, in order (R16). If the SVM has become a copy of
// the PVM meanwhile, it has received what came before the PVM stopped: TCP is not
// harmed by receiving it twice, others might be, so of datagrams only what is behind the
// mark is delivered. A mark that was lost, is of another epoch than the one that began, or is one
// of several, marks nothing: then all datagrams are dropped, as a network may.
func (s *Secondary) unpark() {
	from := 0
	if s.loaded.ok {
		if from = len(s.parked); s.mark.ok && !s.mark.again && s.mark.epoch == s.loaded.epoch {
			from = s.mark.at
		}
	}
	for i, f := range s.parked {
		if f.datagram && i < from && !s.off(mutR16) {
			s.drop(f.slot, ReasonBeforeMark)
			continue
		}
		s.stats.Delivered++
		s.out = append(s.out, Effect{Op: OpDeliver, Slot: f.slot, Free: true})
	}
	s.parked, s.mark, s.loaded = s.parked[:0], parkMark{}, parkReset{}
}

// keep takes a copy in. Its ClientAck frees the copies that nobody can ask for
// any more.
func (s *Secondary) keep(seg *Segment) {
	f := s.flows[seg.Tuple]
	if f != nil && (f.inc != seg.Inc || f.inherited != seg.Inherited) {
		for f.byPos.len() > 0 {
			s.free(f.byPos.view()[0], ReasonSuperseded)
		}
		f = nil
	}
	start := seg.PayloadStart()
	k := &frameCopy{start: start, end: start + seg.Len, payload: seg.Payload, slot: seg.Slot, large: seg.Large, syn: seg.Flags&SYN != 0}
	if f != nil {
		s.acked(f, seg.ClientAck)
		f = s.flows[seg.Tuple] // the last copy takes its flow along
	}
	switch {
	case seg.Slot == NoSlot:
		return
	case s.alone && k.syn:
		s.drop(seg.Slot, ReasonVoid) // as in a takeover
		return
	case seg.Len == 0 || int64(len(seg.Payload)) != int64(seg.Len):
		s.drop(seg.Slot, ReasonMalformed)
		return
	case f != nil && f.covers(k):
		s.drop(seg.Slot, ReasonDuplicate)
		return
	}
	if s.alone {
		s.replay(k.slot)
		return
	}
	if f == nil {
		f = &copies{tuple: seg.Tuple, inc: seg.Inc, inherited: seg.Inherited}
		s.flows[seg.Tuple] = f
	}
	k.of = f
	f.byPos.insert(f.search(start), k)
	k.link.of = k
	s.copies.push(&k.link)
	s.stats.Bytes += len(k.payload)
	if k.large {
		s.large++
	}
	// Those of connections that are quiet stay until then, acknowledged or not.
	for s.copies.n > s.cfg.MaxCopies || s.large > s.cfg.MaxLarge {
		s.free(s.copies.first.of, ReasonBudget)
	}
}

// acked frees the copies that nobody can ask for any more; ack 0: the remote has
// acknowledged nothing yet.
func (s *Secondary) acked(f *copies, ack uint32) {
	// Sorted by start, not by end: what is kept a little longer does no harm.
	for ack != 0 && f.byPos.len() > 0 && !after(f.byPos.view()[0].end, ack) {
		s.free(f.byPos.view()[0], ReasonAcked)
	}
}

// search gives the index of the first copy that starts behind pos.
func (f *copies) search(pos uint32) int {
	v := f.byPos.view()
	if n := len(v); n == 0 || !after(v[n-1].start, pos) {
		return n
	}
	return sort.Search(len(v), func(i int) bool { return after(v[i].start, pos) })
}

// covers reports whether one copy has all that k has.
func (f *copies) covers(k *frameCopy) bool {
	i := f.search(k.start)
	return i > 0 && !after(k.end, f.byPos.view()[i-1].end)
}

// answer adds up the sums over the range asked for, if copies cover it. If not, P
// asks again.
func (s *Secondary) answer(seg *Segment) {
	s.stats.Asked++
	f := s.flows[seg.Tuple]
	// A P that adopted the connection asks without an incarnation (R23), and judges
	// the one that the answer names as it does a record's.
	if f == nil || !seg.Inherited && (f.inherited || f.inc != seg.Inc) {
		return
	}
	var sum Sum
	pos, end := seg.Seq, seg.Seq+seg.Len
	for _, k := range f.byPos.view() {
		if !before(pos, end) || after(k.start, pos) {
			break
		}
		if to := minSeq(end, k.end); after(to, pos) {
			sum = sum.plus(s.keys.Sum(pos, k.payload[pos-k.start:to-k.start]))
			pos = to
		}
	}
	if pos != end || seg.Len == 0 {
		return
	}
	s.stats.Answered++
	s.out = append(s.out, Effect{
		Op: OpAnswer, Tuple: seg.Tuple, Slot: NoSlot,
		Seq: seg.Seq, To: seg.Len, Inc: f.inc, Inherited: f.inherited, Sum: sum,
	})
}

// replay transmits a copy to the client: P may have died before it did.
func (s *Secondary) replay(slot Slot) {
	if s.off(mutR22) {
		s.drop(slot, ReasonVoid)
		return
	}
	s.stats.Replayed++
	s.out = append(s.out, Effect{Op: OpReplay, Slot: slot, Free: true})
}

// free drops a copy.
func (s *Secondary) free(k *frameCopy, why Reason) { s.drop(s.remove(k), why) }

// remove takes a copy out and returns its slot.
func (s *Secondary) remove(k *frameCopy) Slot {
	f := k.of
	for i, o := range f.byPos.view() {
		if o == k {
			if i == 0 {
				f.byPos.drop(1)
			} else {
				f.byPos.remove(i, i+1)
			}
			break
		}
	}
	if f.byPos.len() == 0 {
		delete(s.flows, f.tuple)
	}
	k.link.unlink()
	s.stats.Bytes -= len(k.payload)
	if k.large {
		s.large--
	}
	return k.slot
}

func (s *Secondary) drop(slot Slot, why Reason) {
	s.stats.Drops[why]++
	if slot != NoSlot {
		s.out = append(s.out, Effect{Op: OpFree, Slot: slot, Reason: why})
	}
}
