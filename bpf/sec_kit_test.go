// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"errors"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/lockstep-ft/lockstep/bpf"
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
		Version: abiVersion, Type: announce, Dir: p2s, KeyGen: keyGen, Epoch: epoch,
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

// svmSends has the SVM send s, expects the record of want and, for payload, a copy.
// inherited is taken for inc 0.
func (k *kit) svmSends(f flow, s, want seg, inc, cliAck uint32, reason string) {
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

// svmReceives gives the SVM s from the remote and expects it to arrive as want.
func (k *kit) svmReceives(f flow, s, want seg) {
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

// forget takes f out of the tables.
func (k *kit) forget(f flow) {
	k.Helper()
	for _, m := range []*ebpf.Map{k.LsConn, k.LsHalf} {
		if err := m.Delete(f.tuple()); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			k.Fatal(err)
		}
	}
}

// opened is f after a passive open.
func (k *kit) opened(f flow) flow {
	k.Helper()
	k.announce(f, pvmSynAck, 0, nil)
	k.svmSends(f, svmSynAck, svmSynAckP, isnPVM, 0, "record_out")
	k.svmReceives(f, seg{seq: isnCli + 1, ack: isnPVM + 1, flags: ack}, seg{seq: isnCli + 1, ack: isnSVM + 1, flags: ack})
	if k.conn(f) == nil {
		k.Fatal("no connection")
	}
	return f
}

// streamsNow reads the streams' counters.
func (k *kit) streamsNow() map[uint16]uint64 {
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
