// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"bytes"
	"flag"
	"fmt"
	"iter"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader/core"
	"github.com/lockstep-ft/lockstep/rewriter"
)

// duel puts the same frames through the programs and the model.
type duel struct {
	*traffic
	t        *testing.T
	seed     uint64
	primary  bool
	k        *programs
	n        *NIC
	out      outputs
	counts   [bpf.LockstepLsReasonLS_R_MAX]uint64
	session  datapath.Session
	peerNo   map[uint16]uint64 // highest number by stream
	peerLast uint64            // that of the record before
	held     [2][]uint32       // slots of the kernel and of the model
	what     string
}

const duelKeyGen, duelEpoch = 7, 9

func newDuel(t *testing.T, k *programs, role datapath.Role, seed uint64) *duel {
	d := &duel{
		traffic: newTraffic(rand.New(rand.NewPCG(seed, 1))), t: t, seed: seed, primary: role == datapath.RolePrimary, k: k,
		peerNo: make(map[uint16]uint64),
	}
	take := func(to *[][]byte) func([]byte) { return func(b []byte) { *to = append(*to, b) } }
	d.n = New(Host{
		Now: func() int64 { return 1000 }, ToWire: take(&d.out.wire), ToGuest: take(&d.out.guest), ToPeer: take(&d.out.peer),
		Rand: rand.New(rand.NewPCG(seed, 2)),
	}, Options{
		Role: role, MAC: duelMAC, Slots: duelSlots, LargeSlots: duelLarge, RingBytes: k.ringBytes, Connections: duelConns, Rules: duelRules, MPTCP: k.mptcp, Mutation: k.mutation,
	})
	// The kernel's LRU maps do not evict exactly, so they are larger than what comes.
	d.n.m.setTable(bpfmodel.New(duelConns, 4096, 4096))
	d.n.m.cli = bpfmodel.NewLRU[bpf.LockstepLsCli](4096)
	keys, err := compare.NewKeys(rand.NewChaCha8([32]byte{byte(seed)}))
	must(t, err)
	d.session = datapath.Session{
		Term: duelKeyGen, Epoch: duelEpoch, PeerMAC: []byte{2, 0x50, 0, 0, 0, 1}, TxKey: [2]uint64{1, seed}, RxKey: [2]uint64{3, seed}, Digest: *keys,
	}
	must(t, d.n.InstallSession(d.session))
	d.n.m.conf.LeaseUntil = math.MaxUint64
	k.forget()
	d.mode(d.usual())
	return d
}

func (d *duel) usual() datapath.Mode {
	if d.primary {
		return datapath.ModeHold
	}
	return datapath.ModeRun
}

func (d *duel) fatalf(format string, args ...any) {
	d.t.Helper()
	d.t.Fatalf("seed %d, %s, %s: %s", d.seed, d.n.m.opts.Role, d.what, fmt.Sprintf(format, args...))
}

// settle gives the kernel the model's settings and keys.
func (d *duel) settle() {
	must(d.t, d.k.LsConf.Put(uint32(0), &d.n.m.conf))
	for i := range uint32(2) {
		must(d.t, d.k.LsKeys.Put(i, &d.n.m.keys.of[i]))
	}
}

func (d *duel) mode(m datapath.Mode) {
	must(d.t, d.n.SetMode(m))
	d.settle()
}

// both has f done by the programs and by the model, and compares.
func (d *duel) both(what string, frame []byte, kernel func(b []byte), model func(b []byte)) {
	d.t.Helper()
	d.what = fmt.Sprintf("%s, mode %d, frame\n% x\n", what, d.n.m.conf.Mode, frame)
	kernel(bytes.Clone(frame))
	model(bytes.Clone(frame))
	var names []string
	for i, n := range d.n.m.stats {
		for ; d.counts[i] < n; d.counts[i]++ {
			names = append(names, bpf.ReasonName(i))
		}
	}
	if got := d.k.moved(); !slices.Equal(got, names) {
		d.fatalf("kernel counted %v, model %v (ring %d, model %d)", got, names, d.k.ring.AvailableBytes(), d.n.m.ring.used)
	}
	if slices.Contains(names, "no_slot") || slices.Contains(names, "copy_lost") {
		// The next search begins at a random place.
		var scratch []bpf.LockstepLsScratch
		must(d.t, d.k.LsScratch.Lookup(uint32(0), &scratch))
		d.n.m.cursor = scratch[0].Cursor
	}
	for _, c := range []struct {
		name string
		k, m *[][]byte
	}{{"to the wire", &d.k.out.wire, &d.out.wire}, {"to the guest", &d.k.out.guest, &d.out.guest}, {"to the peer", &d.k.out.peer, &d.out.peer}} {
		if !slices.EqualFunc(*c.k, *c.m, bytes.Equal) {
			d.fatalf("%s:\nkernel %s\nmodel  %s", c.name, hex(*c.k), hex(*c.m))
		}
		*c.k, *c.m = nil, nil
	}
	var conf bpf.LockstepLsConf
	must(d.t, d.k.LsConf.Lookup(uint32(0), &conf))
	if m := &d.n.m.conf; conf.LeaseUntil != m.LeaseUntil || (conf.Echoed == 0) != (m.Echoed == 0) {
		d.fatalf("lease until %d, echoed %d; model %d, %d", conf.LeaseUntil, conf.Echoed, m.LeaseUntil, m.Echoed)
	}
}

func hex(frames [][]byte) string {
	var b strings.Builder
	for _, f := range frames {
		fmt.Fprintf(&b, "\n  % x", f)
	}
	return b.String()
}

// read compares what is in both rings.
func (d *duel) read() {
	d.t.Helper()
	raw := d.k.events()
	for i, r := range raw {
		e := d.n.m.ring.next()
		if e == nil {
			d.fatalf("%d events, model %d", len(raw), i)
		}
		if le.Uint32(r) == uint32(bpf.LockstepLsEvTypeLS_EV_REC) {
			var got bpf.LockstepLsEvRec
			copy(core.BytesOf(&got), r)
			want := *e.record()
			if len(r) != e.len || got.At == 0 {
				d.fatalf("event %d has %d bytes at %d, model %d", i, len(r), got.At, e.len)
			}
			got.At, want.At = 0, 0
			clear(got.Rec.Bound[got.Rec.Nsum:])
			if got != want {
				d.fatalf("event %d:\nkernel %+v\nmodel  %+v", i, got, want)
			}
			continue
		}
		var got bpf.LockstepLsEv
		copy(core.BytesOf(&got), r)
		want := *e.frame()
		if got.At == 0 {
			d.fatalf("event %d without time", i)
		}
		clear(got.Hdr[got.HdrLen:])
		slots := [2]uint32{got.Slot, want.Slot}
		got.At, want.At, got.Slot, want.Slot = 0, 0, 0, 0
		if got != want {
			d.fatalf("event %d:\nkernel %+v\nmodel  %+v", i, got, want)
		}
		none := uint32(compare.NoSlot)
		if (slots[0] == none) != (slots[1] == none) {
			d.fatalf("event %d: slot %#x, model %#x", i, slots[0], slots[1])
		}
		if slots[0] == none {
			continue
		}
		if k, m := frameOf(d.k.slots, slots[0]), frameOf(d.n.m.slots, slots[1]); !bytes.Equal(k, m) {
			d.fatalf("event %d: kept\nkernel % x\nmodel  % x", i, k, m)
		}
		d.held[0], d.held[1] = append(d.held[0], slots[0]), append(d.held[1], slots[1])
	}
	if !d.n.m.ring.empty() && d.n.m.ring.next() != nil {
		d.fatalf("the model has more than %d events", len(raw))
	}
}

func (d *duel) free() {
	for i, s := range []core.Slots{d.k.slots, d.n.m.slots} {
		for _, slot := range d.held[i] {
			freeSlot(s, slot)
		}
		d.held[i] = nil
	}
}

// tables compares the maps.
func (d *duel) tables() {
	d.t.Helper()
	for _, c := range []struct {
		name string
		m    func() map[bpf.LockstepLsTuple]any
		want func() map[bpf.LockstepLsTuple]any
	}{
		{"ls_conn", func() map[bpf.LockstepLsTuple]any { return dump[bpf.LockstepLsConn](d, d.k.LsConn) }, func() map[bpf.LockstepLsTuple]any { return conns(d.n.m.table.Conns()) }},
		{"ls_edge", func() map[bpf.LockstepLsTuple]any { return dump[bpf.LockstepLsConn](d, d.k.LsEdge) }, func() map[bpf.LockstepLsTuple]any { return conns(d.n.m.table.Edges()) }},
		{"ls_half", func() map[bpf.LockstepLsTuple]any { return dump[bpf.LockstepLsHalf](d, d.k.LsHalf) }, d.halves},
		{"ls_inherited", func() map[bpf.LockstepLsTuple]any { return dump[bpf.LockstepLsInh](d, d.k.LsInherited) }, d.inherited},
		{"ls_cli", func() map[bpf.LockstepLsTuple]any { return dump[bpf.LockstepLsCli](d, d.k.LsCli) }, d.remotes},
	} {
		got, want := c.m(), c.want()
		for key, v := range got {
			if want[key] != v {
				d.fatalf("%s of %+v:\nkernel %+v\nmodel  %+v", c.name, key, v, want[key])
			}
		}
		if len(got) != len(want) {
			d.fatalf("%s has %d entries, model %d", c.name, len(got), len(want))
		}
	}
}

func (d *duel) step() {
	m := d.n.m
	isns, known := d.pvm, d.pvm
	d.errors = m.conf.Mode == uint32(datapath.ModeSolo)
	if !d.primary {
		isns = d.svm
	}
	if m.conf.Mode == uint32(datapath.ModeSolo) {
		isns = pick(d.Rand, d.pvm, d.svm)
		// What the remote echoes after a takeover.
		for _, all := range []iter.Seq2[bpfmodel.Tuple, bpfmodel.Conn]{m.table.Conns(), m.table.Edges()} {
			for _, c := range all {
				if c.TSFirst != 0 && c.State&rewriter.Echoes == 0 {
					d.stamps[0] = c.TSFirst
				}
			}
		}
	}
	switch d.IntN(20) {
	case 0, 1, 2, 3, 4, 5:
		gso := uint16(0)
		f := d.frame(false, isns, known)
		if f[12] != 0x81 && len(f) > 1000 && d.IntN(2) == 0 {
			gso = uint16(100 + d.IntN(300))
		}
		if gso > 0 && !whole(f) {
			gso = 0
		}
		d.both("from the guest", f, func(b []byte) { d.k.fromGuest(d.primary, b, gso, unmarked) }, func(b []byte) { m.fromGuest(b, gso, unmarked) })
	case 6, 7, 8:
		d.both("to the guest", d.frame(true, isns, known), func(b []byte) { d.k.toGuest(d.primary, b, 0, unmarked) }, func(b []byte) { m.toGuest(b, 0, unmarked) })
	case 9:
		from := pick(d.Rand, released, mirrored)
		if !d.primary {
			from = pick(d.Rand, released, mirrored, parked)
		}
		d.both(fmt.Sprintf("marked %d", from), d.frame(from != released, isns, known),
			func(b []byte) { d.k.toGuest(d.primary, b, 0, from) }, func(b []byte) { m.toGuest(b, 0, from) })
	case 10, 11, 12:
		d.fromPeer("a frame of the peer", d.frame(true, isns, known))
	case 13, 14, 15:
		if d.IntN(8) == 0 { // one that came twice, and then once too often
			r := d.record()
			r.StreamNo = d.peerNo[r.Stream] + 1
			d.peerNo[r.Stream]++
			for _, flags := range []uint8{recRetx, 0, 0} {
				r.Flags = flags
				d.fromPeer("a record again", d.seal(&r, d.session.RxKey))
			}
			return
		}
		d.fromPeer("a record of the peer", d.damaged(d.record()))
	case 16:
		if d.IntN(6) > 0 {
			return
		}
		d.read()
		d.free()
	case 17:
		d.setting()
	case 18:
		if d.primary {
			return
		}
		d.open()
	case 19:
		if d.IntN(4) > 0 {
			d.tables()
			return
		}
		d.read()
		d.free()
		for range 6 { // more than there are slots for them
			s := d.segment(!d.primary, isns, known)
			s.flags = syn
			f := pick(d.Rand, d.flows...).tcp(!d.primary, s)
			if d.primary {
				d.both("a SYN", f, func(b []byte) { d.k.fromGuest(true, b, 0, unmarked) }, func(b []byte) { d.n.FromGuest(b, 0) })
			} else {
				d.fromPeer("a SYN", f)
			}
		}
	}
}

// whole: is it a plain large segment or datagram of IPv4, which can be cut?
func whole(b []byte) bool {
	return b[12] == 8 && b[13] == 0 && (b[23] == 6 || b[23] == 17) && be.Uint16(b[20:])&0x3fff == 0 && len(b) == 14+int(be.Uint16(b[16:])) && new(bpfmodel.Segment).Parse(b, false) != bpfmodel.ClassMalformed
}

func (d *duel) fromPeer(what string, b []byte) {
	d.both(what, b, func(b []byte) { d.k.fromPeer(d.primary, b) }, d.n.FromPeer)
}

// setting changes what the daemon can change.
func (d *duel) setting() {
	m := d.n.m
	m.conf.LeaseUntil = pick[uint64](d.Rand, math.MaxUint64, math.MaxUint64, 0)
	m.conf.OldUntil = pick[uint64](d.Rand, math.MaxUint64, 0)
	m.conf.Epoch = duelEpoch + uint32(d.IntN(2))
	modes := []datapath.Mode{datapath.ModeShut, datapath.ModeHold, datapath.ModeSolo, datapath.ModeHold, datapath.ModeHold}
	if !d.primary {
		modes = []datapath.Mode{datapath.ModeShut, datapath.ModeRun, datapath.ModePark, datapath.ModeSolo, datapath.ModeQuiet, datapath.ModeRun, datapath.ModeRun}
	}
	switch d.IntN(8) {
	case 0:
		d.session.Term++
		d.session.Rotated = d.IntN(2) == 0
		d.session.TxKey[0]++
		must(d.t, d.n.InstallSession(d.session))
		m.conf.OldUntil = pick[uint64](d.Rand, math.MaxUint64, 0)
		clear(d.peerNo)
	case 1:
		d.tables()
		must(d.t, d.n.ResetOffsets())
		for _, m := range []*ebpf.Map{d.k.LsConn, d.k.LsHalf, d.k.LsInherited} {
			for _, key := range keysOf(d.t, m) {
				must(d.t, m.Delete(&key))
			}
		}
	case 2:
		e := datapath.Edge{Tuple: core.FromTuple(ptr(pick(d.Rand, d.flows...).tuple())), Seq: d.edge(), TS: d.edge(), ISN: d.edge()}
		_ = d.n.AddEdges([]datapath.Edge{e}) // may be full
		d.put(d.k.LsEdge, m.table.Edges())
	case 3:
		if !d.primary {
			_ = d.n.TakeOver(1<<24, d.IntN(2) == 0) // may be full
			d.put(d.k.LsConn, m.table.Conns())
			modes = []datapath.Mode{datapath.ModeSolo}
		}
	}
	d.mode(pick(d.Rand, modes...))
}

func ptr[T any](v T) *T { return &v }

// The sequences of TestDuel: -duel.seed and -duel.sequences=1 repeat one.
var (
	firstSeed = flag.Uint64("duel.seed", 1, "of the first sequence")
	sequences = flag.Int("duel.sequences", 40, "for each role and setting")
)

// The model does what the programs do, with MPTCP's option kept as well, and with rules
// switched off.
func TestDuel(t *testing.T) {
	const mutations = bpf.LockstepLsMutationLS_MUTATE_R9 | bpf.LockstepLsMutationLS_MUTATE_R6 | bpf.LockstepLsMutationLS_MUTATE_R20 |
		bpf.LockstepLsMutationLS_MUTATE_TAG | bpf.LockstepLsMutationLS_MUTATE_REPLAY | bpf.LockstepLsMutationLS_MUTATE_MODE |
		bpf.LockstepLsMutationLS_MUTATE_FLOOD | bpf.LockstepLsMutationLS_MUTATE_EDGE | bpf.LockstepLsMutationLS_MUTATE_QUOTE
	for _, c := range []struct {
		name     string
		mptcp    bool
		mutation bpf.LockstepLsMutation
		ring     int // bytes: the larger one is seldom full before the slots are taken
		part     int // of the sequences
	}{{"plain", false, 0, 1 << 13, 1}, {"MPTCP", true, 0, 1 << 15, 1}, {"mutations", false, mutations, 1 << 15, 4}} {
		t.Run(c.name, func(t *testing.T) {
			k := loadPrograms(t, c.mptcp, c.mutation, c.ring)
			for i := range max(*sequences/c.part, 1) {
				for _, role := range []datapath.Role{datapath.RolePrimary, datapath.RoleSecondary} {
					d := newDuel(t, k, role, *firstSeed+uint64(i))
					for range 200 {
						d.step()
					}
					d.read()
					d.tables()
				}
			}
		})
	}
}
