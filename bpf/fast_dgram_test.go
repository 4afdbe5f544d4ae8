// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/nicloop"
	"github.com/lockstep-ft/lockstep/loader/core"
	"github.com/lockstep-ft/lockstep/sim/kernel"
)

// The fast path for UDP (R27) is held against package compare as TCP's is: the same schedule of datagrams and digest
// records goes to a compare.Primary alone, to the programs with a Primary, and to the simulator's model of them.

// udpFrom is a datagram of the guest's, with its checksum, or one that the device completes.
func (f flow) udpFrom(payload []byte, partial bool) (vnet, []byte) {
	v, frame := flow{guest: f.remote, remote: f.guest}.udpTo(payload, 0, 0)
	if partial {
		return v, frame
	}
	sum := ^onesSum(0, frame[f.l4(seg{}):])
	if sum == 0 {
		sum = 0xffff
	}
	be.PutUint16(frame[f.l4(seg{})+6:], sum)
	return vnet{}, frame
}

func (f flow) udpTuple() bpf.LockstepLsTuple {
	t := f.tuple()
	t.Proto = 17
	return t
}

// udpRecord is the record of a datagram that the SVM has sent.
func (f flow) udpRecord(k *kit, payload []byte) bpf.LockstepLsRec {
	return bpf.LockstepLsRec{
		Version: abiVersion, Type: dgram, Dir: s2p, KeyGen: keyGen, Epoch: epoch, T: f.udpTuple(), End: uint32(len(payload)), Sum: k.sum(0, payload),
	}
}

// dgrams is one of those that datagrams are played to.
type dgrams interface {
	pvm(now int64, f flow, payload []byte)
	svm(now int64, f flow, payload []byte)
	has() []string // what has left
}

func leftDgram(f flow, frame []byte) string {
	l4 := f.l4(seg{})
	return fmt.Sprintf("to %d: % x", be.Uint16(frame[l4+2:]), frame[l4+8:])
}

// dgramsAlone is a compare.Primary alone.
type dgramsAlone struct {
	p     *compare.Primary
	k     *kit
	out   []string
	slots map[compare.Slot]string
}

func (a *dgramsAlone) has() []string { return a.out }

func (a *dgramsAlone) segment(now int64, f flow, payload []byte) compare.Segment {
	return compare.Segment{
		Tuple: core.FromTuple(ptr(f.udpTuple())), Len: uint32(len(payload)), Sum: a.k.sum(0, payload), Datagram: true, Slot: compare.NoSlot, At: now, Epoch: epoch,
	}
}

func (a *dgramsAlone) step(now int64, kind compare.EventKind, s compare.Segment) {
	for _, e := range a.p.Step(now, &compare.Event{Kind: kind, Seg: s}, nil) {
		if e.Op == compare.OpForward {
			a.out = append(a.out, a.slots[e.Slot])
		}
	}
}

func (a *dgramsAlone) pvm(now int64, f flow, payload []byte) {
	s := a.segment(now, f, payload)
	s.Slot = compare.Slot(len(a.slots))
	_, frame := f.udpFrom(payload, false)
	a.slots[s.Slot] = leftDgram(f, frame)
	a.step(now, compare.EvPVM, s)
}

func (a *dgramsAlone) svm(now int64, f flow, payload []byte) {
	a.step(now, compare.EvSVM, a.segment(now, f, payload))
}

// dgramsTogether is the kernel's programs with a compare.Primary.
type dgramsTogether struct {
	*together
	kernel, fetched int // datagrams that the kernel let leave; orders that took some back
}

func newDgramsTogether(t *testing.T, k *kit) *dgramsTogether {
	g := &dgramsTogether{together: newTogether(t, k, flow{})}
	g.decoder.Buckets = core.NewBuckets(func(ctx *bpf.LockstepLsBucketCtx) error {
		opts := ebpf.RunOptions{Data: structBytes(ctx), DataOut: make([]byte, 4096)}
		_, err := k.LsBucketOrder.Run(&opts)
		copy(structBytes(ctx), opts.DataOut)
		g.fetched += int(ctx.S.N)
		return err
	})
	return g
}

func (g *dgramsTogether) has() []string { return g.out }

func (g *dgramsTogether) pvm(now int64, f flow, payload []byte) {
	_, frame := f.udpFrom(payload, false)
	if verdict, out, _ := g.k.run(g.k.LsPriOut, input{frame: frame}); verdict == next {
		g.leaves(f, out)
	}
	g.events(now, f)
}

func (g *dgramsTogether) svm(now int64, f flow, payload []byte) {
	r := f.udpRecord(g.k, payload)
	if verdict, out, mark := g.k.run(g.k.LsDigestRx, input{frame: g.k.fromPeer(&r)}); verdict == redirect && mark == markRel {
		g.leaves(f, out)
	}
	g.events(now, f)
}

func (g *dgramsTogether) leaves(f flow, frame []byte) {
	if l4 := f.l4(seg{}); onesSum(uint32(onesSum(onesSumWide(17+uint32(len(frame)-l4)), append(f.guest.Addr().AsSlice(), f.remote.Addr().AsSlice()...))), frame[l4:]) != 0xffff {
		g.t.Errorf("wrong checksum in % x", frame)
	}
	g.out = append(g.out, leftDgram(f, frame))
	g.kernel++
}

func (g *dgramsTogether) events(now int64, f flow) {
	g.k.rd.SetDeadline(time.Now())
	var evs []compare.Event
	for {
		rec, err := g.k.rd.Read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			g.t.Fatal(err)
		}
		b := new(core.Buffer)
		n := copy(core.BytesOf(&b.Sample), rec.RawSample)
		evs, _ = g.decoder.Event(b, n, evs)
	}
	for i := range evs {
		evs[i].Seg.At = min(evs[i].Seg.At, now)
		for _, e := range g.p.Step(now, &evs[i], nil) {
			switch e.Op {
			case compare.OpForward:
				data := g.decoder.Frames.Element(e.Slot)[64:]
				n := 14 + int(be.Uint16(data[16:]))
				if f.guest.Addr().Is6() {
					n = 54 + int(be.Uint16(data[18:]))
				}
				g.out = append(g.out, leftDgram(f, data[:n]))
				g.free(e.Slot)
			case compare.OpEven:
				if err := g.decoder.Buckets.Even(e.Tuple, math.MaxInt64); err != nil {
					g.t.Fatal(err)
				}
			}
		}
	}
}

// dgramsSimulated is the simulator's model of the programs, under the loop that drives them in the daemon.
type dgramsSimulated struct {
	*simulated
	out []string
	f   flow
}

func newDgramsSimulated(t *testing.T, k *kit) *dgramsSimulated {
	m := &dgramsSimulated{simulated: &simulated{alone: alone{t: t}, k: k}}
	m.nic = kernel.New(kernel.Host{
		Now: func() int64 { return m.now }, ToWire: func(b []byte) { m.out = append(m.out, leftDgram(m.f, b)) },
		ToGuest: func([]byte) {}, ToPeer: func([]byte) {}, Rand: rand.New(rand.NewPCG(1, 1)),
	}, kernel.Options{Role: datapath.RolePrimary, MAC: ownMAC[:], Slots: 4096, Mutation: mutations[os.Getenv(mutationEnv)].value})
	m.loop = nicloop.NewPrimary(0, m.nic, slog.New(slog.DiscardHandler), func(nicloop.Request) {}, fastConfig(true), *k.digest)
	m.must(m.nic.InstallSession(datapath.Session{Term: keyGen, Epoch: epoch, PeerMAC: peerMAC[:], TxKey: k.sipTx, RxKey: k.sipRx, Digest: *k.digest}))
	m.must(m.loop.Hold(time.Hour, time.Hour))
	m.must(m.nic.SetLeaseUntil(math.MaxInt64))
	return m
}

func (m *dgramsSimulated) has() []string { return m.out }

func (m *dgramsSimulated) pvm(now int64, f flow, payload []byte) {
	m.now, m.f = now, f
	_, frame := f.udpFrom(payload, false)
	m.nic.FromGuest(frame, 0)
	m.must(m.loop.Turn(0))
}

func (m *dgramsSimulated) svm(now int64, f flow, payload []byte) {
	m.now, m.f, m.no = now, f, m.no+1
	r := f.udpRecord(m.k, payload)
	r.Stream, r.StreamNo = userStream, m.no
	m.nic.FromPeer(m.k.wire(&r))
	m.must(m.loop.Turn(0))
}

// sameBucket are n flows to f's remote, of which the last two are in one bucket.
func sameBucket(f flow, n int) []flow {
	out := []flow{f}
	for port := f.remote.Port() + 1; len(out) < n; port++ {
		f.remote = netip.AddrPortFrom(f.remote.Addr(), port)
		last, next := out[len(out)-1].udpTuple(), f.udpTuple()
		if same := core.Bucket(&last) == core.Bucket(&next); same == (len(out) == n-1) {
			out = append(out, f)
		}
	}
	return out
}

// dgramSchedule has both guests send the same datagrams, each in an order that is mostly the same, and one that only
// one of them sends.
func dgramSchedule(r *rand.Rand, f flow, all []dgrams) (log []string) {
	type sent struct {
		f       flow
		payload []byte
	}
	fs := sameBucket(f, 4)
	if r.IntN(2) == 0 {
		fs = fs[:2] // no two in a bucket
	}
	var stream []sent
	for range 40 + r.IntN(100) {
		d := sent{fs[r.IntN(len(fs))], randBytes(r, []int{0, 4, 19}[r.IntN(3)])}
		if r.IntN(10) == 0 && len(stream) > 0 { // another like it
			d.payload = stream[len(stream)-1].payload
		}
		stream = append(stream, d)
	}
	orders := [2][]sent{slices.Clone(stream), slices.Clone(stream)}
	for range r.IntN(6) { // one guest has it the other way round
		o, i := orders[r.IntN(2)], r.IntN(len(stream)-1)
		o[i], o[i+1] = o[i+1], o[i]
	}
	who := r.IntN(2)
	orders[who] = slices.Insert(orders[who], r.IntN(len(stream)), sent{fs[0], []byte("only one sends this")})
	now, ahead := int64(1e9), 1+r.IntN(40)
	var at [2]int
	for at[0] < len(orders[0]) || at[1] < len(orders[1]) {
		i := r.IntN(2)
		if at[i] == len(orders[i]) || at[i] > at[1-i]+ahead && at[1-i] < len(orders[1-i]) {
			i = 1 - i
		}
		d := orders[i][at[i]]
		at[i]++
		now += 1000
		log = append(log, fmt.Sprintf("%s to %d: % x", []string{"PVM", "SVM"}[i], d.f.remote.Port(), d.payload))
		for _, l := range all {
			if i == 0 {
				l.pvm(now, d.f, d.payload)
			} else {
				l.svm(now, d.f, d.payload)
			}
		}
	}
	return log
}

func TestFastDatagramsEqual(t *testing.T) {
	released, kernels, fetched := 0, 0, 0
	for name, f := range flows {
		t.Run(name, func(t *testing.T) {
			k := newKit(t, func(s *ebpf.CollectionSpec) { s.Maps["ls_slots"].MaxEntries = 4096 }, variable("ls_nslots", 4096), variable("ls_fast_on", 1), variable("ls_fast_wait", 60e6))
			k.setMode(hold)
			for seed := range 100 {
				f.remote = netip.AddrPortFrom(f.remote.Addr(), uint16(20000+100*seed))
				a := &dgramsAlone{p: compare.NewPrimary(fastConfig(false), k.digest), k: k, slots: make(map[compare.Slot]string)}
				g, m := newDgramsTogether(t, k), newDgramsSimulated(t, k)
				log := dgramSchedule(rand.New(rand.NewPCG(uint64(seed), 2)), f, []dgrams{a, g, m})
				for name, out := range map[string][]string{"programs": g.out, "model": m.out} {
					i := 0
					for i < min(len(out), len(a.out)) && out[i] == a.out[i] {
						i++
					}
					if i < max(len(out), len(a.out)) {
						t.Logf("%s", strings.Join(log, "\n"))
						t.Fatalf("seed %d, %s: after %d left\n%q, of compare alone\n%q", seed, name, i, out[i:], a.out[i:])
					}
				}
				if slices.ContainsFunc(a.out, func(s string) bool { return bytes.Contains([]byte(s), []byte("6f 6e 6c 79")) }) {
					t.Fatal("what one guest alone has sent has left")
				}
				released, kernels, fetched = released+len(a.out), kernels+g.kernel, fetched+g.fetched
				freeSlots(k)
				empty := bpf.LockstepLsBucket{}
				for i := range uint32(bpf.LockstepLsConstLS_BUCKETS) {
					if err := k.LsFastUdp.Put(i, &empty); err != nil {
						t.Fatal(err)
					}
				}
			}
		})
	}
	t.Logf("%d datagrams left, %d of them by the kernel, which gave back %d", released, kernels, fetched)
	if kernels < released/4 || fetched < 100 {
		t.Error("that is next to nothing")
	}
}

// What the kernel makes of a record's frame is the PVM's datagram, whatever the checksums of both are like.
func TestLiveFastDatagrams(t *testing.T) {
	l := newLab(t)
	k := l.kit(variable("ls_fast_on", 1), variable("ls_fast_wait", 60e6))
	k.setMode(hold)
	l.attach(k.LsPriOut, l.tapLink, ebpf.AttachTCXIngress)
	l.attach(k.LsDigestRx, l.peerLink, ebpf.AttachTCXIngress)
	r := rand.New(rand.NewPCG(17, 18))
	for _, f := range flows {
		for _, n := range []int{0, 1, 17, 18, 100, 471, 472, 473, 1000, 1440} {
			for _, partial := range []bool{false, true} {
				for _, record := range []bool{false, true} {
					f.remote = netip.AddrPortFrom(f.remote.Addr(), f.remote.Port()+1)
					payload := randBytes(r, n)
					v, frame := f.udpFrom(payload, partial)
					_, complete := f.udpFrom(payload, false)
					padding := make([]byte, max(60-len(frame), 0))
					frame, complete = append(frame, padding...), append(complete, padding...)
					k.expect(counts{"fast_held": 1}, func() { l.write(l.tap, v, frame) })
					var vr vnet
					off := (f.l4(seg{}) + 9) &^ 1
					if record {
						vr = vnet{flags: unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, csumStart: uint16(f.l4(seg{})), csumOffset: 6}
					}
					rec := f.udpRecord(k, payload)
					peer := peerFrame(make([]byte, off), off, sign(k.number(&rec, userStream), k.sipRx), ownMAC, peerMAC)
					if record && !partial { // it cannot become such a frame
						k.expect(counts{"record_in": 1}, func() { l.write(l.far, vr, peer) })
						k.events()
						freeSlots(k)
						continue
					}
					k.expect(counts{"fast_in": 1, "fast_out": 1, "fast_dgram": 1, "released_out": 1}, func() { l.write(l.far, vr, peer) })
					gotV, got := l.read(l.out)
					want := complete
					if gotV.flags&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
						want = frame
						if gotV.csumStart != v.csumStart || gotV.csumOffset != v.csumOffset {
							t.Errorf("%+v, want %+v", gotV, v)
						}
					}
					if bare := len(want) - len(padding); !bytes.Equal(got, want[:max(bare, min(len(got), len(want)))]) { // a bridge may leave padding out
						t.Errorf("%v, %d bytes, partial %v, record %v:\n% x, want\n% x", f.remote, n, partial, record, got, want)
					}
				}
			}
		}
	}
	if n := k.used(); n != 0 {
		t.Errorf("%d slots are not free", n)
	}
	l.empty(l.out)
	l.empty(l.far)
}

// What waits for the other guest too long is user space's, which is told until it has fetched it, also when the ring
// has had no room for that. What comes of the flow meanwhile is reported.
func TestFastDatagramLate(t *testing.T) {
	k := newKit(t, variable("ls_fast_on", 1), variable("ls_fast_wait", 1000))
	k.setMode(hold)
	f := flows["IPv4"]
	_, frame := f.udpFrom([]byte("x"), false)
	for i := 0; k.counters()["no_ring"] == 0; i++ {
		k.run(k.LsPriOut, input{frame: stranger(i).from(seg{flags: ack})})
	}
	if before := k.counters(); true {
		if k.run(k.LsPriOut, input{frame: frame}); k.moved(before)["fast_held"] != 1 {
			t.Fatalf("counted %v", k.moved(before))
		}
	}
	key := f.udpTuple()
	number := core.Bucket(&key) + 1
	told := func() {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); ; {
			for _, e := range k.events() {
				if ev, ok := e.(*bpf.LockstepLsEv); ok && ev.Type == uint32(bpf.LockstepLsEvTypeLS_EV_YIELD) {
					if ev.T != key || ev.Number != number {
						t.Errorf("told of %+v, number %d", ev.T, ev.Number)
					}
					return
				}
			}
			if time.Now().After(deadline) {
				t.Fatal("nobody is told")
			}
		}
	}
	told()
	told()
	if before := k.counters(); true {
		if k.run(k.LsPriOut, input{frame: frame}); k.moved(before)["held"] != 1 {
			t.Errorf("counted %v", k.moved(before))
		}
	}
	store := core.NewStore(core.Slots{})
	d := core.Decoder{Frames: store}
	b := core.NewBuckets(func(ctx *bpf.LockstepLsBucketCtx) error {
		opts := ebpf.RunOptions{Data: structBytes(ctx), DataOut: make([]byte, 4096)}
		_, err := k.LsBucketOrder.Run(&opts)
		copy(structBytes(ctx), opts.DataOut)
		if ctx.Op == uint32(bpf.LockstepLsBucketOpLS_BUCKET_SWEEP) && ctx.Done != 0 && (ctx.S.N != 1 || ctx.S.User != 1 || ctx.Index != number-1) {
			t.Errorf("fetched %+v of %d", ctx.S, ctx.Index)
		}
		ctx.S.N = 0
		return err
	})
	if _, err := b.All(&d, 0, nil); err != nil {
		t.Fatal(err)
	}
	if err := b.Even(core.FromTuple(&key), math.MaxInt64); err != nil {
		t.Fatal(err)
	}
	k.events()
	if before := k.counters(); true {
		if k.run(k.LsPriOut, input{frame: frame}); k.moved(before)["fast_held"] != 1 {
			t.Errorf("the kernel's again: counted %v", k.moved(before))
		}
	}
}
