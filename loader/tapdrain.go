// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/lockstep-ft/lockstep/bpf"
)

// tapDrain knows how many frames for the SVM wait in its tap's queue: a tap counts a
// frame as sent when its reader takes it, so what the gate let in and the tap has not
// counted is still there.
type tapDrain struct {
	counters *counters
	tap      netlink.Link
	meta     *ebpf.Map // has base for the next daemon
	base     uint32    // the tap's frame count before the first one was let in, mod 2^32
}

// DrainTap implements [datapath.NIC]. What a guest that boots, or has crashed, has not
// read at ctx's deadline is dropped: to it that is a loss, and the PVM has received it.
// If the tap has counted more than was let in, it is unknown how much waits, and all of
// it is dropped.
func (d *tapDrain) DrainTap(ctx context.Context) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		unread, err := d.unread()
		if err != nil || unread == 0 {
			return err
		}
		if unread < 0 {
			return d.purge(unread)
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return d.purge(unread)
			}
			return fmt.Errorf("tap %s: the SVM has not read all frames: %w", d.tap.Attrs().Name, ctx.Err())
		case <-tick.C:
		}
	}
}

// unread is how many frames were let in that the tap has not counted.
func (d *tapDrain) unread() (int32, error) {
	in, err := d.counters.counter(uint32(bpf.LockstepLsReasonLS_R_letIn))
	if err != nil {
		return 0, err
	}
	dev, err := netlink.LinkByIndex(d.tap.Attrs().Index)
	if err != nil {
		return 0, fmt.Errorf("tap %s: %w", d.tap.Attrs().Name, err)
	}
	s := dev.Attrs().Statistics
	if s == nil {
		return 0, fmt.Errorf("tap %s: no statistics", d.tap.Attrs().Name)
	}
	// A difference of counts, neither of which has grown by 2^31 meanwhile.
	return int32(d.base + uint32(in) - uint32(s.TxPackets+s.TxDropped)), nil
}

// purge drops what waits in the tap's queue: unread frames by its count, which is right
// again afterwards.
func (d *tapDrain) purge(unread int32) error {
	if err := emptyQueue(d.tap.Attrs().Index); err != nil {
		return fmt.Errorf("tap %s: drop what the SVM does not read: %w", d.tap.Attrs().Name, err)
	}
	d.counters.lost.unread.Add(uint64(max(unread, 0)))
	// They were let in, and will never be counted as sent.
	d.base -= uint32(unread)
	var meta bpf.LockstepLsMeta
	if err := d.meta.Lookup(uint32(0), &meta); err != nil {
		return fmt.Errorf("read what the tables are for: %w", err)
	}
	meta.TapBase = d.base
	if err := d.meta.Put(uint32(0), &meta); err != nil {
		return fmt.Errorf("write down what the tap has lost: %w", err)
	}
	return nil
}

// emptyQueue drops what waits in a tap's queue. A shorter queue has no room for it
// (tun_queue_resize, seen in 6.18), and one of length 0 for nothing.
func emptyQueue(index int) error {
	dev, err := netlink.LinkByIndex(index)
	if err != nil {
		return err
	}
	length := dev.Attrs().TxQLen
	if err := netlink.LinkSetTxQLen(dev, 0); err != nil {
		return err
	}
	return netlink.LinkSetTxQLen(dev, length)
}
