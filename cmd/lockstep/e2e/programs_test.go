// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"strings"
	"syscall"
	"time"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Programs that people use, in guests that are namespaces, and at the client.

// clientLimit ends a client's program that hangs, in seconds.
const clientLimit = "300"

// program starts a program in a namespace, which ends with the test, and its children with it.
// When the test has failed it shows what they wrote.
func (p *pair) program(ns, name string, args ...string) {
	p.t.Helper()
	var log bytes.Buffer
	cmd := lt.Command(ns, name, args...)
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // fails when they have ended
		cmd.Wait()
		if p.t.Failed() {
			p.t.Logf("%s in %s:\n%s", name, ns, log.String())
		}
	})
}

// listens waits until something in a namespace takes connections or datagrams at a port.
func (p *pair) listens(ns, port string) {
	p.t.Helper()
	lt.Eventually(p.t, 10*time.Second, func() (bool, string) {
		out, err := lt.Command(ns, "ss", "-Hlntu", "sport = :"+port).CombinedOutput()
		return err == nil && len(out) > 0, "nobody listens at port " + port + " in " + ns + string(out)
	})
}

// both has something done in both guests.
func (p *pair) both(serve func(p *pair, ns string)) {
	p.t.Helper()
	for _, ns := range []string{p.PVM, p.SVM} {
		serve(p, ns)
	}
}

// client runs a program at the client and returns what it prints.
func (p *pair) client(name string, args ...string) string {
	p.t.Helper()
	var out, errs bytes.Buffer
	cmd := lt.Command(p.Client, "timeout", append([]string{clientLimit, name}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		p.t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out.String(), errs.String())
	}
	return out.String()
}

func serveRedis(p *pair, ns string) {
	p.t.Helper()
	p.program(ns, "redis-server", "--port", portRedis, "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--appendonly", "no", "--dir", p.Dir)
	p.listens(ns, portRedis)
}
