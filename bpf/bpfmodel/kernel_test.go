// SPDX-License-Identifier: Apache-2.0

package bpfmodel_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"maps"
	"os"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/dchest/siphash"
	"pgregory.net/rapid"

	"lockstep/bpf"
	"lockstep/bpf/bpfmodel"
	"lockstep/compare"
	lt "lockstep/loader/loadertest"
	"lockstep/rewriter"
)

const (
	drop     = 2
	redirect = 7
	next     = 1<<32 - 1

	keyGen, epoch = 7, 9
	etherHeader   = 14
	preAt         = etherHeader
)

var (
	ownMAC  = [6]byte{2, 0, 0, 0, 1, 1}
	peerMAC = [6]byte{2, 0, 0, 0, 1, 2}
	le      = binary.LittleEndian
)

// kernel is the kernel half of the secondary, in RUN, fed by PROG_TEST_RUN.
type kernel struct {
	bpf.LockstepObjects
	conf    bpf.LockstepLsConf
	keys    bpf.LockstepLsKeys
	digest  *compare.Keys
	ring    *ringbuf.Reader
	counts  []uint64
	streams map[uint16]uint64
	no      uint64 // of the announcement sent last
}

func loadKernel(t *testing.T, conns, halves uint32) *kernel {
	t.Helper()
	lt.NeedRoot(t)
	spec, err := bpf.LoadLockstep()
	if err != nil {
		t.Fatal(err)
	}
	const slots, gslots = 8, 4
	spec.Maps["ls_conn"].MaxEntries = conns
	spec.Maps["ls_half"].MaxEntries = halves
	spec.Maps["ls_slots"].MaxEntries = slots
	spec.Maps["ls_gslots"].MaxEntries = gslots
	spec.Maps["ls_ring"].MaxEntries = 1 << 16
	cpus := uint32(ebpf.MustPossibleCPU())
	spec.Maps["ls_lane"].MaxEntries, spec.Maps["ls_sent"].MaxEntries = cpus, cpus*uint32(bpf.LockstepLsConstLS_SENT)
	for name, v := range map[string]uint32{
		"ls_tap": 1, "ls_peer": 1, "ls_mark_rel": 1, "ls_mark_in": 2,
		"ls_nslots": slots, "ls_ngslots": gslots,
	} {
		must(t, spec.Variables[name].Set(v))
	}
	must(t, spec.Variables["ls_mutate"].Set(uint32(map[string]bpf.LockstepLsMutation{
		"R9": bpf.LockstepLsMutationLS_MUTATE_R9, "QUOTE": bpf.LockstepLsMutationLS_MUTATE_QUOTE,
	}[os.Getenv(mutationEnv)])))
	k := &kernel{streams: make(map[uint16]uint64)}
	must(t, spec.LoadAndAssign(&k.LockstepObjects, nil))
	t.Cleanup(func() { _ = k.Close() })
	k.ring, err = ringbuf.NewReader(k.LsRing)
	must(t, err)
	t.Cleanup(func() { _ = k.ring.Close() })

	// Any fixed bytes will do for secrets here.
	seed := make([]byte, 1<<15)
	for i := range seed {
		seed[i] = byte(i * i >> 3)
	}
	k.digest, err = compare.NewKeys(bytes.NewReader(seed))
	must(t, err)
	k.keys = bpf.LockstepLsKeys{SipTx: [2]uint64{1, 2}, SipRx: [2]uint64{3, 4}, Mix: k.digest.Mix}
	for lane := range k.keys.K {
		n := copy(k.keys.K[lane][:], k.digest.K[lane][:])
		copy(k.keys.K[lane][n:], k.digest.K[lane][:])
	}
	must(t, k.LsKeys.Put(uint32(0), &k.keys))
	k.conf = bpf.LockstepLsConf{
		LeaseUntil: 1<<64 - 1, Epoch: epoch, KeyGen: keyGen, OwnMac: ownMAC, PeerMac: peerMAC,
	}
	k.mode(t, bpf.LockstepLsModeLS_MODE_RUN)
	k.moved(t)
	return k
}

func must(t rapid.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%+v", err)
	}
}

func (k *kernel) mode(t rapid.TB, m bpf.LockstepLsMode) {
	t.Helper()
	k.conf.Mode = uint32(m)
	must(t, k.LsConf.Put(uint32(0), &k.conf))
}

// reset is a checkpoint, and more: nothing is left of the sequence before.
func (k *kernel) reset(t rapid.TB) {
	t.Helper()
	for _, m := range []*ebpf.Map{k.LsConn, k.LsHalf, k.LsInherited} {
		var keys []bpf.LockstepLsTuple
		var key bpf.LockstepLsTuple
		var val []byte
		it := m.Iterate()
		for it.Next(&key, &val) {
			keys = append(keys, key)
		}
		must(t, it.Err())
		for i := range keys {
			must(t, m.Delete(&keys[i]))
		}
	}
	for _, ev := range k.events(t) {
		k.kept(t, ev.Slot)
	}
	k.moved(t)
}

// run passes frame through prog.
func (k *kernel) run(t rapid.TB, prog *ebpf.Program, frame []byte) (verdict uint32, out []byte) {
	t.Helper()
	opts := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+2048)}
	verdict, err := prog.Run(&opts)
	must(t, err)
	return verdict, opts.DataOut
}

// moved names the counters that moved since it was asked last.
func (k *kernel) moved(t rapid.TB) (names []string) {
	t.Helper()
	if k.counts == nil {
		k.counts = make([]uint64, bpf.LockstepLsReasonLS_R_MAX)
	}
	for i := range k.counts {
		var cpus []bpf.LockstepLsCount
		must(t, k.LsStats.Lookup(uint32(i), &cpus))
		var n uint64
		for _, c := range cpus {
			n += c.Packets
		}
		for ; k.counts[i] < n; k.counts[i]++ {
			names = append(names, bpf.ReasonName(i))
		}
	}
	return names
}

// events returns the ring's events.
func (k *kernel) events(t rapid.TB) (evs []bpf.LockstepLsEv) {
	t.Helper()
	must(t, k.ring.Flush())
	for {
		r, err := k.ring.Read()
		if errors.Is(err, ringbuf.ErrFlushed) {
			return evs
		}
		must(t, err)
		var ev bpf.LockstepLsEv
		_, err = binary.Decode(r.RawSample, le, &ev)
		must(t, err)
		evs = append(evs, ev)
	}
}

// kept returns the frame in a slot and frees the slot.
func (k *kernel) kept(t rapid.TB, slot uint32) []byte {
	t.Helper()
	const header = 64
	m := k.LsSlots
	if slot&uint32(bpf.LockstepLsConstLS_SLOT_GSO) != 0 {
		m, slot = k.LsGslots, slot&^uint32(bpf.LockstepLsConstLS_SLOT_GSO)
	}
	raw, err := m.LookupBytes(slot)
	must(t, err)
	if state := bpf.LockstepLsSlotState(le.Uint32(raw)); state != bpf.LockstepLsSlotStateLS_SLOT_READY {
		t.Fatalf("slot %d in state %d", slot, state)
	}
	frame := slices.Clone(raw[header : header+le.Uint32(raw[4:])])
	clear(raw[:header])
	must(t, m.Put(slot, raw))
	return frame
}

// announcement is the peer frame that P sends for a.
func (k *kernel) announcement(t rapid.TB, a *bpfmodel.Record) []byte {
	t.Helper()
	k.no++
	r := bpf.LockstepLsRec{
		Version: uint8(bpf.LockstepLsConstLS_ABI_VERSION), Type: uint8(bpf.LockstepLsRecTypeLS_REC_ANNOUNCE),
		Dir: uint8(bpf.LockstepLsDirLS_DIR_P2S), Len: recBase, StreamNo: k.no, KeyGen: keyGen, Epoch: epoch,
		T: kernelTuple(a.Tuple), Inc: a.Seq, Seq: a.Seq, End: a.Seq + 1, Ack: a.Ack, Win: a.Win,
		TcpFlags: uint8(a.Flags), Optlen: a.OptLen, Opts: a.Opts,
	}
	b, err := binary.Append(nil, le, &r)
	must(t, err)
	b = b[:recBase]
	le.PutUint64(b, siphash.Hash(k.keys.SipRx[0], k.keys.SipRx[1], b[8:]))
	frame := slices.Concat(ownMAC[:], peerMAC[:], []byte{0x88, 0xb5}, make([]byte, 60))
	le.PutUint16(frame[preAt:], uint16(bpf.LockstepLsConstLS_MAGIC))
	le.PutUint16(frame[preAt+2:], uint16(len(frame)))
	return append(frame, b...)
}

const recBase = 160 // LS_REC_BASE

// record takes a record frame apart. between is what stands before the record.
func (k *kernel) record(t rapid.TB, typ bpf.LockstepLsRecType, frame []byte) (r bpf.LockstepLsRec, between []byte) {
	t.Helper()
	if len(frame) < preAt+4 || !bytes.Equal(frame[:preAt], slices.Concat(peerMAC[:], ownMAC[:], []byte{0x88, 0xb5})) ||
		le.Uint16(frame[preAt:]) != uint16(bpf.LockstepLsConstLS_MAGIC) {
		t.Fatalf("no peer frame: % x", frame)
	}
	off := int(le.Uint16(frame[preAt+2:]))
	if len(frame) < off+recBase {
		t.Fatalf("record at %d of %d", off, len(frame))
	}
	b := frame[off:]
	if tag := siphash.Hash(k.keys.SipTx[0], k.keys.SipTx[1], b[8:]); tag != le.Uint64(b) {
		t.Fatalf("tag %#x, want %#x", le.Uint64(b), tag)
	}
	_, err := binary.Decode(append(slices.Clone(b), make([]byte, binary.Size(r))...), le, &r)
	must(t, err)
	if int(r.Len) != len(b) || r.Version != uint8(bpf.LockstepLsConstLS_ABI_VERSION) || r.KeyGen != keyGen || r.Epoch != epoch ||
		r.Type != uint8(typ) || r.Dir != uint8(bpf.LockstepLsDirLS_DIR_S2P) || r.Nsum != 0 {
		t.Fatalf("record of %d bytes: %+v", len(b), r)
	}
	if last := k.streams[r.Stream]; r.StreamNo != last+1 && last != 0 {
		t.Fatalf("stream %d: number %d after %d", r.Stream, r.StreamNo, last)
	}
	k.streams[r.Stream] = r.StreamNo
	return r, frame[preAt+4 : off]
}

func kernelTuple(t bpfmodel.Tuple) bpf.LockstepLsTuple {
	return bpf.LockstepLsTuple{
		Guest: t.Guest, Remote: t.Remote, Gport: t.GuestPort, Rport: t.RemotePort, Vlan: t.VLAN, Proto: t.Proto,
	}
}

func modelTuple(t bpf.LockstepLsTuple) bpfmodel.Tuple {
	return bpfmodel.Tuple{
		Guest: t.Guest, Remote: t.Remote, GuestPort: t.Gport, RemotePort: t.Rport, VLAN: t.Vlan, Proto: t.Proto,
	}
}

// conns and halves are the kernel's tables in the model's words, but for the time.
func (k *kernel) conns(t rapid.TB) map[bpfmodel.Tuple]rewriter.Conn {
	t.Helper()
	m := make(map[bpfmodel.Tuple]rewriter.Conn)
	var key bpf.LockstepLsTuple
	var c bpf.LockstepLsConn
	it := k.LsConn.Iterate()
	for it.Next(&key, &c) {
		if c.Last == 0 {
			t.Fatalf("connection never seen: %+v", c)
		}
		m[modelTuple(key)] = rewriter.Conn{
			Off: c.Off, TSOff: c.TsOff, Inc: c.Inc, State: rewriter.State(c.State), CliAck: c.CliAck, ISNSVM: c.IsnSvm,
		}
	}
	must(t, it.Err())
	return m
}

func (k *kernel) halves(t rapid.TB) map[bpfmodel.Tuple]bpfmodel.Half {
	t.Helper()
	m := make(map[bpfmodel.Tuple]bpfmodel.Half)
	var key bpf.LockstepLsTuple
	var h bpf.LockstepLsHalf
	it := k.LsHalf.Iterate()
	for it.Next(&key, &h) {
		if h.Last == 0 {
			t.Fatalf("half-open connection never seen: %+v", h)
		}
		m[modelTuple(key)] = bpfmodel.Half{
			Half: rewriter.Half{
				State: rewriter.State(h.State), ISNPVM: h.IsnPvm, ISNSVM: h.IsnSvm, CliPVM: h.CliPvm, CliSVM: h.CliSvm,
				TSPVM: h.TsPvm, TSSVM: h.TsSvm, UsedPVM: h.UsedPvm, UsedSVM: h.UsedSvm,
			},
			Win: h.Win, Flags: bpfmodel.Flags(h.TcpFlags), OptLen: h.Optlen, Opts: h.Opts,
		}
	}
	must(t, it.Err())
	return m
}

// duel puts the same frames through the kernel and the model.
type duel struct {
	*rapid.T
	k              *kernel
	tab            *bpfmodel.Table
	flows          []flow
	pvm, svm, cli  []uint32 // ISNs
	now            int64
	verdict        uint32 // of the kernel, for the last frame
	out            []byte
	names          []string
	what           string
	frame, changed []byte // before and after the model
}

func (d *duel) expect(what string, got, want any) {
	d.Helper()
	if got != want {
		d.Fatalf("%s: %s: kernel %v, model %v\nframe % x", d.what, what, got, want, d.frame)
	}
}

// pass gives frame to the kernel; the model works on a copy.
func (d *duel) pass(what string, prog *ebpf.Program, frame []byte) *bpfmodel.Segment {
	d.Helper()
	d.now++
	d.what, d.frame, d.changed = what, frame, slices.Clone(frame)
	d.verdict, d.out = d.k.run(d.T, prog, frame)
	d.names = d.k.moved(d.T)
	return new(bpfmodel.Segment)
}

// judge compares verdict and counters.
func (d *duel) judge(verdict uint32, names ...string) {
	d.Helper()
	if d.verdict != verdict {
		d.Fatalf("%s: kernel %d %v, model %d %v\nframe % x", d.what, d.verdict, d.names, verdict, names, d.frame)
	}
	if !slices.Equal(d.names, names) {
		d.Fatalf("%s: kernel counted %v, model %v\nframe % x", d.what, d.names, names, d.frame)
	}
}

func (d *duel) sameBytes(what string, got, want []byte) {
	d.Helper()
	if !bytes.Equal(got, want) {
		d.Fatalf("%s: %s:\nkernel % x\nmodel  % x\nframe  % x", d.what, what, got, want, d.frame)
	}
}

func (d *duel) sameTables() {
	d.Helper()
	c := conns(d.tab)
	for key, v := range c {
		v.Last = 0
		c[key] = v
	}
	if got := d.k.conns(d.T); !maps.Equal(got, c) {
		d.Fatalf("%s: ls_conn:\nkernel %+v\nmodel  %+v\nframe % x", d.what, got, c, d.frame)
	}
	h := make(map[bpfmodel.Tuple]bpfmodel.Half)
	for key, v := range d.tab.Halves() {
		v.Last = 0
		h[key] = v
	}
	if got := d.k.halves(d.T); !maps.Equal(got, h) {
		d.Fatalf("%s: ls_half:\nkernel %+v\nmodel  %+v\nframe % x", d.what, got, h, d.frame)
	}
}

// inbound: the peer link brings a mirrored frame.
func (d *duel) inbound(frame []byte) {
	s := d.pass("inbound", d.k.LsSecIn, frame)
	v := bpfmodel.Delivered
	if s.Parse(d.changed) == bpfmodel.ClassTCP {
		v = d.tab.Inbound(s, d.now)
	}
	if v == bpfmodel.Delivered {
		d.judge(redirect, string(v))
		d.sameBytes("frame", d.out, d.changed)
	} else {
		d.judge(drop, string(v))
	}
}

// outbound: the SVM says something.
func (d *duel) outbound(frame []byte) {
	s := d.pass("outbound", d.k.LsSecOut, frame)
	switch s.Parse(d.changed) {
	case bpfmodel.ClassOther:
		d.uncompared(frame)
		return
	case bpfmodel.ClassMalformed:
		d.judge(drop, "malformed")
		return
	}
	var want bpfmodel.Record
	v, sent := d.tab.Outbound(s, d.now, &want)
	if !sent {
		d.judge(drop, string(v))
		return
	}
	d.judge(redirect, string(v))
	between := d.sameRecord(&want, s.Payload())
	d.sameBytes("headers", between, d.changed[preAt+4:][:len(between)])
	evs := d.k.events(d.T)
	d.expect("copies", len(evs), min(len(s.Payload()), 1))
	if len(evs) == 0 {
		return
	}
	ev := evs[0]
	inherited := ev.Flags&uint8(bpf.LockstepLsEvFlagLS_EV_INHERITED) != 0
	got := bpfmodel.Record{
		Tuple: modelTuple(ev.T), Inherited: inherited, Inc: ev.Inc, Seq: ev.Seq, End: want.End, Ack: ev.Ack,
		Win: ev.Win, Flags: bpfmodel.Flags(ev.TcpFlags), CliAck: ev.CliAck, OptLen: want.OptLen, Opts: want.Opts,
	}
	d.expect("type", ev.Type, uint32(bpf.LockstepLsEvTypeLS_EV_COPY))
	d.expect("copy", got, want)
	d.expect("copied payload", int(ev.Paylen), len(s.Payload()))
	d.sameBytes("copy", d.k.kept(d.T, ev.Slot), d.changed)
}

// uncompared: what is not TCP to the model is a datagram to the kernel, or link
// business. It becomes one record, and no connection hears of it.
func (d *duel) uncompared(frame []byte) {
	d.Helper()
	switch {
	case frame[12] == 8 && frame[13] == 0 && frame[23] == 2: // IGMP
		d.judge(drop, "svm_only")
		return
	case frame[12] == 8 && frame[13] == 6, frame[12] == 0x86 && frame[20] == 58:
		d.judge(redirect, "neigh_out")
		d.k.record(d.T, bpf.LockstepLsRecTypeLS_REC_NEIGH, d.out)
	default:
		d.judge(redirect, "record_out")
		r, _ := d.k.record(d.T, bpf.LockstepLsRecTypeLS_REC_DGRAM, d.out)
		d.expect("flags of a datagram", r.Flags|r.TcpFlags|r.Optlen, uint8(0))
	}
	d.expect("copies", len(d.k.events(d.T)), 0)
}

// sameRecord holds the record frame that the kernel made against want.
func (d *duel) sameRecord(want *bpfmodel.Record, payload []byte) (between []byte) {
	d.Helper()
	r, between := d.k.record(d.T, bpf.LockstepLsRecTypeLS_REC_DATA, d.out)
	got := bpfmodel.Record{
		Tuple: modelTuple(r.T), Inherited: r.Flags&uint8(bpf.LockstepLsRecFlagLS_REC_INHERITED) != 0,
		Inc: r.Inc, Seq: r.Seq, End: r.End, Ack: r.Ack, Win: r.Win, Flags: bpfmodel.Flags(r.TcpFlags),
		OptLen: r.Optlen, Opts: r.Opts, CliAck: want.CliAck, // which is no part of a record
	}
	d.expect("record", got, *want)
	pos := want.Seq
	if want.Flags&syn != 0 {
		pos++
	}
	d.expect("sum", compare.Sum(r.Sum), d.k.digest.Sum(pos, payload))
	return between
}

// announce: P announces the PVM's SYN.
func (d *duel) announce(a *bpfmodel.Record) {
	d.pass("announcement", d.k.LsSecIn, d.k.announcement(d.T, a))
	var want bpfmodel.Record
	v, sent := d.tab.Announce(a, d.now, &want)
	if !sent {
		d.judge(drop, string(v))
		return
	}
	d.judge(redirect, string(v))
	d.sameRecord(&want, nil)
}

// alone: the same, after a takeover.
func (d *duel) alone(toGuest bool, frame []byte) {
	d.k.mode(d.T, bpf.LockstepLsModeLS_MODE_SOLO)
	prog := d.k.LsSecOut
	if toGuest {
		prog = d.k.LsSecGate
	}
	s := d.pass("alone", prog, frame)
	if s.Parse(d.changed) == bpfmodel.ClassTCP {
		d.tab.Alone(s, toGuest, d.now)
	}
	d.judge(next, "passed")
	d.sameBytes("frame", d.out, d.changed)
	d.k.mode(d.T, bpf.LockstepLsModeLS_MODE_RUN)
}

// near draws a position in a stream that begins at one of isns.
func (d *duel) near(isns []uint32, label string) uint32 {
	step := rapid.SampledFrom([]uint32{0, 1, 1, 1, 2, 1000, 1 << 30, 1<<30 + 1, 1 << 31}).Draw(d.T, label+" step")
	return rapid.SampledFrom(isns).Draw(d.T, label) + step
}

var flagSets = rapid.OneOf(
	rapid.SampledFrom([]bpfmodel.Flags{ackF, ackF | psh, ackF | fin, syn | ackF, syn, rst, rst | ackF}),
	rapid.Map(rapid.Byte(), func(b byte) bpfmodel.Flags { return bpfmodel.Flags(b) }),
)

// tcpOptions draws options as stacks write them, oddly laid out ones and rubbish.
func (d *duel) tcpOptions() []byte {
	number := func(label string) uint32 { return edge().Draw(d.T, label) }
	ts := func() []byte { return tsOpt(number("tsval"), number("tsecr")) }
	mss, fill := []byte{2, 4, 5, 180}, []byte{1, 1, 1}
	switch rapid.IntRange(0, 5).Draw(d.T, "options") {
	case 0:
		return nil
	case 1:
		return slices.Concat(mss, fill[:1], ts())
	case 2:
		return slices.Concat(fill[:2], ts(), fill[:rapid.IntRange(0, 3).Draw(d.T, "fill")], sackOpt(number("left"), number("right")))
	case 3:
		return slices.Concat(fill[:1], sackOpt(number("a"), number("b"), number("c"), number("d")), ts())
	case 4:
		return slices.Concat(fill[:rapid.IntRange(0, 3).Draw(d.T, "fill")], ts())
	}
	return rapid.SliceOfN(rapid.OneOf(rapid.SampledFrom([]byte{0, 1, 5, 8, 10}), rapid.Byte()), 0, 40).Draw(d.T, "rubbish")
}

// segment draws one between the guest (the SVM) and the remote.
func (d *duel) segment(toGuest bool) seg {
	s := seg{
		flow: rapid.SampledFrom(d.flows).Draw(d.T, "flow"), toGuest: toGuest,
		flags: flagSets.Draw(d.T, "flags"), win: rapid.Uint16().Draw(d.T, "win"),
		opts: d.tcpOptions(),
	}
	if toGuest {
		s.seq, s.ack = d.near(d.cli, "seq"), d.near(d.pvm, "ack")
	} else {
		s.seq, s.ack = d.near(d.svm, "seq"), d.near(d.cli, "ack")
		if s.flags&syn != 0 && rapid.IntRange(0, 9).Draw(d.T, "odd SYN") != 0 {
			s.seq = rapid.SampledFrom(d.svm).Draw(d.T, "isn")
			s.ack = rapid.SampledFrom(d.cli).Draw(d.T, "acked") + 1
		}
		if s.flags&(rst|ackF) == rst|ackF && rapid.Bool().Draw(d.T, "refusal") {
			s.seq = 0
		}
	}
	switch n := rapid.IntRange(0, 9).Draw(d.T, "payload"); {
	case n == 9:
		s.payload = bytes.Repeat([]byte{byte(s.seq), 5, 6}, rapid.IntRange(1, 1100).Draw(d.T, "times"))
	case n > 4:
		s.payload = rapid.SliceOfN(rapid.Byte(), 1, 9).Draw(d.T, "bytes")
	}
	return s
}

// other makes a frame of a segment that is not TCP any more, or that no TCP header
// can be found in: it is the flow's, and must not touch its connection.
func (d *duel) other(toGuest bool) []byte {
	s := d.segment(toGuest)
	frame := s.bytes()
	ip := frame[etherHeader:]
	if !s.flow.v6 {
		switch rapid.IntRange(0, 3).Draw(d.T, "other") {
		case 0:
			ip[9] = rapid.SampledFrom([]byte{1, 2, 17, 47, 50, 132}).Draw(d.T, "protocol")
		case 1: // of a fragment, the first too
			be.PutUint16(ip[6:], rapid.Uint16Range(1, 0x3fff).Draw(d.T, "fragment"))
		case 2:
			arp := slices.Concat([]byte{0, 1, 8, 0, 6, 4, 0, 1}, frame[6:12], ip[12:16], make([]byte, 6), []byte{198, 51, 100, 1})
			frame = append(append(frame[:12:12], 8, 6), arp...)
		case 3:
			be.PutUint16(frame[12:], rapid.Uint16Range(0x600, 0x7ff).Draw(d.T, "ethertype"))
		}
		return frame
	}
	tcp := slices.Clone(ip[40:])
	proto := rapid.SampledFrom([]byte{0, 43, 44, 60, 17, 47, 58}).Draw(d.T, "protocol")
	ip[6] = proto
	var chain []byte
	switch proto {
	case 0, 60: // more headers than are walked
		chain = bytes.Repeat([]byte{60, 0, 1, 4, 0, 0, 0, 0}, 9)
		chain[64] = 6
	case 43:
		chain = []byte{6, 0, 4, 0, 0, 0, 0, 0}
	case 44:
		chain = []byte{6, 0, 0, 0, 1, 2, 3, 4}
		be.PutUint16(chain[2:], 8*rapid.Uint16Range(0, 20).Draw(d.T, "offset")|1)
	case 58:
		tcp = append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, make([]byte, 16)...)
	}
	be.PutUint16(ip[4:], uint16(len(chain)+len(tcp)))
	return slices.Concat(frame[:etherHeader+40], chain, tcp)
}

// damaged spoils a frame now and then.
func (d *duel) damaged(frame []byte) []byte {
	switch rapid.IntRange(0, 19).Draw(d.T, "damage") {
	case 0:
		const shortest = etherHeader + 40 // PROG_TEST_RUN wants an IP header whole
		return frame[:rapid.IntRange(shortest, len(frame)).Draw(d.T, "cut")]
	case 1:
		at := rapid.IntRange(12, len(frame)-1).Draw(d.T, "at")
		frame[at] ^= 1 << rapid.IntRange(0, 7).Draw(d.T, "bit")
	}
	return frame
}

// guestSyn draws a guest's SYN or SYN|ACK.
func (d *duel) guestSyn(f flow, flags bpfmodel.Flags, isns []uint32) seg {
	s := seg{flow: f, seq: rapid.SampledFrom(isns).Draw(d.T, "isn"), flags: flags, opts: d.tcpOptions()}
	if flags&ackF != 0 {
		s.ack = rapid.SampledFrom(d.cli).Draw(d.T, "isn cli") + 1
	}
	return s
}

func (d *duel) announceSyn(f flow, flags bpfmodel.Flags) {
	s := d.guestSyn(f, flags, d.pvm)
	a := bpfmodel.Record{Tuple: f.tuple(), Seq: s.seq, Ack: s.ack, Flags: flags}
	a.OptLen = uint8(copy(a.Opts[:], s.opts))
	d.announce(&a)
}

// open goes through a handshake that is likely to succeed.
func (d *duel) open() {
	f := rapid.SampledFrom(d.flows).Draw(d.T, "flow")
	flags, answer := syn|ackF, ackF
	if rapid.Bool().Draw(d.T, "active") {
		flags, answer = syn, syn|ackF
	}
	if announced := rapid.Bool().Draw(d.T, "announced first"); announced {
		d.announceSyn(f, flags)
		d.outbound(d.guestSyn(f, flags, d.svm).bytes())
	} else {
		d.outbound(d.guestSyn(f, flags, d.svm).bytes())
		d.announceSyn(f, flags)
	}
	ack := rapid.SampledFrom(d.pvm).Draw(d.T, "acked") + 1
	d.inbound(seg{flow: f, toGuest: true, seq: d.cli[0] + 1, ack: ack, flags: answer, opts: d.tcpOptions()}.bytes())
}

// icmpError: an error for the guest, or of it, that quotes a segment which went the
// other way, or a part of it.
func (d *duel) icmpError(toGuest, alone bool) {
	s := d.segment(!toGuest)
	whole := s.bytes()
	quoted := whole[etherHeader : len(whole)-s.flow.pad]
	quoted = quoted[:rapid.IntRange(0, len(quoted)).Draw(d.T, "quoted")]
	if rapid.IntRange(0, 9).Draw(d.T, "spoil") == 0 && len(quoted) > 0 {
		quoted[rapid.IntRange(0, len(quoted)-1).Draw(d.T, "at")] ^= 1 << rapid.IntRange(0, 7).Draw(d.T, "bit")
	}
	types := []byte{0, 3, 4, 5, 8, 11, 12}
	if s.flow.v6 {
		types = []byte{1, 2, 3, 4, 127, 128}
	}
	icmp := append([]byte{rapid.SampledFrom(types).Draw(d.T, "type"), 4, 0x12, 0x34, 0, 0, 5, 0xdc}, quoted...)
	f := s.flow
	src, dst := byte(77), f.guest
	if !toGuest {
		src, dst = dst, src
	}
	frame := seg{flow: flow{v6: f.v6, guest: src, rem: dst, ipOpts: f.ipOpts}}.bytes()
	ip := frame[etherHeader : len(frame)-20]
	if f.v6 {
		ip[6] = 58
		be.PutUint16(ip[4:], uint16(len(icmp)))
	} else {
		ip[9] = 1
		be.PutUint16(ip[2:], uint16(len(ip)+len(icmp)))
	}
	frame = append(frame[:etherHeader+len(ip)], icmp...)

	prog, mode := d.k.LsSecIn, bpf.LockstepLsModeLS_MODE_RUN
	switch {
	case alone && toGuest:
		prog, mode = d.k.LsSecGate, bpf.LockstepLsModeLS_MODE_SOLO
	case alone:
		prog, mode = d.k.LsSecOut, bpf.LockstepLsModeLS_MODE_SOLO
	case !toGuest:
		prog = d.k.LsSecOut
	}
	d.k.mode(d.T, mode)
	d.pass("ICMP error", prog, frame)
	d.k.mode(d.T, bpf.LockstepLsModeLS_MODE_RUN)
	var e bpfmodel.ICMPError
	is := e.Parse(d.changed, toGuest)
	if is {
		d.tab.Error(&e, toGuest, alone)
	}
	switch {
	case alone:
		d.judge(next, "passed")
		d.sameBytes("frame", d.out, d.changed)
	case toGuest:
		d.judge(redirect, "delivered")
		d.sameBytes("frame", d.out, d.changed)
	default:
		d.judge(redirect, "record_out")
		r, _ := d.k.record(d.T, bpf.LockstepLsRecTypeLS_REC_DGRAM, d.out)
		pay := d.changed[etherHeader+len(ip)+4:]
		if is {
			e.ClearChecksum()
		}
		d.expect("sum", compare.Sum(r.Sum), d.k.digest.Sum(4, pay))
	}
}

func (d *duel) step() {
	switch rapid.SampledFrom([]string{"in", "in", "out", "out", "out", "other", "announce", "open", "alone", "error", "error", "checkpoint", "idle"}).Draw(d.T, "step") {
	case "in":
		d.inbound(d.damaged(d.segment(true).bytes()))
	case "out":
		d.outbound(d.damaged(d.segment(false).bytes()))
	case "other":
		if rapid.Bool().Draw(d.T, "to guest") {
			d.inbound(d.other(true))
		} else {
			d.outbound(d.other(false))
		}
	case "announce":
		flags := rapid.SampledFrom([]bpfmodel.Flags{syn, syn | ackF, syn | ackF}).Draw(d.T, "flags")
		d.announceSyn(rapid.SampledFrom(d.flows).Draw(d.T, "flow"), flags)
	case "open":
		d.open()
	case "alone":
		toGuest := rapid.Bool().Draw(d.T, "to guest")
		d.alone(toGuest, d.segment(toGuest).bytes())
	case "error":
		d.icmpError(rapid.Bool().Draw(d.T, "to guest"), rapid.Bool().Draw(d.T, "alone"))
	case "checkpoint":
		if rapid.IntRange(0, 5).Draw(d.T, "now") == 0 {
			d.tab.Reset()
			d.k.reset(d.T)
		}
	}
	d.sameTables()
}

// R9, R10, R11: kernel and model agree on verdict, counter, output bytes, record,
// copy and tables, whatever comes.
func TestKernel(t *testing.T) {
	const conns, halves = 1, 4096
	k := loadKernel(t, conns, halves)
	rapid.Check(t, func(t *rapid.T) {
		k.reset(t)
		isns := rapid.SliceOfN(edge(), 2, 2)
		d := &duel{
			T: t, k: k, tab: bpfmodel.New(conns, halves),
			pvm: isns.Draw(t, "isns pvm"), svm: isns.Draw(t, "isns svm"), cli: isns.Draw(t, "isns cli"),
		}
		for i := range conns + 1 {
			f := drawFlow(t)
			f.tci, f.gport = 0, uint16(i) // PROG_TEST_RUN cannot make a tag
			d.flows = append(d.flows, f)
		}
		for range rapid.IntRange(1, 100).Draw(t, "steps") {
			d.step()
		}
	})
}

// R11 in the kernel: a SYN flood evicts half-open entries only.
func TestKernelFlood(t *testing.T) {
	const conns, halves = 4, 1024
	k := loadKernel(t, conns, halves)
	f := flow{guest: 1, rem: 2, gport: 80}
	a := bpfmodel.Record{Tuple: f.tuple(), Seq: isnPVM, Ack: isnCli + 1, Flags: syn | ackF}
	k.run(t, k.LsSecIn, k.announcement(t, &a))
	k.run(t, k.LsSecOut, seg{flow: f, seq: isnSVM, ack: isnCli + 1, flags: syn | ackF}.bytes())
	ack := seg{flow: f, toGuest: true, seq: isnCli + 1, ack: isnPVM + 1, flags: ackF}
	want := ack
	want.ack = isnSVM + 1
	k.run(t, k.LsSecIn, ack.bytes())
	kept := k.conns(t)
	if len(kept) != 1 {
		t.Fatalf("%d connections, want 1", len(kept))
	}
	for i := range 4 * halves {
		f := f
		f.rem, f.rport = 3, uint16(i)
		if verdict, _ := k.run(t, k.LsSecOut, seg{flow: f, seq: isnSVM, ack: 9, flags: syn | ackF}.bytes()); verdict != drop {
			t.Fatalf("SYN|ACK %d: verdict %d", i, verdict)
		}
	}
	if n := len(k.halves(t)); n > halves {
		t.Errorf("%d half-open entries, want %d at most", n, halves)
	}
	if got := k.conns(t); !maps.Equal(got, kept) {
		t.Errorf("connections %+v, were %+v", got, kept)
	}
	if _, out := k.run(t, k.LsSecIn, ack.bytes()); !bytes.Equal(out, want.bytes()) {
		t.Errorf("ack of the old connection:\n % x, want\n % x", out, want.bytes())
	}
}
