// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// segmentAck is what every segment acknowledges.
const segmentAck = 0x11223344

// segment is a frame of the guest with right checksums.
func segment(v6 bool, tci uint16, seq uint32, flags compare.Flags, opts, payload []byte) []byte {
	e := compare.Effect{Seq: seq, Ack: segmentAck, Win: 500, Flags: flags, OptLen: uint8(len(opts))}
	copy(e.Opts[:], opts)
	out, ok := core.BuildHeader(newHead(), l2l3(v6, 0), []byte{0x30, 0x39, 0, 80}, &e, core.EthVLAN, tci, len(payload), 0)
	if !ok {
		panic("a frame of this test cannot be built")
	}
	f := append(bytes.Clone(out[core.VnetLen:]), payload...)
	complete(f, int(binary.LittleEndian.Uint16(out[6:])), core.TCPCsum)
	return f
}

func randomBytes(n int) []byte {
	r, b := rand.NewChaCha8([32]byte{2}), make([]byte, n)
	_, _ = r.Read(b) // never fails
	return b
}

// release is the effect that lets out what was held, unchanged.
func release(s compare.Segment) compare.Effect {
	e := compare.Effect{
		Op: compare.OpSend, Tuple: s.Tuple, Slot: s.Slot, Free: true, To: s.Len,
		Seq: s.Seq, Ack: s.Ack, Win: s.Win, Flags: s.Flags, OptLen: uint8(len(s.Opts)),
	}
	copy(e.Opts[:], s.Opts)
	return e
}

func slotState(n *NIC, s compare.Slot) bpf.LockstepLsSlotState {
	return bpf.LockstepLsSlotState(binary.NativeEndian.Uint32(n.frames.Element(s)))
}

func TestHoldAndRelease(t *testing.T) {
	h := newHosts(t)
	guest, client := newWire(t, "guestP"), newWire(t, "client")
	digest := h.at[h.p].Digest
	ts := []byte{1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9}
	for _, c := range []struct {
		name  string
		frame []byte
		tag   int // bytes
		opts  []byte
		pay   []byte
	}{
		{name: "v4", frame: segment(false, 0, 1000, compare.ACK|compare.PSH, ts, randomBytes(999)), opts: ts, pay: randomBytes(999)},
		{name: "v6", frame: segment(true, 0, 1<<32-5, compare.ACK, nil, randomBytes(1400)), pay: randomBytes(1400)},
		{name: "tagged", frame: segment(false, 0x6005, 4095, compare.ACK|compare.FIN, ts, randomBytes(8)), opts: ts, pay: randomBytes(8)},
	} {
		guest.send(c.frame)
		s := event(t, h.p, compare.EvPVM)
		if s.Slot == compare.NoSlot || slotState(h.p, s.Slot) != bpf.LockstepLsSlotStateLS_SLOT_READY {
			t.Fatalf("%s: not held: %+v", c.name, s)
		}
		if !bytes.Equal(s.Payload, c.pay) || int(s.Len) != len(c.pay) || !bytes.Equal(s.Opts, c.opts) {
			t.Errorf("%s: payload of %d bytes, options % x", c.name, len(s.Payload), s.Opts)
		}
		if want := digest.Sum(s.PayloadStart(), c.pay); s.Sum != want {
			t.Errorf("%s: digest %v, want %v", c.name, s.Sum, want)
		}
		apply(t, h.p, release(s))
		if got := client.recv(); !bytes.Equal(got, c.frame) {
			t.Errorf("%s: released\n% x, was\n% x", c.name, got, c.frame)
		}
		if slotState(h.p, s.Slot) != bpf.LockstepLsSlotStateLS_SLOT_FREE || h.p.frames.Len() != 0 {
			t.Errorf("%s: slot is not free after its release", c.name)
		}
	}
	counts(t, h.p, "held", 3)
	counts(t, h.p, "released", 3)
	counts(t, h.p, "released_out", 3)
}

// Two frames out of one held one, with the numbers of the effects and not those
// of the frame.
func TestReleaseInParts(t *testing.T) {
	h := newHosts(t)
	guest, client := newWire(t, "guestP"), newWire(t, "client")
	pay := randomBytes(1000)
	guest.send(segment(false, 0, 5000, compare.ACK|compare.PSH, nil, pay))
	s := event(t, h.p, compare.EvPVM)
	first, second := release(s), release(s)
	first.Free, first.To, first.Win, first.Flags = false, 300, 77, compare.ACK
	second.Seq, second.From = s.Seq+300, 300
	apply(t, h.p, first, second)
	want := segment(false, 0, 5000, compare.ACK, nil, pay[:300])
	binary.BigEndian.PutUint16(want[48:], 77)
	clear(want[50:52])
	binary.BigEndian.PutUint16(want[50:], ^onesSum(pseudoHeader(want[14:34], len(want)-34), want[34:]))
	if got := client.recv(); !bytes.Equal(got, want) {
		t.Errorf("released\n% x, want\n% x", got, want)
	}
	if got, want := client.recv(), segment(false, 0, 5300, compare.ACK|compare.PSH, nil, pay[300:]); !bytes.Equal(got, want) {
		t.Errorf("released\n% x, want\n% x", got, want)
	}
}

// An ACK that takes no slot leaves by its template.
func TestReleaseOfPureAck(t *testing.T) {
	h := newHosts(t)
	guest, client := newWire(t, "guestP"), newWire(t, "client")
	frame := segment(true, 0, 5000, compare.ACK, nil, nil)
	guest.send(frame)
	s := event(t, h.p, compare.EvPVM)
	if s.Slot != compare.NoSlot || !bytes.Equal(s.Header, frame[:54]) {
		t.Fatalf("ACK reported as %+v", s)
	}
	e := release(s)
	e.HdrLen = uint8(copy(e.Header[:], s.Header))
	apply(t, h.p, e)
	if got := client.recv(); !bytes.Equal(got, frame) {
		t.Errorf("released\n% x, was\n% x", got, frame)
	}
}

// gsoSegment is the segment size of the GSO frames here.
const gsoSegment = 1400

// sendGSO sends a frame as a guest does that leaves segments and checksum to the device.
func sendGSO(t testing.TB, name string, tci uint16, pay []byte) {
	t.Helper()
	c, err := newPacketConn(linkOf(t, name).Attrs().Index, 0)
	check(t, err)
	defer c.close()
	e := compare.Effect{Seq: 1 << 20, Ack: 1, Win: 2, Flags: compare.ACK}
	head, ok := core.BuildHeader(newHead(), l2l3(false, 0), []byte{0, 80, 0, 81}, &e, core.EthVLAN, tci, len(pay), gsoSegment)
	if !ok {
		t.Fatal("refused")
	}
	c.Queue(head, pay)
	_, err = c.flush()
	check(t, err)
}

// wantSegments receives pay in segments with right checksums.
func wantSegments(t testing.TB, w *wire, tci uint16, pay []byte) {
	t.Helper()
	l4 := core.EthLen + 20
	if tci != 0 {
		l4 += 4
	}
	for rest := pay; len(rest) > 0; {
		f := w.recv()
		n := min(gsoSegment, len(rest))
		if len(f) != l4+core.TCPLen+n || !bytes.Equal(f[l4+core.TCPLen:], rest[:n]) {
			t.Fatalf("tag %d: segment of %d bytes with %d to go", tci, len(f), len(rest))
		}
		if onesSum(pseudoHeader(f[l4-20:l4], len(f)-l4), f[l4:]) != 0xffff || onesSum(f[l4-20:l4]) != 0xffff {
			t.Errorf("tag %d: wrong checksum with %d to go", tci, len(rest))
		}
		rest = rest[n:]
	}
}

func TestReleaseOfGSO(t *testing.T) {
	h := newHosts(t)
	client := newWire(t, "client")
	for _, tci := range []uint16{0, 5} {
		pay := randomBytes(20000)
		sendGSO(t, "guestP", tci, pay)
		s := event(t, h.p, compare.EvPVM)
		if !bytes.Equal(s.Payload, pay) || s.GSO != gsoSegment {
			t.Fatalf("held %d bytes, GSO size %d, want %d, %d", len(s.Payload), s.GSO, len(pay), gsoSegment)
		}
		apply(t, h.p, release(s))
		wantSegments(t, client, tci, pay)
	}
}

func TestFree(t *testing.T) {
	h := newHosts(t)
	guest := newWire(t, "guestP")
	frame := segment(false, 0, 1, compare.ACK, nil, randomBytes(100))
	var held []compare.Slot
	for range 6 { // of 8: the others are for datagrams
		guest.send(frame)
		held = append(held, event(t, h.p, compare.EvPVM).Slot)
	}
	guest.send(frame)
	counts(t, h.p, "no_slot", 1)
	if s := event(t, h.p, compare.EvPVM); s.Slot != compare.NoSlot || s.Payload != nil || s.Len != 100 {
		t.Errorf("of a frame without a slot came %+v", s)
	}
	apply(t, h.p, compare.Effect{Op: compare.OpFree, Slot: held[3]})
	if slotState(h.p, held[3]) != bpf.LockstepLsSlotStateLS_SLOT_FREE || h.p.frames.Len() != 5 {
		t.Errorf("slot %d is not free", held[3])
	}
	guest.send(frame)
	if s := event(t, h.p, compare.EvPVM); s.Slot != held[3] {
		t.Errorf("held in slot %d, %d is the only free one", s.Slot, held[3])
	}

	// A release that cannot be built is counted, and its slot free all the same.
	e := compare.Effect{Op: compare.OpSend, Slot: held[0], Free: true, From: 1, To: 101}
	check(t, h.p.Apply([]compare.Effect{e}))
	if slotState(h.p, held[0]) != bpf.LockstepLsSlotStateLS_SLOT_FREE {
		t.Error("the slot of a frame that could not be sent is not free")
	}
	counts(t, h.p, "release_lost", 1)
}

// After the output lease nothing leaves (R20).
func TestReleaseMuted(t *testing.T) {
	h := newHosts(t)
	guest := newWire(t, "guestP")
	guest.send(segment(false, 0, 1, compare.ACK, nil, randomBytes(100)))
	s := event(t, h.p, compare.EvPVM)
	check(t, h.p.SetLeaseUntil(h.p.Now()))
	apply(t, h.p, release(s))
	counts(t, h.p, "muted", 1)
	counts(t, h.p, "released_out", 0)
}

// What the secondary parked reaches its guest as it came, in order.
func TestParkAndDeliver(t *testing.T) {
	h := newHosts(t)
	client, guestS := newWire(t, "client"), newWire(t, "guestS")
	check(t, h.s.SetMode(datapath.ModePark))
	frames := [][]byte{
		segment(false, 0, 1, compare.ACK, nil, randomBytes(100)),
		segment(true, 7, 2, compare.ACK, nil, randomBytes(1400)),
	}
	var effs []compare.Effect
	for _, f := range frames {
		client.send(f)
		effs = append(effs, compare.Effect{Op: compare.OpDeliver, Slot: event(t, h.s, compare.EvPark).Slot})
	}
	apply(t, h.s, effs...)
	for _, f := range frames {
		if got := guestS.recv(); !bytes.Equal(got, f) {
			t.Errorf("delivered\n% x, was\n% x", got, f)
		}
	}
	for _, e := range effs {
		if slotState(h.s, e.Slot) != bpf.LockstepLsSlotStateLS_SLOT_FREE {
			t.Errorf("slot %d is not free after delivery", e.Slot)
		}
	}
	counts(t, h.s, "let_in", 2)
}

// A parked frame whose checksum and segments were left to the device.
func TestParkAndDeliverGSO(t *testing.T) {
	h := newHosts(t)
	guestS := newWire(t, "guestS")
	noOffload(t, "tapS")
	check(t, h.s.SetMode(datapath.ModePark))
	for _, tci := range []uint16{0, 5} {
		pay := randomBytes(20000)
		sendGSO(t, "client", tci, pay)
		apply(t, h.s, compare.Effect{Op: compare.OpDeliver, Slot: event(t, h.s, compare.EvPark).Slot})
		wantSegments(t, guestS, tci, pay)
	}
}
