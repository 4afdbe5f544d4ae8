// SPDX-License-Identifier: Apache-2.0

package program

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// soon is longer than a program that is given up may take.
const soon = 20 * time.Second

func TestOutput(t *testing.T) {
	out, errs, err := Output(t.Context(), "sh", "-c", "echo out; echo err >&2")
	if err != nil || out != "out\n" || errs != "err" {
		t.Errorf("%q, %q, %v", out, errs, err)
	}
	_, errs, err = Output(t.Context(), "sh", "-c", "echo why >&2; exit 3")
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 3 || errs != "why" || errors.Is(err, ErrGivenUp) {
		t.Errorf("%q, %v", errs, err)
	}
	if _, _, err = Output(t.Context(), "no-such-program"); err == nil || errors.Is(err, ErrGivenUp) {
		t.Error(err)
	}
	if out, _, err = Output(t.Context(), "sh", "-c", "yes | head -c 3000000; echo end"); err != nil || len(out) > maxOutput || !strings.HasSuffix(out, "end\n") {
		t.Errorf("%d bytes, %v", len(out), err)
	}
}

// TestOutputGivenUp: a program that does not end, whatever it does with signals and its
// children with its output, is given up, and nothing of it goes on.
func TestOutputGivenUp(t *testing.T) {
	for name, script := range map[string]string{
		"sleeps":                "sleep 1000",
		"has children":          "sleep 1000 & sleep 1000 & wait",
		"ignores signals":       "trap '' TERM INT HUP; while :; do sleep 1000; done",
		"prints without end":    "yes",
		"leaves a child behind": "sleep 1000 & exit 0",
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			began := time.Now()
			_, _, err := Output(ctx, "sh", "-c", script)
			if name != "leaves a child behind" && (!errors.Is(err, ErrGivenUp) || !errors.Is(err, context.DeadlineExceeded)) {
				t.Errorf("%v", err)
			}
			if took := time.Since(began); took > soon {
				t.Errorf("it took %v", took)
			}
		})
	}
}

// TestWithin: what waits in the kernel, here for the other end of a pipe, is abandoned.
func TestWithin(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	opened := make(chan struct{})
	open := func() error {
		f, err := os.Open(pipe)
		f.Close()
		close(opened)
		return err
	}
	if err := Within(ctx, pipe, open); !errors.Is(err, errAbandoned) || !errors.Is(err, ErrGivenUp) {
		t.Errorf("%v", err)
	}
	never := func() error { t.Error("it was begun"); return nil }
	if err := Within(t.Context(), pipe, never); !errors.Is(err, errAbandoned) || !strings.Contains(err.Error(), "still waits") {
		t.Errorf("%v", err)
	}
	if err := Within(t.Context(), "another", func() error { return nil }); err != nil {
		t.Errorf("another one: %v", err)
	}
	w, err := os.OpenFile(pipe, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	<-opened
	if err := Within(ctx, "late", never); !errors.Is(err, ErrGivenUp) {
		t.Errorf("%v", err)
	}
	for { // the abandoned one ends
		err := Within(t.Context(), pipe, func() error { return os.ErrExist })
		if errors.Is(err, os.ErrExist) {
			break
		}
		if !errors.Is(err, errAbandoned) {
			t.Fatal(err)
		}
		runtime.Gosched()
	}
}
