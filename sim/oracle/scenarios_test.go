// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
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
//	isn pvm=n svm=n client=n
//	                       other initial sequence numbers
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

var names = []string{"qemu", "lockstep"}

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
	defer func() {
		time.Sleep(settled / 3)
		for i, s := range runs {
			err := s.settle()
			if late := s.texts(); err != nil || len(late) > 0 {
				t.Errorf("%s, after the last step: %q, %v", names[i], late, err)
			}
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
	t.Parallel()
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

var setBy = regexp.MustCompile(`(?m)^engines (\S+)$`)

// settingOf names the settings that a scenario wants.
func settingOf(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if m := setBy.FindSubmatch(b); m != nil {
		return string(m[1])
	}
	return "patient"
}
