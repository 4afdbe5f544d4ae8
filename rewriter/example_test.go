// SPDX-License-Identifier: Apache-2.0

package rewriter_test

import (
	"fmt"

	"github.com/lockstep-ft/lockstep/rewriter"
)

// A secondary that takes over guards each connection that the PVM may have transmitted on.
func ExampleTakeover() {
	const guard, now = 1 << 24, 1000
	plan := rewriter.NewTakeover[string](guard, false, now)
	plan.AddConn("web", rewriter.Conn{Off: 400, Inc: 100, ISNSVM: 500})
	plan.AddInherited("web", 0)
	for key, c := range plan.Guarded() {
		fmt.Println(key, c.Off, c.Guard == guard, c.State&rewriter.Guarded != 0)
	}
	// Output: web 400 true true
}
