// SPDX-License-Identifier: Apache-2.0

package core

import (
	"encoding/binary"
	"unsafe"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
)

const (
	evSize  = int(unsafe.Sizeof(bpf.LockstepLsEv{}))
	recBase = int(unsafe.Offsetof(bpf.LockstepLsEvRec{}.Rec)) + int(bpf.LockstepLsConstLS_REC_BASE)
)

// Decoder turns the records in the kernel's ring into events.
type Decoder struct {
	Frames *Store
	Seen   *Numbers // nil: nobody asks
	// Buckets takes the flow of an event from the kernel first; nil: there is no fast path. An error leaves it there,
	// and its timer tells again.
	Buckets *Buckets
	NoUFO   bool // a mutation, only tests set it: what the guest left as UFO leaves as USO
}

// Buffer has a ring record, and what the views in its event point to.
type Buffer struct {
	Sample Sample
	bounds []compare.Bound
	tagged [int(bpf.LockstepLsConstLS_L4MAX) + 4]byte // a template with its VLAN tag
}

// Sample is room for any ring record, aligned as the records are.
type Sample [118]uint64

// Event appends the event of the ring record of size bytes in b. It reports whether the
// record made sense; the slot of one that did not is freed. The event's views last as
// long as b does.
func (d *Decoder) Event(b *Buffer, size int, evs []compare.Event) ([]compare.Event, bool) {
	p := unsafe.Pointer(&b.Sample)
	switch typ := bpf.LockstepLsEvType(b.Sample[0]); {
	case typ == bpf.LockstepLsEvTypeLS_EV_REC && size >= recBase:
		ev := (*bpf.LockstepLsEvRec)(p)
		if ev.Rec.Type == uint8(bpf.LockstepLsRecTypeLS_REC_DGRAM) {
			evs, _ = d.Buckets.before(d, &ev.Rec.T, ev.Number, int64(ev.At), evs)
		} else {
			d.Seen.note(&ev.Rec.T, ev.Number)
		}
		return b.peerRecord(ev, evs)
	case typ != bpf.LockstepLsEvTypeLS_EV_REC && size >= evSize:
		ev := (*bpf.LockstepLsEv)(p)
		if ev.T.Proto != ProtoUDP {
			d.Seen.note(&ev.T, ev.Number)
			return d.frameEvent(b, typ, ev, evs)
		}
		evs, _ = d.Buckets.before(d, &ev.T, ev.Number, int64(ev.At), evs)
		if typ == bpf.LockstepLsEvTypeLS_EV_YIELD {
			return evs, true // for nothing else
		}
		return d.frameEvent(b, typ, ev, evs)
	}
	return evs, false
}

// peerRecord is the event of an authentic peer frame.
func (b *Buffer) peerRecord(ev *bpf.LockstepLsEvRec, evs []compare.Event) ([]compare.Event, bool) {
	r := &ev.Rec
	if int(r.Optlen) > len(r.Opts) || int(r.Nsum) > len(r.Bound) {
		return evs, false
	}
	e := compare.Event{Seg: compare.Segment{
		Tuple: FromTuple(&r.T),
		Seq:   r.Seq, Ack: r.Ack, Win: r.Win, Flags: compare.Flags(r.TcpFlags), Opts: r.Opts[:r.Optlen],
		Sum: r.Sum, Slot: compare.NoSlot, Inc: r.Inc, Inherited: r.Flags&uint8(bpf.LockstepLsRecFlagLS_REC_INHERITED) != 0,
		Epoch: r.Epoch, At: int64(ev.At),
	}}
	s := &e.Seg
	s.Len = r.End - r.Seq
	switch bpf.LockstepLsRecType(r.Type) {
	case bpf.LockstepLsRecTypeLS_REC_DATA:
		e.Kind = compare.EvSVM
		for _, f := range []compare.Flags{compare.SYN, compare.FIN} {
			if s.Flags&f != 0 {
				s.Len--
			}
		}
		b.bounds = b.bounds[:0]
		for i := range r.Bound[:r.Nsum] {
			b.bounds = append(b.bounds, compare.Bound{Pos: s.PayloadStart() + uint32(i+1)*r.Stride, Sum: r.Bound[i]})
		}
		s.Bounds = b.bounds
	case bpf.LockstepLsRecTypeLS_REC_DGRAM:
		e.Kind = compare.EvSVM
		s.Datagram, s.Frag = true, r.Frag
	case bpf.LockstepLsRecTypeLS_REC_NEIGH:
		e.Kind = compare.EvNeigh
	case bpf.LockstepLsRecTypeLS_REC_MARK:
		e.Kind, e.Epoch = compare.EvMark, r.Epoch
	case bpf.LockstepLsRecTypeLS_REC_ANSWER:
		e.Kind = compare.EvAnswer
	case bpf.LockstepLsRecTypeLS_REC_ASK:
		e.Kind = compare.EvAsk
	default:
		return evs, false
	}
	return append(evs, e), true
}

// frameEvent is the event of a frame of the guest or for it.
func (d *Decoder) frameEvent(b *Buffer, typ bpf.LockstepLsEvType, ev *bpf.LockstepLsEv, evs []compare.Event) ([]compare.Event, bool) {
	slot := compare.Slot(ev.Slot)
	if ev.Flags&uint8(bpf.LockstepLsEvFlagLS_EV_OPENED) != 0 { // it is the kernel's
		slot = compare.NoSlot
	}
	hdr := ev.Hdr[:min(int(ev.HdrLen), len(ev.Hdr))]
	ok := true
	if slot != compare.NoSlot {
		ok = d.Frames.add(slot, frameMeta{
			l3: uint32(ev.L3Off), l4: uint32(ev.L4Off), pay: uint32(ev.PayOff), paylen: ev.Paylen, gso: ev.GsoSize,
			tpid: tpid(ev), tci: ev.Tci, udp: ev.T.Proto == ProtoUDP, ufo: ev.Flags&uint8(bpf.LockstepLsEvFlagLS_EV_UFO) != 0 && !d.NoUFO,
			partial: ev.Flags&uint8(bpf.LockstepLsEvFlagLS_EV_PARTIAL) != 0, csumStart: ev.CsumStart, csumOff: ev.CsumOffset,
		})
	}
	e := compare.Event{Seg: compare.Segment{
		Tuple: FromTuple(&ev.T),
		Seq:   ev.Seq, Len: ev.Paylen, Ack: ev.Ack, Win: ev.Win, Flags: compare.Flags(ev.TcpFlags),
		Sum: ev.Sum, Slot: slot, GSO: ev.GsoSize, At: int64(ev.At),
		Inc: ev.Inc, Inherited: ev.Flags&uint8(bpf.LockstepLsEvFlagLS_EV_INHERITED) != 0, ClientAck: ev.CliAck,
		Datagram: ev.Flags&uint8(bpf.LockstepLsEvFlagLS_EV_DGRAM) != 0, Frag: ev.Frag,
		Large: ev.FrameLen > uint32(bpf.LockstepLsConstLS_SLOT_DATA),
	}}
	s := &e.Seg
	if l4 := int(ev.L4Off); l4 >= EthLen && l4+TCPLen <= len(hdr) {
		s.Flags = compare.Flags(binary.BigEndian.Uint16(hdr[l4+tcpFlagsOff:]) & flagsMask)
		s.Urg = binary.BigEndian.Uint16(hdr[l4+TCPUrg:])
		s.Header = hdr[:l4]
		if ev.Tci != 0 { // a template has its tag in its bytes
			s.Header = append(AppendTag(append(b.tagged[:0], hdr[:12]...), tpid(ev), ev.Tci), hdr[12:l4]...)
		}
		if pay := int(ev.PayOff); pay >= l4+TCPLen && pay <= len(hdr) {
			s.Opts = hdr[l4+TCPLen : pay]
		}
	}
	switch typ {
	case bpf.LockstepLsEvTypeLS_EV_PVM:
		if e.Kind = compare.EvPVM; ev.Flags&uint8(bpf.LockstepLsEvFlagLS_EV_OPENED) != 0 {
			d.Seen.Begin(s.Tuple)
			e.Kind = compare.EvOpened
		}
		ok = ok && (s.Header != nil || s.Datagram)
	case bpf.LockstepLsEvTypeLS_EV_COPY:
		e.Kind = compare.EvCopy
	case bpf.LockstepLsEvTypeLS_EV_PARK:
		e.Kind = compare.EvPark
	case bpf.LockstepLsEvTypeLS_EV_CLIENT:
		e.Kind = compare.EvClient
	case bpf.LockstepLsEvTypeLS_EV_YIELD:
		e.Kind = compare.EvYield
	default:
		ok = false
	}
	if !ok {
		if slot != compare.NoSlot {
			d.Frames.free(slot)
		}
		return evs, false
	}
	if slot != compare.NoSlot && !s.Datagram && typ != bpf.LockstepLsEvTypeLS_EV_PARK {
		s.Payload = d.Frames.payload(slot)
	}
	return append(evs, e), true
}
