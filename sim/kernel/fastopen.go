// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"bytes"
	"encoding/binary"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
	"github.com/lockstep-ft/lockstep/compare"
)

// This file is the model of bpf/fast_open.h: connections that the fast path has from the PVM's SYN|ACK on.

const (
	synOpts = 20       // bytes of options in a SYN|ACK of Linux
	synBusy = 64 << 10 // of events that user space has not read
)

// usualSYN reports whether h is a SYN|ACK as Linux sends it to one that offers all of its options.
func usualSYN(h bpfmodel.TCP) bool {
	o := h.Options()
	return len(o) == synOpts && h[12] == 10<<4 && h.Flags() == bpfmodel.SYN|bpfmodel.ACK && bytes.Equal(o[:2], []byte{2, 4}) &&
		bytes.Equal(o[4:8], []byte{4, 2, 8, 10}) && bytes.Equal(o[16:19], []byte{1, 3, 3}) && binary.BigEndian.Uint32(o[12:]) != 0
}

// synSum is what is compared of such options: all but the timestamp.
func synSum(o []byte) [2]uint64 {
	return [2]uint64{binary.LittleEndian.Uint64(o), binary.LittleEndian.Uint64(o[12:])}
}

// opened makes the connection of a SYN|ACK of the PVM, which is in slot, the kernel's, and reports whether it did.
func (x *fastTable) opened(b []byte, p *bpfmodel.Segment, slot uint32) bool {
	m, h := x.m, p.TCP()
	if !x.on || !usualSYN(h) || p.End != p.Pay || p.Tuple.VLAN != 0 || p.L4 > fastL4Max || m.ring.used > synBusy || x.of[p.Tuple] != nil {
		return false
	}
	if c := m.cli.Get(p.Tuple); c != nil && c.Reused != 0 {
		return false
	}
	o := h.Options()
	val, ecr := binary.BigEndian.Uint32(o[8:]), binary.BigEndian.Uint32(o[12:])
	now := uint64(m.host.Now())
	acked := bpf.LockstepLsAcked{Ack: h.Ack(), Edge: h.Ack() + uint32(h.Win()), Win: h.Win() >> 14}
	f := &fastConn{s: bpf.LockstepLsFastState{
		Owner: ownerKernel, Inc: h.Seq(), Released: h.Seq(), SvmEnd: h.Seq(), PvmEnd: h.Seq() + 1, Ts: 1, TsSent: val, TsLast: val,
		Scale: min(o[19], 14), Marks: synWaits, Sent: acked, Nheld: 1, Since: now,
	}}
	acked.Echo, acked.Echoes = ecr, 1
	f.s.Pvm, f.s.Svm = acked, acked
	f.s.Held[0] = bpf.LockstepLsFastHeld{
		At: now, Sum: synSum(o), Slot: slot, Seq: h.Seq(), Ack: h.Ack(), FrameLen: uint32(len(b)), Win: h.Win(),
		TcpFlags: uint8(h.Flags()), L3Off: uint16(p.L3), L4Off: uint16(p.L4), PayOff: uint16(p.Pay),
	}
	x.of[p.Tuple] = f
	x.arm(p.Tuple, f)
	return true
}

// answer decides about the record of the SVM's SYN|ACK, as record does about others.
func (x *fastTable) answer(t bpfmodel.Tuple, f *fastConn) (number uint32, done bool) {
	m, s := x.m, &f.s
	r, h := &m.rec, &s.Held[0]
	if !x.on || s.Owner != ownerKernel || s.Marks&synWaits == 0 || r.Epoch != m.conf.Epoch || r.Flags&uint8(bpf.LockstepLsRecFlagLS_REC_INHERITED) != 0 ||
		r.Inc != s.Inc || r.Seq != h.Seq || r.End != h.Seq+1 || r.Ack != h.Ack || r.Win != h.Win ||
		(r.Optlen != synOpts || synSum(r.Opts[:synOpts]) != h.Sum) && !m.off(bpf.LockstepLsMutationLS_MUTATE_FAST_R3) {
		return fastYield(s), false
	}
	frame := append([]byte(nil), m.slots.Element(compare.Slot(h.Slot))[slotData:][:h.PayOff]...) // without padding
	slot := h.Slot
	s.Marks, s.Nheld = 0, 0
	s.Released, s.SvmEnd = r.End, r.End
	s.Frames++
	s.Records++
	m.count(bpf.LockstepLsReasonLS_R_fastIn)
	m.count(bpf.LockstepLsReasonLS_R_fastOut)
	m.freeSlot(slot)
	m.fromGuest(frame, 0, released)
	return 0, true
}
