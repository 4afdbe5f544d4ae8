// SPDX-License-Identifier: Apache-2.0

package bpfmodel_test

import (
	"bytes"
	"encoding/binary"
	"maps"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"pgregory.net/rapid"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
	"github.com/lockstep-ft/lockstep/compare"
)

const (
	drop     = 2
	redirect = 7
	next     = 1<<32 - 1

	keyGen, epoch = 7, 9
	etherHeader   = 14
	preAt         = etherHeader
)

var (
	ownMAC  = [6]byte{2, 0, 0, 0, 1, 1}
	peerMAC = [6]byte{2, 0, 0, 0, 1, 2}
	le      = binary.LittleEndian
)

// duel puts the same frames through the kernel and the model.
type duel struct {
	*rapid.T
	k              *kernel
	tab            *bpfmodel.Table
	flows          []flow
	pvm, svm, cli  []uint32 // ISNs
	now            int64
	verdict        uint32 // of the kernel, for the last frame
	out            []byte
	names          []string
	what           string
	frame, changed []byte // before and after the model
}

func (d *duel) expect(what string, got, want any) {
	d.Helper()
	if got != want {
		d.Fatalf("%s: %s: kernel %v, model %v\nframe % x", d.what, what, got, want, d.frame)
	}
}

// pass gives frame to the kernel; the model works on a copy.
func (d *duel) pass(what string, prog *ebpf.Program, frame []byte) *bpfmodel.Segment {
	d.Helper()
	d.now++
	d.what, d.frame, d.changed = what, frame, slices.Clone(frame)
	d.verdict, d.out = d.k.run(d.T, prog, frame)
	d.names = d.k.moved(d.T)
	return new(bpfmodel.Segment)
}

// judge compares verdict and counters.
func (d *duel) judge(verdict uint32, names ...string) {
	d.Helper()
	if d.verdict != verdict {
		d.Fatalf("%s: kernel %d %v, model %d %v\nframe % x", d.what, d.verdict, d.names, verdict, names, d.frame)
	}
	if !slices.Equal(d.names, names) {
		d.Fatalf("%s: kernel counted %v, model %v\nframe % x", d.what, d.names, names, d.frame)
	}
}

func (d *duel) sameBytes(what string, got, want []byte) {
	d.Helper()
	if !bytes.Equal(got, want) {
		d.Fatalf("%s: %s:\nkernel % x\nmodel  % x\nframe  % x", d.what, what, got, want, d.frame)
	}
}

func (d *duel) sameTables() {
	d.Helper()
	c := conns(d.tab)
	for key, v := range c {
		v.Last = 0
		c[key] = v
	}
	if got := d.k.conns(d.T); !maps.Equal(got, c) {
		d.Fatalf("%s: ls_conn:\nkernel %+v\nmodel  %+v\nframe % x", d.what, got, c, d.frame)
	}
	h := make(map[bpfmodel.Tuple]bpfmodel.Half)
	for key, v := range d.tab.Halves() {
		v.Last = 0
		h[key] = v
	}
	if got := d.k.halves(d.T); !maps.Equal(got, h) {
		d.Fatalf("%s: ls_half:\nkernel %+v\nmodel  %+v\nframe % x", d.what, got, h, d.frame)
	}
}

// inbound: the peer link brings a mirrored frame.
func (d *duel) inbound(frame []byte) bpfmodel.Verdict {
	s := d.pass("inbound", d.k.LsSecIn, frame)
	v := bpfmodel.Delivered
	if s.Parse(d.changed, true) == bpfmodel.ClassTCP {
		v = d.tab.Inbound(s, d.now)
	}
	if v == bpfmodel.Delivered {
		d.judge(redirect, string(v))
		d.sameBytes("frame", d.out, d.changed)
	} else {
		d.judge(drop, string(v))
	}
	return v
}

// outbound: the SVM transmits something. It returns what Table.Outbound does, and the record.
func (d *duel) outbound(frame []byte) (v bpfmodel.Verdict, sent bool, want bpfmodel.Record) {
	s := d.pass("outbound", d.k.LsSecOut, frame)
	switch class := s.Parse(d.changed, false); class {
	case bpfmodel.ClassLink, bpfmodel.ClassDatagram:
		d.uncompared(class, s)
		return v, sent, want
	case bpfmodel.ClassMalformed:
		d.judge(drop, "malformed")
		return v, sent, want
	}
	if v, sent = d.tab.Outbound(s, d.now, &want); !sent {
		d.judge(drop, string(v))
		return v, sent, want
	}
	d.judge(redirect, string(v))
	between := d.sameRecord(&want, s.Payload())
	d.sameBytes("headers", between, d.changed[preAt+4:][:len(between)])
	evs := d.k.events(d.T)
	d.expect("copies", len(evs), min(len(s.Payload()), 1))
	if len(evs) == 0 {
		return v, sent, want
	}
	ev := evs[0]
	inherited := ev.Flags&uint8(bpf.LockstepLsEvFlagLS_EV_INHERITED) != 0
	got := bpfmodel.Record{
		Tuple: modelTuple(ev.T), Inherited: inherited, Inc: ev.Inc, Seq: ev.Seq, End: want.End, Ack: ev.Ack,
		Win: ev.Win, Flags: bpfmodel.Flags(ev.TcpFlags), CliAck: ev.CliAck, OptLen: want.OptLen, Opts: want.Opts,
	}
	d.expect("type", ev.Type, uint32(bpf.LockstepLsEvTypeLS_EV_COPY))
	d.expect("copy", got, want)
	d.expect("copied payload", int(ev.Paylen), len(s.Payload()))
	d.sameBytes("copy", d.k.kept(d.T, ev.Slot), d.changed)
	return v, sent, want
}

// uncompared: what is not TCP to the model is a datagram to the kernel, or link
// business. It becomes one record, and no connection hears of it.
func (d *duel) uncompared(class bpfmodel.Class, s *bpfmodel.Segment) {
	d.Helper()
	switch {
	case class == bpfmodel.ClassLink && !s.Asks:
		d.judge(drop, "svm_only")
		return
	case class == bpfmodel.ClassLink:
		d.judge(redirect, "neigh_out")
		d.k.record(d.T, bpf.LockstepLsRecTypeLS_REC_NEIGH, d.out)
	default:
		d.judge(redirect, "record_out")
		r, _ := d.k.record(d.T, bpf.LockstepLsRecTypeLS_REC_DGRAM, d.out)
		d.expect("flags of a datagram", r.Flags|r.TcpFlags|r.Optlen, uint8(0))
		d.expect("tuple of a datagram", modelTuple(r.T), s.Tuple)
		d.expect("position of a datagram", [2]uint32{r.Seq, uint32(r.Frag)}, [2]uint32{s.Pos, uint32(s.Frag)})
	}
	d.expect("copies", len(d.k.events(d.T)), 0)
}

// sameRecord holds the record frame that the kernel made against want.
func (d *duel) sameRecord(want *bpfmodel.Record, payload []byte) (between []byte) {
	d.Helper()
	r, between := d.k.record(d.T, bpf.LockstepLsRecTypeLS_REC_DATA, d.out)
	got := bpfmodel.Record{
		Tuple: modelTuple(r.T), Inherited: r.Flags&uint8(bpf.LockstepLsRecFlagLS_REC_INHERITED) != 0,
		Inc: r.Inc, Seq: r.Seq, End: r.End, Ack: r.Ack, Win: r.Win, Flags: bpfmodel.Flags(r.TcpFlags),
		OptLen: r.Optlen, Opts: r.Opts, CliAck: want.CliAck, // which is no part of a record
	}
	d.expect("record", got, *want)
	pos := want.Seq
	if want.Flags&syn != 0 {
		pos++
	}
	d.expect("sum", compare.Sum(r.Sum), d.k.digest.Sum(pos, payload))
	return between
}

// announce: P announces the PVM's SYN. It returns what Table.Announce does, and the answer.
func (d *duel) announce(a *bpfmodel.Record) (v bpfmodel.Verdict, sent bool, want bpfmodel.Record) {
	d.pass("announcement", d.k.LsSecIn, d.k.announcement(d.T, a))
	if v, sent = d.tab.Announce(a, d.now, &want); !sent {
		d.judge(drop, string(v))
		return v, sent, want
	}
	d.judge(redirect, string(v))
	d.sameRecord(&want, nil)
	return v, sent, want
}

// alone: the same, after a takeover.
func (d *duel) alone(toGuest bool, frame []byte) {
	d.k.mode(d.T, bpf.LockstepLsModeLS_MODE_SOLO)
	prog := d.k.LsSecOut
	if toGuest {
		prog = d.k.LsSecGate
	}
	s := d.pass("alone", prog, frame)
	if s.Parse(d.changed, toGuest) == bpfmodel.ClassTCP {
		d.tab.Alone(s, toGuest, false, d.now)
	}
	d.judge(next, "passed")
	d.sameBytes("frame", d.out, d.changed)
	d.k.mode(d.T, bpf.LockstepLsModeLS_MODE_RUN)
}

var flagSets = rapid.OneOf(
	rapid.SampledFrom([]bpfmodel.Flags{ackF, ackF | psh, ackF | fin, syn | ackF, syn, rst, rst | ackF}),
	rapid.Map(rapid.Byte(), func(b byte) bpfmodel.Flags { return bpfmodel.Flags(b) }),
)

func (d *duel) step() {
	switch rapid.SampledFrom([]string{"in", "in", "out", "out", "out", "other", "announce", "open", "alone", "error", "error", "checkpoint", "idle"}).Draw(d.T, "step") {
	case "in":
		d.inbound(d.damaged(d.framed(d.segment(true))))
	case "out":
		d.outbound(d.damaged(d.framed(d.segment(false))))
	case "other":
		if rapid.Bool().Draw(d.T, "to guest") {
			d.inbound(d.other(true))
		} else {
			d.outbound(d.other(false))
		}
	case "announce":
		flags := rapid.SampledFrom([]bpfmodel.Flags{syn, syn | ackF, syn | ackF}).Draw(d.T, "flags")
		d.announceSyn(rapid.SampledFrom(d.flows).Draw(d.T, "flow"), flags)
	case "open":
		d.open()
	case "alone":
		toGuest := rapid.Bool().Draw(d.T, "to guest")
		d.alone(toGuest, d.framed(d.segment(toGuest)))
	case "error":
		d.icmpError(rapid.Bool().Draw(d.T, "to guest"), rapid.Bool().Draw(d.T, "alone"))
	case "checkpoint":
		if rapid.IntRange(0, 5).Draw(d.T, "now") == 0 {
			d.tab.Reset()
			d.k.reset(d.T)
		}
	}
	d.sameTables()
}

// R9, R10, R11: kernel and model agree on verdict, counter, output bytes, record,
// copy and tables, whatever comes.
func TestKernel(t *testing.T) {
	const conns, halves = 1, 4096
	k := loadKernel(t, conns, halves)
	rapid.Check(t, func(t *rapid.T) {
		k.reset(t)
		isns := rapid.SliceOfN(edge(), 2, 2)
		d := &duel{
			T: t, k: k, tab: bpfmodel.New(conns, halves, 65536),
			pvm: isns.Draw(t, "isns pvm"), svm: isns.Draw(t, "isns svm"), cli: isns.Draw(t, "isns cli"),
		}
		for i := range conns + 1 {
			f := drawFlow(t)
			f.gport = uint16(i)
			d.flows = append(d.flows, f)
		}
		for range rapid.IntRange(1, 100).Draw(t, "steps") {
			d.step()
		}
	})
}

// R11 in the kernel: a SYN flood evicts half-open entries only.
func TestKernelFlood(t *testing.T) {
	const conns, halves = 4, 1024
	k := loadKernel(t, conns, halves)
	f := flow{guest: 1, rem: 2, gport: 80}
	a := bpfmodel.Record{Tuple: f.tuple(), Seq: isnPVM, Ack: isnCli + 1, Flags: syn | ackF}
	k.run(t, k.LsSecIn, k.announcement(t, &a))
	k.run(t, k.LsSecOut, seg{flow: f, seq: isnSVM, ack: isnCli + 1, flags: syn | ackF}.bytes())
	ack := seg{flow: f, toGuest: true, seq: isnCli + 1, ack: isnPVM + 1, flags: ackF}
	want := ack
	want.ack = isnSVM + 1
	k.run(t, k.LsSecIn, ack.bytes())
	kept := k.conns(t)
	if len(kept) != 1 {
		t.Fatalf("%d connections, want 1", len(kept))
	}
	for i := range 4 * halves {
		f := f
		f.rem, f.rport = 3, uint16(i)
		if verdict, _ := k.run(t, k.LsSecOut, seg{flow: f, seq: isnSVM, ack: 9, flags: syn | ackF}.bytes()); verdict != drop {
			t.Fatalf("SYN|ACK %d: verdict %d", i, verdict)
		}
	}
	if n := len(k.halves(t)); n > halves {
		t.Errorf("%d half-open entries, want %d at most", n, halves)
	}
	if got := k.conns(t); !maps.Equal(got, kept) {
		t.Errorf("connections %+v, were %+v", got, kept)
	}
	if _, out := k.run(t, k.LsSecIn, ack.bytes()); !bytes.Equal(out, want.bytes()) {
		t.Errorf("ack of the old connection:\n % x, want\n % x", out, want.bytes())
	}
}
