// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/dchest/siphash"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
)

// Verdicts as PROG_TEST_RUN returns them.
const (
	next     = math.MaxUint32 // TCX_NEXT
	drop     = 2              // TCX_DROP
	redirect = 7              // TCX_REDIRECT
)

const (
	markRel  = 0x1a2b3c4d
	markIn   = 0x5e6f7081
	markPark = 0x51607283
	keyGen   = 7
	epoch    = 40

	nslots     = 40
	ngslots    = 4
	tcpSlots   = nslots - nslots/4
	tcpGslots  = ngslots - ngslots/4
	userStream = uint16(bpf.LockstepLsConstLS_STREAM_USER)
	streamMax  = uint16(bpf.LockstepLsConstLS_STREAM_MAX)
	abiVersion = uint8(bpf.LockstepLsConstLS_ABI_VERSION)

	recBase = int(bpf.LockstepLsConstLS_REC_BASE)
	slotGSO = uint32(bpf.LockstepLsConstLS_SLOT_GSO)
	noSlot  = uint32(bpf.LockstepLsConstLS_SLOT_NONE)
	kept    = uint32(bpf.LockstepLsConstLS_SENT) // records of each stream
)

const (
	shut = bpf.LockstepLsModeLS_MODE_SHUT
	hold = bpf.LockstepLsModeLS_MODE_HOLD
	run  = bpf.LockstepLsModeLS_MODE_RUN
	park = bpf.LockstepLsModeLS_MODE_PARK
	solo = bpf.LockstepLsModeLS_MODE_SOLO

	quiet = bpf.LockstepLsModeLS_MODE_QUIET
)

var (
	peerMAC = [6]byte{2, 0x50, 0, 0, 0, 1}
	ownMAC  = [6]byte{2, 0x50, 0, 0, 0, 2}
)

// kit is the kernel half loaded for a test.
type kit struct {
	testing.TB
	bpf.LockstepObjects
	rd      *ringbuf.Reader
	conf    bpf.LockstepLsConf
	digest  *compare.Keys
	sipTx   [2]uint64
	sipRx   [2]uint64
	streams map[uint16]uint64 // highest stream number seen
	sent    map[uint16]uint64 // highest stream number that the other host sent
	live    bool              // frames go through devices
}

// newKit loads the programs with small tables; tune changes the spec before.
func newKit(t testing.TB, tune ...func(*ebpf.CollectionSpec)) *kit {
	t.Helper()
	spec, err := bpf.LoadLockstep()
	if err != nil {
		t.Fatal(err)
	}
	for name, n := range map[string]uint32{
		"ls_slots": nslots, "ls_gslots": ngslots, "ls_conn": 8, "ls_fast": 512, "ls_half": 64, "ls_ring": 1 << 17,
		"ls_lane": uint32(ebpf.MustPossibleCPU()), "ls_sent": uint32(ebpf.MustPossibleCPU()) * kept,
	} {
		spec.Maps[name].MaxEntries = n
	}
	for name, v := range map[string]uint32{"ls_tap": 1, "ls_peer": 1, "ls_mark_rel": markRel, "ls_mark_in": markIn, "ls_mark_park": markPark, "ls_nslots": nslots, "ls_ngslots": ngslots} {
		if err := spec.Variables[name].Set(v); err != nil {
			t.Fatal(err)
		}
	}
	if m, ok := mutations[os.Getenv(mutationEnv)]; ok {
		variable("ls_mutate", uint32(m.value))(spec)
	}
	for _, f := range tune {
		f(spec)
	}
	k := &kit{TB: t, streams: make(map[uint16]uint64), sent: make(map[uint16]uint64)}
	if err := spec.LoadAndAssign(&k.LockstepObjects, nil); err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { k.LockstepObjects.Close() })
	if k.rd, err = ringbuf.NewReader(k.LsRing); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.rd.Close() })

	if k.digest, err = compare.NewKeys(rand.NewChaCha8([32]byte{1})); err != nil {
		t.Fatal(err)
	}
	k.sipTx, k.sipRx = [2]uint64{1, 2}, [2]uint64{0xfedcba9876543210, 0x0123456789abcdef}
	keys := bpf.LockstepLsKeys{SipTx: k.sipTx, SipRx: k.sipRx, Mix: k.digest.Mix}
	for lane := range keys.K {
		copy(keys.K[lane][copy(keys.K[lane][:], k.digest.K[lane][:]):], k.digest.K[lane][:])
	}
	if err := k.LsKeys.Put(uint32(1), &keys); err != nil {
		t.Fatal(err)
	}
	k.conf = bpf.LockstepLsConf{
		LeaseUntil: math.MaxUint64, Epoch: epoch, KeyGen: keyGen, KeyIndex: 1, PeerMac: peerMAC, OwnMac: ownMAC,
	}
	k.setMode(shut)
	return k
}

func variable(name string, v uint32) func(*ebpf.CollectionSpec) {
	return func(spec *ebpf.CollectionSpec) {
		if err := spec.Variables[name].Set(v); err != nil {
			panic(err)
		}
	}
}

func (k *kit) setConf() {
	k.Helper()
	if err := k.LsConf.Put(uint32(0), &k.conf); err != nil {
		k.Fatal(err)
	}
}

func (k *kit) setMode(mode bpf.LockstepLsMode) {
	k.Helper()
	k.conf.Mode = uint32(mode)
	k.setConf()
}

type counts map[string]uint64

// counters are the packets counted so far by reason, without those that are 0.
func (k *kit) counters() counts {
	k.Helper()
	c := make(counts)
	for i, name := range bpf.ReasonNames() {
		var per []bpf.LockstepLsCount
		if err := k.LsStats.Lookup(uint32(i), &per); err != nil {
			k.Fatal(err)
		}
		for _, p := range per {
			if p.Packets > 0 {
				c[name] += p.Packets
			}
		}
	}
	return c
}

// expect runs f and fails unless exactly the counters of want moved. A frame on
// its way through devices may still be in a soft interrupt when f returns.
func (k *kit) expect(want counts, f func()) {
	k.Helper()
	before := k.counters()
	f()
	moved := k.moved(before)
	for deadline := time.Now().Add(2 * time.Second); k.live && moved.total() < want.total() && time.Now().Before(deadline); {
		runtime.Gosched()
		moved = k.moved(before)
	}
	if !maps.Equal(moved, want) {
		k.Errorf("counted %v, want %v", moved, want)
	}
}

func (k *kit) moved(before counts) counts {
	k.Helper()
	c := k.counters()
	for name, n := range before {
		if c[name] -= n; c[name] == 0 {
			delete(c, name)
		}
	}
	return c
}

func (c counts) total() (n uint64) {
	for _, v := range c {
		n += v
	}
	return n
}

// input is a frame as a program sees it.
type input struct {
	frame   []byte
	mark    uint32
	gsoSize uint32
}

// run gives in to the program and returns the verdict, the frame and the mark after it.
func (k *kit) run(prog *ebpf.Program, in input) (verdict uint32, out []byte, mark uint32) {
	k.Helper()
	const markOff, gsoOff = 8, 176 // in struct __sk_buff
	var ctx, ctxOut [192]byte
	binary.NativeEndian.PutUint32(ctx[markOff:], in.mark)
	binary.NativeEndian.PutUint32(ctx[gsoOff:], in.gsoSize)
	opts := &ebpf.RunOptions{Data: in.frame, DataOut: make([]byte, 8192), Context: &ctx, ContextOut: &ctxOut}
	verdict, err := prog.Run(opts)
	if err != nil {
		k.Fatalf("%s: %v", prog, err)
	}
	return verdict, opts.DataOut, binary.NativeEndian.Uint32(ctxOut[markOff:])
}

// check runs the program on a frame that it leaves as it is.
func (k *kit) check(prog *ebpf.Program, frame []byte, verdict uint32, reason string) {
	k.Helper()
	k.expect(counts{reason: 1}, func() {
		k.Helper()
		got, out, _ := k.run(prog, input{frame: frame})
		if got != verdict {
			k.Errorf("verdict %d, want %d", int32(got), int32(verdict))
		}
		if !bytes.Equal(out, frame) {
			k.Errorf("frame became\n% x, want\n% x", out, frame)
		}
	})
}

// events takes what is in the ring.
func (k *kit) events() (evs []any) {
	k.Helper()
	k.rd.SetDeadline(time.Now())
	for {
		rec, err := k.rd.Read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return evs
		}
		if err != nil {
			k.Fatal(err)
		}
		evs = append(evs, k.event(rec.RawSample))
	}
}

func (k *kit) event(raw []byte) any {
	k.Helper()
	if binary.NativeEndian.Uint32(raw) != uint32(bpf.LockstepLsEvTypeLS_EV_REC) {
		var ev bpf.LockstepLsEv
		if copy(structBytes(&ev), raw) != len(raw) || len(raw) != int(unsafe.Sizeof(ev)) {
			k.Fatalf("event of %d bytes", len(raw))
		}
		return &ev
	}
	var ev bpf.LockstepLsEvRec
	copy(structBytes(&ev), raw)
	want := int(unsafe.Offsetof(ev.Rec)) + recBase
	if ev.Rec.Nsum > 0 {
		want = int(unsafe.Sizeof(ev))
	}
	if len(raw) != want {
		k.Fatalf("record event of %d bytes with %d boundaries", len(raw), ev.Rec.Nsum)
	}
	clear(ev.Rec.Bound[ev.Rec.Nsum:])
	return &ev
}

// one takes the only event there is.
func one[T any](k *kit) T {
	k.Helper()
	evs := k.events()
	if len(evs) != 1 {
		k.Fatalf("%d events, want 1", len(evs))
	}
	ev, ok := evs[0].(T)
	if !ok {
		k.Fatalf("event is a %T", evs[0])
	}
	return ev
}

func (k *kit) none() {
	k.Helper()
	if evs := k.events(); len(evs) != 0 {
		k.Errorf("unexpected event %+v", evs[0])
	}
}

// slot returns the frame in a slot, which must be READY, and frees it.
func (k *kit) slot(n uint32) []byte {
	k.Helper()
	ready := uint32(bpf.LockstepLsSlotStateLS_SLOT_READY)
	if n&slotGSO != 0 {
		var s bpf.LockstepLsGslot
		if err := k.LsGslots.Lookup(n&^slotGSO, &s); err != nil || s.State != ready {
			k.Fatalf("GSO slot %d: %v, state %d", n&^slotGSO, err, s.State)
		}
		frame := bytes.Clone(s.Data[:s.Len])
		s.State = 0
		if err := k.LsGslots.Put(n&^slotGSO, &s); err != nil {
			k.Fatal(err)
		}
		return frame
	}
	var s bpf.LockstepLsSlot
	if err := k.LsSlots.Lookup(n, &s); err != nil || s.State != ready {
		k.Fatalf("slot %d: %v, state %d", n, err, s.State)
	}
	frame := bytes.Clone(s.Data[:s.Len])
	s.State = 0
	if err := k.LsSlots.Put(n, &s); err != nil {
		k.Fatal(err)
	}
	return frame
}

// freeSlots frees all small slots.
func freeSlots(k *kit) {
	k.Helper()
	for i := range k.LsSlots.MaxEntries() {
		if err := k.LsSlots.Put(i, &bpf.LockstepLsSlot{}); err != nil {
			k.Fatal(err)
		}
	}
}

// used counts the slots that are not free, of both sizes.
func (k *kit) used() (n int) {
	k.Helper()
	for i := range uint32(nslots) {
		var s bpf.LockstepLsSlot
		if err := k.LsSlots.Lookup(i, &s); err != nil {
			k.Fatal(err)
		}
		if s.State != 0 {
			n++
		}
	}
	for i := range uint32(ngslots) {
		var s bpf.LockstepLsGslot
		if err := k.LsGslots.Lookup(i, &s); err != nil {
			k.Fatal(err)
		}
		if s.State != 0 {
			n++
		}
	}
	return n
}

func structBytes[T any](p *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(p)), unsafe.Sizeof(*p))
}

func (k *kit) sum(pos uint32, b []byte) [2]uint64 { return k.digest.Sum(pos, b) }

// sign puts the tag on r and returns its bytes on the wire.
func sign(r *bpf.LockstepLsRec, key [2]uint64) []byte {
	r.Len = uint16(recBase + int(r.Nsum)*16)
	b := structBytes(r)[:r.Len]
	r.Tag = siphash.Hash(key[0], key[1], b[8:])
	return b
}

// record returns the frame that a program must make of frame, whose TCP header
// is at l4, to carry want. Stream and number are taken from out, the stream's numbers
// having to rise one by one.
func (k *kit) record(want *bpf.LockstepLsRec, out, frame []byte, off int) []byte {
	k.Helper()
	want.Version, want.KeyGen, want.Epoch = abiVersion, keyGen, epoch
	if len(out) >= off+recBase && bytes.HasPrefix(out[12:], []byte{0x88, 0xb5}) {
		got := (*bpf.LockstepLsRec)(unsafe.Pointer(&bytes.Clone(append(out[off:len(out):len(out)], make([]byte, 2048)...))[0]))
		want.Stream, want.StreamNo = got.Stream, got.StreamNo
		if got.StreamNo != k.streams[got.Stream]+1 {
			k.Errorf("stream %d: number %d after %d", got.Stream, got.StreamNo, k.streams[got.Stream])
		}
		k.streams[got.Stream] = got.StreamNo
	}
	return peerFrame(frame, off, sign(want, k.sipTx), peerMAC, ownMAC)
}

// peerFrame makes frame a peer frame with rec at off.
func peerFrame(frame []byte, off int, rec []byte, dst, src [6]byte) []byte {
	b := bytes.Clone(frame)
	b = append(b, make([]byte, off+len(rec))...)[:off+len(rec)]
	copy(b, dst[:])
	copy(b[6:], src[:])
	binary.BigEndian.PutUint16(b[12:], uint16(bpf.LockstepLsConstLS_ETHERTYPE))
	binary.LittleEndian.PutUint16(b[14:], uint16(bpf.LockstepLsConstLS_MAGIC))
	binary.LittleEndian.PutUint16(b[16:], uint16(off))
	copy(b[off:], rec)
	return b
}

// number gives r the next number of the other host's stream.
func (k *kit) number(r *bpf.LockstepLsRec, stream uint16) *bpf.LockstepLsRec {
	k.sent[stream]++
	r.Stream, r.StreamNo = stream, k.sent[stream]
	return r
}

// fromPeer is a peer frame as the other host's user space sends it: nobody asks for
// those it left out.
func (k *kit) fromPeer(r *bpf.LockstepLsRec) []byte { return k.wire(k.number(r, userStream)) }

// wire is the peer frame of r, signed as it is by the other host.
func (k *kit) wire(r *bpf.LockstepLsRec) []byte {
	return peerFrame(make([]byte, 54), 54, sign(r, k.sipRx), ownMAC, peerMAC)
}
