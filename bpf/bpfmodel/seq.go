// SPDX-License-Identifier: Apache-2.0

package bpfmodel

// Sequence numbers and timestamps wrap at 2^32: a comes after b when it is less
// than half the circle ahead (RFC 9293, section 3.4).

func after(a, b uint32) bool { return int32(a-b) > 0 }
