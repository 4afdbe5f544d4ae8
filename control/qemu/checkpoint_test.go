// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	"github.com/lockstep-ft/lockstep/control/qmp"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestDiskFailsAtCheckpoint: the secondary's disk fails after QEMU was asked for a
// checkpoint and before it stops the guest for it, which takes until the secondary has
// answered. A QEMU whose guest runs until then aborts, and with it the guest that serves.
func TestDiskFailsAtCheckpoint(t *testing.T) {
	fail := func(t *testing.T, ask func(*guest) error) (a *guest) {
		w := newWorld(t, 1)
		a = w.start("a", false)
		b := w.start("b", true)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := qemu.PrepareSecondary(ctx, b.m, b.caps, b.spec.Disks, *b.in); err != nil {
			t.Fatal(err)
		}
		to, answers := w.to("a", b.in), newGate(t, b.in.Migration)
		to.Migration = answers.uri
		if err := qemu.Replicate(ctx, a.m, a.caps, a.spec.Disks, to, qemu.Options{}); err != nil {
			t.Fatal(err)
		}
		qemutest.Await(t, w.serial("a"), "ready")
		a.checkpoint()
		answers.mu.Lock()
		open := sync.OnceFunc(answers.mu.Unlock)
		defer open()
		if err := ask(a); err != nil {
			t.Fatal(err)
		}
		wrote := make(chan struct{})
		go func() {
			defer close(wrote)
			a.ask("write vda 1 failing") // ends when the guest can go on
		}()
		t.Cleanup(func() { <-wrote })
		if err := a.m.Yank(func(l qmp.Link) bool { return l.Type == "block-node" }); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second) // a guest that runs has written by then, and is stopped
		open()
		return a
	}
	t.Run("rule", func(t *testing.T) {
		a := fail(t, func(a *guest) error { return qemu.Checkpoint(a.m, a.spec.Disks) })
		lt.Eventually(t, time.Minute, func() (bool, string) {
			_, state, err := a.m.Status()
			if err != nil {
				t.Fatal(err)
			}
			return state == "io-error", "the guest is " + state
		})
		a.takeOver()
		a.mustRead("vda", 1, "failing")
	})
	t.Run("mutation", func(t *testing.T) {
		a := fail(t, func(a *guest) error { return a.m.Checkpoint() })
		lt.Eventually(t, time.Minute, func() (bool, string) { return a.m.Err() != nil, "QEMU goes on although the rule is off" })
		lt.Eventually(t, time.Minute, func() (bool, string) {
			log := qemu.Log(a.spec)
			return strings.Contains(log, "invalid runstate transition"), "QEMU ended for another reason: " + log
		})
	})
}

// gate is between a primary's QEMU and the one it replicates to. While its mutex is held
// nothing of what that answers comes.
type gate struct {
	uri string
	mu  sync.Mutex
}

// newGate has one in front of a migration address on a unix socket, until the test's end.
func newGate(t *testing.T, to string) *gate {
	t.Helper()
	path := filepath.Join(t.TempDir(), "gate")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{uri: "unix:" + path}
	var work sync.WaitGroup
	ends := make(chan struct{})
	t.Cleanup(func() { ln.Close(); close(ends); work.Wait() })
	work.Go(func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		s, err := net.Dial("unix", strings.TrimPrefix(to, "unix:"))
		if err != nil {
			t.Error(err)
			c.Close()
			return
		}
		work.Go(func() { <-ends; c.Close(); s.Close() })
		work.Go(func() { io.Copy(s, c) })
		for b := make([]byte, 1<<16); ; {
			n, err := s.Read(b)
			if err != nil {
				return
			}
			g.mu.Lock()
			_, err = c.Write(b[:n])
			g.mu.Unlock()
			if err != nil {
				return
			}
		}
	})
	return g
}

// TestUnpause: a guest that was stopped to ask for a checkpoint goes on if that is not to
// be had, or if the daemon died on the way; one that somebody else stopped does not.
func TestUnpause(t *testing.T) {
	w := newWorld(t, 0)
	a := w.start("a", false)
	if err := qemu.Cont(a.m); err != nil {
		t.Fatal(err)
	}
	state := func(want string) {
		t.Helper()
		if _, state, err := a.m.Status(); err != nil || state != want {
			t.Fatalf("the guest is %s, %v; want %s", state, err, want)
		}
	}
	if err := qemu.Checkpoint(a.m, nil); err == nil || !strings.Contains(err.Error(), `COLO mode is "none"`) {
		t.Errorf("got %v", err)
	}
	state("running")
	if err := qemu.Stop(a.m); err != nil {
		t.Fatal(err)
	}
	if err := qemu.Checkpoint(a.m, nil); err == nil || !strings.Contains(err.Error(), "the guest is stopped: paused") {
		t.Errorf("got %v", err)
	}
	if err := qemu.Unpause(a.m); err != nil {
		t.Fatal(err)
	}
	state("paused")
	if err := a.m.Execute("object-add", map[string]string{"qom-type": "rng-builtin", "id": "lockstep-pause"}, nil); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := qemu.Unpause(a.m); err != nil {
			t.Fatal(err)
		}
		state("running")
	}
	// The guest was about to be reset when it was stopped.
	if err := errors.Join(qemu.Stop(a.m), a.m.Execute("object-add", map[string]string{"qom-type": "rng-builtin", "id": "lockstep-pause"}, nil),
		a.m.Execute("system_reset", nil, nil)); err != nil {
		t.Fatal(err)
	}
	state("prelaunch")
	if err := qemu.Unpause(a.m); err != nil {
		t.Fatal(err)
	}
	state("running")
	if err := qemu.Stop(a.m); err != nil { // the mark is gone
		t.Fatal(err)
	}
	if err := qemu.Unpause(a.m); err != nil {
		t.Fatal(err)
	}
	state("paused")
}
