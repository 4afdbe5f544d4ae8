// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/lockstep-ft/lockstep/bench/lab"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// buildDir is for the lockstep that is tested.
var buildDir string

func TestMain(m *testing.M) {
	var err error
	if buildDir, err = os.MkdirTemp("", "lockstep-oracle-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(buildDir)
	os.Exit(code)
}

var build = sync.OnceValues(func() (string, error) {
	bin := filepath.Join(buildDir, "lockstep")
	out, err := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", bin, "github.com/lockstep-ft/lockstep/cmd/lockstep").CombinedOutput()
	if err != nil {
		err = fmt.Errorf("build lockstep: %w: %s", err, out)
	}
	return bin, err
})

// needs says what is missing here.
func needs(t *testing.T) {
	t.Helper()
	lt.NeedRoot(t)
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		lt.Missing(t, "%v: install QEMU", err)
	}
}

// startPair starts a pair, which ends with the test.
func startPair(t *testing.T, settings string) *pair {
	t.Helper()
	needs(t)
	bin, err := build()
	if err != nil {
		t.Fatal(err)
	}
	p, err := newPair(context.WithoutCancel(t.Context()), bin, t.TempDir(), settings)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// startColo starts a QEMU, which ends with the test.
func startColo(t *testing.T, settings string) *colo {
	t.Helper()
	needs(t)
	ns, err := lab.NewNS()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ns.Close)
	c, err := newColo(t.Context(), ns, t.TempDir(), settings)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	t.Logf("QEMU %s", c.mon.Version())
	return c
}
