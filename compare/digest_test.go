// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"math"
	"math/rand/v2"
	"strconv"
	"testing"

	"pgregory.net/rapid"
)

func testKeys(seed byte) *Keys {
	k, err := NewKeys(rand.NewChaCha8([32]byte{seed}))
	if err != nil {
		panic(err)
	}
	return k
}

// slowSum is the formula of [Keys], byte by byte.
func slowSum(k *Keys, pos uint32, b []byte) Sum {
	var s Sum
	for _, c := range b {
		for lane := range s {
			w := uint64(c) << (8 * (pos % 4))
			s[lane] += k.mix(lane, pos>>12) * (w * k.K[lane][pos>>2&1023])
		}
		pos++
	}
	return s
}

func TestSumIsTheFormula(t *testing.T) {
	t.Run("simd", testSum)
	defer func(has bool) { hasSIMD = has }(hasSIMD)
	hasSIMD = false
	t.Run("scalar", testSum)
}

func testSum(t *testing.T) {
	k := testKeys(1)
	rapid.Check(t, func(t *rapid.T) {
		pos := genPos.Draw(t, "pos")
		b := rapid.SliceOfN(rapid.Byte(), 0, 64).Draw(t, "b")
		for range rapid.IntRange(0, 9).Draw(t, "double") {
			b = append(b, b...)
		}
		if got, want := k.Sum(pos, b), slowSum(k, pos, b); got != want {
			t.Fatalf("Sum(%#x, %d bytes) = %x, formula says %x", pos, len(b), got, want)
		}
	})
}

// genPos likes block edges and the wrap.
var genPos = rapid.Custom(func(t *rapid.T) uint32 {
	return rapid.SampledFrom([]uint32{0, 4096, 1 << 31, math.MaxUint32 - 4096, math.MaxUint32}).Draw(t, "near") +
		uint32(rapid.IntRange(-4100, 4100).Draw(t, "by"))
})

// TestCollisionShape checks the shape of the bound that [Keys] states. A true
// collision is too rare to see, so keys are weakened to multiples of 2^(33-s):
// then flipping the top bit of a word collides with probability 2^-s per lane,
// and flipping it in the same word of two blocks with (s+1)·2^-s. With s = 33,
// which is no weakening, these are the 2^-33 and 34·2^-33 of the doc.
func TestCollisionShape(t *testing.T) {
	const s, trials = 4, 60_000
	src := rand.NewChaCha8([32]byte{7})
	r := rand.New(src)
	k := new(Keys)
	one, two := make([]byte, 4), make([]byte, blockBytes+4)
	one[3], two[3], two[blockBytes+3] = 0x80, 0x80, 0x80
	zero := make([]byte, len(two))

	var oneLane, oneBoth, twoLane, twoBoth float64
	for range trials {
		for lane := range k.K {
			k.Mix[lane] = r.Uint64()
			k.K[lane][0] = r.Uint64() << (33 - s)
		}
		count := func(b []byte, lane, both *float64) {
			d := k.Sum(0, b).minus(k.Sum(0, zero[:len(b)]))
			if d[0] == 0 {
				*lane++
				if d[1] == 0 {
					*both++
				}
			}
		}
		count(one, &oneLane, &oneBoth)
		count(two, &twoLane, &twoBoth)
	}
	p1, p2 := math.Exp2(-s), (s+1)*math.Exp2(-s)
	for _, c := range []struct {
		name      string
		seen, per float64
	}{
		{"one word, one lane", oneLane, p1},
		{"one word, both lanes", oneBoth, p1 * p1},
		{"two blocks, one lane", twoLane, p2},
		{"two blocks, both lanes", twoBoth, p2 * p2},
	} {
		// Five standard deviations; the seed is fixed, so this cannot flake.
		want := trials * c.per
		if math.Abs(c.seen-want) > 5*math.Sqrt(want) {
			t.Errorf("%s: %v collisions in %d trials, want about %.0f", c.name, c.seen, trials, want)
		}
	}
}

func TestSumAllocatesNothing(t *testing.T) {
	k, b := testKeys(1), make([]byte, 65000)
	if n := testing.AllocsPerRun(10, func() { k.Sum(12345, b) }); n != 0 {
		t.Errorf("Sum allocates %v times", n)
	}
}

func BenchmarkSum(b *testing.B) {
	k := testKeys(1)
	for _, n := range []int{64, 1448, 65160} {
		buf := make([]byte, n)
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			b.SetBytes(int64(n))
			for b.Loop() {
				k.Sum(12347, buf)
			}
		})
	}
}
