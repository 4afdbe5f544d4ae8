// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Process is one that the lab started. It does not outlive this one.
type Process struct {
	cmd  *exec.Cmd
	log  log
	done chan struct{} // closed when it has ended
	err  error         // of Wait, then
}

// log keeps the beginning of what a process says of itself.
type log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b.Write(p[:min(len(p), max(0, 64<<10-l.b.Len()))])
	return len(p), nil
}

// Start starts cmd in the namespace. Its stderr is kept.
func (n *NS) Start(cmd *exec.Cmd) (*Process, error) {
	p := &Process{cmd: cmd, done: make(chan struct{})}
	cmd.Stderr = &p.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true} // ^C is for this one
	if err := n.Do(cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// Self is this program in another role: the program's main calls the role's function when
// its arguments are "bench", "act", role and args. The Go runtime does not interrupt it.
func Self(role string, args ...string) (*exec.Cmd, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("look up this program: %w", err)
	}
	cmd := exec.Command(exe, append([]string{"bench", "act", role}, args...)...)
	cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1")
	return cmd, nil
}

// Log is the beginning of what it has written to stderr.
func (p *Process) Log() string {
	p.log.mu.Lock()
	defer p.log.mu.Unlock()
	return p.log.b.String()
}

// Short is the beginning of a text, on one line.
func Short(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	return s[:min(len(s), 300)]
}

// PID is its number.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Ended is closed when it has ended.
func (p *Process) Ended() <-chan struct{} { return p.done }

// Kill ends it at once.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill() // or it has ended
	<-p.done
}

// Stop asks it to end, and kills it if it has not within 10 s. The error is that of its end, with its log.
func (p *Process) Stop() error {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // or it has ended
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		p.Kill()
		return fmt.Errorf("%s did not end within 10 s; its log:\n%s", p.cmd.Path, p.Log())
	}
	if p.err != nil {
		return fmt.Errorf("%s: %w; its log:\n%s", p.cmd.Path, p.err, p.Log())
	}
	return nil
}

// Usage is what a process has used since it began.
type Usage struct {
	CPU   time.Duration // of its threads, with what they did in the kernel
	Waits uint64        // how often they gave up the CPU to wait, which each time costs a wake-up
}

var voluntary = regexp.MustCompile(`(?m)^voluntary_ctxt_switches:\s+(\d+)$`)

// UsageOf adds up a process's threads. Those that have ended are not counted.
func UsageOf(pid int) (u Usage, err error) {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil || len(threads) == 0 {
		return u, fmt.Errorf("process %d has ended: %w", pid, errors.Join(err, os.ErrProcessDone))
	}
	for _, t := range threads {
		sched, err := os.ReadFile(filepath.Join(t, "schedstat"))
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // the thread has ended meanwhile
		}
		if err != nil {
			return u, err
		}
		var ran time.Duration
		if _, err := fmt.Sscan(string(sched), &ran); err != nil {
			return u, fmt.Errorf("read %s/schedstat: %q: %w", t, sched, err)
		}
		u.CPU += ran
		status, err := os.ReadFile(filepath.Join(t, "status"))
		if m := voluntary.FindSubmatch(status); err == nil && m != nil {
			n, _ := strconv.ParseUint(string(m[1]), 10, 64)
			u.Waits += n
		}
	}
	return u, nil
}
