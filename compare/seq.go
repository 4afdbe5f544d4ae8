// SPDX-License-Identifier: Apache-2.0

package compare

// Sequence numbers wrap: a is before b when the shorter way from a to b is up.

func before(a, b uint32) bool { return int32(a-b) < 0 }
func after(a, b uint32) bool  { return int32(a-b) > 0 }

func minSeq(a, b uint32) uint32 {
	if before(b, a) {
		return b
	}
	return a
}

func maxSeq(a, b uint32) uint32 {
	if after(b, a) {
		return b
	}
	return a
}

// reach is how far from the compared point a position may lie: twice it must
// stay below 2^31 for comparisons to order all positions of a connection. TCP's
// largest window is as much.
const reach = 1 << 30

// near reports whether pos lies within reach of mid.
func near(pos, mid uint32) bool { return pos-mid+reach <= 2*reach }
