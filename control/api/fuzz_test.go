// SPDX-License-Identifier: Apache-2.0

package api

import (
	"encoding/json"
	"net/http/httptest"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// FuzzStatus: what another version's daemon may answer is refused, or is a status that can be
// passed on, compared, and exported as metrics.
func FuzzStatus(f *testing.F) {
	f.Fuzz(func(t *testing.T, answer []byte) {
		var flows []Flow
		_ = json.Unmarshal(answer, &flows)
		var s Status
		if json.Unmarshal(answer, &s) != nil {
			return
		}
		b, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		var again Status
		if err := json.Unmarshal(b, &again); err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		if b2, err := json.Marshal(again); err != nil || string(b) != string(b2) {
			t.Errorf("%v\n%s", err, cmp.Diff(string(b), string(b2)))
		}
		_ = s.Takes(4, "")
		for i := range s.Overlays {
			_ = s.Overlays[i].String()
		}
		Process{VM: "web1", Node: "alpha"}.MetricsHandler(func() *Status { return &s }).ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/metrics", nil))
	})
}
