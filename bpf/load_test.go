// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"fmt"
	"testing"

	"lockstep/bpf"
)

func TestReasonNames(t *testing.T) {
	names := bpf.ReasonNames()
	if len(names) != int(bpf.LockstepLsReasonLS_R_MAX) {
		t.Fatalf("%d names, want %d", len(names), bpf.LockstepLsReasonLS_R_MAX)
	}
	for i, name := range names {
		if name == "" || name != bpf.ReasonName(i) {
			t.Errorf("reason %d has no name", i)
		}
	}
	if got := bpf.ReasonName(int(bpf.LockstepLsReasonLS_R_held)); got != "held" {
		t.Errorf("ReasonName(LS_R_held) = %q", got)
	}
	if got := bpf.ReasonName(len(names)); got != fmt.Sprintf("reason_%d", len(names)) {
		t.Errorf("ReasonName(%d) = %q", len(names), got)
	}
}

func TestLoad(t *testing.T) {
	var objs bpf.LockstepObjects
	if err := bpf.LoadLockstepObjects(&objs, nil); err != nil {
		t.Fatalf("%+v", err)
	}
	if err := objs.Close(); err != nil {
		t.Fatal(err)
	}
}
