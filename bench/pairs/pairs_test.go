// SPDX-License-Identifier: Apache-2.0

package pairs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/bench/lab"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// The test binary is also the service of the guests and the client.
func TestMain(m *testing.M) {
	if len(os.Args) < 3 || os.Args[1] != "bench" || os.Args[2] != "act" {
		os.Exit(m.Run())
	}
	if err := lab.Act(os.Stdin, os.Stdout, os.Args[3:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// TestResults: a round that failed has no figure, and the case says in how many that was so; TCP's pauses
// are compared with a Unix socket's round by round.
func TestResults(t *testing.T) {
	vs := variants(lab.Options{})
	rs := newResults(vs)
	s := rs.of("lockstep")
	p50 := func(way string) key { return key{idle, way + ": guest's pause, p50"} }
	for _, ms := range []float64{10, 20} {
		s.put(p50(unixSocket), ms, []float64{ms})
		s.put(p50(tcp), 3*ms, nil)
	}
	s.instead([]key{p50(tcpTLS)}, "it stopped")
	s.instead([]key{p50(tcpTLS)}, "it stopped again")
	found := 0
	for _, c := range rs.finish(3) {
		got := c.Series["lockstep"]
		switch (key{c.Group, c.Name}) {
		case key{ratios, idle}:
			found++
			if !slices.Equal(got.Rounds, []float64{3, 3}) {
				t.Errorf("TCP over a Unix socket: %+v", got)
			}
		case p50(tcpTLS):
			found++
			if got.Instead != "in 2 of 3 rounds: it stopped" || len(got.Rounds) != 0 {
				t.Errorf("a case that failed: %+v", got)
			}
			if other := c.Series["no COLO"]; other.Instead != "has no second guest" {
				t.Errorf("a case that the variant has not: %+v", other)
			}
		case p50(unixSocket):
			found++
			if len(got.CDF) != 2 {
				t.Errorf("its times: %+v", got)
			}
		}
	}
	if found != 3 {
		t.Errorf("%d of 3 cases", found)
	}
}

// TestThatDoesNotStart: a pair that does not start is a result, not the end of the run.
func TestThatDoesNotStart(t *testing.T) {
	lt.NeedRoot(t)
	g := &guest{dir: t.TempDir()}
	g.qemu = filepath.Join(g.dir, "none")
	started := 0
	s := stage{func(ctx context.Context, w *world) (*pair, error) {
		started++
		_, err := alone(ctx, w)
		return nil, err
	}, jobs(lab.Options{Quick: true})}
	rs := newResults([]variant{{name: "v"}}).of("v")
	if err := s.turn(t.Context(), g, func(string) {}, rs); err != nil {
		t.Fatal(err)
	}
	if got := rs.of[key{echo, "p50"}].Instead; started != tries || !strings.Contains(got, "did not start") || !strings.Contains(got, "none") {
		t.Errorf("%d starts; instead: %q", started, got)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.turn(ended, g, func(string) {}, rs); !errors.Is(err, context.Canceled) {
		t.Errorf("when the run ends: %v", err)
	}
}

// TestNoQEMUIsLeft: a QEMU ends when the benchmark has been killed, and not before.
func TestNoQEMUIsLeft(t *testing.T) {
	owner, err := os.StartProcess("/bin/sleep", []string{"sleep", "1000"}, &os.ProcAttr{})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "qemu")
	if err := os.WriteFile(file, []byte(script("/bin/sleep", "LANG=C", owner.Pid)), 0o700); err != nil {
		t.Fatal(err)
	}
	qemu := exec.Command(file, "1000")
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- qemu.Wait() }()
	select {
	case err := <-ended:
		t.Errorf("it ended before its owner: %v", err)
	case <-time.After(1500 * time.Millisecond): // it is looked at once a second
	}
	if err := owner.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := owner.Wait(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Error("it outlives its owner")
		_ = qemu.Process.Kill()
	}
}
