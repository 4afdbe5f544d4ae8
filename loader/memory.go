// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"fmt"
	"os"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
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
	return unix.Munmap(c.mem)
}
