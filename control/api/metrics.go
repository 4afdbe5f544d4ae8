// SPDX-License-Identifier: Apache-2.0

package api

import (
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

// Words of Status.Role and Status.State. A metric has each of them, as 0 or 1, so
// that a change ends no series.
var (
	statusRoles  = []string{"primary", "secondary"}
	statusStates = []string{"start", "replicating", "checkpointing", "failover", "solo", "resync", "spare", "off"}
)

// metric is one value of a Status, or several that differ by labels.
type metric struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	get  func(s *Status, put func(v float64, labels ...string))
}

// statusCollector exports a Status, anew at each scrape.
type statusCollector struct {
	status  func() *Status
	up      *prometheus.Desc
	phases  *prometheus.Desc
	hold    *prometheus.Desc
	metrics []metric
}

// NewStatusCollector makes metrics of what status returns: nil when the daemon
// does not answer. It is called at each scrape. vm and node are on every metric.
func NewStatusCollector(vm, node string, status func() *Status) prometheus.Collector {
	c := &statusCollector{status: status}
	describe := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(prometheus.BuildFQName("lockstep", "", name), help, labels, prometheus.Labels{"vm": vm, "node": node})
	}
	add := func(kind prometheus.ValueType, name, help string, get func(*Status, func(float64, ...string)), labels ...string) {
		c.metrics = append(c.metrics, metric{describe(name, help, labels...), kind, get})
	}
	one := func(get func(*Status) float64) func(*Status, func(float64, ...string)) {
		return func(s *Status, put func(float64, ...string)) { put(get(s)) }
	}
	gauge := func(name, help string, get func(*Status) float64) { add(prometheus.GaugeValue, name, help, one(get)) }
	counter := func(name, help string, get func(*Status) float64) {
		add(prometheus.CounterValue, name, help, one(get))
	}
	byReason := func(name, help string, get func(*Status) map[string]uint64) {
		add(prometheus.CounterValue, name, help, func(s *Status, put func(float64, ...string)) {
			for reason, n := range get(s) {
				put(float64(n), reason)
			}
		}, "reason")
	}
	oneOf := func(name, help string, known []string, get func(*Status) string) {
		add(prometheus.GaugeValue, name, help, func(s *Status, put func(float64, ...string)) {
			now := get(s)
			for _, word := range known {
				put(truth(word == now), word)
			}
			if !slices.Contains(known, now) {
				put(1, now)
			}
		}, name)
	}
	// last is of the newest checkpoint that has ended.
	last := func(name, help string, get func(*Checkpoint) float64) {
		add(prometheus.GaugeValue, name, help, func(s *Status, put func(float64, ...string)) {
			for i := len(s.Checkpoints) - 1; i >= 0; i-- {
				if c := &s.Checkpoints[i]; c.Result != "running" {
					put(get(c))
					return
				}
			}
		})
	}

	c.up = describe("up", "Whether the daemon reports its status: 1 or 0.")
	c.phases = describe("checkpoint_phase_seconds", "How long the parts of committed checkpoints took on this host. On the primary frozen is the whole, of prepare, request, pause and confirm; on the secondary there are drain, pause and tables.", "phase")
	c.hold = describe("hold_seconds", "How long the frames that the primary's daemon released were held, from when they were captured. The kernel's own wait for 10 ms at most, and are not among them.")
	oneOf("role", "This node's part in the pair: 1 for the present one.", statusRoles, func(s *Status) string { return s.Role })
	oneOf("state", "The pair's state as this node sees it: 1 for the present one.", statusStates, func(s *Status) string { return s.State })
	gauge("impaired", "Whether matching is frozen, input is parked or a gate is shut, 1 or 0; lockstep status shows why.", func(s *Status) float64 { return truth(s.Detail != "") })
	gauge("epoch", "Number of the last checkpoint's epoch.", func(s *Status) float64 { return float64(s.Epoch) })
	gauge("session_term", "Number of the session between the two daemons.", func(s *Status) float64 { return float64(s.Term) })
	gauge("arbiter_term", "Fencing term of the arbiter's entry that this node goes by; 0 without an arbiter.", func(s *Status) float64 { return float64(s.ArbiterTerm) })
	gauge("covered", "Whether the secondary may take over: 1 or 0.", func(s *Status) float64 { return truth(s.Covered) })
	replication := func(get func(*Replication) float64) func(*Status) float64 {
		return func(s *Status) float64 {
			if s.Replication == nil {
				return 0
			}
			return get(s.Replication)
		}
	}
	gauge("replication_failed_tries", "Tries to replicate that failed since the last one that lasted.", replication(func(r *Replication) float64 { return float64(r.Failed) }))
	gauge("replication_copied_bytes_per_second", "Rate at which disks or memory are being copied to the secondary.", replication(func(r *Replication) float64 { return float64(r.Rate) }))
	gauge("replication_dirtied_bytes_per_second", "Rate at which the guest writes to its memory while that is copied.", replication(func(r *Replication) float64 { return float64(r.Dirtied) }))
	add(prometheus.GaugeValue, "output_lease_seconds", "How long the primary may still transmit without another echo of the secondary's kernel; it is muted from 0 on. Only while it replicates.", func(s *Status, put func(float64, ...string)) {
		if s.LeaseMS != nil {
			put(*s.LeaseMS / 1e3)
		}
	})
	gauge("connections", "Connections that are tracked; on the secondary those with an offset.", func(s *Status) float64 { return float64(s.Connections) })
	gauge("held_packets", "Packets that wait for their match; on the secondary copies and parked ones.", func(s *Status) float64 { return float64(s.HeldPackets) })
	gauge("held_bytes", "Payload bytes of the packets that are held.", func(s *Status) float64 { return float64(s.HeldBytes) })
	counter("released_packets_total", "Frames that left after they were held, datagrams too; pure ACKs are not among them.", func(s *Status) float64 { return float64(s.ReleasedPackets) })
	counter("half_open_evicted_total", "Half-open connections that made room for others.", func(s *Status) float64 { return float64(s.HalfOpenEvicted) })
	counter("checkpoints_requested_total", "Requests for a checkpoint by divergence, timeout or doubt.", func(s *Status) float64 { return float64(s.CheckpointsRequested) })
	counter("checkpoints_committed_total", "Checkpoints that were committed.", func(s *Status) float64 { return float64(s.CheckpointsDone) })
	add(prometheus.CounterValue, "checkpoints_total", "Checkpoints that have ended, by their first cause (lockstep explain) and result: committed or failed.", func(s *Status, put func(float64, ...string)) {
		for _, c := range s.CheckpointCounts {
			put(float64(c.Count), c.Cause, c.Result)
		}
	}, "cause", "result")
	periodic := func(get func(*Periodic) float64) func(*Status) float64 {
		return func(s *Status) float64 {
			if s.Periodic == nil {
				return 0
			}
			return get(s.Periodic)
		}
	}
	gauge("periodic_mode", "Whether the guests differ so often that a checkpoint is made at each epoch's end: 1 or 0.", periodic(func(p *Periodic) float64 { return truth(p.On) }))
	counter("periodic_mode_begun_total", "How often periodic mode has begun since the daemon's start.", periodic(func(p *Periodic) float64 { return float64(p.Begun) }))
	last("last_checkpoint_timestamp_seconds", "Unix time at which the last checkpoint that has ended was begun.", func(c *Checkpoint) float64 { return float64(c.At.UnixMilli()) / 1e3 })
	last("last_checkpoint_committed", "Whether the last checkpoint that has ended was committed: 1 or 0.", func(c *Checkpoint) float64 { return truth(c.Result == "committed") })
	last("last_checkpoint_frozen_seconds", "How long the last checkpoint that has ended kept the primary's output back.", func(c *Checkpoint) float64 { return c.FrozenMS / 1e3 })
	last("last_checkpoint_primary_pause_seconds", "How long the last checkpoint that has ended halted the primary guest.", func(c *Checkpoint) float64 { return c.PVMPauseMS / 1e3 })
	last("last_checkpoint_secondary_pause_seconds", "How long the last checkpoint that has ended halted the secondary guest.", func(c *Checkpoint) float64 { return c.SVMPauseMS / 1e3 })
	gauge("guest_paused_seconds", "How long the guest has stood still since it booted, as far as the two daemons know. Its clock is behind by as much, unless something in the guest corrects it.", func(s *Status) float64 { return s.GuestClock.PausedSeconds })
	agent := func(kind prometheus.ValueType, name, help string, get func(*GuestClock) float64) {
		add(kind, name, help, func(s *Status, put func(float64, ...string)) {
			if s.GuestClock.Agent {
				put(get(&s.GuestClock))
			}
		})
	}
	agent(prometheus.CounterValue, "guest_clock_sets_total", "How often the guest agent has set the guest's clock.", func(g *GuestClock) float64 { return float64(g.Sets) })
	agent(prometheus.GaugeValue, "guest_agent_failed", "Whether the guest agent did not do what it was last asked: 1 or 0.", func(g *GuestClock) float64 { return truth(g.Error != "") })
	add(prometheus.GaugeValue, "guest_clock_behind_seconds", "How far the guest's clock was behind this host's when the guest agent was last asked, before it was set.", func(s *Status, put func(float64, ...string)) {
		if behind := s.GuestClock.BehindSeconds; behind != nil {
			put(*behind)
		}
	})
	add(prometheus.CounterValue, "disk_faults_total", "Faults of a disk's replica that QEMU reported, one a second at most, by disk, host and operation.", func(s *Status, put func(float64, ...string)) {
		for _, f := range s.DiskFaults {
			put(float64(f.Count), f.Disk, f.Host, f.Operation)
		}
	}, "disk", "host", "operation")
	gauge("disks_unmerged", "Whether what the guest wrote since it took over is in the overlays and not yet in its images: 1 or 0.", func(s *Status) float64 { return truth(s.Unmerged) })
	gauge("masked_disks", "Disks on which QEMU hides faults of one replica from the guest.", func(s *Status) float64 { return float64(len(s.MaskedDisks)) })
	byReason("dropped_frames_total", "Frames that were dropped, by reason.", func(s *Status) map[string]uint64 { return s.Dropped })
	byReason("frames_total", "What became of frames in the kernel half, by reason; one frame may have several. Some reasons count events.", func(s *Status) map[string]uint64 { return s.Counters })
	add(prometheus.GaugeValue, "program_attached", "Programs that are attached: 1.", func(s *Status, put func(float64, ...string)) {
		for name, p := range s.Programs {
			program, _, _ := strings.Cut(name, "@")
			put(1, program, p.Device, p.Attach)
		}
	}, "program", "device", "attach")
	gauge("replication_refused", "Whether replication does not begin before somebody does something, as status shows: 1 or 0.", func(s *Status) float64 { return truth(s.Refused != "") })
	overlay := func(name, help string, get func(*OverlayStatus) float64) {
		add(prometheus.GaugeValue, name, help, func(s *Status, put func(float64, ...string)) {
			for i := range s.Overlays {
				o := &s.Overlays[i]
				put(get(o), o.Node, o.Dir, strings.Join(o.Disks, ","))
			}
		}, "host", "overlay_dir", "disks")
	}
	overlay("overlay_used_bytes", "What a secondary's overlays take, or those of a host that took over and has not merged them yet.", func(o *OverlayStatus) float64 { return float64(o.UsedBytes) })
	overlay("overlay_free_bytes", "What is left for those overlays.", func(o *OverlayStatus) float64 { return float64(o.FreeBytes) })
	overlay("overlay_growth_bytes_per_second", "How fast those overlays grow.", func(o *OverlayStatus) float64 { return o.BytesPerSecond })
	overlay("overlay_full", "Whether a secondary could not start, or came to an end, for want of room for its overlays: 1 or 0.", func(o *OverlayStatus) float64 { return truth(o.Trouble != "") })
	gauge("peer_connected", "Whether the control link holds: 1 or 0.", func(s *Status) float64 { return truth(s.Peer.Connected) })
	gauge("peer_insecure", "Whether the control link is in the clear: 1 or 0.", func(s *Status) float64 { return truth(s.Peer.Insecure) })
	gauge("qmp_configured", "Whether there is a QEMU to talk to: 1 or 0.", func(s *Status) float64 { return truth(s.QMP.Configured) })
	gauge("qmp_connected", "Whether QEMU's QMP socket is connected: 1 or 0.", func(s *Status) float64 { return truth(s.QMP.Connected) })
	gauge("qemu_insecure", "Whether memory and disks go between the two QEMUs in the clear: 1 or 0.", func(s *Status) float64 { return truth(s.QMP.Insecure) })
	add(prometheus.GaugeValue, "qemu_info", "QEMU's version, its word for its state, and its COLO mode: 1.", func(s *Status, put func(float64, ...string)) {
		if s.QMP.Configured {
			put(1, s.QMP.QEMU, s.QMP.State, s.QMP.COLO)
		}
	}, "version", "state", "colo")
	return c
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// Describe implements [prometheus.Collector].
func (c *statusCollector) Describe(out chan<- *prometheus.Desc) {
	out <- c.up
	out <- c.phases
	out <- c.hold
	for _, m := range c.metrics {
		out <- m.desc
	}
}

// Collect implements [prometheus.Collector].
func (c *statusCollector) Collect(out chan<- prometheus.Metric) {
	s := c.status()
	out <- prometheus.MustNewConstMetric(c.up, prometheus.GaugeValue, truth(s != nil))
	if s == nil {
		return
	}
	for phase, h := range s.CheckpointPhases {
		out <- prometheus.MustNewConstHistogram(c.phases, h.Count, h.Seconds, h.Buckets(), strings.ToValidUTF8(phase, "?"))
	}
	if h := s.HoldTimes; h != nil {
		out <- prometheus.MustNewConstHistogram(c.hold, h.Count, h.Seconds, h.Buckets())
	}
	for _, m := range c.metrics {
		m.get(s, func(v float64, labels ...string) {
			for i := range labels { // QEMU's words may be anything
				labels[i] = strings.ToValidUTF8(labels[i], "?")
			}
			out <- prometheus.MustNewConstMetric(m.desc, m.kind, v, labels...)
		})
	}
}
