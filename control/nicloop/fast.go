// SPDX-License-Identifier: Apache-2.0

package nicloop

import (
	"cmp"

	"github.com/lockstep-ft/lockstep/compare"
)

// Fast path (R27): P's core offers connections to the kernel, and the loop takes them back before the
// core hears of them again, and all of them before anything that is about the whole NIC.

// fastPath switches it on or off. Off, no connection is the kernel's.
func (n *Loop) fastPath(on bool) error {
	if n.fast == nil {
		return nil
	}
	n.fastOn = on
	if on {
		return n.fast.SetFast(n.Primary.Owners().Offers())
	}
	if err := n.fast.SetFast(false); err != nil {
		return err
	}
	n.owned = n.Primary.Owners().All(n.owned[:0])
	for i := range n.owned {
		n.take(n.owned[i], compare.EvFreeze)
	}
	evs, err := n.fast.TakeDatagrams(nil)
	now := n.DP.Now()
	for i := range evs {
		n.takeIn(now, &evs[i])
	}
	return err
}

// changeOwner carries out what the core wants of the fast path, after what was to be sent before.
func (n *Loop) changeOwner(e *compare.Effect) {
	switch e.Op {
	case compare.OpGrant:
		n.grant(e.Tuple)
	case compare.OpTake:
		if n.Primary.Owners().Kernel(&e.Tuple) {
			n.take(e.Tuple, compare.EvTick)
		}
	case compare.OpForget:
		if err := n.fast.Forget(e.Tuple); err != nil {
			n.log.Debug("a connection that is over stays in the kernel's table", "connection", e.Tuple, "err", err)
		}
	case compare.OpEven:
		if err := n.fast.Even(e.Tuple, n.DP.Now()); err != nil {
			n.log.Debug("datagrams stay here", "flow", e.Tuple, "err", err)
		}
	}
}

// grant hands a connection over that the core offers.
func (n *Loop) grant(t compare.Tuple) {
	ev := compare.Event{Kind: compare.EvGranted, Seg: compare.Segment{Tuple: t, Slot: compare.NoSlot}}
	if h, ok := n.Primary.Owners().Offer(&t); ok && n.fast != nil {
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

// WhyGivenBack are GivenBack's words; for any other event it is "other".
var WhyGivenBack = map[compare.EventKind]string{
	compare.EvPVM: "pvm", compare.EvSVM: "svm", compare.EvClient: "client", compare.EvYield: "late", compare.EvTick: "look", compare.EvFreeze: "order",
}

// GivenBack counts the connections that were taken back, by why: a frame of the PVM, a digest record of the SVM or a
// SYN, FIN or RST of the client that the kernel leaves to the core; nothing for too long from one of the guests
// ("late"); the look once a second; an order, such as a checkpoint.
func (n *Loop) GivenBack() map[string]uint64 { return n.taken }

// take takes a connection back from the kernel, because of an event of that kind.
func (n *Loop) take(t compare.Tuple, why compare.EventKind) {
	n.taken[cmp.Or(WhyGivenBack[why], "other")]++
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
