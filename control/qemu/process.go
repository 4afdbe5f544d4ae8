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

	"lockstep/control/program"
	"lockstep/control/qmp"
)

// ErrNotRunning means that no QEMU of the spec runs on this host.
var ErrNotRunning = errors.New("QEMU does not run")

// Process is a running QEMU. It outlives the daemon that started it.
type Process struct {
	pid  int
	fd   int // pidfd: cannot come to mean another process
	done chan struct{}

	release sync.Once
	stop    [2]int // a pipe: closing its end stops the watch
}

// Start starts the guest: paused as a primary, or with in as a secondary that
// waits for one. It returns when the monitor answers; when QEMU ends before, with
// what that said. [Spec.Check] comes first.
//
// A secondary's overlays are made anew, and with them goes whatever a guest that
// took over had not yet merged into its image ([Merged]).
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
	for _, f := range []string{s.QMP, s.file(".pid")} { // what a killed QEMU leaves
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
	// A session of its own: no terminal's signal ends the guest.
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
	go cmd.Wait() // no zombie is left
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

// startup bounds how long QEMU may take from its start to its monitor's first answer;
// with much memory that it has to touch first it is minutes. gone bounds how long one
// that was killed may take to be gone: it may wait for storage that does not answer.
// Tests shorten them.
var startup, gone = 5 * time.Minute, 30 * time.Second

// answers waits until the monitor answers. The socket is there earlier; QEMU may
// still fail to make the guest's devices.
func (p *Process) answers(ctx context.Context, path string) error {
	ctx, done := context.WithTimeoutCause(ctx, startup, fmt.Errorf("not within %v", startup))
	defer done()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if m, err := qmp.Dial(ctx, path, slow); err == nil {
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

// Log is the end of what QEMU has printed since it was started, in one line.
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
	// QEMU writes the file itself, so it is right however soon the daemon died.
	b, err := os.ReadFile(s.file(".pid"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNotRunning
	}
	if err != nil {
		return nil, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid < 1 {
		return nil, ErrNotRunning // not yet written, or not by QEMU
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, ErrNotRunning
	}
	if err != nil {
		return nil, fmt.Errorf("process %d: pidfd: %w", pid, err)
	}
	// Behind a crash or a reboot the number may be another's. The command line of
	// the process that fd is, for as long as fd says that it lives.
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

// commandLine is a process's. To read it the kernel waits for one that holds its own
// memory, as while it waits for storage.
func commandLine(pid int) ([]byte, error) {
	ctx, done := context.WithTimeout(context.Background(), patience)
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

// watch takes over fd.
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

// Pid is the process's number.
func (p *Process) Pid() int { return p.pid }

// Done is closed when QEMU has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Alive reports whether QEMU has not ended.
func (p *Process) Alive() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Kill ends QEMU at once, as a crash would, and waits until it is gone.
func (p *Process) Kill(ctx context.Context) error {
	if err := unix.PidfdSendSignal(p.fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("QEMU, process %d: kill: %w", p.pid, err)
	}
	ctx, done := context.WithTimeoutCause(ctx, gone, fmt.Errorf("for %v: is the storage there that its images are on?", gone))
	defer done()
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("QEMU, process %d, was killed and is still there: %w", p.pid, context.Cause(ctx))
	}
}

// Release gives up the watch and leaves QEMU as it is. The Process must not be
// used behind it, and Done says nothing more.
func (p *Process) Release() {
	p.release.Do(func() {
		unix.Close(p.stop[1])
		unix.Close(p.fd)
	})
}
