// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader/core"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// datagram is a frame with a UDP datagram of payload.
func datagram(v6 bool, payload []byte) []byte {
	f := l2l3(v6, 0)
	udp := binary.BigEndian.AppendUint16([]byte{0x30, 0x39, 0, 53}, uint16(8+len(payload)))
	udp = append(append(udp, 0, 0), payload...)
	ip := f[core.EthLen:]
	if v6 {
		ip[6] = core.ProtoUDP
		binary.BigEndian.PutUint16(ip[4:], uint16(len(udp)))
		return append(f, udp...)
	}
	ip[9] = core.ProtoUDP
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(udp)))
	binary.BigEndian.PutUint16(ip[10:], 0)
	binary.BigEndian.PutUint16(ip[10:], ^onesSum(ip))
	return append(f, udp...)
}

// A datagram is held, reported with its digest and its flow, and leaves as it came;
// the SVM's arrives as a record.
func TestDatagram(t *testing.T) {
	h := newHosts(t)
	pvm, svm, client := newWire(t, "guestP"), newWire(t, "guestS"), newWire(t, "client")
	for _, v6 := range []bool{false, true} {
		pay := randomBytes(77)
		frame := datagram(v6, pay)
		pvm.send(frame)
		s := event(t, h.p, compare.EvPVM)
		if !s.Datagram || s.Proto != core.ProtoUDP || s.GuestPort != 12345 || s.RemotePort != 53 || s.Seq != 0 || s.Len != 77 {
			t.Errorf("v6 %v: held %+v", v6, s)
		}
		svm.send(frame)
		r := event(t, h.p, compare.EvSVM)
		if !r.Datagram || r.Tuple != s.Tuple || r.Sum != s.Sum || r.Len != s.Len || r.Seq != s.Seq || r.Epoch != 40 {
			t.Errorf("v6 %v: record %+v of %+v", v6, r, s)
		}
		apply(t, h.p, compare.Effect{Op: compare.OpForward, Slot: s.Slot})
		if got := client.recv(); !bytes.Equal(got, frame) {
			t.Errorf("v6 %v: released % x, was % x", v6, got, frame)
		}
		if slotState(h.p, s.Slot) != bpf.LockstepLsSlotStateLS_SLOT_FREE {
			t.Error("its slot is not free")
		}
	}
}

// The SVM's neighbour request reaches P, which asks in the guest's name.
func TestNeighbourRequest(t *testing.T) {
	h := newHosts(t)
	svm, client := newWire(t, "guestS"), newWire(t, "client")
	for _, v6 := range []bool{false, true} {
		t4 := compare.Tuple{Guest: addr(10, 0, 0, 1), Remote: addr(10, 0, 0, 9)}
		if v6 {
			t4.Guest, t4.Remote = [16]byte{0xfd, 15: 1}, [16]byte{0xfd, 15: 9}
		}
		e := compare.Effect{Op: compare.OpNeigh, Tuple: t4, OptLen: 6}
		copy(e.Opts[:], macA)
		frame := core.NeighRequest(make([]byte, 0, core.MaxHeader), &e)[core.VnetLen:]
		svm.send(frame)
		s := event(t, h.p, compare.EvNeigh)
		if s.Guest != t4.Guest || s.Remote != t4.Remote || !bytes.Equal(s.Opts, macA) {
			t.Fatalf("v6 %v: came %+v", v6, s)
		}
		apply(t, h.p, e)
		if got := client.recv(); !bytes.Equal(got, frame) {
			t.Errorf("v6 %v: P asked % x, the SVM % x", v6, got, frame)
		}
		if ip := frame[core.EthLen:]; v6 && onesSum(append(bytes.Clone(ip[8:40]), 0, 0, 0, 32, 0, 0, 0, core.ProtoICMPv6), ip[40:]) != 0xffff {
			t.Error("wrong ICMPv6 checksum")
		}
	}
}

// The remote's newest ACK reaches the SVM again, without its payload, or the PVM, which
// alone it goes to then. With SACK blocks it is three of them, once the remote has got all
// that stands before. A probe has a byte that the guest has acknowledged in it.
func TestRepeatedACK(t *testing.T) {
	h := newHosts(t)
	client, svm, pvm := newWire(t, "client"), newWire(t, "guestS"), newWire(t, "guestP")
	ts := []byte{1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9}
	sack := append([]byte{1, 1, 5, 18}, bytes.Repeat([]byte{0, 0, 2, 0, 0, 0, 3, 0}, 2)...)
	unsacked := append(bytes.Clone(ts), 1, 1, 5, 10, 0, 0, 1, 0, 0, 0, 1, 9) // the remote's own block goes
	for _, tc := range []struct {
		name string
		v6   bool
		tci  uint16
		op   compare.Op
		came []byte // options
		sack []byte
		want []byte
	}{
		{"plain", false, 0, compare.OpRemirror, ts, nil, ts},
		{"tagged", false, 5, compare.OpRemirror, ts, nil, ts},
		{"to the SVM", false, 5, compare.OpRemirror, unsacked, sack, append(bytes.Clone(ts), sack...)},
		{"to the PVM", false, 0, compare.OpSACK, unsacked, sack, append(bytes.Clone(ts), sack...)},
		{"to the PVM, tagged", false, 5, compare.OpSACK, ts, sack, append(bytes.Clone(ts), sack...)},
		{"to the PVM, IPv6", true, 0, compare.OpSACK, ts, sack, append(bytes.Clone(ts), sack...)},
		{"without a timestamp", false, 7, compare.OpSACK, nil, sack, sack},
		{"a probe of the SVM", false, 5, compare.OpProbeSVM, unsacked, nil, unsacked},
		{"a probe of the PVM", false, 0, compare.OpProbePVM, ts, nil, ts},
		{"a probe of the PVM, IPv6", true, 0, compare.OpProbePVM, ts, nil, ts},
	} {
		t.Run(tc.name, func(t *testing.T) {
			to := svm
			if tc.op == compare.OpSACK || tc.op == compare.OpProbePVM {
				to = pvm
			}
			came := segment(tc.v6, tc.tci, 100, compare.ACK|compare.PSH, tc.came, randomBytes(50))
			client.send(came)
			svm.recv()
			pvm.recv()
			key := compare.Tuple{Guest: addr(10, 0, 0, 2), Remote: addr(10, 0, 0, 1), GuestPort: 80, RemotePort: 12345, VLAN: tc.tci, Proto: core.ProtoTCP}
			if tc.v6 {
				l3 := core.L3Offset(came)
				key.Guest, key.Remote = [16]byte(came[l3+24:]), [16]byte(came[l3+8:])
			}
			e := compare.Effect{Op: tc.op, Tuple: key}
			e.OptLen = uint8(copy(e.Opts[:], tc.sack))
			times := 1
			if tc.sack != nil {
				apply(t, h.p, e) // the remote has acknowledged something else than 0
				e.Seq, times = segmentAck, core.DupThresh
			}
			seq, payload := uint32(150), []byte(nil)
			if tc.op == compare.OpProbeSVM || tc.op == compare.OpProbePVM {
				seq, payload = 149, []byte{0}
				e.Seq = seq
			}
			apply(t, h.p, e)
			want := segment(tc.v6, tc.tci, seq, compare.ACK, tc.want, payload)
			checksum := len(want) - len(payload) - len(tc.want) - 4
			for range times {
				got := to.recv()
				if len(got) == len(want) { // its checksum is still partial here
					copy(got[checksum:], want[checksum:checksum+2])
				}
				if !bytes.Equal(got, want) {
					t.Errorf("got % x, want % x", got, want)
				}
			}
		})
	}
	// Nothing else came: none was mirrored, none before its time. Of a connection that
	// nothing is known of, nothing is sent.
	apply(t, h.p, compare.Effect{Op: compare.OpRemirror, Tuple: askTuple})
	last := segment(false, 9, 1, compare.ACK, nil, nil)
	client.send(last)
	for name, w := range map[string]*wire{"SVM": svm, "PVM": pvm} {
		if got := w.recv(); !bytes.Equal(got, last) {
			t.Errorf("the %s got % x beside", name, got)
		}
	}
	counts(t, h.p, "sacked", 4*core.DupThresh+2)
}

// Records that P has not are sent again when it asks for the newest: they come
// once, and those it has do not come again.
func TestQuery(t *testing.T) {
	h := newHosts(t)
	svm := newWire(t, "guestS")
	send := func(seq uint32) { svm.send(segment(false, 0, seq, compare.ACK, nil, []byte("x"))) }
	send(1)
	event(t, h.p, compare.EvSVM)
	check(t, h.p.SetMode(datapath.ModeShut)) // P receives nothing
	send(2)
	counts(t, h.s, "record_out", 2)
	counts(t, h.p, "shut", 1)
	check(t, h.p.SetMode(datapath.ModeHold))
	for range 3 {
		apply(t, h.p, compare.Effect{Op: compare.OpQuery})
	}
	if s := event(t, h.p, compare.EvSVM); s.Seq != 2 {
		t.Errorf("came %+v, want the record that was missed", s)
	}
	counts(t, h.p, "peer_again", 2)
	counts(t, h.p, "peer_replay", 0)
}

// A gap in the numbers brings what is missing, without user space.
func TestGap(t *testing.T) {
	lt.OneCPU(t) // S numbers the records of each CPU by themselves
	h := newHosts(t)
	svm := newWire(t, "guestS")
	send := func(seq uint32) { svm.send(segment(false, 0, seq, compare.ACK, nil, []byte("x"))) }
	send(1)
	event(t, h.p, compare.EvSVM)
	check(t, h.p.SetMode(datapath.ModeShut))
	for seq := range uint32(20) {
		send(2 + seq)
	}
	counts(t, h.p, "shut", 20)
	check(t, h.p.SetMode(datapath.ModeHold))
	send(22)
	counts(t, h.p, "record_in", 22)
	seen := make(map[uint32]bool)
	for len(seen) < 21 {
		evs, err := h.p.Poll(patience, nil)
		check(t, err)
		if len(evs) == 0 {
			t.Fatalf("records of %d segments came, want 21", len(seen))
		}
		for _, ev := range evs {
			if seen[ev.Seg.Seq] {
				t.Errorf("segment %d twice", ev.Seg.Seq)
			}
			seen[ev.Seg.Seq] = true
		}
	}
}

// R20: an echo extends P's lease to its own time plus T, whenever it comes, and
// a shut S gives none.
func TestEcho(t *testing.T) {
	h := newHosts(t)
	check(t, h.p.SetLeaseUntil(0))
	check(t, h.p.SetLeaseDuration(time.Hour))
	before := h.p.Now()
	check(t, h.p.RequestEcho())
	after := h.p.Now()
	counts(t, h.p, "echo_in", 1)
	if until := int64(h.p.conf.LeaseUntil) - int64(time.Hour); until < before || until > after {
		t.Errorf("allowed from %d, asked between %d and %d", until, before, after)
	}
	was := h.p.conf.LeaseUntil
	check(t, h.s.SetMode(datapath.ModeShut))
	check(t, h.p.RequestEcho())
	counts(t, h.s, "shut", 1)
	check(t, h.s.SetMode(datapath.ModePark))
	check(t, h.p.SetLeaseDuration(0)) // an older echo takes nothing back
	check(t, h.p.RequestEcho())
	counts(t, h.p, "echo_in", 2)
	if h.p.conf.LeaseUntil != was {
		t.Error("an echo that allows less took time back")
	}
}

func TestMark(t *testing.T) {
	h := newHosts(t)
	check(t, h.p.SetEpoch(41))
	check(t, h.p.MarkStop())
	evs, err := h.s.Poll(patience, nil)
	check(t, err)
	if len(evs) != 1 || evs[0].Kind != compare.EvMark || evs[0].Epoch != 41 {
		t.Errorf("events %+v", evs)
	}
	// Of the second attempt after one that failed. S stops later than P, and is two behind.
	check(t, h.p.SetEpoch(43))
	check(t, h.p.MarkStop())
	if evs, err = h.s.Poll(patience, nil); err != nil || len(evs) != 1 || evs[0].Kind != compare.EvMark || evs[0].Epoch != 43 {
		t.Errorf("events %+v, %v", evs, err)
	}
}

// XDP lets records by and nothing else, and goes with the pins.
func TestPeerXDP(t *testing.T) {
	devices(t)
	pins := mountBPFFS(t)
	h := &hosts{TB: t, pins: pins, dead: make(map[*NIC]bool)}
	o := options(pins, "a.lab", Primary)
	o.XDP = XDPOn
	n := h.open(o)
	if p := n.Programs(); p[len(p)-1] != (datapath.Program{Name: peerXDP, Device: "peerP", Attach: "xdp-native"}) {
		t.Errorf("programs %+v", p)
	}
	newWire(t, "peerS").send(datagram(false, randomBytes(10)))
	counts(t, n, "xdp_dropped", 1)
	counts(t, n, "peer_junk", 0)
	counts(t, n, "shut", 0)
	h.die(n)
	n = h.open(o) // in the dead one's place
	h.die(n)
	check(t, Unload(pins, o.VM, o.Node, false))
	l, err := link.AttachXDP(link.XDPOptions{Program: testXDP(t), Interface: linkOf(t, "peerP").Attrs().Index, Flags: link.XDPDriverMode})
	if err != nil {
		t.Fatalf("after unload the device is not free: %v", err)
	}
	check(t, l.Close())

	// S rewrites what comes, so it has none.
	o = options(pins, "b.lab", Secondary)
	o.XDP = XDPOn
	n = h.open(o)
	for _, p := range n.Programs() {
		if p.Name == peerXDP {
			t.Errorf("attached on the secondary: %+v", p)
		}
	}
	// Where the driver has none, auto goes on and on refuses.
	o = options(pins, "c.lab", Primary)
	o.Tap, o.PeerDevice, o.XDP = "up", "br", XDPAuto
	n = h.open(o)
	if p := n.Programs(); p[len(p)-1].Attach != "none (no native XDP)" {
		t.Errorf("programs %+v", p)
	}
	h.die(n)
	check(t, Unload(pins, o.VM, o.Node, false))
	o.XDP = XDPOn
	if n, err := Open(o); err == nil {
		h.die(n)
		t.Error("a bridge has no native XDP, and xdp: on was not refused")
	}
}

// testXDP is a program that lets everything by.
func testXDP(t testing.TB) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.XDP, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()},
	})
	check(t, err)
	t.Cleanup(func() { p.Close() })
	return p
}
