// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"testing"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/loader"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestMutationR9: with the rewriter's rule switched off, the skew that
// TestTransfer runs under breaks the very first echo, and the time-out sees it.
func TestMutationR9(t *testing.T) {
	p := newPairWithout(t, loader.MutateR9, lt.Veth, "", "", "compare: {timeout: 200ms}")
	if c, err := p.dial(lt.Guest4, portEcho, ""); err == nil {
		defer c.Close()
		if err := echo(c, 0); err == nil {
			t.Error("an echo came back though the SVM's numbers were not translated")
		}
	}
	p.await("alpha", func(s *api.Status) bool { return s.CheckpointsRequested > 0 })
}
