// SPDX-License-Identifier: Apache-2.0

package core

import (
	"sync/atomic"
	"unsafe"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
)

// Store are the frames that the kernel keeps in slots, with what it reported of each.
// Only a frame that was reported and not freed since is handed out.
type Store struct {
	Slots
	meta map[compare.Slot]frameMeta
}

// frameMeta is what the kernel reported of a frame in a slot.
type frameMeta struct {
	l3, l4, pay, paylen uint32 // offsets from the frame's start; payload bytes
	gso, tpid, tci      uint16
	csumStart, csumOff  uint16
	partial, udp, ufo   bool
}

// NewStore has no frame yet.
func NewStore(s Slots) *Store {
	return &Store{Slots: s, meta: make(map[compare.Slot]frameMeta)}
}

// Len is how many frames were reported and not freed since.
func (f *Store) Len() int { return len(f.meta) }

// add notes the frame in a slot. It reports whether the payload lies inside the slot.
func (f *Store) add(id compare.Slot, m frameMeta) bool {
	f.meta[id] = m
	return uint64(m.pay)+uint64(m.paylen) <= uint64(len(f.data(id)))
}

// whole is the frame in the slot.
func (f *Store) whole(id compare.Slot) (frame []byte, m frameMeta, ok bool) {
	m, ok = f.meta[id]
	frame = f.frame(id)
	return frame, m, ok && len(frame) >= EthLen && (m.gso == 0 || int(m.l3) < len(frame))
}

// part are the headers before TCP's of the segment in the slot, and bytes [from, to) of
// its payload.
func (f *Store) part(id compare.Slot, from, to uint32) (headers, payload []byte, m frameMeta, ok bool) {
	m = f.meta[id]
	if m.l4 == 0 || m.l4 > m.pay || from > to || to > m.paylen {
		return nil, nil, m, false
	}
	data := f.data(id)
	return data[:m.l4], data[m.pay+from : m.pay+to], m, true
}

// headers are the first n bytes of the frame in the slot.
func (f *Store) headers(id compare.Slot, n int) []byte {
	frame := f.frame(id)
	return frame[:min(n, len(frame))]
}

// payload is that of the frame in the slot.
func (f *Store) payload(id compare.Slot) []byte {
	m := f.meta[id]
	return f.data(id)[m.pay:][:m.paylen:m.paylen]
}

// free gives the slot back to the kernel.
func (f *Store) free(id compare.Slot) {
	delete(f.meta, id)
	f.Slots.free(id)
}

// Slots are the memory of the kernel's frame slots: arrays of struct ls_slot and of
// struct ls_gslot, with the memory's alignment of a page.
type Slots struct {
	Small, Large []byte
}

// Bytes of a slot, and where its frame begins.
const (
	SlotSize   = int(unsafe.Sizeof(bpf.LockstepLsSlot{}))
	LargeSize  = int(unsafe.Sizeof(bpf.LockstepLsGslot{}))
	slotHeader = int(unsafe.Offsetof(bpf.LockstepLsSlot{}.Data))
	lenOffset  = int(unsafe.Offsetof(bpf.LockstepLsSlot{}.Len))
)

// Element is the whole slot, or nil when there is none of that number.
func (s Slots) Element(id compare.Slot) []byte {
	mem, size := s.Small, SlotSize
	if i := uint32(id); i&uint32(bpf.LockstepLsConstLS_SLOT_GSO) != 0 {
		mem, size = s.Large, LargeSize
		id &^= compare.Slot(bpf.LockstepLsConstLS_SLOT_GSO)
	}
	if int(id) >= len(mem)/size {
		return nil
	}
	return mem[int(id)*size : (int(id)+1)*size : (int(id)+1)*size]
}

// data is the slot's room for a frame.
func (s Slots) data(id compare.Slot) []byte {
	if e := s.Element(id); e != nil {
		return e[slotHeader:]
	}
	return nil
}

// frame is the frame in the slot.
func (s Slots) frame(id compare.Slot) []byte {
	e := s.Element(id)
	if e == nil {
		return nil
	}
	n := *(*uint32)(unsafe.Pointer(&e[lenOffset]))
	return e[slotHeader:][:min(int(n), len(e)-slotHeader)]
}

// FreeAll gives every slot back. Nobody else may use slots meanwhile.
func (s Slots) FreeAll() {
	for i := range len(s.Small) / SlotSize {
		s.free(compare.Slot(i))
	}
	for i := range len(s.Large) / LargeSize {
		s.free(compare.Slot(i) | compare.Slot(bpf.LockstepLsConstLS_SLOT_GSO))
	}
}

// free gives the slot back to the kernel. The exchange orders our reads of the
// frame before the kernel's next writes.
func (s Slots) free(id compare.Slot) {
	if e := s.Element(id); e != nil {
		atomic.SwapUint32((*uint32)(unsafe.Pointer(unsafe.SliceData(e))), uint32(bpf.LockstepLsSlotStateLS_SLOT_FREE))
	}
}
