// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cilium/ebpf"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// wantEvent is the event of a frame from or to the guest.
func wantEvent(kind bpf.LockstepLsEvType, f flow, s seg, frame []byte) *bpf.LockstepLsEv {
	l4 := f.l4(s)
	ev := &bpf.LockstepLsEv{
		Type: uint32(kind), Slot: noSlot, T: f.tuple(), Seq: s.seq, Ack: s.ack, Paylen: uint32(len(s.payload)),
		Win: s.win, TcpFlags: s.flags, L3Off: 14, L4Off: uint16(l4), PayOff: uint16(l4 + 20 + len(s.opts)),
		FrameLen: uint32(len(frame)),
	}
	ev.HdrLen = ev.PayOff
	copy(ev.Hdr[:], frame[:ev.HdrLen])
	return ev
}

// same compares events, all but the time, which must be set.
func (k *kit) same(got, want *bpf.LockstepLsEv) {
	k.Helper()
	if got.At == 0 {
		k.Error("event without time")
	}
	want.At = got.At
	if want.Type == uint32(bpf.LockstepLsEvTypeLS_EV_PVM) && want.T.Proto == 17 && want.Frag == 0 {
		want.Number = core.Bucket(&want.T) + 1
	}
	if diff := cmp.Diff(want, got); diff != "" {
		k.Errorf("event (-want +got):\n%s", diff)
	}
}

func TestPriOutHold(t *testing.T) {
	k := newKit(t)
	k.setMode(hold)
	r := rand.New(rand.NewPCG(1, 2))
	ts := timestamps(1, 2)
	segs := map[string]seg{
		"data":         {seq: 1000, ack: 5, flags: ack | psh, win: 77, opts: ts, payload: randBytes(r, 1448)},
		"one byte":     {seq: 1001, ack: 5, flags: ack, payload: []byte{0xff}},
		"to the wrap":  {seq: math.MaxUint32 - 99, ack: 5, flags: ack, payload: randBytes(r, 100)},
		"over wrap":    {seq: math.MaxUint32 - 98, ack: 5, flags: ack, payload: randBytes(r, 1000)},
		"over a block": {seq: 4096*3 - 7, flags: ack, payload: randBytes(r, 600)},
		"fin":          {seq: 9, ack: 8, flags: fin | ack, opts: ts},
		"data fin":     {seq: 9, ack: 8, flags: fin | ack, payload: randBytes(r, 3)},
		"rst":          {seq: 9, flags: rst},
		"rst ack":      {seq: 0, ack: 4, flags: rst | ack},
		"syn rst":      {seq: 3, flags: syn | rst},
		"padded":       {seq: 9, flags: ack, payload: []byte{7}, padding: []byte("not payload")},
		"padded fin":   {seq: 9, flags: fin | ack, padding: []byte("xxxxxx")},
		"large":        {seq: 9, flags: ack, opts: ts, payload: randBytes(r, 3500)},
		"full slot":    {seq: 9, flags: ack, payload: randBytes(r, int(bpf.LockstepLsConstLS_SLOT_DATA)-74)},
	}
	for name, s := range segs {
		for family, f := range flows {
			t.Run(name+" "+family, func(t *testing.T) {
				k.TB = t
				frame := f.from(s)
				k.check(k.LsPriOut, frame, drop, "held")
				ev := one[*bpf.LockstepLsEv](k)
				want := wantEvent(bpf.LockstepLsEvTypeLS_EV_PVM, f, s, frame)
				pos := s.seq
				if s.flags&syn != 0 {
					pos++
				}
				want.Sum = k.sum(pos, s.payload)
				want.Slot = ev.Slot
				k.same(ev, want)
				if gso := ev.Slot&slotGSO != 0; gso != (len(frame) > int(bpf.LockstepLsConstLS_SLOT_DATA)) {
					t.Errorf("frame of %d bytes in slot %#x", len(frame), ev.Slot)
				}
				if got := k.slot(ev.Slot); !bytes.Equal(got, frame) {
					t.Errorf("slot holds\n% x, want\n% x", got, frame)
				}
			})
		}
	}
}

func TestPriOutPureAck(t *testing.T) {
	k := newKit(t)
	k.setMode(hold)
	for family, f := range flows {
		t.Run(family, func(t *testing.T) {
			k.TB = t
			s := seg{seq: 5, ack: 6, flags: ack, win: 7, opts: timestamps(8, 9), padding: []byte("pad")}
			frame := f.from(s)
			k.check(k.LsPriOut, frame, drop, "held_ack")
			k.same(one[*bpf.LockstepLsEv](k), wantEvent(bpf.LockstepLsEvTypeLS_EV_PVM, f, s, frame))
		})
	}
	k.TB = t
	if n := k.used(); n != 0 {
		t.Errorf("%d slots taken", n)
	}
}

func TestPriOutAnnounce(t *testing.T) {
	k := newKit(t)
	k.setMode(hold)
	mss := []byte{2, 4, 5, 0xb4}
	for family, f := range flows {
		for name, s := range map[string]seg{
			"active":      {seq: 100, flags: syn, win: 3, opts: append(mss, timestamps(8, 0)...)},
			"passive":     {seq: math.MaxUint32, ack: 12, flags: syn | ack, win: 3, opts: append(mss, timestamps(8, 9)...)},
			"no options":  {seq: 1, ack: 12, flags: syn | ack},
			"with data":   {seq: 1, flags: syn, payload: []byte("hello")},
			"all options": {seq: 1, flags: syn, opts: append(timestamps(1, 2), make([]byte, 28)...)},
			"padded":      {seq: 1, flags: syn, opts: mss, padding: bytes.Repeat([]byte{9}, 200)},
			"IP options":  {seq: 1, flags: syn, opts: mss, ipOpts: 40},
		} {
			if s.ipOpts > 0 && family == "IPv6" {
				continue
			}
			t.Run(name+" "+family, func(t *testing.T) {
				k.TB = t
				frame := f.from(s)
				var verdict uint32
				var out []byte
				k.expect(counts{"announced": 1}, func() { verdict, out, _ = k.run(k.LsPriOut, input{frame: frame}) })
				want := k.record(&bpf.LockstepLsRec{
					Type: uint8(bpf.LockstepLsRecTypeLS_REC_ANNOUNCE), Dir: uint8(bpf.LockstepLsDirLS_DIR_P2S),
					T: f.tuple(), Inc: s.seq, Seq: s.seq, End: s.end(), Ack: s.ack, Win: s.win, TcpFlags: s.flags,
					Optlen: uint8(len(s.opts)), Opts: opts40(s.opts),
				}, out, frame, f.l4(s)+20)
				if verdict != redirect || !bytes.Equal(out, want) {
					t.Errorf("verdict %d, frame\n% x, want\n% x", int32(verdict), out, want)
				}
				ev := one[*bpf.LockstepLsEv](k)
				wantEv := wantEvent(bpf.LockstepLsEvTypeLS_EV_PVM, f, s, frame)
				wantEv.Slot, wantEv.Sum = ev.Slot, k.sum(s.seq+1, s.payload)
				k.same(ev, wantEv)
				if got := k.slot(ev.Slot); !bytes.Equal(got, frame) {
					t.Errorf("slot holds\n% x, want\n% x", got, frame)
				}
			})
		}
	}
}

// pin keeps the test on one CPU: each has its own cursor in the slots.
func pin(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	var old, first unix.CPUSet
	if err := unix.SchedGetaffinity(0, &old); err != nil {
		t.Fatal(err)
	}
	for cpu := 0; first.Count() == 0; cpu++ {
		if old.IsSet(cpu) {
			first.Set(cpu)
		}
	}
	if err := unix.SchedSetaffinity(0, &first); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.SchedSetaffinity(0, &old); err != nil {
			t.Error(err)
			return
		}
		runtime.UnlockOSThread()
	})
}

func TestPriOutFull(t *testing.T) {
	f := flows["IPv4"]
	small := f.from(seg{flags: ack, payload: []byte("x")})
	large := f.from(seg{flags: ack, payload: make([]byte, 3000)})
	t.Run("slots", func(t *testing.T) {
		k := newKit(t)
		k.setMode(hold)
		pin(t)
		for range tcpSlots {
			k.check(k.LsPriOut, small, drop, "held")
		}
		k.check(k.LsPriOut, small, drop, "no_slot")
		k.check(k.LsPriOut, f.from(seg{flags: syn}), drop, "no_slot") // what is not held is not announced
		k.check(k.LsPriOut, f.from(seg{flags: ack}), drop, "held_ack")
		for range tcpGslots {
			k.check(k.LsPriOut, large, drop, "held")
		}
		k.check(k.LsPriOut, large, drop, "no_slot")
		lost := 0
		evs := k.events()
		for _, e := range evs {
			if ev := e.(*bpf.LockstepLsEv); ev.Slot == noSlot && (ev.Paylen > 0 || ev.TcpFlags&syn != 0) {
				lost++
			}
		}
		if len(evs) != tcpSlots+tcpGslots+4 || lost != 3 {
			t.Errorf("%d events, %d of segments without a slot", len(evs), lost)
		}
		if n := k.used(); n != tcpSlots+tcpGslots {
			t.Errorf("%d slots taken", n)
		}
		// One slot that is free among more than the search looks at is found soon.
		k.slot(17)
		for before := k.counters(); k.moved(before)["held"] == 0; {
			if k.run(k.LsPriOut, input{frame: small}); k.moved(before)["no_slot"] > 100 {
				t.Fatal("free slot not found")
			}
		}
		evs = k.events()
		if ev := evs[len(evs)-1].(*bpf.LockstepLsEv); ev.Slot != 17 {
			t.Errorf("slot %d, want 17", ev.Slot)
		}
	})
	t.Run("ring", func(t *testing.T) {
		k := newKit(t)
		k.setMode(hold)
		for k.counters()["no_ring"] == 0 {
			k.run(k.LsPriOut, input{frame: f.from(seg{flags: ack})})
		}
		k.check(k.LsPriOut, small, drop, "no_ring")
		k.check(k.LsPriOut, f.from(seg{flags: syn}), drop, "crowded")
		if n := k.used(); n != 0 {
			t.Errorf("%d slots taken", n)
		}
		k.events()
		k.check(k.LsPriOut, small, drop, "held")
	})
}

// linkFrames leave from the PVM uncompared; those named "no:" are datagrams.
func linkFrames() map[string][]byte {
	eth := func(proto uint16, body ...byte) []byte {
		return append(be.AppendUint16([]byte{2, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2}, proto), body...)
	}
	ip4 := func(proto byte, body ...byte) []byte {
		ip := append(make([]byte, 20), body...)
		ip[0], ip[9] = 0x45, proto
		be.PutUint16(ip[2:], uint16(len(ip)))
		be.PutUint16(ip[10:], ^onesSum(0, ip[:20]))
		return eth(0x800, ip...)
	}
	ip6 := func(nexthdr byte, body ...byte) []byte {
		ip := append(make([]byte, 40), body...)
		ip[0], ip[6] = 0x60, nexthdr
		be.PutUint16(ip[4:], uint16(len(body)))
		return eth(0x86dd, ip...)
	}
	frames := map[string][]byte{
		"ARP":  eth(0x806, make([]byte, 28)...),
		"RARP": eth(0x8035, make([]byte, 28)...),
		"LLDP": eth(0x88cc, 2, 7),
		"IGMP": ip4(2, make([]byte, 8)...),
		// router alert, then a version 2 report
		"MLDv2": ip6(0, 58, 0, 5, 2, 0, 0, 1, 0, 143, 0, 0, 0),

		"no: UDP":           ip4(17, make([]byte, 8)...),
		"no: ICMP":          ip4(1, 8, 0, 0, 0),
		"no: fragment":      fragment(flows["IPv4"].from(seg{flags: ack, payload: make([]byte, 32)}), 0x2000),
		"no: last fragment": fragment(flows["IPv4"].from(seg{flags: ack, payload: make([]byte, 32)}), 4),
		"no: UDPv6":         ip6(17, make([]byte, 8)...),
		"no: frag header":   ip6(44, append([]byte{6, 0, 0, 1, 0, 0, 0, 0}, make([]byte, 20)...)...),
		"no: LLC":           eth(38, make([]byte, 38)...),
		"no: peer frame":    eth(0x88b5, make([]byte, 38)...),
	}
	for typ := byte(128); typ < 150; typ++ {
		name := fmt.Sprintf("ICMPv6 %d", typ)
		if (typ < 130 || typ > 137) && typ != 143 {
			name = "no: " + name
		}
		frames[name] = ip6(58, typ, 0, 0, 0)
	}
	return frames
}

// fragment sets flags and offset of an IPv4 frame.
func fragment(frame []byte, off uint16) []byte {
	be.PutUint16(frame[20:], off)
	be.PutUint16(frame[24:], 0)
	be.PutUint16(frame[24:], ^onesSum(0, frame[14:34]))
	return frame
}

func TestPriOutUncompared(t *testing.T) {
	k := newKit(t)
	for name, frame := range linkFrames() {
		t.Run(name, func(t *testing.T) {
			k.TB = t
			k.conf.LeaseUntil = math.MaxUint64
			k.setMode(hold)
			if name[:3] == "no:" {
				k.check(k.LsPriOut, frame, drop, "held")
				k.conf.LeaseUntil = 1 // holding needs no lease
				k.setConf()
				k.check(k.LsPriOut, frame, drop, "held")
				for _, ev := range k.events() {
					k.slot(ev.(*bpf.LockstepLsEv).Slot)
				}
				return
			}
			k.check(k.LsPriOut, frame, next, "passed")
			k.conf.LeaseUntil = 1
			k.setConf()
			k.check(k.LsPriOut, frame, drop, "muted")
		})
	}
	k.TB = t
	k.none()
}

func TestPriOutModes(t *testing.T) {
	k := newKit(t)
	frame := flows["IPv4"].from(seg{flags: ack, payload: []byte("x")})
	for _, m := range []bpf.LockstepLsMode{shut, run, park} {
		k.setMode(m)
		k.check(k.LsPriOut, frame, drop, "shut")
	}
	k.setMode(solo)
	k.check(k.LsPriOut, frame, next, "passed")
	k.conf.LeaseUntil = 1
	k.setConf()
	k.check(k.LsPriOut, frame, drop, "muted")
	k.none()
}

// A released frame passes whatever it is, under R20, and loses its mark; but when the gate
// was shut meanwhile none does, on S neither.
func TestPriOutReleased(t *testing.T) {
	k := newKit(t)
	frame := flows["IPv6"].from(seg{flags: syn})
	for _, m := range []bpf.LockstepLsMode{shut, run, park, quiet} {
		k.setMode(m)
		for _, prog := range []*ebpf.Program{k.LsPriOut, k.LsSecOut} {
			k.expect(counts{"shut": 1}, func() {
				if verdict, _, _ := k.run(prog, input{frame: frame, mark: markRel}); verdict != drop {
					t.Errorf("mode %d, %s: verdict %d", m, prog, int32(verdict))
				}
			})
		}
	}
	for _, m := range []bpf.LockstepLsMode{hold, solo} {
		k.conf.LeaseUntil = math.MaxUint64
		k.setMode(m)
		k.expect(counts{"released_out": 1}, func() {
			verdict, out, mark := k.run(k.LsPriOut, input{frame: frame, mark: markRel})
			if verdict != next || mark != 0 || !bytes.Equal(out, frame) {
				t.Errorf("verdict %d, mark %#x, frame % x", int32(verdict), mark, out)
			}
		})
		k.conf.LeaseUntil = 1
		k.setConf()
		k.expect(counts{"muted": 1}, func() {
			if verdict, _, _ := k.run(k.LsPriOut, input{frame: frame, mark: markRel}); verdict != drop {
				t.Errorf("verdict %d", int32(verdict))
			}
		})
	}
	k.none()
}

// Every program survives frames cut at every length and headers that lie.
func TestMalformed(t *testing.T) {
	k := newKit(t)
	opts := timestamps(1, 2)
	for family, f := range flows {
		s := seg{seq: 1, ack: 2, flags: ack, opts: opts, payload: []byte("0123456789")}
		whole := f.from(s)
		l4 := f.l4(s)
		t.Run(family, func(t *testing.T) {
			k.TB = t
			for n := l4; n < len(whole); n++ { // shorter ones: TestLiveTruncated
				frame := whole[:n]
				k.setMode(hold)
				k.check(k.LsPriOut, frame, drop, "malformed")
				k.check(k.LsDigestRx, frame, drop, "peer_junk")
				k.setMode(run)
				k.check(k.LsSecOut, frame, drop, "malformed")
				k.expect(counts{"delivered": 1}, func() { // the guests judge, both alike
					if v, out, mark := k.run(k.LsSecIn, input{frame: frame}); v != redirect || mark != markIn || !bytes.Equal(out, frame) {
						t.Errorf("verdict %d, mark %#x, frame % x", int32(v), mark, out)
					}
				})
				k.setMode(solo)
				k.check(k.LsSecOut, frame, next, "passed")
				k.check(k.LsSecGate, frame, next, "passed")
			}
			lies := map[string]func(b []byte){
				"version":            func(b []byte) { b[14] ^= 0xf0 },
				"IP length long":     func(b []byte) { b[ipLen(f)]++ },
				"IP length short":    func(b []byte) { b[ipLen(f)], b[ipLen(f)+1] = 0, byte(l4-14+19) },
				"IP length 0":        func(b []byte) { b[ipLen(f)], b[ipLen(f)+1] = 0, 0 },
				"TCP length short":   func(b []byte) { b[l4+12] = 4 << 4 },
				"TCP length 0":       func(b []byte) { b[l4+12] = 0 },
				"TCP length too big": func(b []byte) { b[l4+12] = 15 << 4 },
			}
			if family == "IPv4" {
				lies["IP header short"] = func(b []byte) { b[14] = 0x44 }
				lies["IP header 0"] = func(b []byte) { b[14] = 0x40 }
				lies["IP header longer than packet"] = func(b []byte) { b[14], b[17] = 0x4f, 59 }
			}
			for name, lie := range lies {
				frame := bytes.Clone(whole)
				if lie(frame); name == "IP length 0" && family == "IPv6" {
					frame = frame[:60]
				}
				k.setMode(hold)
				k.check(k.LsPriOut, frame, drop, "malformed")
				k.setMode(run)
				k.check(k.LsSecOut, frame, drop, "malformed")
				if t.Failed() {
					t.Fatal(name)
				}
			}
		})
	}
	k.TB = t
	k.none()
	if n := k.used(); n != 0 {
		t.Errorf("%d slots taken", n)
	}
}

// ipLen is where the IP header has its length.
func ipLen(f flow) int {
	if f.guest.Addr().Is4() {
		return 16
	}
	return 18
}
