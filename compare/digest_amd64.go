// SPDX-License-Identifier: Apache-2.0

package compare

var hasSIMD = hasAVX2()

func hasAVX2() bool

// sumAVX2 is the sum of n > 0 times 4 words at b, times the keys of each lane. It reads 4 bytes
// behind the keys.
//
//go:noescape
func sumAVX2(b *byte, k0, k1 *uint64, n int) (d0, d1 uint64)

// sumSIMD adds up what it can of whole words: done of them.
func sumSIMD(b []byte, k0, k1 []uint64) (d0, d1 uint64, done int) {
	n := min(len(b)/16, (min(len(k0), len(k1))-1)/4)
	if n <= 0 {
		return 0, 0, 0
	}
	d0, d1 = sumAVX2(&b[0], &k0[0], &k1[0], n)
	return d0, d1, 4 * n
}
