// SPDX-License-Identifier: Apache-2.0

package bpfmodel_test

import (
	"encoding/binary"
	"slices"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
)

// Numbers of the table tests' connections: the PVM's wraps soon.
var (
	isnPVM uint32 = 0xfffffffe
	isnSVM uint32 = 0x1000
	isnCli uint32 = 0x77000000
	skew          = isnSVM - isnPVM
	tsPVM  uint32 = 500
	tsSVM  uint32 = 0xfffffff0
)

// bench is a table with one flow through it.
type bench struct {
	*testing.T
	tab *bpfmodel.Table
	flow
	now int64
}

func newBench(t *testing.T, conns, halves int) *bench {
	return &bench{T: t, tab: newTable(conns, halves), flow: flow{guest: 1, rem: 2, gport: 80, rport: 4000}}
}

// in mirrors the remote's segment and returns what the SVM gets.
func (b *bench) in(flags bpfmodel.Flags, ack uint32, opts ...byte) (bpfmodel.Verdict, bpfmodel.TCP) {
	b.Helper()
	s := parse(b, b.flow, seg{
		flow: b.flow, toGuest: true, seq: isnCli + 1, ack: ack, flags: flags, opts: opts,
	}.bytes(), true)
	v := b.tab.Inbound(s, b.now)
	return v, s.TCP()
}

// out has the SVM transmit.
func (b *bench) out(flags bpfmodel.Flags, seq, ack uint32, opts ...byte) (v bpfmodel.Verdict, r *bpfmodel.Record) {
	b.Helper()
	s := parse(b, b.flow, seg{flow: b.flow, seq: seq, ack: ack, flags: flags, opts: opts}.bytes(), false)
	r = new(bpfmodel.Record)
	v, sent := b.tab.Outbound(s, b.now, r)
	if !sent {
		return v, nil
	}
	return v, r
}

func (b *bench) announce(flags bpfmodel.Flags, isn, ack uint32, opts ...byte) (bpfmodel.Verdict, *bpfmodel.Record) {
	a := bpfmodel.Record{Tuple: b.tuple(), Seq: isn, Ack: ack, Flags: flags}
	a.OptLen = uint8(copy(a.Opts[:], opts))
	r := new(bpfmodel.Record)
	v, sent := b.tab.Announce(&a, b.now, r)
	if !sent {
		return v, nil
	}
	return v, r
}

func (b *bench) want(what string, v, want bpfmodel.Verdict, got, wanted uint32) {
	b.Helper()
	if v != want || got != wanted {
		b.Errorf("%s: %s %#x, want %s %#x", what, v, got, want, wanted)
	}
}

// accept opens a connection passively and leaves the remote's first ack to come.
func (b *bench) accept() {
	b.Helper()
	b.announce(syn|ackF, isnPVM, isnCli+1, tsOpt(tsPVM, 9)...)
	if v, r := b.out(syn|ackF, isnSVM, isnCli+1, tsOpt(tsSVM, 9)...); v != bpfmodel.RecordOut {
		b.Fatalf("SYN|ACK: %s %+v", v, r)
	}
}

// establish opens it wholly.
func (b *bench) establish() {
	b.Helper()
	b.accept()
	v, h := b.in(ackF, isnPVM+1)
	b.want("third segment", v, bpfmodel.Delivered, h.Ack(), isnSVM+1)
	if n := len(conns(b.tab)); n != 1 {
		b.Fatalf("%d connections, want 1", n)
	}
}

func TestPassiveOpen(t *testing.T) {
	b := newBench(t, 1, 1)
	b.accept()
	v, r := b.announce(syn|ackF, isnPVM, isnCli+1, tsOpt(tsPVM+7, 9)...)
	if v != bpfmodel.RecordOut || r == nil {
		t.Fatalf("repeated announcement: %s", v)
	}
	b.want("repeated announcement", v, bpfmodel.RecordOut, r.Seq, isnPVM)
	b.want("its ack", v, bpfmodel.RecordOut, r.Ack, isnCli+1)
	b.want("its TSval", v, bpfmodel.RecordOut, binary.BigEndian.Uint32(r.Opts[2:]), tsPVM)
	// It may echo a second SYN|ACK of the PVM, whose timer was slower than the SVM's by 3 ticks.
	b.out(syn|ackF, isnSVM, isnCli+1, tsOpt(tsSVM+10, 9)...)
	v, h := b.in(ackF, isnPVM+5, slices.Concat(tsOpt(9, tsPVM+13), sackOpt(0, 7))...)
	b.want("ack", v, bpfmodel.Delivered, h.Ack(), isnSVM+5)
	o := h.Options()
	b.want("TSecr", v, bpfmodel.Delivered, binary.BigEndian.Uint32(o[6:]), tsSVM+10)
	b.want("SACK", v, bpfmodel.Delivered, binary.BigEndian.Uint32(o[16:]), skew+7)
	v, r = b.out(ackF, isnSVM+9, isnCli+1, tsOpt(tsSVM+20, 9)...)
	b.want("segment", v, bpfmodel.RecordOut, r.Seq, 7)
	b.want("cli_ack", v, bpfmodel.RecordOut, r.CliAck, isnPVM+5)
	b.want("TSval", v, bpfmodel.RecordOut, binary.BigEndian.Uint32(r.Opts[2:]), tsPVM+20)
	v, _ = b.announce(syn|ackF, isnPVM, isnCli+1)
	b.want("late announcement", v, bpfmodel.RecordIn, 0, 0)
}

// QEMU's filter-rewriter does not translate active opens at all.
func TestActiveOpen(t *testing.T) {
	b := newBench(t, 1, 1)
	v, r := b.out(syn, isnSVM, 0)
	if v != bpfmodel.Pending || r == nil || !r.Inherited || r.Seq != isnSVM {
		t.Fatalf("SYN before the announcement: %s %+v", v, r)
	}
	if v, r = b.announce(syn, isnPVM, 0); r == nil {
		t.Fatalf("announcement: %s", v)
	}
	b.want("announcement", v, bpfmodel.RecordOut, r.Seq, isnPVM)
	v, r = b.out(syn, isnSVM, 0)
	b.want("SYN again", v, bpfmodel.RecordOut, r.Seq, isnPVM)
	v, h := b.in(syn|ackF, isnPVM+1)
	b.want("SYN|ACK", v, bpfmodel.Delivered, h.Ack(), isnSVM+1)
	v, r = b.out(ackF, isnSVM+1, isnCli+1)
	b.want("ack", v, bpfmodel.RecordOut, r.Seq, isnPVM+1)
}

func TestSimultaneousOpen(t *testing.T) {
	for _, tc := range []struct {
		name  string
		steps func(b *bench) *bpfmodel.Record
	}{
		{"SYNs paired", func(b *bench) *bpfmodel.Record {
			b.announce(syn, isnPVM, 0)
			b.out(syn, isnSVM, 0)
			b.out(syn|ackF, isnSVM, isnCli+1)
			_, r := b.announce(syn|ackF, isnPVM, isnCli+1)
			return r
		}},
		{"announced SYN lost", func(b *bench) *bpfmodel.Record {
			b.announce(syn|ackF, isnPVM, isnCli+1)
			b.out(syn, isnSVM, 0)
			_, r := b.out(syn|ackF, isnSVM, isnCli+1)
			return r
		}},
		{"announcements reversed", func(b *bench) *bpfmodel.Record {
			b.out(syn, isnSVM, 0)
			b.announce(syn|ackF, isnPVM, isnCli+1)
			b.announce(syn, isnPVM, 0)
			_, r := b.out(syn|ackF, isnSVM, isnCli+1)
			return r
		}},
		{"all announced late", func(b *bench) *bpfmodel.Record {
			b.out(syn, isnSVM, 0)
			b.out(syn|ackF, isnSVM, isnCli+1)
			_, r := b.announce(syn|ackF, isnPVM, isnCli+1)
			return r
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBench(t, 1, 1)
			r := tc.steps(b)
			if r == nil || r.Inherited {
				t.Fatalf("no record of the SYN|ACK: %+v", r)
			}
			b.want("seq", "", "", r.Seq, isnPVM)
			b.want("ack", "", "", r.Ack, isnCli+1)
			v, h := b.in(syn|ackF, isnPVM+1)
			b.want("SYN|ACK", v, bpfmodel.Delivered, h.Ack(), isnSVM+1)
			if len(conns(b.tab)) != 1 {
				t.Error("not established")
			}
		})
	}
}

// An ack of the remote that overtakes the SVM's SYN|ACK leaves QEMU's
// filter-rewriter with a wrong offset until the next checkpoint.
func TestOvertakingAck(t *testing.T) {
	b := newBench(t, 1, 1)
	b.announce(syn|ackF, isnPVM, isnCli+1)
	v, h := b.in(ackF, isnPVM+1)
	b.want("early ack", v, bpfmodel.Delivered, h.Ack(), isnPVM+1)
	b.out(syn|ackF, isnSVM, isnCli+1)
	v, h = b.in(ackF, isnPVM+100)
	b.want("ack of data", v, bpfmodel.Delivered, h.Ack(), isnSVM+100)
}

// A checkpoint in mid-handshake does the same to it.
func TestCheckpointInHandshake(t *testing.T) {
	b := newBench(t, 1, 1)
	b.accept()
	b.tab.Reset() // the SVM is the PVM now
	v, h := b.in(ackF, 5)
	b.want("ack", v, bpfmodel.Delivered, h.Ack(), 5)
	v, r := b.out(ackF, isnPVM+1, isnCli+1)
	if v != bpfmodel.RecordOut || !r.Inherited || r.Inc != 0 || r.Seq != isnPVM+1 {
		t.Errorf("segment: %s %+v", v, r)
	}
}

// P announces after a checkpoint what it holds for half open. The SVM may be through with the
// handshake: it transmits no SYN any more, and its offset is 0.
func TestCheckpointBehindHandshake(t *testing.T) {
	b := newBench(t, 1, 1)
	b.accept()
	b.tab.Reset()
	if v, r := b.announce(syn|ackF, isnPVM, isnCli+1); v != bpfmodel.RecordIn || r != nil {
		t.Fatalf("announcement: %s %+v", v, r)
	}
	v, h := b.in(ackF, isnPVM+1)
	b.want("ack", v, bpfmodel.Delivered, h.Ack(), isnPVM+1)
	for range 2 {
		v, r := b.out(ackF, isnPVM+1, isnCli+1)
		if v != bpfmodel.RecordOut || !r.Inherited || r.Inc != 0 || r.Seq != isnPVM+1 {
			t.Fatalf("segment: %s %+v", v, r)
		}
		b.in(ackF, isnPVM+1)
	}
	_, r := b.out(ackF, isnPVM+1, isnCli+1)
	b.want("the remote's ack", bpfmodel.RecordOut, bpfmodel.RecordOut, r.CliAck, isnPVM+1)
	if v, r := b.out(rst, isnPVM+1, 0); v != bpfmodel.RecordOut || !r.Inherited || r.Seq != isnPVM+1 {
		t.Errorf("RST: %s %+v", v, r)
	}
	// The ACK of the handshake was lost on the way to both.
	v, r = b.out(syn|ackF, isnPVM, isnCli+1)
	b.want("SYN|ACK", v, bpfmodel.RecordOut, r.Inc, isnPVM)
}

// A tuple used again: no number of the first connection reaches the second.
func TestTupleReuse(t *testing.T) {
	var nextPVM, nextSVM, nextCli uint32 = 0x900, 0xf0000000, isnCli + 0x10000
	t.Run("passive", func(t *testing.T) {
		b := newBench(t, 1, 1)
		b.establish()
		v, r := b.announce(syn|ackF, nextPVM, nextCli+1)
		if v != bpfmodel.RecordIn || r != nil {
			t.Fatalf("announcement: %s %+v", v, r)
		}
		v, r = b.out(ackF|fin, isnSVM+4, isnCli+1)
		b.want("what the SVM still transmits on the first", v, bpfmodel.RecordOut, r.Seq, 2)
		v, r = b.out(syn|ackF, nextSVM, nextCli+1)
		b.want("SYN|ACK", v, bpfmodel.RecordOut, r.Seq, nextPVM)
		b.want("incarnation", v, bpfmodel.RecordOut, r.Inc, nextPVM)
		if v, r = b.announce(syn|ackF, isnPVM, isnCli+1); r != nil {
			t.Errorf("stale announcement: %s %+v", v, r)
		}
	})
	t.Run("active", func(t *testing.T) {
		b := newBench(t, 1, 1)
		b.announce(syn, isnPVM, 0)
		b.out(syn, isnSVM, 0)
		b.in(syn|ackF, isnPVM+1)
		if v, r := b.out(syn, nextSVM, 0); v != bpfmodel.Pending || !r.Inherited {
			t.Fatalf("SYN: %s %+v", v, r)
		}
		if v, r := b.announce(syn, isnPVM, 0); r != nil {
			t.Fatalf("the first one's announcement again: %s %+v", v, r)
		}
		_, r := b.announce(syn, nextPVM, 0)
		if r == nil || r.Seq != nextPVM || r.Inc != nextPVM {
			t.Fatalf("announcement: %+v", r)
		}
	})
	t.Run("active, refused", func(t *testing.T) {
		b := newBench(t, 1, 1)
		b.announce(syn, isnPVM, 0)
		b.out(syn, isnSVM, 0)
		v, h := b.in(rst|ackF, isnPVM+1)
		b.want("refusal", v, bpfmodel.Delivered, h.Ack(), isnSVM+1)
		if _, r := b.announce(syn, nextPVM, 0); r != nil {
			t.Fatalf("paired with the first SYN: %+v", r)
		}
		v, r := b.out(syn, nextSVM, 0)
		b.want("second SYN", v, bpfmodel.RecordOut, r.Seq, nextPVM)
	})
}

// A RST|ACK with sequence number 0 refuses a SYN: it is of no incarnation.
func TestRefusal(t *testing.T) {
	b := newBench(t, 1, 1)
	b.establish()
	v, r := b.out(rst|ackF, 0, isnCli+1)
	if v != bpfmodel.RecordOut || !r.Inherited || r.Seq != 0 {
		t.Errorf("refusal: %s %+v", v, r)
	}
}

// R11: whatever comes in, an entry with an offset stays.
func TestFloodEvictsHalvesOnly(t *testing.T) {
	b := newBench(t, 8, 16)
	kept := b.flow
	b.establish()
	for i := range 1000 {
		b.flow.rport = uint16(5000 + i)
		if i%2 == 0 {
			b.announce(syn|ackF, isnPVM, uint32(i)+1)
		}
		b.out(syn|ackF, isnSVM, uint32(i)+1)
	}
	n := 0
	for range b.tab.Halves() {
		n++
	}
	if n != 16 {
		t.Errorf("%d half-open entries, want 16", n)
	}
	b.flow = kept
	v, h := b.in(ackF, isnPVM+3)
	b.want("ack of the old connection", v, bpfmodel.Delivered, h.Ack(), isnSVM+3)

	// What was evicted costs one more announcement.
	b.flow.rport = 5000
	v, r := b.out(syn|ackF, isnSVM, 1)
	if v != bpfmodel.Pending || r != nil {
		t.Errorf("evicted: %s %+v", v, r)
	}
	if _, r = b.announce(syn|ackF, isnPVM, 1); r == nil || r.Seq != isnPVM {
		t.Errorf("announced again: %+v", r)
	}
}

// R11: a full table drops, and the handshake can be completed later.
func TestConnFull(t *testing.T) {
	b := newBench(t, 1, 4)
	b.establish()
	b.flow.rport++
	b.accept()
	if v, _ := b.in(ackF, isnPVM+1); v != bpfmodel.ConnFull {
		t.Fatalf("with a full table: %s", v)
	}
	if v, _ := b.in(rst, 0); v != bpfmodel.Delivered {
		t.Fatalf("RST with a full table: %s", v)
	}
	b.tab.Sweep(100, 10, 10)
	v, h := b.in(ackF, isnPVM+1)
	b.want("with room", v, bpfmodel.Delivered, h.Ack(), isnSVM+1)
}

func TestSweep(t *testing.T) {
	const linger, idle = 10 * time.Nanosecond, 100 * time.Nanosecond
	for _, tc := range []struct {
		name  string
		steps func(b *bench)
		gone  int64 // first moment at which the entry is gone
	}{
		{"idle", func(*bench) {}, 101},
		{"one FIN", func(b *bench) { b.out(fin|ackF, isnSVM+1, 0) }, 101},
		{"the remote's FIN", func(b *bench) { b.in(fin|ackF, 0) }, 101},
		{"both FINs", func(b *bench) { b.out(fin|ackF, isnSVM+1, 0); b.in(fin|ackF, 0) }, 11},
		{"late segment", func(b *bench) {
			b.out(fin|ackF, isnSVM+1, 0)
			b.in(fin|ackF, 0)
			b.now = 5
			b.in(ackF, 1)
		}, 16},
		{"the guest's RST", func(b *bench) { b.out(rst, isnSVM+1, 0) }, 11},
		{"the remote's RST", func(b *bench) { b.in(rst, 0) }, 11},
		{"RST not believed", func(b *bench) { b.in(rst, 0); b.out(ackF, isnSVM+1, 0) }, 101},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBench(t, 1, 1)
			b.establish()
			tc.steps(b)
			if n := b.tab.Sweep(tc.gone-1, linger, idle); n != 0 {
				t.Errorf("gone at %d already", tc.gone-1)
			}
			if n := b.tab.Sweep(tc.gone, linger, idle); n != 1 {
				t.Errorf("still there at %d", tc.gone)
			}
		})
	}
}

// After a takeover what has an offset is translated, and nothing else (R22).
func TestAlone(t *testing.T) {
	b := newBench(t, 1, 1)
	alone := func(toGuest bool) bpfmodel.TCP {
		s := parse(t, b.flow, seg{flow: b.flow, toGuest: toGuest, seq: 70, ack: 90, flags: ackF}.bytes(), toGuest)
		b.tab.Alone(s, toGuest, false, 0)
		return s.TCP()
	}
	b.accept()
	if in, out := alone(true), alone(false); in.Ack() != 90 || out.Seq() != 70 {
		t.Errorf("half open: ack %d, seq %d", in.Ack(), out.Seq())
	}
	b.in(ackF, isnPVM+1)
	if in, out := alone(true), alone(false); in.Ack() != 90+skew || in.Seq() != 70 ||
		out.Seq() != 70-skew || out.Ack() != 90 {
		t.Errorf("established: in %d %d, out %d %d", in.Seq(), in.Ack(), out.Seq(), out.Ack())
	}
}

// A partial checksum is the pseudo header's: no number of TCP's is in it.
func TestPartialChecksum(t *testing.T) {
	b := newBench(t, 1, 1)
	b.establish()
	s := parse(t, b.flow, seg{flow: b.flow, seq: isnSVM + 1, flags: ackF}.bytes(), false)
	s.Partial = true
	was := s.TCP().Checksum()
	b.tab.Outbound(s, 0, new(bpfmodel.Record))
	if s.TCP().Seq() != isnPVM+1 || s.TCP().Checksum() != was {
		t.Errorf("seq %#x, checksum %#x, was %#x", s.TCP().Seq(), s.TCP().Checksum(), was)
	}
}

// A TSecr of 0 means that there is none; without ACK the numbers mean nothing.
func TestNotTranslated(t *testing.T) {
	b := newBench(t, 1, 1)
	b.establish()
	if _, h := b.in(ackF, 1, tsOpt(9, 0)...); binary.BigEndian.Uint32(h.Options()[6:]) != 0 {
		t.Errorf("TSecr 0 became %#x", h.Options()[6:10])
	}
	if _, h := b.in(rst, 77, tsOpt(9, 4)...); h.Ack() != 77 || h.Options()[9] != 4 {
		t.Errorf("RST without ACK: ack %d, options % x", h.Ack(), h.Options())
	}
}

// Options that do not parse are left alone from there on, as receivers do.
func TestBrokenOptions(t *testing.T) {
	for _, opts := range [][]byte{
		{8, 10, 0, 0}, {8}, {1, 1, 1, 8}, {5, 1, 0, 0}, {8, 9, 0, 0, 0, 0, 0, 0, 9}, {0, 8, 10, 0, 0, 0, 1, 0, 0, 0, 1},
		{5, 6, 0, 0, 0, 1},
	} {
		b := newBench(t, 1, 1)
		b.establish()
		if _, h := b.in(ackF, 1, opts...); !slices.Equal(h.Options()[:len(opts)], opts) {
			t.Errorf("% x became % x", opts, h.Options())
		}
	}
}

// The way of an established connection's segments allocates nothing.
func TestAllocations(t *testing.T) {
	b := newBench(t, 1, 1)
	b.establish()
	opts := slices.Concat(tsOpt(1, 2), sackOpt(1, 2, 3, 4))
	in := seg{flow: b.flow, toGuest: true, flags: ackF, opts: opts}.bytes()
	out := seg{flow: b.flow, seq: isnSVM + 1, flags: ackF, opts: opts}.bytes()
	var s bpfmodel.Segment
	var r bpfmodel.Record
	if n := testing.AllocsPerRun(100, func() {
		s.Parse(in, true)
		b.tab.Inbound(&s, 0)
		s.Parse(out, false)
		b.tab.Outbound(&s, 0, &r)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
