// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"encoding/binary"
	"fmt"
	"io"
)

const (
	blockBytes = 4096
	blockWords = blockBytes / 4
	low        = 1<<32 - 1 // of a 64-bit word
)

// Keys are the secrets of the stream digest, of one session and term. The
// kernel holds the same.
//
// With w the little-endian 32-bit words of a stream (bytes outside the range
// read as 0), word i of block b = pos>>12 having key k[i mod 1024], a lane's
// digest is
//
//	D(range) = Σ_b m(b) · Σ_i w[i]·k[i mod 1024]   (mod 2^64)
//
// where m(b) is an odd number mixed from b and a secret of the lane. Words that
// straddle two adjacent ranges are the sum of their halves, so D(A∪B) =
// D(A)+D(B) however a stream is cut; 4096 divides 2^32, so this holds across
// the wrap of sequence numbers too.
//
// # Collisions
//
// Let two different streams have equal length and position, keys being uniform
// and unknown to whoever chose the streams. They collide in a lane iff
// Σ_i c_i·k_i = 0 (mod 2^64), with c_i = Σ_b m(b)·δ(b,i) and δ(b,i) the
// difference of word i in block b, |δ| < 2^32. If some c_i is not 0, fix all
// other keys: at most 2^t of the 2^64 values of k_i solve the equation, 2^t
// being the power of two in c_i. Hence:
//
//   - A difference that lies within one block (or in which some word index
//     differs in one block only): c_i = m·δ with m odd, so t ≤ 31 and a lane
//     collides with probability at most 2^-33. This bound is reached: flip the
//     top bit of one word.
//   - The same word in two blocks: c_i = m(b)·δ ± m(b')·δ', and the sum of two
//     odd numbers is even. The worst is the top bit of both, δ = δ' = 2^31. With
//     m(b), m(b') independent odd numbers the two in m(b) ± m(b') is 2^j with
//     probability 2^-j, so a lane collides with probability
//     Σ_{j=1..32} 2^-j·2^-(33-j) + 2^-32 = 34·2^-33 < 2^-27.9.
//     That mix() makes m(b) and m(b') independent is an assumption, not a
//     theorem: mix is a fixed permutation, keyed by 64 secret bits.
//   - Lanes have independent keys and independent secrets behind m, so their
//     probabilities multiply: 2^-66 for the first case, below 2^-55 for the second.
//     With one m for both lanes a bad m would hit them together.
type Keys struct {
	Mix [2]uint64
	K   [2][blockWords]uint64
}

// NewKeys draws keys from seed, which is crypto/rand.Reader outside tests.
func NewKeys(seed io.Reader) (*Keys, error) {
	k := new(Keys)
	var buf [8 * (2 + 2*blockWords)]byte
	if _, err := io.ReadFull(seed, buf[:]); err != nil {
		return nil, fmt.Errorf("digest keys: %w", err)
	}
	rest := buf[:]
	next := func() uint64 {
		v := binary.LittleEndian.Uint64(rest)
		rest = rest[8:]
		return v
	}
	for lane := range k.K {
		k.Mix[lane] = next()
		for i := range k.K[lane] {
			k.K[lane][i] = next()
		}
	}
	return k, nil
}

// mix is the block multiplier m of lane: odd, so that it loses nothing.
func (k *Keys) mix(lane int, block uint32) uint64 {
	x := uint64(block) ^ k.Mix[lane]
	x ^= x >> 31
	x *= 0x9E3779B97F4A7C15
	x ^= x >> 29
	x *= 0xBF58476D1CE4E5B9
	x ^= x >> 32
	return x | 1
}

// Sum is the digest of b, whose first byte has position pos.
func (k *Keys) Sum(pos uint32, b []byte) Sum {
	var s Sum
	for len(b) > 0 {
		n := min(blockBytes-int(pos%blockBytes), len(b))
		d0, d1 := k.block(pos%blockBytes, b[:n])
		s[0] += d0 * k.mix(0, pos/blockBytes)
		s[1] += d1 * k.mix(1, pos/blockBytes)
		pos += uint32(n)
		b = b[n:]
	}
	return s
}

// block is the inner sum of both lanes over b, which lies within one block at
// offset off.
func (k *Keys) block(off uint32, b []byte) (d0, d1 uint64) {
	i := int(off / 4)
	if lead := off % 4; lead != 0 {
		n := min(4-int(lead), len(b))
		w := word(b[:n]) << (8 * lead)
		d0, d1 = w*k.K[0][i], w*k.K[1][i]
		b = b[n:]
		i++
	}
	k0, k1 := k.K[0][i:], k.K[1][i:]
	if hasSIMD {
		e0, e1, n := sumSIMD(b, k0, k1)
		d0, d1 = d0+e0, d1+e1
		b, k0, k1 = b[4*n:], k0[n:], k1[n:]
	}
	for len(b) >= 16 && len(k0) >= 4 && len(k1) >= 4 {
		// Through arrays, so that bounds are checked once.
		w, x, y := (*[16]byte)(b), (*[4]uint64)(k0), (*[4]uint64)(k1)
		v, u := binary.LittleEndian.Uint64(w[:8]), binary.LittleEndian.Uint64(w[8:])
		d0 += v&low*x[0] + v>>32*x[1] + u&low*x[2] + u>>32*x[3]
		d1 += v&low*y[0] + v>>32*y[1] + u&low*y[2] + u>>32*y[3]
		b, k0, k1 = b[16:], k0[4:], k1[4:]
	}
	for len(b) > 0 {
		n := min(4, len(b))
		w := word(b[:n])
		d0 += w * k0[0]
		d1 += w * k1[0]
		b, k0, k1 = b[n:], k0[1:], k1[1:]
	}
	return d0, d1
}

// word reads up to four bytes, the missing upper ones as 0.
func word(b []byte) uint64 {
	var w uint64
	for i, c := range b {
		w |= uint64(c) << (8 * i)
	}
	return w
}

func (s Sum) plus(o Sum) Sum  { return Sum{s[0] + o[0], s[1] + o[1]} }
func (s Sum) minus(o Sum) Sum { return Sum{s[0] - o[0], s[1] - o[1]} }
