// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"slices"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// priOut is bpf/pri_out.bpf.c: the PVM's output, and released frames.
func (m *machine) priOut(b []byte, gso uint16, from mark) {
	mode := m.mode()
	solo, hold := mode == bpf.LockstepLsModeLS_MODE_SOLO, mode == bpf.LockstepLsModeLS_MODE_HOLD
	switch {
	case from == released && !solo && !hold && !m.off(bpf.LockstepLsMutationLS_MUTATE_MODE):
		m.count(bpf.LockstepLsReasonLS_R_shut)
		return
	case from == released:
		m.priLeave(b, gso, bpf.LockstepLsReasonLS_R_releasedOut)
		return
	case solo:
		m.priLeave(b, gso, bpf.LockstepLsReasonLS_R_passed)
		return
	case !hold:
		m.count(bpf.LockstepLsReasonLS_R_shut)
		return
	}
	switch p := &m.p; p.Parse(b, false) {
	case bpfmodel.ClassTCP:
		m.priTCP(b, gso, p)
	case bpfmodel.ClassDatagram:
		if m.primaryOnly(p) {
			m.priLeave(b, gso, bpf.LockstepLsReasonLS_R_primaryOnly)
		} else {
			m.priDatagram(b, gso, p)
		}
	case bpfmodel.ClassLink:
		if !m.leased() {
			m.count(bpf.LockstepLsReasonLS_R_muted)
			return
		}
		m.count(bpf.LockstepLsReasonLS_R_passed)
		m.leave(b, gso)
	default:
		m.count(bpf.LockstepLsReasonLS_R_malformed)
	}
}

func (m *machine) priDatagram(b []byte, gso uint16, p *bpfmodel.Segment) {
	switch v, slot, number := m.fast.datagram(b, gso, p); v {
	case fastPass:
		m.priLeave(b, gso, bpf.LockstepLsReasonLS_R_fastPassed)
	case fastNot:
		m.count(m.priHold(b, gso, p, false, slot, number))
	}
}

func (m *machine) priTCP(b []byte, gso uint16, p *bpfmodel.Segment) {
	m.strip(p)
	flags := p.TCP().Flags()
	v, slot, number := m.fast.pvm(b, gso, p)
	switch v {
	case fastPass:
		m.priLeave(b, gso, bpf.LockstepLsReasonLS_R_fastPassed)
		return
	case fastHeld:
		return
	}
	if p.Pay == p.End && flags&(bpfmodel.SYN|bpfmodel.FIN|bpfmodel.RST) == 0 {
		e := m.event(b, gso, p, true, bpf.LockstepLsEvTypeLS_EV_PVM)
		if e == nil {
			m.count(bpf.LockstepLsReasonLS_R_noRing)
			return
		}
		e.frame().Number = number
		m.count(bpf.LockstepLsReasonLS_R_heldAck)
		return
	}
	if m.notOpen(p) && m.crowded() {
		m.count(bpf.LockstepLsReasonLS_R_crowded)
		return
	}
	why := m.priHold(b, gso, p, true, slot, number)
	if why != bpf.LockstepLsReasonLS_R_held || flags&(bpfmodel.SYN|bpfmodel.RST) != bpfmodel.SYN {
		m.count(why)
		return
	}
	// A SYN that is held is announced (R9).
	r := m.begin(bpf.LockstepLsRecTypeLS_REC_ANNOUNCE, dirP2S)
	m.describe(p)
	r.Inc = r.Seq
	m.count(bpf.LockstepLsReasonLS_R_announced)
	m.send(b, recOff(p))
}

// priHold holds a frame, which is in slot already unless that is NoSlot. It returns held, or why it is lost.
func (m *machine) priHold(b []byte, gso uint16, p *bpfmodel.Segment, tcp bool, slot, number uint32) bpf.LockstepLsReason {
	e := m.event(b, gso, p, tcp, bpf.LockstepLsEvTypeLS_EV_PVM)
	kept := slot != uint32(compare.NoSlot)
	if e == nil {
		if kept {
			m.freeSlot(slot)
		}
		return bpf.LockstepLsReasonLS_R_noRing
	}
	ev := e.frame()
	ev.Number = number
	if p.Datagram || gso == 0 { // else user space digests it
		ev.Sum = m.digestDatagram(p, m.quote.Find(p, false))
	}
	why := bpf.LockstepLsReasonLS_R_held
	if ev.Slot = slot; !kept {
		why = m.keep(b, p, tcp, ev)
	}
	if why == bpf.LockstepLsReasonLS_R_held && tcp && m.fast.opened(b, p, ev.Slot) {
		ev.Flags |= uint8(bpf.LockstepLsEvFlagLS_EV_OPENED)
	}
	// A segment without a slot is reported too: it leaves a hole before what follows it.
	e.discarded = why != bpf.LockstepLsReasonLS_R_held && (why != bpf.LockstepLsReasonLS_R_noSlot || p.Datagram)
	return why
}

// priLeave lets a frame out of the host, if the output lease is valid.
func (m *machine) priLeave(b []byte, gso uint16, why bpf.LockstepLsReason) {
	if !m.leased() {
		m.count(bpf.LockstepLsReasonLS_R_muted)
		return
	}
	if m.conf.Edges != 0 {
		switch p := &m.p; p.Parse(b, false) {
		case bpfmodel.ClassTCP:
			if !m.table.EdgeOut(p, m.host.Now()) {
				m.inDoubt(p)
				return
			}
		case bpfmodel.ClassDatagram:
			if m.quote.Find(p, false) {
				m.table.EdgeError(&m.quote, false)
			}
		}
	}
	m.count(why)
	m.leave(b, gso)
}

// mirror is bpf/mirror.bpf.c: frames that the guest is about to receive.
func (m *machine) mirror(b []byte, from mark) {
	mode := m.mode()
	hold := mode == bpf.LockstepLsModeLS_MODE_HOLD
	switch {
	case !hold && (from == mirrored || mode != bpf.LockstepLsModeLS_MODE_SOLO):
		m.count(bpf.LockstepLsReasonLS_R_shut)
		return
	case from == mirrored: // it has the guest's numbers already
		m.count(bpf.LockstepLsReasonLS_R_sacked)
		m.host.ToGuest(b)
		return
	}
	p := &m.p
	class := p.Parse(b, true)
	if m.conf.Edges != 0 {
		if class == bpfmodel.ClassTCP {
			m.table.EdgeIn(p, m.host.Now())
		} else if class == bpfmodel.ClassDatagram && m.quote.Find(p, true) {
			m.table.EdgeError(&m.quote, true)
		}
	}
	why := bpf.LockstepLsReasonLS_R_mirrored
	if class == bpfmodel.ClassTCP {
		m.strip(p)
		if hold {
			why = m.mirrorReport(b, p)
		} else {
			m.note(b, p)
		}
	}
	switch {
	case !hold:
		why = bpf.LockstepLsReasonLS_R_passed
	case why == bpf.LockstepLsReasonLS_R_mirrored:
		m.host.ToPeer(slices.Clone(b))
	default: // user space must know of it and does not: it reaches neither guest
		m.count(why)
		return
	}
	m.count(why)
	m.host.ToGuest(b)
}

// mirrorReport reports the remote's SYN, FIN and RST.
func (m *machine) mirrorReport(b []byte, p *bpfmodel.Segment) bpf.LockstepLsReason {
	if m.notOpen(p) && m.crowded() {
		return bpf.LockstepLsReasonLS_R_crowded
	}
	m.note(b, p)
	if p.TCP().Flags()&(bpfmodel.SYN|bpfmodel.FIN|bpfmodel.RST) != 0 && m.event(b, 0, p, true, bpf.LockstepLsEvTypeLS_EV_CLIENT) == nil {
		return bpf.LockstepLsReasonLS_R_noRing
	}
	return bpf.LockstepLsReasonLS_R_mirrored
}

// note keeps the remote's newest segment (R6).
func (m *machine) note(b []byte, p *bpfmodel.Segment) {
	h := p.TCP()
	flags := h.Flags()
	c := m.cli.Get(p.Tuple)
	if c != nil && flags&(bpfmodel.SYN|bpfmodel.RST) == 0 &&
		(flags&bpfmodel.ACK == 0 ||
			bpfmodel.Flags(c.TcpFlags)&(bpfmodel.ACK|bpfmodel.RST) == bpfmodel.ACK && int32(c.Ack-h.Ack()) > 0) {
		return
	}
	now := uint64(m.host.Now())
	fresh := c == nil
	if fresh {
		c = m.cli.Make(p.Tuple)
	}
	if flags&bpfmodel.SYN != 0 && bpfmodel.Flags(c.TcpFlags)&bpfmodel.SYN == 0 {
		c.Reused = 0
		if !fresh && now-c.At < reusedNS {
			c.Reused = 1
		}
	}
	c.At = now
	c.Seq, c.Ack, c.Win, c.TcpFlags = p.PayloadPos()+uint32(p.End-p.Pay), h.Ack(), h.Win(), uint8(flags)
	c.L4Off, c.HdrLen = uint16(p.L4), 0
	if p.Pay <= hdrMax {
		c.HdrLen = uint16(copy(c.Hdr[:p.Pay], b))
	}
}

// digestRx is bpf/digest_rx.bpf.c: records of the SVM's output.
func (m *machine) digestRx(b []byte) {
	if m.mode() != bpf.LockstepLsModeLS_MODE_HOLD {
		m.count(bpf.LockstepLsReasonLS_R_shut)
		return
	}
	if !isPeerFrame(b) {
		m.count(bpf.LockstepLsReasonLS_R_peerJunk)
		return
	}
	why, off := m.check(b, dirS2P)
	gap := uint64(0)
	if why == bpf.LockstepLsReasonLS_R_recordIn {
		why, gap = m.replay()
	}
	if why != bpf.LockstepLsReasonLS_R_recordIn {
		m.count(why)
		return
	}
	r, c := &m.rec, &m.conf
	number := uint32(0)
	if r.Type == uint8(bpf.LockstepLsRecTypeLS_REC_DATA) {
		if gap != 0 {
			number = m.fast.giveUp(core.FromTuple(&r.T))
		} else {
			var done bool
			if number, done = m.fast.record(); done {
				return
			}
		}
	} else if r.Type == uint8(bpf.LockstepLsRecTypeLS_REC_DGRAM) {
		if gap != 0 {
			number = m.fast.giveUpDatagram(&r.T, r.Frag)
		} else {
			var done bool
			if number, done = m.fast.datagramRecord(); done {
				return
			}
		}
	}
	switch typ := bpf.LockstepLsRecType(r.Type); {
	case typ == bpf.LockstepLsRecTypeLS_REC_ECHO: // R20
		c.LeaseUntil = max(c.LeaseUntil, r.Sum[0]+c.LeaseDuration)
		c.Echoed = uint64(m.host.Now())
		m.count(bpf.LockstepLsReasonLS_R_echoIn)
	case typ == bpf.LockstepLsRecTypeLS_REC_DATA && bpfmodel.Flags(r.TcpFlags)&bpfmodel.SYN != 0 && m.crowded():
		m.count(bpf.LockstepLsReasonLS_R_crowded)
	case m.report(number):
		m.count(bpf.LockstepLsReasonLS_R_recordIn)
	default:
		m.count(bpf.LockstepLsReasonLS_R_noRing)
	}
	if gap == 0 || r.Stream == streamUser || m.off(bpf.LockstepLsMutationLS_MUTATE_R6) {
		return
	}
	stream, last := r.Stream, r.StreamNo-1
	r = m.begin(bpf.LockstepLsRecTypeLS_REC_NACK, dirP2S)
	r.Stride, r.Sum = uint32(stream), [2]uint64{gap, last}
	m.count(bpf.LockstepLsReasonLS_R_nackOut)
	m.send(b, off)
}
