// SPDX-License-Identifier: Apache-2.0

package sim

import "github.com/lockstep-ft/lockstep/bpf"

// programs are the mutations of the kernel's programs.
var programs = map[string]bpf.LockstepLsMutation{
	"R27 bytes": bpf.LockstepLsMutationLS_MUTATE_FAST_R1, "R27 acks": bpf.LockstepLsMutationLS_MUTATE_FAST_R2,
}

// mutate switches the run's mutation on in a daemon's cores. The machines have it from their
// configs.
func (w *world) mutate(d *daemon) {
	if w.mutation == "" {
		return
	}
	if p := d.loop.Primary; p != nil {
		p.Mutate(w.mutation)
	}
	if s := d.loop.Secondary; s != nil {
		s.Mutate(w.mutation)
	}
}
