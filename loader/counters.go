// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/cilium/ebpf"

	"github.com/lockstep-ft/lockstep/bpf"
)

// counters are the kernel's, and those of what user space lost: frames for the tap and
// for the peer that the kernel refused, events that made no sense, and frames that the
// SVM did not read.
type counters struct {
	stats *ebpf.Map
	lost  struct{ tap, peer, events, unread atomic.Uint64 }
}

// Counters implements [datapath.NIC].
func (c *counters) Counters() (map[string]uint64, error) {
	out := map[string]uint64{
		"release_lost":  c.lost.tap.Load(),
		"peer_lost":     c.lost.peer.Load(),
		"event_refused": c.lost.events.Load(),
		"tap_unread":    c.lost.unread.Load(),
	}
	names, cpus := bpf.ReasonNames(), ebpf.MustPossibleCPU()
	reasons, perCPU := make([]uint32, len(names)), make([]bpf.LockstepLsCount, len(names)*cpus)
	var cursor ebpf.MapBatchCursor
	got, err := c.stats.BatchLookup(&cursor, reasons, perCPU, nil)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, fmt.Errorf("read counters: %w", err)
	}
	if got != len(names) {
		return nil, fmt.Errorf("read counters: %d of %d", got, len(names))
	}
	for i, reason := range reasons {
		out[names[reason]] = packets(perCPU[i*cpus : (i+1)*cpus])
	}
	return out, nil
}

func (c *counters) counter(reason uint32) (uint64, error) {
	var perCPU []bpf.LockstepLsCount
	if err := c.stats.Lookup(reason, &perCPU); err != nil {
		return 0, fmt.Errorf("read counter %s: %w", bpf.ReasonName(int(reason)), err)
	}
	return packets(perCPU), nil
}

func packets(perCPU []bpf.LockstepLsCount) (sum uint64) {
	for _, c := range perCPU {
		sum += c.Packets
	}
	return sum
}
