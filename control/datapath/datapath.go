// SPDX-License-Identifier: Apache-2.0

// Package datapath is what the daemon and the kernel half have in common: the modes,
// the session, the recovered state, and the interfaces that package control needs and
// package loader serves.
package datapath

import (
	"context"
	"io"
	"net"
	"time"

	"github.com/lockstep-ft/lockstep/compare"
)

// Role is which guest a host runs.
type Role string

// Roles.
const (
	RolePrimary   Role = "primary"
	RoleSecondary Role = "secondary"
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
	ModeQuiet             // secondary that takes over: as shut, but what its guest sends is kept (R21 i)
)

// NIC is the kernel half of one guest NIC, cut by who needs what.
//
// One goroutine, the NIC's loop, calls [Frames], [Gate] and [Conntrack]. What the
// other goroutines may call as well is marked.
type NIC interface {
	Frames
	Gate
	Conntrack
	ChainGuard
	Inspector
	io.Closer // leaves the pins: the programs go on in their last mode
}

// Frames are the events and effects that compare's cores decide about.
type Frames interface {
	// Poll appends events to evs: what is there, or, when nothing is, what comes
	// within wait. Views inside the events (Opts, Header) are valid until the next
	// Poll, Payload until the slot is freed.
	Poll(wait time.Duration, evs []compare.Event) ([]compare.Event, error)
	// Wake ends the wait of Poll early, or the next one when none is under way. Any
	// goroutine may call it.
	Wake()
	// Apply carries out effects in order (OpCheckpoint and OpAdopt are the caller's
	// and ignored).
	Apply(effs []compare.Effect) error
	// Now is the boottime, ns. Any goroutine may call it.
	Now() int64
}

// FastPath lets P's kernel own TCP connections of which nothing waits, and flows of datagrams (R27).
type FastPath interface {
	// SetFast: the kernel may own connections, or gives back each at its next frame.
	SetFast(on bool) error
	// Grant hands a connection over, and reports whether the kernel owns it now. It does not while
	// events of the connection are on their way.
	Grant(compare.Tuple, *compare.Handover) (bool, error)
	// Take takes a connection back that Grant handed over, and appends what waits of it.
	Take(compare.Tuple, []compare.Event) (*compare.Handover, []compare.Event, error)
	Forget(compare.Tuple) error // the connection is over
	ForgetAll() error           // all are
	// TakeDatagrams takes back all flows of datagrams of which something waits in the kernel, which needs
	// no order to own them, and appends that. Poll does so with the flow of an event.
	TakeDatagrams([]compare.Event) ([]compare.Event, error)
	// Even: nothing waits here of the datagram flow, at a boottime in ns. The kernel may own it.
	Even(compare.Tuple, int64) error
}

// Gate decides what passes: the mode, the epoch, the session's keys, and the lease
// that the primary needs to transmit (R20).
type Gate interface {
	SetMode(Mode) error
	SetEpoch(uint32) error
	InstallSession(Session) error         // keys, term, epoch, MACs
	SetLeaseUntil(int64) error            // boottime ns; MaxInt64: without end (R20)
	SetLeaseDuration(time.Duration) error // P: what one echo grants, from when it was asked for (R20)
	RequestEcho() error                   // P: asks S's kernel for an echo (R20)
	LastEcho() int64                      // boottime ns of the last echo that S's kernel returned; 0: none yet. Any goroutine
	MarkStop() error                      // P: marks for S where the PVM's STOP lies among its input (R16)
	DrainTap(ctx context.Context) error   // S: returns when the SVM has read everything. Any goroutine
}

// Conntrack is what the kernel keeps for each TCP connection.
type Conntrack interface {
	ResetOffsets() error // S: empties ls_conn, ls_half
	// Offsets yields S's connections with their offsets, after TakeOver all that go on. Any
	// goroutine may call it.
	Offsets(yield func(compare.Tuple, Offset)) error
	// Sweep removes closed and idle connections: S's, and those that P took over. Any
	// goroutine may call it.
	Sweep(linger, idle time.Duration) (removed int, err error)
	// Acked is what the remote of a TCP connection has acknowledged (P); false:
	// unknown.
	Acked(compare.Tuple) (ack uint32, ok bool)
	// TakeOver (S, quiet) makes the SVM's timestamps follow the PVM's: on connections
	// with them the clients see guard ticks more than the PVM's clock showed (R22). doubt: a
	// checkpoint may have been loaded that nobody has seen; each connection's next segment
	// shows whether its offset counts. It is idempotent.
	TakeOver(guard uint32, doubt bool) error
	// Edges are the connections that this host, or one before it, took over, as P
	// translates them at its outer edge; AddEdges gives them to S.
	Edges() ([]Edge, error)
	AddEdges([]Edge) error
}

// ChainGuard watches who sees the guest's frames before lockstep's programs do.
type ChainGuard interface {
	// CheckOrder names a foreign program in front of ours; "": there is none. tap: it
	// is in front at the guest's tap. Any goroutine may call it.
	CheckOrder() (intruder string, tap bool, err error)
	SetTap(up bool) error // sets the guest's tap up or down
}

// Inspector describes the NIC. Any goroutine may call it.
type Inspector interface {
	MAC() net.HardwareAddr                // the peer device's own
	Counters() (map[string]uint64, error) // by reason
	Programs() []Program
	// Recovered is what an earlier daemon left in the kernel and this one goes on
	// from (R23); nil: the tables were made at this start. Programs are shut then.
	Recovered() *Recovered
}

// Pinned is what an earlier daemon of this node left in the kernel, before anybody
// decides to go on from it. The zero Pinned: nothing, or nothing that is whole.
type Pinned struct {
	Role Role
	Mode Mode
}

// Recovered is the state of an earlier daemon that was found pinned.
type Recovered struct {
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

// Session is what both hosts agree on for one key generation, Term. The keys are this
// host's view: TxKey signs what it sends.
type Session struct {
	Term, Epoch  uint32
	PeerMAC      net.HardwareAddr
	TxKey, RxKey [2]uint64
	Digest       compare.Keys

	// Rotated: the session goes on under new signing keys. Frames of the generation before
	// are accepted for another second, and the epoch stays what it is.
	Rotated bool
}

// Offset is the secondary's translation of one connection (R9).
type Offset struct {
	Seq         uint32 // ISN_SVM - ISN_PVM
	TS          uint32 // TSval_SVM - TSval_PVM
	Incarnation uint32 // ISN_PVM
	Inherited   bool   // a takeover made it, for a connection that came with a checkpoint: the fields above are 0
	ClientAck   uint32 // highest ACK of the remote, PVM numbering; 0: not known
	Last        int64  // boottime ns of the last frame
	State       string // "open", "closing", "reset"
}

// Edge is the translation of a connection that was taken over: the guest's sequence
// numbers and timestamps minus those that the remote knows, modulo 2^32.
type Edge struct {
	compare.Tuple
	Seq uint32
	TS  uint32
	ISN uint32 // the guest's, by which its SYN|ACK is known when it repeats that; 0: not known
}

// Program is one attached kernel program.
type Program struct {
	Name   string `json:"name"`
	Device string `json:"device"`
	Attach string `json:"attach"` // "tcx-ingress", "tcx-egress"
}
