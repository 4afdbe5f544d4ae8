// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	lt "lockstep/loader/loadertest"
)

// memlock is what the kernel says of a map's memory, all of it, in bytes.
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

// A connection costs at most 1 KiB of kernel memory, with keys and the kernel's
// own overhead, and all of it is there from the start.
func TestMemoryPerConnection(t *testing.T) {
	lt.NeedRoot(t)
	const few, many = 4096, maxHalf // the half-open ones grow up to there
	all := func(connections int) map[string]int {
		spec, err := sized(sizes{connections: connections, slots: 16, gsoSlots: 1})
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
				t.Logf("%d to %d connections: %s %d bytes each", step[0], step[1], name, more/(step[1]-step[0]))
				total += more
			}
		}
		each := float64(total) / float64(step[1]-step[0])
		t.Logf("%d to %d connections: %.0f bytes each", step[0], step[1], each)
		if each > 1024 || each < 100 { // less than its keys is not what is meant
			t.Errorf("a connection costs %.0f bytes of kernel memory, want at most 1024", each)
		}
	}
}
