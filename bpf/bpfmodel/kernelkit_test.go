// SPDX-License-Identifier: Apache-2.0

package bpfmodel_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/dchest/siphash"
	"pgregory.net/rapid"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
	"github.com/lockstep-ft/lockstep/compare"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
	"github.com/lockstep-ft/lockstep/rewriter"
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
	spec.Maps["ls_fast"].MaxEntries = 1
	spec.Maps["ls_half"].MaxEntries = halves
	spec.Maps["ls_slots"].MaxEntries = slots
	spec.Maps["ls_gslots"].MaxEntries = gslots
	spec.Maps["ls_ring"].MaxEntries = 1 << 16
	cpus := uint32(ebpf.MustPossibleCPU())
	spec.Maps["ls_lane"].MaxEntries, spec.Maps["ls_sent"].MaxEntries = cpus, cpus*uint32(bpf.LockstepLsConstLS_SENT)
	for name, v := range map[string]uint32{
		"ls_tap": 1, "ls_peer": 1, "ls_mark_rel": 1, "ls_mark_in": 2, "ls_mark_park": 3,
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
		k.empty(t, m)
	}
	for _, ev := range k.events(t) {
		k.kept(t, ev.Slot)
	}
	k.moved(t)
}

// empty removes every entry of a table.
func (k *kernel) empty(t rapid.TB, m *ebpf.Map) {
	t.Helper()
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
		Guest: t.Guest, Remote: t.Remote, Gport: t.GuestPort, Rport: t.RemotePort, Vlan: t.VLAN, Vlan2: t.VLAN2, Proto: t.Proto,
	}
}

func modelTuple(t bpf.LockstepLsTuple) bpfmodel.Tuple {
	return bpfmodel.Tuple{
		Guest: t.Guest, Remote: t.Remote, GuestPort: t.Gport, RemotePort: t.Rport, VLAN: t.Vlan, VLAN2: t.Vlan2, Proto: t.Proto,
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
