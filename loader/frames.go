// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"lockstep/bpf"
	"lockstep/compare"
)

// mmapMap maps a mmapable array's elements.
func mmapMap(m *ebpf.Map) ([]byte, error) {
	page := os.Getpagesize()
	size := (int(m.MaxEntries())*int(m.ValueSize()) + page - 1) / page * page
	b, err := unix.Mmap(m.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map memory of %s: %w", m.String(), err)
	}
	return b, nil
}

// conf is the kernel's live settings.
type conf = bpf.LockstepLsConf

type confMemory struct {
	*conf
	mem []byte
}

func mapConf(m *ebpf.Map) (*confMemory, error) {
	mem, err := mmapMap(m)
	if err != nil {
		return nil, err
	}
	return &confMemory{(*conf)(unsafe.Pointer(unsafe.SliceData(mem))), mem}, nil
}

func (c *confMemory) unmap() error {
	if c == nil {
		return nil
	}
	return unix.Munmap(c.mem)
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

// frameMeta is what the kernel told about a frame in a slot.
type frameMeta struct {
	l3, l4, pay, paylen uint32
	gso, tpid, tci      uint16
	csumStart, csumOff  uint16
	partial, udp, ufo   bool
}
