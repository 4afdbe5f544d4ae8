// SPDX-License-Identifier: Apache-2.0

package scale

import (
	"context"
	"fmt"

	"github.com/lockstep-ft/lockstep/bench/engines"
)

// colo measures QEMU's colo-compare without everything around it, below and above the 16384 connections that
// its table has room for (HASHTABLE_MAX_SIZE in its net/colo.h): a connection more clears the whole table.
func (b *bench) colo(ctx context.Context) error {
	if b.o.QEMU == "" {
		return nil
	}
	const group = "colo-compare alone, made packets, "
	for _, n := range b.qemu {
		for round := range b.rounds {
			b.progress(fmt.Sprintf("colo-compare with %s connections, round %d of %d", count(n), round+1, b.rounds))
			m, err := engines.ManyConnections(ctx, b.o.QEMU, n, opening)
			if err != nil {
				return fmt.Errorf("colo-compare with %s connections: %w", count(n), err)
			}
			for _, f := range []struct {
				group, unit string
				less        bool
				value       float64
			}{
				{"held frames that it lost when one more connection came", "%", true, 100 * float64(m.Held-m.Survived) / float64(m.Held)},
				{"checkpoints that it asked for", "", true, float64(m.Requests)},
				{"CPU of a further frame", "µs", true, float64(m.Each) / 1e3},
			} {
				at := figure(group+f.group, f.unit, f.less, n, "connections")
				b.cases.Add(at, chain, f.value)
				b.cases.Instead(at, alone, "it has no table of connections")
				b.cases.Instead(at, lockstep, "with real connections, above")
			}
		}
	}
	return nil
}
