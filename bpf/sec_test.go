// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"lockstep/bpf"
)

// Numbers of the tests' connections. Offsets wrap on the way.
const (
	isnPVM = 0xfffff000
	isnSVM = 0x00000800
	isnCli = 0x70000000
	off    = uint32(isnSVM - isnPVM + 1<<32)
	tsPVM  = 0xffffff00
	tsSVM  = 0x00000100
	tsOff  = uint32(tsSVM - tsPVM + 1<<32)
	tsCli  = 5000
)

var mss = []byte{2, 4, 5, 0xb4}

func withTS(val, ecr uint32) []byte { return append(bytes.Clone(mss), timestamps(val, ecr)...) }

// announcement is what P sends of the PVM's SYN s.
func (k *kit) announcement(f flow, s seg) []byte {
	return k.fromPeer(&bpf.LockstepLsRec{
		Version: abiVersion, Type: announce, Dir: p2s, Term: term, Epoch: epoch,
		T: f.tuple(), Inc: s.seq, Seq: s.seq, End: s.end(), Ack: s.ack, Win: s.win, TcpFlags: s.flags,
		Optlen: uint8(len(s.opts)), Opts: opts40(s.opts),
	})
}

// announce gives S an announcement and expects answer, nil for none.
func (k *kit) announce(f flow, s seg, inc uint32, answer *seg) {
	k.Helper()
	frame := k.announcement(f, s)
	if answer == nil {
		k.check(k.LsSecIn, frame, drop, "record_in")
		return
	}
	var verdict uint32
	var out []byte
	k.expect(counts{"record_out": 1}, func() { verdict, out, _ = k.run(k.LsSecIn, input{frame: frame}) })
	want := k.record(segRecord(f, *answer, inc), out, frame[:18], 54)
	copy(want[18:54], frame[18:54])
	if verdict != redirect || !bytes.Equal(out, want) {
		k.Errorf("verdict %d, answer\n% x, want\n% x", int32(verdict), out, want)
	}
	k.none()
}

// segRecord is the record of s, whose numbers are the PVM's, but for the sums.
func segRecord(f flow, s seg, inc uint32) *bpf.LockstepLsRec {
	return &bpf.LockstepLsRec{
		Type: data, Dir: s2p, T: f.tuple(), Inc: inc, Seq: s.seq, End: s.end(), Ack: s.ack, Win: s.win, TcpFlags: s.flags,
		Optlen: uint8(len(s.opts)), Opts: opts40(s.opts),
	}
}

// said lets the SVM say s, expects the record of want and, for payload, a copy.
// inherited is taken for inc 0.
func (k *kit) said(f flow, s, want seg, inc, cliAck uint32, reason string) {
	k.Helper()
	frame := f.from(s)
	var verdict uint32
	var out []byte
	k.expect(counts{reason: 1}, func() { verdict, out, _ = k.run(k.LsSecOut, input{frame: frame}) })
	translated := f.from(want)
	rec := segRecord(f, want, inc)
	pos := want.seq + uint32(want.flags&syn>>1)
	rec.Sum = k.sum(pos, want.payload)
	if inc == 0 {
		rec.Flags = inherited
	}
	wantFrame := k.record(rec, out, translated, f.l4(s)+20)
	if verdict != redirect || !bytes.Equal(out, wantFrame) {
		k.Errorf("verdict %d, record\n% x, want\n% x", int32(verdict), out, wantFrame)
	}
	if len(s.payload) == 0 || reason == "copy_lost" {
		k.none()
		return
	}
	ev := one[*bpf.LockstepLsEv](k)
	wantEv := wantEvent(bpf.LockstepLsEvTypeLS_EV_COPY, f, want, translated)
	wantEv.Slot, wantEv.Inc, wantEv.CliAck, wantEv.Sum = ev.Slot, inc, cliAck, rec.Sum
	if inc == 0 {
		wantEv.Flags = uint8(bpf.LockstepLsEvFlagLS_EV_INHERITED)
	}
	k.same(ev, wantEv)
	if got := k.slot(ev.Slot); !bytes.Equal(got, translated) {
		k.Errorf("copy\n% x, want\n% x", got, translated)
	}
}

// hears gives the SVM s from the remote and expects it to arrive as want.
func (k *kit) hears(f flow, s, want seg) {
	k.Helper()
	k.expect(counts{"delivered": 1}, func() {
		k.Helper()
		verdict, out, mark := k.run(k.LsSecIn, input{frame: f.to(s)})
		if verdict != redirect || mark != markIn || !bytes.Equal(out, f.to(want)) {
			k.Errorf("verdict %d, mark %#x, frame\n% x, want\n% x", int32(verdict), mark, out, f.to(want))
		}
	})
}

func (k *kit) conn(f flow) *bpf.LockstepLsConn {
	k.Helper()
	var c bpf.LockstepLsConn
	if err := k.LsConn.Lookup(f.tuple(), &c); err != nil {
		return nil
	}
	return &c
}

func (k *kit) wantConn(f flow, want *bpf.LockstepLsConn) {
	k.Helper()
	got := k.conn(f)
	if got != nil && want != nil {
		if got.Last == 0 {
			k.Error("entry without time")
		}
		want.Last = got.Last
	}
	if diff := cmp.Diff(want, got); diff != "" {
		k.Errorf("ls_conn (-want +got):\n%s", diff)
	}
}

const (
	stActive = uint32(bpf.LockstepLsConnBitLS_CONN_ACTIVE)
	stTS     = uint32(bpf.LockstepLsConnBitLS_CONN_TS)
	stGFIN   = uint32(bpf.LockstepLsConnBitLS_CONN_GFIN)
	stRFIN   = uint32(bpf.LockstepLsConnBitLS_CONN_RFIN)
	stRST    = uint32(bpf.LockstepLsConnBitLS_CONN_RST)
)

var (
	pvmSynAck = seg{seq: isnPVM, ack: isnCli + 1, flags: syn | ack, win: 100, opts: withTS(tsPVM, tsCli)}
	svmSynAck = seg{seq: isnSVM, ack: isnCli + 1, flags: syn | ack, win: 200, opts: withTS(tsSVM, tsCli)}
	// what P is told of it
	svmSynAckP = seg{seq: isnPVM, ack: isnCli + 1, flags: syn | ack, win: 200, opts: withTS(tsPVM, tsCli)}
)

// A connection that a remote opens, from its SYN to both FINs.
func TestPassiveOpen(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	for family, f := range flows {
		for _, announcedFirst := range []bool{true, false} {
			name := family + " SVM first"
			if announcedFirst {
				name = family + " announced first"
			}
			t.Run(name, func(t *testing.T) {
				k.TB = t
				k.forget(f)
				clientSyn := seg{seq: isnCli, flags: syn, opts: withTS(tsCli, 0)}
				k.hears(f, clientSyn, clientSyn)
				if announcedFirst {
					k.announce(f, pvmSynAck, 0, nil)
					k.announce(f, pvmSynAck, 0, nil)
					k.said(f, svmSynAck, svmSynAckP, isnPVM, 0, "record_out")
				} else {
					k.check(k.LsSecOut, f.from(svmSynAck), drop, "pending")
					k.check(k.LsSecOut, f.from(seg{seq: isnSVM + 1, ack: isnCli + 1, flags: ack, payload: []byte("early")}), drop, "pending")
					k.announce(f, pvmSynAck, isnPVM, &svmSynAckP)
				}
				k.announce(f, pvmSynAck, isnPVM, &svmSynAckP)              // repeated
				k.said(f, svmSynAck, svmSynAckP, isnPVM, 0, "record_out")  // repeated
				later := pvmSynAck                                         // the PVM's clock goes on, the offset does not
				later.opts = withTS(tsPVM+100, tsCli)                      //
				k.announce(f, later, isnPVM, &svmSynAckP)                  //
				early := seg{seq: isnSVM + 1, ack: isnCli + 1, flags: ack} // before the remote's first ack
				early.payload = []byte("greeting")                         //
				earlyP := early                                            //
				earlyP.seq = isnPVM + 1                                    //
				k.said(f, early, earlyP, isnPVM, isnPVM, "record_out")     //
				k.wantConn(f, nil)                                         //
				stale := seg{seq: isnCli + 1, ack: isnPVM, flags: ack}     // acks nothing: translated, not believed
				k.hears(f, stale, seg{seq: isnCli + 1, ack: isnSVM, flags: ack})
				k.wantConn(f, nil)

				k.hears(f, seg{seq: isnCli + 1, ack: isnPVM + 9, flags: ack, opts: timestamps(tsCli+1, tsPVM)},
					seg{seq: isnCli + 1, ack: isnSVM + 9, flags: ack, opts: timestamps(tsCli+1, tsSVM)})
				want := &bpf.LockstepLsConn{Off: off, TsOff: tsOff, Inc: isnPVM, State: stTS, CliAck: isnPVM + 9, IsnSvm: isnSVM}
				k.wantConn(f, want)
				k.announce(f, pvmSynAck, 0, nil)                          // confirmed long ago
				k.said(f, svmSynAck, svmSynAckP, isnPVM, 0, "record_out") // its ACK was lost on the way to the SVM

				// The stream goes over the wrap in PVM numbering.
				k.said(f, seg{seq: isnSVM + 9, ack: isnCli + 1, flags: ack | psh, win: 9, opts: timestamps(tsSVM+5, tsCli), payload: make([]byte, 5000-1500)},
					seg{seq: isnPVM + 9, ack: isnCli + 1, flags: ack | psh, win: 9, opts: timestamps(tsPVM+5, tsCli), payload: make([]byte, 5000-1500)},
					isnPVM, isnPVM+9, "record_out")
				k.hears(f, seg{seq: isnCli + 1, ack: 2000, flags: ack, payload: []byte("request")}, seg{seq: isnCli + 1, ack: 2000 + off, flags: ack, payload: []byte("request")})
				k.hears(f, seg{seq: isnCli + 1, ack: 1999, flags: ack}, seg{seq: isnCli + 1, ack: 1999 + off, flags: ack}) // overtaken
				want.CliAck = 2000
				k.wantConn(f, want)

				// Pure ACKs and FINs are recorded and not copied.
				k.said(f, seg{seq: 3000 + off, ack: isnCli + 8, flags: ack}, seg{seq: 3000, ack: isnCli + 8, flags: ack}, isnPVM, 2000, "record_out")
				k.said(f, seg{seq: 3000 + off, ack: isnCli + 8, flags: fin | ack}, seg{seq: 3000, ack: isnCli + 8, flags: fin | ack}, isnPVM, 2000, "record_out")
				want.State |= stGFIN
				k.wantConn(f, want)
				k.hears(f, seg{seq: isnCli + 8, ack: 3001, flags: fin | ack}, seg{seq: isnCli + 8, ack: 3001 + off, flags: fin | ack})
				want.State, want.CliAck = want.State|stRFIN, 3001
				k.wantConn(f, want)
			})
		}
	}
}

// forget takes f out of the tables.
func (k *kit) forget(f flow) {
	k.Helper()
	for _, m := range []*ebpf.Map{k.LsConn, k.LsHalf} {
		if err := m.Delete(f.tuple()); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			k.Fatal(err)
		}
	}
}

// RSTs end a connection, unless the guest does not believe them.
func TestReset(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	f := k.opened(flows["IPv4"])
	want := k.conn(f)

	k.hears(f, seg{seq: 1, flags: rst}, seg{seq: 1, flags: rst}) // without ACK nothing is translated
	want.State |= stRST
	k.wantConn(f, want)
	k.said(f, seg{seq: isnSVM + 1, ack: 2, flags: ack}, seg{seq: isnPVM + 1, ack: 2, flags: ack}, isnPVM, 0, "record_out")
	want.State &^= stRST
	k.wantConn(f, want)
	k.hears(f, seg{seq: 1, ack: isnPVM + 2, flags: rst | ack}, seg{seq: 1, ack: isnSVM + 2, flags: rst | ack})
	want.State, want.CliAck = want.State|stRST, isnPVM+2
	k.wantConn(f, want)
	k.said(f, seg{seq: isnSVM + 1, flags: rst}, seg{seq: isnPVM + 1, flags: rst}, isnPVM, 0, "record_out")
	k.wantConn(f, want)

	// A refusal has sequence number 0 and is of no incarnation.
	refusal := seg{ack: isnCli + 1, flags: rst | ack}
	k.said(f, refusal, refusal, 0, 0, "record_out")
	other := f
	other.remote = flows["IPv6"].remote
	other.guest = flows["IPv6"].guest
	k.said(other, refusal, refusal, 0, 0, "record_out")
}

// opened is f after a passive open.
func (k *kit) opened(f flow) flow {
	k.Helper()
	k.announce(f, pvmSynAck, 0, nil)
	k.said(f, svmSynAck, svmSynAckP, isnPVM, 0, "record_out")
	k.hears(f, seg{seq: isnCli + 1, ack: isnPVM + 1, flags: ack}, seg{seq: isnCli + 1, ack: isnSVM + 1, flags: ack})
	if k.conn(f) == nil {
		k.Fatal("no connection")
	}
	return f
}

// A connection that the guests open.
func TestActiveOpen(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	pvm := seg{seq: isnPVM, flags: syn, win: 1, opts: withTS(tsPVM, 0)}
	svm := seg{seq: isnSVM, flags: syn, win: 2, opts: withTS(tsSVM, 0)}
	told := seg{seq: isnPVM, flags: syn, win: 2, opts: withTS(tsPVM, 0)}
	for family, f := range flows {
		t.Run(family, func(t *testing.T) {
			k.TB = t
			k.said(f, svm, svm, 0, 0, "pending") // P sees what the SVM opens
			k.announce(f, pvm, isnPVM, &told)
			k.said(f, svm, told, isnPVM, 0, "record_out")

			// The remote's SYN|ACK is for the SVM's SYN too.
			k.hears(f, seg{seq: isnCli, ack: isnPVM + 1, flags: syn | ack, opts: withTS(tsCli, tsPVM)},
				seg{seq: isnCli, ack: isnSVM + 1, flags: syn | ack, opts: withTS(tsCli, tsSVM)})
			k.wantConn(f, &bpf.LockstepLsConn{Off: off, TsOff: tsOff, Inc: isnPVM, State: stTS | stActive, CliAck: isnPVM + 1, IsnSvm: isnSVM})

			// The same ports again. ISNs that were used for a pair are not used for another.
			again := svm
			again.seq = 0x5000
			k.said(f, again, again, 0, 0, "pending")
			k.wantConn(f, nil)
			k.announce(f, pvm, 0, nil) // repeated, of the first connection
			k.said(f, again, again, 0, 0, "pending")
			pvm2 := pvm
			pvm2.seq = 0x9000
			told2 := told
			told2.seq = 0x9000
			k.announce(f, pvm2, 0x9000, &told2)
			k.hears(f, seg{seq: 1, ack: 0x9001, flags: syn | ack}, seg{seq: 1, ack: 0x5001, flags: syn | ack})
			if c := k.conn(f); c == nil || c.Inc != 0x9000 {
				t.Errorf("connection %+v", c)
			}

			// A third time, announced before the SVM opens it.
			pvm3, svm3, told3 := pvm, svm, told
			pvm3.seq, told3.seq, svm3.seq = 77, 77, 99
			k.announce(f, pvm3, 0, nil)
			k.said(f, svm3, told3, 77, 0, "record_out")
		})
	}
}

// A refused connect is no connection.
func TestActiveRefused(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	f := flows["IPv4"]
	k.announce(f, seg{seq: isnPVM, flags: syn}, 0, nil)
	k.said(f, seg{seq: isnSVM, flags: syn}, seg{seq: isnPVM, flags: syn}, isnPVM, 0, "record_out")
	k.hears(f, seg{ack: isnPVM + 1, flags: rst | ack}, seg{ack: isnSVM + 1, flags: rst | ack})
	k.wantConn(f, nil)
}

// Both ends open at once: the SYN|ACKs repeat the SYNs' numbers.
func TestSimultaneousOpen(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	f := flows["IPv6"]
	k.announce(f, seg{seq: isnPVM, flags: syn}, 0, nil)
	k.said(f, seg{seq: isnSVM, flags: syn}, seg{seq: isnPVM, flags: syn}, isnPVM, 0, "record_out")
	k.hears(f, seg{seq: isnCli, flags: syn}, seg{seq: isnCli, flags: syn})
	k.announce(f, seg{seq: isnPVM, ack: isnCli + 1, flags: syn | ack}, isnPVM, &seg{seq: isnPVM, flags: syn})
	k.said(f, seg{seq: isnSVM, ack: isnCli + 1, flags: syn | ack}, seg{seq: isnPVM, ack: isnCli + 1, flags: syn | ack}, isnPVM, 0, "record_out")
	k.announce(f, seg{seq: isnPVM, ack: isnCli + 1, flags: syn | ack}, isnPVM, &seg{seq: isnPVM, ack: isnCli + 1, flags: syn | ack})
	k.hears(f, seg{seq: isnCli + 1, ack: isnPVM + 1, flags: ack}, seg{seq: isnCli + 1, ack: isnSVM + 1, flags: ack})
	if k.conn(f) == nil {
		t.Error("no connection")
	}
}

// The tuple is used again: another SYN of the remote, other ISNs (R8).
func TestIncarnations(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	f := k.opened(flows["IPv4"])
	pvm, svm, told := pvmSynAck, svmSynAck, svmSynAckP
	pvm.seq, told.seq, svm.seq = 10, 10, 20
	pvm.ack, told.ack, svm.ack = 31, 31, 31

	// The announcement of the old one, repeated late, is not for the new one.
	k.check(k.LsSecOut, f.from(svm), drop, "pending")
	k.wantConn(f, nil)
	k.announce(f, pvmSynAck, 0, nil)
	k.check(k.LsSecOut, f.from(svm), drop, "pending")
	k.announce(f, pvm, 10, &told)
	k.hears(f, seg{ack: 11, flags: ack}, seg{ack: 21, flags: ack})
	if c := k.conn(f); c == nil || c.Inc != 10 || c.Off != 10 {
		t.Errorf("connection %+v", c)
	}

	// While the old connection lives, the new one's announcement does not disturb it.
	k.announce(f, pvmSynAck, 0, nil)
	k.hears(f, seg{ack: 12, flags: ack}, seg{ack: 22, flags: ack})
	k.said(f, svmSynAck, svmSynAckP, isnPVM, 0, "record_out")
	k.wantConn(f, nil)
}

// A connection went once from ls_half to ls_conn: after its removal late segments
// are still translated, without a new entry.
func TestLateSegments(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	f := k.opened(flows["IPv4"])
	if err := k.LsConn.Delete(f.tuple()); err != nil {
		t.Fatal(err)
	}
	k.hears(f, seg{ack: isnPVM + 2, flags: ack}, seg{ack: isnSVM + 2, flags: ack})
	k.said(f, seg{seq: isnSVM + 2, flags: ack}, seg{seq: isnPVM + 2, flags: ack}, isnPVM, 0, "record_out")
	k.wantConn(f, nil)
}

// Nothing known of a connection: it came with a checkpoint, and both guests number it alike.
func TestInherited(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	for _, f := range flows {
		s := seg{seq: 1000, ack: isnCli, flags: ack, opts: timestamps(tsSVM, tsCli), payload: []byte("going on")}
		k.said(f, s, s, 0, 1<<32-1<<30+1000, "record_out")
		in := seg{seq: isnCli, ack: 2000, flags: ack, opts: timestamps(tsCli, tsSVM)}
		k.hears(f, in, in)
		k.wantConn(f, nil)
		// From now on copies know what the remote has.
		s.seq, s.payload = 2000, []byte("and on")
		k.said(f, s, s, 0, 2000, "record_out")
	}
}

// Timestamps of one side only are not translated.
func TestOneSideTimestamps(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	f := flows["IPv4"]
	pvm, told := pvmSynAck, svmSynAckP
	pvm.opts, told.opts = mss, svmSynAck.opts
	k.announce(f, pvm, 0, nil)
	k.said(f, svmSynAck, told, isnPVM, 0, "record_out")
	k.announce(f, pvm, isnPVM, &told)
	k.hears(f, seg{ack: isnPVM + 1, flags: ack, opts: timestamps(3, 4)}, seg{ack: isnSVM + 1, flags: ack, opts: timestamps(3, 4)})
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
					k.hears(f, seg{seq: 5, ack: isnPVM + 9, flags: ack, opts: c.in, payload: payload},
						seg{seq: 5, ack: isnSVM + 9, flags: ack, opts: c.want, payload: payload})
					// Without ACK the numbers mean nothing.
					k.hears(f, seg{seq: 5, ack: isnPVM + 9, opts: c.in, payload: payload}, seg{seq: 5, ack: isnPVM + 9, opts: c.in, payload: payload})
					if c.out != nil {
						k.said(f, seg{seq: isnSVM + 9, ack: 5, flags: ack, opts: c.out, payload: payload},
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
	k.said(g, svmSynAck, svmSynAckP, isnPVM, 0, "record_out")
	k.check(k.LsSecIn, g.to(seg{ack: isnPVM + 1, flags: ack}), drop, "conn_full")
	k.hears(port(3), seg{ack: isnPVM + 1, flags: ack}, seg{ack: isnSVM + 1, flags: ack})
	if err := k.LsConn.Delete(port(3).tuple()); err != nil {
		t.Fatal(err)
	}
	k.hears(g, seg{ack: isnPVM + 1, flags: ack}, seg{ack: isnSVM + 1, flags: ack})
	k.wantConn(g, &bpf.LockstepLsConn{Off: off, TsOff: tsOff, Inc: isnPVM, State: stTS, CliAck: isnPVM + 1, IsnSvm: isnSVM})

	for i := range 500 { // a flood of SYNs
		k.check(k.LsSecOut, port(100+i).from(svmSynAck), drop, "pending")
	}
	k.hears(g, seg{ack: isnPVM + 1, flags: ack}, seg{ack: isnSVM + 1, flags: ack})
}

// Without a slot or ring the record goes out, and P is told of no copy.
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
	k.streams = k.lanesNow()
	k.said(f, s, s, 0, 0, "copy_lost")
	s.payload = make([]byte, 3600) // these take the other slots
	for range tcpGslots {
		k.run(k.LsSecOut, input{frame: f.from(s)})
	}
	k.events()
	k.streams = k.lanesNow()
	k.said(f, s, s, 0, 0, "copy_lost")
	s.payload = nil
	k.said(f, s, s, 0, 0, "record_out")
}

// lanesNow reads the streams' counters.
func (k *kit) lanesNow() map[uint16]uint64 {
	k.Helper()
	streams := make(map[uint16]uint64)
	for cpu := range k.LsLane.MaxEntries() {
		var number bpf.LockstepLsTxStream
		if err := k.LsLane.Lookup(cpu, &number); err != nil {
			k.Fatal(err)
		}
		streams[uint16(cpu)] = number.No
	}
	return streams
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

// After a takeover the SVM speaks and hears with the PVM's numbers.
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

// The mutation of R9 takes every offset for 0.
func TestMutateR9(t *testing.T) {
	k := newKit(t, variable("ls_mutate", uint32(bpf.LockstepLsMutationLS_MUTATE_R9)))
	k.setMode(run)
	f := flows["IPv4"]
	k.check(k.LsSecIn, k.announcement(f, pvmSynAck), drop, "record_in")
	k.said(f, svmSynAck, svmSynAck, isnSVM, 0, "record_out")
	k.hears(f, seg{ack: isnPVM + 1, flags: ack}, seg{ack: isnPVM + 1, flags: ack})
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
