// SPDX-License-Identifier: Apache-2.0

// Package program runs other programs, and functions that may wait for storage which
// does not answer, with a bound on how long the caller waits.
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

// maxOutput is how many bytes are kept of the end of each output.
const maxOutput = 1 << 20

// exitTimeout is how long a program that was killed may take to exit.
const exitTimeout = time.Second

// ErrGivenUp means that the outcome is not known: the program or function had not ended
// in time, and may still have its effect.
var ErrGivenUp = errors.New("given up")

// Output runs a program and returns the last MiB of what it printed. When ctx ends first,
// the program and its children are killed and the error is [ErrGivenUp]. A program that
// waits in the kernel for storage cannot be killed: it is left running, and the same
// command is refused until it has ended. An exit code other than 0 is an
// *[exec.ExitError].
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
		cmd.WaitDelay = exitTimeout / 2                                                      // a child that left the group may hold the pipes
		return cmd.Run()
	})
	if errors.Is(err, errAbandoned) {
		return "", "", err // the program may still write to out and errs
	}
	return out.b.String(), strings.TrimSpace(errs.b.String()), err
}

// errAbandoned means that the function goes on in the background.
var errAbandoned = fmt.Errorf("%w, and it cannot be ended", ErrGivenUp)

// abandoned holds the names of the functions that go on in the background.
var abandoned = struct {
	sync.Mutex
	names map[string]bool
}{names: make(map[string]bool)}

// Within runs f and waits for it until ctx ends and a little longer. If f waits for
// storage that does not answer, it is left running in the background and the error is
// [ErrGivenUp]. So that these do not pile up, f is not started while an earlier one of
// the same name is still running there.
func Within(ctx context.Context, name string, f func() error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w: %w", ErrGivenUp, err)
	}
	abandoned.Lock()
	before := abandoned.names[name]
	abandoned.Unlock()
	if before {
		return fmt.Errorf("%w: an earlier one still waits", errAbandoned)
	}
	ended := make(chan error, 1)
	go func() {
		err := f()
		abandoned.Lock()
		defer abandoned.Unlock()
		delete(abandoned.names, name)
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
	late := time.NewTimer(exitTimeout)
	defer late.Stop()
	select {
	case err := <-ended:
		if err == nil {
			return nil // just in time
		}
		return fmt.Errorf("%w: %w", ErrGivenUp, ctx.Err())
	case <-late.C:
	}
	abandoned.Lock()
	defer abandoned.Unlock()
	if len(ended) == 0 {
		abandoned.names[name] = true
	}
	return fmt.Errorf("%w: %w", errAbandoned, ctx.Err())
}

// tail keeps the last maxOutput bytes written to it. The buffer is not embedded because
// io.Copy would use its ReadFrom and keep everything.
type tail struct{ b bytes.Buffer }

func (t *tail) Write(p []byte) (int, error) {
	n := len(p)
	t.b.Write(p[max(0, n-maxOutput):])
	t.b.Next(max(0, t.b.Len()-maxOutput))
	return n, nil
}
