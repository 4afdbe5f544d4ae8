// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
)

// aPair is two streams of one length at a position each.
type aPair struct {
	a, b   []byte
	pa, pb uint32
}

// maxLaw is the longest range of the two tests of the digest: a GSO frame's.
const maxLaw = 64 << 10

// lawStream is a stream at a random position. Its pieces are of the kinds that digests of
// weaker designs confuse: zeroes, one byte repeated, a block repeated, noise.
func lawStream(r *rand.Rand, n int) []byte {
	b := make([]byte, 0, n)
	for len(b) < n {
		m := min(1+r.IntN(n), n-len(b))
		switch r.IntN(4) {
		case 0:
			b = append(b, make([]byte, m)...)
		case 1:
			b = append(b, bytes.Repeat([]byte{byte(r.Uint32())}, m)...)
		case 2:
			block := noise(r, 1+r.IntN(64))
			b = append(b, bytes.Repeat(block, m/len(block)+1)[:m]...)
		default:
			b = append(b, noise(r, m)...)
		}
	}
	return b
}

func noise(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// lawLength is short, around a block's or the longest, all about as often.
func lawLength(r *rand.Rand) int {
	switch r.IntN(8) {
	case 0:
		return r.IntN(maxLaw + 1)
	case 1:
		return blockBytes - 20 + r.IntN(40)
	}
	return r.IntN(200)
}

// TestSumsAdd: the digest of a range is the sum of its parts' digests at their positions, for
// every length up to 64 KiB, every alignment, every block boundary and wherever the stream
// is cut.
func TestSumsAdd(t *testing.T) {
	seed := lawSeed()
	r := rand.New(rand.NewPCG(seed, 1))
	for n := 0; n <= maxLaw; n += 1 + n/64 {
		k := testKeys(byte(n))
		b := lawStream(r, n)
		for align := range uint32(16) {
			pos := r.Uint32()&^15 | align
			if align%4 == 0 {
				pos = -uint32(r.IntN(n+1))&^15 | align // over the wrap
			}
			cuts := []int{0, n}
			for range r.IntN(6) {
				cuts = append(cuts, r.IntN(n+1))
			}
			slices.Sort(cuts)
			var sum Sum
			for i := range cuts[1:] {
				sum = sum.plus(k.Sum(pos+uint32(cuts[i]), b[cuts[i]:cuts[i+1]]))
			}
			if whole := k.Sum(pos, b); sum != whole {
				t.Fatalf("seed %d: %d bytes at %#x cut at %v: the parts add up to %x, the whole is %x", seed, n, pos, cuts, sum, whole)
			}
		}
	}
}

// unequal are the kinds of pairs that TestUnequal tries, each made of a stream.
var unequal = []struct {
	name string
	make func(r *rand.Rand, p *aPair)
}{
	{"one bit", func(r *rand.Rand, p *aPair) { p.b[r.IntN(len(p.b))] ^= 1 << r.IntN(8) }},
	{"one byte", func(r *rand.Rand, p *aPair) { p.b[r.IntN(len(p.b))] += byte(1 + r.IntN(255)) }},
	{"top bits of two words", func(r *rand.Rand, p *aPair) {
		for range 2 {
			p.b[r.IntN(len(p.b)/4+1)*4%len(p.b)] ^= 0x80
		}
	}},
	{"the same bit in two blocks", func(r *rand.Rand, p *aPair) {
		i, bit := r.IntN(len(p.b)), byte(1)<<r.IntN(8)
		p.b[i] ^= bit
		if i+blockBytes < len(p.b) {
			p.b[i+blockBytes] ^= bit
		}
	}},
	{"two words swapped", func(r *rand.Rand, p *aPair) { swap(p.b, 4*r.IntN(len(p.b)/4+1), 4*r.IntN(len(p.b)/4+1), 4) }},
	{"two bytes swapped", func(r *rand.Rand, p *aPair) { swap(p.b, r.IntN(len(p.b)), r.IntN(len(p.b)), 1) }},
	{"two blocks swapped", func(r *rand.Rand, p *aPair) { swap(p.b, 0, blockBytes*(1+r.IntN(15)), blockBytes) }},
	{"shifted", func(r *rand.Rand, p *aPair) {
		by := min(1+r.IntN(16), len(p.b))
		copy(p.b, p.a[by:])
		copy(p.b[len(p.b)-by:], p.a[:by])
	}},
	{"at another position", func(r *rand.Rand, p *aPair) { p.pb += 1 + uint32(r.IntN(16)) }},
	{"in another block", func(r *rand.Rand, p *aPair) { p.pb += blockBytes * (1 + r.Uint32N(1<<20-1)) }},
	{"zeroes for a part", func(r *rand.Rand, p *aPair) {
		from := r.IntN(len(p.b))
		clear(p.b[from : from+r.IntN(len(p.b)-from)+1])
	}},
	{"a block repeated", func(r *rand.Rand, p *aPair) {
		n := min(1+r.IntN(64), len(p.b))
		for i := n; i < len(p.b); i += n {
			copy(p.b[i:], p.b[:n])
		}
	}},
	{"words of one sum", func(r *rand.Rand, p *aPair) { // what one loses the other gets
		i, j := r.IntN(len(p.b)), r.IntN(len(p.b))
		p.b[i]++
		p.b[j]--
	}},
	{"another stream", func(r *rand.Rand, p *aPair) { p.b = lawStream(r, len(p.a)) }},
	{"reversed", func(_ *rand.Rand, p *aPair) { slices.Reverse(p.b) }},
	{"complement", func(_ *rand.Rand, p *aPair) {
		for i := range p.b {
			p.b[i] = ^p.b[i]
		}
	}},
}

// swap exchanges n bytes at i and at j, where both are inside b.
func swap(b []byte, i, j, n int) {
	if max(i, j)+n > len(b) || i > j-n && j > i-n {
		return
	}
	was := bytes.Clone(b[i : i+n])
	copy(b[i:], b[j:j+n])
	copy(b[j:], was)
}

// TestUnequal: no two streams that differ have one digest, of the kinds that weaker digests
// confuse and of noise, with new keys for every thousand pairs. A stream that zeroes follow has
// the digest of the one without them, and these are no pair: a match is of two streams up to
// one position.
func TestUnequal(t *testing.T) {
	pairs, seed := 100_000, lawSeed()
	if os.Getenv("LOCKSTEP_SOAK") != "" {
		pairs = 10_000_000
	}
	r := rand.New(rand.NewPCG(seed, 2))
	var keys *Keys
	tried, bytesTried := make(map[string]int), 0
	for n, rekey := 0, 0; n < pairs; {
		if n >= rekey {
			rekey = n + 1000
			var err error
			if keys, err = NewKeys(rand.NewChaCha8([32]byte(noise(r, 32)))); err != nil {
				t.Fatal(err)
			}
		}
		p := aPair{a: lawStream(r, max(1, lawLength(r))), pa: r.Uint32()}
		if r.IntN(2) == 0 {
			p.pa = p.pa&^(blockBytes-1) - uint32(r.IntN(64)) // at a block's end
		}
		first := keys.Sum(p.pa, p.a)
		if longer := keys.Sum(p.pa, append(p.a, make([]byte, 1+r.IntN(40))...)); longer != first {
			t.Fatalf("seed %d: zeroes have a digest", seed)
		}
		for _, kind := range unequal {
			q := aPair{p.a, bytes.Clone(p.a), p.pa, p.pa}
			kind.make(r, &q)
			if bytes.Equal(q.a, q.b) && (q.pa == q.pb || !slices.ContainsFunc(q.a, func(c byte) bool { return c != 0 })) {
				continue // equal: the change changed nothing, or is of zeroes alone
			}
			n++
			tried[kind.name]++
			bytesTried += len(q.b)
			if keys.Sum(q.pb, q.b) == first {
				t.Fatalf("seed %d, pair %d, %s: %d bytes at %#x and %#x collide\n% x\n% x", seed, n, kind.name, len(q.a), q.pa, q.pb, q.a[:min(64, len(q.a))], q.b[:min(64, len(q.b))])
			}
		}
	}
	what := fmt.Sprintf("seed %d: ", seed)
	for _, kind := range unequal {
		what += fmt.Sprintf("%s %d, ", kind.name, tried[kind.name])
		if tried[kind.name] < pairs/1000 {
			t.Errorf("only %d pairs of kind %q", tried[kind.name], kind.name)
		}
	}
	t.Logf("%s%d bytes, no collision", what, bytesTried)
}

// lawSeed is LOCKSTEP_SEED, to repeat a failure, or a new one in a soak.
func lawSeed() uint64 {
	var seed uint64 = 1
	if s := os.Getenv("LOCKSTEP_SEED"); s != "" {
		fmt.Sscan(s, &seed)
	} else if os.Getenv("LOCKSTEP_SOAK") != "" {
		seed = rand.Uint64()
	}
	return seed
}
