// SPDX-License-Identifier: Apache-2.0

package rewriter

import (
	"encoding/binary"
	"maps"
	"slices"
	"testing"
)

// FuzzTakeover: whatever the three tables hold, and in whatever order they are added, each
// connection is guarded once, and once only when a takeover is begun anew (R22).
func FuzzTakeover(f *testing.F) {
	const guard, now = 1 << 24, 77
	f.Fuzz(func(t *testing.T, b []byte) {
		var add []func(*Takeover[byte])
		word := func() uint32 {
			var w [4]byte
			b = b[copy(w[:], b):]
			return binary.LittleEndian.Uint32(w[:])
		}
		for key := byte(0); len(b) > 0; key++ {
			in := b[0]
			b = b[1:]
			if in&1 != 0 {
				c := Conn{State: State(word()), Off: word(), TSOff: word(), Inc: word()}
				if c.State&Inherited != 0 {
					c.State |= Guarded // a takeover sets both
				}
				add = append(add, func(to *Takeover[byte]) { to.AddConn(key, c) })
			}
			if in&2 != 0 {
				h := Half{State: State(word()), ISNPVM: word(), ISNSVM: word(), UsedPVM: word(), UsedSVM: word()}
				if in&8 != 0 {
					h.State, h.UsedPVM, h.UsedSVM = h.State|HasPVM|HasSVM, h.ISNPVM, h.ISNSVM
				}
				_, _ = h.Paired(), h.Offset()
				add = append(add, func(to *Takeover[byte]) { to.AddHalf(key, &h) })
			}
			if in&4 != 0 {
				add = append(add, func(to *Takeover[byte]) { to.AddInherited(key, 0) })
			}
		}
		guarded := func() map[byte]Conn {
			to := NewTakeover[byte](guard, true, now)
			for _, f := range add {
				f(to)
			}
			return maps.Collect(to.Guarded())
		}
		first := guarded()
		slices.Reverse(add)
		if again := guarded(); !maps.Equal(first, again) {
			t.Fatalf("in one order %+v\nin the other %+v", first, again)
		}
		to := NewTakeover[byte](guard, true, now+1)
		for key, c := range first {
			if c.State&Guarded == 0 || c.Guard != guard || c.Edge() != (Offset{c.Off, c.TSOff - guard}) {
				t.Errorf("%d: %+v", key, c)
			}
			to.AddConn(key, c)
			to.AddInherited(key, 0)
		}
		if again := maps.Collect(to.Guarded()); len(again) > 0 {
			t.Errorf("guarded twice: %+v", again)
		}
	})
}
