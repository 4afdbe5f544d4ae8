// SPDX-License-Identifier: Apache-2.0

package core

import (
	"bytes"
	"encoding/binary"
	"net"
	"testing"
	"unsafe"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
)

const aLargeSlot = compare.Slot(bpf.LockstepLsConstLS_SLOT_GSO)

// ringSeeds are a record of each kind, as the kernel writes them.
func ringSeeds(add func(record []byte, frameLen uint16)) {
	frame := []byte{
		2, 0, 0, 0, 0, 0xb, 2, 0, 0, 0, 0, 0xa, 8, 0,
		0x46, 0, 0, 0, 0, 0, 0, 0, 64, ProtoTCP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 1, 1, 1, 1,
		0, 80, 0x9c, 0x40, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 0, 9, 0, 0, 0, 0,
	}
	for typ := range uint32(6) {
		for _, slot := range []compare.Slot{0, aLargeSlot, 7, compare.NoSlot} {
			ev := bpf.LockstepLsEv{
				Type: typ, Slot: uint32(slot), T: bpf.LockstepLsTuple{Gport: 80, Rport: 40000, Proto: ProtoTCP}, Seq: 1, Ack: 2, Win: 9, TcpFlags: 0x18,
				L3Off: 14, L4Off: 38, PayOff: 58, HdrLen: 58, Paylen: 40, FrameLen: 98, GsoSize: uint16(typ) * 10, Tci: uint16(typ),
			}
			copy(ev.Hdr[:], frame)
			add(BytesOf(&ev), 98)
			ev.Flags = uint8(bpf.LockstepLsEvFlagLS_EV_DGRAM)
			add(BytesOf(&ev), 14)
		}
	}
	for typ := range uint8(10) {
		ev := bpf.LockstepLsEvRec{Type: uint32(bpf.LockstepLsEvTypeLS_EV_REC), Rec: bpf.LockstepLsRec{Type: typ, Seq: 1, End: 41, TcpFlags: 3, Optlen: 6, Nsum: 2, Stride: 20}}
		add(BytesOf(&ev)[:recBase], 0)
		add(BytesOf(&ev), 0)
	}
}

// sink takes frames, whole and in the buffers that they have to fit into.
type sink struct {
	testing.TB
	lost, frames int
}

func (s *sink) Queue(head, tail []byte) {
	s.Helper()
	if s.frames++; len(head) < VnetLen+12 || len(head) > MaxHeader+signedMax {
		s.Errorf("a frame that begins with %d bytes", len(head))
	}
	_ = bytes.Count(tail, []byte{0}) // all of it is there
}

func (s *sink) Join(head, tail []byte) {
	s.Helper()
	s.frames--
	s.Queue(head, tail)
}

func (s *sink) Flush() {}
func (s *sink) Lost()  { s.lost++ }

// FuzzEvent: whatever the ring holds, it becomes an event whose frame can be sent, whole or in
// part, or is refused; its slot is free in the end.
func FuzzEvent(f *testing.F) {
	ringSeeds(func(record []byte, n uint16) { f.Add(record, n) })
	small, large := make([]uint64, 2*SlotSize/8), make([]uint64, LargeSize/8)
	d := &Decoder{Frames: NewStore(Slots{
		Small: unsafe.Slice((*byte)(unsafe.Pointer(&small[0])), 2*SlotSize),
		Large: unsafe.Slice((*byte)(unsafe.Pointer(&large[0])), LargeSize),
	})}
	tx := &Transmitter{Frames: d.Frames, Signer: Signer{Gate: &Gate{Conf: new(bpf.LockstepLsConf), Own: make(net.HardwareAddr, 6)}}}
	var b Buffer
	f.Fuzz(func(t *testing.T, record []byte, frameLen uint16) {
		clear(BytesOf(&b.Sample))
		size := copy(BytesOf(&b.Sample), record)
		for _, id := range []compare.Slot{0, 1, aLargeSlot} { // all are the daemon's
			e := d.Frames.Element(id)
			binary.NativeEndian.PutUint32(e, uint32(bpf.LockstepLsSlotStateLS_SLOT_READY))
			binary.NativeEndian.PutUint32(e[lenOffset:], uint32(frameLen))
			e[slotHeader+EthLen] = 0x45
		}
		evs, ok := d.Event(&b, size, nil)
		if ok != (len(evs) == 1) {
			t.Fatalf("%d events, %v", len(evs), ok)
		}
		ev, given := (*bpf.LockstepLsEv)(unsafe.Pointer(&b.Sample)), compare.NoSlot
		if size >= evSize && ev.Type != uint32(bpf.LockstepLsEvTypeLS_EV_REC) {
			given = compare.Slot(ev.Slot)
		}
		if ok {
			if evs[0].Seg.Slot != given {
				t.Fatalf("the event has slot %d, the record %d", evs[0].Seg.Slot, given)
			}
			out := &sink{TB: t}
			tx.ToTap, tx.Retransmit, tx.ToGuest, tx.ToPeer = out, out, out, out
			tx.Newest = func(compare.Tuple) (c bpf.LockstepLsCli, ok bool) {
				copy(BytesOf(&c), record)
				return c, true
			}
			effs := effects(&evs[0].Seg)
			if tx.Apply(effs); out.frames+out.lost > DupThresh*len(effs) {
				t.Errorf("%d frames sent, %d lost, for %d effects", out.frames, out.lost, len(effs))
			}
		}
		if e := d.Frames.Element(given); e != nil && binary.NativeEndian.Uint32(e) != uint32(bpf.LockstepLsSlotStateLS_SLOT_FREE) || d.Frames.Len() != 0 {
			t.Fatalf("slot %d is not free, %d are noted", given, d.Frames.Len())
		}
	})
}

// effects are all that could be done with s, and what frees its slot comes last.
func effects(s *compare.Segment) []compare.Effect {
	e := compare.Effect{Tuple: s.Tuple, Slot: s.Slot, Seq: s.Seq, Ack: s.Ack, Win: s.Win, Urg: s.Urg, Flags: s.Flags}
	e.OptLen, e.HdrLen = uint8(copy(e.Opts[:], s.Opts)), uint8(copy(e.Header[:], s.Header))
	var all []compare.Effect
	for op := compare.OpSend; op <= compare.OpProbePVM; op++ {
		if e.Op = op; op != compare.OpFree && op != compare.OpForward && op != compare.OpReplay && op != compare.OpDeliver {
			all = append(all, e)
		}
	}
	e.Op = compare.OpSend
	for _, cut := range [][2]uint32{{0, s.Len}, {s.Len / 2, s.Len}, {s.Len, s.Len}, {1, 0}, {0, s.Len + 1}} {
		e.From, e.To = cut[0], cut[1]
		all = append(all, e)
	}
	e.Slot, e.From, e.To = compare.NoSlot, 0, 0
	all = append(all, e)
	e.Op, e.Slot = compare.OpForward, s.Slot
	return append(all, e)
}

// FuzzTimestamp: options of every kind hold a timestamp that fits, or none.
func FuzzTimestamp(f *testing.F) {
	f.Fuzz(func(t *testing.T, opts []byte) {
		if ts := timestamp(opts); ts != nil && (len(ts) != 12 || !bytes.Contains(opts, ts[2:])) {
			t.Errorf("% x has the timestamp % x", opts, ts)
		}
	})
}
