// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// What the OCF resource agent's actions end with.
const (
	ocfSuccess  = 0
	ocfGeneric  = 1
	ocfArgs     = 2
	ocfStopped  = 7
	ocfPromoted = 8
)

// agentPair is a pair whose nodes' daemons the OCF resource agent starts, without a cluster.
type agentPair struct {
	*unitPair
	dir string // with what everybody may run: the agent, and lockstep
}

func newAgentPair(t *testing.T) *agentPair {
	t.Helper()
	for _, tool := range []string{"ocf-tester", "xmllint"} {
		if _, err := exec.LookPath(tool); err != nil {
			lt.Missing(t, "%v: make deps installs it", err)
		}
	}
	p := &agentPair{unitPair: &unitPair{newLivingPair(t, 1, "")}}
	var err error
	if p.dir, err = os.MkdirTemp("", "lockstep-ocf-"); err != nil { // t.TempDir is its owner's
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(p.dir) })
	if err := os.Chmod(p.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	lt.Run(t, "cp", "../../../packaging/ocf/lockstep", filepath.Join(p.dir, "agent"))
	lt.Run(t, "cp", lockstepBinary(t, 0), filepath.Join(p.dir, "lockstep"))
	t.Cleanup(func() {
		for _, node := range []string{"alpha", "beta"} {
			if code, out := p.agent(node, "stop"); code != ocfSuccess {
				t.Errorf("the agent on %s does not stop the daemon: %d, %s", node, code, out)
			}
			if t.Failed() {
				log, _ := os.ReadFile(p.logFile(node))
				t.Logf("log of %s:\n%s", node, log)
			}
		}
	})
	return p
}

// parameters are the agent's on a node.
func (p *agentPair) parameters(node string) []string {
	return []string{"config=" + p.config, "node=" + node, "log=" + p.logFile(node)}
}

// score fails unless the last promotion score of a node is this: arguments of crm_attribute, which is played.
func (p *agentPair) score(node, want string) {
	p.t.Helper()
	b, err := os.ReadFile(filepath.Join(p.Dir, "tmp-"+node, "scores"))
	if err != nil {
		p.t.Fatal(err)
	}
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	if last := all[len(all)-1]; last != "-p "+want {
		p.t.Errorf("the last score of %s is %q, want %q", node, last, want)
	}
}

// command is one on a node's host, with what a resource agent finds in its environment.
func (p *agentPair) command(node, name string, args ...string) *exec.Cmd {
	p.t.Helper()
	tmp := filepath.Join(p.Dir, "tmp-"+node)
	if err := os.MkdirAll(tmp, 0o700); err != nil {
		p.t.Fatal(err)
	}
	played := fmt.Sprintf("#!/bin/sh\necho \"$*\" >>%s/scores\n", tmp)
	if err := os.WriteFile(filepath.Join(tmp, "crm_attribute"), []byte(played), 0o700); err != nil {
		p.t.Fatal(err)
	}
	cmd := lt.Command(p.host(node), name, args...)
	cmd.Env = append(os.Environ(), "PATH="+p.dir+":"+os.Getenv("PATH")+":/usr/sbin:/sbin", "OCF_ROOT=/usr/lib/ocf", "HA_RSCTMP="+tmp, "HA_SBIN_DIR="+tmp,
		"OCF_RESOURCE_INSTANCE=web1", "OCF_RESKEY_crm_feature_set=3.16.1", p.preload)
	return cmd
}

// agent has the agent of a node do something.
func (p *agentPair) agent(node, action string) (code int, out string) {
	p.t.Helper()
	cmd := p.command(node, filepath.Join(p.dir, "agent"), action)
	for _, x := range p.parameters(node) {
		cmd.Env = append(cmd.Env, "OCF_RESKEY_"+x)
	}
	b, err := cmd.CombinedOutput()
	var failed *exec.ExitError
	if err != nil && !errors.As(err, &failed) {
		p.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(b)
}

// does fails unless an action ends so, and says this.
func (p *agentPair) does(node, action string, code int, says string) {
	p.t.Helper()
	got, out := p.agent(node, action)
	if got != code || !strings.Contains(out, says) {
		p.t.Fatalf("%s on %s: %d, want %d and %q\n%s", action, node, got, code, says, out)
	}
}

// TestOCFTester: the tool of the resource agents' project finds no fault with the agent of a real pair. It stops the
// primary several times; each time the other host takes over, or nobody does.
func TestOCFTester(t *testing.T) {
	p := newAgentPair(t)
	p.ordered("alpha", "start", "--here")
	p.does("beta", "start", ocfSuccess, "")
	args := []string{"-v", "-n", "web1"}
	for _, x := range p.parameters("alpha") {
		args = append(args, "-o", x)
	}
	out, err := p.command("alpha", "ocf-tester", append(args, filepath.Join(p.dir, "agent"))...).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "passed all tests") || strings.Contains(string(out), "* rc=") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestOCFAgent: what each action of the agent does on a real pair. It never decides who transmits: a host that cannot
// take over refuses to be promoted, and what it is not ordered to do it reports by its score alone.
func TestOCFAgent(t *testing.T) {
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return // TestOCFTester stays
	}
	p := newAgentPair(t)
	both := []string{"alpha", "beta"}
	for _, node := range both {
		p.does(node, "validate-all", ocfSuccess, "")
		p.does(node, "monitor", ocfStopped, "")
		p.does(node, "stop", ocfSuccess, "")
	}
	p.ordered("alpha", "start", "--here")
	p.does("beta", "start", ocfSuccess, "")
	p.score("beta", "-D")
	p.does("beta", "promote", ocfGeneric, "beta cannot take over: it is secondary, start, and not covered")
	p.does("alpha", "start", ocfSuccess, "")
	p.covered()
	p.booted()
	p.lockstepped()
	watch := lt.WatchTransmitters(t, p.Switch, "portP", "portS")
	c, turns := p.open(), 1
	p.does("alpha", "monitor", ocfSuccess, "") // nobody has ordered a promotion
	p.score("alpha", "-v 100")
	p.does("alpha", "promote", ocfSuccess, "")
	p.does("alpha", "monitor", ocfPromoted, "")
	p.does("beta", "monitor", ocfSuccess, "")
	p.score("beta", "-v 10")

	// An order to demote alone changes nothing, and one to promote is a planned failover.
	p.does("alpha", "demote", ocfSuccess, "")
	p.does("alpha", "monitor", ocfSuccess, "")
	p.isPrimary("alpha")
	c.ask(5)
	p.does("beta", "promote", ocfSuccess, "")
	p.does("beta", "monitor", ocfPromoted, "")
	p.isPrimary("beta")
	turns++
	c.ask(5)
	p.does("alpha", "monitor", ocfSuccess, "")
	p.covered()

	// A daemon that dies is started again.
	daemons := func() (pids []int) {
		out, _ := exec.Command("pgrep", "-f", "^lockstep run -c "+p.config+" --node beta").Output()
		for _, word := range strings.Fields(string(out)) {
			var pid int
			if _, err := fmt.Sscan(word, &pid); err == nil {
				pids = append(pids, pid)
			}
		}
		return pids
	}
	before := daemons()
	if len(before) != 1 {
		t.Fatalf("daemons of beta: %v", before)
	}
	if err := syscall.Kill(before[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	p.does("beta", "monitor", ocfPromoted, "")
	p.covered()
	c.ask(5)

	// A host that takes over by itself is not promoted before Pacemaker says so: it would be taken for a failure.
	guest := p.qemu("beta")
	p.does("beta", "stop", ocfSuccess, "")
	began := time.Now()
	c.ask(1)
	t.Logf("after the primary was stopped the first answer took %v", time.Since(began))
	turns++
	p.isPrimary("alpha")
	p.does("alpha", "monitor", ocfSuccess, "")
	p.score("alpha", "-v 100")
	p.does("alpha", "promote", ocfSuccess, "")
	p.does("alpha", "monitor", ocfPromoted, "")
	p.does("beta", "monitor", ocfStopped, "")
	p.score("beta", "-D")
	if now := p.qemu("beta"); now != 0 {
		t.Errorf("after the stop the guest of beta, process %d, is %d", guest, now)
	}
	if _, there := p.tapUp("beta"); there {
		t.Error("after the stop the tap of beta is there")
	}
	p.does("beta", "start", ocfSuccess, "")
	p.covered()
	c.ask(5)

	// The guest powers off, and the agent boots it no more than a unit does.
	c.c.Close()
	p.end("poweroff")
	lt.Eventually(t, time.Minute, func() (bool, string) {
		return p.status("alpha") == nil && p.status("beta") == nil, "the daemons do not end"
	})
	p.does("alpha", "monitor", ocfGeneric, "no daemon answers: ")
	p.does("alpha", "stop", ocfSuccess, "")
	p.does("alpha", "start", ocfGeneric, "powered off and stays off; `lockstep start")
	p.does("alpha", "stop", ocfSuccess, "")
	p.ordered("alpha", "start")
	p.does("beta", "stop", ocfSuccess, "")
	p.does("beta", "start", ocfSuccess, "")
	p.does("alpha", "start", ocfSuccess, "")
	p.await("alpha", func(s *api.Status) bool { return s.Role == "primary" })
	if got := watch.Turns(); len(got) != turns {
		t.Errorf("turns of speech: %v, want %d", got, turns)
	}

	// A config that is wrong is this host's to mend.
	good, err := os.ReadFile(p.config)
	if err == nil {
		err = os.WriteFile(p.config, append(good, "nonsense: 1\n"...), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	p.does("beta", "validate-all", ocfArgs, "nonsense")
	if err := os.WriteFile(p.config, good, 0o600); err != nil {
		t.Fatal(err)
	}
}
