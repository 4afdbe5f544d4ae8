// SPDX-License-Identifier: Apache-2.0

package journal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var silent = slog.New(slog.DiscardHandler)

func openIn(t testing.TB, dir string, limit int64) *Journal {
	t.Helper()
	j, err := Open(dir, "web1", "alpha", limit, silent)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(j.Close)
	return j
}

func readIn(t testing.TB, dir string, n int) []Event {
	t.Helper()
	events, err := Read(dir, "web1", "alpha", n)
	if err != nil {
		t.Fatal(err)
	}
	return events
}

// numbered events, and their numbers.
func number(i int) Event {
	return Event{Kind: Checkpoint, Cause: "divergence", Fields: map[string]any{"i": i}}
}

func numbers(events []Event) (all []string) {
	for _, e := range events {
		all = append(all, fmt.Sprint(e.Fields["i"]))
	}
	return all
}

func TestReadBack(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	if got := readIn(t, dir, 0); len(got) != 0 || got == nil {
		t.Errorf("before anything there is %v", got)
	}
	at := time.Date(2026, 11, 27, 8, 0, 0, 123456789, time.UTC)
	want := []Event{
		{Time: at, Kind: Daemon, Cause: "started", Fields: map[string]any{"role": "primary"}},
		{Time: at.Add(1), Kind: Checkpoint, Cause: "divergence\nin two lines, <&>", Fields: map[string]any{"epoch": json.Number("7"), "pause_ms": json.Number("3.25")}},
		{Time: at.Add(2), Kind: "what a later version writes"},
	}
	for _, e := range want { // each by a daemon of its own
		j := openIn(t, dir, DefaultLimit)
		j.Add(e)
		j.Close()
	}
	if d := cmp.Diff(want, readIn(t, dir, 0)); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
	if d := cmp.Diff(want[1:], readIn(t, dir, 2)); d != "" {
		t.Errorf("the last two: -want +got\n%s", d)
	}
	if got := readIn(t, dir, 99); len(got) != 3 {
		t.Errorf("of three the last 99 are %d", len(got))
	}
	if other, err := Read(dir, "web1", "beta", 0); err != nil || len(other) != 0 {
		t.Errorf("beta's: %v, %v", other, err)
	}
	j := openIn(t, dir, DefaultLimit)
	j.Add(Event{Kind: Session})
	j.Close()
	j.Close()
	j.Add(Event{Kind: Session}) // too late
	if got := readIn(t, dir, 1); got[0].Time.IsZero() {
		t.Error("an event without a time did not get one")
	}
}

// What a crash cut is left out, and the next event is whole.
func TestTornLine(t *testing.T) {
	dir := t.TempDir()
	j := openIn(t, dir, DefaultLimit)
	j.Add(number(0))
	j.Add(number(1))
	j.Close()
	file := path(dir, "web1", "alpha")
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	first := bytes.IndexByte(whole, '\n') + 1
	for cut := first; cut < len(whole); cut++ {
		if err := os.WriteFile(file, whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		if got := numbers(readIn(t, dir, 0)); len(got) != 1 {
			t.Fatalf("cut at %d: %v", cut, got)
		}
		j := openIn(t, dir, DefaultLimit)
		j.Add(number(2))
		j.Close()
		got := numbers(readIn(t, dir, 0))
		want := []string{"0", "2"}
		if cut == len(whole)-1 { // only the line's end was cut
			want = []string{"0", "1", "2"}
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Fatalf("cut at %d: -want +got\n%s", cut, d)
		}
	}
	if err := os.WriteFile(file, append([]byte("\n\x00\x00\x00\nnull\n{}\n[1]\n{\"kind\":\"x\"} {}\n"), whole...), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := numbers(readIn(t, dir, 0)); len(got) != 2 {
		t.Errorf("between rubbish there is %v", got)
	}
}

func TestRotation(t *testing.T) {
	dir := t.TempDir()
	const limit, count = 4096, 1000
	for i := 0; i < count; i += 100 { // over several daemons
		j := openIn(t, dir, limit)
		for k := range 100 {
			j.Add(number(i + k))
		}
		j.Close()
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 2 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, f := range files {
		info, err := f.Info()
		if err != nil || info.Size() > limit {
			t.Errorf("%s: %d bytes, %v", f.Name(), info.Size(), err)
		}
	}
	got := numbers(readIn(t, dir, 0))
	if len(got) < limit/150 || len(got) > 2*limit/50 {
		t.Errorf("%d events are kept", len(got))
	}
	for i, s := range got {
		if want := fmt.Sprint(count - len(got) + i); s != want {
			t.Fatalf("event %d is %s, want %s", i, s, want)
		}
	}
}

// Readers see whole events in order while files come and go under them.
func TestReadWhileWritten(t *testing.T) {
	dir := t.TempDir()
	j := openIn(t, dir, 2048)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Add(1)
	go func() {
		defer wg.Done()
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case j.events <- number(i): // not Add: none is to be lost here
			}
		}
	}()
	last := -1
	for range 2000 {
		for k, e := range readIn(t, dir, 0) {
			n, err := e.Fields["i"].(json.Number).Int64()
			if err != nil {
				t.Fatal(err)
			}
			if k > 0 && int(n) != last+1 {
				t.Errorf("%d follows %d", n, last)
			}
			last = int(n)
		}
	}
	close(stop)
	wg.Wait()
	if last < 0 {
		t.Error("nothing was read")
	}
}

// What the queue does not hold is counted, and no caller waits.
func TestLost(t *testing.T) {
	dir := t.TempDir()
	j := &Journal{
		path: path(dir, "web1", "alpha"), limit: DefaultLimit, log: silent,
		events: make(chan Event, queued), end: make(chan struct{}), ended: make(chan struct{}),
	}
	if err := j.open(); err != nil {
		t.Fatal(err)
	}
	for i := range queued + 5 {
		j.Add(number(i))
	}
	go j.write()
	j.Close()
	got := readIn(t, dir, 0)
	if len(got) != queued+1 {
		t.Fatalf("%d events", len(got))
	}
	if e := got[queued]; e.Kind != Lost || fmt.Sprint(e.Fields["events"]) != "5" {
		t.Errorf("%+v", e)
	}
}

// An event that JSON cannot tell still leaves a line.
func TestUnspeakable(t *testing.T) {
	dir := t.TempDir()
	j := openIn(t, dir, DefaultLimit)
	for _, e := range []Event{
		{Kind: Role, Cause: "a", Fields: map[string]any{"x": math.NaN()}},
		{Kind: Role, Cause: "b", Fields: map[string]any{"x": strings.Repeat("x", maxLine)}},
		{Kind: Role, Cause: strings.Repeat("c", maxLine)},
		{Kind: Role, Cause: "d", Time: time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)},
		{Kind: Role, Cause: "e\xff"},
	} {
		j.Add(e)
	}
	j.Close()
	got := readIn(t, dir, 0)
	if len(got) != 5 {
		t.Fatalf("%+v", got)
	}
	for i, e := range got {
		if e.Kind != Role || !strings.HasPrefix(e.Cause, string(rune('a'+i))) || (i < 4) != (e.Fields["missing"] != nil) {
			t.Errorf("%d: %.200s", i, fmt.Sprint(e))
		}
	}
}

// A full disk is logged once, and the journal goes on when there is room.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink("/dev/full", path(dir, "web1", "alpha")); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	j, err := Open(dir, "web1", "alpha", DefaultLimit, slog.New(slog.NewTextHandler(&out, nil)))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		j.Add(number(i))
	}
	j.Close()
	if n := strings.Count(out.String(), "the journal cannot be written"); n != 1 {
		t.Errorf("said %d times:\n%s", n, &out)
	}
	if _, err := Open(filepath.Join(dir, "none\x00"), "web1", "alpha", DefaultLimit, silent); err == nil {
		t.Error("opened nowhere")
	}
}

// writer is the environment variable that makes this binary a daemon which writes
// until it is killed.
const writer = "LOCKSTEP_TEST_JOURNAL"

func TestMain(m *testing.M) {
	dir := os.Getenv(writer)
	if dir == "" {
		os.Exit(m.Run())
	}
	j, err := Open(dir, "web1", "alpha", DefaultLimit, silent)
	if err != nil {
		panic(err)
	}
	for i := 0; ; i++ {
		j.events <- number(i)
		if i == queued+100 { // so that some are written
			fmt.Println("under way")
		}
	}
}

func TestKilled(t *testing.T) {
	dir := t.TempDir()
	for round := range 5 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), writer+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		_, rerr := out.Read(make([]byte, 1))
		kerr := cmd.Process.Kill()
		_ = cmd.Wait() // killed
		if err := errors.Join(rerr, kerr); err != nil {
			t.Fatal(err)
		}
		next, starts := "0", 0
		for _, s := range numbers(readIn(t, dir, 0)) {
			if s == "0" {
				starts++
			} else if s != next && starts > 0 {
				t.Fatalf("round %d: %s, want %s", round, s, next)
			}
			n, err := json.Number(s).Int64()
			if err != nil {
				t.Fatal(err)
			}
			next = fmt.Sprint(n + 1)
		}
		if starts == 0 {
			t.Fatalf("round %d: nothing was kept", round)
		}
	}
}
