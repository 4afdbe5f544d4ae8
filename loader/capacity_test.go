// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// memlock is a map's whole memory, in bytes, as the kernel accounts it.
func memlock(t testing.TB, m *ebpf.Map) (bytes int) {
	t.Helper()
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", m.FD()))
	check(t, err)
	_, rest, _ := strings.Cut(string(info), "\nmemlock:")
	if _, err := fmt.Sscan(rest, &bytes); err != nil {
		t.Fatalf("no memlock in %q: %v", info, err)
	}
	return bytes
}

// A connection costs at most 1 KiB of kernel memory in either role, with keys and the kernel's
// own overhead, and all of it is there from the start.
func TestMemoryPerConnection(t *testing.T) {
	lt.NeedRoot(t)
	const few, many = 4096, maxHalf // the half-open ones grow up to there
	for _, role := range []Role{Primary, Secondary} {
		memoryPerConnection(t, role, few, many)
	}
}

func memoryPerConnection(t *testing.T, role Role, few, many int) {
	t.Helper()
	all := func(connections int) map[string]int {
		spec, err := sized(sizes{role: role, connections: connections, slots: 16, gsoSlots: 1, cpus: 1})
		check(t, err)
		c, err := ebpf.NewCollection(spec)
		check(t, err)
		defer c.Close()
		bytes := make(map[string]int)
		for name, m := range c.Maps {
			bytes[name] = memlock(t, m)
			if info, err := m.Info(); err != nil || info.Flags&1 != 0 { // BPF_F_NO_PREALLOC
				t.Errorf("map %s is not preallocated (flags %#x, %v)", name, info.Flags, err)
			}
		}
		return bytes
	}
	// Below the bound of half-open connections, where all tables grow; and above.
	for _, step := range [][2]int{{few, many}, {many, 4 * many}} {
		a, b := all(step[0]), all(step[1])
		total := 0
		for name := range b {
			if more := b[name] - a[name]; more != 0 {
				t.Logf("%s, %d to %d connections: %s %d bytes each", role, step[0], step[1], name, more/(step[1]-step[0]))
				total += more
			}
		}
		each := float64(total) / float64(step[1]-step[0])
		t.Logf("%s, %d to %d connections: %.0f bytes each", role, step[0], step[1], each)
		if each > 1024 || each < 100 { // less than its keys is not what is meant
			t.Errorf("a connection costs %.0f bytes of kernel memory, want at most 1024", each)
		}
	}
}

// What only the other role needs takes no memory, and what each CPU needs as much as
// there are CPUs.
func TestMemoryByRole(t *testing.T) {
	lt.NeedRoot(t)
	of := func(role Role, cpus int) map[string]int {
		spec, err := sized(sizes{role: role, connections: 65536, slots: 16, gsoSlots: 1, cpus: cpus})
		check(t, err)
		c, err := ebpf.NewCollection(spec)
		check(t, err)
		defer c.Close()
		bytes := make(map[string]int)
		for name, m := range c.Maps {
			bytes[name] = memlock(t, m)
		}
		return bytes
	}
	const page = 4096 // the kernel counts whole ones
	p, s := of(Primary, 4), of(Secondary, 4)
	for _, name := range []string{"ls_conn", "ls_half", "ls_inherited", "ls_sent"} {
		t.Logf("%s: %d bytes on P, %d on S", name, p[name], s[name])
		if p[name] > 4*page || s[name] < 1<<20 {
			t.Errorf("%s takes %d bytes on P and %d on S", name, p[name], s[name])
		}
	}
	if s["ls_cli"] > 4*page || p["ls_cli"] < 1<<20 {
		t.Errorf("ls_cli takes %d bytes on P and %d on S", p["ls_cli"], s["ls_cli"])
	}
	each := (of(Secondary, 8)["ls_sent"] - s["ls_sent"]) / 4
	t.Logf("ls_sent: %d bytes for each CPU of S", each)
	if want := 2048 * 168; each < want || each > want+page {
		t.Errorf("records kept for one CPU take %d bytes, want %d", each, want)
	}
	_, err := sized(sizes{role: Secondary, connections: 1, slots: 16, gsoSlots: 1, cpus: 1025})
	wantError(t, err, "1025 CPUs", "1024")
}

// An LRU map keeps as many as it is for, however many CPUs fill it: what each of them
// has reserved and not used is not available to the others.
func TestLRUBound(t *testing.T) {
	lt.NeedRoot(t)
	const bound = 2048
	cpus := ebpf.MustPossibleCPU()
	spec, err := sized(sizes{role: Secondary, connections: bound, slots: 16, gsoSlots: 1, cpus: cpus})
	check(t, err)
	for _, name := range []string{bpf.LockstepMapLsHalf, bpf.LockstepMapLsInherited} {
		m, err := ebpf.NewMap(spec.Maps[name])
		check(t, err)
		defer m.Close()
		value := make([]byte, m.ValueSize())
		put := func(cpu, i int) {
			t.Helper()
			onCPU(t, cpu, func() {
				key := nthTuple(i)
				check(t, m.Put(&key, value))
			})
		}
		n := 0
		for cpu := 1; cpu < cpus; cpu++ { // each takes a batch of free elements for one
			put(cpu, n)
			n++
		}
		for ; n < bound; n++ {
			put(0, n)
		}
		gone := 0
		for i := range bound {
			if key := nthTuple(i); errors.Is(m.Lookup(&key, &value), ebpf.ErrKeyNotExist) {
				gone++
			}
		}
		t.Logf("%s: %d elements, of %d put in from %d CPUs %d were evicted", name, m.MaxEntries(), bound, cpus, gone)
		if gone != 0 {
			t.Errorf("%s evicted %d of %d", name, gone, bound)
		}
	}
}

// onCPU runs f on one CPU.
func onCPU(t testing.TB, cpu int, f func()) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var home, one unix.CPUSet
	check(t, unix.SchedGetaffinity(0, &home))
	one.Set(cpu)
	check(t, unix.SchedSetaffinity(0, &one))
	defer func() { check(t, unix.SchedSetaffinity(0, &home)) }()
	f()
}
