// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"io"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/journal"
)

// FuzzPrint: whatever a daemon of another version answers, or a journal holds, can be shown.
func FuzzPrint(f *testing.F) {
	f.Fuzz(func(t *testing.T, answer []byte) {
		var s api.Status
		if json.Unmarshal(answer, &s) == nil {
			if err := printStatus(io.Discard, s); err != nil {
				t.Error(err)
			}
			now := sample{at: time.Unix(9, 0), status: s, before: &sample{at: time.Unix(8, 0), status: s}}
			if topLine(&now) == "" || len(topView(&now, 24)) > 24 {
				t.Error("top shows nothing, or too much")
			}
		}
		var flows []api.Flow
		if json.Unmarshal(answer, &flows) == nil {
			if err := printFlows(io.Discard, flows); err != nil {
				t.Error(err)
			}
		}
		var events []journal.Event
		if json.Unmarshal(answer, &events) == nil {
			if err := printEvents(io.Discard, events); err != nil {
				t.Error(err)
			}
		}
	})
}
