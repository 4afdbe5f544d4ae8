// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// overlays is where a node's overlays are.
func (p *livingPair) overlays(node string) string { return filepath.Join(p.Dir, "overlays-"+node) }

// smallOverlays gives a node's overlays a file system of so many MiB.
func (p *livingPair) smallOverlays(node string, mib int) (dir string) {
	p.t.Helper()
	dir = p.overlays(node)
	if err := os.Mkdir(dir, 0o700); err != nil {
		p.t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%dm", mib)); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			p.t.Error(err)
		}
	})
	return dir
}

// fillUp takes all the room in dir.
func fillUp(t *testing.T, dir string) (ballast string) {
	t.Helper()
	ballast = filepath.Join(dir, "ballast")
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for b := make([]byte, 4096); err == nil; {
		_, err = f.Write(b)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	return ballast
}

// TestOverlays: the room for the secondary's overlays. Where there is none, the secondary
// waits and reports it; when it runs out, a checkpoint makes room in time, though the period
// is far longer; when it is gone at once, the primary goes alone without waiting, and both
// hosts report why.
func TestOverlays(t *testing.T) {
	p := newLivingPair(t, 1, "checkpoint: {period: 2m}")
	dir := p.smallOverlays("beta", 32)
	ballast := fillUp(t, dir)
	p.run("beta", "secondary")
	said := func(node, why string) {
		t.Helper()
		p.await(node, func(s *api.Status) bool {
			return len(s.Overlays) == 1 && strings.Contains(s.Overlays[0].Trouble, why) && strings.Contains(s.Detail, why)
		})
		if out, err := p.order(node, "events"); err != nil || !strings.Contains(out, why) {
			t.Errorf("events of %s have no %q: %v\n%s", node, why, err, out)
		}
		if out, err := p.order(node, "status"); err != nil || !strings.Contains(out, "OVERLAYS FULL") {
			t.Errorf("status of %s: %v\n%s", node, err, out)
		}
	}
	full := fmt.Sprintf("beta: overlay_dir %s, of disk colo-disk0: it is full", dir)
	said("beta", full)
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	p.run("alpha", "primary")
	p.covered()
	p.booted()
	p.lockstepped()

	disk := p.mustDial(lt.Guest4, portDisk)
	write := func(format string, a ...any) {
		t.Helper()
		line := fmt.Sprintf(format, a...)
		if got, want := p.ask(disk, line), fmt.Sprintf("wrote %s <nil>", strings.Fields(line)[1]); got != want {
			t.Fatalf("%q, want %q", got, want)
		}
	}
	const files = 40 // MiB, each of which is in both overlays until a checkpoint
	most := int64(0)
	for i := range files {
		write("fill f%d 1", i)
		for _, o := range p.status("alpha").Overlays {
			most = max(most, o.UsedBytes)
		}
	}
	cause := fmt.Sprintf("beta's overlay_dir %s is filling up", dir)
	s := p.await("alpha", func(s *api.Status) bool { return s.State == "replicating" && s.Covered })
	asked := 0
	for _, c := range s.Checkpoints {
		if c.Cause == cause && c.Result == "committed" {
			asked++
		}
	}
	t.Logf("%d MiB written, %d checkpoints to make room, at most %d MiB used", files, asked, most>>20)
	if asked == 0 || s.ArbiterTerm != p.record || most == 0 {
		t.Errorf("%d checkpoints because of %q, the record is of term %d and was of %d; %+v", asked, cause, s.ArbiterTerm, p.record, s.Checkpoints)
	}
	// What the checkpoint emptied is free again.
	if out, err := p.order("alpha", "checkpoint"); err != nil {
		t.Fatal(out, err)
	}
	for _, node := range []string{"alpha", "beta"} {
		p.await(node, func(s *api.Status) bool { return len(s.Overlays) == 1 && s.Overlays[0].UsedBytes < 4<<20 })
	}

	ballast = fillUp(t, dir)
	began := time.Now()
	write("fill g 1")
	t.Logf("with no room left, the answer took %v", time.Since(began))
	p.await("alpha", func(s *api.Status) bool { return s.State == "solo" })
	said("alpha", full)
	said("beta", full)
	if log := p.log("alpha"); strings.Contains(log, "no READY of the secondary in time") {
		t.Error("the primary waited for a secondary that stands still")
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	p.covered()
	write("write kept text")
	p.killQEMU("alpha")
	if got := p.ask(disk, "read kept"); got != "text <nil>" {
		t.Errorf("the survivor's disk has %q", got)
	}
}
