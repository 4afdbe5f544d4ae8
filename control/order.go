// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"time"

	"github.com/lockstep-ft/lockstep/control/nicloop"
)

// orderEvery is how long a foreign program in front of ours may go unnoticed.
const orderEvery = 200 * time.Millisecond

// watchOrder has every NIC look who is in front of it.
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
			if errors.Is(n.CheckOrder(n.Do), nicloop.ErrStopped) {
				return
			}
		}
	}
}
