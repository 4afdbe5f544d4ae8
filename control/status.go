// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/nicloop"
	"github.com/lockstep-ft/lockstep/control/peerlink"
)

// Status gathers what the daemon knows.
func (d *Daemon) Status(ctx context.Context) (api.Status, error) {
	var s api.Status
	if err := d.ask(ctx, func() { s = d.ownStatus() }); err != nil {
		return api.Status{}, err
	}
	for _, n := range d.nics {
		if err := nicStatus(n, &s); err != nil {
			return api.Status{}, fmt.Errorf("nic %d: %w", n.Index, err)
		}
	}
	if s.Role == string(datapath.RolePrimary) && (s.State == "replicating" || s.State == "checkpointing") {
		left := leaseLeft(d.nics, d.opt.Heartbeat.Lease)
		s.LeaseMS = &left
	}
	return s, nil
}

// leaseLeft is for how many ms P may still transmit without another echo, to within an echo's way.
func leaseLeft(nics []*nicloop.Loop, lease time.Duration) float64 {
	left := lease
	for _, n := range nics {
		left = min(left, lease-time.Duration(n.DP.Now()-n.DP.LastEcho()))
	}
	return milliseconds(int64(max(0, left)))
}

// ownStatus is the controller's share.
func (d *Daemon) ownStatus() api.Status {
	s := api.Status{
		VM: d.opt.VM, Node: d.opt.Node, Role: string(d.opt.Role), Epoch: d.epoch, Term: d.term,
		CheckpointsRequested: d.checkpoints.requested.Load(), CheckpointsDone: d.checkpoints.committed,
		CheckpointPhases: maps.Clone(d.checkpoints.phases), CheckpointCounts: slices.Clone(d.checkpoints.counts),
		Protocol: peerlink.Version, Config: d.opt.ConfigDigest,
		Dropped: make(map[string]uint64), Counters: make(map[string]uint64), Programs: make(map[string]api.ProgramStatus),
		Peer: api.PeerStatus{
			Node: d.opt.Peer, Address: d.peer.peerAddr, Connected: d.peer.linkUp, Since: d.peer.linkSince,
			Error: d.peer.linkErr, Insecure: d.opt.TLS == nil,
		},
		QMP: api.QMPStatus{
			Configured: d.opt.QMP != "", Connected: d.qmp.info.connected, Since: d.qmp.info.since,
			QEMU: d.qmp.info.version, State: d.qmp.info.state, COLO: d.qmp.info.colo, Error: d.qmp.info.err,
			Insecure: d.failover.insecure(),
		},
		GuestClock:  d.clock.status(),
		Periodic:    d.checkpoints.periodicStatus(),
		Causes:      append([]api.Cause{}, d.checkpoints.causes...),
		Checkpoints: append([]api.Checkpoint{}, d.checkpoints.attempts...),
	}
	s.State, s.Detail = d.checkpoints.machine.State()
	if d.failover != nil {
		d.failover.status(&s)
	}
	return s
}

// nicStatus adds a NIC's share.
func nicStatus(n *nicloop.Loop, s *api.Status) error {
	drops := func(d *[compare.ReasonCount]uint64) {
		for r, count := range d {
			switch {
			case count == 0:
			case compare.Reason(r) == compare.ReasonForgotten: // positions
				s.Counters[compare.ReasonForgotten.String()] += count
			default:
				s.Dropped[compare.Reason(r).String()] += count
			}
		}
	}
	err := n.Do(func() error {
		intruder, times := n.Intruder()
		if intruder != "" {
			s.Detail = strings.TrimPrefix(s.Detail+"; "+intruder+": shut until that is mended", "; ")
		}
		if times > 0 {
			s.Counters["intruded"] += times
		}
		for why, times := range n.GivenBack() {
			s.Counters["fast_back_"+why] += times
		}
		if n.Primary != nil {
			st := n.Primary.Stats()
			s.Connections += st.Connections
			s.HeldPackets += st.HeldPackets
			s.HeldBytes += st.HeldBytes
			s.ReleasedPackets += st.ReleasedPackets + st.ReleasedDatagrams
			s.HalfOpenEvicted += st.Evicted
			if s.HoldTimes == nil {
				s.HoldTimes = new(api.Histogram)
			}
			s.HoldTimes.Add(&st.HoldTimes)
			drops(&st.Drops)
			return nil
		}
		// What S frees are copies, not frames that got lost.
		st := n.Secondary.Stats()
		s.HeldPackets += st.Copies + st.Parked
		s.HeldBytes += st.Bytes
		return nil
	})
	if err != nil {
		return err
	}
	counters, err := n.DP.Counters()
	if err != nil {
		return err
	}
	for reason, count := range counters {
		s.Counters[reason] += count
		if api.IsDrop(reason) && count > 0 {
			s.Dropped[reason] += count
		}
	}
	s.ReleasedPackets += counters["fast_dgram"]
	if n.Secondary != nil {
		known, err := n.Offsets()
		if err != nil {
			return err
		}
		s.Connections += known
	}
	for _, p := range n.DP.Programs() {
		name := p.Name
		if n.Index > 0 {
			name += "@" + p.Device
		}
		s.Programs[name] = api.ProgramStatus{Device: p.Device, Attach: p.Attach}
	}
	return nil
}

// Flows lists the guest's connections.
func (d *Daemon) Flows(context.Context) ([]api.Flow, error) {
	flows := []api.Flow{}
	for _, n := range d.nics {
		more, err := nicFlows(n)
		if err != nil {
			return nil, fmt.Errorf("nic %d: %w", n.Index, err)
		}
		flows = append(flows, more...)
	}
	return flows, nil
}

func nicFlows(n *nicloop.Loop) ([]api.Flow, error) {
	var out []api.Flow
	if n.Secondary != nil {
		now := n.DP.Now()
		err := n.DP.Offsets(func(t compare.Tuple, o datapath.Offset) {
			f := describe(n, &t)
			f.State, f.Offset, f.Age = o.State, &o.Seq, time.Duration(max(0, now-o.Last)).Seconds() // a frame may have come since
			out = append(out, f)
		})
		return out, err
	}
	var all []compare.Flow
	var walk compare.FlowWalk
	err := n.Do(func() error {
		walk = n.Primary.WalkFlows()
		return nil
	})
	for more := true; more && err == nil; {
		err = n.Do(func() error {
			all, more = walk.Next(n.Primary, flowsPart, all)
			return nil
		})
	}
	compare.SortFlows(all)
	for _, c := range all {
		f := describe(n, &c.Tuple)
		f.State, f.Owner, f.Compared, f.HeldPackets, f.HeldBytes, f.Age = c.State, "daemon", &c.Compared, c.Held, c.HeldBytes, c.Age.Seconds()
		if c.Kernel {
			f.Owner = "kernel"
		}
		out = append(out, f)
	}
	return out, err
}

// flowsPart is how many flows are listed before the NIC's loop turns again.
const flowsPart = 1000

func describe(n *nicloop.Loop, t *compare.Tuple) api.Flow {
	f := api.Flow{
		NIC:    n.Index,
		Guest:  netip.AddrPortFrom(netip.AddrFrom16(t.Guest).Unmap(), t.GuestPort).String(),
		Remote: netip.AddrPortFrom(netip.AddrFrom16(t.Remote).Unmap(), t.RemotePort).String(),
	}
	if t.VLAN != 0 {
		f.VLAN = &t.VLAN
	}
	return f
}

// status adds the failover machine's state to s.
func (fo *failoverPart) status(s *api.Status) {
	s.ArbiterTerm = fo.machine.Term()
	defer func() {
		fo.d.repl.statusOfImages(s)
		s.Resyncs = fo.d.repl.resyncs
		fo.d.room.statusOfOverlays(s)
	}()
	if fo.p != nil {
		s.Covered, s.Replication = fo.p.Covered(), fo.d.repl.replication()
		switch fo.p.State() {
		case failover.PrimaryStart:
			s.State, s.Detail = "start", fo.d.repl.tries.String()
		case failover.PrimarySolo:
			s.State, s.Detail = "solo", "nothing protects the guest"
			for _, more := range []string{fo.d.repl.unended, fo.d.repl.tries.String()} {
				s.Detail = strings.TrimSuffix(s.Detail+"; "+more, "; ")
			}
		case failover.PrimarySync:
			s.State, s.Detail = "start", "replication begins"
			if fo.p.WasSolo() {
				s.State = "resync"
			}
			if fo.d.repl.syncing.Total > 0 {
				s.Detail = fo.d.repl.syncing.String()
			}
		case failover.PrimaryClaim:
			s.State, s.Detail = "failover", "the arbiter is asked"
		case failover.PrimaryFenced:
			s.State, s.Detail = "failover", "another host transmits"
		case failover.PrimaryOff:
			s.State, s.Detail = "off", "the guest powered off"
		}
		fo.d.guest.diskStatus(s)
		return
	}
	s.Covered = fo.s.Covered()
	switch fo.s.State() {
	case failover.SecondaryWait:
		if s.State = "start"; fo.d.peer.spare != "" {
			s.State, s.Detail = "spare", fo.d.peer.spare
		} else if !s.Peer.Connected {
			s.Detail = fmt.Sprintf("waits for %s, whose guest it is to follow", fo.d.opt.Peer)
		}
	case failover.SecondaryPair:
		if fo.d.peer.spare != "" && !s.Covered {
			s.State, s.Detail = "spare", fo.d.peer.spare
		}
	case failover.SecondaryClaim, failover.SecondaryLease, failover.SecondaryLoad, failover.SecondaryQEMU, failover.SecondarySolo:
		s.State = "failover"
	case failover.SecondaryFenced:
		s.State, s.Detail = "failover", "another host transmits"
	case failover.SecondaryOff:
		s.State, s.Detail = "off", "the guest powered off"
	}
	fo.d.guest.diskStatus(s)
}
