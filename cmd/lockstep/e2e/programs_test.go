// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"time"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Programs that people use, in guests that are namespaces, and at the client.

// programLimit bounds the wait for a program's end.
const programLimit = 5 * time.Minute

// program is one that a test started.
type program struct {
	cmd       *exec.Cmd
	out, errs bytes.Buffer
	ended     bool
}

// begin starts a program in a namespace. At the latest it ends with the test, and its children
// with it. When the test has failed what it wrote is shown.
func begin(p *pair, ns, name string, args ...string) *program {
	p.t.Helper()
	r := &program{cmd: lt.Command(ns, name, args...)}
	r.cmd.Stdout, r.cmd.Stderr = &r.out, &r.errs
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := r.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		if !r.ended {
			r.kill()
			r.end()
		}
		if p.t.Failed() && r.errs.Len() > 0 {
			p.t.Logf("%s in %s:\n%s", name, ns, r.errs.String())
		}
	})
	return r
}

func (r *program) kill() { syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL) }

// end waits for the program's end and returns what it printed.
func (r *program) end() (string, error) {
	limit := time.AfterFunc(programLimit, r.kill)
	defer limit.Stop()
	err := r.cmd.Wait()
	r.ended = true
	if err != nil {
		err = fmt.Errorf("%s: %w\n%s%s", strings.Join(r.cmd.Args[2:], " "), err, r.out.String(), r.errs.String())
	}
	return r.out.String(), err
}

// client runs a program at the client and returns what it prints.
func client(p *pair, name string, args ...string) string {
	p.t.Helper()
	out, err := begin(p, p.Client, name, args...).end()
	if err != nil {
		p.t.Fatal(err)
	}
	return out
}

// listens waits until something in a namespace takes connections or datagrams at a port.
func listens(p *pair, ns, port string) {
	p.t.Helper()
	lt.Eventually(p.t, 10*time.Second, func() (bool, string) {
		out, err := lt.Command(ns, "ss", "-Hlntu", "sport = :"+port).CombinedOutput()
		return err == nil && len(out) > 0, "nobody listens at port " + port + " in " + ns + string(out)
	})
}

// both has something done in both guests.
func both(p *pair, serve func(p *pair, ns string)) {
	p.t.Helper()
	for _, ns := range []string{p.PVM, p.SVM} {
		serve(p, ns)
	}
}

func serveRedis(p *pair, ns string) {
	p.t.Helper()
	begin(p, ns, "redis-server", "--port", portRedis, "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--appendonly", "no", "--dir", p.Dir)
	listens(p, ns, portRedis)
}
