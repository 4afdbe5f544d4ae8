// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control"
	"github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/journal"
	"github.com/lockstep-ft/lockstep/control/state"
)

// A node's roles follow each other as the arbiter's entry requires.
func TestRunLife(t *testing.T) {
	c := newCLI(t)
	dir := t.TempDir()
	c.write(t, "life.yaml", pairYAML+"arbiter: {type: file, path: "+dir+"}\nstate_dir: state\n")
	var parts []string
	ends := []error{control.ErrAfresh, control.ErrPromoted, control.ErrFenced}
	c.control = func(_ context.Context, o control.Options) error {
		b := o.Failover.Begin
		parts = append(parts, fmt.Sprintf("%s %s discard=%v", o.Role, b.Record, b.Discard))
		for _, n := range o.NICs {
			n.Close()
		}
		err := ends[0]
		if ends = ends[1:]; errors.Is(err, control.ErrPromoted) {
			// It won the arbiter before.
			rec := arbiter.Entry{Term: 2, Speaker: "alpha"}
			if _, won, err := o.Failover.Arbiter.Swap(t.Context(), b.Record, rec); !won || err != nil {
				t.Errorf("swap: %v, %v", won, err)
			}
		}
		return err
	}
	// The first to be primary has the record name it.
	run := func(line string, wantCode int, says string, want ...string) {
		t.Helper()
		parts = nil
		code, _, stderr := c.run(t.Context(), "run -c @/life.yaml "+line)
		if code != wantCode || !strings.Contains(lastLine(stderr), says) || !slices.Equal(parts, want) {
			t.Errorf("%s: exit %d, parts %q\nwant %d, %q\n%s", line, code, parts, wantCode, want, stderr)
		}
	}
	ends = []error{control.ErrFenced}
	c.write(t, "life.yaml", strings.Replace(pairYAML, "beta: {", "beta: {qmp: b.qmp, ", 1)+"arbiter: {type: file, path: "+dir+"}\nstate_dir: state\n")
	run("--node beta --role primary", 1, "may not transmit for the guest any more", `primary fencing term 1, speaker beta discard=true`)
	ends = []error{control.ErrAfresh, control.ErrPromoted, control.ErrFenced}
	run("--node alpha --role secondary", 1, "may not transmit",
		"secondary fencing term 1, speaker beta discard=true", "secondary fencing term 1, speaker beta discard=true", "primary fencing term 2, speaker alpha discard=true")
	run("--node beta --role primary", exitUsage, "beta is not primary any more: alpha transmits for the guest (fencing term 2, speaker alpha)")
	ends = []error{control.ErrFenced}
	run("--node alpha --role secondary", 1, "may not transmit", "primary fencing term 2, speaker alpha discard=true")

	// When a daemon began, and why it ended, is in the journal.
	events, err := journal.Read(filepath.Join(c.dir, "state"), "web1", "alpha", 0)
	if err != nil {
		t.Fatal(err)
	}
	var daemon []string
	for _, e := range events {
		if e.Kind == journal.Daemon {
			daemon = append(daemon, e.Cause)
		}
	}
	ended := "ended: " + control.ErrFenced.Error()
	if want := []string{"started", ended, "started", ended}; !slices.Equal(daemon, want) {
		t.Errorf("daemon events %q, want %q", daemon, want)
	}
}

// To systemd a guest that is off is a daemon that was ready and has ended, and no start that failed, which it would repeat.
func TestOffIsReady(t *testing.T) {
	c := newCLI(t)
	c.write(t, "off.yaml", strings.Replace(pairYAML, ", qmp: alpha.qmp", "", 1)+"arbiter: {type: file, path: "+c.dir+"}\nstate_dir: state\nqemu: {memory: 1G}\n")
	store, err := state.Open(filepath.Join(c.dir, "state"), "web1", "alpha")
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Save(state.State{Role: "primary", Term: 1, Off: true}); err != nil {
		t.Fatal(err)
	}
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(c.dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer systemd.Close()
	t.Setenv("NOTIFY_SOCKET", systemd.LocalAddr().String())
	if code, _, stderr := c.run(t.Context(), "run -c @/off.yaml --node alpha"); code != exitOK || !strings.Contains(stderr, "powered off and stays off") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	for _, want := range []string{"READY=1", "STOPPING=1"} {
		b := make([]byte, 100)
		systemd.SetReadDeadline(time.Now().Add(10 * time.Second))
		if n, err := systemd.Read(b); err != nil || string(b[:n]) != want {
			t.Errorf("systemd heard %q, %v, want %q", b[:n], err, want)
		}
	}
}

// A daemon that is stopped while it asks the arbiter has done what it was told.
func TestStoppedBeforeARole(t *testing.T) {
	c := newCLI(t)
	missing := filepath.Join(t.TempDir(), "not-mounted")
	c.write(t, "stopped.yaml", pairYAML+"arbiter: {type: file, path: "+missing+"}\nstate_dir: state\n")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if code, _, stderr := c.run(ctx, "run -c @/stopped.yaml --node alpha --role primary"); code != exitOK || !strings.Contains(stderr, "the arbiter does not answer") {
		t.Errorf("exit %d, want 0:\n%s", code, stderr)
	}
	events, err := journal.Read(filepath.Join(c.dir, "state"), "web1", "alpha", 0)
	if err != nil || len(events) == 0 || events[len(events)-1].Cause != "ended: on request" {
		t.Errorf("the journal has %+v (%v)", events, err)
	}
}

// swapEntry changes the arbiter's entry of a term, as beta would.
func swapEntry(t *testing.T, conf *config.Config) (swap func(term uint64, from, to string)) {
	t.Helper()
	beta, err := arbiter.Open(conf, "beta")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { beta.Close() })
	return func(term uint64, from, to string) {
		t.Helper()
		if _, won, err := beta.Swap(t.Context(), arbiter.Entry{Term: term, Speaker: from}, arbiter.Entry{Term: term + 1, Speaker: to}); !won || err != nil {
			t.Errorf("swap: %v, %v", won, err)
		}
	}
}

// Without a role a node is what the arbiter's entry has it be, also when that changes: nobody has to edit a command line.
func TestAutoRole(t *testing.T) {
	c := newCLI(t)
	dir := t.TempDir()
	c.write(t, "auto.yaml", strings.Replace(pairYAML, "beta: {", "beta: {qmp: b.qmp, ", 1)+"arbiter: {type: file, path: "+dir+"}\nstate_dir: state\nheartbeat: {interval: 10ms, timeout: 50ms, lease: 40ms, restart: 100ms}\n")
	conf, err := config.Load(filepath.Join(c.dir, "auto.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	swap := swapEntry(t, conf)
	var parts []string
	var ends []func() error
	c.control = func(_ context.Context, o control.Options) error {
		parts = append(parts, fmt.Sprintf("%s %s", o.Role, o.Failover.Begin.Record))
		// As a primary does when it begins.
		if err := o.Failover.Store.Save(state.State{Role: string(o.Role), Term: o.Failover.Begin.Record.Term}); err != nil {
			t.Error(err)
		}
		for _, n := range o.NICs {
			n.Close()
		}
		end := ends[0]
		ends = ends[1:]
		return end()
	}
	fenced := fmt.Errorf("%w: its QEMU is dead", control.ErrFenced)
	// Its QEMU dies while nobody else is there: it begins again as the primary. It dies again, and the other node takes
	// over; it follows, takes over, and is deposed.
	ends = []func() error{
		func() error { return fenced },
		func() error {
			time.AfterFunc(50*time.Millisecond, func() { swap(1, "alpha", "beta") })
			return fenced
		},
		func() error { swap(2, "beta", "alpha"); return control.ErrPromoted },
		func() error { swap(3, "alpha", "beta"); return fenced },
		func() error { return control.ErrAfresh },
		func() error { return control.ErrPoweredOff },
	}
	// It waits until somebody says which node has the guest's disks.
	code, waited := make(chan int, 1), make(chan string, 1)
	go func() {
		x, _, stderr := c.run(t.Context(), "run -c @/auto.yaml --node alpha")
		code <- x
		waited <- stderr
	}()
	select {
	case x := <-code:
		t.Fatalf("it ended with %d:\n%s", x, <-waited)
	case <-time.After(100 * time.Millisecond): // in which it would
	}
	x, stdout, stderr := c.run(t.Context(), "status -c @/auto.yaml --node alpha")
	if x != exitOK || !strings.Contains(stdout, "no role yet, waiting, epoch 0: the pair has never run") {
		t.Errorf("status of one that waits: exit %d, %s%s", x, stdout, stderr)
	}
	if x, _, stderr := c.run(t.Context(), "failover -c @/auto.yaml --node alpha"); x != exitFailed || !strings.Contains(stderr, "the pair has never run") {
		t.Errorf("failover of one that waits: exit %d, %s", x, stderr)
	}
	store, err := state.Open(conf.StateDir, "web1", "alpha")
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Save(state.State{Role: "primary"}); err != nil { // `lockstep start --here`
		t.Fatal(err)
	}
	swap(0, "", "alpha")
	if x := <-code; x != exitOK {
		t.Errorf("exit %d", x)
	}
	stderr = <-waited
	want := []string{"primary fencing term 1, speaker alpha", "primary fencing term 1, speaker alpha", "secondary fencing term 2, speaker beta",
		"primary fencing term 3, speaker alpha", "secondary fencing term 4, speaker beta", "secondary fencing term 4, speaker beta"}
	if !slices.Equal(parts, want) {
		t.Errorf("%q\nwant %q\n%s", parts, want, stderr)
	}
	for _, says := range []string{"waiting: the pair has never run", "lockstep start --here", "alpha is the primary", "alpha is the secondary", "the arbiter names beta (fencing term 2, speaker beta)", "its QEMU is dead"} {
		if !strings.Contains(stderr, says) {
			t.Errorf("no %q in\n%s", says, stderr)
		}
	}
	// A host that was replaced does not begin with disks that are not the guest's.
	swap(4, "beta", "alpha")
	if err := os.Remove(store.Path()); err != nil {
		t.Fatal(err)
	}
	if x, _, stderr := c.run(t.Context(), "run -c @/auto.yaml --node alpha --role auto"); x != exitUsage || !strings.Contains(stderr, "this host was replaced") {
		t.Errorf("exit %d\n%s", x, stderr)
	}
}
