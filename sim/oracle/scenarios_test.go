// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"github.com/lockstep-ft/lockstep/bench/lab"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Scenarios live in testdata/scenarios; -rewrite writes what happens now into them. Each is a file
// that begins with why it is there, and, where the engines differ, with a line
// "# Difference: " and the heading in docs/DIFFERENCES.md.
//
//	engines SETTINGS       other ones than "patient": see settings; the first command, if any
//	run                    a step per line; what comes of it is below, by the step's number
//
// Steps:
//
//	P|S|C PACKET           the PVM, the SVM or the client sends: see parsePacket. The SVM's numbers are its own
//	open [conn=n] [opts]   a client opens a connection: SYN, both guests' SYN|ACK, ACK. Nothing is
//	                       printed when just the PVM's SYN|ACK leaves
//	checkpoint             one that nothing asked for
//	wait                   longer than the engines' timeouts, or, where these are long, than all else
//	reuse higher|lower     the connection's next incarnation, by the PVM's initial sequence number
//	isn pvm=n svm=n        other initial sequence numbers
//	show svm               from here on print what reaches the SVM of what the client sends in a step;
//	                       not what lockstep mirrors again (R6)
//	flood n                the SVM sends a datagram on each of n flows
//
// "out" is what reaches the client, "svm" what reaches the SVM, "checkpoint" means that one was asked
// for; it is made at once.

// setting is how the engines are set.
type setting struct {
	qemu, lockstep string
	wait           time.Duration
}

// Long enough for the steps before a "wait" on a machine that is busy with other things.
const impatience = time.Second

var (
	patientQEMU, patientPair     = ",compare_timeout=600000,expired_scan_cycle=600000", "timeout: 10m"
	impatientQEMU, impatientPair = fmt.Sprintf(",compare_timeout=%d,expired_scan_cycle=50", impatience.Milliseconds()), fmt.Sprintf("timeout: %v", impatience)
)

const settled = 30 * time.Millisecond

var settings = map[string]setting{
	"patient":   {patientQEMU, patientPair, settled},
	"impatient": {impatientQEMU, impatientPair, impatience * 13 / 10},
	"narrow":    {patientQEMU + ",max_queue_size=4", patientPair, settled},
	"full":      {patientQEMU, patientPair, settled}, // whose QEMU has had its day
}

var build = sync.OnceValues(func() (string, error) {
	bin := filepath.Join(buildDir, "lockstep")
	out, err := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", bin, "github.com/lockstep-ft/lockstep/cmd/lockstep").CombinedOutput()
	if err != nil {
		err = fmt.Errorf("build lockstep: %w: %s", err, out)
	}
	return bin, err
})

// needs says what is missing here.
func needs(t *testing.T) {
	t.Helper()
	lt.NeedRoot(t)
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		lt.Missing(t, "%v: install QEMU", err)
	}
}

// startPair starts a pair, which ends with the test.
func startPair(t *testing.T, settings string) *pair {
	t.Helper()
	needs(t)
	bin, err := build()
	if err != nil {
		t.Fatal(err)
	}
	p, err := newPair(context.WithoutCancel(t.Context()), bin, t.TempDir(), settings)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// startColo starts a QEMU, which ends with the test.
func startColo(t *testing.T, settings string) *colo {
	t.Helper()
	needs(t)
	ns, err := lab.NewNS()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ns.Close)
	c, err := newColo(t.Context(), ns, t.TempDir(), settings)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	return c
}

var names = []string{"qemu", "lockstep"}

// scenario is one in an engine's run.
type scenario struct {
	engine
	*world
	wait    time.Duration
	showSVM bool
	sent    []byte // by the client in this step; nil: nothing
}

// do carries out a step and returns what came of it. It waits for want.
func (s *scenario) do(step string, want []string) (got []string, err error) {
	s.sent = nil
	silent, err := s.play(step, want)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", step, err)
	}
	for deadline := time.Now().Add(3 * time.Second); ; {
		if err := s.settle(); err != nil {
			return nil, fmt.Errorf("%s: %w", step, err)
		}
		got = append(got, s.texts()...)
		if silent != nil && slices.Equal(got, silent) {
			got = nil
		}
		if !rewriting() && (slices.Equal(got, want) || time.Now().After(deadline)) {
			return got, nil
		}
		if rewriting() && time.Now().After(deadline.Add(-2950*time.Millisecond)) {
			return got, nil
		}
		time.Sleep(time.Millisecond)
	}
}

func rewriting() bool { return flag.Lookup("rewrite").Value.String() == "true" }

// play does what a step says. silent is what comes of it that is not worth a line.
func (s *scenario) play(step string, want []string) (silent []string, err error) {
	words := tokens.FindAllString(step, -1)
	switch words[0] {
	case "P", "S", "C":
		p, err := parsePacket(who(words[0][0]), words[1:])
		if err != nil {
			return nil, err
		}
		frame := p.frame(s.world)
		if p.from == client {
			s.sent = frame
		}
		return nil, s.send(p.from, frame)
	case "open":
		return s.open(words[1:])
	case "checkpoint":
		return nil, s.checkpoint()
	case "wait":
		if len(want) == 0 || rewriting() { // else it is waited for anyway
			time.Sleep(s.wait)
		}
		return nil, nil
	case "reuse":
		s.reuse(1, words[1] == "lower")
		return nil, nil
	case "isn":
		n := s.of(1)
		_, err := fmt.Sscanf(step, "isn pvm=%d svm=%d", &n.pvm, &n.svm)
		return nil, err
	case "show":
		s.showSVM = true
		return nil, nil
	case "flood":
		return nil, s.flood(words[1])
	}
	return nil, fmt.Errorf("there is no step %q", words[0])
}

// open opens a connection with the same options in all SYNs.
func (s *scenario) open(opts []string) (silent []string, err error) {
	for i, x := range []struct {
		from who
		line string
	}{{client, "S ack=0"}, {pvm, "SA seq=0"}, {svm, "SA seq=0"}, {client, "A seq=1"}} {
		words := strings.Fields(x.line)
		for _, o := range opts {
			switch name, _, _ := strings.Cut(o, "="); {
			case name == "ts":
				o = "ts=" + []string{"1", "1/1", "1/1", "2/1"}[i]
			case i == 3 && slices.Contains([]string{"mss", "ws", "sackok"}, name):
				continue // a SYN's
			}
			words = append(words, o)
		}
		p, err := parsePacket(x.from, words)
		if err != nil {
			return nil, err
		}
		frame := p.frame(s.world)
		if err := errors.Join(s.send(x.from, frame), s.settle()); err != nil {
			return nil, err
		}
		if x.from == pvm {
			silent = []string{"out " + text(frame, client, s.world)}
		}
	}
	return silent, nil
}

func (s *scenario) flood(count string) error {
	var n int
	if _, err := fmt.Sscan(count, &n); err != nil {
		return err
	}
	for i := range n {
		p := &packet{from: svm, kind: "ip", proto: 17, ttl: defaultTTL, payload: []byte{byte(i >> 8), byte(i), 0, 8, 0, 9, 0, 0, 'f'}}
		if err := s.send(svm, p.frame(s.world)); err != nil {
			return err
		}
	}
	return nil
}

// sameBut reports whether the SVM's frame is what the client sent, but for what is translated in it.
func sameBut(frame, sent []byte) bool {
	if len(frame) != len(sent) || len(sent) < 34 {
		return false
	}
	transport := 34
	if frame[12] == 0x81 { // a VLAN tag
		transport += 4
	}
	if frame[transport-22] == 0x86 { // IPv6
		transport += 20
	}
	a, b := bytes.Clone(frame), bytes.Clone(sent)
	for _, f := range [][]byte{a, b} {
		if head := f[transport:]; len(head) >= 20 {
			clear(head[8:12])
			clear(head[16:18])
			clear(head[20:max(20, min(len(head), int(head[12]>>4*4)))])
		}
	}
	return bytes.Equal(a, b)
}

// texts are what has happened: between checkpoints what left, then what the SVM received.
func (s *scenario) texts() (all []string) {
	var toSVM []string
	for _, e := range s.take() {
		switch e.to {
		case client:
			all = append(all, "out "+text(e.frame, client, s.world))
		case svm:
			if s.showSVM && sameBut(e.frame, s.sent) {
				toSVM = append(toSVM, "svm "+text(e.frame, svm, s.world))
				s.sent = nil
			}
		default:
			all = append(append(all, toSVM...), "checkpoint")
			toSVM = nil
			s.checkpointed()
		}
	}
	all = append(all, toSVM...)
	// Two requests for the same reason may come to one checkpoint or to two.
	return slices.CompactFunc(all, func(a, b string) bool { return a == "checkpoint" && b == a })
}

// expected are the lines of a command's outcome for an engine and a step.
func expected(outcome, name string, step int) (lines []string) {
	for l := range strings.Lines(outcome) {
		for _, who := range []string{"both", name} {
			if rest, ok := strings.CutPrefix(l, fmt.Sprintf("%s %d: ", who, step)); ok {
				lines = append(lines, strings.TrimSpace(rest))
			}
		}
	}
	return lines
}

// outcome is how a step's outcome is printed.
func outcome(step int, qemu, lockstep []string) string {
	var b strings.Builder
	lines := func(name string, of []string) {
		for _, l := range of {
			fmt.Fprintf(&b, "%s %d: %s\n", name, step, l)
		}
	}
	if slices.Equal(qemu, lockstep) {
		lines("both", qemu)
	} else {
		lines("qemu", qemu)
		lines("lockstep", lockstep)
	}
	return b.String()
}

// run plays a scenario on both engines.
func run(t *testing.T, file string, c *colo, p *pair, base uint16, wait time.Duration) {
	runs := []*scenario{{engine: c, world: newWorld(base), wait: wait}, {engine: p, world: newWorld(base), wait: wait}}
	defer func() {
		if t.Failed() {
			st, err := p.status()
			t.Logf("causes: %+v, dropped: %v, %v", st.Causes, st.Dropped, err)
		}
		for _, s := range runs { // nothing is left for the next scenario
			if err := s.checkpoint(); err != nil {
				t.Error(err)
			}
			s.take()
		}
	}()
	datadriven.RunTest(t, file, func(t *testing.T, d *datadriven.TestData) string {
		switch d.Cmd {
		case "engines":
			return ""
		case "run":
		default:
			d.Fatalf(t, "there is no command %q", d.Cmd)
		}
		var b strings.Builder
		step := 0
		for line := range strings.Lines(d.Input) {
			step++
			got, errs := make([][]string, len(names)), make([]error, len(names))
			var both sync.WaitGroup
			for i, name := range names {
				both.Go(func() { got[i], errs[i] = runs[i].do(strings.TrimSpace(line), expected(d.Expected, name, step)) })
			}
			both.Wait()
			if err := errors.Join(errs...); err != nil {
				d.Fatalf(t, "%v", err)
			}
			b.WriteString(outcome(step, got[0], got[1]))
		}
		if b.Len() == 0 {
			return "nothing\n"
		}
		return b.String()
	})
}

func scenarios(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/scenarios/*")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	return files
}

// TestScenarios plays every scenario on both engines. Scenarios share the pair and the QEMU of
// their settings; each has connections of its own.
func TestScenarios(t *testing.T) {
	files := make(map[string][]string) // by settings
	for _, f := range scenarios(t) {
		s := settingOf(t, f)
		if _, ok := settings[s]; !ok {
			t.Fatalf("%s wants the settings %q, which there are not", f, s)
		}
		files[s] = append(files[s], f)
	}
	for pairs, group := range map[string][]string{patientPair: {"patient", "narrow", "full"}, impatientPair: {"impatient"}} {
		t.Run(group[0], func(t *testing.T) {
			t.Parallel() // one of them mostly waits
			p := startPair(t, pairs)
			base := uint16(1000)
			for _, name := range group {
				t.Run(name, func(t *testing.T) {
					c := startColo(t, settings[name].qemu)
					for _, f := range files[name] {
						base += 16
						t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) { run(t, f, c, p, base, settings[name].wait) })
					}
				})
			}
		})
	}
}
