// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"lockstep/control/qemu"
	"lockstep/control/qemu/qemutest"
)

// Whatever goes wrong before COLO is on, the guest goes on alone, with nothing
// left of the try, and the next one succeeds.
func TestReplicateFails(t *testing.T) {
	w := newWorld(t, 1)
	a := w.start("a", false)
	if err := qemu.Cont(a.m); err != nil {
		t.Fatal(err)
	}
	qemutest.Await(t, w.serial("a"), "ready")
	a.mustAsk("churn vda", "ok")
	// Slow enough that memory is not there at once.
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
			to, o := *w.incoming("b"), qemu.Options{Resync: true, Limits: qemu.Limits{Stalled: 2 * time.Second}}
			if tt.at == "slow" {
				o.Timeout, o.Stalled = 2*time.Second, 0 // the disk has its time
			}
			if tt.do != nil {
				s := w.start("b", true)
				defer s.kill()
				if err := qemu.PrepareSecondary(ctx, s.m, s.caps, s.spec.Disks, s.in.NBD); err != nil {
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
			return // what it left is the next one's trouble
		}
	}
	bandwidth(1 << 30)
	b := a.replicate("b", qemu.Options{Resync: true})
	a.checkpoint()
	a.kill()
	b.takeOver()
	b.mustAsk("verify vda", "good")
}
