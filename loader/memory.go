// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/loader/core"
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

// mapSlots maps the kernel's frame slots of both sizes.
func mapSlots(small, large *ebpf.Map) (s core.Slots, err error) {
	if s.Small, err = mmapMap(small); err != nil {
		return core.Slots{}, err
	}
	if s.Large, err = mmapMap(large); err != nil {
		return core.Slots{}, errors.Join(err, unmapSlots(s))
	}
	return s, nil
}

func unmapSlots(s core.Slots) error {
	var errs []error
	for _, b := range [][]byte{s.Small, s.Large} {
		if b != nil {
			errs = append(errs, unix.Munmap(b))
		}
	}
	return errors.Join(errs...)
}

// TCPSlots is how many of n slots are for TCP: the others are for datagrams.
func TCPSlots(n int) int { return n - n/int(bpf.LockstepLsConstLS_DGRAM_SHARE) }
