// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"sync"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/loader/core"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// newTable is an empty map of connections.
func newTable(t testing.TB, entries int) *ebpf.Map {
	t.Helper()
	lt.NeedRoot(t)
	spec, err := bpf.LoadLockstep()
	check(t, err)
	conns := spec.Maps[bpf.LockstepMapLsConn]
	conns.MaxEntries = uint32(entries)
	m, err := ebpf.NewMap(conns)
	check(t, err)
	t.Cleanup(func() { m.Close() })
	return m
}

// nthTuple names connection i.
func nthTuple(i int) bpf.LockstepLsTuple {
	k := askTuple
	k.Remote[14], k.Remote[15], k.RemotePort = byte(i>>24), byte(i>>16), uint16(i)
	return core.ToTuple(k)
}

// fill puts the connections from first on, up to before last, into a map.
func fill(t testing.TB, m *ebpf.Map, first, last int) {
	t.Helper()
	for i := first; i < last; i++ {
		key := nthTuple(i)
		check(t, m.Put(&key, &bpf.LockstepLsConn{Inc: uint32(i)}))
	}
}

// wantWhole walks over a map and wants each of the first n connections once.
func wantWhole(t testing.TB, m *ebpf.Map, n int) {
	t.Helper()
	times := make([]int, n)
	check(t, each(m, func(k bpf.LockstepLsTuple, c *bpf.LockstepLsConn) {
		if k != nthTuple(int(c.Inc)) {
			t.Errorf("connection %d is under %+v", c.Inc, k)
		}
		if int(c.Inc) < n {
			times[c.Inc]++
		}
	}))
	for i, seen := range times {
		if seen != 1 {
			t.Fatalf("connection %d of %d came %d times in one walk", i, n, seen)
		}
	}
}

// A walk brings everything that is there all the time, once, whatever others add
// and remove meanwhile.
func TestWalkWhole(t *testing.T) {
	const stable, churned = 3000, 1000
	m := newTable(t, stable+churned)
	wantWhole(t, m, 0)
	fill(t, m, 0, stable)
	wantWhole(t, m, stable)
	stop := make(chan struct{})
	var others sync.WaitGroup
	defer others.Wait()
	defer close(stop)
	others.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			key := nthTuple(stable + i%churned)
			if err := m.Put(&key, &bpf.LockstepLsConn{Inc: uint32(stable + i%churned)}); err != nil {
				t.Error(err)
				return
			}
			key = nthTuple(stable + (i+churned/2)%churned)
			_ = m.Delete(&key) // may not be there
		}
	})
	for range 100 {
		wantWhole(t, m, stable)
	}
}

// Whoever walks may remove what it was given.
func TestWalkDeletes(t *testing.T) {
	const n = 10000
	m := newTable(t, n)
	fill(t, m, 0, n)
	seen := 0
	check(t, each(m, func(k bpf.LockstepLsTuple, c *bpf.LockstepLsConn) {
		if seen++; c.Inc%2 == 0 {
			if err := m.Delete(&k); err != nil {
				t.Error(err)
			}
		}
	}))
	if seen != n {
		t.Errorf("%d of %d came", seen, n)
	}
}

// A bucket with more than a batch holds comes whole all the same.
func TestWalkSmallBatch(t *testing.T) {
	const n = 500
	m := newTable(t, n)
	fill(t, m, 0, n)
	seen := make(map[bpf.LockstepLsTuple]int)
	check(t, walk(m, 1, m.BatchLookup, func(k bpf.LockstepLsTuple, _ *bpf.LockstepLsConn) { seen[k]++ }))
	if len(seen) != n {
		t.Errorf("%d of %d came", len(seen), n)
	}
	for k, times := range seen {
		if times != 1 {
			t.Errorf("%+v came %d times", k, times)
		}
	}
	check(t, take(m, func(k bpf.LockstepLsTuple, _ *bpf.LockstepLsConn) { delete(seen, k) }))
	if len(seen) != 0 {
		t.Errorf("%d were not taken", len(seen))
	}
	wantWhole(t, m, 0)
}

// What is gone already does not keep deleteKeys from the rest, nor what has no place
// putAll.
func TestBatchesGoOn(t *testing.T) {
	const n = 2*walkBatch + 10
	m := newTable(t, n)
	keys, conns := make([]bpf.LockstepLsTuple, n), make([]bpf.LockstepLsConn, n)
	for i := range keys {
		keys[i], conns[i].Inc = nthTuple(i), uint32(i)
	}
	check(t, putAll(m, keys, conns, needed))
	wantWhole(t, m, n)
	for i := 0; i < n-5; i += 3 {
		check(t, m.Delete(&keys[i]))
	}
	check(t, deleteKeys(m, keys[:n-5]))
	left := 0
	check(t, each(m, func(_ bpf.LockstepLsTuple, c *bpf.LockstepLsConn) {
		if left++; int(c.Inc) < n-5 {
			t.Errorf("connection %d was not removed", c.Inc)
		}
	}))
	if left != 5 {
		t.Errorf("%d are left, not the last 5", left)
	}

	small := newTable(t, 100)
	refused := 0
	check(t, putAll(small, keys[:300], conns[:300], func(*bpf.LockstepLsConn) bool { refused++; return true }))
	if refused != 200 {
		t.Errorf("%d of 300 had no place in a table of 100", refused)
	}
	wantError(t, putAll(small, keys[300:], conns[300:], needed), "argument list too long")
}
