// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// awaitState waits for a state of the guest, by QEMU's name for it.
func (g *guest) awaitState(want string) {
	g.w.t.Helper()
	lt.Eventually(g.w.t, time.Minute, func() (bool, string) {
		_, state, err := g.m.Status()
		return err == nil && state == want, fmt.Sprintf("the guest's state is %q, %v; want %q", state, err, want)
	})
}

// waitingWrite begins a write to the first disk that QEMU must not report as done, and
// returns a function that waits until it is.
func (g *guest) waitingWrite(block int, word string) (written func()) {
	t := g.w.t
	t.Helper()
	type answer struct {
		text string
		err  error
	}
	answered := make(chan answer, 1)
	go func() {
		text, err := g.ask(fmt.Sprintf("write vda %d %s", block, word))
		answered <- answer{text, err}
	}()
	g.awaitState("io-error")
	select {
	case a := <-answered:
		t.Fatalf("the guest was told that block %d is written: %q, %v", block, a.text, a.err)
	default:
	}
	return func() {
		t.Helper()
		if a := <-answered; a.err != nil || a.text != "wrote <nil>" {
			t.Fatalf("block %d: %q, %v", block, a.text, a.err)
		}
	}
}

// small makes a file system with room for so many bytes, and returns its folder.
func small(t *testing.T, dir string, bytes int) string {
	t.Helper()
	lt.Run(t, "mkdir", "-p", dir)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", bytes)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill writes blocks, each in a cluster of its own, until a write is not confirmed.
// confirmed is called after each one that is.
func (g *guest) fill(word string, confirmed func()) (n int) {
	t := g.w.t
	t.Helper()
	for n = 1; n < maxFill; n++ {
		answered := make(chan error, 1)
		go func() {
			text, err := g.ask(fmt.Sprintf("write vda %d %s%d", 17*n, word, n))
			if err == nil && text != "wrote <nil>" {
				err = fmt.Errorf("it answered %q", text)
			}
			answered <- err
		}()
		stopped := false
		lt.Eventually(t, time.Minute, func() (bool, string) {
			select {
			case err := <-answered:
				if err != nil {
					t.Fatalf("write %d: %v", n, err)
				}
				return true, ""
			default:
			}
			_, state, err := g.m.Status()
			stopped = state == "io-error"
			return stopped, fmt.Sprint("neither written nor refused: ", state, err)
		})
		if stopped {
			return n - 1
		}
		confirmed()
	}
	t.Fatal("everything was written")
	return 0
}

const maxFill = 400

// whole checks that no confirmed write is missing.
func (g *guest) whole(word string, confirmed int) {
	g.w.t.Helper()
	for n := 1; n <= confirmed; n++ {
		g.mustRead("vda", 17*n, fmt.Sprint(word, n))
	}
}

// TestWriteNeedsBoth: a write that failed on one of the two replicas is not reported to
// the guest as done, whichever replica it was and for whatever reason (R24).
func TestWriteNeedsBoth(t *testing.T) {
	const room = 1 << 20
	t.Run("primary's image", func(t *testing.T) {
		w := newWorldIn(t, 1, func(w *world) { w.images = map[string]string{"a": small(t, filepath.Join(w.dir, "small"), room)} })
		a := w.start("a", false)
		b := a.replicate("b", qemu.Options{})
		qemutest.Await(t, w.serial("a"), "ready")
		// The SVM has no input in this test: its state is that of the last checkpoint.
		confirmed := a.fill("word", a.checkpoint)
		a.kill()
		b.takeOver()
		b.whole("word", confirmed)
		b.mustWrite("vda", 1, "after")
	})
	for name, where := range map[string]func(*world, string){
		"secondary's image":    func(w *world, dir string) { w.images = map[string]string{"b": dir} },
		"secondary's overlays": func(w *world, dir string) { w.overlays = map[string]string{"b": dir} },
	} {
		t.Run(name, func(t *testing.T) {
			var dir string
			w := newWorldIn(t, 1, func(w *world) {
				dir = small(t, filepath.Join(w.dir, "small"), map[string]int{"secondary's image": room, "secondary's overlays": 16 * room}[name])
				where(w, dir)
			})
			a := w.start("a", false)
			b := a.replicate("b", qemu.Options{})
			qemutest.Await(t, w.serial("a"), "ready")
			first := "word"
			if w.overlays != nil {
				// An overlay holds what is overwritten.
				for n := 1; n < 30; n++ {
					a.mustWrite("vda", 17*n, "old")
				}
				first = "new"
			}
			a.checkpoint()
			if w.overlays != nil {
				lt.FillUp(t, filepath.Join(dir, "filler"))
			}
			confirmed := a.fill(first, func() {})
			b.kill()
			a.takeOver() // what was refused is written
			a.whole(first, confirmed+1)
		})
	}
	t.Run("mutation", func(t *testing.T) {
		w := newWorld(t, 1)
		w.mask = true
		a := w.start("a", false)
		b := a.replicate("b", qemu.Options{})
		qemutest.Await(t, w.serial("a"), "ready")
		a.checkpoint()
		if masked, err := qemu.Masked(a.m, a.spec.Disks); err != nil || !slices.Equal(masked, []string{"colo-disk0"}) {
			t.Errorf("masked disks: %v, %v", masked, err)
		}
		b.kill()
		a.mustWrite("vda", 1, "lost") // on one replica only, and confirmed
	})
}

// TestMergeOverlays: a secondary that took over dies with its QEMU. What it wrote is in
// its image afterwards, whether QEMU had come to merge the overlays or not; in the first
// case they are older than the image.
func TestMergeOverlays(t *testing.T) {
	for name, merged := range map[string]bool{"merged by QEMU": true, "not merged": false} {
		t.Run(name, func(t *testing.T) {
			var room string
			w := newWorldIn(t, 1, func(w *world) {
				room = small(t, filepath.Join(w.dir, "small"), 1<<20)
				w.images = map[string]string{"b": room}
			})
			a := w.start("a", false)
			b := a.replicate("b", qemu.Options{})
			qemutest.Await(t, w.serial("a"), "ready")
			a.mustWrite("vda", 17, "old")
			a.checkpoint()
			filler := filepath.Join(room, "filler")
			if !merged {
				lt.FillUp(t, filler)
			}
			b.mustWrite("vda", 17, "overlay") // as the SVM
			b.mustWrite("vda", 34, "overlay")
			a.kill()
			b.takeOver()
			if merged {
				b.awaitMerged()
				b.mustWrite("vda", 17, "image")
			} else if is, err := qemu.Merged(b.m, b.spec.Disks); err != nil || is {
				t.Fatalf("merged onto a full file system: %v, %v", is, err)
			}
			b.kill()
			if !merged {
				lt.Run(t, "rm", filler)
			}
			if err := qemu.MergeOverlays(t.Context(), b.spec); err != nil {
				t.Fatal(err)
			}
			b = w.start("b", false)
			if err := qemu.Cont(b.m); err != nil {
				t.Fatal(err)
			}
			qemutest.Await(t, w.serial("b"), "ready")
			b.mustRead("vda", 17, map[bool]string{true: "image", false: "overlay"}[merged])
			b.mustRead("vda", 34, "overlay")
		})
	}
}
