// SPDX-License-Identifier: Apache-2.0

// Package arbitertest runs a real etcd server for tests, and a proxy in front of
// it that loses and delays what a test wants lost or late.
package arbitertest

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Options of an etcd server. The zero value is one that only a Proxy reaches.
type Options struct {
	// Listen is an address like "192.0.2.9:2379"; "": a Unix socket, so that no
	// port is taken that another test wants.
	Listen string
	// Command makes the process, in a network namespace perhaps; nil: exec.Command.
	Command func(name string, args ...string) *exec.Cmd
	// CA, Cert and Key make it serve TLS, and ask clients for a certificate of CA.
	CA, Cert, Key string
}

// Etcd is a server of one member.
type Etcd struct {
	opt  Options
	dir  string
	cmd  *exec.Cmd
	done chan struct{}
}

// StartEtcd starts a server, which ends with the test.
func StartEtcd(t testing.TB, opt Options) *Etcd {
	t.Helper()
	if _, err := exec.LookPath("etcd"); err != nil {
		lt.Missing(t, "no etcd (package etcd-server): %v", err)
	}
	// A Unix socket's path is short, a test's directory may not be.
	dir, err := os.MkdirTemp("", "etcd")
	if err != nil {
		t.Fatal(err)
	}
	e := &Etcd{opt: opt, dir: dir}
	t.Cleanup(func() {
		e.Kill(t)
		os.RemoveAll(dir)
	})
	e.Start(t)
	return e
}

// Start starts it again over the same data, and waits until it serves.
func (e *Etcd) Start(t testing.TB) {
	t.Helper()
	scheme := "unix"
	client := "client:1" // the socket's name: etcd wants a port
	if e.opt.Listen != "" {
		scheme, client = "http", e.opt.Listen
	}
	var args []string
	if e.opt.Cert != "" {
		scheme = map[string]string{"unix": "unixs", "http": "https"}[scheme]
		args = []string{"--cert-file", e.opt.Cert, "--key-file", e.opt.Key, "--client-cert-auth", "--trusted-ca-file", e.opt.CA}
	}
	listen := scheme + "://" + client
	args = append(args, "--data-dir", "data", "--logger", "zap", "--log-level", "warn",
		"--listen-client-urls", listen, "--advertise-client-urls", listen,
		"--listen-peer-urls", "unix://peer:1", "--initial-advertise-peer-urls", "unix://peer:1",
		"--initial-cluster", "default=unix://peer:1", "--listen-metrics-urls", "unix://health:1")
	command := e.opt.Command
	if command == nil {
		command = exec.Command
	}
	for _, s := range []string{"client:1", "peer:1", "health:1"} {
		os.Remove(filepath.Join(e.dir, s)) // of one that was killed
	}
	log, err := os.OpenFile(filepath.Join(e.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	e.cmd = command("etcd", args...)
	e.cmd.Dir, e.cmd.Stdout, e.cmd.Stderr = e.dir, log, log
	if e.cmd.SysProcAttr == nil {
		e.cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	if err := e.cmd.Start(); err != nil {
		t.Fatalf("start etcd: %v", err)
	}
	done := make(chan struct{})
	e.done = done
	go func() {
		_ = e.cmd.Wait() // it ends by a signal
		close(done)
	}()
	health := http.Client{Timeout: time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(e.dir, "health:1"))
		},
	}}
	limit := time.After(30 * time.Second)
	for {
		resp, err := health.Get("http://etcd/health")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return
			}
			err = fmt.Errorf("health: %s", resp.Status)
		}
		select {
		case <-done:
			t.Fatalf("etcd ended:\n%s", e.log())
		case <-limit:
			t.Fatalf("etcd does not serve: %v\n%s", err, e.log())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (e *Etcd) log() []byte {
	b, _ := os.ReadFile(filepath.Join(e.dir, "log"))
	return b[max(0, len(b)-4000):]
}

// Kill ends it as a crash does.
func (e *Etcd) Kill(t testing.TB) {
	t.Helper()
	if e.cmd == nil || e.cmd.Process == nil {
		return
	}
	_ = e.cmd.Process.Kill() // it may have ended
	<-e.done
}

// Stop halts it: connections stay up, and nothing answers.
func (e *Etcd) Stop(t testing.TB) {
	t.Helper()
	e.signal(t, syscall.SIGSTOP)
	for limit := time.After(patience); !e.stopped(t); {
		select {
		case <-limit:
			t.Fatal("etcd does not stop")
		case <-time.After(time.Millisecond):
		}
	}
}

// stopped: each thread stops by itself.
func (e *Etcd) stopped(t testing.TB) bool {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", e.cmd.Process.Pid))
	if err != nil || len(tasks) == 0 {
		t.Fatalf("etcd's threads: %v", err)
	}
	for _, f := range tasks {
		b, err := os.ReadFile(f)
		if _, rest, ok := strings.Cut(string(b), ") "); err == nil && ok && !strings.HasPrefix(rest, "T") {
			return false
		}
	}
	return true
}

// Continue ends Stop.
func (e *Etcd) Continue(t testing.TB) { e.signal(t, syscall.SIGCONT) }

func (e *Etcd) signal(t testing.TB, s syscall.Signal) {
	t.Helper()
	if err := e.cmd.Process.Signal(s); err != nil {
		t.Fatalf("signal etcd: %v", err)
	}
}

// address is the address to dial.
func (e *Etcd) address() (network, address string) {
	if e.opt.Listen != "" {
		return "tcp", e.opt.Listen
	}
	return "unix", filepath.Join(e.dir, "client:1")
}
