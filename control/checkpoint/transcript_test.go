// SPDX-License-Identifier: Apache-2.0

package checkpoint

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
)

var kindNames = map[Kind]string{
	EvTick: "tick", EvQMPUp: "qmp-up", EvQMPDown: "qmp-down", EvStop: "stop", EvResume: "resume", EvCOLO: "colo",
	EvLinkUp: "link-up", EvLinkDown: "link-down", EvHandshake: "handshake", EvWant: "want", EvReady: "ready",
	EvPeerStopped: "peer-stopped", EvPeerResumed: "peer-resumed", EvPeerAbort: "peer-abort", EvAsked: "asked",
	EvPair: "pair", EvQuiet: "quiet", EvInside: "inside", EvPrepare: "prepare", EvAbort: "abort", EvDrained: "drained", EvOff: "off", EvReleased: "released",
}

var opNames = map[Op]string{
	OpOpen: "Open", OpFreeze: "Freeze", OpThaw: "Thaw", OpPrepare: "Prepare", OpAbort: "Abort", OpAsk: "Ask", OpEpoch: "Epoch", OpMark: "Mark",
	OpCOLO: "COLO?", OpCommit: "Commit", OpFailed: "Failed", OpPark: "Park", OpDrain: "Drain", OpReady: "Ready", OpBegin: "Begin", OpReset: "Reset",
	OpStopped: "Stopped", OpRun: "Run", OpResumed: "Resumed",
}

func (e Effect) String() string {
	s := opNames[e.Op]
	if e.Events {
		s += " behind events"
	}
	if e.Unsure {
		s += " unsure"
	}
	switch e.Op {
	case OpOpen, OpFreeze, OpThaw, OpPark:
		return s
	}
	s += fmt.Sprintf("(%d)", e.Epoch)
	if e.Op == OpCommit {
		s += fmt.Sprintf(" at %v in [%v, %v]", time.Duration(e.At), time.Duration(e.Stop), time.Duration(e.Resume))
	}
	if e.Cause != "" {
		s += fmt.Sprintf(" %q", e.Cause)
	}
	return s
}

type machine interface {
	Step(now int64, ev Event) []Effect
	NextDeadline() int64
	State() (string, string)
}

// TestCkptTranscripts runs testdata. A command "primary" or "secondary"
// makes a machine; each line is a time and an event:
//
//	12ms resume k=3 at=11ms skew=2ms no="cause"
//	12ms want diverged
//
// "no" makes the answer a refusal. The word "until" in place of an event lets
// time pass to then, with a tick at each deadline.
func TestCkptTranscripts(t *testing.T) {
	kinds := make(map[string]Kind)
	for k, n := range kindNames {
		kinds[n] = k
	}
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		var m machine
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			switch d.Cmd {
			case "primary", "secondary":
				cfg := DefaultConfig()
				cfg.QMP = !d.HasArg("noqmp")
				cfg.MinInterval = int64(20 * time.Millisecond)
				cfg.Unpaired = d.HasArg("unpaired")
				cfg.noR14, cfg.noR15 = d.HasArg("no-r14"), d.HasArg("no-r15")
				if d.HasArg("period") {
					var s string
					d.ScanArgs(t, "period", &s)
					cfg.Period = int64(mustDuration(t, s))
				}
				if d.HasArg("target") {
					var s string
					d.ScanArgs(t, "target", &s)
					cfg.TargetPause = int64(mustDuration(t, s))
				}
				if d.HasArg("above") {
					d.ScanArgs(t, "above", &cfg.PeriodicAbove)
					cfg.PeriodicEnough, cfg.Epoch = 2, int64(50*time.Millisecond)
				}
				m = NewPrimary(cfg)
				if d.Cmd == "secondary" {
					m = NewSecondary(cfg)
				}
			case "step":
			default:
				d.Fatalf(t, "unknown command %s", d.Cmd)
			}
			var out strings.Builder
			for line := range strings.Lines(d.Input) {
				transcriptLine(t, &out, m, kinds, strings.TrimSpace(line))
			}
			word, detail := m.State()
			fmt.Fprintf(&out, "%s", word)
			if detail != "" {
				fmt.Fprintf(&out, " (%s)", detail)
			}
			return out.String() + "\n"
		})
	})
}

func mustDuration(t *testing.T, s string) time.Duration {
	t.Helper()
	v, err := time.ParseDuration(s)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func transcriptLine(t *testing.T, out *strings.Builder, m machine, kinds map[string]Kind, line string) {
	t.Helper()
	line, refusal, refused := strings.Cut(line, " no=")
	f := strings.Fields(line)
	now := int64(mustDuration(t, f[0]))
	do := func(now int64, ev Event, what string) {
		fmt.Fprintf(out, "%v %s:", time.Duration(now), what)
		for i, fx := range m.Step(now, ev) {
			if i > 0 {
				out.WriteString(",")
			}
			fmt.Fprintf(out, " %v", fx)
		}
		out.WriteString("\n")
	}
	if f[1] == "until" {
		for next := m.NextDeadline(); next <= now; next = m.NextDeadline() {
			do(next, Event{Kind: EvTick}, "tick")
		}
		return
	}
	kind, ok := kinds[f[1]]
	if !ok {
		t.Fatalf("unknown event in %q", line)
	}
	ev := Event{Kind: kind, OK: !refused, Cause: strings.Trim(refusal, `"`), At: now}
	for _, arg := range f[2:] {
		k, v, _ := strings.Cut(arg, "=")
		switch k {
		case "diverged":
			ev.Diverged, ev.Cause = true, "payload differs"
		case "k":
			fmt.Sscan(v, &ev.Epoch)
		case "at":
			ev.At = int64(mustDuration(t, v))
		case "skew":
			ev.Skew = int64(mustDuration(t, v))
		default:
			t.Fatalf("unknown argument in %q", line)
		}
	}
	what := strings.Join(f[1:], " ")
	if refused {
		what += " no"
	}
	do(now, ev, what)
}

// An operator who stopped the PVM is why a doubt lasts, and no reason to give S up: not
// by the next pair either.
func TestUnaskedStopOutlivesAPair(t *testing.T) {
	cfg := DefaultConfig()
	cfg.QMP, cfg.Unpaired = true, true
	c := NewPrimary(cfg)
	for i, ev := range []Event{
		{Kind: EvQMPUp, OK: true}, {Kind: EvLinkUp}, {Kind: EvPair, OK: true}, {Kind: EvStop}, {Kind: EvPair}, {Kind: EvPair, OK: true},
	} {
		c.Step(int64(i)*int64(time.Millisecond), ev)
	}
	if state, detail := c.State(); c.doubt == "" || c.Stuck() {
		t.Errorf("%s (%s): doubt %q, stuck %v", state, detail, c.doubt, c.Stuck())
	}
	c.Step(int64(time.Second), Event{Kind: EvResume})
	if !c.Stuck() {
		t.Errorf("the PVM goes on, and the doubt %q is nobody's", c.doubt)
	}
}

// The SVM stops while its daemon goes on from old offsets and has no session yet.
func TestAdoptedSecondaryMissesAStop(t *testing.T) {
	cfg := DefaultConfig()
	for _, qmp := range []bool{true, false} {
		for name, evs := range map[string][]Event{
			"stop": {{Kind: EvQMPUp, OK: true}, {Kind: EvStop}, {Kind: EvResume}}, "stopped": {{Kind: EvQMPUp}},
			"lost": {{Kind: EvQMPUp, OK: true}, {Kind: EvQMPDown}, {Kind: EvQMPUp, OK: true}},
		} {
			cfg.QMP = qmp
			c := NewSecondary(cfg)
			c.Step(0, Event{Kind: EvRecovered, OK: true})
			if !c.Whole() {
				t.Errorf("%s: not whole from the start", name)
			}
			for _, ev := range evs {
				c.Step(0, ev)
			}
			if c.Whole() == qmp {
				t.Errorf("%s, qmp %v: whole is %v", name, qmp, c.Whole())
			}
			fresh := NewSecondary(cfg)
			for _, ev := range evs {
				fresh.Step(0, ev)
			}
			if !fresh.Whole() {
				t.Errorf("%s: empty tables are not whole", name)
			}
		}
	}
}
