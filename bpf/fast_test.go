// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// The fast path (R27) is held against package compare: the same schedule of segments and digest records goes
// to a compare.Primary alone, and to the programs with a Primary that hands the connection over and takes it
// back as the daemon does. The same frames have to leave, in the same order.

// leaver is one of the two: what has left of it.
type leaver interface {
	pvm(now int64, s seg)
	svm(now int64, s seg)
	tick(now int64)
	left() []string
}

// left describes a frame that leaves.
func left(s seg) string {
	return fmt.Sprintf("seq %d ack %d win %d flags %#x opts %x payload %x", s.seq, s.ack, s.win, s.flags, s.opts, s.payload)
}

// alone is a compare.Primary alone.
type alone struct {
	t      *testing.T
	f      flow
	p      *compare.Primary
	keys   *compare.Keys
	out    []string
	slots  map[compare.Slot][]byte
	next   compare.Slot
	grants int
	sent   []seg
}

func fastConfig(on bool) compare.Config { return compare.Config{Epoch: epoch, FastPath: on} }

func (a *alone) segment(now int64, s seg) compare.Segment {
	return compare.Segment{
		Tuple: core.FromTuple(ptr(a.f.tuple())), Seq: s.seq, Len: uint32(len(s.payload)), Ack: s.ack, Win: s.win, Flags: compare.Flags(s.flags),
		Opts: s.opts, Sum: a.keys.Sum(s.seq, s.payload), Slot: compare.NoSlot, At: now, Epoch: epoch, Inc: scheduleISN,
	}
}

func ptr[T any](v T) *T { return &v }

func (a *alone) pvm(now int64, s seg) {
	g := a.segment(now, s)
	g.Inc, g.Epoch = 0, 0
	g.Header = a.f.from(s)[:a.f.l4(s)]
	if len(s.payload) > 0 || s.flags&(syn|fin|rst) != 0 {
		a.next++
		g.Slot, g.Payload = a.next, s.payload
		a.slots[g.Slot] = s.payload
	}
	a.step(now, compare.Event{Kind: compare.EvPVM, Seg: g})
}

func (a *alone) svm(now int64, s seg) {
	a.step(now, compare.Event{Kind: compare.EvSVM, Seg: a.segment(now, s)})
}

func (a *alone) tick(now int64) {
	for a.p.NextDeadline() <= now {
		a.step(now, compare.Event{Kind: compare.EvTick})
	}
}

func (a *alone) left() []string { return a.out }

func (a *alone) step(now int64, ev compare.Event) {
	for _, e := range a.p.Step(now, &ev, nil) {
		if e.Op == compare.OpSend {
			a.out = append(a.out, left(sentBy(&e, a.slots[e.Slot])))
		}
	}
}

// sentBy is the frame that an effect has leave.
func sentBy(e *compare.Effect, payload []byte) seg {
	s := seg{seq: e.Seq, ack: e.Ack, win: e.Win, flags: uint8(e.Flags), opts: bytes.Clone(e.Opts[:e.OptLen])}
	if e.Slot != compare.NoSlot {
		s.payload = payload[e.From:e.To]
	}
	return s
}

// together is the kernel's programs with a compare.Primary.
type together struct {
	alone
	k       *kit
	decoder core.Decoder
	mem     []byte
	evs     []compare.Event
	taken   int
	kernel  int // frames that the kernel let leave
}

func newTogether(t *testing.T, k *kit, f flow) *together {
	n := int(k.LsSlots.MaxEntries())
	mem, err := unix.Mmap(k.LsSlots.FD(), 0, n*core.SlotSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	g := &together{k: k, mem: mem}
	g.alone = alone{t: t, f: f, p: compare.NewPrimary(fastConfig(true), k.digest), keys: k.digest}
	g.decoder = core.Decoder{Frames: core.NewStore(core.Slots{Small: mem}), Seen: core.NewNumbers()}
	return g
}

func (g *together) pvm(now int64, s seg) {
	frame := g.f.from(s)
	switch verdict, out, _ := g.k.run(g.k.LsPriOut, input{frame: frame}); verdict {
	case next:
		g.leaves(out)
	case drop:
	case redirect: // an announcement
	default:
		g.t.Fatalf("verdict %d", verdict)
	}
	g.events(now)
}

func (g *together) svm(now int64, s seg) {
	r := bpf.LockstepLsRec{
		Version: abiVersion, Type: data, Dir: s2p, Inc: scheduleISN, KeyGen: keyGen, Epoch: epoch, T: g.f.tuple(), Seq: s.seq, End: s.end(), Ack: s.ack, Win: s.win,
		TcpFlags: s.flags, Optlen: uint8(len(s.opts)), Opts: opts40(s.opts), Sum: g.keys.Sum(s.seq, s.payload),
	}
	switch verdict, out, mark := g.k.run(g.k.LsDigestRx, input{frame: g.k.fromPeer(&r)}); verdict {
	case redirect:
		if mark != markRel {
			g.t.Fatalf("sent with mark %#x", mark)
		}
		g.leaves(out)
	case drop:
	default:
		g.t.Fatalf("verdict %d", verdict)
	}
	g.events(now)
}

// leaves notes a frame that the kernel lets leave.
func (g *together) leaves(frame []byte) {
	l4 := g.f.l4(seg{})
	if !g.f.checksumRight(frame, l4) {
		g.t.Errorf("wrong checksum in % x", frame)
	}
	opt := 20 + int(frame[l4+12]>>4)*4 - 20
	end := len(frame)
	g.out = append(g.out, left(seg{
		seq: be.Uint32(frame[l4+4:]), ack: be.Uint32(frame[l4+8:]), win: be.Uint16(frame[l4+14:]), flags: frame[l4+13],
		opts: frame[l4+20 : l4+opt], payload: frame[l4+opt : end],
	}))
	g.kernel++
}

// events gives the Primary what the kernel reports, as nicloop does.
func (g *together) events(now int64) {
	g.k.rd.SetDeadline(time.Now())
	var evs []compare.Event
	for {
		rec, err := g.k.rd.Read()
		if err != nil {
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				g.t.Fatal(err)
			}
			break
		}
		b := new(core.Buffer)
		n := copy(core.BytesOf(&b.Sample), rec.RawSample)
		evs, _ = g.decoder.Event(b, n, evs)
	}
	for i := range evs {
		if g.p.Owners().Kernel(&evs[i].Seg.Tuple) {
			g.take(now)
		}
		g.step(now, evs[i])
	}
}

func (g *together) step(now int64, ev compare.Event) {
	ev.Seg.At = min(ev.Seg.At, now)
	var owners []compare.Effect
	for _, e := range g.p.Step(now, &ev, nil) {
		switch e.Op {
		case compare.OpSend:
			s := seg{}
			if e.Slot != compare.NoSlot {
				frame := g.decoder.Frames.Element(e.Slot)[64:]
				l4 := g.f.l4(s)
				s.payload = bytes.Clone(frame[l4+int(frame[l4+12]>>4)*4:][:])
			}
			g.out = append(g.out, left(sentBy(&e, s.payload)))
			if e.Free {
				g.free(e.Slot)
			}
		case compare.OpFree:
			if e.Slot != compare.NoSlot {
				g.free(e.Slot)
			}
		case compare.OpGrant, compare.OpTake:
			owners = append(owners, e)
		}
	}
	for _, e := range owners {
		if e.Op == compare.OpTake {
			g.take(now)
			continue
		}
		out := compare.Event{Kind: compare.EvGranted, Seg: compare.Segment{Tuple: e.Tuple}}
		if h, ok := g.p.Owners().Offer(&e.Tuple); ok && g.grant(&e.Tuple, &h) {
			out.Handover = &h
			g.grants++
		}
		g.step(now, out)
	}
}

func (g *together) free(s compare.Slot) {
	state := (*uint32)(unsafe.Pointer(&g.decoder.Frames.Element(s)[0]))
	atomic.StoreUint32(state, uint32(bpf.LockstepLsSlotStateLS_SLOT_FREE))
}

func (g *together) grant(t *compare.Tuple, h *compare.Handover) bool {
	seen, known := g.decoder.Seen.Of(*t)
	if !known {
		if err := g.k.LsFast.Put(ptr(core.ToTuple(*t)), &bpf.LockstepLsFast{}); err != nil {
			g.t.Fatal(err)
		}
		g.decoder.Seen.Begin(*t)
		return false
	}
	ctx := bpf.LockstepLsFastCtx{T: core.ToTuple(*t), Op: uint32(bpf.LockstepLsFastOpLS_FAST_GRANT), S: core.ToFast(h)}
	ctx.S.Number = seen
	fastOrder(g.k, &ctx)
	if ctx.Done == 0 {
		g.t.Error("refused")
	}
	return ctx.Done != 0
}

func (g *together) take(now int64) {
	t := core.FromTuple(ptr(g.f.tuple()))
	ctx := bpf.LockstepLsFastCtx{T: g.f.tuple(), Op: uint32(bpf.LockstepLsFastOpLS_FAST_TAKE)}
	fastOrder(g.k, &ctx)
	h, evs := g.decoder.Fast(&ctx, nil)
	g.taken++
	g.step(now, compare.Event{Kind: compare.EvTaken, Seg: compare.Segment{Tuple: t}, Handover: h})
	for i := range evs {
		g.step(now, evs[i])
	}
}

func (g *together) tick(now int64) {
	for g.p.NextDeadline() <= now {
		g.step(now, compare.Event{Kind: compare.EvTick})
	}
}

// guestSide is what one guest has sent and received.
type guestSide struct {
	at  int // segments sent
	ack uint32
	win uint16
	ts  uint32
}

// The ISNs of a schedule. The PVM's numbers wrap soon.
const clientISN, scheduleISN = 5000, 0xfffffff0

// schedule plays random segments of both guests to both. It returns what happened, for a failure.
func schedule(r *rand.Rand, f flow, both []leaver) (log []string) {
	now := int64(1e9)
	ts := r.IntN(4) > 0
	odd := r.IntN(3) == 0 // things that are not the common case
	var stream []seg      // the PVM's segments
	client := uint32(clientISN)
	pos := uint32(scheduleISN + 1)
	p, s := guestSide{ack: client, win: 500, ts: 100}, guestSide{ack: client, win: 500, ts: 90}
	echo := uint32(7)
	say := func(who string, g seg, to func(leaver) func(int64, seg)) {
		now += 1000
		log = append(log, fmt.Sprintf("%s %d..%d ack %d win %d opts %x", who, g.seq, g.end(), g.ack, g.win, g.opts))
		for _, l := range both {
			to(l)(now, g)
		}
	}
	pvm := func(l leaver) func(int64, seg) { return l.pvm }
	svm := func(l leaver) func(int64, seg) { return l.svm }
	segOf := func(g *guestSide, seq uint32, payload []byte) seg {
		out := seg{seq: seq, ack: g.ack, win: g.win, flags: ack, payload: payload}
		if len(payload) > 0 {
			out.flags |= psh
		}
		if ts {
			g.ts++
			out.opts = timestamps(g.ts, echo)
		}
		return out
	}
	posOf := func(g *guestSide) uint32 {
		if g.at == len(stream) {
			return pos
		}
		return stream[g.at].seq
	}
	opened := seg{seq: scheduleISN, ack: client, win: 500, flags: syn | ack, opts: []byte{2, 4, 5, 180, 1, 3, 3, 7}}
	if ts {
		opened.opts = append(opened.opts, timestamps(p.ts, echo)...)
	}
	say("pvm", opened, pvm)
	say("svm", opened, svm)
	for range 60 + r.IntN(200) {
		switch n := r.IntN(20); {
		case n < 5: // the PVM sends data
			var payload []byte
			if p.at == len(stream) {
				payload = randBytes(r, 1+r.IntN(40))
				stream = append(stream, seg{seq: pos, payload: payload})
				pos += uint32(len(payload))
			}
			g := stream[p.at]
			p.at++
			say("pvm", segOf(&p, g.seq, g.payload), pvm)
		case n < 10:
			if s.at == len(stream) {
				payload := randBytes(r, 1+r.IntN(40))
				stream = append(stream, seg{seq: pos, payload: payload})
				pos += uint32(len(payload))
			}
			g := stream[s.at]
			s.at++
			if odd && s.at < len(stream) && r.IntN(10) == 0 { // two segments in one
				g.payload = append(bytes.Clone(g.payload), stream[s.at].payload...)
				s.at++
			}
			say("svm", segOf(&s, g.seq, g.payload), svm)
		case n < 13: // the client sends
			client += uint32(r.IntN(100))
			echo++
		case n < 15:
			p.ack, p.win = client, uint16(400+r.IntN(200))
			say("pvm", segOf(&p, posOf(&p), nil), pvm)
		case n < 17:
			s.ack, s.win = client, uint16(400+r.IntN(200))
			say("svm", segOf(&s, posOf(&s), nil), svm)
		case n == 17 && odd && p.at > 0: // the PVM repeats
			g := stream[p.at-1-r.IntN(min(p.at, 3))]
			say("pvm", segOf(&p, g.seq, g.payload), pvm)
		case n == 18 && odd:
			g := segOf(&s, posOf(&s), nil)
			say("svm", g, svm)
		case n == 19: // both catch up, and time passes
			for p.at < len(stream) {
				g := stream[p.at]
				p.at++
				p.ack = client
				say("pvm", segOf(&p, g.seq, g.payload), pvm)
			}
			for s.at < len(stream) {
				g := stream[s.at]
				s.at++
				s.ack = client
				say("svm", segOf(&s, g.seq, g.payload), svm)
			}
			p.ack, s.ack = client, client
			say("pvm", segOf(&p, pos, nil), pvm)
			say("svm", segOf(&s, pos, nil), svm)
			now += 5e6
			for _, l := range both {
				l.tick(now)
			}
		}
	}
	// One guest sends other bytes than the other: nothing leaves from there on.
	for p.at < len(stream) {
		g := stream[p.at]
		p.at++
		say("pvm", segOf(&p, g.seq, g.payload), pvm)
	}
	for s.at < len(stream) {
		g := stream[s.at]
		s.at++
		say("svm", segOf(&s, g.seq, g.payload), svm)
	}
	one, other := []byte("one guest says this"), []byte("the other says that")
	if r.IntN(2) == 0 {
		say("pvm", segOf(&p, pos, one), pvm)
		say("svm", segOf(&s, pos, other), svm)
	} else {
		say("svm", segOf(&s, pos, other), svm)
		say("pvm", segOf(&p, pos, one), pvm)
	}
	return log
}

func TestFastPathEquals(t *testing.T) {
	seeds := 200
	kernel, taken, grants := 0, 0, 0
	for name, f := range flows {
		t.Run(name, func(t *testing.T) {
			k := newKit(t, func(s *ebpf.CollectionSpec) { s.Maps["ls_slots"].MaxEntries = 4096 }, variable("ls_nslots", 4096), variable("ls_fast_on", 1), variable("ls_fast_wait", 60e6))
			k.setMode(hold)
			for seed := range seeds {
				f.remote = netip.AddrPortFrom(f.remote.Addr(), uint16(20000+seed))
				a := &alone{t: t, f: f, p: compare.NewPrimary(fastConfig(false), k.digest), keys: k.digest, slots: make(map[compare.Slot][]byte)}
				g := newTogether(t, k, f)
				log := schedule(rand.New(rand.NewPCG(uint64(seed), 1)), f, []leaver{a, g})
				kernel, taken, grants = kernel+g.kernel, taken+g.taken, grants+g.grants
				for i := range max(len(a.out), len(g.out)) {
					if i >= len(a.out) || i >= len(g.out) || a.out[i] != g.out[i] {
						for _, l := range log {
							t.Log(l)
						}
						for j := max(0, i-3); j < min(i+3, max(len(a.out), len(g.out))); j++ {
							if j < len(a.out) {
								t.Logf("compare %d: %s", j, a.out[j])
							}
							if j < len(g.out) {
								t.Logf("kernel  %d: %s", j, g.out[j])
							}
						}
						t.Fatalf("seed %d: frame %d of %d and %d differs", seed, i, len(a.out), len(g.out))
					}
				}
			}
		})
	}
	t.Logf("the kernel owned a connection %d times, let %d frames leave, and was relieved %d times", grants, kernel, taken)
	if kernel < 1000 || taken < 100 {
		t.Error("that is next to nothing")
	}
}
