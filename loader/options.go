// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"fmt"
	"log/slog"

	"lockstep/bpf"
	"lockstep/control/datapath"
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
	// Differ names the settings that keep a config from going on with the tables that one
	// of another hash made; alone: the guest speaks alone. nil: all do.
	Differ  func(pinned [32]byte, alone bool) []string
	Version string // of this lockstep
	Discard bool   // what is pinned for this NIC goes, whatever it is
	Log     *slog.Logger

	// Mutation switches a rule of the kernel half off ; tests
	// only: nothing in the config or on the command line reaches it.
	Mutation Mutation
}

// Rule lets datagrams of the PVM leave uncompared. A port of 0 is any.
type Rule struct {
	Proto                 uint8
	GuestPort, RemotePort uint16
}

// Mutation is a rule switched off.
type Mutation uint32

// MutateR9 has the rewriter ignore announcements and guess. MutateR6 leaves gaps
// in a lane's numbers alone, MutateR20 lets guests speak for ever, MutateReplay takes
// records again and again, MutateTag takes forged ones, MutateGuard leaves timestamps
// behind and MutateEdge numbers as they are where a connection was taken over,
// MutateQuote what ICMP errors quote, and MutateMode has released frames leave in every
// mode. MutateWait has SetMode return while programs go by the mode before.
const (
	MutateR9     = Mutation(bpf.LockstepLsMutationLS_MUTATE_R9)
	MutateR6     = Mutation(bpf.LockstepLsMutationLS_MUTATE_R6)
	MutateR20    = Mutation(bpf.LockstepLsMutationLS_MUTATE_R20)
	MutateReplay = Mutation(bpf.LockstepLsMutationLS_MUTATE_REPLAY)
	MutateTag    = Mutation(bpf.LockstepLsMutationLS_MUTATE_TAG)
	MutateGuard  = Mutation(bpf.LockstepLsMutationLS_MUTATE_GUARD)
	MutateEdge   = Mutation(bpf.LockstepLsMutationLS_MUTATE_EDGE)
	MutateQuote  = Mutation(bpf.LockstepLsMutationLS_MUTATE_QUOTE)
	MutateMode   = Mutation(bpf.LockstepLsMutationLS_MUTATE_MODE)
	MutateWait   = Mutation(1 << 31) // SetMode does not wait
)
