// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"

	"lockstep/bpf"
)

// DrainTap implements [datapath.NIC]: a tap counts a frame as sent when its
// reader takes it, so what the gate let in and the tap has not counted is still
// on its way. What a guest that boots, or has crashed, has not read at ctx's
// deadline goes: to it that is a loss, and the PVM has heard it. So does what is there
// when the tap has counted more than was let in, for then nobody knows how much it is.
func (n *NIC) DrainTap(ctx context.Context) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		in, err := n.counter(uint32(bpf.LockstepLsReasonLS_R_letIn))
		if err != nil {
			return err
		}
		dev, err := netlink.LinkByIndex(n.tap.Attrs().Index)
		if err != nil {
			return fmt.Errorf("tap %s: %w", n.tap.Attrs().Name, err)
		}
		s := dev.Attrs().Statistics
		if s == nil {
			return fmt.Errorf("tap %s: no statistics", n.tap.Attrs().Name)
		}
		// A difference of counts, neither of which has grown by 2^31 meanwhile.
		unread := int32(n.tapBase + uint32(in) - uint32(s.TxPackets+s.TxDropped))
		if unread == 0 {
			return nil
		}
		if unread < 0 {
			return n.purgeTap(unread)
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return n.purgeTap(unread)
			}
			return fmt.Errorf("tap %s: the SVM has not read all frames: %w", n.tap.Attrs().Name, ctx.Err())
		case <-tick.C:
		}
	}
}

// purgeTap drops what waits in the tap's queue: unread frames by its count, which is
// right again afterwards.
func (n *NIC) purgeTap(unread int32) error {
	if err := emptyQueue(n.tap.Attrs().Index); err != nil {
		return fmt.Errorf("tap %s: drop what the SVM does not read: %w", n.tap.Attrs().Name, err)
	}
	n.lost.unread.Add(uint64(max(unread, 0)))
	// They were let in, and will never be counted as sent.
	n.tapBase -= uint32(unread)
	var meta bpf.LockstepLsMeta
	if err := n.objs.LsMeta.Lookup(uint32(0), &meta); err != nil {
		return fmt.Errorf("read what the tables are for: %w", err)
	}
	meta.TapBase = n.tapBase
	if err := n.objs.LsMeta.Put(uint32(0), &meta); err != nil {
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
