// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"container/heap"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"
)

var (
	macA, macB   = [6]byte{2, 0, 0, 0, 0, 1}, [6]byte{2, 0, 0, 0, 0, 2}
	addrA, addrB = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	addrA6       = netip.MustParseAddr("2001:db8::1")
	addrB6       = netip.MustParseAddr("2001:db8::2")
)

// port is what B listens at.
const port = 80

// flight is a frame on its way.
type flight struct {
	at    int64
	order int
	to    int
	frame []byte
}

type flights []flight

func (f flights) Len() int { return len(f) }
func (f flights) Less(i, j int) bool {
	return f[i].at < f[j].at || f[i].at == f[j].at && f[i].order < f[j].order
}
func (f flights) Swap(i, j int) { f[i], f[j] = f[j], f[i] }
func (f *flights) Push(x any)   { *f = append(*f, x.(flight)) }
func (f *flights) Pop() any {
	last := (*f)[len(*f)-1]
	*f = (*f)[:len(*f)-1]
	return last
}

// link is what is between two stacks.
type link struct {
	delay, jitter time.Duration
	loss, double  float64
}

// world is two stacks, of which the second one listens.
type world struct {
	t     testing.TB
	link  link
	rng   *rand.Rand
	now   int64
	stack [2]*Stack
	order int
	air   flights
	sent  [][]byte // all frames, if keep
	keep  bool
	drop  func(from int, frame []byte) bool
	count int
	each  func() // before each step
}

func newWorld(t testing.TB, a, b Config, l link, seed uint64) *world {
	if !a.Addr.IsValid() {
		a.Addr, b.Addr = addrA, addrB
	}
	a.MAC, a.PeerMAC, b.MAC, b.PeerMAC = macA, macB, macB, macA
	a.Secret, b.Secret = seed+1, seed+2
	w := &world{t: t, link: l, rng: rand.New(rand.NewPCG(seed, 1)), now: 1e9}
	w.stack = [2]*Stack{New(a, seed+3), New(b, seed+4)}
	w.stack[1].Listen(port)
	return w
}

// flush puts what the stacks transmitted on the link.
func (w *world) flush() {
	for i, s := range w.stack {
		for _, f := range s.Take() {
			w.count++
			if w.keep {
				w.sent = append(w.sent, f)
			}
			if w.drop != nil && w.drop(i, f) {
				continue
			}
			copies := 1
			if w.link.double > 0 && w.rng.Float64() < w.link.double {
				copies = 2
			}
			for range copies {
				if w.link.loss > 0 && w.rng.Float64() < w.link.loss {
					continue
				}
				at := w.now + int64(w.link.delay)
				if w.link.jitter > 0 {
					at += w.rng.Int64N(int64(w.link.jitter))
				}
				w.order++
				heap.Push(&w.air, flight{at, w.order, 1 - i, f})
			}
		}
	}
}

// step does what is due next, if that is not after until.
func (w *world) step(until int64) bool {
	if w.each != nil {
		w.each()
	}
	w.flush()
	next := min(w.stack[0].NextDeadline(), w.stack[1].NextDeadline())
	if len(w.air) > 0 {
		next = min(next, w.air[0].at)
	}
	if next > until {
		w.now = max(w.now, until)
		return false
	}
	w.now = max(w.now, next)
	if len(w.air) > 0 && w.air[0].at <= w.now {
		f := heap.Pop(&w.air).(flight)
		w.stack[f.to].Input(w.now, f.frame)
	}
	for _, s := range w.stack {
		if s.NextDeadline() <= w.now {
			s.Tick(w.now)
		}
	}
	w.flush()
	return true
}

// run lets time pass.
func (w *world) run(d time.Duration) {
	for until := w.now + int64(d); w.step(until); {
	}
}

// open makes a connection.
func (w *world) open() (a, b ID) {
	w.t.Helper()
	a = w.stack[0].Dial(w.now, netip.AddrPortFrom(w.stack[1].cfg.Addr, port), 0)
	for until := w.now + int64(5*time.Minute); w.step(until); {
		if id, ok := w.stack[1].Accept(port); ok {
			return a, id
		}
	}
	w.t.Fatal("no connection")
	return 0, 0
}

// stream is an application on one side: it writes and reads, and closes when it has done both.
type stream struct {
	s          *Stack
	id         ID
	out, in    []byte
	written    int
	chunk      func() int
	lazy       func(now int64) bool // does not read now
	eof, ended bool
}

// work does what the application can do now.
func (a *stream) work(now int64) {
	for a.written < len(a.out) {
		n := min(a.chunk(), len(a.out)-a.written)
		if n = a.s.Write(now, a.id, a.out[a.written:a.written+n]); n == 0 {
			break
		}
		a.written += n
	}
	if a.written == len(a.out) && !a.ended {
		a.ended = true
		a.s.CloseWrite(now, a.id)
	}
	if a.lazy != nil && a.lazy(now) {
		return
	}
	var room [4096]byte
	for !a.eof {
		n, eof := a.s.Read(now, a.id, room[:])
		a.in = append(a.in, room[:n]...)
		a.eof = eof
		if n == 0 {
			return
		}
	}
}

func randomBytes(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

// exchange sends as much each way over one connection, and checks that it arrives, and that both ends close.
func (w *world) exchange(up, down int, limit time.Duration, tune func(a, b *stream)) {
	w.t.Helper()
	ia, ib := w.open()
	a := &stream{s: w.stack[0], id: ia, out: randomBytes(w.rng, up)}
	b := &stream{s: w.stack[1], id: ib, out: randomBytes(w.rng, down)}
	a.chunk = func() int { return 1 + w.rng.IntN(5000) }
	b.chunk = a.chunk
	if tune != nil {
		tune(a, b)
	}
	start := w.now
	done := func() bool {
		return a.eof && b.eof && a.ended && b.ended && a.s.Unsent(ia) == 0 && b.s.Unsent(ib) == 0
	}
	for until := w.now + int64(limit); !done(); {
		a.work(w.now)
		b.work(w.now)
		// Readers that are away look again after a while.
		if !w.step(min(until, w.now+100e6)) && w.now >= until {
			w.t.Fatalf("after %v: a has %d of %d, %v %v; b has %d of %d, %v %v", limit, len(a.in), len(b.out), a.s.State(ia), a.s.Err(ia),
				len(b.in), len(a.out), b.s.State(ib), b.s.Err(ib))
		}
	}
	if !slices.Equal(a.in, b.out) || !slices.Equal(b.in, a.out) {
		w.t.Fatal("a stream arrived with other bytes")
	}
	w.t.Logf("%d frames, %v", w.count, time.Duration(w.now-start))
	w.run(10 * time.Minute)
	for i, id := range []ID{ia, ib} {
		if st, err := w.stack[i].State(id), w.stack[i].Err(id); st != Closed || err != nil {
			w.t.Fatalf("side %d ends as %v, %v", i, st, err)
		}
		if n := w.stack[i].BadChecksums(); n > 0 {
			w.t.Fatalf("side %d saw %d bad checksums", i, n)
		}
		if len(w.stack[i].live)+len(w.stack[i].byTuple) != 0 {
			w.t.Fatalf("side %d keeps a connection", i)
		}
	}
}
