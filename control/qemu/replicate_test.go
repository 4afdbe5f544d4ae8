// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// A QEMU that waits for no primary is not made a secondary, and its images are not exported: with one that somebody else
// starts, a former primary's may be there still.
func TestPrepareRefuses(t *testing.T) {
	for name, clear := range map[string]bool{"TLS": false, "in the clear": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorldIn(t, 1, func(w *world) { w.clear = clear })
			a := w.start("a", false)
			refused := func(state string) {
				t.Helper()
				err := qemu.PrepareSecondary(t.Context(), a.m, a.caps, a.spec.Disks, *w.incoming("a"))
				if err == nil || !strings.Contains(err.Error(), "waits for no primary") || !strings.Contains(err.Error(), state) {
					t.Errorf("a guest that is %s: %v", state, err)
				}
				var exports []any
				if err := a.m.Execute("query-block-exports", nil, &exports); err != nil || len(exports) > 0 {
					t.Errorf("a guest that is %s: exports %v, %v", state, exports, err)
				}
			}
			refused("prelaunch")
			b := a.replicate("b", qemu.Options{})
			if err := qemu.Waits(b.m); err == nil {
				t.Error("a secondary that follows its primary waits for another")
			}
			refused("running")
			b.kill()
			a.takeOver()
			refused("running")
		})
	}
}

// Whatever goes wrong before COLO is on, the guest goes on alone, nothing is left of the
// try, and the next one succeeds.
func TestReplicateFails(t *testing.T) {
	w := newWorld(t, 1)
	a := w.start("a", false)
	if err := qemu.Cont(a.m); err != nil {
		t.Fatal(err)
	}
	qemutest.Await(t, w.serial("a"), "ready")
	a.mustAsk("churn vda", "ok")
	// Slow enough that there is time to fail while the memory is copied.
	bandwidth := func(bytes int64) {
		if err := a.m.Execute("migrate-set-parameters", map[string]any{"max-bandwidth": bytes}, nil); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name, at string
		do       func(cancel context.CancelFunc, s *guest)
	}{
		{"dies while the disk is copied", "colo-disk0", func(_ context.CancelFunc, s *guest) { s.kill() }},
		{"dies while memory is copied", "memory", func(_ context.CancelFunc, s *guest) { s.kill() }},
		{"given up while the disk is copied", "colo-disk0", func(cancel context.CancelFunc, _ *guest) { cancel() }},
		{"given up while memory is copied", "memory", func(cancel context.CancelFunc, _ *guest) { cancel() }},
		{"silent while memory is copied", "memory", func(cancel context.CancelFunc, s *guest) {
			freeze(s)
			cancel()
		}},
		{"stands still from the start", "", func(_ context.CancelFunc, s *guest) { freeze(s) }},
		{"stands still while the disk is copied", "colo-disk0", func(_ context.CancelFunc, s *guest) { freeze(s) }},
		{"stands still at the end of the disk's copy", "colo-disk0 copied", func(_ context.CancelFunc, s *guest) { freeze(s) }},
		{"stands still while the guest waits for it", "", func(_ context.CancelFunc, s *guest) {
			a.drainStops()
			go func() {
				<-a.stopped
				freeze(s)
			}()
		}},
		{"stands still while memory is copied", "memory", func(_ context.CancelFunc, s *guest) { freeze(s) }},
		{"memory is not copied in time", "slow", func(context.CancelFunc, *guest) {}},
		{"is not there", "", nil},
	} {
		ok := t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			bandwidth(4 << 20)
			to, o := w.to("a", w.incoming("b")), qemu.Options{Resync: true, Limits: qemu.Limits{Stalled: 2 * time.Second}}
			if tt.at == "slow" {
				o.Timeout, o.Stalled = 2*time.Second, 0 // too short for the memory
				a.mustAsk("rest", "ok")                 // or it may be too short for the disk as well
				defer a.mustAsk("churn vda", "ok")
			}
			if tt.do != nil {
				s := w.start("b", true)
				defer s.kill()
				if err := qemu.PrepareSecondary(ctx, s.m, s.caps, s.spec.Disks, *s.in); err != nil {
					t.Fatal(err)
				}
				var once sync.Once
				o.Progress = func(p qemu.Progress) {
					if p.What == tt.at || p.What+" copied" == tt.at && p.Done >= diskSize {
						once.Do(func() { tt.do(cancel, s) })
					}
				}
				if tt.at == "" {
					tt.do(cancel, s)
				}
			}
			halts, began := a.halts(), time.Now()
			err := qemu.Replicate(ctx, a.m, a.caps, a.spec.Disks, to, o)
			if err == nil || strings.Contains(err.Error(), "could not be undone") || errors.Is(ctx.Err(), context.DeadlineExceeded) {
				t.Fatalf("got %v", err)
			}
			if o.Timeout != 0 && !strings.Contains(err.Error(), "not copied within 2s") {
				t.Errorf("got %v", err)
			}
			t.Logf("after %v: %v; the guest stood still for %v", time.Since(began), err, halts())
			if longest := halts(); longest > 10*time.Second {
				t.Errorf("the guest stood still for %v", longest)
			}
			if running, state, err := a.m.Status(); err != nil || !running {
				t.Errorf("the guest is %s, %v", state, err)
			}
			a.mustAsk("verify vda", "good")
			var nodes []struct {
				Name string `json:"node-name"`
			}
			if err := a.m.Execute("query-named-block-nodes", map[string]any{"flat": true}, &nodes); err != nil {
				t.Fatal(err)
			}
			if slices.ContainsFunc(nodes, func(n struct {
				Name string `json:"node-name"`
			}) bool {
				return n.Name == "nbd0"
			}) {
				t.Error("the secondary's image is still there")
			}
		})
		if !ok {
			return // what this try left would make the next one fail
		}
	}
	bandwidth(1 << 30)
	b := a.replicate("b", qemu.Options{Resync: true})
	a.checkpoint()
	a.kill()
	b.takeOver()
	b.mustAsk("verify vda", "good")
}

// A guest that writes to its memory faster than migration.bandwidth lets it be copied
// is never copied. Such a try ends by migration.timeout, and the error names both rates
// and what to set; with migration.auto_converge QEMU throttles the guest until the copy
// catches up. Either way the guest goes on serving.
func TestAutoConverge(t *testing.T) {
	w := newWorld(t, 0)
	a := w.start("a", false)
	if err := qemu.Cont(a.m); err != nil {
		t.Fatal(err)
	}
	// QEMU begins with 20 % and takes two passes for 10 % more, which is too slow for a test.
	if err := a.m.Execute("migrate-set-parameters", map[string]any{"cpu-throttle-initial": 99}, nil); err != nil {
		t.Fatal(err)
	}
	qemutest.Await(t, w.serial("a"), "ready")
	a.mustAsk("set one", "ok")
	// So much faster that a guest which gets a tenth of a busy host's CPU is fast enough,
	// and slow enough that one throttled to a hundredth is not.
	a.mustAsk("dirty 32 400", "ok")

	try := func(l qemu.Limits) (s *guest, throttled int, err error) {
		t.Helper()
		s = w.start("b", true)
		if err := qemu.PrepareSecondary(t.Context(), s.m, s.caps, nil, *s.in); err != nil {
			t.Fatal(err)
		}
		halts, began := a.halts(), time.Now()
		err = qemu.Replicate(t.Context(), a.m, a.caps, nil, w.to("a", s.in), qemu.Options{Limits: l, Progress: func(qemu.Progress) {
			var now struct {
				Throttle int `json:"cpu-throttle-percentage"`
			}
			if err := a.m.Execute("query-migrate", nil, &now); err != nil {
				t.Error(err)
			}
			throttled = max(throttled, now.Throttle)
		}})
		took := time.Since(began)
		t.Logf("auto-converge %v: after %v: %v; the guest was throttled by up to %d %% and stood still for %v", l.AutoConverge, took, err, throttled, halts())
		if took > l.Timeout+15*time.Second || halts() > 10*time.Second {
			t.Error("that is too long")
		}
		if running, state, err := a.m.Status(); err != nil || !running {
			t.Errorf("the guest is %s, %v", state, err)
		}
		return s, throttled, err
	}
	goesOn := func() {
		t.Helper()
		a.mustAsk("get", "one")
		before, err := a.ask("dirtied")
		lt.Eventually(t, 20*time.Second, func() (bool, string) {
			now, again := a.ask("dirtied")
			return err == nil && again == nil && now != before, fmt.Sprintf("%s pages, then %s: %v, %v", before, now, err, again)
		})
	}

	// QEMU knows how fast the guest writes after the first pass, which on a busy host may
	// take longer.
	limits := qemu.Limits{Bandwidth: 32 << 20, Timeout: 5 * time.Second}
	b, throttled, err := try(limits)
	for err != nil && !strings.Contains(err.Error(), "the guest writes") && limits.Timeout < time.Minute {
		b.kill()
		limits.Timeout *= 2
		b, throttled, err = try(limits)
	}
	if err == nil || throttled != 0 {
		t.Fatalf("without auto-converge: throttled by %d %%, %v", throttled, err)
	}
	rates := regexp.MustCompile(`not copied within \d+s: \d+\.\d MiB/s are copied and the guest writes [1-9]\d*\.\d MiB/s.* migration\.bandwidth, migration\.auto_converge`)
	if !rates.MatchString(err.Error()) || strings.Contains(err.Error(), "undone") {
		t.Errorf("got %v", err)
	}
	b.kill()
	goesOn()

	limits.AutoConverge, limits.Timeout = true, 6*limits.Timeout
	b, throttled, err = try(limits)
	if throttled == 0 {
		t.Error("with auto-converge the guest was not throttled")
	}
	goesOn()
	if err != nil { // QEMU throttles by 99 % at most, which a busy host may make too little
		if !strings.Contains(err.Error(), "not copied within") || strings.Contains(err.Error(), "undone") {
			t.Errorf("got %v", err)
		}
		return
	}
	a.mustAsk("rest", "ok")
	a.checkpoint()
	a.kill()
	b.takeOver()
	b.mustAsk("get", "one")
}
