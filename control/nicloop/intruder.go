// SPDX-License-Identifier: Apache-2.0

package nicloop

import (
	"errors"

	"github.com/lockstep-ft/lockstep/control/datapath"
)

// order is what the watch over the programs' order knows of a NIC.
type order struct {
	intruder string // seen last
	open     bool   // nothing is left to be done about it
}

// CheckOrder fails closed while a program that is not ours sees the guest's frames before
// ours does: it could let them out. It looks once. do runs what belongs into the loop.
func (n *Loop) CheckOrder(do func(func() error) error) error {
	intruder, onTap, err := n.DP.CheckOrder()
	if err != nil {
		intruder, onTap = err.Error(), true // who knows who is in front
	}
	if intruder == "" && n.order.open {
		return nil
	}
	// What failed the last time may succeed now.
	err = do(func() error { return n.FailClosed(intruder, onTap) })
	log := n.log
	if err != nil {
		log = log.With("err", err)
	}
	switch {
	case intruder == n.order.intruder:
	case intruder != "":
		log.Error("shut: frames may pass by lockstep", "why", intruder)
	default:
		log.Info("lockstep's programs come first again")
	}
	n.order.intruder, n.order.open = intruder, intruder == "" && err == nil
	return err
}

// Intruder is the foreign program in front of ours, "" when there is none, and how often there
// was one.
func (n *Loop) Intruder() (name string, times uint64) { return n.intruder, n.intruded }

// FailClosed shuts the NIC while a foreign program is in front of ours; at the guest's tap
// that one could let frames out itself, so there the tap goes down as well. "":
// none is any more.
func (n *Loop) FailClosed(intruder string, onTap bool) error {
	var errs []error
	if intruder != "" && n.intruder == "" {
		n.intruded++
		errs = append(errs, n.DP.SetMode(datapath.ModeShut))
	}
	// At first, too: whatever set the tap down, the programs are in their place now.
	if onTap != n.tapDown || !n.tapSet {
		err := n.DP.SetTap(!onTap)
		if err == nil {
			n.tapSet, n.tapDown = true, onTap
		}
		errs = append(errs, err)
	}
	before := n.intruder
	n.intruder = intruder
	if intruder == "" && before != "" {
		errs = append(errs, n.SetMode(n.mode))
	}
	return errors.Join(errs...)
}
