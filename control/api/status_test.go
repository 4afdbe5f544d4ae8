// SPDX-License-Identifier: Apache-2.0

package api

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"
)

// A renamed field is written under both names for one release, and read under either.
func TestRenamedFields(t *testing.T) {
	want := Status{VM: "web1", Term: 3, ArbiterTerm: 2, Peer: PeerStatus{Since: time.Unix(9, 0).UTC()}, Causes: []Cause{{Reason: "period"}}}
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var raw map[string]any
	if err := json.Unmarshal(b, &raw); err != nil {
		t.Fatal(err)
	}
	if raw["record"] != 2.0 || raw["arbiter_term"] != 2.0 || raw["term"] != 3.0 {
		t.Errorf("%s", b)
	}
	var got Status
	if err := json.Unmarshal(b, &got); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v\nwant %+v", got, err, want)
	}
	for _, text := range []string{`{"record":2}`, `{"arbiter_term":2}`} {
		var old Status
		if err := json.Unmarshal([]byte(text), &old); err != nil || old.ArbiterTerm != 2 {
			t.Errorf("%s: %+v, %v", text, old, err)
		}
	}
}
