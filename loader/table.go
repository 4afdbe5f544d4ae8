// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
)

// walkBatch is how many elements of a table one system call reads, changes or
// removes.
const walkBatch = 4096

// each calls f with everything in a map of tuples. The kernel hands out whole hash
// buckets, and a key never changes its bucket: what is there during all of the walk
// comes exactly once, whatever programs and f itself add and remove meanwhile. A walk
// that did not reach the end is an error, never a short walk.
func each[V any](m *ebpf.Map, f func(bpf.LockstepLsTuple, *V)) error {
	return walk(m, walkBatch, m.BatchLookup, f)
}

// take is each, and removes from the map what f is called with.
func take[V any](m *ebpf.Map, f func(bpf.LockstepLsTuple, *V)) error {
	return walk(m, walkBatch, m.BatchLookupAndDelete, f)
}

type batchLookup = func(*ebpf.MapBatchCursor, any, any, *ebpf.BatchOptions) (int, error)

func walk[V any](m *ebpf.Map, batch int, lookup batchLookup, f func(bpf.LockstepLsTuple, *V)) error {
	batch = min(batch, int(m.MaxEntries()))
	var (
		cursor ebpf.MapBatchCursor
		keys   = make([]bpf.LockstepLsTuple, batch)
		values = make([]V, batch)
	)
	for {
		n, err := lookup(&cursor, keys, values, nil)
		if errors.Is(err, unix.ENOSPC) {
			// The next bucket alone is larger. The kernel returns it again.
			keys, values = make([]bpf.LockstepLsTuple, 2*len(keys)), make([]V, 2*len(values))
			continue
		}
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		for i := range n {
			f(keys[i], &values[i])
		}
		if err != nil {
			return nil // that was the last bucket
		}
	}
}

// deleteKeys removes what is there of keys.
func deleteKeys(m *ebpf.Map, keys []bpf.LockstepLsTuple) error {
	for len(keys) > 0 {
		part := keys[:min(len(keys), walkBatch)]
		n, err := m.BatchDelete(part, nil)
		switch {
		case err == nil:
			keys = keys[len(part):]
		case errors.Is(err, ebpf.ErrKeyNotExist):
			keys = keys[n+1:] // a program has removed this one
		default:
			return err
		}
	}
	return nil
}

// putAll writes elements into a map of tuples. If the map is full, full reports whether
// an element may be left out.
func putAll[V any](m *ebpf.Map, keys []bpf.LockstepLsTuple, values []V, full func(*V) bool) error {
	for len(keys) > 0 {
		part := min(len(keys), walkBatch)
		n, err := m.BatchUpdate(keys[:part], values[:part], nil)
		switch {
		case err == nil:
			n = part
		case errors.Is(err, unix.E2BIG) && full(&values[n]):
			n++
		default:
			return err
		}
		keys, values = keys[n:], values[n:]
	}
	return nil
}
