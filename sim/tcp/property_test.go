// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

var seeds = flag.Int("seeds", 300, "how many schedules TestStreams tries")

// randomConfig is one that two stacks may meet with.
func randomConfig(r *rand.Rand) Config {
	one := func(n int) bool { return r.IntN(n) == 0 }
	c := Config{
		NoScale: one(4), NoSACK: one(4), NoTimestamps: one(4), ECN: one(2), Autocork: one(2),
		NoNagle: one(3), NoTLP: one(3), NoFRTO: one(4),
		RcvBuf: 2000 << r.IntN(8), SndBuf: 2000 << r.IntN(8), MSS: []int{0, 0, 536, 1000, 90}[r.IntN(5)],
	}
	if one(3) {
		c.WindowScale = uint8(r.IntN(15))
	}
	return c
}

func randomLink(r *rand.Rand) link {
	l := link{delay: time.Duration(r.Int64N(int64(30 * time.Millisecond)))}
	if r.IntN(2) == 0 {
		l.loss = r.Float64() * 0.1
	}
	if r.IntN(2) == 0 {
		l.double = r.Float64() * 0.1
	}
	if r.IntN(2) == 0 {
		l.jitter = time.Duration(1 + r.Int64N(int64(30*time.Millisecond)))
	}
	return l
}

// Whatever the link does, streams arrive whole and in order, and both ends close.
func TestStreams(t *testing.T) {
	for seed := range uint64(*seeds) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 2))
			a, b := randomConfig(r), randomConfig(r)
			if r.IntN(4) == 0 {
				a.Addr, b.Addr = addrA6, addrB6
			}
			w := newWorld(t, a, b, randomLink(r), seed)
			w.exchange(r.IntN(60000), r.IntN(60000), 30*time.Minute, func(a, b *stream) {
				if r.IntN(3) == 0 { // a reader that is away now and then
					a.lazy = func(now int64) bool { return now/1e9%3 != 0 }
					b.lazy = func(now int64) bool { return now/1e9%4 == 0 }
				}
			})
		})
	}
}

func TestTransfer(t *testing.T) {
	w := newWorld(t, Config{}, Config{}, link{delay: time.Millisecond}, 1)
	w.exchange(1<<20, 1<<20, time.Minute, nil)
}
