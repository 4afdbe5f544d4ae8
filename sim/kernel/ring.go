// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"unsafe"

	"github.com/lockstep-ft/lockstep/bpf"
)

// ringHeader stands before each record of a BPF ring buffer, which has a length that is a
// multiple of 8.
const ringHeader = 8

const (
	frameSize     = int(unsafe.Sizeof(bpf.LockstepLsEv{}))
	recordSize    = int(unsafe.Sizeof(bpf.LockstepLsEvRec{}))
	recordMinSize = int(unsafe.Offsetof(bpf.LockstepLsEvRec{}.Rec)) + recBase
)

// ring is ls_ring. A record that was reserved takes room until the reader has come past
// it, discarded or not.
type ring struct {
	size, used int // bytes
	entries    []entry
	head       int // of entries: the one that is read next
}

// entry is a record. Its words are a struct ls_ev or a struct ls_ev_rec.
type entry struct {
	words     [frameSize / 8]uint64
	len       int
	discarded bool
}

func (e *entry) frame() *bpf.LockstepLsEv { return (*bpf.LockstepLsEv)(unsafe.Pointer(&e.words)) }
func (e *entry) record() *bpf.LockstepLsEvRec {
	return (*bpf.LockstepLsEvRec)(unsafe.Pointer(&e.words))
}

// reserve returns a cleared record of n bytes, nil when there is no room. It is valid
// until the next one.
func (r *ring) reserve(n int) *entry {
	room := (n + ringHeader + 7) &^ 7
	if r.used+room > r.size-1 {
		return nil
	}
	r.used += room
	if r.head > 0 && len(r.entries) == cap(r.entries) {
		r.entries = r.entries[:copy(r.entries, r.entries[r.head:])]
		r.head = 0
	}
	r.entries = append(r.entries, entry{len: n})
	return &r.entries[len(r.entries)-1]
}

// next is the oldest record that was not discarded, nil without one. It is valid until the
// next call of reserve.
func (r *ring) next() *entry {
	for r.head < len(r.entries) {
		e := &r.entries[r.head]
		r.head++
		r.used -= (e.len + ringHeader + 7) &^ 7
		if r.head == len(r.entries) {
			r.entries, r.head = r.entries[:0], 0
		}
		if !e.discarded {
			return e
		}
	}
	return nil
}

// empty reports whether there is no record, a discarded one included.
func (r *ring) empty() bool { return r.head == len(r.entries) }

// crowded reports whether more than half of the ring is taken.
func (r *ring) crowded() bool { return r.used > r.size/2 }

func (r *ring) reset() { r.entries, r.head, r.used = r.entries[:0], 0, 0 }
