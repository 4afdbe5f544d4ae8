// SPDX-License-Identifier: Apache-2.0

package core

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
)

func TestSlots(t *testing.T) {
	const gsoBit = compare.Slot(bpf.LockstepLsConstLS_SLOT_GSO)
	s := Slots{Small: make([]byte, 3*SlotSize), Large: make([]byte, 2*LargeSize)}
	for _, c := range []struct {
		id   compare.Slot
		room int
	}{
		{0, SlotSize - slotHeader},
		{2, SlotSize - slotHeader},
		{3, 0},
		{gsoBit - 1, 0},
		{gsoBit, LargeSize - slotHeader},
		{gsoBit | 1, LargeSize - slotHeader},
		{gsoBit | 2, 0},
		{compare.NoSlot, 0},
	} {
		if d := s.data(c.id); len(d) != c.room || cap(d) != c.room {
			t.Errorf("slot %#x: room %d (cap %d), want %d", uint32(c.id), len(d), cap(d), c.room)
		}
		if c.room == 0 {
			if s.Element(c.id) != nil || s.frame(c.id) != nil {
				t.Errorf("slot %#x exists", uint32(c.id))
			}
			s.free(c.id) // touches nothing
			continue
		}
		e := s.Element(c.id)
		state := func() bpf.LockstepLsSlotState { return bpf.LockstepLsSlotState(binary.NativeEndian.Uint32(e)) }
		for n, want := range map[uint32]int{0: 0, 60: 60, uint32(c.room): c.room, uint32(c.room) + 1: c.room, 1<<32 - 1: c.room} {
			binary.NativeEndian.PutUint32(e[lenOffset:], n)
			if got := len(s.frame(c.id)); got != want {
				t.Errorf("slot %#x with length %d: frame of %d bytes, want %d", uint32(c.id), n, got, want)
			}
		}
		binary.NativeEndian.PutUint32(e, uint32(bpf.LockstepLsSlotStateLS_SLOT_READY))
		rest := bytes.Clone(e[4:])
		if s.free(c.id); state() != bpf.LockstepLsSlotStateLS_SLOT_FREE {
			t.Errorf("slot %#x: state %d after free", uint32(c.id), state())
		}
		if !bytes.Equal(rest, e[4:]) {
			t.Errorf("slot %#x: free changed more than the state", uint32(c.id))
		}
	}
}
