// SPDX-License-Identifier: Apache-2.0

package bpfmodel

// Guess switches R9 off: offsets are guessed from the remote's first ack, as
// QEMU's filter-rewriter does, and active opens are not translated.
func (t *Table) Guess() { t.guess = true }
