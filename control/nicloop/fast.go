// SPDX-License-Identifier: Apache-2.0

package nicloop

import "github.com/lockstep-ft/lockstep/compare"

// Fast path (R27): P's core offers connections to the kernel, and the loop takes them back before the
// core hears of them again, and all of them before anything that is about the whole NIC.

// fastPath switches it on or off. Off, no connection is the kernel's.
func (n *Loop) fastPath(on bool) error {
	if n.fast == nil {
		return nil
	}
	if on {
		return n.fast.SetFast(n.Primary.FastPath())
	}
	if err := n.fast.SetFast(false); err != nil {
		return err
	}
	n.owned = n.Primary.OwnedAll(n.owned[:0])
	for i := range n.owned {
		n.take(n.owned[i])
	}
	return nil
}

// changeOwner carries out what the core wants of the fast path, after what was to be sent before.
func (n *Loop) changeOwner(e *compare.Effect) {
	switch e.Op {
	case compare.OpGrant:
		n.grant(e.Tuple)
	case compare.OpTake:
		if n.Primary.Owned(&e.Tuple) {
			n.take(e.Tuple)
		}
	case compare.OpForget:
		if err := n.fast.Forget(e.Tuple); err != nil {
			n.log.Debug("a connection that is over stays in the kernel's table", "connection", e.Tuple, "err", err)
		}
	}
}

// grant hands a connection over that the core offers.
func (n *Loop) grant(t compare.Tuple) {
	ev := compare.Event{Kind: compare.EvGranted, Seg: compare.Segment{Tuple: t, Slot: compare.NoSlot}}
	if h, ok := n.Primary.Offer(&t); ok && n.fast != nil {
		granted, err := n.fast.Grant(t, &h)
		if err != nil {
			n.log.Debug("a connection stays here", "connection", t, "err", err)
		}
		if granted {
			ev.Handover = &h
		}
	}
	n.step(n.DP.Now(), &ev)
}

// take takes a connection back from the kernel.
func (n *Loop) take(t compare.Tuple) {
	h, evs, err := n.fast.Take(t, nil)
	if err != nil {
		n.log.Warn("what the kernel knows of a connection is lost", "connection", t, "err", err)
		h = nil
	}
	now := n.DP.Now()
	n.step(now, &compare.Event{Kind: compare.EvTaken, Seg: compare.Segment{Tuple: t, Slot: compare.NoSlot}, Handover: h})
	for i := range evs {
		n.takeIn(now, &evs[i])
	}
}
