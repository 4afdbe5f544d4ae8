// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gdamore/tcell/v2"
	"github.com/google/go-cmp/cmp"

	"github.com/lockstep-ft/lockstep/control/api"
)

// topSample is of a primary, two seconds after another one.
func topSample() sample {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.Local)
	lease, compared := 389.4, [...]uint32{1<<32 - 1000, 4000, 77}
	status := func(n uint64) api.Status {
		return api.Status{
			VM: "web1", Node: "alpha", Role: "primary", State: "replicating", Epoch: 12, Covered: true, ArbiterTerm: 3, LeaseMS: &lease,
			Connections: 3, HeldPackets: 2, HeldBytes: 2896, CheckpointsDone: 11, Peer: api.PeerStatus{Node: "beta", Connected: true},
			Counters: map[string]uint64{"released_out": 1000 * n, "fast_out": 900 * n, "fast_passed": 500 * n},
			Dropped:  map[string]uint64{"no_slot": 50 * n, "old epoch": 60, "shut": 0},
			Checkpoints: []api.Checkpoint{
				{At: at.Add(-9 * time.Second), Cause: "period", Result: "committed", FrozenMS: 4, PVMPauseMS: 2},
				{At: at.Add(-7 * time.Second), Cause: "payload differs", Flow: "10.0.0.2:80>10.0.0.9:40000", Result: "committed", FrozenMS: 30.25, PVMPauseMS: 16},
				{At: at.Add(-4 * time.Second), Cause: "timeout", Flow: "10.0.0.2:22>10.0.0.9:40001", Result: "no READY of the secondary in time", FrozenMS: 1000},
				{At: at, Cause: "timeout", Result: "running"},
			},
		}
	}
	flow := func(remote string, compared *uint32, held int, owner string) api.Flow {
		return api.Flow{Guest: "10.0.0.2:80", Remote: remote, State: "established", Owner: owner, Compared: compared, HeldBytes: held, Age: 1}
	}
	before := sample{at: at.Add(-2 * time.Second), status: status(1), flows: []api.Flow{flow("10.0.0.9:1", &compared[0], 0, "kernel"), flow("10.0.0.9:2", &compared[2], 0, "daemon")}}
	return sample{at: at, status: status(3), before: &before, flows: []api.Flow{
		flow("10.0.0.9:3", &compared[1], 0, "daemon"), flow("10.0.0.9:2", &compared[2], 2896, "daemon"), flow("10.0.0.9:1", &compared[1], 0, "kernel"),
	}}
}

// render is what a screen of that size shows.
func render(t *testing.T, s sample, width, height int) string {
	t.Helper()
	screen := tcell.NewSimulationScreen("UTF-8")
	if err := screen.Init(); err != nil {
		t.Fatal(err)
	}
	defer screen.Fini()
	screen.SetSize(width, height)
	drawTop(screen, &s)
	return shown(screen)
}

// shown is a screen's text.
func shown(screen tcell.SimulationScreen) string {
	cells, width, height := screen.GetContents()
	var lines []string
	for y := range height {
		var b strings.Builder
		for _, c := range cells[y*width : (y+1)*width] {
			b.WriteString(string(c.Runes))
		}
		lines = append(lines, strings.TrimRight(b.String(), " "))
	}
	return strings.TrimRight(strings.Join(lines, "\n"), "\n")
}

// watchedScreen keeps what it showed last, for another goroutine to look at.
type watchedScreen struct {
	tcell.SimulationScreen
	text atomic.Value
}

func (s *watchedScreen) Show() {
	s.SimulationScreen.Show()
	s.text.Store(shown(s.SimulationScreen))
}

func TestTopScreen(t *testing.T) {
	want := `
web1 on alpha: primary, replicating, epoch 12   03:04:05
peer        beta, connected
failover    the secondary can take over
lease       389 ms left
released    1500/s, 93 % of them by the kernel
held        2 packets, 2896 bytes, on 3 connections
checkpoints 11 done, pauses of the last 3: ▂█▁ up to 16.0 ms
  03:03:56  pause    2.0 ms, frozen    4.0 ms  period: committed
  03:03:58  pause   16.0 ms, frozen   30.2 ms  payload differs: committed  10.0.0.2:80>10.0.0.9:40000
  03:04:01  pause    0.0 ms, frozen 1000.0 ms  timeout: no READY of the secondary in time  10.0.0.2:22>10.0.0.9:40001
  03:04:05  pause    0.0 ms, frozen    0.0 ms  timeout: running
CONNECTION                                         BYTES/s     HELD  OWNER   STATE
10.0.0.2:80 > 10.0.0.9:1                              2500        0  kernel  established
10.0.0.2:80 > 10.0.0.9:2                                 0     2896  daemon  established
10.0.0.2:80 > 10.0.0.9:3                                 0        0  daemon  established
DROPPED (lockstep explain REASON)                 FRAMES/s      ALL
no_slot                                                 50      150
old epoch                                                0       60`
	if diff := cmp.Diff(want[1:], render(t, topSample(), 120, 24)); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	// Where there is little room, the connections give way first.
	for height := range 20 {
		s := topSample()
		if lines := topView(&s, height); len(lines) > height {
			t.Errorf("%d lines on a screen of %d", len(lines), height)
		} else if height >= 16 && !strings.HasPrefix(lines[len(lines)-1].text, "old epoch") {
			t.Errorf("the last of %d lines is %q", height, lines[len(lines)-1].text)
		}
	}
}

// What somebody should look at is there, and marked.
func TestTopAlarms(t *testing.T) {
	s := topSample()
	none := 0.0
	s.status.Covered, s.status.LeaseMS, s.status.Peer, s.status.Connections = false, &none, api.PeerStatus{Node: "beta", Error: "connection refused"}, maxListed+1
	s.status.Replication = &api.Replication{What: "memory", Done: 1 << 20, Total: 3 << 20, Rate: 5 << 20}
	s.status.GuestClock = api.GuestClock{PausedSeconds: 1.5, Error: "no answer in time"}
	s.err = errors.New("no daemon")
	alarms := make(map[string]bool)
	for _, l := range topView(&s, 40) {
		alarms[l.text] = l.style == topAlarm
	}
	for text, alarm := range map[string]bool{
		"NO ANSWER: no daemon": true, "peer        beta, NOT CONNECTED: connection refused": true, "failover    the secondary can NOT take over": true,
		"paused      1.5 s in all; NOT SET: no answer in time": true,
		"lease       over: the guest is MUTED":                 true, "copy        memory: 1 of 3 MiB, 5 MiB/s": false, "more than 10000 connections: `lockstep flows` lists them": false,
	} {
		if got, ok := alarms[text]; !ok || got != alarm {
			t.Errorf("%q is shown: %t, as an alarm: %t", text, ok, got)
		}
	}
}

// The screen goes on with what it knew while the daemon does not answer, and ends by a key.
func TestTopKeys(t *testing.T) {
	c := newCLI(t)
	screen := &watchedScreen{SimulationScreen: tcell.NewSimulationScreen("UTF-8")}
	w := &watcher{socket: c.dir + "/run/web1-alpha.sock", none: noDaemonError{"web1", "alpha", "its socket"}}
	ended := make(chan error, 1)
	go func() { ended <- topScreen(t.Context(), screen, w, topSample(), 10*time.Millisecond) }()
	until := func(ok func(string) bool) {
		t.Helper()
		for limit := time.Now().Add(20 * time.Second); ; <-time.After(10 * time.Millisecond) {
			text, _ := screen.text.Load().(string)
			if ok(text) {
				return
			}
			if time.Now().After(limit) {
				t.Fatalf("the screen shows\n%s", text)
			}
		}
	}
	silent := func(s string) bool {
		return strings.Contains(s, "NO ANSWER: no daemon of web1") && strings.Contains(s, "web1 on alpha: primary")
	}
	until(silent)
	c.daemonOf(t, new(watched))
	until(func(s string) bool { return strings.Contains(s, "web1 on alpha") && !strings.Contains(s, "NO ANSWER") })
	screen.InjectKey(tcell.KeyRune, 'x', 0) // is nothing
	screen.InjectKey(tcell.KeyRune, 'q', 0)
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestSparkline(t *testing.T) {
	for want, values := range map[string][]float64{"": nil, "▁▁": {0, 0}, "▁▂▅█": {0.1, 1.5, 4, 8}, "▁█": {-1, 1}} {
		if got := sparkline(values); got != want {
			t.Errorf("%v: %q, want %q", values, got, want)
		}
	}
}

// watched is a daemon whose counters grow.
type watched struct {
	api.Source
	asked atomic.Uint64
}

func (w *watched) Status(context.Context) (api.Status, error) {
	s := topSample().status
	s.Counters = map[string]uint64{"released_out": 1000 * w.asked.Add(1)}
	return s, nil
}

func (w *watched) Flows(context.Context) ([]api.Flow, error) { return topSample().flows, nil }

// Without a terminal there is a line for each look.
func TestTopLines(t *testing.T) {
	c := newCLI(t)
	const line = "top -c @/pair.yaml --node alpha"
	if code, stdout, stderr := c.run(t.Context(), line); code != exitNoDaemon || stdout != "" || !strings.Contains(stderr, "start it with `lockstep run`") {
		t.Errorf("without a daemon: exit %d, %q, %q", code, stdout, stderr)
	}
	if code, _, stderr := c.run(t.Context(), line+" --every 1ms"); code != exitUsage || !strings.Contains(stderr, "take 100ms or more") {
		t.Errorf("too often: exit %d, %q", code, stderr)
	}
	c.daemonOf(t, new(watched))
	code, stdout, stderr := c.run(t.Context(), line+" --every 100ms --count 3")
	want := regexp.MustCompile(`^\d\d:\d\d:\d\d primary replicating covered=true lease=389ms released/s=- held=2 connections=3 checkpoints=11 last="timeout" pause=0.0ms
(\d\d:\d\d:\d\d primary replicating covered=true lease=389ms released/s=\d+ held=2 connections=3 checkpoints=11 last="timeout" pause=0.0ms
){2}$`)
	if code != exitOK || stderr != "" || !want.MatchString(stdout) {
		t.Errorf("exit %d, %s\n%s", code, stderr, stdout)
	}
	s := topSample()
	if got := topLine(&s); !strings.HasSuffix(got, " dropped/s=50(no_slot)") {
		t.Errorf("%s", got)
	}
	// It ends when it is interrupted.
	ctx, stop := context.WithTimeout(t.Context(), 250*time.Millisecond)
	defer stop()
	if code, stdout, stderr := c.run(ctx, line+" --every 100ms"); code != exitOK || stderr != "" || strings.Count(stdout, "\n") < 1 {
		t.Errorf("interrupted: exit %d, %q, %q", code, stdout, stderr)
	}
}
