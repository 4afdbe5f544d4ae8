// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/loader/core"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Verdicts as PROG_TEST_RUN returns them.
const (
	next     = math.MaxUint32
	drop     = 2
	redirect = 7
)

const (
	markRel  = 0x1a2b3c4d
	markIn   = 0x5e6f7081
	markPark = 0x51607283

	// As few slots as a search looks at before it goes on at random.
	duelSlots, duelLarge = 16, 8
	duelConns            = 3
)

// outputs are the frames that one side gave out.
type outputs struct{ wire, guest, peer [][]byte }

// programs are a role's real programs, fed by PROG_TEST_RUN, with their maps.
type programs struct {
	*testing.T
	bpf.LockstepObjects
	ring   *ringbuf.Reader
	far    int // packet socket where clones for the peer come out
	counts []uint64
	out    outputs
	slots  core.Slots

	mptcp     bool
	mutation  bpf.LockstepLsMutation
	ringBytes int
}

// loadPrograms loads them into a namespace of the test's own, on one CPU.
func loadPrograms(t *testing.T, mptcp bool, mutation bpf.LockstepLsMutation, ring int) *programs {
	t.Helper()
	lt.NewNetns(t)
	one := new(unix.CPUSet)
	one.Set(0)
	must(t, unix.SchedSetaffinity(0, one))
	p := &programs{T: t, mptcp: mptcp, mutation: mutation, ringBytes: ring}
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "lspeer", MTU: 9000}, PeerName: "lsfar"}))
	index := make(map[string]int)
	for _, name := range []string{"lo", "lspeer", "lsfar"} {
		dev, err := netlink.LinkByName(name)
		must(t, err)
		must(t, netlink.LinkSetMTU(dev, 9000))
		must(t, netlink.LinkSetUp(dev))
		index[name] = dev.Attrs().Index
	}
	const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8
	var err error
	p.far, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, all)
	must(t, err)
	t.Cleanup(func() { unix.Close(p.far) })
	must(t, unix.SetsockoptInt(p.far, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1))
	must(t, unix.SetsockoptInt(p.far, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1))
	must(t, unix.Bind(p.far, &unix.SockaddrLinklayer{Protocol: all, Ifindex: index["lsfar"]}))

	spec, err := bpf.LoadLockstep()
	must(t, err)
	cpus := uint32(ebpf.MustPossibleCPU())
	for name, n := range map[string]uint32{
		"ls_slots": duelSlots, "ls_gslots": duelLarge, "ls_conn": duelConns, "ls_fast": duelConns, "ls_edge": duelConns, "ls_ring": uint32(ring),
		"ls_lane": cpus, "ls_sent": cpus * uint32(keptMax),
	} {
		spec.Maps[name].MaxEntries = n
	}
	for name, v := range map[string]uint32{
		"ls_tap": uint32(index["lo"]), "ls_peer": uint32(index["lspeer"]), "ls_mark_rel": markRel, "ls_mark_in": markIn, "ls_mark_park": markPark,
		"ls_nslots": duelSlots, "ls_ngslots": duelLarge, "ls_nrules": uint32(len(duelRules)), "ls_mptcp": map[bool]uint32{true: 1}[mptcp], "ls_mutate": uint32(mutation),
	} {
		must(t, spec.Variables[name].Set(v))
	}
	must(t, spec.LoadAndAssign(&p.LockstepObjects, nil))
	t.Cleanup(func() { p.LockstepObjects.Close() })
	for i := range duelRules {
		must(t, p.LsRules.Put(uint32(i), &duelRules[i]))
	}
	p.ring, err = ringbuf.NewReader(p.LsRing)
	must(t, err)
	t.Cleanup(func() { p.ring.Close() })
	for _, s := range []struct {
		m   *ebpf.Map
		mem *[]byte
	}{{p.LsSlots, &p.slots.Small}, {p.LsGslots, &p.slots.Large}} {
		size := int(s.m.MaxEntries() * s.m.ValueSize())
		*s.mem, err = unix.Mmap(s.m.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		must(t, err)
		t.Cleanup(func() { unix.Munmap(*s.mem) })
	}
	p.counts = p.counters()
	return p
}

var duelRules = []bpf.LockstepLsRule{{Proto: 17, Gport: 123}, {Proto: 17, Rport: 5353}}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%+v", err)
	}
}

// run gives a frame to a program.
func (p *programs) run(prog *ebpf.Program, b []byte, gso uint16, m uint32) (verdict uint32, out []byte, markOut uint32) {
	p.Helper()
	const markAt, gsoAt = 8, 176 // in struct __sk_buff
	var ctx, ctxOut [192]byte
	binary.NativeEndian.PutUint32(ctx[markAt:], m)
	binary.NativeEndian.PutUint32(ctx[gsoAt:], uint32(gso))
	opts := &ebpf.RunOptions{Data: b, DataOut: make([]byte, 8192), Context: &ctx, ContextOut: &ctxOut}
	verdict, err := prog.Run(opts)
	if err != nil {
		p.Fatalf("%s: %v\n% x", prog, err, b)
	}
	return verdict, opts.DataOut, binary.NativeEndian.Uint32(ctxOut[markAt:])
}

var marks = map[mark]uint32{unmarked: 0, released: markRel, mirrored: markIn, parked: markPark}

// The same ways as the machine's, with what the kernel does after a verdict.

func (p *programs) fromGuest(primary bool, b []byte, gso uint16, from mark) {
	prog := p.LsSecOut
	if primary {
		prog = p.LsPriOut
	}
	switch verdict, out, m := p.run(prog, b, gso, marks[from]); verdict {
	case next:
		if m != 0 {
			p.Errorf("a frame leaves with mark %#x", m)
		}
		if gso == 0 || !segment(out, int(gso), func(s []byte) { p.out.wire = append(p.out.wire, s) }) {
			p.out.wire = append(p.out.wire, out)
		}
	case redirect:
		p.out.peer = append(p.out.peer, out)
	case drop:
	default:
		p.Fatalf("verdict %d", int32(verdict))
	}
}

func (p *programs) toGuest(primary bool, b []byte, gso uint16, from mark) {
	prog := p.LsSecGate
	if primary {
		prog = p.LsMirror
	}
	verdict, out, m := p.run(prog, b, gso, marks[from])
	if primary && from == unmarked {
		p.clones()
	}
	switch verdict {
	case next:
		if m != 0 {
			p.Errorf("a frame for the guest has mark %#x", m)
		}
		p.out.guest = append(p.out.guest, out)
	case redirect:
		if m != markRel {
			p.Fatalf("redirected with mark %#x", m)
		}
		p.fromGuest(primary, out, gso, released)
	case drop:
	default:
		p.Fatalf("verdict %d", int32(verdict))
	}
}

func (p *programs) fromPeer(primary bool, b []byte) {
	prog := p.LsSecIn
	if primary {
		prog = p.LsDigestRx
	}
	verdict, out, m := p.run(prog, b, 0, 0)
	if !primary {
		p.clones()
	}
	switch {
	case verdict == drop:
	case verdict != redirect:
		p.Fatalf("verdict %d", int32(verdict))
	case m == markIn:
		p.toGuest(primary, out, 0, mirrored)
	default:
		p.out.peer = append(p.out.peer, out)
	}
}

// clones takes what came out at the far end of the peer link.
func (p *programs) clones() {
	p.Helper()
	want := uint64(0)
	now := p.counters()
	for _, why := range []bpf.LockstepLsReason{bpf.LockstepLsReasonLS_R_mirrored, bpf.LockstepLsReasonLS_R_resent} {
		want += now[why] - p.counts[why]
	}
	want -= uint64(len(p.out.peer))
	buf, oob := make([]byte, 1<<16), make([]byte, 256)
	for deadline := time.Now().Add(5 * time.Second); int64(want) > 0; {
		n, noob, _, _, err := unix.Recvmsg(p.far, buf, oob, 0)
		if errors.Is(err, unix.EAGAIN) && time.Now().Before(deadline) {
			continue
		}
		must(p.T, err)
		p.out.peer = append(p.out.peer, lt.WithTag(slices.Clone(buf[:n]), oob[:noob]))
		want--
	}
}

func (p *programs) counters() []uint64 {
	p.Helper()
	counts := make([]uint64, bpf.LockstepLsReasonLS_R_MAX)
	reasons, perCPU := make([]uint32, len(counts)), make([]bpf.LockstepLsCount, len(counts)*ebpf.MustPossibleCPU())
	var cursor ebpf.MapBatchCursor
	if _, err := p.LsStats.BatchLookup(&cursor, reasons, perCPU, nil); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		p.Fatal(err)
	}
	for i, why := range reasons {
		for _, c := range perCPU[i*ebpf.MustPossibleCPU():][:ebpf.MustPossibleCPU()] {
			counts[why] += c.Packets
		}
	}
	return counts
}

// moved are the counters that moved since it was asked last.
func (p *programs) moved() (names []string) {
	now := p.counters()
	for i := range now {
		for n := p.counts[i]; n < now[i]; n++ {
			names = append(names, bpf.ReasonName(i))
		}
	}
	p.counts = now
	return names
}

// events takes what is in the ring.
func (p *programs) events() (raw [][]byte) {
	p.Helper()
	p.ring.SetDeadline(time.Unix(1, 0))
	for {
		r, err := p.ring.Read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return raw
		}
		must(p.T, err)
		raw = append(raw, r.RawSample)
	}
}

// forget empties every table, window and slot, and begins new streams.
func (p *programs) forget() {
	p.Helper()
	p.events()
	for _, m := range []*ebpf.Map{p.LsConn, p.LsHalf, p.LsInherited, p.LsEdge, p.LsCli} {
		for _, key := range keysOf(p.T, m) {
			must(p.T, m.Delete(&key))
		}
	}
	must(p.T, p.LsLane.Put(uint32(0), &bpf.LockstepLsTxStream{}))
	for _, stream := range []uint32{0, 1, 2, uint32(streamMax)} {
		must(p.T, p.LsWin.Put(stream, make([]byte, p.LsWin.ValueSize())))
	}
	for i := range uint32(64) {
		must(p.T, p.LsSent.Put(i, make([]byte, p.LsSent.ValueSize())))
	}
	p.slots.FreeAll()
	scratch := make([][]byte, ebpf.MustPossibleCPU()) // cursors
	for i := range scratch {
		scratch[i] = make([]byte, p.LsScratch.ValueSize())
	}
	must(p.T, p.LsScratch.Put(uint32(0), scratch))
	p.moved()
}

func keysOf(t testing.TB, m *ebpf.Map) (keys []bpf.LockstepLsTuple) {
	t.Helper()
	var key bpf.LockstepLsTuple
	var val []byte
	it := m.Iterate()
	for it.Next(&key, &val) {
		keys = append(keys, key)
	}
	must(t, it.Err())
	return keys
}

// frameOf is the frame in a slot.
func frameOf(s core.Slots, slot uint32) []byte {
	mem, size := s.Small, core.SlotSize
	if slot&slotLarge != 0 {
		mem, size, slot = s.Large, core.LargeSize, slot&^slotLarge
	}
	e := mem[int(slot)*size:][:size]
	if binary.LittleEndian.Uint32(e) != slotReady {
		return []byte("not ready")
	}
	return bytes.Clone(e[slotData:][:binary.LittleEndian.Uint32(e[4:])])
}

func freeSlot(s core.Slots, slot uint32) {
	mem, size := s.Small, core.SlotSize
	if slot&slotLarge != 0 {
		mem, size, slot = s.Large, core.LargeSize, slot&^slotLarge
	}
	binary.LittleEndian.PutUint32(mem[int(slot)*size:], slotFree)
}

var duelMAC = net.HardwareAddr{2, 0x50, 0, 0, 0, 2}
