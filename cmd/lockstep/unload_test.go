// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader"
)

func TestUnload(t *testing.T) {
	c := newCLI(t)
	if code, stdout, stderr := c.run(t.Context(), "unload -c @/pair.yaml --node beta --force"); code != 0 || stderr != "" || stdout != "No program, map or pin of web1 is left on beta, and its taps are down.\n" {
		t.Errorf("exit %d, %s%s", code, stdout, stderr)
	}
	if want := []string{"mute tapS", "unload web1 beta true", "remove lsx7", "remove tap tapS"}; !slices.Equal(c.calls, want) {
		t.Errorf("%v, want %v", c.calls, want)
	}
	c.kernel.unload = func(string, string, string, bool) error { return errors.New("the daemon lives; stop it first") }
	if code, _, stderr := c.run(t.Context(), "unload -c @/pair.yaml --node alpha"); code != 1 || stderr != "lockstep: the daemon lives; stop it first\n" {
		t.Errorf("exit %d, %s", code, stderr)
	}
}

// TestUnloadRunning: a guest that runs is muted, except where the arbiter names its node
// alone.
func TestUnloadRunning(t *testing.T) {
	alone, holds := datapath.Pinned{Role: datapath.RolePrimary, Mode: datapath.ModeSolo}, datapath.Pinned{Role: datapath.RolePrimary, Mode: datapath.ModeHold}
	for name, x := range map[string]struct {
		arbiter  string // config
		record   string // of the arbiter
		found    datapath.Pinned
		foundErr error
		goesOn   bool
		says     string
	}{
		"no arbiter, primary":      {found: holds, goesOn: true, says: "nothing compares"},
		"no arbiter, secondary":    {found: datapath.Pinned{Role: datapath.RoleSecondary, Mode: datapath.ModeRun}, says: "not the primary's"},
		"alone":                    {arbiter: "exec", record: "3 beta", found: alone, goesOn: true, says: "names this node"},
		"another speaks":           {arbiter: "exec", record: "4 alpha", found: alone, says: "does not name this node"},
		"replicates":               {arbiter: "exec", record: "3 beta", found: holds, says: "did not transmit alone"},
		"the arbiter is silent":    {arbiter: "exec", record: "", found: alone, says: "entry cannot be read"},
		"no tables":                {arbiter: "exec", record: "3 beta", says: "did not transmit alone"},
		"tables of another config": {arbiter: "exec", record: "3 beta", foundErr: errors.New("another ABI"), says: "another ABI"},
		"nobody keeps a record":    {arbiter: "none", found: alone, says: "does not name this node"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCLI(t)
			yaml := pairYAML
			switch x.arbiter {
			case "exec":
				c.write(t, "fence", "#!/bin/sh\necho "+x.record+"\n")
				if err := os.Chmod(filepath.Join(c.dir, "fence"), 0o700); err != nil {
					t.Fatal(err)
				}
				yaml = pairYAML + "arbiter: {type: exec, command: [" + filepath.Join(c.dir, "fence") + "]}\n"
			case "none":
				yaml += "arbiter: {type: none}\n"
			}
			c.write(t, "pair.yaml", yaml)
			c.kernel.inUse = func(tap string) (bool, error) { return tap == "tapS", nil }
			c.kernel.found = func(loader.Options) (datapath.Pinned, error) { return x.found, x.foundErr }
			code, _, stderr := c.run(t.Context(), "unload -c @/pair.yaml --node beta")
			if code != 1 || len(c.calls) > 0 || !strings.Contains(stderr, "a process has tap tapS open") || !strings.Contains(stderr, "Changing a setting") {
				t.Errorf("without --force: exit %d, %v, %s", code, c.calls, stderr)
			}
			code, stdout, stderr := c.run(t.Context(), "unload -c @/pair.yaml --node beta --force")
			want := []string{"mute tapS", "unload web1 beta true", "remove lsx7", "remove tap tapS"}
			if x.goesOn {
				want = []string{"let go web1 beta true", "remove lsx7", "remove tap tapS"}
			}
			if code != 0 || !slices.Equal(c.calls, want) || !strings.Contains(stderr, x.says) || strings.Contains(stdout, "is muted") == x.goesOn {
				t.Errorf("exit %d, %v\n%s%s", code, c.calls, stdout, stderr)
			}
			// Nobody knows whether a guest runs.
			c.calls = nil
			c.kernel.inUse = func(string) (bool, error) { return false, errors.New("no netlink") }
			if code, _, stderr := c.run(t.Context(), "unload -c @/pair.yaml --node beta --force"); code != 1 || len(c.calls) > 0 || !strings.Contains(stderr, "is not known: no netlink") {
				t.Errorf("exit %d, %v, %s", code, c.calls, stderr)
			}
		})
	}
	// What cannot be muted keeps its programs.
	c := newCLI(t)
	c.kernel.mute = func(string) error { return errors.New("not permitted") }
	if code, _, stderr := c.run(t.Context(), "unload -c @/pair.yaml --node beta --force"); code != 1 || len(c.calls) > 0 || !strings.Contains(stderr, "not permitted") {
		t.Errorf("exit %d, %v, %s", code, c.calls, stderr)
	}
}

// TestUnloadEndsGuest: with --end-guest the QEMU that lockstep started is gone before its programs are, and nothing is
// ended under a daemon, or that somebody else started.
func TestUnloadEndsGuest(t *testing.T) {
	c := newCLI(t)
	c.write(t, "pair.yaml", strings.Replace(pairYAML, ", qmp: alpha.qmp", "", 1)+"arbiter: {type: file, path: "+c.dir+"}\nqemu: {memory: 1G}\n")
	run := filepath.Join(c.dir, "run")
	if err := os.Mkdir(run, 0o700); err != nil {
		t.Fatal(err)
	}
	pid := filepath.Join(run, "web1-alpha.pid")
	guest := exec.Command("sh", "-c", `echo $$ >"$2"; echo; read -r end`, "played QEMU", "-pidfile", pid)
	if _, err := guest.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := guest.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := guest.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { guest.Process.Kill(); guest.Wait() })
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	lock := c.kernel.lock
	c.kernel.lock = func(string, string, string) (func(), error) { return nil, loader.ErrLocked }
	if code, _, stderr := c.run(t.Context(), "unload -c @/pair.yaml --node alpha --end-guest"); code != 1 || len(c.calls) > 0 || !strings.Contains(stderr, "is running; stop it first") {
		t.Errorf("under a daemon: exit %d, %v, %s", code, c.calls, stderr)
	}
	c.kernel.lock = lock
	if code, _, stderr := c.run(t.Context(), "unload -c @/pair.yaml --node alpha"); code != 1 || !strings.Contains(stderr, "QEMU is process") {
		t.Errorf("without the flag: exit %d, %s", code, stderr)
	}
	want := []string{"lock web1 alpha", "release", "mute tapP", "unload web1 alpha true"}
	if code, _, stderr := c.run(t.Context(), "unload -c @/pair.yaml --node alpha --end-guest"); code != 0 || !slices.Equal(c.calls, want) {
		t.Fatalf("exit %d, %v, want %v\n%s", code, c.calls, want, stderr)
	}
	if err := guest.Wait(); err == nil || guest.ProcessState.Exited() {
		t.Errorf("the guest ended with %v", err)
	}
	c.calls = nil // once more
	if code, _, stderr := c.run(t.Context(), "unload -c @/pair.yaml --node alpha --end-guest"); code != 0 || !slices.Equal(c.calls, want) {
		t.Errorf("without a guest: exit %d, %v\n%s", code, c.calls, stderr)
	}
	c.write(t, "pair.yaml", pairYAML)
	if code, _, stderr := c.run(t.Context(), "unload -c @/pair.yaml --node alpha --end-guest"); code != 1 || !strings.Contains(stderr, "lockstep did not start the QEMU of web1 on alpha") {
		t.Errorf("another's guest: exit %d, %s", code, stderr)
	}
}
