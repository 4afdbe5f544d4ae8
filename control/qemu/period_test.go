// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"math"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/qemu"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestNoOwnCheckpoints: whatever period QEMU had, from the beginning of replication on it
// makes no checkpoint that nobody asked for (R12).
func TestNoOwnCheckpoints(t *testing.T) {
	begin := func(t *testing.T, o qemu.Options) *guest {
		w := newWorld(t, 0)
		a := w.start("a", false)
		if err := a.m.Execute("migrate-set-parameters", map[string]any{"x-checkpoint-delay": 300}, nil); err != nil {
			t.Fatal(err)
		}
		a.replicate("b", o)
		return a
	}
	t.Run("rule", func(t *testing.T) {
		var params struct {
			Delay uint32 `json:"x-checkpoint-delay"`
		}
		if err := begin(t, qemu.Options{}).m.Execute("query-migrate-parameters", nil, &params); err != nil || params.Delay != math.MaxUint32 {
			t.Errorf("QEMU's period is %d ms, %v", params.Delay, err)
		}
	})
	t.Run("mutation", func(t *testing.T) {
		a := begin(t, qemu.OwnPeriod())
		before := a.resumes.Load() // its first one may still be the end of the migration
		lt.Eventually(t, time.Minute, func() (bool, string) {
			return a.resumes.Load() > before+2, "QEMU makes no checkpoints although the rule is turned off"
		})
	})
}
