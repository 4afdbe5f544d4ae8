// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/cmd/lockstep/demo"
	"github.com/lockstep-ft/lockstep/control/qemu/guestimage"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// demoOptions are what `lockstep demo` would find here.
func demoOptions(t *testing.T) demo.Options {
	t.Helper()
	lt.NeedRoot(t)
	o := demo.Options{Lockstep: lockstepBinary(t, 0), Guest: qemutest.Dir(t), Say: t.Logf, Show: func(text string) { t.Log(text) }}
	if err := guestimage.Missing(o.Guest); err != nil {
		lt.Missing(t, "%v", err)
	}
	var err error
	if o.QEMU, err = exec.LookPath("qemu-system-x86_64"); err != nil {
		lt.Missing(t, "%v: make deps installs it", err)
	}
	return o
}

// leavesNothing runs a demo and checks that no file, mount or process of it is left.
func leavesNothing(t *testing.T, run func() error) error {
	t.Helper()
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir) // where the demo makes its folder, which its processes have as an argument
	err := run()
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if mounts, err := os.ReadFile("/proc/self/mounts"); err != nil || strings.Contains(string(mounts), dir) {
		t.Errorf("left behind: a mount: %v", err)
	}
	// What watches over a QEMU looks once a second.
	lt.Eventually(t, 10*time.Second, func() (bool, string) {
		processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range processes {
			if line, _ := os.ReadFile(p); strings.Contains(string(line), dir) { // it may have ended
				return false, fmt.Sprintf("left behind: %s: %q", p, line)
			}
		}
		return true, ""
	})
	return err
}

// TestDemo: what `lockstep demo` shows is so: a pair of real guests through two failovers, with clients
// that do not notice. Nothing is left of it.
func TestDemo(t *testing.T) {
	o := demoOptions(t)
	if err := leavesNothing(t, func() error { return demo.Run(t.Context(), o) }); err != nil {
		t.Error(err)
	}
}

// TestDemoInterrupted: ^C ends the demo at once, also between two hosts' deaths, and nothing is left of it.
func TestDemoInterrupted(t *testing.T) {
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return // TestDemo stays
	}
	o := demoOptions(t)
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	say, interrupted := o.Say, time.Time{}
	o.Say = func(format string, args ...any) {
		say(format, args...)
		if strings.HasPrefix(format, "kill -9") {
			interrupted = time.Now()
			interrupt()
		}
	}
	if err := leavesNothing(t, func() error { return demo.Run(ctx, o) }); !errors.Is(err, demo.ErrInterrupted) {
		t.Errorf("it ended with %v", err)
	}
	t.Logf("it took %v to end", time.Since(interrupted))
}
