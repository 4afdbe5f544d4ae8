// SPDX-License-Identifier: Apache-2.0

package qemu

// SetMask switches R24 off: QEMU reports a write as done when one replica took it.
func SetMask(s *Spec, mask bool) { s.mask = mask }

// OwnPeriod switches R12 off: QEMU makes checkpoints of its own, at the period it has.
func OwnPeriod() Options { return Options{ownPeriod: true} }
