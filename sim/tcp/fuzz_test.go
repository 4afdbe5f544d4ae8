// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"
)

// near is a sequence number around one that matters.
func near(r *rand.Rand, seq uint32) uint32 {
	switch r.IntN(4) {
	case 0:
		return seq
	case 1:
		return seq + uint32(r.IntN(5)) - 2
	case 2:
		return seq + uint32(r.IntN(6000)) - 3000
	}
	return seq + uint32(r.IntN(400000)) - 200000
}

// randomSegment sends to a connection what its peer never would.
func randomSegment(r *rand.Rand, w *world, c *conn) {
	other := w.stack[1]
	if c.s == other {
		other = w.stack[0]
	}
	h := header{
		seq: near(r, []uint32{c.rcv.nxt, c.rcv.wup, c.rcv.nxt + c.rcv.window(), c.irs}[r.IntN(4)]),
		ack: near(r, []uint32{c.snd.una, c.snd.nxt, c.iss}[r.IntN(3)]),
		wnd: uint16(r.IntN(1 << r.IntN(17))), urg: uint16(r.IntN(3000)), flags: ack,
		tos: uint8(r.IntN(4)),
	}
	if r.IntN(3) == 0 {
		h.flags = uint8(r.IntN(256))
	} else if r.IntN(2) == 0 {
		h.flags |= psh
	}
	if r.IntN(20) != 0 {
		h.flags &^= rst
	}
	var opts []byte
	if r.IntN(2) == 0 {
		opts = appendTimestamp(opts, near(r, c.tsRecent), near(r, c.tsNow(w.now)))
	}
	if r.IntN(2) == 0 {
		var blocks []span
		for range 1 + r.IntN(3) {
			blocks = append(blocks, span{near(r, c.snd.una), near(r, c.snd.nxt)})
		}
		if len(opts) > 0 {
			blocks = blocks[:1]
		}
		opts = appendSACK(opts, blocks)
	}
	if h.flags&syn != 0 {
		opts = append(opts, optMSS, 4, uint8(r.IntN(6)), uint8(r.IntN(256)))
	}
	if r.IntN(20) == 0 {
		for i := range opts {
			opts[i] = byte(r.Uint32())
		}
	}
	route := other.route(c.s.cfg.Addr, protoTCP)
	other.transmit(&route, c.tuple.remote, c.tuple.local, h, opts, make([]byte, max(0, r.IntN(3000)-1500)))
}

// Whatever comes in, and whatever is called when: the stack keeps its books, and does not fall over.
func TestRandomSegments(t *testing.T) {
	for seed := range uint64(*seeds) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 5))
			w := newWorld(t, randomConfig(r), randomConfig(r), randomLink(r), seed)
			ids := [2]ID{}
			ids[0] = w.stack[0].Dial(w.now, netip.AddrPortFrom(addrB, port), 5000)
			w.each = func() {
				for _, s := range w.stack {
					checkStack(t, s)
				}
			}
			for range 300 {
				i := r.IntN(2)
				s, id := w.stack[i], ids[i]
				if len(s.conns) == 0 {
					w.run(10 * time.Millisecond)
					continue
				}
				ids[i] = ID(len(s.conns) - 1)
				switch n := r.IntN(100); {
				case n < 40:
					randomSegment(r, w, s.conns[id])
				case n < 55:
					s.Write(w.now, id, make([]byte, r.IntN(10000)))
				case n < 70:
					s.Read(w.now, id, make([]byte, r.IntN(10000)))
				case n < 71:
					s.CloseWrite(w.now, id)
				case n < 72:
					s.Close(w.now, id)
				case n < 73:
					s.Abort(w.now, id)
				case n < 74:
					s.WriteUrgent(w.now, id, make([]byte, r.IntN(10)))
				case n < 76 && s.State(id) == Closed:
					ids[0] = w.stack[0].Dial(w.now, netip.AddrPortFrom(addrB, port), 5000)
				case n < 78:
					w.stack[i] = s.Clone()
				case n < 97:
					w.run(time.Duration(r.Int64N(int64(100 * time.Millisecond))))
				default:
					w.run(time.Duration(r.Int64N(int64(100 * time.Second))))
				}
				w.flush()
				for _, s := range w.stack {
					checkStack(t, s)
				}
			}
		})
	}
}
