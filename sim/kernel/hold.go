// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"encoding/binary"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// This file is the model of bpf/hold.h: frames kept in slots, and the events of them.

const (
	probes     = 32 // slots tried before giving up
	dgramShare = int(bpf.LockstepLsConstLS_DGRAM_SHARE)
	slotRoom   = int(bpf.LockstepLsConstLS_SLOT_DATA)
	largeRoom  = int(bpf.LockstepLsConstLS_GSLOT_DATA)
	slotLarge  = uint32(bpf.LockstepLsConstLS_SLOT_GSO)
	hdrMax     = int(bpf.LockstepLsConstLS_HDR_MAX)
	reusedNS   = uint64(bpf.LockstepLsConstLS_REUSED_NS)

	slotFree  = uint32(bpf.LockstepLsSlotStateLS_SLOT_FREE)
	slotReady = uint32(bpf.LockstepLsSlotStateLS_SLOT_READY)
	slotData  = core.SlotSize - slotRoom // where a slot's frame begins
)

// Classes of slots, by which each has a cursor: TCP, datagrams, both again of large frames,
// SYNs.
const (
	classTCP = iota
	classDatagram
	classLarge
	classLargeDatagram
	classSYN
	classes
)

// crowded: once half of the ring is used, frames of connections that are not open are
// refused (R11).
func (m *machine) crowded() bool {
	return m.ring.crowded() && !m.off(bpf.LockstepLsMutationLS_MUTATE_FLOOD)
}

// notOpen (P): does the frame open a connection, or end one that the remote has not opened?
func (m *machine) notOpen(p *bpfmodel.Segment) bool {
	flags := p.TCP().Flags()
	if flags&bpfmodel.SYN != 0 {
		return true
	}
	if flags&(bpfmodel.RST|bpfmodel.FIN) == 0 {
		return false
	}
	c := m.cli.Get(p.Tuple)
	return c == nil || bpfmodel.Flags(c.TcpFlags)&(bpfmodel.SYN|bpfmodel.RST) != 0
}

func (m *machine) slotClass(p *bpfmodel.Segment, tcp bool, large bool) int {
	switch {
	case large && p.Datagram:
		return classLargeDatagram
	case large:
		return classLarge
	case p.Datagram:
		return classDatagram
	case tcp && p.TCP().Flags()&bpfmodel.SYN != 0 && !m.off(bpf.LockstepLsMutationLS_MUTATE_FLOOD):
		return classSYN
	}
	return classTCP
}

// claim finds a free slot among n of size bytes in mem. Half of the probes are spread evenly from a
// random place.
func (m *machine) claim(mem []byte, size int, p *bpfmodel.Segment, tcp, large bool) (slot []byte, index uint32) {
	n := len(mem) / size
	first, share := 0, n/dgramShare
	switch syn := m.slotClass(p, tcp, false) == classSYN; {
	case p.Datagram:
		n = max(share, 1)
	case syn && share > 0:
		first, n = share, share
	default:
		first, n = share, n-share
	}
	cursor := &m.cursor[m.slotClass(p, tcp, large)]
	at, step := *cursor, uint32(1)
	for i := range uint32(probes) {
		if n == 0 {
			break
		}
		if i == probes/2 && n > probes { // else all are probed
			at, step = m.host.Rand.Uint32()%uint32(n), uint32(n)/(probes/2)
		}
		key := uint32(first) + at%uint32(n)
		at += step
		if int(key) >= len(mem)/size {
			break
		}
		slot := mem[int(key)*size:][:size]
		if binary.LittleEndian.Uint32(slot) == slotFree {
			*cursor = key - uint32(first) + 1
			return slot, key
		}
	}
	*cursor = m.host.Rand.Uint32()
	return nil, 0
}

// keep copies the frame into a slot. It returns held, or why it could not.
func (m *machine) keep(b []byte, p *bpfmodel.Segment, tcp bool, ev *bpf.LockstepLsEv) bpf.LockstepLsReason {
	mem, size, bit := m.slots.Small, core.SlotSize, uint32(0)
	if len(b) > slotRoom {
		mem, size, bit = m.slots.Large, core.LargeSize, slotLarge
	}
	if len(b) > largeRoom {
		return bpf.LockstepLsReasonLS_R_tooLong
	}
	slot, index := m.claim(mem, size, p, tcp, bit != 0)
	if slot == nil || len(b) == 0 {
		return bpf.LockstepLsReasonLS_R_noSlot
	}
	copy(slot[slotData:], b)
	binary.LittleEndian.PutUint32(slot[4:], uint32(len(b)))
	binary.LittleEndian.PutUint32(slot, slotReady)
	ev.Slot = index | bit
	return bpf.LockstepLsReasonLS_R_held
}

// event reserves an event and fills in what comes from the frame itself; nil: the ring is
// full.
func (m *machine) event(b []byte, gso uint16, p *bpfmodel.Segment, tcp bool, typ bpf.LockstepLsEvType) *entry {
	e := m.ring.reserve(frameSize)
	if e == nil {
		return nil
	}
	ev := e.frame()
	ev.Type, ev.Slot, ev.At = uint32(typ), uint32(compare.NoSlot), uint64(m.host.Now())
	ev.T = core.ToTuple(p.Tuple)
	ev.Paylen = uint32(p.End - p.Pay)
	ev.GsoSize = gso
	ev.L3Off, ev.L4Off, ev.PayOff = uint16(p.L3), uint16(p.L4), uint16(p.Pay)
	ev.Frag, ev.FrameLen = p.Frag, uint32(len(b))
	switch {
	case tcp:
		h := p.TCP()
		ev.Seq, ev.Ack, ev.Win, ev.TcpFlags = h.Seq(), h.Ack(), h.Win(), uint8(h.Flags())
		if p.Pay <= hdrMax {
			ev.HdrLen = uint16(copy(ev.Hdr[:p.Pay], b))
		}
	case p.Datagram:
		ev.Seq = p.Pos
		ev.Flags = uint8(bpf.LockstepLsEvFlagLS_EV_DGRAM)
	}
	return e
}

// digest is that of the payload of p, and with a stride those at the boundaries, which it
// writes to m.rec.
func (m *machine) digest(p *bpfmodel.Segment, stride int) (sum compare.Sum, bounds int) {
	keys, pos, rest := &m.keys.digest[m.conf.KeyIndex&1], p.PayloadPos(), p.Payload()
	for stride > 0 && len(rest) > stride {
		sum = add(sum, keys.Sum(pos, rest[:stride]))
		m.rec.Bound[bounds] = sum
		bounds++
		pos += uint32(stride)
		rest = rest[stride:]
	}
	return add(sum, keys.Sum(pos, rest)), bounds
}

func add(a, b compare.Sum) compare.Sum { return compare.Sum{a[0] + b[0], a[1] + b[1]} }

// digestDatagram leaves out the checksum that the guest's own error quotes.
func (m *machine) digestDatagram(p *bpfmodel.Segment, quotes bool) compare.Sum {
	if quotes {
		defer m.quote.SetChecksum(m.quote.ClearChecksum())
	}
	sum, _ := m.digest(p, 0)
	return sum
}

// stride is that of a large frame's boundaries: the smallest multiple of the segment size
// that gives as many as a record has room for.
func stride(gso uint16, paylen int) int {
	if gso == 0 || paylen <= int(gso) {
		return 0
	}
	segs := (paylen - 1) / int(gso)
	return int(gso) * (segs/(int(bpf.LockstepLsConstLS_BOUND_MAX)+1) + 1)
}

// report passes m.rec to user space. number: as in ls_ev.
func (m *machine) report(number uint32) bool {
	n := recordMinSize
	if m.rec.Nsum > 0 {
		n = recordSize
	}
	e := m.ring.reserve(n)
	if e == nil {
		return false
	}
	ev := e.record()
	ev.Type, ev.Number, ev.At, ev.Rec = uint32(bpf.LockstepLsEvTypeLS_EV_REC), number, uint64(m.host.Now()), m.rec
	return true
}
