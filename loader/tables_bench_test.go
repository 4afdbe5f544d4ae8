// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
)

// What the tables cost with 100 000 connections: go test -run '^$' -bench Tables ./loader.
// The daemon sweeps once a second; an SVM stands still while its offsets are reset. All in
// one thread, whose system calls are counted.
func BenchmarkTables(b *testing.B) {
	const conns = 100_000
	devices(b)
	h := &hosts{TB: b, pins: mountBPFFS(b), dead: make(map[*NIC]bool)}
	o := options(h.pins, "b.lab", Secondary)
	o.MaxConnections = conns * 5 / 4
	s := h.open(o)
	calls := countSyscalls(b)

	keys, values := make([]bpf.LockstepLsTuple, conns), make([]bpf.LockstepLsConn, conns)
	inherited := make([]bpf.LockstepLsInh, conns)
	for i := range keys {
		keys[i], values[i].Last = nthTuple(i), uint64(s.Now())
	}
	fill := func() {
		check(b, putAll(s.objs.LsConn, keys, values, needed))
		check(b, putAll(s.objs.LsInherited, keys, inherited, func(*bpf.LockstepLsInh) bool { return false }))
		check(b, putAll(s.objs.LsHalf, keys[:maxHalf], make([]bpf.LockstepLsHalf, maxHalf), func(*bpf.LockstepLsHalf) bool { return false }))
	}
	fill()
	const rounds = 5
	measure := func(name string, prepare, f func()) {
		var took time.Duration
		var n uint64
		for range rounds {
			prepare()
			before, start := calls(), time.Now()
			f()
			took += time.Since(start)
			n += calls() - before
		}
		b.ReportMetric(float64(took.Microseconds())/rounds/1e3, "ms/"+name)
		b.ReportMetric(float64(n)/rounds-1, "syscalls/"+name) // one reads the counter
	}
	nothing := func() {}
	measure("sweep", nothing, func() {
		if n, err := s.Sweep(time.Hour, 2*time.Hour); err != nil || n != 0 {
			b.Fatal(n, err)
		}
	})
	measure("sweep-by-entry", nothing, func() {
		if n := len(byEntry(s.objs.LsConn, new(bpf.LockstepLsConn))); n != conns {
			b.Fatal(n)
		}
	})
	measure("status", nothing, func() {
		_, err := s.Counters()
		check(b, err)
		known := 0
		check(b, s.Offsets(func(compare.Tuple, datapath.Offset) { known++ }))
		if known != conns {
			b.Fatal(known)
		}
	})
	measure("order", nothing, func() { // five times a second
		_, _, err := s.CheckOrder()
		check(b, err)
	})
	measure("reset", fill, func() { check(b, s.ResetOffsets()) })
	b.ReportMetric(0, "ns/op")
	measure("reset-by-entry", fill, func() {
		for m, v := range map[*ebpf.Map]any{s.objs.LsConn: new(bpf.LockstepLsConn), s.objs.LsHalf: new(bpf.LockstepLsHalf), s.objs.LsInherited: new(bpf.LockstepLsInh)} {
			for _, k := range byEntry(m, v) {
				check(b, m.Delete(&k))
			}
		}
	})
	measure("takeover", fill, func() { check(b, s.TakeOver(1, false)) })
}

// byEntry is a walk as it was before each: it may be cut short.
func byEntry(m *ebpf.Map, v any) (keys []bpf.LockstepLsTuple) {
	var k bpf.LockstepLsTuple
	for it := m.Iterate(); it.Next(&k, v); {
		keys = append(keys, k)
	}
	return keys
}

// countSyscalls counts the system calls of this thread, which is locked.
func countSyscalls(b *testing.B) func() uint64 {
	b.Helper()
	runtime.LockOSThread()
	dir := b.TempDir()
	check(b, unix.Mount("tracefs", dir, "tracefs", 0, ""))
	id, err := os.ReadFile(filepath.Join(dir, "events/raw_syscalls/sys_enter/id"))
	check(b, unix.Unmount(dir, 0))
	check(b, err)
	n, err := strconv.ParseUint(strings.TrimSpace(string(id)), 10, 64)
	check(b, err)
	attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_TRACEPOINT, Config: n, Size: uint32(unsafe.Sizeof(unix.PerfEventAttr{}))}
	fd, err := unix.PerfEventOpen(&attr, 0, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
	check(b, err)
	b.Cleanup(func() { unix.Close(fd) })
	return func() uint64 {
		var v [8]byte
		_, err := unix.Read(fd, v[:])
		check(b, err)
		return binary.NativeEndian.Uint64(v[:])
	}
}
