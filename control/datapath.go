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
	ModeShut  Mode = iota // nothing in or out
	ModeHold              // primary: hold, announce, mirror
	ModeRun               // secondary: rewrite in, record out
	ModePark              // secondary: input parked, output dropped (R13)
	ModeSolo              // alone: pass both ways
	ModeQuiet             // secondary that takes over: as shut, but what its guest says is kept (R21 i)
)

// DataPath is the kernel half of one guest NIC.
//
// One goroutine polls it, applies effects and changes modes. Wake, Now,
// DrainTap, Sweep, Counters, Offsets, Programs, MAC, Adopted and CheckOrder are
// called from others.
type DataPath interface {
	// Poll appends events to evs: what is there, or, when nothing is, what
	// comes within wait. Wake ends the wait early, or the next one when none is
	// under way. Views inside the events
	// (Opts, Header) are valid until the next Poll, Payload until the slot is
	// freed.
	Poll(wait time.Duration, evs []compare.Event) ([]compare.Event, error)
	Wake()
	// Apply carries out effects in order (OpCheckpoint and OpAdopt are the
	// caller's and ignored).
	Apply(effs []compare.Effect) error
	Now() int64 // boottime ns
	SetMode(Mode) error
	SetEpoch(uint32) error
	SetSpeakUntil(int64) error       // R20; MaxInt64: for ever
	SetSpeakFor(time.Duration) error // P: what an echo allows, from the time it tells (R20)
	Echo() error                     // P: asks S's kernel for an echo (R20)
	Mark() error                     // P: tells S where the PVM's STOP lies among its input (R16)
	Echoed() int64                   // boottime ns of the last echo that S's kernel returned (R20); 0: none yet
	// TakeOver (S, quiet) makes the SVM's timestamps follow the PVM's: on connections
	// with them the clients see guard ticks more than the PVM's clock tells (R22).
	// Done again it changes nothing.
	TakeOver(guard uint32) error
	// Edges are the connections that this host, or one before it, took over, as P
	// translates them at its outer edge; AddEdges tells S of them.
	Edges() ([]Edge, error)
	AddEdges([]Edge) error
	InstallSession(Session) error                              // keys, term, epoch, MACs
	ResetOffsets() error                                       // S: empties ls_conn, ls_half
	Sweep(linger, idle time.Duration) (removed int, err error) // removes closed and idle connections: S's, and those that P took over
	DrainTap(ctx context.Context) error                        // S: returns when the SVM has read everything
	MAC() net.HardwareAddr                                     // peer device's own address
	Counters() (map[string]uint64, error)                      // by reason name
	Offsets(func(compare.Tuple, Offset)) error                 // S: connections with their offset, for `flows`
	Programs() []Program                                       // name, device, attach mode
	Close() error                                              // leaves pins

	// Adopted is what an earlier daemon left in the kernel and this one goes on
	// from (R23); nil: the tables were made at this start. Programs are shut then.
	Adopted() *Adopted
	// CheckOrder names a foreign program that sees frames before ours does; "":
	// there is none. tap: it does so at the guest's tap. SetTap sets that up or
	// down.
	CheckOrder() (intruder string, tap bool, err error)
	SetTap(up bool) error
	// Acked is what the remote of a TCP connection has acknowledged (P); false:
	// nobody knows. The NIC's goroutine calls it.
	Acked(compare.Tuple) (ack uint32, ok bool)
}

// Adopted is what was found pinned.
type Adopted struct {
	Term, Epoch uint32
	Mode        Mode
	Digest      compare.Keys // what the kernel digests with
	Remotes     []Remote     // P: of TCP connections that were neither reset nor being opened
}

// Remote is the client's end of a connection.
type Remote struct {
	compare.Tuple
	Ack uint32 // highest, PVM numbering
	At  int64  // boottime ns of its newest segment
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

// Edge is the translation of a connection that was taken over: the guest's numbers
// minus those that the remote knows.
type Edge struct {
	compare.Tuple
	Seq uint32
	TS  uint32
}

// Program is one attached kernel program.
type Program struct {
	Name   string `json:"name"`
	Device string `json:"device"`
	Attach string `json:"attach"` // "tcx-ingress", "tcx-egress"
}
