// SPDX-License-Identifier: Apache-2.0

// Package api is what a daemon shows and takes over its status socket: the types, HTTP on
// both sides, and metrics for Prometheus.
package api

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/lockstep-ft/lockstep/control/config"
)

// Status is what a daemon reports of itself.
type Status struct {
	VM   string `json:"vm"`
	Node string `json:"node"`
	// What a daemon that takes this one's place must have as well, or the peer refuses it.
	Protocol int    `json:"protocol"` // of the control link
	Config   string `json:"config"`   // digest of what both nodes must agree on

	Role   string `json:"role"`             // "primary", "secondary"
	State  string `json:"state"`            // "start", "replicating", "checkpointing", "failover", "solo", "resync", "spare"
	Detail string `json:"detail,omitempty"` // why it is frozen, parked or shut
	Epoch  uint32 `json:"epoch"`
	Term   uint32 `json:"term"`
	// With an arbiter: whether the secondary may take over (R18), and the term of the
	// arbiter's entry that this node goes by.
	Covered     bool   `json:"covered"`
	ArbiterTerm uint64 `json:"arbiter_term,omitempty"`
	// P: how far replication is that begins, and what came of the tries so far.
	Replication *Replication `json:"replication,omitempty"`
	// Why replication does not begin before somebody does something about it.
	Refused string `json:"refused,omitempty"`
	// P: what was copied of each disk when replication last began.
	Resyncs []string `json:"resyncs,omitempty"`

	Connections     int    `json:"connections"` // S: with an offset
	HeldPackets     int    `json:"held_packets"`
	HeldBytes       int    `json:"held_bytes"`
	ReleasedPackets uint64 `json:"released_packets"`  // that were held, datagrams too; not pure ACKs
	HalfOpenEvicted uint64 `json:"half_open_evicted"` // connections that made room (R11)
	// CheckpointsRequested counts what asked for one: divergences, timeouts,
	// doubt. The period is not among them. CheckpointsDone counts commits.
	CheckpointsRequested uint64 `json:"checkpoints_requested"`
	CheckpointsDone      uint64 `json:"checkpoints_done"`
	// CheckpointPhases are the parts of a committed checkpoint on this host. P: "frozen" is
	// the whole time in which nothing leaves, and made of "prepare" (until S is ready),
	// "request" (until QEMU has stopped the guest: its I/O under way ends), "pause" (until
	// the guest goes on), "confirm" (until the commit). S: "drain" (the SVM reads what
	// its tap holds), "pause", "tables" (offsets are reset, parked input is delivered).
	CheckpointPhases map[string]Histogram `json:"checkpoint_phases,omitempty"`
	CheckpointCounts []CheckpointCount    `json:"checkpoint_counts,omitempty"` // P: those that have ended
	Periodic         *Periodic            `json:"periodic,omitempty"`          // P: once it has begun
	// P: how long the frames that the daemon released were held. Those that the kernel released (R27) were
	// for 10 ms at most, and are not among them.
	HoldTimes *Histogram `json:"hold_times,omitempty"`
	// P, while it replicates: for how long it may still transmit without another echo of the secondary's
	// kernel (R20). It is muted from 0 on.
	LeaseMS *float64 `json:"lease_ms,omitempty"`

	GuestClock GuestClock `json:"guest_clock"`

	DiskFaults []DiskFault `json:"disk_faults,omitempty"` // what replicas of disks did not do, as far as this node knows
	// P: what the guest wrote since it took over is not in its images yet.
	Unmerged    bool     `json:"unmerged,omitempty"`
	MaskedDisks []string `json:"masked_disks,omitempty"` // P: on these QEMU hides such faults from the guest

	Dropped  map[string]uint64        `json:"dropped"`  // frames by reason
	Counters map[string]uint64        `json:"counters"` // all of the kernel's, by reason, and what is no frame
	Programs map[string]ProgramStatus `json:"programs"` // by name; of further NICs by name@device

	Peer        PeerStatus      `json:"peer"`
	QMP         QMPStatus       `json:"qmp"`
	Overlays    []OverlayStatus `json:"overlays,omitempty"` // the secondary's, one of each file system
	Causes      []Cause         `json:"causes"`             // the last requests, oldest first
	Checkpoints []Checkpoint    `json:"checkpoints"`        // the last attempts, oldest first
}

// oldStatus has the fields of a release before under their names of then. They are
// written beside the new ones for one release.
type oldStatus struct {
	Record uint64 `json:"record,omitempty"` // ArbiterTerm
}

type plainStatus Status

// MarshalJSON writes renamed fields under both names.
func (s Status) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		plainStatus
		oldStatus
	}{plainStatus(s), oldStatus{Record: s.ArbiterTerm}})
}

// UnmarshalJSON takes the answer of an older daemon, too.
func (s *Status) UnmarshalJSON(b []byte) error {
	var old oldStatus
	if err := errors.Join(json.Unmarshal(b, (*plainStatus)(s)), json.Unmarshal(b, &old)); err != nil {
		return err
	}
	s.ArbiterTerm = cmp.Or(s.ArbiterTerm, old.Record)
	return nil
}

// Replication is a primary's beginning of one.
type Replication struct {
	What    string `json:"what,omitempty"` // is copied: "memory", or a disk's ID
	Done    int64  `json:"done,omitempty"` // bytes
	Total   int64  `json:"total,omitempty"`
	Rate    int64  `json:"bytes_per_second,omitempty"`
	Dirtied int64  `json:"dirtied_per_second,omitempty"` // bytes that the guest writes to its memory meanwhile
	// Tries in a row that came to nothing, why the last one did, and when the next is due.
	Failed int        `json:"failed,omitempty"`
	Why    string     `json:"why,omitempty"`
	Next   *time.Time `json:"next,omitempty"`
}

// ProgramStatus is where a program is attached.
type ProgramStatus struct {
	Device string `json:"device"`
	Attach string `json:"attach"`
}

// PeerStatus is the control link's state.
type PeerStatus struct {
	Node      string    `json:"node"`
	Address   string    `json:"address,omitempty"`
	Connected bool      `json:"connected"`
	Since     time.Time `json:"since"` // of the present state
	Error     string    `json:"error,omitempty"`
	Insecure  bool      `json:"insecure,omitempty"`
}

// QMPStatus is the state of the connection to this host's QEMU.
type QMPStatus struct {
	Configured bool      `json:"configured"`
	Connected  bool      `json:"connected"`
	Since      time.Time `json:"since"`
	QEMU       string    `json:"qemu,omitempty"`     // version
	State      string    `json:"state,omitempty"`    // as QEMU names it
	COLO       string    `json:"colo,omitempty"`     // mode
	Error      string    `json:"error,omitempty"`    // of the last failure
	Insecure   bool      `json:"insecure,omitempty"` // memory and disks go to the other QEMU in the clear
}

// GuestClock is about the clock of this host's guest, which stands still while the guest does.
type GuestClock struct {
	PausedSeconds float64 `json:"paused_seconds"` // for so long it has stood still since the guest booted, as far as the two daemons know
	// With a guest agent, when it has answered.
	Agent         bool       `json:"agent,omitempty"`          // there is one in the config
	BehindSeconds *float64   `json:"behind_seconds,omitempty"` // this host's clock, before it was set; below 0: ahead
	Looked        *time.Time `json:"looked,omitempty"`         // then
	Sets          uint64     `json:"sets,omitempty"`           // how often it was set
	Error         string     `json:"error,omitempty"`          // of the last look
}

// String is how long the guest stood still, and how its clock is.
func (g *GuestClock) String() string {
	s := fmt.Sprintf("%.1f s in all", g.PausedSeconds)
	if g.BehindSeconds != nil {
		word, by := "behind", *g.BehindSeconds
		if by < 0 {
			word, by = "ahead of", -by
		}
		s += fmt.Sprintf("; its clock was %.2f s %s this host's at %s, and has been set %d times", by, word, g.Looked.Format(time.TimeOnly), g.Sets)
	}
	if g.Error != "" {
		s += "; NOT SET: " + g.Error
	}
	return s
}

// Periodic is about periodic mode (R28): the guests differ so often that a checkpoint is made at each epoch's end.
type Periodic struct {
	On      bool       `json:"on"`
	Since   *time.Time `json:"since,omitempty"` // while it is on
	Until   *time.Time `json:"until,omitempty"` // then it is tried without
	EpochMS float64    `json:"epoch_ms"`        // between two checkpoints, at least
	Begun   uint64     `json:"begun"`           // how often since the daemon's start
}

// String is whether it is on, and for how long.
func (p *Periodic) String() string {
	if !p.On {
		return fmt.Sprintf("off; it has begun %d times", p.Begun)
	}
	return fmt.Sprintf("since %s, a checkpoint every %.0f ms or more, because the guests differ so often; until %s at most",
		p.Since.Format(time.TimeOnly), p.EpochMS, p.Until.Format(time.TimeOnly))
}

// Cause is a request for a checkpoint.
type Cause struct {
	At     time.Time `json:"at"`
	Reason string    `json:"reason"`
	NIC    *int      `json:"nic,omitempty"`
	Flow   string    `json:"flow,omitempty"`  // guest>remote
	Where  string    `json:"where,omitempty"` // in what the guests differ, as far as digests and headers tell
}

// Checkpoint is an attempt at one.
type Checkpoint struct {
	Epoch  uint32    `json:"epoch"`
	At     time.Time `json:"at"`
	Cause  string    `json:"cause"`          // the first of its causes
	Flow   string    `json:"flow,omitempty"` // guest>remote, where a connection asked for it
	Where  string    `json:"where,omitempty"`
	Result string    `json:"result"` // "running", "committed", or why it failed
	// Milliseconds: how long nothing left P, how long either guest stood still.
	FrozenMS   float64 `json:"frozen_ms"`
	PVMPauseMS float64 `json:"pvm_pause_ms"`
	SVMPauseMS float64 `json:"svm_pause_ms"`
}

// CheckpointCount is how many checkpoints had a cause and a result.
type CheckpointCount struct {
	Cause  string `json:"cause"`  // the first one's name as [Explain] has it, or "other"
	Result string `json:"result"` // "committed", "failed"
	Count  uint64 `json:"count"`
}

// Flow is a connection of the guest. The secondary knows offsets, the primary
// the rest.
type Flow struct {
	NIC         int     `json:"nic"`
	Guest       string  `json:"guest"`
	Remote      string  `json:"remote"`
	VLAN        *uint16 `json:"vlan,omitempty"` // TCI
	State       string  `json:"state"`
	Owner       string  `json:"owner,omitempty"`    // primary: who compares it, "kernel" (positions are up to 1 s old) or "daemon"
	Offset      *uint32 `json:"offset,omitempty"`   // ISN_SVM - ISN_PVM
	Compared    *uint32 `json:"compared,omitempty"` // TCP sequence number, PVM numbering
	HeldPackets int     `json:"held_packets"`
	HeldBytes   int     `json:"held_bytes"`
	Age         float64 `json:"age"` // seconds; on the secondary since the last frame
}

// OverlayStatus is about a file system that holds a secondary's overlays.
type OverlayStatus struct {
	Node           string   `json:"node"` // the secondary, or a host that took over and has not merged them yet
	Dir            string   `json:"overlay_dir"`
	Disks          []string `json:"disks"`
	UsedBytes      int64    `json:"used_bytes"` // by the overlays
	FreeBytes      int64    `json:"free_bytes"` // left for them
	BytesPerSecond float64  `json:"bytes_per_second"`
	LastsSeconds   *float64 `json:"lasts_seconds,omitempty"` // at this rate, without a checkpoint; absent: without end
	Trouble        string   `json:"trouble,omitempty"`       // why a secondary could not start, or came to an end
}

// String is how much room there is and how long it lasts.
func (o *OverlayStatus) String() string {
	lasts := "and they do not grow"
	if o.LastsSeconds != nil {
		lasts = fmt.Sprintf("full in %.0f s at %.1f MiB/s", *o.LastsSeconds, o.BytesPerSecond/(1<<20))
	}
	return fmt.Sprintf("%s on %s: %.1f MiB used, %.1f MiB left in %s, %s", strings.Join(o.Disks, ", "), o.Node,
		float64(o.UsedBytes)/(1<<20), float64(o.FreeBytes)/(1<<20), o.Dir, lasts)
}

// DiskFault is something that a replica of a disk did not do.
type DiskFault struct {
	Disk      string    `json:"disk"`
	Host      string    `json:"host"`      // the node whose replica it is
	Operation string    `json:"operation"` // "read", "write", "flush"
	Error     string    `json:"error"`
	Count     uint64    `json:"count"` // of this disk, host and operation; QEMU reports one a second at most
	At        time.Time `json:"at"`    // the last one
}

// FailoverDone is what came of a failover.
type FailoverDone struct {
	Node    string  `json:"node"`   // that was asked
	Result  string  `json:"result"` // "transmits alone"
	Seconds float64 `json:"seconds"`
}

// Takes reports whether a daemon with this protocol of the control link, and a config of this digest, can take the
// place of the one whose status s is: whether the peer will have it.
func (s *Status) Takes(protocol int, digest string) error {
	switch in := strings.Join(config.DifferHex(s.Config, digest), ", "); {
	case s.Protocol == 0:
		return errors.New("the daemon that runs does not report what its peer expects: it is too old to be replaced alone")
	case s.Protocol != protocol:
		return fmt.Errorf("the daemon that runs speaks control protocol %d with %s, and this lockstep %d", s.Protocol, s.Peer.Node, protocol)
	case s.State == "solo" || s.Config == digest:
		return nil
	case in == "":
		return errors.New("the daemon that runs has another config, and its version does not report in what")
	default:
		return fmt.Errorf("the daemon that runs has another config (%s)", in)
	}
}
