// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/qemu"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// status is a line of a process's status, its fields with one blank between.
func status(t *testing.T, p *qemu.Process, name string) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.Join(strings.Fields(rest), " ")
		}
	}
	t.Fatalf("no %s in %s", name, b)
	return ""
}

// A QEMU that lockstep starts runs in a sandbox.
func TestSandbox(t *testing.T) {
	w := newWorld(t, 0)
	g := w.start("a", false)
	if s, n := status(t, g.p, "Seccomp"), status(t, g.p, "NoNewPrivs"); s != "2" || n != "1" {
		t.Errorf("Seccomp %s, NoNewPrivs %s", s, n)
	}
}

// A secondary whose QEMU became another user has tap, disks and sockets all the same, and
// may use what it opens again. Check names what that user may not use.
func TestUser(t *testing.T) {
	w := newWorld(t, 1)
	const uid, gid = 64055, 64056
	spec := w.spec("b")
	spec.User = fmt.Sprintf("%d:%d", uid, gid)
	in := w.incoming("b")
	lt.In(t, w.ns("b"), func() {
		err := spec.Check(in, nil)
		if err == nil || !strings.Contains(err.Error(), "image") || !strings.Contains(err.Error(), spec.User) {
			t.Errorf("an image of root's: %v", err)
		}
	})
	for _, dir := range []string{w.dir, filepath.Dir(w.dir)} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(spec.Disks[0].Image, uid, gid); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	lt.In(t, w.ns("b"), func() {
		if err := spec.Check(in, nil); err != nil {
			t.Error(err)
		}
		p, err := qemu.Start(ctx, spec, in)
		if err != nil {
			t.Fatalf("%v: %s", err, qemu.Log(spec))
		}
		defer p.Release()
		defer p.Kill(ctx)
		// The monitor answers before QEMU becomes the user.
		lt.Eventually(t, 10*time.Second, func() (bool, string) {
			u := status(t, p, "Uid")
			return u == fmt.Sprintf("%[1]d %[1]d %[1]d %[1]d", uid), u
		})
		if s, g := status(t, p, "Seccomp"), status(t, p, "Gid"); s != "2" || g != fmt.Sprintf("%[1]d %[1]d %[1]d %[1]d", gid) {
			t.Errorf("Seccomp %s, Gid %s", s, g)
		}
		overlays, err := filepath.Glob(filepath.Join(spec.Disks[0].OverlayDir, "*.qcow2"))
		if err != nil || len(overlays) != 2 {
			t.Fatalf("overlays %v, %v", overlays, err)
		}
		for _, path := range append(overlays, spec.Disks[0].OverlayDir) {
			var s unix.Stat_t
			if err := unix.Stat(path, &s); err != nil || s.Uid != uid {
				t.Errorf("%s is user %d's, %v", path, s.Uid, err)
			}
		}
	})
}
