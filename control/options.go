// SPDX-License-Identifier: Apache-2.0

package control

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/checkpoint"
	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/journal"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/state"
)

// Options are what to run. Zero durations mean defaults.
type Options struct {
	VM   string
	Node string // this host's name
	Peer string // the other's
	Role datapath.Role

	// ConfigDigest is over what both nodes' configs must agree on; a peer with
	// another one is refused.
	ConfigDigest string

	// Control is where the primary listens and the secondary connects: the
	// primary's control address.
	Control string
	// Where the control link is made from: by this host as the secondary, by the peer.
	// The zero Addr: from anywhere.
	OwnAddr, PeerAddr netip.Addr

	TLS *tls.Config // nil: the control link is not protected

	// Spares: the pair has spare nodes, and these are all the others, Peer among them. The primary takes whichever of
	// them comes first when it has no secondary. nil: there is Peer alone.
	Spares []Peer

	QMP string // QEMU's socket; "": none, checkpoints are counted but not made
	// The guest agent's socket; "": none, nobody sets the guest's clock.
	GuestAgent string
	Pauses     *Pauses // of one node, for all of its parts; nil: new ones

	NICs []datapath.NIC // as many as the peer has, in the same order; closed when Run returns
	// Fresh: a NIC's tables were made at this start, not found pinned
	// (R23).
	Fresh bool

	Compare    compare.Config          // primary; Linger and Idle also the secondary's
	Copies     compare.SecondaryConfig // secondary
	Checkpoint config.Checkpoint       // a Period of 0: none that nothing asks for
	Rekey      time.Duration           // between rotations of the signing keys; 0: none
	Heartbeat  config.Heartbeat        // Timeout and Restart only with Life; a Restart of 0: MaxRejoin

	StatusSocket string // "": none
	Log          *slog.Logger

	// Life: the pair begins and ends by lockstep. nil: it is there, and nobody takes
	// over.
	Failover *Failover
	Journal  *journal.Journal    // of what happened; nil: none
	Progress func(qemu.Progress) // is called with how far a replication is that begins; the zero Progress: it is over

	// Tests shorten these.
	link       peerlink.Timing
	qmpTimeout time.Duration
	qmpPoll    time.Duration
	dialQMP    dialQMP
	noAskQEMU  bool // mutation: a monitor that cannot be reached is a dead QEMU's
	orderEvery time.Duration
	entryEvery time.Duration
	clockEvery time.Duration
	timing     *checkpoint.Config
}

// Peer is another node, as the secondary that it may come to be.
type Peer struct {
	Name   string
	Addr   netip.Addr  // where it makes the control link from; the zero Addr: from anywhere
	TLS    *tls.Config // as that of Options
	QEMU   qemu.Incoming
	Direct func() error // has the peer links lead there; nil: they do
}

func (o *Options) setDefaults() error {
	switch {
	case o.Role != datapath.RolePrimary && o.Role != datapath.RoleSecondary:
		return fmt.Errorf("role %q is neither primary nor secondary", o.Role)
	case len(o.NICs) == 0 || len(o.NICs) > peerlink.MaxNICs:
		return fmt.Errorf("%d NICs: there have to be 1 to %d", len(o.NICs), peerlink.MaxNICs)
	}
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&o.Checkpoint.MinInterval, config.DefaultMinInterval)
	set(&o.Checkpoint.Epoch, config.DefaultEpoch)
	set(&o.Heartbeat.Timeout, config.DefaultHeartbeatTimeout)
	set(&o.Heartbeat.Interval, config.DefaultHeartbeatInterval)
	set(&o.Heartbeat.Lease, config.DefaultHeartbeatLease)
	set(&o.Compare.Linger, 2*time.Second)
	set(&o.Compare.Idle, 2*time.Hour)
	set(&o.qmpTimeout, qmpTimeout)
	if o.Failover != nil {
		set(&o.qmpPoll, qmpPollFailover)
	}
	set(&o.qmpPoll, qmpPoll)
	if o.dialQMP == nil {
		o.dialQMP = dialMonitor
	}
	set(&o.orderEvery, orderEvery)
	set(&o.entryEvery, entryEvery)
	set(&o.clockEvery, clockEvery)
	if o.Pauses == nil {
		o.Pauses = new(Pauses)
	}
	if o.link == (peerlink.Timing{}) {
		o.link = peerlink.DefaultTiming
		if o.Failover != nil {
			o.link.Silence, o.link.Ping = o.Heartbeat.Timeout, o.Heartbeat.Interval
			if o.Heartbeat.Restart != 0 {
				// A daemon that was started again is found within that time.
				o.link.RetryMax = min(o.link.RetryMax, o.Heartbeat.Restart/4)
			}
		}
	}
	if o.Progress == nil {
		o.Progress = func(qemu.Progress) {}
	}
	if o.timing == nil {
		c := checkpoint.DefaultConfig()
		o.timing = &c
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

// ErrPoweredOff is how a daemon ends whose guest powered off: the pair stays off until
// somebody starts it.
var ErrPoweredOff = errors.New("the guest powered off")

// Failover is what a daemon needs to begin a pair and to end it: an arbiter,
// a place on disk for what it must not forget, and QEMU.
type Failover struct {
	Begin   failover.Begin
	Arbiter arbiter.Arbiter
	Store   *state.Store

	FirstStart FirstStart // what is done about the disks before a first replication
	Setback    *Setback   // one of a node's, for all of its parts; nil: a new one

	Guest *qemu.Spec // nil: QEMU is started by somebody else, and attached to
	Disks []qemu.Disk
	// Where a secondary's QEMU waits: this host's, the other's.
	Own, Peers qemu.Incoming
	Limits     qemu.Limits // of replication's beginning

	doubt      time.Duration // tests shorten it
	noR26Entry bool          // a mutation: only tests set it
	unbound    bool          // a mutation: a spare is taken at a term in which another node may be covered
	again      backoff       // between two tries to replicate; tests shorten it
	// Mutations, only tests set them: a QEMU that does not end replication counts as dead;
	// tries to replicate do not back off; the two QEMUs' machines are not compared.
	fencesUnended, triesAtOnce, anyMachine bool
}

// How a daemon's role ends: what Run returns.
var (
	// ErrPromoted: this host transmits alone, and goes on as the primary.
	ErrPromoted = errors.New("the secondary took over")
	// ErrAfresh: the SVM follows nobody any more; a new one may.
	ErrAfresh = errors.New("the secondary begins anew, with a new QEMU")
	// ErrFenced: this host is fenced, and its guest does not run.
	ErrFenced = errors.New("this node may not transmit for the guest any more")
)
