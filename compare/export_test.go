// SPDX-License-Identifier: Apache-2.0

package compare

// Flows are all flows, in no order.
func (p *Primary) Flows() []Flow {
	w := p.WalkFlows()
	fs, _ := w.Next(p, len(w.left), nil)
	return fs
}

// mutate turns rules off. Nothing outside the tests can. What always has to hold then
// need not, and the rule's own test is to find that out.
func (p *Primary) mutate(m mutation)   { p.mut, p.asserts = m, p.asserts && m == 0 }
func (s *Secondary) mutate(m mutation) { s.mut = m }
