// SPDX-License-Identifier: Apache-2.0

package bpfmodel_test

import (
	"testing"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/rewriter"
)

// The daemon's names for a connection's state bits are the kernel's.
func TestStateBits(t *testing.T) {
	for kernel, daemon := range map[bpf.LockstepLsConnBit]rewriter.State{
		bpf.LockstepLsConnBitLS_CONN_PVM:       rewriter.HasPVM,
		bpf.LockstepLsConnBitLS_CONN_SVM:       rewriter.HasSVM,
		bpf.LockstepLsConnBitLS_CONN_ACTIVE:    rewriter.Active,
		bpf.LockstepLsConnBitLS_CONN_GFIN:      rewriter.GuestFIN,
		bpf.LockstepLsConnBitLS_CONN_RFIN:      rewriter.RemoteFIN,
		bpf.LockstepLsConnBitLS_CONN_RST:       rewriter.WasReset,
		bpf.LockstepLsConnBitLS_CONN_TS:        rewriter.Timestamps,
		bpf.LockstepLsConnBitLS_CONN_PACTIVE:   rewriter.PVMActive,
		bpf.LockstepLsConnBitLS_CONN_PTS:       rewriter.PVMTS,
		bpf.LockstepLsConnBitLS_CONN_STS:       rewriter.SVMTS,
		bpf.LockstepLsConnBitLS_CONN_DONE:      rewriter.Done,
		bpf.LockstepLsConnBitLS_CONN_INHERITED: rewriter.Inherited,
		bpf.LockstepLsConnBitLS_CONN_GUARDED:   rewriter.Guarded,
		bpf.LockstepLsConnBitLS_CONN_ECHOES:    rewriter.Echoes,
		bpf.LockstepLsConnBitLS_CONN_UNACKED:   rewriter.Unacked,
	} {
		if uint32(kernel) != uint32(daemon) {
			t.Errorf("the kernel's bit %b is %b here", kernel, daemon)
		}
	}
}
