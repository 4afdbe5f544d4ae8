// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
)

const (
	evSize  = int(unsafe.Sizeof(bpf.LockstepLsEv{}))
	recBase = int(unsafe.Offsetof(bpf.LockstepLsEvRec{}.Rec)) + int(bpf.LockstepLsConstLS_REC_BASE)
)

// batch bounds the events of one Poll.
const batch = 256

// receiver turns the records in the kernel's ring into events.
type receiver struct {
	ring     *ringbuf.Reader
	waiter   *waiter
	frames   *frames
	counters *counters
	buffers  [batch]eventBuffer
	noUFO    bool // a mutation, only tests set it: what the guest left as UFO leaves as USO
}

// eventBuffer holds what the views in an event point to, until the next Poll.
type eventBuffer struct {
	record ringbuf.Record
	sample sample
	bounds []compare.Bound
	tagged [int(bpf.LockstepLsConstLS_L4MAX) + 4]byte // a template with its VLAN tag
}

// sample is room for any ring record, aligned as the records are.
type sample [118]uint64

func newReceiver(ring *ebpf.Map, f *frames, c *counters) (*receiver, error) {
	reader, err := ringbuf.NewReader(ring)
	if err != nil {
		return nil, fmt.Errorf("ring: %w", err)
	}
	reader.SetDeadline(time.Unix(1, 0)) // in the past: only the waiter waits
	w, err := newWaiter(ring.FD())
	if err != nil {
		return nil, errors.Join(err, reader.Close())
	}
	return &receiver{ring: reader, waiter: w, frames: f, counters: c}, nil
}

func (r *receiver) close() error { return errors.Join(r.ring.Close(), r.waiter.close()) }

// Wake implements [datapath.NIC].
func (r *receiver) Wake() { r.waiter.wakeUp() }

// Poll implements [datapath.NIC].
func (r *receiver) Poll(wait time.Duration, evs []compare.Event) ([]compare.Event, error) {
	if r.ring.AvailableBytes() == 0 {
		if err := r.waiter.wait(wait); err != nil {
			return evs, err
		}
	}
	for i := 0; i < batch && r.ring.AvailableBytes() > 0; i++ {
		b := &r.buffers[i]
		b.record.RawSample = bytesOf(&b.sample)[:0]
		if err := r.ring.ReadInto(&b.record); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break // there were only discarded ones
			}
			return evs, fmt.Errorf("read ring: %w", err)
		}
		var ok bool
		if evs, ok = r.event(b, evs); !ok {
			r.counters.lost.events.Add(1)
		}
	}
	return evs, nil
}

// discard reads the ring empty.
func (r *receiver) discard() error {
	r.ring.SetDeadline(time.Now())
	rec := ringbuf.Record{RawSample: bytesOf(&r.buffers[0].sample)[:0]}
	for {
		err := r.ring.ReadInto(&rec)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read ring: %w", err)
		}
	}
}

// event turns the ring record in b into an event. It reports whether the record made
// sense; the slot of one that did not is freed.
func (r *receiver) event(b *eventBuffer, evs []compare.Event) ([]compare.Event, bool) {
	p, size := unsafe.Pointer(&b.sample), len(b.record.RawSample)
	switch typ := bpf.LockstepLsEvType(b.sample[0]); {
	case typ == bpf.LockstepLsEvTypeLS_EV_REC && size >= recBase:
		return b.peerRecord((*bpf.LockstepLsEvRec)(p), evs)
	case typ != bpf.LockstepLsEvTypeLS_EV_REC && size >= evSize:
		return r.frameEvent(b, typ, (*bpf.LockstepLsEv)(p), evs)
	}
	return evs, false
}

// peerRecord is the event of an authentic peer frame.
func (b *eventBuffer) peerRecord(ev *bpf.LockstepLsEvRec, evs []compare.Event) ([]compare.Event, bool) {
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
func (r *receiver) frameEvent(b *eventBuffer, typ bpf.LockstepLsEvType, ev *bpf.LockstepLsEv, evs []compare.Event) ([]compare.Event, bool) {
	slot := compare.Slot(ev.Slot)
	hdr := ev.Hdr[:min(int(ev.HdrLen), len(ev.Hdr))]
	ok := true
	if slot != compare.NoSlot {
		ok = r.frames.add(slot, frameMeta{
			l3: uint32(ev.L3Off), l4: uint32(ev.L4Off), pay: uint32(ev.PayOff), paylen: ev.Paylen, gso: ev.GsoSize,
			tpid: tpid(ev), tci: ev.Tci, udp: ev.T.Proto == protoUDP, ufo: ev.Flags&uint8(bpf.LockstepLsEvFlagLS_EV_UFO) != 0 && !r.noUFO,
			partial: ev.Flags&uint8(bpf.LockstepLsEvFlagLS_EV_PARTIAL) != 0, csumStart: ev.CsumStart, csumOff: ev.CsumOffset,
		})
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
			s.Header = append(appendTag(append(b.tagged[:0], hdr[:12]...), tpid(ev), ev.Tci), hdr[12:l4]...)
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
			r.frames.free(slot)
		}
		return evs, false
	}
	if slot != compare.NoSlot && !s.Datagram && typ != bpf.LockstepLsEvTypeLS_EV_PARK {
		s.Payload = r.frames.payload(slot)
	}
	return append(evs, e), true
}
