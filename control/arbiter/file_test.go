// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/config"
)

// claimant is the environment variable that makes this binary another host's
// process: it makes the claims that it reads from standard input.
const claimant = "LOCKSTEP_TEST_CLAIMANT"

func TestMain(m *testing.M) {
	if os.Getenv(claimant) == "" {
		os.Exit(m.Run())
	}
	f, err := openFile("web1", os.Getenv(claimant), &config.Arbiter{Path: os.Args[1], Timeout: long})
	if err != nil {
		panic(err)
	}
	if len(os.Args) > 2 && os.Args[2] == "crash" {
		f.beforeLink = func() {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var c claim
		if in.Decode(&c) != nil {
			return
		}
		var err error
		if c.Now, c.Swapped, err = f.Swap(context.Background(), c.Old, c.Next); err != nil {
			c.Error = err.Error()
		}
		if out.Encode(c) != nil {
			return
		}
	}
}

type claim struct {
	Old, Next, Now Entry
	Swapped        bool
	Error          string
}

// process is a claimant. Only Swap runs in it, the other methods in the test.
type process struct {
	*file
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startClaimant(t *testing.T, dir, node string, args ...string) *process {
	t.Helper()
	p := &process{file: openDir(t, dir, node)}
	p.cmd = exec.Command(os.Args[0], append([]string{dir}, args...)...)
	p.cmd.Env = append(os.Environ(), claimant+"="+node)
	p.cmd.Stderr = os.Stderr
	in, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.in, p.out = in, bufio.NewReader(out)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = p.cmd.Wait()
	})
	return p
}

func (p *process) Swap(_ context.Context, old, next Entry) (Entry, bool, error) {
	if err := json.NewEncoder(p.in).Encode(claim{Old: old, Next: next}); err != nil {
		return Entry{}, false, err
	}
	line, err := p.out.ReadBytes('\n')
	if err != nil {
		return Entry{}, false, err
	}
	var c claim
	if err := json.Unmarshal(line, &c); err != nil {
		return Entry{}, false, err
	}
	if c.Error != "" {
		return Entry{}, false, errors.New(c.Error)
	}
	return c.Now, c.Swapped, nil
}

func openDir(t *testing.T, dir, node string) *file {
	t.Helper()
	return open(t, node, config.Arbiter{Type: "file", Path: dir, Timeout: long}).(*file)
}

func TestFile(t *testing.T) {
	dir := t.TempDir()
	follow(t, openDir(t, dir, "alpha"), openDir(t, dir, "beta"))
}

// Two processes, as on two hosts.
func TestFileRace(t *testing.T) {
	dir := t.TempDir()
	race(t, startClaimant(t, dir, "alpha"), startClaimant(t, dir, "beta"), 100)
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if all, _ := os.ReadDir(dir); len(all) > keptEntries {
		t.Errorf("%d files are kept, and %d are enough", len(all), keptEntries)
	}
}

// A host that dies between writing its entry and linking it has changed nothing.
func TestFileCrashBeforeLink(t *testing.T) {
	dir := t.TempDir()
	alpha := openDir(t, dir, "alpha")
	if now, ok := swap(t, alpha, Entry{}, Entry{1, "alpha"}); !ok {
		t.Fatalf("there is %s", now)
	}
	beta := startClaimant(t, dir, "beta", "crash")
	if _, ok, err := beta.Swap(t.Context(), Entry{1, "alpha"}, Entry{2, "beta"}); ok || err == nil {
		t.Fatalf("the dead process says %v, %v", ok, err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".web1.beta.*")); len(left) != 1 {
		t.Fatalf("the dead process left %v", left)
	}
	if r := read(t, alpha); r != (Entry{1, "alpha"}) {
		t.Errorf("alpha reads %s", r)
	}
	again := openDir(t, dir, "beta")
	if r := settle(t, again); r != (Entry{1, "alpha"}) {
		t.Errorf("settled as %s", r)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if now, ok := swap(t, again, Entry{1, "alpha"}, Entry{2, "beta"}); !ok {
		t.Errorf("there is %s", now)
	}
}

// A change that was begun before Settle, and comes after it, must not count. The
// mutation shows that Settle's entry is what stops it.
func TestFileDelayedSwap(t *testing.T) {
	for name, mutate := range map[string]bool{"settled": false, "mutation": true} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			late, beta := openDir(t, dir, "beta"), openDir(t, dir, "beta")
			late.node = "late" // Settle sweeps up its own host's files, which is not what is tested
			beta.noBump = mutate
			if now, ok := swap(t, beta, Entry{}, Entry{1, "alpha"}); !ok {
				t.Fatalf("there is %s", now)
			}
			written, goOn := make(chan struct{}), make(chan struct{})
			late.beforeLink = func() {
				late.beforeLink = nil
				close(written)
				<-goOn
			}
			ctx, giveUp := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() {
				_, _, err := late.Swap(ctx, Entry{1, "alpha"}, Entry{2, "beta"})
				done <- err
			}()
			<-written
			giveUp()
			unknown(t, done)
			settled := settle(t, beta)
			if settled != (Entry{1, "alpha"}) {
				t.Fatalf("settled as %s", settled)
			}
			close(goOn)
			late.busy <- struct{}{} // it has ended
			if now := read(t, beta); (now == settled) == mutate {
				t.Errorf("settled as %s, and now there is %s (mutation %v)", settled, now, mutate)
			}
		})
	}
}

// The other host's Settle is no change that a Swap could lose against.
func TestFileSwapBesideSettle(t *testing.T) {
	dir := t.TempDir()
	alpha, beta := openDir(t, dir, "alpha"), openDir(t, dir, "beta")
	beta.beforeLink = func() {
		beta.beforeLink = nil
		settle(t, alpha)
	}
	if now, ok := swap(t, beta, Entry{}, Entry{1, "beta"}); !ok {
		t.Errorf("there is %s", now)
	}
}

// While storage hangs on a change whose caller gave up, nothing is settled. After it
// Settle returns the outcome.
func TestFileSlowStorage(t *testing.T) {
	dir := t.TempDir()
	a := openDir(t, dir, "alpha")
	goOn := make(chan struct{})
	a.beforeLink = func() { <-goOn }
	a.timeout = 50 * time.Millisecond
	if now, ok, err := a.Swap(t.Context(), Entry{}, Entry{1, "alpha"}); ok || err == nil {
		t.Fatalf("%s, %v, %v", now, ok, err)
	}
	if _, err := a.Settle(t.Context()); err == nil || !strings.Contains(err.Error(), "an earlier request still waits") {
		t.Fatalf("settled while the storage hangs: %v", err)
	}
	close(goOn)
	a.timeout = long
	if r := settle(t, a); r != (Entry{1, "alpha"}) {
		t.Errorf("settled as %s", r)
	}
}

// A number that was cleaned away is free again, and takes nothing.
func TestFileOldNumber(t *testing.T) {
	dir := t.TempDir()
	late, a := openDir(t, dir, "beta"), openDir(t, dir, "alpha")
	if now, ok := swap(t, a, Entry{}, Entry{1, "alpha"}); !ok {
		t.Fatalf("there is %s", now)
	}
	late.beforeLink = func() {
		late.beforeLink = nil
		for range keptEntries + 5 {
			settle(t, a)
		}
	}
	if now, ok := swap(t, late, Entry{1, "alpha"}, Entry{2, "beta"}); ok || now != (Entry{1, "alpha"}) {
		t.Errorf("%s, %v", now, ok)
	}
	if r := read(t, a); r != (Entry{1, "alpha"}) {
		t.Errorf("there is %s", r)
	}
}

func TestFileBadStorage(t *testing.T) {
	dir := t.TempDir()
	a := openDir(t, filepath.Join(dir, "none"), "alpha")
	if _, err := a.Settle(t.Context()); err == nil || !strings.Contains(err.Error(), "is the storage mounted?") {
		t.Errorf("no directory: %v", err)
	}
	if _, ok, err := a.Swap(t.Context(), Entry{}, Entry{1, "alpha"}); ok || err == nil {
		t.Errorf("no directory: %v %v", ok, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "none")); err == nil {
		t.Error("the directory was made")
	}
	a = openDir(t, dir, "alpha")
	if _, ok := swap(t, a, Entry{}, Entry{1, "alpha"}); !ok {
		t.Fatal("not swapped")
	}
	for _, bad := range []string{"", "{", `{"term":0,"speaker":"x"}`} {
		if err := os.WriteFile(a.name(9), []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Read(t.Context()); err == nil || !strings.Contains(err.Error(), a.name(9)) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	// Other guests' entries and other files there are not ours.
	if err := os.Remove(a.name(9)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"web10.00000000000000000009", "web1.x", "web1", "lost+found"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if r := read(t, a); r != (Entry{1, "alpha"}) {
		t.Errorf("there is %s", r)
	}
}
