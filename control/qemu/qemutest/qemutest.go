// SPDX-License-Identifier: Apache-2.0

// Package qemutest makes real guests for tests, with package guestimage. The migration goes over
// a unix socket where a QEMU is driven without lockstep: over TCP each checkpoint waits 40 ms
// and more for a delayed ACK.
package qemutest

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/qemu/guestimage"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Memory is the size of a guest's RAM in bytes.
const Memory = guestimage.Memory

// Guest is what an image has besides kernel and busybox.
type Guest = guestimage.Guest

// Image makes the files for QEMU's -kernel and -initrd.
//
// Where `make deps` has not put the kernel, the test is skipped, or fails with
// LOCKSTEP_REQUIRE_ALL=1.
func Image(t testing.TB, g Guest) (kernel, initrd string) {
	t.Helper()
	dir := Dir(t)
	initrd = filepath.Join(t.TempDir(), "initrd")
	if err := guestimage.Build(initrd, dir, g); err != nil {
		t.Fatal(err)
	}
	return guestimage.Kernel(dir), initrd
}

// Append makes the kernel command line.
func Append(nics []string, more ...string) string { return guestimage.Append(nics, more...) }

// Disk makes a qcow2 image of size bytes. With ext4 it has a file system, which the guest
// mounts.
func Disk(t testing.TB, path string, size int64, ext4 bool) {
	t.Helper()
	if err := guestimage.Disk(path, size, ext4); err != nil {
		t.Fatal(err)
	}
}

// Preload returns the environment variable "LD_PRELOAD=…" that a primary's QEMU needs
// under TCG. It builds the library.
func Preload(t testing.TB) string {
	t.Helper()
	env, err := guestimage.Preload(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return env
}

// Await returns when the log of a serial console contains text.
func Await(t testing.TB, log, text string) {
	t.Helper()
	const limit = 120 * time.Second
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		b, err := os.ReadFile(log)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		if strings.Contains(string(b), text) {
			return
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("no %q on the guest's console after %v:\n%s", text, limit, b)
		}
	}
}

// Dir is the folder into which `make deps` puts kernel and modules.
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	// The repository's folder is above the one that a test runs in.
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		up := filepath.Dir(dir)
		if up == dir {
			t.Fatal("not in the repository: no go.mod above")
		}
		dir = up
	}
	dir = filepath.Join(dir, "bin", "guest")
	if err := guestimage.Missing(dir); err != nil {
		lt.Missing(t, "%v", err)
	}
	return dir
}
