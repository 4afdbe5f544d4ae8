// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
)

// Transcripts live in testdata/primary and testdata/secondary; -rewrite writes
// what happens now into them. Their commands:
//
//	config [timeout=1s] [cut=1ms] [max=n] [half=n] [points=n] [next=n] [slots=n] [large=n] [dgrams=n] [flow-dgrams=n] [flows=n] [said=n]
//	       [copies=n | large-copies=n]
//	run            one event per line; lines with effects come back, effects below
//	flows | stats
//
// Events, with sequence numbers as they are:
//
//	pvm FLAGS SEQ[..END] [ack=n] [win=n] [gso=n] [x=pos,...] [sack=a-b,...] [ws=n] [ts=n[/echo]] [ago=dur] [large] [noslot]
//	svm FLAGS SEQ[..END] [inc=n|inherited] [bounds=n] [epoch=n] (and those of pvm but gso)
//	answer SEQ..END | client FLAGS SEQ[..END] | freeze | thaw | commit epoch=n [ago=dur] | solo | tick
//	copy FLAGS SEQ..END [una=n] [large] | ask SEQ..END | park [udp] | mark epoch=n | unpark | reset [epoch=n]
//	neigh [remote=n] [vlan2=n] [mac=n] | adopt SEQ
//	pvm|svm udp|icmp=TYPE|icmp6=TYPE SEQ..END [id=n] [frag=n] (a datagram; id picks its bytes)
//	+DURATION      time passes, up to the next deadline, a tick, and so on
//
// FLAGS are letters of SFRPA. Payload bytes follow from their position, so both
// guests transmit the same, but at the positions of x=. All of SEQ..END is payload:
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
				c.MaxUnmatched = int(x.number(v))
			case "copies":
				x.s.cfg.MaxCopies = int(x.number(v))
				return ""
			case "large-copies":
				x.s.cfg.MaxLarge = int(x.number(v))
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
	case "holds":
		before := uint64(0)
		for i, n := range x.p.Stats().HoldTimes.AtMost {
			if n > before {
				fmt.Fprintf(&x.out, "%d held for at most %v\n", n, histogramBounds[i])
			}
			before = n
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
	case EvCopy, EvAsk, EvPark, EvMark, EvUnpark, EvUnsure, EvReset, EvRemote, EvTakeOver:
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

const flagLetters = "FSRPAU"

// done ends all connections: every slot must have been freed.
func (x *transcript) done() {
	x.step("end", Event{Kind: EvSolo})
	x.step("end", Event{Kind: EvUnpark})
	x.step("end", Event{Kind: EvReset})
	if len(x.slots) > 0 || x.p.stats.HeldPackets != 0 || x.p.stats.HeldBytes != 0 || x.p.points.used != 0 || x.p.datagrams.held != 0 || x.p.datagrams.svm != 0 {
		x.t.Errorf("left over: slots %v, %d points, %d datagrams, %d of the SVM alone, %+v", x.slots, x.p.points.used, x.p.datagrams.held, x.p.datagrams.svm, x.p.Stats())
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
		{mutR6, "r6_probe"},
		{mutRoom, "slots"},
		{mutR7, "r7_time"},
		{mutOrder, "r7_order"},
		{mutR8, "r8_incarnations"},
		{mutR11, "r11_halfopen"},
		{mutR14, "r14_commit"},
		{mutR15, "r15_freeze"},
		{mutR16, "r16_mark"},
		{mutR17, "r17_next_epoch"},
		{mutR22, "r22_takeover"},
		{mutEnded, "r22_takeover"},
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
