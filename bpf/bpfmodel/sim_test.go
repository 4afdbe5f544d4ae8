// SPDX-License-Identifier: Apache-2.0

package bpfmodel_test

import (
	"bytes"
	"fmt"
	"os"
	"testing"

	"pgregory.net/rapid"

	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
	"github.com/lockstep-ft/lockstep/rewriter"
)

// newTable honours the mutation that TestMutations asks for.
func newTable(conns, halves int) *bpfmodel.Table {
	tab := bpfmodel.New(conns, halves, halves)
	if os.Getenv(mutationEnv) == "R9" {
		tab.Guess()
	}
	return tab
}

// How a connection begins.
type opening int

const (
	passive opening = iota // the remote connects
	active                 // the guest connects
	both                   // both do
)

// host is one end's numbers.
type host struct {
	isn, ts uint32
	hasTS   bool
}

// life is one incarnation of a connection, as the test knows it to be.
type life struct {
	open          opening
	pvm, svm, cli host

	announced      []bpfmodel.Record // by P; the link repeats and reorders them
	annSyn, annAck bool              // the PVM's SYN, SYN|ACK was announced to S
	svmSyn, svmAck bool              // the SVM transmitted its SYN, SYN|ACK
	pvmTS, svmTS   uint32            // TSvals that make ts_off: the first ones
	keptTS         uint32            // TSval of the SVM's last SYN before it was established
	keptAck        bool              // that was a SYN|ACK
	shown          bool              // the PVM's SYN left: the remote knows its ISN
	established    bool              // the remote acked: in ls_conn
	cliAck         uint32
	gone           bool // swept
	closed         bool
}

func (l *life) kept() bool        { return l.established && !l.gone } // in ls_conn
func (l *life) reported() bool    { return l.annSyn || l.annAck }
func (l *life) transmitted() bool { return l.svmSyn || l.svmAck }
func (l *life) off() uint32       { return l.svm.isn - l.pvm.isn }
func (l *life) paired() bool      { return l.annSyn && l.svmSyn || l.annAck && l.svmAck }
func (l *life) tsOff() uint32 {
	if !l.pvm.hasTS || !l.svm.hasTS {
		return 0
	}
	return l.svmTS - l.pvmTS
}

// world is a remote, two guests and P around the table under test.
type world struct {
	*rapid.T
	tab      *bpfmodel.Table
	duel     *duel // the same table and the kernel; nil: the table alone
	flow     flow
	now      uint32          // ms, also the unit of timestamps
	cur, old *life           // the SVM lives in old until its first SYN of cur
	used     map[uint32]bool // ISNs
	moved    bool            // S received an announcement of an incarnation after old
}

func (w *world) String() string {
	cur := *w.cur
	cur.announced = nil
	return fmt.Sprintf("%+v", cur)
}

func (w *world) number(label string) uint32 { return edge().Draw(w.T, label) }

// begin starts another incarnation. ISNs differ from earlier ones and are not 0,
// which stands for none in struct ls_half.
func (w *world) begin() {
	isn := func(label string) uint32 {
		return edge().Filter(func(n uint32) bool { return !w.used[n] }).Draw(w.T, label)
	}
	l := &life{open: opening(rapid.IntRange(0, 2).Draw(w.T, "opening"))}
	l.pvm.isn = isn("isn pvm")
	l.svm.isn = isn("isn svm")
	l.cli.isn = isn("isn cli")
	l.pvm.ts, l.svm.ts, l.cli.ts = w.number("ts pvm"), w.number("ts svm"), w.number("ts cli")
	w.used[l.pvm.isn], w.used[l.svm.isn], w.used[l.cli.isn] = true, true, true
	has := rapid.SampledFrom([][2]bool{{true, true}, {true, true}, {false, false}, {true, false}, {false, true}})
	hasTS := has.Draw(w.T, "timestamps")
	l.pvm.hasTS, l.svm.hasTS, l.cli.hasTS = hasTS[0], hasTS[1], hasTS[0]
	if w.cur == nil || w.cur.transmitted() {
		w.old, w.moved = w.cur, false
	}
	w.cur = l
}

// synAck reports whether the guest's next SYN is a SYN|ACK.
func (w *world) synAck(before bool) bool {
	switch w.cur.open {
	case passive:
		return true
	case active:
		return false
	}
	return before && rapid.Bool().Draw(w.T, "syn|ack")
}

// options lays options out with fillers between, at odd offsets too.
func (w *world) options(parts ...[]byte) (layout []int) {
	for range parts {
		layout = append(layout, rapid.IntRange(0, 2).Draw(w.T, "fill"))
	}
	return layout
}

func join(layout []int, parts ...[]byte) (o []byte) {
	for i, p := range parts {
		for range layout[i] {
			o = append(o, 1)
		}
		o = append(o, p...)
	}
	return o
}

func (h host) opt(at, ecr uint32) []byte {
	if !h.hasTS {
		return nil
	}
	return tsOpt(h.ts+at, ecr)
}

// synOpts are the options of a guest's SYN: equal but for the timestamp.
func (h host) synOpts(at uint32) []byte {
	return join([]int{0, 1}, []byte{2, 4, 5, 180}, h.opt(at, 0))
}

func (w *world) expect(what string, got, want any) {
	w.Helper()
	if got != want {
		w.Fatalf("%s: %v, want %v\n%v", what, got, want, w)
	}
}

func (w *world) expectFrame(what string, got []byte, want seg) {
	w.Helper()
	if !bytes.Equal(got, want.bytes()) {
		w.Fatalf("%s:\n % x, want\n % x\n%v", what, got, want.bytes(), w)
	}
}

// in mirrors a segment of the remote to S and holds what the SVM gets against want.
func (w *world) in(what string, s, want seg) {
	w.Helper()
	v, frame := w.inbound(s)
	w.expect(what, v, bpfmodel.Delivered)
	w.expectFrame(what, frame, want)
}

// out lets the SVM transmit s and holds the record against want, nil when none is due.
func (w *world) out(what string, s seg, want *seg, inc, cliAck uint32, verdict bpfmodel.Verdict) {
	w.Helper()
	v, sent, r, frame := w.outbound(s)
	w.expect(what, v, verdict)
	w.expect(what+": sent", sent, want != nil)
	if want == nil {
		return
	}
	w.expectFrame(what, frame, *want)
	w.expect(what+": record", r, recordOf(*want, inc, cliAck))
}

// recordOf is the record of a segment that is in PVM numbering; inc 0: inherited.
func recordOf(s seg, inc, cliAck uint32) bpfmodel.Record {
	r := bpfmodel.Record{
		Tuple: s.flow.tuple(), Inc: inc, Inherited: inc == 0, Seq: s.seq, Ack: s.ack,
		End: s.seq + uint32(len(s.payload)), Win: s.win, Flags: s.flags, CliAck: cliAck,
	}
	if s.flags&syn != 0 {
		r.End++
	}
	if s.flags&fin != 0 {
		r.End++
	}
	r.OptLen = uint8(copy(r.Opts[:], s.opts)+3) &^ 3
	return r
}

// guestSyn is a guest's SYN or SYN|ACK.
func (w *world) guestSyn(h host, synAck bool) seg {
	s := seg{flow: w.flow, seq: h.isn, flags: syn, win: 4000, opts: h.synOpts(w.now)}
	if synAck {
		s.flags, s.ack = syn|ackF, w.cur.cli.isn+1
	}
	return s
}

// actions are what may happen at any moment; each skips itself when it may not.
func (w *world) actions() map[string]func(*rapid.T) {
	in := func(f func()) func(*rapid.T) {
		return func(t *rapid.T) {
			w.T = t
			w.now += rapid.Uint32Range(0, 300).Draw(t, "ms")
			f()
		}
	}
	return map[string]func(*rapid.T){
		"PVM SYN":        in(w.pvmSyn),
		"announcement":   in(w.announcement),
		"stale":          in(w.stale),
		"SVM SYN":        in(w.svmSyn),
		"SVM sends":      in(w.svmSends),
		"SVM sends 2":    in(w.svmSends),
		"remote SYN":     in(w.remoteSyn),
		"remote sends":   in(w.remoteSends),
		"remote sends 2": in(w.remoteSends),
		"reuse":          in(w.reuse),
		"sweep":          in(w.sweep),
		"checkpoint":     in(w.checkpoint),
	}
}

// pvmSyn: P sees the PVM's SYN, the first or a repeated one, and announces it.
func (w *world) pvmSyn() {
	l := w.cur
	s := w.guestSyn(l.pvm, w.synAck(len(l.announced) > 0))
	a := recordOf(s, 0, 0)
	a.Inherited = false
	l.announced = append(l.announced, a)
}

// announcement delivers one of P's, in any order, any number of times.
func (w *world) announcement() {
	l := w.cur
	if len(l.announced) == 0 {
		return
	}
	a := rapid.SampledFrom(l.announced).Draw(w.T, "announcement")
	if !l.reported() {
		l.pvmTS = tsVal(&a)
	}
	w.moved = true
	l.annAck = l.annAck || a.Flags&ackF != 0
	l.annSyn = l.annSyn || a.Flags&ackF == 0
	w.answer("announcement", l, a, l.paired() && !l.kept())
}

// stale delivers an announcement of the incarnation before, again.
func (w *world) stale() {
	l := w.old
	if l == nil || !l.paired() || w.moved {
		return
	}
	a := rapid.SampledFrom(l.announced).Draw(w.T, "stale")
	w.answer("stale announcement", l, a, !w.cur.transmitted() && !l.kept())
}

// answer announces a and holds the answer against the SVM's last SYN.
func (w *world) answer(what string, l *life, a bpfmodel.Record, due bool) {
	v, sent, r := w.announce(&a)
	w.expect(what+": answered", sent, due)
	if !sent {
		w.expect(what, v, bpfmodel.RecordIn)
		return
	}
	w.expect(what, v, bpfmodel.RecordOut)
	w.expect(what+": incarnation", r.Inc, l.pvm.isn)
	w.expect(what+": seq", r.Seq, l.pvm.isn)
	w.expect(what+": end", r.End, l.pvm.isn+1)
	var wantAck uint32
	if r.Flags&ackF != 0 {
		wantAck = l.cli.isn + 1
	}
	w.expect(what+": SYN|ACK", r.Flags&ackF != 0, l.keptAck)
	w.expect(what+": ack", r.Ack, wantAck)
	if l.svm.hasTS {
		w.expect(what+": TSval", tsVal(&r), l.keptTS-l.tsOff())
	}
	l.shown = true
}

func tsVal(r *bpfmodel.Record) uint32 {
	if r.OptLen < 15 {
		return 0
	}
	return be.Uint32(r.Opts[7:])
}

// svmSyn: the SVM transmits its SYN, the first or again.
func (w *world) svmSyn() {
	l := w.cur
	if l.gone || l.closed {
		return
	}
	s := w.guestSyn(l.svm, w.synAck(l.svmSyn))
	if !l.transmitted() {
		l.svmTS = l.svm.ts + w.now
	}
	l.svmAck = l.svmAck || s.flags&ackF != 0
	l.svmSyn = l.svmSyn || s.flags&ackF == 0
	if l.svmAck && s.flags&ackF == 0 {
		s.flags, s.ack = syn|ackF, l.cli.isn+1 // it does not go back
	}
	if !l.kept() {
		l.keptTS, l.keptAck = l.svm.ts+w.now, s.flags&ackF != 0
	}
	switch {
	case l.paired():
		w.outKnown("SVM SYN", l, s)
		l.shown = true
	case s.flags&ackF != 0:
		w.out("unpaired SYN|ACK", s, nil, 0, 0, bpfmodel.Pending)
	default:
		w.out("unpaired SYN", s, &s, 0, s.seq-1<<30, bpfmodel.Pending)
	}
}

// outKnown: what the SVM transmits is recorded in PVM numbering.
func (w *world) outKnown(what string, l *life, s seg) {
	want := s
	want.seq -= l.off()
	if at := bytes.Index(s.opts, []byte{8, 10}); at >= 0 && len(s.opts) >= at+10 && l.svm.hasTS {
		want.opts = bytes.Clone(s.opts)
		be.PutUint32(want.opts[at+2:], be.Uint32(s.opts[at+2:])-l.tsOff())
	}
	cliAck := l.pvm.isn
	if l.kept() {
		cliAck = l.cliAck
	}
	w.out(what, s, &want, l.pvm.isn, cliAck, bpfmodel.RecordOut)
}

// svmSends: the SVM transmits anything but a SYN, of the incarnation it lives in.
func (w *world) svmSends() {
	l, after := w.cur, false
	if !l.transmitted() {
		if l, after = w.old, w.moved; l == nil || !l.transmitted() {
			return
		}
	}
	s := seg{
		flow: w.flow, seq: l.svm.isn + 1 + w.number("position"), ack: l.cli.isn + w.number("ack"),
		flags: rapid.SampledFrom([]bpfmodel.Flags{ackF, ackF, ackF | psh, ackF | fin, rst, rst | ackF}).Draw(w.T, "flags"),
		win:   rapid.Uint16().Draw(w.T, "win"),
	}
	if s.flags&rst == 0 {
		s.payload = rapid.SliceOfN(rapid.Byte(), 0, 5).Draw(w.T, "payload")
	}
	ts := l.svm.opt(w.now, w.number("tsecr")) // the remote's TSval and SACK blocks are no matter of the rewriter
	sack := sackOpt(w.number("left"), w.number("right"))
	s.opts = join(w.options(ts, sack), ts, sack)
	switch {
	case s.flags&(rst|ackF) == rst|ackF && s.seq == 0:
		return // see TestRefusal
	case l.kept() || l.paired() && !after:
		if l.kept() {
			l.closed = l.closed || s.flags&(rst|fin) != 0
		}
		w.outKnown("SVM segment", l, s)
	default:
		w.out("unpaired segment", s, nil, 0, 0, bpfmodel.Pending)
	}
}

// remoteSyn: the remote's SYN has no numbers of the guest's.
func (w *world) remoteSyn() {
	l := w.cur
	s := seg{
		flow: w.flow, toGuest: true, seq: l.cli.isn, flags: syn, win: 9,
		opts: l.cli.opt(w.now, 0),
	}
	w.in("remote SYN", s, s)
}

// remoteSends: what the remote acks of the PVM's, the SVM gets in its own numbers.
func (w *world) remoteSends() {
	l := w.cur
	if !l.shown {
		return
	}
	position := rapid.OneOf(rapid.Uint32Range(0, 3000), rapid.Uint32Range(0, 1<<30-1))
	at := 1 + position.Draw(w.T, "position")
	s := seg{
		flow: w.flow, toGuest: true, seq: l.cli.isn + 1, ack: l.pvm.isn + at,
		flags: rapid.SampledFrom([]bpfmodel.Flags{ackF, ackF | psh, ackF | fin, ackF | rst, rst}).Draw(w.T, "flags"),
		win:   9, payload: rapid.SliceOfN(rapid.Byte(), 0, 5).Draw(w.T, "payload"),
	}
	if l.open != passive && !l.established && rapid.Bool().Draw(w.T, "syn|ack") {
		s.flags |= syn
	}
	echoed := w.number("echoed")
	want := s
	if s.flags&ackF != 0 {
		want.ack = l.svm.isn + at
	}
	opts := func(isn, echo uint32) [][]byte {
		o := [][]byte{l.cli.opt(w.now, echo), sackOpt(isn+at+1, isn+at+9, isn+at+100, isn+at+101)}
		return o
	}
	layout := w.options(nil, nil)
	s.opts = join(layout, opts(l.pvm.isn, echoed)...)
	if s.flags&ackF != 0 {
		if echoed != 0 {
			echoed += l.tsOff()
			if !l.kept() && l.pvm.hasTS && l.svm.hasTS && int32(echoed-l.keptTS) > 0 {
				echoed = l.keptTS // in a handshake, none of a later time
			}
		}
		want.opts = join(layout, opts(l.svm.isn, echoed)...)
	} else {
		want.opts = s.opts
	}
	w.in("remote segment", s, want)
	switch {
	case l.gone:
	case s.flags&(ackF|rst) == ackF && !l.established:
		l.established, l.cliAck = true, s.ack
	case s.flags&ackF != 0 && l.established && int32(s.ack-l.cliAck) > 0:
		l.cliAck = s.ack
	}
	l.closed = l.closed || l.established && s.flags&(fin|rst) != 0
}

// reuse: the tuple is used again, by the PVM first.
func (w *world) reuse() {
	if l := w.cur; l.open != passive && (l.reported() || l.transmitted()) && !l.paired() {
		return // an active open that S knows half of would take the next one's other half
	}
	w.begin()
}

// sweep: what has ended is forgotten after the linger, not before.
func (w *world) sweep() {
	before := len(conns(w.tab))
	if w.tab.Sweep(int64(w.now), 1<<40, 1<<40) != 0 {
		w.Fatalf("swept within the linger")
	}
	if w.tab.Sweep(int64(w.now)+2, 1, 1) != before {
		w.Fatalf("not swept after it")
	}
	if w.duel != nil {
		w.duel.k.empty(w.T, w.duel.k.LsConn)
	}
	for _, l := range []*life{w.cur, w.old} {
		if l != nil {
			l.gone = l.established
		}
	}
}

// checkpoint: the SVM is the PVM from here on. P announces nothing of what the
// remote knew before (R8).
func (w *world) checkpoint() {
	if w.cur.shown || w.cur.transmitted() {
		w.begin() // first: a draw that fails undoes nothing
	} else {
		*w.cur = life{open: w.cur.open, pvm: w.cur.pvm, svm: w.cur.pvm, cli: w.cur.cli}
	}
	w.old = nil
	w.reset()
}

func conns(tab *bpfmodel.Table) map[bpfmodel.Tuple]rewriter.Conn {
	m := make(map[bpfmodel.Tuple]rewriter.Conn)
	for t, c := range tab.Conns() {
		m[t] = c
	}
	return m
}

// R9, R10: whatever the order of announcements and SYNs, the SVM gets acked
// exactly what it sent, and what it transmits leaves in the PVM's numbers or not at all.
func TestExchange(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := &world{T: t, tab: newTable(4, 4), flow: drawFlow(t), used: map[uint32]bool{0: true}}
		w.begin()
		t.Repeat(w.actions())
	})
}
