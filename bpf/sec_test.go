// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"net/netip"
	"slices"
	"testing"

	"github.com/lockstep-ft/lockstep/bpf"
)

const (
	stActive  = uint32(bpf.LockstepLsConnBitLS_CONN_ACTIVE)
	stTS      = uint32(bpf.LockstepLsConnBitLS_CONN_TS)
	stGFIN    = uint32(bpf.LockstepLsConnBitLS_CONN_GFIN)
	stUnacked = uint32(bpf.LockstepLsConnBitLS_CONN_UNACKED)
	stRFIN    = uint32(bpf.LockstepLsConnBitLS_CONN_RFIN)
	stRST     = uint32(bpf.LockstepLsConnBitLS_CONN_RST)
)

var (
	pvmSynAck = seg{seq: isnPVM, ack: isnCli + 1, flags: syn | ack, win: 100, opts: withTS(tsPVM, tsCli)}
	svmSynAck = seg{seq: isnSVM, ack: isnCli + 1, flags: syn | ack, win: 200, opts: withTS(tsSVM, tsCli)}
	// what P is informed of
	svmSynAckP = seg{seq: isnPVM, ack: isnCli + 1, flags: syn | ack, win: 200, opts: withTS(tsPVM, tsCli)}
)

// Timestamps of one side only are not translated.
func TestOneSideTimestamps(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	f := flows["IPv4"]
	pvm, reported := pvmSynAck, svmSynAckP
	pvm.opts, reported.opts = mss, svmSynAck.opts
	k.announce(f, pvm, 0, nil)
	k.svmSends(f, svmSynAck, reported, isnPVM, 0, "record_out")
	k.announce(f, pvm, isnPVM, &reported)
	k.svmReceives(f, seg{ack: isnPVM + 1, flags: ack, opts: timestamps(3, 4)}, seg{ack: isnSVM + 1, flags: ack, opts: timestamps(3, 4)})
	k.wantConn(f, &bpf.LockstepLsConn{Off: off, Inc: isnPVM, CliAck: isnPVM + 1, IsnSvm: isnSVM})
}

// Options wherever they stand, and what only looks like options.
func TestOptions(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	ts := func(val, ecr uint32) []byte { return timestamps(val, ecr)[2:] }
	sack := func(edges ...uint32) []byte {
		b := []byte{5, byte(2 + 4*len(edges))}
		for _, e := range edges {
			b = be.AppendUint32(b, e)
		}
		return b
	}
	join := func(parts ...[]byte) []byte {
		b := slices.Concat(parts...)
		return append(b, make([]byte, -len(b)&3)...)
	}
	nop := []byte{1}
	a, o, e := uint32(tsPVM+7), off, tsOff // not constants: sums wrap
	for name, c := range map[string]struct{ in, want, out, wantOut []byte }{
		"aligned": {join(nop, nop, ts(1, a)), join(nop, nop, ts(1, a+e)), join(nop, nop, ts(a+e, 2)), join(nop, nop, ts(a, 2))},
		"odd":     {join(nop, ts(1, a)), join(nop, ts(1, a+e)), join(nop, ts(a+e, 2)), join(nop, ts(a, 2))},
		"odd 3":   {join(nop, nop, nop, ts(1, a), nop), join(nop, nop, nop, ts(1, a+e), nop), nil, nil},
		"last": {join(bytes.Repeat(nop, 30), ts(1, a)), join(bytes.Repeat(nop, 30), ts(1, a+e)),
			join(bytes.Repeat(nop, 30), ts(a+e, 2)), join(bytes.Repeat(nop, 30), ts(a, 2))},
		"no echo": {join(ts(1, 0)), join(ts(1, 0)), nil, nil},
		"SACK": {join(nop, nop, ts(1, a), nop, nop, sack(10, 20, 30, 40, 50, 60)),
			join(nop, nop, ts(1, a+e), nop, nop, sack(10+o, 20+o, 30+o, 40+o, 50+o, 60+o)), nil, nil},
		"SACK 4":            {join(sack(1, 2, 3, 4, 5, 6, 7, 8)), join(sack(1+o, 2+o, 3+o, 4+o, 5+o, 6+o, 7+o, 8+o)), nil, nil},
		"SACK odd":          {join(nop, sack(1, 2)), join(nop, sack(1+o, 2+o)), join(nop, sack(1, 2)), join(nop, sack(1, 2))},
		"SACK half":         {join([]byte{5, 6, 1, 2, 3, 4}), join([]byte{5, 6, 1, 2, 3, 4}), nil, nil},
		"SACK and a half":   {join([]byte{5, 14}, sack(1, 2, 3)[2:]), join([]byte{5, 14}, sack(1+o, 2+o, 3)[2:]), nil, nil},
		"end before":        {join([]byte{0, 0}, ts(1, a)), join([]byte{0, 0}, ts(1, a)), nil, nil},
		"length 0":          {join([]byte{3, 0}, ts(1, a)), join([]byte{3, 0}, ts(1, a)), nil, nil},
		"length 1":          {join([]byte{3, 1}, ts(1, a)), join([]byte{3, 1}, ts(1, a)), nil, nil},
		"length too long":   {join([]byte{3, 15}, ts(1, a)), join([]byte{3, 15}, ts(1, a)), nil, nil},
		"behind unknown":    {join([]byte{253, 6, 8, 10, 5, 2}, ts(1, a)), join([]byte{253, 6, 8, 10, 5, 2}, ts(1, a+e)), nil, nil},
		"TS of length 9":    {join([]byte{8, 9, 0, 0, 0, 1, 0, 0, 2}), join([]byte{8, 9, 0, 0, 0, 1, 0, 0, 2}), nil, nil},
		"TS cut":            {[]byte{1, 8, 10, 0}, []byte{1, 8, 10, 0}, nil, nil},
		"kind last byte":    {[]byte{1, 1, 1, 8}, []byte{1, 1, 1, 8}, nil, nil},
		"two of them":       {join(ts(1, a), ts(2, a)), join(ts(1, a+e), ts(2, a+e)), join(ts(e, 1), ts(a+e, 2)), join(ts(0, 1), ts(a, 2))},
		"SACK beyond the 4": {join([]byte{5, 38}, make([]byte, 36)), join([]byte{5, 38}, bytes.Repeat(be.AppendUint32(nil, o), 8), make([]byte, 4)), nil, nil},
	} {
		for family, f := range flows {
			t.Run(name+" "+family, func(t *testing.T) {
				k.TB = t
				if k.conn(f) == nil {
					k.opened(f)
				}
				for _, payload := range [][]byte{nil, []byte("odd")} {
					k.svmReceives(f, seg{seq: 5, ack: isnPVM + 9, flags: ack, opts: c.in, payload: payload},
						seg{seq: 5, ack: isnSVM + 9, flags: ack, opts: c.want, payload: payload})
					// Without ACK the numbers mean nothing.
					k.svmReceives(f, seg{seq: 5, ack: isnPVM + 9, opts: c.in, payload: payload}, seg{seq: 5, ack: isnPVM + 9, opts: c.in, payload: payload})
					if c.out != nil {
						k.svmSends(f, seg{seq: isnSVM + 9, ack: 5, flags: ack, opts: c.out, payload: payload},
							seg{seq: isnPVM + 9, ack: 5, flags: ack, opts: c.wantOut, payload: payload}, isnPVM, isnPVM+9, "record_out")
					}
				}
			})
		}
	}
}

// A full ls_conn drops what would need an entry; ls_half forgets instead.
func TestTablesFull(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	f := flows["IPv4"]
	port := func(n int) flow {
		g := f
		g.remote = netip.AddrPortFrom(f.remote.Addr(), uint16(1000+n))
		return g
	}
	for i := range 8 {
		k.opened(port(i))
	}
	g := port(9)
	k.announce(g, pvmSynAck, 0, nil)
	k.svmSends(g, svmSynAck, svmSynAckP, isnPVM, 0, "record_out")
	k.check(k.LsSecIn, g.to(seg{ack: isnPVM + 1, flags: ack}), drop, "conn_full")
	k.svmReceives(port(3), seg{ack: isnPVM + 1, flags: ack}, seg{ack: isnSVM + 1, flags: ack})
	if err := k.LsConn.Delete(port(3).tuple()); err != nil {
		t.Fatal(err)
	}
	k.svmReceives(g, seg{ack: isnPVM + 1, flags: ack}, seg{ack: isnSVM + 1, flags: ack})
	k.wantConn(g, &bpf.LockstepLsConn{Off: off, TsOff: tsOff, Inc: isnPVM, State: stTS, CliAck: isnPVM + 1, IsnSvm: isnSVM})

	for i := range 500 { // a flood of SYNs
		k.check(k.LsSecOut, port(100+i).from(svmSynAck), drop, "pending")
	}
	k.svmReceives(g, seg{ack: isnPVM + 1, flags: ack}, seg{ack: isnSVM + 1, flags: ack})
}

// Without a slot or ring the record goes out, and no copy is reported.
func TestCopyLost(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	f := flows["IPv4"]
	pin(t)
	s := seg{seq: 1, flags: ack, payload: []byte("x")}
	for range tcpSlots {
		k.run(k.LsSecOut, input{frame: f.from(s)})
	}
	k.events()
	k.streams = k.streamsNow()
	k.svmSends(f, s, s, 0, 0, "copy_lost")
	s.payload = make([]byte, 3600) // these take the other slots
	for range tcpGslots {
		k.run(k.LsSecOut, input{frame: f.from(s)})
	}
	k.events()
	k.streams = k.streamsNow()
	k.svmSends(f, s, s, 0, 0, "copy_lost")
	s.payload = nil
	k.svmSends(f, s, s, 0, 0, "record_out")
}

func TestPark(t *testing.T) {
	pin(t)
	k := newKit(t)
	k.setMode(run)
	f := k.opened(flows["IPv4"])
	k.setMode(park)
	s := seg{seq: 5, ack: isnPVM + 6, flags: ack, payload: []byte("later"), padding: []byte("pad")}
	frame := f.to(s)
	k.check(k.LsSecIn, frame, drop, "parked")
	ev := one[*bpf.LockstepLsEv](k)
	want := wantEvent(bpf.LockstepLsEvTypeLS_EV_PARK, f, s, frame)
	want.Slot = ev.Slot
	k.same(ev, want)
	if got := k.slot(ev.Slot); !bytes.Equal(got, frame) {
		t.Errorf("parked % x, want % x", got, frame)
	}
	for name, frame := range linkFrames() {
		if name == "no: peer frame" {
			continue
		}
		k.check(k.LsSecIn, frame, drop, "parked")
		ev := one[*bpf.LockstepLsEv](k)
		if got := k.slot(ev.Slot); !bytes.Equal(got, frame) || ev.FrameLen != uint32(len(frame)) || ev.HdrLen != 0 {
			t.Errorf("%s: parked % x, want % x", name, got, frame)
		}
	}
	// Announcements are taken: P does not wait for S.
	g := flows["IPv6"]
	k.announce(g, pvmSynAck, 0, nil)

	k.check(k.LsSecOut, f.from(seg{flags: ack}), drop, "shut")
	for range tcpSlots {
		k.check(k.LsSecIn, frame, drop, "parked")
	}
	k.check(k.LsSecIn, frame, drop, "no_slot")
	for full := k.counters()["no_ring"]; k.counters()["no_ring"] == full; {
		for i := range uint32(nslots) {
			if err := k.LsSlots.Put(i, &bpf.LockstepLsSlot{}); err != nil {
				t.Fatal(err)
			}
		}
		for range tcpSlots {
			k.run(k.LsSecIn, input{frame: frame})
		}
	}
}

func TestSecOutModes(t *testing.T) {
	k := newKit(t)
	frame := flows["IPv4"].from(seg{flags: ack})
	for _, m := range []bpf.LockstepLsMode{shut, hold, park} {
		k.setMode(m)
		k.check(k.LsSecOut, frame, drop, "shut")
	}
	k.setMode(run)
	for name, frame := range linkFrames() {
		if name[:3] == "no:" {
			k.expect(counts{"record_out": 1}, func() {
				if v, _, _ := k.run(k.LsSecOut, input{frame: frame}); v != redirect {
					t.Errorf("%s: verdict %d", name, int32(v))
				}
			})
		} else {
			k.check(k.LsSecOut, frame, drop, "svm_only")
		}
		k.expect(counts{"delivered": 1}, func() {
			if k.conf.Mode != uint32(run) || bytes.HasPrefix(frame[12:], []byte{0x88, 0xb5}) {
				frame = flows["IPv4"].to(seg{})
			}
			if v, out, mark := k.run(k.LsSecIn, input{frame: frame}); v != redirect || mark != markIn || !bytes.Equal(out, frame) {
				t.Errorf("verdict %d, mark %#x, frame % x", int32(v), mark, out)
			}
		})
	}
	k.none()
}

// After a takeover the SVM sends and receives with the PVM's numbers.
func TestSolo(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	f := k.opened(flows["IPv6"])
	k.setMode(solo)
	k.turned(k.LsSecOut, 0, f.from(seg{seq: isnSVM + 5, ack: 6, flags: ack, opts: timestamps(tsSVM, 1), payload: []byte("x")}),
		f.from(seg{seq: isnPVM + 5, ack: 6, flags: ack, opts: timestamps(tsPVM, 1), payload: []byte("x")}), "passed")
	k.turned(k.LsSecGate, 0, f.to(seg{seq: 6, ack: isnPVM + 6, flags: fin | ack, opts: timestamps(1, tsPVM)}),
		f.to(seg{seq: 6, ack: isnSVM + 6, flags: fin | ack, opts: timestamps(1, tsSVM)}), "passed")
	k.wantConn(f, &bpf.LockstepLsConn{Off: off, TsOff: tsOff, Inc: isnPVM, State: stTS | stRFIN, CliAck: isnPVM + 6, IsnSvm: isnSVM})
	for _, frame := range linkFrames() {
		k.check(k.LsSecOut, frame, next, "passed")
		k.check(k.LsSecGate, frame, next, "passed")
	}
	unknown := flows["IPv4"]
	k.check(k.LsSecOut, unknown.from(seg{seq: 1, flags: ack}), next, "passed")
	k.check(k.LsSecGate, unknown.to(seg{ack: 1, flags: ack}), next, "passed")
	k.conf.LeaseUntil = 1
	k.setConf()
	k.check(k.LsSecOut, f.from(seg{seq: 1, flags: ack}), drop, "muted")
	k.none()
}

func TestSecGate(t *testing.T) {
	k := newKit(t)
	frame := flows["IPv4"].to(seg{ack: 1, flags: ack})
	for _, m := range []bpf.LockstepLsMode{shut, hold, run, park, solo, quiet} {
		k.setMode(m)
		if m != solo {
			k.check(k.LsSecGate, frame, drop, "gated")
		}
		if m == shut || m == quiet { // a mirrored frame that was on its way
			k.expect(counts{"gated": 1}, func() {
				if v, _, _ := k.run(k.LsSecGate, input{frame: frame, mark: markIn}); v != drop {
					t.Errorf("mode %d: verdict %d", m, int32(v))
				}
			})
			continue
		}
		k.expect(counts{"let_in": 1}, func() {
			if v, out, mark := k.run(k.LsSecGate, input{frame: frame, mark: markIn}); v != next || mark != 0 || !bytes.Equal(out, frame) {
				t.Errorf("verdict %d, mark %#x, frame % x", int32(v), mark, out)
			}
		})
	}
}

// R16: what was parked is as it came, and acknowledges the PVM's numbers. It is translated when it is delivered, by what
// is known of the connection then: after an attempt that was given up, and after a takeover, there is an offset, after a
// checkpoint there is none.
func TestParked(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	for _, f := range flows {
		k.opened(f)
		parked, entered := seg{seq: 6, ack: isnPVM + 6, flags: ack, payload: []byte("x")}, seg{seq: 6, ack: isnSVM + 6, flags: ack, payload: []byte("x")}
		k.turned(k.LsSecGate, markPark, f.to(parked), f.to(entered), "let_in")
		if c := k.conn(f); c.CliAck != isnPVM+6 {
			t.Errorf("the remote has acknowledged %d, noted is %d", isnPVM+6, c.CliAck)
		}
		k.setMode(solo)
		k.turned(k.LsSecGate, markPark, f.to(parked), f.to(entered), "passed")
		for _, m := range []bpf.LockstepLsMode{shut, quiet} {
			k.setMode(m)
			k.expect(counts{"gated": 1}, func() {
				if v, _, _ := k.run(k.LsSecGate, input{frame: f.to(parked), mark: markPark}); v != drop {
					t.Errorf("mode %d: verdict %d", m, int32(v))
				}
			})
		}
		k.setMode(run)
		if err := k.LsConn.Delete(f.tuple()); err != nil {
			t.Fatal(err)
		}
		if err := k.LsHalf.Delete(f.tuple()); err != nil {
			t.Fatal(err)
		}
		k.turned(k.LsSecGate, markPark, f.to(parked), f.to(parked), "let_in")
	}
	k.none()
}

// The mutation of R9 takes every offset for 0.
func TestMutateR9(t *testing.T) {
	k := newKit(t, variable("ls_mutate", uint32(bpf.LockstepLsMutationLS_MUTATE_R9)))
	k.setMode(run)
	f := flows["IPv4"]
	k.check(k.LsSecIn, k.announcement(f, pvmSynAck), drop, "record_in")
	k.svmSends(f, svmSynAck, svmSynAck, isnSVM, 0, "record_out")
	k.svmReceives(f, seg{ack: isnPVM + 1, flags: ack}, seg{ack: isnPVM + 1, flags: ack})
}

// Bytes are counted as packets are.
func TestCountedBytes(t *testing.T) {
	k := newKit(t)
	frame := flows["IPv4"].to(seg{ack: 1, flags: ack, payload: make([]byte, 100)})
	for range 3 {
		k.check(k.LsSecGate, frame, drop, "gated")
	}
	var per []bpf.LockstepLsCount
	if err := k.LsStats.Lookup(uint32(bpf.LockstepLsReasonLS_R_gated), &per); err != nil {
		t.Fatal(err)
	}
	var sum uint64
	for _, c := range per {
		sum += c.Bytes
	}
	if sum != 3*uint64(len(frame)) {
		t.Errorf("%d bytes, want %d", sum, 3*len(frame))
	}
}
