// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/lockstep-ft/lockstep/bpf"
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

// Names that the kernel would cut, and maps that bpftool could not show.
func TestSpec(t *testing.T) {
	spec, err := bpf.LoadLockstep()
	if err != nil {
		t.Fatal(err)
	}
	for name := range spec.Programs {
		if len(name) > 15 || !strings.HasPrefix(name, "ls_") {
			t.Errorf("program %s", name)
		}
	}
	for name, m := range spec.Maps {
		if name[0] == '.' {
			continue
		}
		if len(name) > 15 || !strings.HasPrefix(name, "ls_") {
			t.Errorf("map %s", name)
		}
		if m.Type != ebpf.RingBuf && (m.Key == nil || m.Value == nil) {
			t.Errorf("map %s without types", name)
		}
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
