// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"fmt"
	"log/slog"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/control/datapath"
)

// Role is what a NIC's programs are attached for.
type Role int

// Roles.
const (
	Primary Role = iota + 1
	Secondary
)

func (r Role) String() string {
	switch r {
	case Primary:
		return string(datapath.RolePrimary)
	case Secondary:
		return string(datapath.RoleSecondary)
	}
	return fmt.Sprintf("%d", int(r))
}

// Options describe one guest NIC.
type Options struct {
	PinDir, VM, Node string
	NIC              int
	Role             Role
	Tap, PeerDevice  string // device names
	MaxConnections   int
	Slots, GSOSlots  int      // held frames of up to 1984 bytes, and of up to 68 KiB
	Rules            []Rule   // of datagrams that leave uncompared
	MPTCP            bool     // the guests may use it
	XDP              string   // XDPOff, XDPOn, XDPAuto; "": off
	ConfigHash       [32]byte // of what both nodes must agree on
	// Differ names the settings of this config that do not fit tables made by the config
	// with the pinned hash; alone: the guest transmits alone. nil: any other hash is refused.
	Differ  func(pinned [32]byte, alone bool) []string
	Version string // of this lockstep
	Discard bool   // removes what is pinned for this NIC, whatever it is
	Log     *slog.Logger

	// Mutation switches a rule of the kernel half off. Only tests set it: nothing in the
	// config or on the command line does.
	Mutation Mutation
}

// Rule lets datagrams of the PVM leave uncompared. A port of 0 is any.
type Rule struct {
	Proto                 uint8
	GuestPort, RemotePort uint16
}

// Mutation is a rule switched off.
type Mutation uint32

// What is switched off.
const (
	MutateR9     = Mutation(bpf.LockstepLsMutationLS_MUTATE_R9)     // offsets: announcements are ignored, every offset is 0
	MutateR6     = Mutation(bpf.LockstepLsMutationLS_MUTATE_R6)     // retransmission of lost records
	MutateR20    = Mutation(bpf.LockstepLsMutationLS_MUTATE_R20)    // the output lease
	MutateReplay = Mutation(bpf.LockstepLsMutationLS_MUTATE_REPLAY) // the anti-replay check
	MutateTag    = Mutation(bpf.LockstepLsMutationLS_MUTATE_TAG)    // the check of records' tags
	MutateGuard  = Mutation(bpf.LockstepLsMutationLS_MUTATE_GUARD)  // the timestamps' guard after a takeover
	MutateEdge   = Mutation(bpf.LockstepLsMutationLS_MUTATE_EDGE)   // the translation of connections that were taken over
	MutateQuote  = Mutation(bpf.LockstepLsMutationLS_MUTATE_QUOTE)  // the translation of what ICMP errors quote
	MutateMode   = Mutation(bpf.LockstepLsMutationLS_MUTATE_MODE)   // the mode's check for released frames
	MutateWait   = Mutation(1 << 31)                                // SetMode's wait for programs that go by the mode before
)
