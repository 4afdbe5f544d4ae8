// SPDX-License-Identifier: Apache-2.0

package sim

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
