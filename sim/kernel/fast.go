// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"encoding/binary"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// This file is the model of bpf/fast.h: the fast path (R27).

const (
	fastWait    = 10_000_000 // ns
	fastL4Max   = int(bpf.LockstepLsConstLS_FAST_L4MAX)
	fastMax     = int(bpf.LockstepLsConstLS_FAST_MAX)
	fastTmpl    = int(bpf.LockstepLsConstLS_FAST_TMPL)
	fastTS      = 12
	fastLen     = int(bpf.LockstepLsConstLS_FAST_LEN)
	ownerUser   = uint32(bpf.LockstepLsOwnerLS_OWNER_USER)
	ownerKernel = uint32(bpf.LockstepLsOwnerLS_OWNER_KERNEL)
	finPVM      = uint8(bpf.LockstepLsFastMarkLS_FAST_FIN_PVM)
	synWaits    = uint8(bpf.LockstepLsFastMarkLS_FAST_SYN)
	finSVM      = uint8(bpf.LockstepLsFastMarkLS_FAST_FIN_SVM)
)

// fastConn is an element of ls_fast.
type fastConn struct {
	armed, untold bool
	s             bpf.LockstepLsFastState
}

// fastTable is the map ls_fast with what goes by it.
type fastTable struct {
	m  *machine
	of map[bpfmodel.Tuple]*fastConn
	buckets
	on bool
}

func newFastTable(m *machine) fastTable {
	return fastTable{m: m, of: make(map[bpfmodel.Tuple]*fastConn), buckets: make(buckets)}
}

// fastOut is what a frame that leaves says.
type fastOut struct {
	seq, ack, tsval, tsecr uint32
	win                    uint16
	ts                     bool
}

// verdict is what becomes of a segment of the PVM.
type verdict int

const (
	fastNot verdict = iota // user space decides
	fastHeld
	fastPass
)

// usualTS gives the timestamps in options that are laid out as usual.
func usualTS(o []byte) (val, ecr uint32, ok bool) {
	if len(o) != fastTS || o[0] != 1 || o[1] != 1 || o[2] != 8 || o[3] != 10 {
		return 0, 0, false
	}
	ecr = binary.BigEndian.Uint32(o[8:])
	return binary.BigEndian.Uint32(o[4:]), ecr, ecr != 0
}

func after(a, b uint32) bool { return int32(a-b) > 0 }

func ackedUpdate(d *bpf.LockstepLsAcked, ack uint32, win uint16, scale uint8, ts bool, echo uint32) (grew bool) {
	edge := ack + uint32(win)<<(scale&15)
	fresh := false
	win >>= 14
	switch {
	case after(ack, d.Ack):
		d.Ack, d.Win, fresh, grew = ack, win, true, true
	case ack == d.Ack && win > d.Win:
		d.Win, grew = win, true
	}
	if after(edge, d.Edge) {
		d.Edge, grew = edge, true
	}
	if ts && ack == d.Ack && (fresh || d.Echoes == 0 || after(echo, d.Echo)) {
		d.Echo, d.Echoes = echo, 1
	}
	return grew
}

func (x *fastTable) minimum(s *bpf.LockstepLsFastState, pvm, svm *bpf.LockstepLsAcked) (ack, edge uint32, win uint16, grown bool) {
	m := x.m
	if m.off(bpf.LockstepLsMutationLS_MUTATE_FAST_R2) {
		svm = pvm
	}
	if ack = pvm.Ack; after(ack, svm.Ack) {
		ack = svm.Ack
	}
	if after(s.Sent.Ack, ack) {
		ack = s.Sent.Ack
	}
	if edge = pvm.Edge; after(edge, svm.Edge) {
		edge = svm.Edge
	}
	if after(s.Sent.Edge, edge) {
		edge = s.Sent.Edge
	}
	if !after(ack, edge) {
		win = uint16(min((edge-ack)>>(s.Scale&15), 0xffff))
	}
	edge = ack + uint32(win)<<(s.Scale&15)
	return ack, edge, win, after(ack, s.Sent.Ack) || after(edge, s.Sent.Edge)
}

func (x *fastTable) transmit(s *bpf.LockstepLsFastState, o *fastOut) {
	ack, edge, win, _ := x.minimum(s, &s.Pvm, &s.Svm)
	o.ack, o.win = ack, win
	if after(s.Sent.Edge, edge) {
		edge = s.Sent.Edge
	}
	s.Sent.Ack, s.Sent.Edge, s.Sent.Win, s.Sent.Echoes = ack, edge, win>>14, 0
	if o.ts = s.Ts != 0; !o.ts {
		return
	}
	slow := &s.Pvm
	if after(s.Pvm.Ack, s.Svm.Ack) || s.Svm.Ack == s.Pvm.Ack && s.Svm.Echoes != 0 && (s.Pvm.Echoes == 0 || after(s.Svm.Echo, s.Pvm.Echo)) {
		slow = &s.Svm
	}
	if slow.Echoes != 0 {
		o.tsecr = slow.Echo
	}
	if after(s.TsSent, o.tsval) {
		o.tsval = s.TsSent
	} else {
		s.TsSent = o.tsval
	}
}

func fastWaits(s *bpf.LockstepLsFastState) bool {
	return s.Nheld > 0 || s.Nrecs > 0 || s.Pvm.Ack != s.Svm.Ack
}

func fastYield(s *bpf.LockstepLsFastState) uint32 {
	s.Owner = ownerUser
	s.Number++
	return s.Number
}

// arm starts the timer, if something waits and it does not run.
func (x *fastTable) arm(t bpfmodel.Tuple, f *fastConn) {
	m := x.m
	if f.armed || !fastWaits(&f.s) {
		return
	}
	x.start(t, f, m.host.Now()+fastWait)
}

func (x *fastTable) start(t bpfmodel.Tuple, f *fastConn, at int64) {
	m := x.m
	if m.host.Timer == nil {
		return
	}
	f.armed = true
	m.host.Timer(at, func() {
		if x.of[t] == f {
			x.timeout(t, f)
		}
	})
}

func (x *fastTable) timeout(t bpfmodel.Tuple, f *fastConn) {
	m := x.m
	now, again := m.host.Now(), int64(0)
	f.armed = false
	tell, number := f.untold, f.s.Number
	if f.s.Owner == ownerKernel && fastWaits(&f.s) {
		if left := int64(f.s.Since) + fastWait - now; left <= 0 {
			tell, number = true, fastYield(&f.s)
		} else {
			again = left
		}
	}
	f.untold = false
	if tell {
		if e := m.ring.reserve(frameSize); e != nil {
			ev := e.frame()
			ev.Type, ev.Slot, ev.At, ev.T, ev.Number = uint32(bpf.LockstepLsEvTypeLS_EV_YIELD), uint32(compare.NoSlot), uint64(now), core.ToTuple(t), number
			return
		}
		again, f.untold = fastWait, true
	}
	if again > 0 {
		x.start(t, f, now+again)
	}
}

// giveUp is a frame or record that user space decides about; 0: the kernel has no entry of its connection.
func (x *fastTable) giveUp(t bpfmodel.Tuple) uint32 {
	if f := x.of[t]; f != nil {
		return fastYield(&f.s)
	}
	return 0
}

func (x *fastTable) common(f *fastConn, flags bpfmodel.Flags, optlen int, t *bpfmodel.Tuple) bool {
	want := 0
	if f.s.Ts != 0 {
		want = fastTS
	}
	return x.on && f.s.Owner == ownerKernel && flags&^(bpfmodel.PSH|bpfmodel.FIN) == bpfmodel.ACK && optlen == want && t.VLAN == 0
}

// fastWrite writes o's numbers into the TCP header of the frame.
func fastWrite(p *bpfmodel.Segment, o *fastOut) {
	h := p.TCP()
	h.Add(4, o.seq-h.Seq(), false)
	h.Add(8, o.ack-h.Ack(), false)
	h.Add(12, uint32(o.win)-uint32(h.Win()), false) // the low half of the word
	if o.ts {
		opts := h.Options()
		h.Add(24, o.tsval-binary.BigEndian.Uint32(opts[4:]), false)
		h.Add(28, o.tsecr-binary.BigEndian.Uint32(opts[8:]), false)
	}
}

// same reports whether the SVM's segment is the PVM's.
func (x *fastTable) same(h *bpf.LockstepLsFastHeld, seq, end uint32, flags uint8, sum [2]uint64) bool {
	fin := uint32(h.TcpFlags) & uint32(bpfmodel.FIN)
	return h.Seq == seq && h.Seq+h.Paylen+fin == end &&
		(fin == uint32(flags)&uint32(bpfmodel.FIN) || x.m.off(bpf.LockstepLsMutationLS_MUTATE_FAST_R3)) &&
		(h.Sum == sum || x.m.off(bpf.LockstepLsMutationLS_MUTATE_FAST_R1))
}

// pvm decides about a segment of the PVM. Where user space does, ev has the number, and the slot if the
// frame is in one.
func (x *fastTable) pvm(b []byte, gso uint16, p *bpfmodel.Segment) (v verdict, slot, number uint32) {
	m := x.m
	none := uint32(compare.NoSlot)
	f := x.of[p.Tuple]
	if f == nil {
		return fastNot, none, 0
	}
	s, h := &f.s, p.TCP()
	var o fastOut
	opts := h.Options()
	o.ts = len(opts) > 0
	usual := true
	if o.ts {
		o.tsval, o.tsecr, usual = usualTS(opts)
	}
	if !x.common(f, h.Flags(), len(opts), &p.Tuple) || gso != 0 || len(b) > fastLen || p.L4 > fastL4Max || !usual || h.Flags()&bpfmodel.PSH != 0 && p.End == p.Pay {
		return fastNot, none, fastYield(s)
	}
	now := uint64(m.host.Now())
	paylen, fin := uint32(p.End-p.Pay), uint32(h.Flags()&bpfmodel.FIN)
	seq, end := h.Seq(), h.Seq()+paylen+fin
	var held bpf.LockstepLsFastHeld
	kept := false
	if end != seq {
		sum, _ := m.digest(p, 0)
		if s.Nrecs == 0 {
			var ev bpf.LockstepLsEv
			if m.keep(b, p, true, &ev) != bpf.LockstepLsReasonLS_R_held {
				return fastNot, none, fastYield(s)
			}
			kept, slot = true, ev.Slot
		}
		held = bpf.LockstepLsFastHeld{
			At: now, Sum: sum, Slot: slot, Seq: seq, Paylen: paylen, Ack: h.Ack(), Tsval: o.tsval, FrameLen: uint32(len(b)),
			Win: h.Win(), TcpFlags: uint8(h.Flags()), L3Off: uint16(p.L3), L4Off: uint16(p.L4), PayOff: uint16(p.Pay),
		}
	} else if p.Pay > fastTmpl {
		return fastNot, none, fastYield(s)
	}
	if !kept {
		slot = none
	}
	yield := func() (verdict, uint32, uint32) { return fastNot, slot, fastYield(s) }

	if seq != s.PvmEnd || (s.Ts != 0) != o.ts || s.Marks&synWaits != 0 || end != seq && s.Marks&finPVM != 0 {
		return yield()
	}
	d := s.Pvm
	grew := ackedUpdate(&d, h.Ack(), h.Win(), s.Scale, o.ts, o.tsecr)
	tsval := o.tsval
	switch {
	case end == seq:
		if !grew {
			return yield()
		}
		if !fastWaits(s) {
			s.Since = now
		}
		s.Pvm, s.Pure, s.HasPure = d, h.Ack(), 1
		s.TmplLen, s.TmplL4, s.TmplPartial = uint16(p.Pay), uint16(p.L4), 0
		clear(s.Tmpl[copy(s.Tmpl[:], b[:p.Pay]):])
		if _, _, _, grown := x.minimum(s, &s.Pvm, &s.Svm); grown {
			o.seq = s.Released
			x.transmit(s, &o)
			s.Acks++
			v = fastPass
		} else {
			v = fastHeld
		}
	case s.Nrecs > 0:
		r := &s.Recs[0]
		if !x.same(&held, r.Seq, r.End, r.TcpFlags, r.Sum) {
			return yield()
		}
		copy(s.Recs[:], s.Recs[1:])
		s.Nrecs--
		s.Pvm, s.PvmEnd, s.Released, s.Since = d, end, end, now
		o.seq = seq
		x.transmit(s, &o)
		s.Frames++
		s.Bytes += uint64(paylen)
		v = fastPass
	default:
		_, _, _, grown := x.minimum(s, &d, &s.Svm)
		if !kept || int(s.Nheld) >= fastMax || grown {
			return yield()
		}
		if !fastWaits(s) {
			s.Since = now
		}
		s.Held[s.Nheld] = held
		s.Nheld++
		s.Pvm, s.PvmEnd = d, end
		v = fastHeld
	}
	if fin != 0 {
		s.Marks |= finPVM
	}
	s.TsLast = tsval
	x.arm(p.Tuple, f)
	if v == fastHeld {
		m.count(bpf.LockstepLsReasonLS_R_fastHeld)
		return v, none, 0
	}
	fastWrite(p, &o)
	return v, none, 0
}

// record decides about the digest record in m.rec. It reports whether it did; else user space does, and
// number is that of the event.
func (x *fastTable) record() (number uint32, done bool) {
	m := x.m
	r := &m.rec
	t := core.FromTuple(&r.T)
	f := x.of[t]
	if f == nil {
		return 0, false
	}
	s := &f.s
	if r.TcpFlags == uint8(bpfmodel.SYN|bpfmodel.ACK) {
		return x.answer(t, f)
	}
	opts := r.Opts[:r.Optlen]
	ts, usual, ecr := len(opts) > 0, true, uint32(0)
	if ts {
		_, ecr, usual = usualTS(opts)
	}
	if !x.common(f, bpfmodel.Flags(r.TcpFlags), len(opts), &t) || r.Epoch != m.conf.Epoch || !usual ||
		r.Seq != s.SvmEnd || (s.Ts != 0) != ts || s.Inherited != r.Flags&uint8(bpf.LockstepLsRecFlagLS_REC_INHERITED) || s.Inherited == 0 && s.Inc != r.Inc ||
		s.Marks&synWaits != 0 || r.End != r.Seq && s.Marks&finSVM != 0 {
		return fastYield(s), false
	}
	now := uint64(m.host.Now())
	d := s.Svm
	grew := ackedUpdate(&d, r.Ack, r.Win, s.Scale, ts, ecr)
	var o fastOut
	var frame []byte
	slot, payload := uint32(compare.NoSlot), r.End != r.Seq
	if payload && s.Nheld > 0 {
		h := &s.Held[0]
		if !x.same(h, r.Seq, r.End, r.TcpFlags, r.Sum) {
			return fastYield(s), false
		}
		slot = h.Slot
		frame = append(frame, m.slots.Element(compare.Slot(slot))[slotData:][:uint32(h.PayOff)+h.Paylen]...) // without padding
		o.seq, o.tsval, o.tsecr = h.Seq, h.Tsval, s.Pvm.Echo
		s.Frames++
		s.Bytes += uint64(h.Paylen)
		copy(s.Held[:], s.Held[1:])
		s.Nheld--
		s.Svm, s.SvmEnd, s.Released = d, r.End, r.End
	} else {
		if payload && int(s.Nrecs) >= fastMax || !payload && !grew {
			return fastYield(s), false
		}
		if ack, _, _, grown := x.minimum(s, &s.Pvm, &d); grown {
			if s.HasPure == 0 || after(ack, s.Pure) {
				return fastYield(s), false
			}
			frame = append(frame, s.Tmpl[:s.TmplLen]...)
			o.seq, o.tsval, o.tsecr = s.Released, s.TsLast, s.Pvm.Echo
			s.Acks++
		}
		s.Svm = d
		if payload {
			c := &s.Recs[s.Nrecs]
			*c = bpf.LockstepLsFastRec{
				At: now, Sum: r.Sum, Seq: r.Seq, End: r.End, Ack: r.Ack, Win: r.Win, TcpFlags: r.TcpFlags, Optlen: r.Optlen, Epoch: r.Epoch,
			}
			copy(c.Opts[:], r.Opts[:fastTS])
			s.Nrecs++
			s.SvmEnd = r.End
		}
	}
	if r.TcpFlags&uint8(bpfmodel.FIN) != 0 {
		s.Marks |= finSVM
	}
	s.Since = now
	s.Records++
	if frame != nil {
		x.transmit(s, &o)
	}
	x.arm(t, f)
	m.count(bpf.LockstepLsReasonLS_R_fastIn)
	if frame == nil {
		return 0, true
	}
	var p bpfmodel.Segment
	p.Parse(frame, false)
	fastWrite(&p, &o)
	m.count(bpf.LockstepLsReasonLS_R_fastOut)
	if slot != uint32(compare.NoSlot) {
		m.freeSlot(slot)
	}
	m.fromGuest(frame, 0, released)
	return 0, true
}

func (m *machine) freeSlot(slot uint32) {
	binary.LittleEndian.PutUint32(m.slots.Element(compare.Slot(slot)), slotFree)
}
