// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
)

// frames are those that the kernel keeps in slots, with what it reported of each. Only
// a frame that was reported and not freed since is handed out.
type frames struct {
	slots slots
	meta  map[compare.Slot]frameMeta
}

// frameMeta is what the kernel reported of a frame in a slot.
type frameMeta struct {
	l3, l4, pay, paylen uint32 // offsets from the frame's start; payload bytes
	gso, tpid, tci      uint16
	csumStart, csumOff  uint16
	partial, udp, ufo   bool
}

func newFrames(objs *bpf.LockstepObjects) (*frames, error) {
	s, err := mapSlots(objs.LsSlots, objs.LsGslots)
	if err != nil {
		return nil, err
	}
	return &frames{slots: s, meta: make(map[compare.Slot]frameMeta)}, nil
}

func (f *frames) close() error { return f.slots.unmap() }

// add notes the frame in a slot. It reports whether the payload lies inside the slot.
func (f *frames) add(id compare.Slot, m frameMeta) bool {
	f.meta[id] = m
	return uint64(m.pay)+uint64(m.paylen) <= uint64(len(f.slots.data(id)))
}

// whole is the frame in the slot.
func (f *frames) whole(id compare.Slot) (frame []byte, m frameMeta, ok bool) {
	m, ok = f.meta[id]
	frame = f.slots.frame(id)
	return frame, m, ok && len(frame) >= ethLen
}

// part are the headers before TCP's of the segment in the slot, and bytes [from, to) of
// its payload.
func (f *frames) part(id compare.Slot, from, to uint32) (headers, payload []byte, m frameMeta, ok bool) {
	m = f.meta[id]
	if m.l4 == 0 || from > to || to > m.paylen {
		return nil, nil, m, false
	}
	data := f.slots.data(id)
	return data[:m.l4], data[m.pay+from : m.pay+to], m, true
}

// payload is that of the frame in the slot.
func (f *frames) payload(id compare.Slot) []byte {
	m := f.meta[id]
	return f.slots.data(id)[m.pay:][:m.paylen:m.paylen]
}

// free gives the slot back to the kernel.
func (f *frames) free(id compare.Slot) {
	delete(f.meta, id)
	f.slots.free(id)
}

// TCPSlots is how many of n slots are for TCP: the others are for datagrams.
func TCPSlots(n int) int { return n - n/int(bpf.LockstepLsConstLS_DGRAM_SHARE) }

// slots are the kernel's frame slots, both sizes.
type slots struct {
	small, gso []byte
}

const (
	slotSize   = int(unsafe.Sizeof(bpf.LockstepLsSlot{}))
	gsoSize    = int(unsafe.Sizeof(bpf.LockstepLsGslot{}))
	slotHeader = int(unsafe.Offsetof(bpf.LockstepLsSlot{}.Data))
	lenOffset  = int(unsafe.Offsetof(bpf.LockstepLsSlot{}.Len))
)

func mapSlots(small, gso *ebpf.Map) (s slots, err error) {
	if s.small, err = mmapMap(small); err != nil {
		return slots{}, err
	}
	if s.gso, err = mmapMap(gso); err != nil {
		return slots{}, errors.Join(err, s.unmap())
	}
	return s, nil
}

func (s slots) unmap() error {
	var errs []error
	for _, b := range [][]byte{s.small, s.gso} {
		if b != nil {
			errs = append(errs, unix.Munmap(b))
		}
	}
	return errors.Join(errs...)
}

// element is the whole slot, or nil when there is none of that number.
func (s slots) element(id compare.Slot) []byte {
	mem, size := s.small, slotSize
	if i := uint32(id); i&uint32(bpf.LockstepLsConstLS_SLOT_GSO) != 0 {
		mem, size = s.gso, gsoSize
		id &^= compare.Slot(bpf.LockstepLsConstLS_SLOT_GSO)
	}
	if int(id) >= len(mem)/size {
		return nil
	}
	return mem[int(id)*size : (int(id)+1)*size : (int(id)+1)*size]
}

// data is the slot's room for a frame.
func (s slots) data(id compare.Slot) []byte {
	if e := s.element(id); e != nil {
		return e[slotHeader:]
	}
	return nil
}

// frame is the frame in the slot.
func (s slots) frame(id compare.Slot) []byte {
	e := s.element(id)
	if e == nil {
		return nil
	}
	n := *(*uint32)(unsafe.Pointer(&e[lenOffset]))
	return e[slotHeader:][:min(int(n), len(e)-slotHeader)]
}

// freeAll gives every slot back. Nobody else may use slots meanwhile.
func (s slots) freeAll() {
	for i := range len(s.small) / slotSize {
		s.free(compare.Slot(i))
	}
	for i := range len(s.gso) / gsoSize {
		s.free(compare.Slot(i) | compare.Slot(bpf.LockstepLsConstLS_SLOT_GSO))
	}
}

// free gives the slot back to the kernel. The exchange orders our reads of the
// frame before the kernel's next writes.
func (s slots) free(id compare.Slot) {
	if e := s.element(id); e != nil {
		atomic.SwapUint32((*uint32)(unsafe.Pointer(unsafe.SliceData(e))), uint32(bpf.LockstepLsSlotStateLS_SLOT_FREE))
	}
}
