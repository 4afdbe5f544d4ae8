// SPDX-License-Identifier: Apache-2.0

package main

import "lockstep/control"

// Status is what `status --json` prints: a contract, extended but not changed.
type Status struct {
	VM    string `json:"vm"`
	Node  string `json:"node"`
	Role  string `json:"role"`  // "primary", "secondary"
	State string `json:"state"` // DESIGN §7's words
	Epoch uint32 `json:"epoch"`
	Peer  struct {
		Node      string `json:"node"`
		Connected bool   `json:"connected"`
	} `json:"peer"`
	Connections          int               `json:"connections"`
	HeldPackets          int               `json:"held_packets"`
	HeldBytes            int64             `json:"held_bytes"`
	ReleasedPackets      uint64            `json:"released_packets"`
	CheckpointsRequested uint64            `json:"checkpoints_requested"`
	CheckpointsDone      uint64            `json:"checkpoints_done"`
	Dropped              map[string]uint64 `json:"dropped"` // by reason
	Programs             []control.Program `json:"programs"`
}

// Flow is one element of what `flows --json` prints. The secondary knows
// offsets, the primary what is compared and held.
type Flow struct {
	NIC         int     `json:"nic"`
	Guest       string  `json:"guest"`
	Remote      string  `json:"remote"`
	VLAN        *uint16 `json:"vlan,omitempty"`
	State       string  `json:"state"`
	Offset      *uint32 `json:"offset,omitempty"`   // ISN_SVM - ISN_PVM
	Compared    *uint32 `json:"compared,omitempty"` // TCP sequence number, PVM numbering
	HeldPackets int     `json:"held_packets"`
	HeldBytes   int     `json:"held_bytes"`
	Age         float64 `json:"age"` // seconds
}
