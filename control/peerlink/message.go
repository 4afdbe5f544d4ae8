// SPDX-License-Identifier: Apache-2.0

// Package peerlink is the control link between the two daemons of a pair: one TCP
// connection, which the secondary makes, under TLS, with JSON lines both ways. One type
// stands for each message.
//
//	S → P  Hello      who I am, what state my tables are in
//	P → S  Session    the key generation, its keys, the epoch; or Refuse, with the reason
//	S → P  OK         installed
//	P → S  Prepare, Abort
//	S → P  Ready, Stopped, Resumed, Abort
//	P → S  Rekey      the next key generation and its signing keys; S answers OK
//	P → S  Edges      connections that were taken over earlier: S needs them before it is covered
//	P → S  Covered    S may take over from now on (R18); Dismiss: P goes on without S; PoweredOff: the guest did
//	P → S  Refused    why replication does not begin, "" when it is tried again
//	S → P  Overlays   what room they have, and in Cause why P should make a checkpoint
//	P → S  Replica    what S's images are from now on, which S notes and answers by Kept
//	S → P  Yield      stop transmitting and answer Dead: S takes over because an operator wants it to
//	both   Dead       my QEMU is dead, my gates are shut
//	both   Ping       now and then
package peerlink

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/datapath"
)

// Message is one of the types below.
type Message interface {
	// Type is the message's name on the wire.
	Type() string
}

// The messages.
type (
	Hello struct {
		Party
		Fresh       bool   `json:"fresh"`       // the tables were made at this start
		Whole       bool   `json:"whole"`       // the offsets are those of the SVM as it is
		Epoch       uint32 `json:"epoch"`       // the one that S is in
		Connections int    `json:"connections"` // with an offset

		COLO  bool    `json:"colo,omitempty"`  // the SVM follows a PVM; else its QEMU waits for one
		Disks []int64 `json:"disks,omitempty"` // their sizes
		// The guest's machine with its version, and QEMU's.
		Machine string `json:"machine,omitempty"`
		QEMU    string `json:"qemu,omitempty"`

		PausedNS int64 `json:"paused_ns,omitempty"` // as in Prepare

		Notes bool   `json:"notes,omitempty"` // Replica is understood
		Point string `json:"point,omitempty"` // what S's images are
	}
	Session struct {
		Party
		Epoch  uint32 `json:"epoch"`
		Digest []byte `json:"digest"` // digest keys, compare.Keys' words, little-endian: they outlive a daemon
		Sign   []byte `json:"sign"`   // seed of the keys that peer frames are signed with
		Doubt  bool   `json:"doubt"`  // stay parked until a checkpoint

		Record uint64 `json:"record,omitempty"` // fencing term of the arbiter's entry
		Pair   bool   `json:"pair,omitempty"`   // the pair that there was goes on
	}
	Refuse struct {
		Cause string
		Spare bool // nothing is wrong: P has its secondary
	}
	OK      struct{}
	Prepare struct {
		Epoch    uint32
		PausedNS int64 // for so long the PVM has stood still since it booted
	}
	Abort struct {
		Epoch   uint32
		Cause   string
		Unasked bool // P → S: the SVM had stopped before QEMU was asked
	}
	Ready   struct{ Epoch uint32 }
	Stopped struct{ Epoch uint32 }
	Resumed struct {
		Epoch   uint32
		PauseNS int64 // the SVM's
	}
	Rekey struct {
		Term uint32 `json:"term"`
		Sign []byte `json:"sign"` // as in Session
	}
	Edges struct {
		NIC   int
		Edges []datapath.Edge
	}
	Covered    struct{ Term uint64 } // fencing term of the arbiter's entry
	Dismiss    struct{}
	PoweredOff struct{}
	Refused    struct{ Cause string }
	Overlays   struct {
		All   []api.OverlayStatus
		Cause string
	}
	Replica struct{ Point string }
	Kept    struct{ Point string }
	Yield   struct{}
	Dead    struct{}
	Ping    struct{}
)

func (Hello) Type() string      { return "hello" }
func (Session) Type() string    { return "session" }
func (Refuse) Type() string     { return "refuse" }
func (OK) Type() string         { return "ok" }
func (Prepare) Type() string    { return "prepare" }
func (Abort) Type() string      { return "abort" }
func (Ready) Type() string      { return "ready" }
func (Stopped) Type() string    { return "stopped" }
func (Resumed) Type() string    { return "resumed" }
func (Rekey) Type() string      { return "rekey" }
func (Edges) Type() string      { return "edges" }
func (Covered) Type() string    { return "covered" }
func (Dismiss) Type() string    { return "over" }
func (PoweredOff) Type() string { return "off" }
func (Refused) Type() string    { return "refused" }
func (Overlays) Type() string   { return "overlays" }
func (Replica) Type() string    { return "replica" }
func (Kept) Type() string       { return "kept" }
func (Yield) Type() string      { return "yield" }
func (Dead) Type() string       { return "dead" }
func (Ping) Type() string       { return "ping" }

// wire is a message as a line of JSON has it.
type wire struct {
	Type    string   `json:"type"`
	Epoch   uint32   `json:"epoch,omitempty"`
	Cause   string   `json:"cause,omitempty"`
	Unasked bool     `json:"unasked,omitempty"`
	Spare   bool     `json:"spare,omitempty"`
	PauseNS int64    `json:"pause_ns,omitempty"`
	Hello   *Hello   `json:"hello,omitempty"`
	Session *Session `json:"session,omitempty"`
	Rekey   *Rekey   `json:"rekey,omitempty"`
	Record  uint64   `json:"record,omitempty"`
	NIC     int      `json:"nic,omitempty"`
	Edges   []byte   `json:"edges,omitempty"` // Edge's fields, little-endian

	Overlays []api.OverlayStatus `json:"overlays,omitempty"`
	Point    string              `json:"point,omitempty"`
}

func encode(m Message) wire {
	w := wire{Type: m.Type()}
	switch m := m.(type) {
	case Hello:
		w.Hello = &m
	case Session:
		w.Session = &m
	case Rekey:
		w.Rekey = &m
	case Refuse:
		w.Cause, w.Spare = m.Cause, m.Spare
	case Refused:
		w.Cause = m.Cause
	case Prepare:
		w.Epoch, w.PauseNS = m.Epoch, m.PausedNS
	case Abort:
		w.Epoch, w.Cause, w.Unasked = m.Epoch, m.Cause, m.Unasked
	case Ready:
		w.Epoch = m.Epoch
	case Stopped:
		w.Epoch = m.Epoch
	case Resumed:
		w.Epoch, w.PauseNS = m.Epoch, m.PauseNS
	case Covered:
		w.Record = m.Term
	case Replica:
		w.Point = m.Point
	case Kept:
		w.Point = m.Point
	case Overlays:
		w.Overlays, w.Cause = m.All, m.Cause
	case Edges:
		b, err := binary.Append(nil, binary.LittleEndian, m.Edges)
		if err != nil {
			panic(err) // fields of fixed size
		}
		w.NIC, w.Edges = m.NIC, b
	}
	w.Cause = w.Cause[:min(len(w.Cause), maxCause)] // it may quote what somebody else sent
	return w
}

func (w *wire) decode() (Message, error) {
	switch w.Type {
	case "hello":
		if w.Hello != nil {
			return *w.Hello, nil
		}
	case "session":
		if w.Session != nil {
			return *w.Session, nil
		}
	case "rekey":
		if w.Rekey != nil {
			return *w.Rekey, nil
		}
	case "refuse":
		return Refuse{w.Cause, w.Spare}, nil
	case "ok":
		return OK{}, nil
	case "prepare":
		return Prepare{w.Epoch, w.PauseNS}, nil
	case "abort":
		return Abort{w.Epoch, w.Cause, w.Unasked}, nil
	case "ready":
		return Ready{w.Epoch}, nil
	case "stopped":
		return Stopped{w.Epoch}, nil
	case "resumed":
		return Resumed{w.Epoch, w.PauseNS}, nil
	case "edges":
		edges := make([]datapath.Edge, len(w.Edges)/binary.Size(datapath.Edge{}))
		if n, err := binary.Decode(w.Edges, binary.LittleEndian, edges); err != nil || n != len(w.Edges) {
			return nil, errors.New("edges that make no sense")
		}
		return Edges{w.NIC, edges}, nil
	case "covered":
		return Covered{w.Record}, nil
	case "over":
		return Dismiss{}, nil
	case "off":
		return PoweredOff{}, nil
	case "refused":
		return Refused{w.Cause}, nil
	case "overlays":
		return Overlays{w.Overlays, w.Cause}, nil
	case "replica":
		return Replica{w.Point}, nil
	case "kept":
		return Kept{w.Point}, nil
	case "yield":
		return Yield{}, nil
	case "dead":
		return Dead{}, nil
	case "ping":
		return Ping{}, nil
	default:
		return nil, fmt.Errorf("message %q is unknown here", w.Type)
	}
	return nil, fmt.Errorf("message %q is empty", w.Type)
}
