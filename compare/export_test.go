// SPDX-License-Identifier: Apache-2.0

package compare

// Flows are all flows, in no order.
func (p *Primary) Flows() []Flow {
	w := p.WalkFlows()
	fs, _ := w.Next(p, len(w.left), nil)
	return fs
}

// mutate turns rules off. Nothing outside the tests can.
func (p *Primary) mutate(m mutation)   { p.mut = m }
func (s *Secondary) mutate(m mutation) { s.mut = m }
