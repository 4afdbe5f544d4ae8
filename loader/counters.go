// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"lockstep/bpf"
)

// Counters implements [datapath.NIC].
func (n *NIC) Counters() (map[string]uint64, error) {
	out := map[string]uint64{
		"release_lost":  n.lost.tap.Load(),
		"peer_lost":     n.lost.peer.Load(),
		"event_refused": n.lost.events.Load(),
		"tap_unread":    n.lost.unread.Load(),
	}
	names, cpus := bpf.ReasonNames(), ebpf.MustPossibleCPU()
	reasons, perCPU := make([]uint32, len(names)), make([]bpf.LockstepLsCount, len(names)*cpus)
	var cursor ebpf.MapBatchCursor
	got, err := n.objs.LsStats.BatchLookup(&cursor, reasons, perCPU, nil)
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

func (n *NIC) counter(reason uint32) (uint64, error) {
	var perCPU []bpf.LockstepLsCount
	if err := n.objs.LsStats.Lookup(reason, &perCPU); err != nil {
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
