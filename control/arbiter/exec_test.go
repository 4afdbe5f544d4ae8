// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/config"
)

// keeper is a command that keeps its contract, with a file in place of a third
// host, and notes whom it fences.
const keeper = `set -eu
dir=$1; shift
exec 9>"$dir/lock"; flock 9
now=$(cat "$dir/record" 2>/dev/null || echo 0)
if [ "$1" = swap ]; then
	term=$3 old=$4 new=$5 other=$6
	was=0; [ "$old" = - ] || was="$((term - 1)) $old"
	if [ "$now" = "$was" ]; then
		echo "$other" >>"$dir/fenced"
		echo "$term $new" >"$dir/new"; sync "$dir/new"; mv "$dir/new" "$dir/record"
	fi
fi
cat "$dir/record" 2>/dev/null || echo 0
`

func openExec(t *testing.T, node string, timeout time.Duration, command ...string) *execArbiter {
	t.Helper()
	return open(t, node, config.Arbiter{Type: "exec", Command: command, Timeout: timeout}).(*execArbiter)
}

// sh is a command from a script that ends with what lockstep appends.
func sh(script string, args ...string) []string {
	return append([]string{"/bin/sh", "-c", script, "sh"}, args...)
}

func TestExec(t *testing.T) {
	dir := t.TempDir()
	follow(t, openExec(t, "alpha", long, sh(keeper, dir)...), openExec(t, "beta", long, sh(keeper, dir)...))
	fenced, err := os.ReadFile(filepath.Join(dir, "fenced"))
	if got, want := string(fenced), "beta\nalpha\n"; err != nil || got != want {
		t.Errorf("fenced %q, want %q (%v)", got, want, err)
	}
}

func TestExecRace(t *testing.T) {
	dir := t.TempDir()
	race(t, openExec(t, "alpha", long, sh(keeper, dir)...), openExec(t, "beta", long, sh(keeper, dir)...), 20)
}

// The arguments of the command.
func TestExecArguments(t *testing.T) {
	file := filepath.Join(t.TempDir(), "told")
	a := openExec(t, "beta", long, sh(`f=$1; shift; echo "$*" >>"$f"; [ $1 = read ] && echo 4 alpha || echo "$3 $5"`, file)...)
	if r := read(t, a); r != (Entry{4, "alpha"}) {
		t.Errorf("read %s", r)
	}
	if now, ok := swap(t, a, Entry{}, Entry{1, "beta"}); !ok {
		t.Errorf("%s", now)
	}
	if now, ok := swap(t, a, Entry{4, "alpha"}, Entry{5, "beta"}); !ok {
		t.Errorf("%s", now)
	}
	told, _ := os.ReadFile(file)
	if want := "read web1\nswap web1 1 - beta alpha\nswap web1 5 alpha beta alpha\n"; string(told) != want {
		t.Errorf("told %q, want %q", told, want)
	}
	if _, ok, err := a.Swap(t.Context(), Entry{5, "beta"}, Entry{6, "alpha"}); ok || err == nil {
		t.Error("beta fenced itself")
	}
}

// Whatever is not the contract's answer is an unknown outcome, never a win.
func TestExecBadAnswers(t *testing.T) {
	for name, script := range map[string]string{
		"silence":           "true",
		"failure":           "echo 2 beta; exit 1",
		"another failure":   "echo 2 beta; exit 255",
		"killed":            "echo 2 beta; kill -9 $$",
		"words":             "echo fenced it",
		"half":              "echo 2",
		"no fencing term":   "echo beta",
		"too much":          "echo 2 beta now",
		"two lines":         "echo 2 beta; echo 2 beta",
		"negative":          "echo -2 beta",
		"zero with speaker": "echo 0 beta",
		"overflow":          "echo 99999999999999999999 beta",
		"endless":           "while :; do echo 2 beta; done | head -c 1000000",
		"an older entry":    "echo 0",
	} {
		a := openExec(t, "beta", long, sh(script)...)
		now, ok, err := a.Swap(t.Context(), Entry{1, "alpha"}, Entry{2, "beta"})
		if ok || err == nil {
			t.Errorf("%s: %s, %v, %v", name, now, ok, err)
		}
	}
	a := openExec(t, "beta", long, "/nonexistent/fence")
	if _, ok, err := a.Swap(t.Context(), Entry{1, "alpha"}, Entry{2, "beta"}); ok || err == nil {
		t.Errorf("a command that is not there: %v %v", ok, err)
	}
	a = openExec(t, "beta", long, sh("echo cannot reach the BMC >&2; exit 3")...)
	if _, err := a.Read(t.Context()); err == nil || !strings.Contains(err.Error(), "cannot reach the BMC") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("what it said is lost: %v", err)
	}
}

// A command that hangs is ended with its children, and asked again by Settle:
// with the same words, since what it began may be done.
func TestExecHangs(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	told := filepath.Join(dir, "told")
	script := `d=$1; shift; echo "$*" >>"$d/told"
if [ -e "$d/mended" ]; then echo "$3 $5"; exit; fi
exec 8<>"$d/fifo"; echo up >&8; sleep 1000 & wait`
	reader, err := os.OpenFile(fifo, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	a := openExec(t, "beta", short, sh(script, dir)...)
	if _, ok, err := a.Swap(t.Context(), Entry{1, "alpha"}, Entry{2, "beta"}); ok || err == nil || !strings.Contains(err.Error(), "no answer in time") {
		t.Fatalf("a command that hangs: %v, %v", ok, err)
	}
	// The child held the FIFO: its end is the child's.
	buf := make([]byte, 16)
	if n, err := reader.Read(buf); err != nil || string(buf[:n]) != "up\n" {
		t.Fatalf("%q, %v", buf[:n], err)
	}
	if err := reader.SetReadDeadline(time.Now().Add(long)); err != nil {
		t.Fatal(err)
	}
	if n, err := reader.Read(buf); n != 0 || err == nil || os.IsTimeout(err) {
		t.Errorf("the child lives: %d, %v", n, err)
	}
	if _, err := a.Settle(t.Context()); err == nil {
		t.Error("settled by a command that hangs")
	}
	if _, ok, err := a.Swap(t.Context(), Entry{2, "alpha"}, Entry{3, "beta"}); ok || err == nil || !strings.Contains(err.Error(), "settle it first") {
		t.Errorf("another change while one is open: %v %v", ok, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "mended"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	a.timeout = long
	if r := settle(t, a); r != (Entry{2, "beta"}) {
		t.Errorf("settled as %s", r)
	}
	all, _ := os.ReadFile(told)
	if line := "swap web1 2 alpha beta alpha\n"; string(all) != strings.Repeat(line, 3) {
		t.Errorf("told %q", all)
	}
	if _, ok := swap(t, a, Entry{2, "beta"}, Entry{3, "beta"}); !ok {
		t.Error("it does not go on after Settle")
	}
}

func TestNone(t *testing.T) {
	a := open(t, "alpha", config.Arbiter{Type: "none"})
	if now, ok := swap(t, a, Entry{}, Entry{1, "alpha"}); !ok || now != (Entry{1, "alpha"}) {
		t.Errorf("%s, %v", now, ok)
	}
	if r := settle(t, a); r != (Entry{1, "alpha"}) {
		t.Errorf("settled as %s", r)
	}
	if r := read(t, a); r != (Entry{1, "alpha"}) {
		t.Errorf("read %s", r)
	}
	if _, ok, err := a.Swap(t.Context(), Entry{1, "alpha"}, Entry{1, "beta"}); ok || err == nil {
		t.Errorf("%v, %v", ok, err)
	}
}

func TestOpen(t *testing.T) {
	c := &config.Config{File: "pair.yaml", VM: "web1"}
	c.Nodes = []config.Node{{Name: "alpha"}, {Name: "beta"}}
	if _, err := Open(c, "alpha"); err == nil || !strings.Contains(err.Error(), "pair.yaml names no arbiter") {
		t.Errorf("no arbiter: %v", err)
	}
	if _, err := Open(c, "gamma"); err == nil || !strings.Contains(err.Error(), "gamma") {
		t.Errorf("no such node: %v", err)
	}
}
