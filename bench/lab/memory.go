// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
)

var (
	resident = regexp.MustCompile(`(?m)^RssAnon:\s+(\d+) kB$`)
	mapID    = regexp.MustCompile(`(?m)^map_id:\s+(\d+)$`)
	memlock  = regexp.MustCompile(`(?m)^memlock:\s+(\d+)$`)
)

// Resident is how much memory a process has that is its own alone, bytes: not its program, nor the maps that it
// shares with the kernel.
func Resident(pid int) (int64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, fmt.Errorf("memory of process %d: %w", pid, err)
	}
	m := resident.FindSubmatch(status)
	if m == nil {
		return 0, fmt.Errorf("memory of process %d: its status does not show it", pid)
	}
	kb, err := strconv.ParseInt(string(m[1]), 10, 64)
	return kb << 10, err
}

// MapMemory is what the BPF maps that a process has open take of the kernel's memory, bytes.
func MapMemory(pid int) (sum int64, err error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", pid))
	if err != nil {
		return 0, err
	}
	seen := make(map[string]bool) // a map may be open more than once
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // closed meanwhile
		}
		id, locked := mapID.FindSubmatch(b), memlock.FindSubmatch(b)
		if id == nil || locked == nil || seen[string(id[1])] {
			continue
		}
		seen[string(id[1])] = true
		n, err := strconv.ParseInt(string(locked[1]), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", f, err)
		}
		sum += n
	}
	return sum, nil
}
