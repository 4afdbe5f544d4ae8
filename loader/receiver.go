// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/binary"
	"unsafe"

	"errors"
	"fmt"
	"github.com/cilium/ebpf/ringbuf"
	"lockstep/bpf"
	"lockstep/compare"
	"os"
	"time"
)

const (
	evSize  = int(unsafe.Sizeof(bpf.LockstepLsEv{}))
	recBase = int(unsafe.Offsetof(bpf.LockstepLsEvRec{}.Rec)) + int(bpf.LockstepLsConstLS_REC_BASE)
)

// event turns ring record i, size bytes long, into an event. It reports whether
// the record made sense; the slot of one that did not is freed.
func (n *NIC) event(i, size int, evs []compare.Event) ([]compare.Event, bool) {
	p := unsafe.Pointer(&n.samples[i])
	switch typ := bpf.LockstepLsEvType(n.samples[i][0]); {
	case typ == bpf.LockstepLsEvTypeLS_EV_REC && size >= recBase:
		return n.record(i, (*bpf.LockstepLsEvRec)(p), evs)
	case typ != bpf.LockstepLsEvTypeLS_EV_REC && size >= evSize:
		return n.frameEvent(i, typ, (*bpf.LockstepLsEv)(p), evs)
	}
	return evs, false
}

// record takes an authentic peer frame.
func (n *NIC) record(i int, ev *bpf.LockstepLsEvRec, evs []compare.Event) ([]compare.Event, bool) {
	r := &ev.Rec
	if int(r.Optlen) > len(r.Opts) || int(r.Nsum) > len(r.Bound) {
		return evs, false
	}
	e := compare.Event{Seg: compare.Segment{
		Tuple: fromTuple(&r.T),
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
		bounds := n.bounds[i][:0]
		for b := range r.Bound[:r.Nsum] {
			bounds = append(bounds, compare.Bound{Pos: s.PayloadStart() + uint32(b+1)*r.Stride, Sum: r.Bound[b]})
		}
		n.bounds[i] = bounds
		s.Bounds = bounds
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

// frameEvent takes an event about a frame of the guest or for it.
func (n *NIC) frameEvent(i int, typ bpf.LockstepLsEvType, ev *bpf.LockstepLsEv, evs []compare.Event) ([]compare.Event, bool) {
	slot := compare.Slot(ev.Slot)
	hdr := ev.Hdr[:min(int(ev.HdrLen), len(ev.Hdr))]
	ok := true
	if slot != compare.NoSlot {
		m := frameMeta{
			l3: uint32(ev.L3Off), l4: uint32(ev.L4Off), pay: uint32(ev.PayOff), paylen: ev.Paylen, gso: ev.GsoSize,
			tpid: tpid(ev), tci: ev.Tci, udp: ev.T.Proto == protoUDP, ufo: ev.Flags&uint8(bpf.LockstepLsEvFlagLS_EV_UFO) != 0 && !n.noUFO,
			partial: ev.Flags&uint8(bpf.LockstepLsEvFlagLS_EV_PARTIAL) != 0, csumStart: ev.CsumStart, csumOff: ev.CsumOffset,
		}
		ok = uint64(m.pay)+uint64(m.paylen) <= uint64(len(n.slots.data(slot)))
		n.meta[slot] = m
	}
	e := compare.Event{Seg: compare.Segment{
		Tuple: fromTuple(&ev.T),
		Seq:   ev.Seq, Len: ev.Paylen, Ack: ev.Ack, Win: ev.Win, Flags: compare.Flags(ev.TcpFlags),
		Sum: ev.Sum, Slot: slot, GSO: ev.GsoSize, At: int64(ev.At),
		Inc: ev.Inc, Inherited: ev.Flags&uint8(bpf.LockstepLsEvFlagLS_EV_INHERITED) != 0, ClientAck: ev.CliAck,
		Datagram: ev.Flags&uint8(bpf.LockstepLsEvFlagLS_EV_DGRAM) != 0, Frag: ev.Frag,
		Large: ev.FrameLen > uint32(bpf.LockstepLsConstLS_SLOT_DATA),
	}}
	s := &e.Seg
	if l4 := int(ev.L4Off); l4 >= ethLen && l4+tcpHdrLen <= len(hdr) {
		s.Flags = compare.Flags(binary.BigEndian.Uint16(hdr[l4+tcpFlagsOff:]) & flagsMask)
		s.Urg = binary.BigEndian.Uint16(hdr[l4+tcpUrgOff:])
		s.Header = hdr[:l4]
		if ev.Tci != 0 { // a template has its tag in its bytes
			s.Header = append(appendTag(append(n.tagged[i][:0], hdr[:12]...), tpid(ev), ev.Tci), hdr[12:l4]...)
		}
		if pay := int(ev.PayOff); pay >= l4+tcpHdrLen && pay <= len(hdr) {
			s.Opts = hdr[l4+tcpHdrLen : pay]
		}
	}
	switch typ {
	case bpf.LockstepLsEvTypeLS_EV_PVM:
		e.Kind = compare.EvPVM
		ok = ok && (s.Header != nil || s.Datagram)
	case bpf.LockstepLsEvTypeLS_EV_COPY:
		e.Kind = compare.EvCopy
	case bpf.LockstepLsEvTypeLS_EV_PARK:
		e.Kind = compare.EvPark
	case bpf.LockstepLsEvTypeLS_EV_CLIENT:
		e.Kind = compare.EvClient
	default:
		ok = false
	}
	if !ok {
		if slot != compare.NoSlot {
			delete(n.meta, slot)
			n.slots.free(slot)
		}
		return evs, false
	}
	if slot != compare.NoSlot && !s.Datagram && typ != bpf.LockstepLsEvTypeLS_EV_PARK {
		s.Payload = n.slots.data(slot)[ev.PayOff:][:ev.Paylen:ev.Paylen]
	}
	return append(evs, e), true
}

// batch bounds the events of one Poll.
const batch = 256

// sample is room for any ring record, aligned as the records are.
type sample [118]uint64

// Wake implements [datapath.NIC].
func (n *NIC) Wake() { n.waiter.wakeUp() }

// Poll implements [datapath.NIC].
func (n *NIC) Poll(wait time.Duration, evs []compare.Event) ([]compare.Event, error) {
	if n.ring.AvailableBytes() == 0 {
		if err := n.waiter.wait(wait); err != nil {
			return evs, err
		}
	}
	for i := 0; i < batch && n.ring.AvailableBytes() > 0; i++ {
		r := &n.records[i]
		r.RawSample = bytesOf(&n.samples[i])[:0]
		if err := n.ring.ReadInto(r); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break // discarded ones alone
			}
			return evs, fmt.Errorf("read ring: %w", err)
		}
		var ok bool
		if evs, ok = n.event(i, len(r.RawSample), evs); !ok {
			n.lost.events.Add(1)
		}
	}
	return evs, nil
}

// discard reads the ring empty.
func (n *NIC) discard() error {
	n.ring.SetDeadline(time.Now())
	r := ringbuf.Record{RawSample: bytesOf(&n.samples[0])[:0]}
	for {
		err := n.ring.ReadInto(&r)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read ring: %w", err)
		}
	}
}
