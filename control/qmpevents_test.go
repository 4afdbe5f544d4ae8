// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"go/ast"
	"go/parser"
	"go/token"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/journal"
	"github.com/lockstep-ft/lockstep/control/qmp"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Somebody has thought about every event that a QEMU may send: about those in the
// schema of the QEMU that is here, and about those of newer ones.
func TestEveryEventIsListed(t *testing.T) {
	list, err := os.ReadFile("testdata/qmp-events.txt")
	if err != nil {
		t.Fatal(err)
	}
	listed := make(map[string]bool)
	for line := range strings.Lines(string(list)) {
		if name := strings.TrimSpace(line); !strings.HasPrefix(name, "#") {
			listed[name] = true
		}
	}
	for name := range listed {
		if _, known := qmpEvents[name]; !known {
			t.Errorf("event %s is in no table", name)
		}
	}
	for name, e := range qmpEvents {
		if e.why == "" || !listed[name] {
			t.Errorf("event %s: reason %q, listed: %v", name, e.why, listed[name])
		}
	}
	installed := schemaEvents(t)
	if len(installed) < 40 {
		t.Fatalf("the schema has %d events", len(installed))
	}
	for _, name := range installed {
		if _, known := qmpEvents[name]; !known {
			t.Errorf("the installed QEMU's event %s is in no table", name)
		}
	}
}

// schemaEvents are the events in the schema of the installed QEMU.
func schemaEvents(t *testing.T) (names []string) {
	t.Helper()
	binary, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		lt.Missing(t, "no QEMU to ask: %v", err)
	}
	path := filepath.Join(t.TempDir(), "qmp")
	cmd := exec.CommandContext(t.Context(), binary, "-accel", "tcg", "-nodefaults", "-display", "none", "-m", "16M", "-S",
		"-qmp", "unix:"+path+",server=on,wait=off")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	again := backoff{first: 10 * time.Millisecond, last: 10 * time.Millisecond}
	m, err := qmp.Dial(ctx, path, patience)
	for err != nil {
		if !again.wait(ctx) {
			t.Fatal(err)
		}
		m, err = qmp.Dial(ctx, path, patience)
	}
	defer m.Disconnect()
	var schema []struct {
		Name string
		Type string `json:"meta-type"`
	}
	if err := m.Execute("query-qmp-schema", nil, &schema); err != nil {
		t.Fatal(err)
	}
	for _, s := range schema {
		if s.Type == "event" {
			names = append(names, s.Name)
		}
	}
	return names
}

// What the table says is acted on has a case where events are taken, and nothing else has.
func TestEventsActedOn(t *testing.T) {
	var cases []string
	for file, taker := range map[string]string{"monitor.go": "watchMonitor", "guest.go": "guestEvent"} {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			fn, ok := n.(*ast.FuncDecl)
			if ok {
				return fn.Name.Name == taker
			}
			if c, ok := n.(*ast.CaseClause); ok {
				for _, e := range c.List {
					if lit, ok := e.(*ast.BasicLit); ok && lit.Kind == token.STRING {
						name, _ := strconv.Unquote(lit.Value)
						cases = append(cases, name)
					}
				}
			}
			return true
		})
	}
	var acted []string
	for _, name := range slices.Sorted(maps.Keys(qmpEvents)) {
		if onEvent(name) == act {
			acted = append(acted, name)
		}
	}
	if slices.Sort(cases); len(acted) == 0 || !slices.Equal(cases, acted) {
		t.Errorf("there are cases for %v, the table has %v", cases, acted)
	}
}

// An event that is only reported is in the log and in the journal, an unknown one too,
// and a storm of them only now and then.
func TestReportedEvents(t *testing.T) {
	pair := newPair(t)
	p, _ := hosts(t, pair)
	read := p.keepJournal()
	p.start()
	p.await("QMP", func(st api.Status) bool { return st.QMP.Connected })
	now := time.Now()
	for _, name := range []string{"SUSPEND", "SOMETHING_NEW", "RTC_CHANGE"} {
		pair.Primary.Event(name, now)
	}
	const storm = 200
	for range storm {
		pair.Primary.Event("MEMORY_FAILURE", now)
	}
	pair.Primary.Stop() // behind all of them
	p.await("the stop", func(st api.Status) bool { return st.QMP.State == "paused" })
	p.end()
	count := make(map[string]int)
	for _, e := range read() {
		if e.Kind == journal.QEMU {
			count[e.Cause]++
		}
	}
	if n := count["MEMORY_FAILURE"]; count["SUSPEND"] != 1 || count["SOMETHING_NEW"] != 1 || count["RTC_CHANGE"] != 0 || n == 0 || n > storm/2 {
		t.Errorf("reported: %v", count)
	}
}

// keepJournal has a side's daemon write a journal; read ends and returns it.
func (s *side) keepJournal() (read func() []journal.Event) {
	s.t.Helper()
	dir := s.t.TempDir()
	j, err := journal.Open(dir, "web1", s.opt.Node, journal.DefaultLimit, slog.New(slog.DiscardHandler))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(j.Close)
	s.opt.Journal = j
	return func() []journal.Event {
		s.t.Helper()
		j.Close()
		events, err := journal.Read(dir, "web1", s.opt.Node, 0)
		if err != nil {
			s.t.Fatal(err)
		}
		return events
	}
}

// The journal tells of sessions: when one began, and why it ended.
func TestSessionEvents(t *testing.T) {
	p, s := hosts(t, nil)
	read := p.keepJournal()
	p.start()
	s.start()
	p.replicating()
	s.end()
	p.await("a lost peer", func(st api.Status) bool { return !st.Peer.Connected })
	p.end()
	var causes []string
	for _, e := range read() {
		if e.Kind == journal.Session {
			causes = append(causes, e.Cause)
		}
	}
	if len(causes) != 2 || causes[0] != "began" || causes[1] != "ended: beta's daemon has ended, or closed it" {
		t.Errorf("sessions: %q", causes)
	}
}
