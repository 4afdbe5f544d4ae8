// SPDX-License-Identifier: Apache-2.0

// Package bpf is lockstep's kernel half: six tcx programs and one of XDP, the maps
// they share and the Go view of both, generated from abi.h.
package bpf

import (
	"fmt"
	"strings"
	"sync"

	"github.com/cilium/ebpf/btf"
)

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -go-package bpf -target bpfel -output-stem lockstep -type ls_ev -type ls_ev_rec -type ls_pre -type ls_rec -type ls_const -type ls_mutation -type ls_mode -type ls_slot_state -type ls_ev_type -type ls_ev_flag -type ls_rec_type -type ls_rec_flag -type ls_dir -type ls_conn_bit -type ls_reason -type ls_owner -type ls_fast_op -type ls_fast_tmpl -type ls_fast_mark -type ls_fast_ctx -type ls_fast_state -type ls_fast_held -type ls_fast_rec -type ls_acked -type ls_bucket_op -type ls_bucket_ctx -type ls_bucket_state -type ls_bucket_dgram Lockstep lockstep.c -- -std=gnu11 -O2 -g -Wall -Wextra -Wno-unused-parameter -Werror -mcpu=v3 -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu

// ReasonNames returns the label of every reason a program counts, by its index
// in ls_stats. The labels are enum ls_reason's names in the object's own BTF.
var ReasonNames = sync.OnceValue(func() []string {
	spec, err := LoadLockstep()
	if err != nil {
		return nil // the object is embedded: tests would not have passed
	}
	var reasons *btf.Enum
	if err := spec.Types.TypeByName("ls_reason", &reasons); err != nil {
		return nil
	}
	names := make([]string, LockstepLsReasonLS_R_MAX)
	for _, v := range reasons.Values {
		if v.Value < uint64(len(names)) {
			names[v.Value] = strings.TrimPrefix(v.Name, "LS_R_")
		}
	}
	return names
})

// ReasonName returns the label of reason i.
func ReasonName(i int) string {
	if names := ReasonNames(); i >= 0 && i < len(names) {
		return names[i]
	}
	return fmt.Sprintf("reason_%d", i)
}
