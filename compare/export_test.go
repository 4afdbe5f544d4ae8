// SPDX-License-Identifier: Apache-2.0

package compare

// mutate turns rules off. Nothing outside the tests can.
func (p *Primary) mutate(m mutation)   { p.mut = m }
func (s *Secondary) mutate(m mutation) { s.mut = m }
