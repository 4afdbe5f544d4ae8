// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"time"
)

// orderEvery is how long a foreign program in front of ours may go unnoticed.
const orderEvery = 200 * time.Millisecond

// order is what the watch over the programs' order knows of a NIC.
type order struct {
	intruder string // seen last
	open     bool   // nothing is left to be done about it
}

// watchOrder fails closed while a program that is not ours sees a guest's frames
// before ours does: it could let them out.
func (d *Daemon) watchOrder(ctx context.Context) {
	tick := time.NewTicker(d.opt.orderEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		for _, n := range d.nics {
			if errors.Is(n.checkOrder(n.do), errStopped) {
				return
			}
		}
	}
}

// checkOrder looks once. do runs what belongs into the NIC's loop.
func (n *nic) checkOrder(do func(func() error) error) error {
	intruder, onTap, err := n.dp.CheckOrder()
	if err != nil {
		intruder, onTap = err.Error(), true // who knows who is in front
	}
	if intruder == "" && n.order.open {
		return nil
	}
	// What failed the last time may succeed now.
	err = do(func() error { return n.failClosed(intruder, onTap) })
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
