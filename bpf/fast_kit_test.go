// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"errors"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/nicloop"
	"github.com/lockstep-ft/lockstep/loader/core"
	"github.com/lockstep-ft/lockstep/sim/kernel"
	"golang.org/x/sys/unix"
)

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

// client takes in a frame of the remote.
func (a *alone) client(now int64, s seg) {
	g := a.segment(now, s)
	g.Inc, g.Epoch = 0, 0
	a.step(now, compare.Event{Kind: compare.EvClient, Seg: g})
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
	taken   int
	opened  int // connections that were the kernel's from the SYN|ACK on
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
	r := fastRec(g.f, s, g.k)
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

func (g *together) client(now int64, s seg) {
	g.k.run(g.k.LsMirror, input{frame: g.f.to(s)})
	g.events(now)
}

// leaves notes a frame that the kernel lets leave.
func (g *together) leaves(frame []byte) {
	g.out = append(g.out, g.f.parsed(g.t, frame))
	g.kernel++
}

// parsed describes a frame of f that leaves, whose checksum has to be right.
func (f flow) parsed(t *testing.T, frame []byte) string {
	l4 := f.l4(seg{})
	if !f.checksumRight(frame, l4) {
		t.Errorf("wrong checksum in % x", frame)
	}
	pay := l4 + int(frame[l4+12]>>4)*4
	return left(seg{
		seq: be.Uint32(frame[l4+4:]), ack: be.Uint32(frame[l4+8:]), win: be.Uint16(frame[l4+14:]), flags: frame[l4+13], opts: frame[l4+20 : pay], payload: frame[pay:],
	})
}

// fastRec is the record of what the SVM sent in a schedule.
func fastRec(f flow, s seg, k *kit) bpf.LockstepLsRec {
	return bpf.LockstepLsRec{
		Version: abiVersion, Type: data, Dir: s2p, Inc: scheduleISN, KeyGen: keyGen, Epoch: epoch, T: f.tuple(), Seq: s.seq, End: s.end(), Ack: s.ack, Win: s.win,
		TcpFlags: s.flags, Optlen: uint8(len(s.opts)), Opts: opts40(s.opts), Sum: k.sum(s.seq, s.payload),
	}
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
		if g.p.Owners().Holds(&evs[i]) {
			g.take(now)
		}
		g.step(now, evs[i])
		if evs[i].Kind != compare.EvOpened {
			continue
		}
		if g.opened++; !g.p.Owners().Kernel(&evs[i].Seg.Tuple) {
			g.take(now)
		}
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

// simulated is the simulator's model of the programs, under the loop that drives them in the daemon.
type simulated struct {
	alone
	k    *kit
	nic  *kernel.NIC
	loop *nicloop.Loop
	now  int64
	no   uint64
}

func newSimulated(t *testing.T, k *kit, f flow) *simulated {
	m := &simulated{alone: alone{t: t, f: f}, k: k}
	m.nic = kernel.New(kernel.Host{
		Now: func() int64 { return m.now }, ToWire: m.leaves, ToGuest: func([]byte) {}, ToPeer: func([]byte) {}, Rand: rand.New(rand.NewPCG(1, 1)),
	}, kernel.Options{Role: datapath.RolePrimary, MAC: ownMAC[:], Mutation: mutations[os.Getenv(mutationEnv)].value})
	m.loop = nicloop.NewPrimary(0, m.nic, slog.New(slog.DiscardHandler), func(nicloop.Request) {}, fastConfig(true), *k.digest)
	m.must(m.nic.InstallSession(datapath.Session{Term: keyGen, Epoch: epoch, PeerMAC: peerMAC[:], TxKey: k.sipTx, RxKey: k.sipRx, Digest: *k.digest}))
	m.must(m.loop.Hold(time.Hour, time.Hour))
	m.must(m.nic.SetLeaseUntil(math.MaxInt64))
	return m
}

func (m *simulated) must(err error) {
	if err != nil {
		m.t.Fatal(err)
	}
}

func (m *simulated) pvm(now int64, s seg) {
	m.now = now
	m.nic.FromGuest(m.f.from(s), 0)
	m.must(m.loop.Turn(0))
}

func (m *simulated) svm(now int64, s seg) {
	m.now, m.no = now, m.no+1
	r := fastRec(m.f, s, m.k)
	r.Stream, r.StreamNo = userStream, m.no
	m.nic.FromPeer(m.k.wire(&r))
	m.must(m.loop.Turn(0))
}

func (m *simulated) client(now int64, s seg) {
	m.now = now
	m.nic.FromWire(m.f.to(s))
	m.must(m.loop.Turn(0))
}

func (m *simulated) tick(now int64) {
	m.now = now
	m.must(m.loop.Turn(0))
}

func (m *simulated) leaves(frame []byte) { m.out = append(m.out, m.f.parsed(m.t, frame)) }
