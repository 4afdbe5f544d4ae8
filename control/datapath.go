// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"net"
	"time"

	"lockstep/compare"
)

// Mode mirrors the kernel's modes.
type Mode uint32

// Modes of a NIC's programs.
const (
	ModeShut Mode = iota // nothing in or out
	ModeHold             // primary: hold, announce, mirror
	ModeRun              // secondary: rewrite in, record out
	ModePark             // secondary: input parked, output dropped (R13)
	ModeSolo             // alone: pass both ways
)

// DataPath is the kernel half of one guest NIC.
//
// One goroutine polls it, applies effects and changes modes. Wake, Now,
// DrainTap, Sweep, Counters, Offsets, Programs and MAC are called from others.
type DataPath interface {
	// Poll appends events to evs: what is there, or, when nothing is, what
	// comes within wait. Wake ends the wait early, or the next one when none is
	// under way. Views inside the events
	// (Opts, Header) are valid until the next Poll, Payload until the slot is
	// freed.
	Poll(wait time.Duration, evs []compare.Event) ([]compare.Event, error)
	Wake()
	// Apply carries out effects in order (OpCheckpoint is the caller's and
	// ignored).
	Apply(effs []compare.Effect) error
	Now() int64 // boottime ns
	SetMode(Mode) error
	SetEpoch(uint32) error
	SetSpeakUntil(int64) error                                 // R20; MaxInt64: for ever
	InstallSession(Session) error                              // keys, term, epoch, MACs
	ResetOffsets() error                                       // S: empties ls_conn, ls_half
	Sweep(linger, idle time.Duration) (removed int, err error) // S: removes closed and idle connections
	DrainTap(ctx context.Context) error                        // S: returns when the SVM has read everything
	MAC() net.HardwareAddr                                     // peer device's own address
	Counters() (map[string]uint64, error)                      // by reason name
	Offsets(func(compare.Tuple, Offset)) error                 // S: connections with their offset, for `flows`
	Programs() []Program                                       // name, device, attach mode
	Close() error                                              // leaves pins
}

// Session is what both hosts agree on for one term. Keys are this host's view:
// TxKey signs what it sends.
type Session struct {
	Term, Epoch  uint32
	PeerMAC      net.HardwareAddr
	TxKey, RxKey [2]uint64
	Digest       compare.Keys

	// Rotated: the session goes on under new signing keys. Frames of the term before
	// are taken for another second, and the epoch stays what it is.
	Rotated bool
}

// Offset is the secondary's translation of one connection (R9).
type Offset struct {
	Seq         uint32 // ISN_SVM - ISN_PVM
	TS          uint32 // TSval_SVM - TSval_PVM
	Incarnation uint32 // ISN_PVM
	Last        int64  // boottime ns of the last frame
	State       string // "open", "closing", "reset"
}

// Program is one attached kernel program.
type Program struct {
	Name   string `json:"name"`
	Device string `json:"device"`
	Attach string `json:"attach"` // "tcx-ingress", "tcx-egress"
}
