// SPDX-License-Identifier: Apache-2.0

// Package program runs other programs, and whatever else may wait for storage that
// does not answer, for no longer than it may take.
package program

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// maxOutput bounds what is kept of each output: its end.
const maxOutput = 1 << 20

// grace is how long a program that was killed may take to be gone.
const grace = time.Second

// ErrGivenUp is an outcome that is not known: the program, or what else was waited for,
// had not ended when its time was up, and may still do so.
var ErrGivenUp = errors.New("given up")

// Output runs a program to its end and returns what it printed. When ctx ends first, it
// and its children are killed and the error is an [ErrGivenUp]. One that waits in the
// kernel for storage that is gone cannot be killed: it is left behind, and the same is
// not begun again before it has ended. Another exit code than 0 is an *[exec.ExitError].
func Output(ctx context.Context, name string, args ...string) (stdout, stderr string, err error) {
	return OutputEnv(ctx, nil, name, args...)
}

// OutputEnv is [Output] with variables ("NAME=value") added to the environment.
func OutputEnv(ctx context.Context, env []string, name string, args ...string) (stdout, stderr string, err error) {
	var out, errs tail
	err = Within(ctx, strings.Join(append([]string{name}, args...), "\x00"), func() error {
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Env = append(os.Environ(), env...)
		cmd.Stdout, cmd.Stderr = &out, &errs
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) } // its children too
		cmd.WaitDelay = grace / 2                                                            // one that left the group may hold the pipes
		return cmd.Run()
	})
	if errors.Is(err, errLeft) {
		return "", "", err // it may still write
	}
	return out.b.String(), strings.TrimSpace(errs.b.String()), err
}

// errLeft: what was waited for goes on.
var errLeft = fmt.Errorf("%w, and it cannot be ended", ErrGivenUp)

// left are the names of what was left behind and has not ended.
var left = struct {
	sync.Mutex
	names map[string]bool
}{names: make(map[string]bool)}

// Within waits for f, which ends soon after ctx does, or never: f may wait for storage
// that does not answer, and is left behind then. So that these do not pile up, f is not
// begun while another of the same name is left.
func Within(ctx context.Context, name string, f func() error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w: %w", ErrGivenUp, err)
	}
	left.Lock()
	before := left.names[name]
	left.Unlock()
	if before {
		return fmt.Errorf("%w: the one begun earlier still waits", errLeft)
	}
	ended := make(chan error, 1)
	go func() {
		err := f()
		left.Lock()
		defer left.Unlock()
		delete(left.names, name)
		ended <- err
	}()
	select {
	case err := <-ended:
		if ctx.Err() != nil && err != nil {
			return fmt.Errorf("%w: %w", ErrGivenUp, ctx.Err())
		}
		return err
	case <-ctx.Done():
	}
	late := time.NewTimer(grace)
	defer late.Stop()
	select {
	case err := <-ended:
		if err == nil {
			return nil // just in time
		}
		return fmt.Errorf("%w: %w", ErrGivenUp, ctx.Err())
	case <-late.C:
	}
	left.Lock()
	defer left.Unlock()
	if len(ended) == 0 {
		left.names[name] = true
	}
	return fmt.Errorf("%w: %w", errLeft, ctx.Err())
}

// tail keeps the last bytes of what is written to it. The buffer is not embedded: its
// ReadFrom would take all.
type tail struct{ b bytes.Buffer }

func (t *tail) Write(p []byte) (int, error) {
	n := len(p)
	t.b.Write(p[max(0, n-maxOutput):])
	t.b.Next(max(0, t.b.Len()-maxOutput))
	return n, nil
}
