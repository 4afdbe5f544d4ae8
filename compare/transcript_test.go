// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
)

// Transcripts live in testdata/primary and testdata/secondary; -rewrite writes
// what happens now into them. Their commands:
//
//	config [timeout=1s] [cut=1ms] [max=n] [half=n] [points=n] [next=n] [slots=n] [large=n] [dgrams=n] [flow-dgrams=n] [flows=n] [said=n]
//	       [copies=n] [keep-young]
//	run            one event per line; lines with effects come back, effects below
//	flows | stats
//
// Events, with sequence numbers as they are:
//
//	pvm FLAGS SEQ[..END] [ack=n] [win=n] [gso=n] [x=pos,...] [sack=a-b,...] [ws=n] [ts=n[/echo]] [ago=dur] [large] [noslot]
//	svm FLAGS SEQ[..END] [inc=n|inherited] [bounds=n] [epoch=n] (and those of pvm but gso)
//	answer SEQ..END | client FLAGS SEQ[..END] | freeze | thaw | commit epoch=n [ago=dur] | solo | tick
//	copy FLAGS SEQ..END [una=n] | ask SEQ..END | park [udp] | mark epoch=n | unpark | reset [epoch=n]
//	neigh [remote=n] [vlan2=n] [mac=n] | adopt SEQ
//	pvm|svm udp|icmp=TYPE|icmp6=TYPE SEQ..END [id=n] [frag=n] (a datagram; id picks its bytes)
//	+DURATION      time passes, up to the next deadline, a tick, and so on
//
// FLAGS are letters of SFRPA. Payload bytes follow from their position, so both
// guests say the same, but at the positions of x=. All of SEQ..END is payload:
// positions of SYN and FIN lie outside. port=n, rport=n pick another connection;
// a segment with payload, SYN, FIN or RST and a datagram take the next slot, which is printed
// as #n, and every slot must be freed once, which is checked at the end.
type transcript struct {
	t      testing.TB
	keys   *Keys
	mut    mutation
	p      *Primary
	s      *Secondary
	now    int64
	slots  map[Slot]bool // held
	next   Slot
	noSlot bool // the event's frame finds none
	out    strings.Builder
}

func newTranscript(t testing.TB, mut mutation) *transcript {
	x := &transcript{t: t, keys: testKeys(5), mut: mut, now: int64(time.Second), slots: map[Slot]bool{}}
	x.config(Config{})
	return x
}

func (x *transcript) config(c Config) {
	if x.p != nil {
		x.done()
		x.out.Reset()
	}
	x.p = NewPrimary(c, x.keys)
	x.p.mutate(x.mut)
	x.s = NewSecondary(SecondaryConfig{}, x.keys)
	x.s.mutate(x.mut)
}

func (x *transcript) run(_ testing.TB, d *datadriven.TestData) string {
	x.out.Reset()
	switch d.Cmd {
	case "config":
		var c Config
		for _, a := range d.CmdArgs {
			v := ""
			if len(a.Vals) > 0 {
				v = a.Vals[0]
			}
			switch a.Key {
			case "keep-young":
				c.KeepYoung = true
			case "timeout":
				c.Timeout = x.duration(v)
			case "cut":
				c.CutDelay = x.duration(v)
			case "max":
				c.MaxConnections = int(x.number(v))
			case "half":
				c.MaxHalfOpen = int(x.number(v))
			case "points":
				c.ConnPoints = int(x.number(v))
			case "next":
				c.MaxNext = int(x.number(v))
			case "slots":
				c.Slots = int(x.number(v))
			case "large":
				c.LargeSlots = int(x.number(v))
			case "dgrams":
				c.MaxDatagrams = int(x.number(v))
			case "flow-dgrams":
				c.FlowDatagrams = int(x.number(v))
			case "flows":
				c.MaxFlows = int(x.number(v))
			case "said":
				c.MaxSaid = int(x.number(v))
			case "copies":
				x.s.cfg.MaxCopies = int(x.number(v))
				return ""
			default:
				x.t.Fatalf("config %s", a.Key)
			}
		}
		x.config(c)
	case "run":
		for line := range strings.Lines(d.Input) {
			x.line(strings.TrimSpace(line))
		}
	case "flows":
		fs := x.p.Flows()
		SortFlows(fs)
		for _, f := range fs {
			inc := fmt.Sprintf("inc=%d", f.Inc)
			if f.Inherited {
				inc = "inherited"
			}
			if f.State == "datagram" {
				fmt.Fprintf(&x.out, "%v proto=%d %s held=%d/%d %v\n", f.Tuple, f.Tuple.Proto, f.State, f.Held, f.HeldBytes, f.Why)
				continue
			}
			fmt.Fprintf(&x.out, "%v %s %s compared=%d released=%d held=%d/%d\n",
				f.Tuple, f.State, inc, f.Compared, f.Released, f.Held, f.HeldBytes)
		}
	case "stats":
		st := x.p.Stats()
		if st.Flows > 0 || st.ReleasedDatagrams > 0 {
			fmt.Fprintf(&x.out, "flows=%d datagrams=%d\n", st.Flows, st.ReleasedDatagrams)
		}
		fmt.Fprintf(&x.out, "connections=%d held=%d/%d released=%d/%d acks=%d asks=%d announces=%d queries=%d remirrors=%d\n", st.Connections,
			st.HeldPackets, st.HeldBytes, st.ReleasedPackets, st.ReleasedBytes, st.SentACKs, st.Asks, st.Announces, st.Queries, st.Remirrors)
		for r := range ReasonCount {
			if n := st.Checkpoints[r]; n > 0 {
				fmt.Fprintf(&x.out, "checkpoint %v: %d\n", r, n)
			}
		}
		for r := range ReasonCount {
			if n := st.Drops[r]; n > 0 {
				fmt.Fprintf(&x.out, "drop %v: %d\n", r, n)
			}
		}
	default:
		x.t.Fatalf("unknown command %q", d.Cmd)
	}
	return x.out.String()
}

// line runs one event and prints it with its effects.
func (x *transcript) line(line string) {
	if d, ok := strings.CutPrefix(line, "+"); ok {
		for end := x.now + int64(x.duration(d)); x.now < end; {
			x.now = min(end, max(x.p.NextDeadline(), x.now))
			x.step(fmt.Sprintf("%s: after %v", line, time.Duration(x.now)-time.Second), Event{Kind: EvTick})
		}
		return
	}
	x.now += 1000
	x.step(line, x.parse(line))
}

func (x *transcript) step(title string, ev Event) {
	if ev.Kind == EvPVM || ev.Kind == EvCopy || ev.Kind == EvPark {
		if s := &ev.Seg; x.noSlot {
			s.Payload = nil
		} else if s.Len > 0 || s.Datagram || s.Flags&(SYN|FIN|RST) != 0 || ev.Kind == EvPark {
			x.next++
			s.Slot = x.next
			x.slots[s.Slot] = true
			title += fmt.Sprintf(" #%d", s.Slot)
		}
	}
	step := x.p.Step
	switch ev.Kind {
	case EvCopy, EvAsk, EvPark, EvMark, EvUnpark, EvReset, EvTakeOver:
		step = x.s.Step
	}
	effs := step(x.now, &ev, nil)
	if len(effs) > 0 {
		fmt.Fprintf(&x.out, "%s\n", title)
	}
	for i := range effs {
		fmt.Fprintf(&x.out, "  %s\n", x.effect(&effs[i]))
	}
}

func (x *transcript) effect(e *Effect) string {
	var b strings.Builder
	slot := ""
	if e.Slot != NoSlot {
		slot = fmt.Sprintf(" #%d", e.Slot)
		if !x.slots[e.Slot] {
			slot += " (NOT HELD)"
		}
		if e.Free || e.Op == OpFree {
			delete(x.slots, e.Slot)
		}
	}
	switch e.Op {
	case OpSend:
		fmt.Fprintf(&b, "send%s %s %d", slot, flagNames(e.Flags), e.Seq)
		if e.To > e.From {
			fmt.Fprintf(&b, "..%d", e.Seq+e.To-e.From)
		}
		if e.Flags&ACK != 0 {
			fmt.Fprintf(&b, " ack=%d", e.Ack)
		}
		fmt.Fprintf(&b, " win=%d", e.Win)
		opts := e.Opts[:e.OptLen]
		if ts := tsOpt(opts); ts != nil {
			fmt.Fprintf(&b, " ts=%d", be32(ts[2:]))
			if echo := be32(ts[6:]); echo != 0 {
				fmt.Fprintf(&b, "/%d", echo)
			}
		}
		for _, k := range sackBlocks(nil, opts) {
			fmt.Fprintf(&b, " sack=%d-%d", k.left, k.right)
		}
		if e.Slot != NoSlot && !e.Free {
			b.WriteString(" keep")
		}
	case OpFree:
		fmt.Fprintf(&b, "free%s: %v", slot, e.Reason)
	case OpAsk:
		fmt.Fprintf(&b, "ask %d..%d", e.Seq, e.Seq+e.To)
		if e.Inherited {
			b.WriteString(" inherited")
		}
	case OpAnnounce:
		fmt.Fprintf(&b, "announce %s %d ack=%d", flagNames(e.Flags), e.Seq, e.Ack)
	case OpCheckpoint:
		fmt.Fprintf(&b, "checkpoint: %v", e.Reason)
	case OpAnswer:
		fmt.Fprintf(&b, "answer %d..%d", e.Seq, e.Seq+e.To)
		if e.Sum != x.keys.Sum(e.Seq, x.payload(e.Seq, e.To, nil)) {
			b.WriteString(" (other bytes)")
		}
	case OpDeliver:
		fmt.Fprintf(&b, "deliver%s", slot)
	case OpNeigh:
		fmt.Fprintf(&b, "who has %v, for %v at %x", netip.AddrFrom16(e.Tuple.Remote).Unmap(), netip.AddrFrom16(e.Tuple.Guest).Unmap(), e.Opts[:e.OptLen])
	case OpRemirror, OpSACK:
		b.WriteString(map[Op]string{OpRemirror: "remirror", OpSACK: "sack"}[e.Op])
		for _, k := range sackBlocks(nil, e.Opts[:e.OptLen]) {
			fmt.Fprintf(&b, " %d<%d-%d", e.Seq, k.left, k.right)
		}
	case OpAdopt:
		b.WriteString("adopt")
	case OpQuery:
		b.WriteString("query")
	case OpReplay:
		fmt.Fprintf(&b, "replay%s", slot)
	case OpForward:
		fmt.Fprintf(&b, "forward%s", slot)
	}
	return b.String()
}

const flagLetters = "FSRPAU"

func flagNames(f Flags) string {
	var b []byte
	for i := range flagLetters {
		if f&(1<<i) != 0 {
			b = append(b, flagLetters[i])
		}
	}
	return string(b)
}

// payload is what both guests say at these positions, but at those of x.
func (x *transcript) payload(from, n uint32, differ []uint32) []byte {
	b := make([]byte, n)
	for i := range b {
		pos := from + uint32(i)
		b[i] = byte(pos*2654435761>>13) | 1
		if slices.Contains(differ, pos) {
			b[i] = 0
		}
	}
	return b
}

func (x *transcript) parse(line string) Event {
	f := strings.Fields(line)
	kinds := map[string]EventKind{
		"pvm": EvPVM, "svm": EvSVM, "answer": EvAnswer, "client": EvClient, "freeze": EvFreeze, "thaw": EvThaw,
		"commit": EvCommit, "solo": EvSolo, "tick": EvTick, "copy": EvCopy, "ask": EvAsk, "park": EvPark,
		"adopt": EvAdopt, "unpark": EvUnpark, "reset": EvReset, "mark": EvMark, "neigh": EvNeigh, "takeover": EvTakeOver,
	}
	ev := Event{Kind: kinds[f[0]], Epoch: x.p.epoch, At: x.now}
	if ev.Kind == 0 {
		x.t.Fatalf("unknown event: %s", line)
	}
	s := &ev.Seg
	s.Slot, s.Win, s.At, s.Epoch, s.Inc = NoSlot, 1000, x.now, x.p.epoch, 1000
	s.Tuple = Tuple{GuestPort: 80, RemotePort: 5000, Proto: 6}
	s.Guest[15], s.Guest[10], s.Guest[11] = 1, 0xff, 0xff
	s.Remote[15], s.Remote[10], s.Remote[11] = 2, 0xff, 0xff
	var differ []uint32
	var stride, id uint32
	x.noSlot = false
	datagram := func(proto uint8, guest, remote uint16) {
		s.Datagram, s.Proto, s.GuestPort, s.RemotePort = true, proto, guest, remote
	}
	for _, a := range f[1:] {
		key, val, _ := strings.Cut(a, "=")
		switch key {
		case "ack":
			s.Ack = x.number(val)
		case "win":
			s.Win = uint16(x.number(val))
		case "gso":
			s.GSO = uint16(x.number(val))
		case "bounds":
			stride = x.number(val)
		case "inc":
			s.Inc = x.number(val)
		case "inherited":
			s.Inherited, s.Inc = true, 0
		case "epoch":
			s.Epoch = x.number(val)
			ev.Epoch = s.Epoch
		case "noslot":
			x.noSlot = true
		case "large":
			s.Large = true
		case "una":
			s.ClientAck = x.number(val)
		case "udp":
			datagram(17, 53, 5000)
		case "icmp":
			datagram(protoICMP, uint16(x.number(val)), 0)
		case "icmp6":
			datagram(protoICMPv6, uint16(x.number(val)), 0)
		case "mac":
			s.Opts = []byte{2, 0, 0, 0, 0, byte(x.number(val))}
		case "remote":
			s.Remote[15] = byte(x.number(val))
		case "vlan2":
			s.VLAN2 = uint16(x.number(val))
		case "id":
			id = x.number(val)
		case "frag":
			s.Frag = uint16(x.number(val))
		case "port":
			s.GuestPort = uint16(x.number(val))
		case "rport":
			s.RemotePort = uint16(x.number(val))
		case "ago":
			s.At -= int64(x.duration(val))
			ev.At = s.At
		case "x":
			for v := range strings.SplitSeq(val, ",") {
				differ = append(differ, x.number(v))
			}
		case "mss":
			s.Opts = binary.BigEndian.AppendUint16(append(s.Opts, 2, 4), uint16(x.number(val)))
		case "ws":
			s.Opts = append(s.Opts, 3, 3, byte(x.number(val)), optNOP)
		case "ts":
			val, echo, _ := strings.Cut(val, "/")
			s.Opts = binary.BigEndian.AppendUint32(append(s.Opts, optNOP, optNOP, optTS, 10), x.number(val))
			s.Opts = binary.BigEndian.AppendUint32(s.Opts, x.number(cmp.Or(echo, "0")))
		case "sack":
			blocks := strings.Split(val, ",")
			s.Opts = append(s.Opts, optNOP, optNOP, optSACK, byte(2+8*len(blocks)))
			for _, b := range blocks {
				l, r, _ := strings.Cut(b, "-")
				s.Opts = binary.BigEndian.AppendUint32(s.Opts, x.number(l))
				s.Opts = binary.BigEndian.AppendUint32(s.Opts, x.number(r))
			}
		default:
			if i := strings.IndexFunc(a, func(r rune) bool { return !strings.ContainsRune(flagLetters, r) }); i < 0 {
				for _, r := range a {
					s.Flags |= 1 << strings.IndexRune(flagLetters, r)
				}
				continue
			}
			from, to, ok := strings.Cut(a, "..")
			s.Seq = x.number(from)
			if ok {
				s.Len = x.number(to) - s.Seq
			}
		}
	}
	start := s.PayloadStart()
	b := x.payload(start+id<<16, s.Len, differ)
	s.Sum = x.keys.Sum(start, b)
	switch ev.Kind {
	case EvPVM, EvCopy:
		s.Payload, s.Header = b, []byte("ethernet and ip header")
	case EvSVM:
		for at := stride; stride > 0 && at < s.Len; at += stride {
			s.Bounds = append(s.Bounds, Bound{start + at, x.keys.Sum(start, b[:at])})
		}
	}
	return ev
}

func (x *transcript) number(s string) uint32 {
	n, err := strconv.ParseInt(s, 0, 64)
	if err != nil {
		x.t.Fatal(err)
	}
	return uint32(n)
}

func (x *transcript) duration(s string) time.Duration {
	d, err := time.ParseDuration(s)
	if err != nil {
		x.t.Fatal(err)
	}
	return d
}

// done ends all connections: every slot must have been freed.
func (x *transcript) done() {
	x.step("end", Event{Kind: EvSolo})
	x.step("end", Event{Kind: EvUnpark})
	x.step("end", Event{Kind: EvReset})
	if len(x.slots) > 0 || x.p.stats.HeldPackets != 0 || x.p.stats.HeldBytes != 0 || x.p.points.used != 0 || x.p.datagrams.held != 0 || x.p.datagrams.svm != 0 {
		x.t.Errorf("left over: slots %v, %d points, %d datagrams, %d said, %+v", x.slots, x.p.points.used, x.p.datagrams.held, x.p.datagrams.svm, x.p.Stats())
	}
	if strings.Contains(x.out.String(), "NOT HELD") {
		x.t.Error(x.out.String())
	}
}

func transcripts(t *testing.T) []string {
	var files []string
	err := filepath.WalkDir("testdata/transcripts", func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files = append(files, path)
		}
		return err
	})
	if err != nil || len(files) == 0 {
		t.Fatalf("no transcripts: %v", err)
	}
	return files
}

func TestTranscripts(t *testing.T) {
	for _, path := range transcripts(t) {
		t.Run(filepath.Base(path), func(t *testing.T) {
			x := newTranscript(t, 0)
			datadriven.RunTestAny(t, path, x.run)
			x.done()
		})
	}
}

// TestMutations turns each rule off in turn: the transcript named after it must
// come out differently, so that TestTranscripts would fail.
func TestMutations(t *testing.T) {
	for _, m := range []struct {
		rule mutation
		file string
	}{
		{mutR1, "r1_bytes"},
		{mutR2, "r2_ack"},
		{mutR3, "r3_syn"},
		{mutR3, "r3_fin"},
		{mutR4, "r4_repeat"},
		{mutR5, "r5_cut"},
		{mutR6, "r6_loss"},
		{mutR6, "r6_hole"},
		{mutRoom, "slots"},
		{mutR7, "r7_time"},
		{mutR8, "r8_incarnations"},
		{mutR11, "r11_halfopen"},
		{mutR14, "r14_commit"},
		{mutR15, "r15_freeze"},
		{mutR16, "r16_mark"},
		{mutR17, "r17_next_epoch"},
		{mutR22, "r22_takeover"},
		{mutR23, "r23_adopt"},
		{mutDatagram, "datagrams"},
	} {
		t.Run(m.file, func(t *testing.T) {
			path := filepath.Join("testdata/transcripts", m.file)
			if !passes(t, path, 0) {
				t.Fatal("fails without a mutation too")
			}
			if passes(t, path, m.rule) {
				t.Error("passes although the rule is turned off")
			}
		})
	}
}

// passes runs a transcript and compares each result with the one in the file.
func passes(t *testing.T, path string, mut mutation) bool {
	input, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	x := newTranscript(t, mut)
	same := true
	datadriven.RunTestFromStringAny(t, string(input), func(t testing.TB, d *datadriven.TestData) string {
		if x.run(t, d) != d.Expected {
			same = false
		}
		return d.Expected
	})
	return same
}
