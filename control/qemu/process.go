// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/program"
	"github.com/lockstep-ft/lockstep/control/qmp"
)

// ErrNotRunning means that no QEMU of the spec runs on this host.
var ErrNotRunning = errors.New("QEMU does not run")

// Process is a running QEMU. It outlives the daemon that started it.
type Process struct {
	pid  int
	fd   int // pidfd: unlike pid it never refers to another process
	done chan struct{}

	release sync.Once
	stop    [2]int // a pipe: closing its end stops the watch
}

// Start starts the guest: paused as a primary, or with in as a secondary that waits for
// its primary. It returns when the monitor answers. When QEMU ends before, the error has
// what QEMU printed. Call [Spec.Check] first.
//
// A secondary's overlays are made anew. What a guest that took over wrote and had not
// yet merged into its image ([Merged]) is lost.
func Start(ctx context.Context, s *Spec, in *Incoming) (*Process, error) {
	if p, err := Find(s); err == nil {
		defer p.Release()
		return nil, fmt.Errorf("guest %s runs on this host already, as process %d", s.VM, p.pid)
	}
	if in != nil {
		if err := s.makeOverlays(); err != nil {
			return nil, err
		}
	}
	d, err := s.dialect(ctx)
	if err != nil {
		return nil, err
	}
	args, err := s.args(d, in)
	if err != nil {
		return nil, err
	}
	for _, f := range []string{s.QMP, s.file(".pid")} { // left by a QEMU that was killed
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	log, err := os.OpenFile(s.file(".log"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(s.Binary, args...)
	cmd.Env = append(os.Environ(), s.Env...)
	cmd.Stdout, cmd.Stderr = log, log
	fd := -1
	// Setsid: a signal of the terminal does not reach the guest.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, PidFD: &fd}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("QEMU: %w", err)
	}
	if fd < 0 {
		cmd.Process.Kill()
		cmd.Wait()
		return nil, errors.New("QEMU: this kernel has no pidfd")
	}
	p, err := watch(cmd.Process.Pid, fd)
	if err != nil {
		cmd.Process.Kill()
		cmd.Wait()
		return nil, err
	}
	go cmd.Wait() // reaps the process
	if err := p.answers(ctx, s.QMP); err != nil {
		p.Kill(context.Background())
		p.Release()
		if said := Log(s); said != "" {
			err = fmt.Errorf("%w: %s", err, said)
		}
		return nil, err
	}
	return p, nil
}

// startTimeout bounds how long QEMU may take from its start to its monitor's first answer,
// which is minutes if it has to touch much memory first. Tests shorten it.
var startTimeout = 5 * time.Minute

// exitTimeout bounds how long a QEMU that was killed may take to exit: it waits for
// storage that does not answer.
const exitTimeout = 30 * time.Second

// answers waits until the monitor answers. That the socket exists is not enough: QEMU may
// still fail to make the guest's devices.
func (p *Process) answers(ctx context.Context, path string) error {
	ctx, done := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("not within %v", startTimeout))
	defer done()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if m, err := qmp.Dial(ctx, path, ioTimeout); err == nil {
			return m.Disconnect()
		}
		select {
		case <-tick.C:
		case <-p.done:
			return errors.New("QEMU ended at once")
		case <-ctx.Done():
			return fmt.Errorf("QEMU's monitor does not answer: %w", context.Cause(ctx))
		}
	}
}

// Log returns the last 1000 bytes that QEMU has printed since it was started, as one line.
func Log(s *Spec) string {
	b, err := os.ReadFile(s.file(".log"))
	if err != nil {
		return ""
	}
	return strings.Join(strings.Fields(string(b[max(0, len(b)-1000):])), " ")
}

// Find finds the QEMU that an earlier daemon started; [ErrNotRunning] when there
// is none.
func Find(s *Spec) (*Process, error) {
	// QEMU writes the file itself, so it exists even if the daemon died right after the start.
	b, err := os.ReadFile(s.file(".pid"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNotRunning
	}
	if err != nil {
		return nil, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid < 1 {
		return nil, ErrNotRunning // not written yet, or not by QEMU
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, ErrNotRunning
	}
	if err != nil {
		return nil, fmt.Errorf("process %d: pidfd: %w", pid, err)
	}
	// After a crash or a reboot the number may be another process's. The command line read
	// is that of fd's process if fd shows it alive afterwards.
	line, err := commandLine(pid)
	if errors.Is(err, program.ErrGivenUp) {
		unix.Close(fd)
		return nil, fmt.Errorf("process %d: whether it is the guest's is not known: its command line cannot be read: %w", pid, err)
	}
	if err != nil || !bytes.Contains(line, []byte("\x00-pidfile\x00"+s.file(".pid")+"\x00")) || unix.PidfdSendSignal(fd, 0, nil, 0) != nil {
		unix.Close(fd)
		return nil, ErrNotRunning
	}
	return watch(pid, fd)
}

// commandLine returns a process's command line. Reading it can block: the kernel takes
// the process's mmap lock, which a process that waits for storage may hold.
func commandLine(pid int) ([]byte, error) {
	ctx, done := context.WithTimeout(context.Background(), storageTimeout)
	defer done()
	path := fmt.Sprintf("/proc/%d/cmdline", pid)
	read := make(chan []byte, 1)
	err := program.Within(ctx, path, func() error {
		b, err := os.ReadFile(path)
		read <- b
		return err
	})
	if err != nil {
		return nil, err
	}
	return <-read, nil
}

// watch makes a Process of a pidfd, which it takes over, and closes done at its end.
func watch(pid, fd int) (*Process, error) {
	p := &Process{pid: pid, fd: fd, done: make(chan struct{})}
	if err := unix.Pipe2(p.stop[:], unix.O_CLOEXEC); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	go func() {
		defer unix.Close(p.stop[0])
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(p.stop[0]), Events: unix.POLLIN}}
		for {
			_, err := unix.Poll(fds, -1)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if fds[1].Revents == 0 && err == nil {
				close(p.done)
			}
			return
		}
	}()
	return p, nil
}

// Pid returns the process's ID.
func (p *Process) Pid() int { return p.pid }

// Done is closed when QEMU has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Alive reports whether QEMU has not ended, also where this program stood still when it did, and
// Done is not closed yet.
func (p *Process) Alive() bool {
	select {
	case <-p.done:
		return false
	default:
	}
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}, 0)
	return n == 0 || err != nil
}

// Kill sends SIGKILL and waits until QEMU is gone.
func (p *Process) Kill(ctx context.Context) error {
	if err := unix.PidfdSendSignal(p.fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("QEMU, process %d: kill: %w", p.pid, err)
	}
	ctx, done := context.WithTimeoutCause(ctx, exitTimeout, fmt.Errorf("for %v: is the storage there that its images are on?", exitTimeout))
	defer done()
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("QEMU, process %d, was killed and is still there: %w", p.pid, context.Cause(ctx))
	}
}

// Release frees the Process and leaves QEMU as it is. The Process must not be used
// afterwards: Done is never closed then.
func (p *Process) Release() {
	p.release.Do(func() {
		unix.Close(p.stop[1])
		unix.Close(p.fd)
	})
}
