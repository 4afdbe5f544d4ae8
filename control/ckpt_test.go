// SPDX-License-Identifier: Apache-2.0

package control

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
)

var kindNames = map[ckptKind]string{
	evTick: "tick", evQMPUp: "qmp-up", evQMPDown: "qmp-down", evStop: "stop", evResume: "resume", evCOLO: "colo",
	evLinkUp: "link-up", evLinkDown: "link-down", evHandshake: "handshake", evWant: "want", evReady: "ready",
	evPeerStopped: "peer-stopped", evPeerResumed: "peer-resumed", evPeerAbort: "peer-abort", evAsked: "asked",
	evPair: "pair", evQuiet: "quiet", evInside: "inside", evPrepare: "prepare", evAbort: "abort", evDrained: "drained",
}

var opNames = map[ckptOp]string{
	fxOpen: "Open", fxFreeze: "Freeze", fxThaw: "Thaw", fxPrepare: "Prepare", fxAbort: "Abort", fxAsk: "Ask", fxEpoch: "Epoch",
	fxCOLO: "COLO?", fxCommit: "Commit", fxFailed: "Failed", fxPark: "Park", fxDrain: "Drain", fxReady: "Ready", fxBegin: "Begin", fxReset: "Reset",
	fxStopped: "Stopped", fxRun: "Run", fxResumed: "Resumed",
}

func (e ckptEffect) String() string {
	s := opNames[e.Op]
	switch e.Op {
	case fxOpen, fxFreeze, fxThaw, fxPark:
		return s
	}
	s += fmt.Sprintf("(%d)", e.Epoch)
	if e.Op == fxCommit {
		s += fmt.Sprintf(" at %v in [%v, %v]", time.Duration(e.At), time.Duration(e.Stop), time.Duration(e.Resume))
	}
	if e.Cause != "" {
		s += fmt.Sprintf(" %q", e.Cause)
	}
	return s
}

type ckptMachine interface {
	Step(now int64, ev ckptEvent) []ckptEffect
	NextDeadline() int64
	State() (string, string)
}

// TestCkptTranscripts runs testdata/ckpt. A command "primary" or "secondary"
// makes a machine; each line is a time and an event:
//
//	12ms resume k=3 at=11ms skew=2ms no="cause"
//
// "no" makes the answer a refusal. The word "until" in place of an event lets
// time pass to then, with a tick at each deadline.
func TestCkptTranscripts(t *testing.T) {
	kinds := make(map[string]ckptKind)
	for k, n := range kindNames {
		kinds[n] = k
	}
	datadriven.Walk(t, "testdata/ckpt", func(t *testing.T, path string) {
		var m ckptMachine
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			switch d.Cmd {
			case "primary", "secondary":
				cfg := defaultCkptConfig()
				cfg.qmp = !d.HasArg("noqmp")
				cfg.minInterval = int64(20 * time.Millisecond)
				cfg.unpaired = d.HasArg("unpaired")
				cfg.noR14, cfg.noR15 = d.HasArg("no-r14"), d.HasArg("no-r15")
				if d.HasArg("period") {
					var s string
					d.ScanArgs(t, "period", &s)
					cfg.period = int64(mustDuration(t, s))
				}
				if d.HasArg("target") {
					var s string
					d.ScanArgs(t, "target", &s)
					cfg.target = int64(mustDuration(t, s))
				}
				m = newCkptPrimary(cfg)
				if d.Cmd == "secondary" {
					m = newCkptSecondary(cfg)
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

func transcriptLine(t *testing.T, out *strings.Builder, m ckptMachine, kinds map[string]ckptKind, line string) {
	t.Helper()
	line, refusal, refused := strings.Cut(line, " no=")
	f := strings.Fields(line)
	now := int64(mustDuration(t, f[0]))
	do := func(now int64, ev ckptEvent, what string) {
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
			do(next, ckptEvent{Kind: evTick}, "tick")
		}
		return
	}
	kind, ok := kinds[f[1]]
	if !ok {
		t.Fatalf("unknown event in %q", line)
	}
	ev := ckptEvent{Kind: kind, OK: !refused, Cause: strings.Trim(refusal, `"`), At: now}
	for _, arg := range f[2:] {
		k, v, _ := strings.Cut(arg, "=")
		switch k {
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
	cfg := defaultCkptConfig()
	cfg.qmp, cfg.unpaired = true, true
	c := newCkptPrimary(cfg)
	for i, ev := range []ckptEvent{
		{Kind: evQMPUp, OK: true}, {Kind: evLinkUp}, {Kind: evPair, OK: true}, {Kind: evStop}, {Kind: evPair}, {Kind: evPair, OK: true},
	} {
		c.Step(int64(i)*int64(time.Millisecond), ev)
	}
	if state, detail := c.State(); c.doubt == "" || c.Stuck() {
		t.Errorf("%s (%s): doubt %q, stuck %v", state, detail, c.doubt, c.Stuck())
	}
	c.Step(int64(time.Second), ckptEvent{Kind: evResume})
	if !c.Stuck() {
		t.Errorf("the PVM goes on, and the doubt %q is nobody's", c.doubt)
	}
}

// The SVM stops while its daemon goes on from old offsets and has no session yet.
func TestAdoptedSecondaryMissesAStop(t *testing.T) {
	cfg := defaultCkptConfig()
	for _, qmp := range []bool{true, false} {
		for name, evs := range map[string][]ckptEvent{
			"stop": {{Kind: evQMPUp, OK: true}, {Kind: evStop}, {Kind: evResume}}, "stopped": {{Kind: evQMPUp}},
			"lost": {{Kind: evQMPUp, OK: true}, {Kind: evQMPDown}, {Kind: evQMPUp, OK: true}},
		} {
			cfg.qmp = qmp
			c := newCkptSecondary(cfg)
			c.Step(0, ckptEvent{Kind: evRecovered, OK: true})
			if !c.Whole() {
				t.Errorf("%s: not whole from the start", name)
			}
			for _, ev := range evs {
				c.Step(0, ev)
			}
			if c.Whole() == qmp {
				t.Errorf("%s, qmp %v: whole is %v", name, qmp, c.Whole())
			}
			fresh := newCkptSecondary(cfg)
			for _, ev := range evs {
				fresh.Step(0, ev)
			}
			if !fresh.Whole() {
				t.Errorf("%s: empty tables are not whole", name)
			}
		}
	}
}
