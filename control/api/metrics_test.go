// SPDX-License-Identifier: Apache-2.0

package api

import (
	"io"
	"net/http/httptest"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func fullStatus() *Status {
	var pauses Histogram
	pauses.Observe(time.Second / 256)
	pauses.Observe(time.Second / 16)
	var holds Histogram
	holds.Observe(time.Second / 4096)
	lease, behind := 375.0, 0.75
	return &Status{
		HoldTimes: &holds, LeaseMS: &lease,
		GuestClock:       GuestClock{PausedSeconds: 22.5, Agent: true, BehindSeconds: &behind, Sets: 23, Error: "no answer in time"},
		CheckpointCounts: []CheckpointCount{{"payload differs", "committed", 22}, {"period", "failed", 1}},
		VM:               "web1", Node: "alpha", Role: "primary", State: "replicating", Detail: "frozen", Epoch: 7, Term: 3, Covered: true, ArbiterTerm: 2,
		Connections: 11, HeldPackets: 12, HeldBytes: 13, ReleasedPackets: 14, HalfOpenEvicted: 15, CheckpointsRequested: 16, CheckpointsDone: 17,
		Dropped:          map[string]uint64{"no_slot": 18, "bad_tag": 19},
		Counters:         map[string]uint64{"held": 20, "no_slot": 18},
		Programs:         map[string]ProgramStatus{"ls_mirror": {"tapP", "tcx egress"}, "ls_mirror@tapQ": {"tapQ", "tcx egress"}},
		DiskFaults:       []DiskFault{{Disk: "colo-disk0", Host: "beta", Operation: "write", Error: "No space left on device", Count: 21}},
		Unmerged:         true,
		MaskedDisks:      []string{"colo-disk1"},
		Peer:             PeerStatus{Node: "beta", Connected: true},
		Replication:      &Replication{What: "memory", Rate: 1000, Failed: 2},
		QMP:              QMPStatus{Configured: true, Connected: true, QEMU: "7.2.22", State: "colo", COLO: "primary"},
		Refused:          "the images differ",
		CheckpointPhases: map[string]Histogram{"pause": pauses},
		Overlays:         []OverlayStatus{{Node: "beta", Dir: "/o", Disks: []string{"d0", "d1"}, UsedBytes: 1, FreeBytes: 2, BytesPerSecond: 3, Trouble: "full"}},
		Periodic:         &Periodic{On: true, Begun: 2},
		Checkpoints: []Checkpoint{
			{Epoch: 6, Result: "QEMU went away"},
			{Epoch: 7, At: time.Unix(1700000000, 250e6), Result: "committed", FrozenMS: 30, PVMPauseMS: 20, SVMPauseMS: 10.5},
			{Epoch: 8, Result: "running", FrozenMS: 99},
		},
	}
}

func TestMetrics(t *testing.T) {
	status := fullStatus()
	c := NewStatusCollector("web1", "alpha", func() *Status { return status })
	problems, err := testutil.CollectAndLint(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	const want = `
# HELP lockstep_arbiter_term Fencing term of the arbiter's entry that this node goes by; 0 without an arbiter.
# TYPE lockstep_arbiter_term gauge
lockstep_arbiter_term{node="alpha",vm="web1"} 2
# HELP lockstep_checkpoint_phase_seconds How long the parts of committed checkpoints took on this host. On the primary frozen is the whole, of prepare, request, pause and confirm; on the secondary there are drain, pause and tables.
# TYPE lockstep_checkpoint_phase_seconds histogram
lockstep_checkpoint_phase_seconds_bucket{node="alpha",phase="pause",vm="web1",le="5e-05"} 0
lockstep_checkpoint_phase_seconds_bucket{node="alpha",phase="pause",vm="web1",le="0.0001"} 0
lockstep_checkpoint_phase_seconds_bucket{node="alpha",phase="pause",vm="web1",le="0.00025"} 0
lockstep_checkpoint_phase_seconds_bucket{node="alpha",phase="pause",vm="web1",le="0.0005"} 0
lockstep_checkpoint_phase_seconds_bucket{node="alpha",phase="pause",vm="web1",le="0.001"} 0
lockstep_checkpoint_phase_seconds_bucket{node="alpha",phase="pause",vm="web1",le="0.0025"} 0
lockstep_checkpoint_phase_seconds_bucket{node="alpha",phase="pause",vm="web1",le="0.005"} 1
lockstep_checkpoint_phase_seconds_bucket{node="alpha",phase="pause",vm="web1",le="0.01"} 1
lockstep_checkpoint_phase_seconds_bucket{node="alpha",phase="pause",vm="web1",le="0.025"} 1
lockstep_checkpoint_phase_seconds_bucket{node="alpha",phase="pause",vm="web1",le="0.05"} 1
lockstep_checkpoint_phase_seconds_bucket{node="alpha",phase="pause",vm="web1",le="0.1"} 2
lockstep_checkpoint_phase_seconds_bucket{node="alpha",phase="pause",vm="web1",le="0.25"} 2
lockstep_checkpoint_phase_seconds_bucket{node="alpha",phase="pause",vm="web1",le="0.5"} 2
lockstep_checkpoint_phase_seconds_bucket{node="alpha",phase="pause",vm="web1",le="1"} 2
lockstep_checkpoint_phase_seconds_bucket{node="alpha",phase="pause",vm="web1",le="2.5"} 2
lockstep_checkpoint_phase_seconds_bucket{node="alpha",phase="pause",vm="web1",le="10"} 2
lockstep_checkpoint_phase_seconds_bucket{node="alpha",phase="pause",vm="web1",le="+Inf"} 2
lockstep_checkpoint_phase_seconds_sum{node="alpha",phase="pause",vm="web1"} 0.06640625
lockstep_checkpoint_phase_seconds_count{node="alpha",phase="pause",vm="web1"} 2
# HELP lockstep_checkpoints_committed_total Checkpoints that were committed.
# TYPE lockstep_checkpoints_committed_total counter
lockstep_checkpoints_committed_total{node="alpha",vm="web1"} 17
# HELP lockstep_checkpoints_requested_total Requests for a checkpoint by divergence, timeout or doubt.
# TYPE lockstep_checkpoints_requested_total counter
lockstep_checkpoints_requested_total{node="alpha",vm="web1"} 16
# HELP lockstep_checkpoints_total Checkpoints that have ended, by their first cause (lockstep explain) and result: committed or failed.
# TYPE lockstep_checkpoints_total counter
lockstep_checkpoints_total{cause="payload differs",node="alpha",result="committed",vm="web1"} 22
lockstep_checkpoints_total{cause="period",node="alpha",result="failed",vm="web1"} 1
# HELP lockstep_connections Connections that are tracked; on the secondary those with an offset.
# TYPE lockstep_connections gauge
lockstep_connections{node="alpha",vm="web1"} 11
# HELP lockstep_covered Whether the secondary may take over: 1 or 0.
# TYPE lockstep_covered gauge
lockstep_covered{node="alpha",vm="web1"} 1
# HELP lockstep_disk_faults_total Faults of a disk's replica that QEMU reported, one a second at most, by disk, host and operation.
# TYPE lockstep_disk_faults_total counter
lockstep_disk_faults_total{disk="colo-disk0",host="beta",node="alpha",operation="write",vm="web1"} 21
# HELP lockstep_disks_unmerged Whether what the guest wrote since it took over is in the overlays and not yet in its images: 1 or 0.
# TYPE lockstep_disks_unmerged gauge
lockstep_disks_unmerged{node="alpha",vm="web1"} 1
# HELP lockstep_dropped_frames_total Frames that were dropped, by reason.
# TYPE lockstep_dropped_frames_total counter
lockstep_dropped_frames_total{node="alpha",reason="bad_tag",vm="web1"} 19
lockstep_dropped_frames_total{node="alpha",reason="no_slot",vm="web1"} 18
# HELP lockstep_epoch Number of the last checkpoint's epoch.
# TYPE lockstep_epoch gauge
lockstep_epoch{node="alpha",vm="web1"} 7
# HELP lockstep_frames_total What became of frames in the kernel half, by reason; one frame may have several. Some reasons count events.
# TYPE lockstep_frames_total counter
lockstep_frames_total{node="alpha",reason="held",vm="web1"} 20
lockstep_frames_total{node="alpha",reason="no_slot",vm="web1"} 18
# HELP lockstep_guest_agent_failed Whether the guest agent did not do what it was last asked: 1 or 0.
# TYPE lockstep_guest_agent_failed gauge
lockstep_guest_agent_failed{node="alpha",vm="web1"} 1
# HELP lockstep_guest_clock_behind_seconds How far the guest's clock was behind this host's when the guest agent was last asked, before it was set.
# TYPE lockstep_guest_clock_behind_seconds gauge
lockstep_guest_clock_behind_seconds{node="alpha",vm="web1"} 0.75
# HELP lockstep_guest_clock_sets_total How often the guest agent has set the guest's clock.
# TYPE lockstep_guest_clock_sets_total counter
lockstep_guest_clock_sets_total{node="alpha",vm="web1"} 23
# HELP lockstep_guest_paused_seconds How long the guest has stood still since it booted, as far as the two daemons know. Its clock is behind by as much, unless something in the guest corrects it.
# TYPE lockstep_guest_paused_seconds gauge
lockstep_guest_paused_seconds{node="alpha",vm="web1"} 22.5
# HELP lockstep_half_open_evicted_total Half-open connections that made room for others.
# TYPE lockstep_half_open_evicted_total counter
lockstep_half_open_evicted_total{node="alpha",vm="web1"} 15
# HELP lockstep_held_bytes Payload bytes of the packets that are held.
# TYPE lockstep_held_bytes gauge
lockstep_held_bytes{node="alpha",vm="web1"} 13
# HELP lockstep_held_packets Packets that wait for their match; on the secondary copies and parked ones.
# TYPE lockstep_held_packets gauge
lockstep_held_packets{node="alpha",vm="web1"} 12
# HELP lockstep_hold_seconds How long the frames that the primary's daemon released were held, from when they were captured. The kernel's own wait for 10 ms at most, and are not among them.
# TYPE lockstep_hold_seconds histogram
lockstep_hold_seconds_bucket{node="alpha",vm="web1",le="5e-05"} 0
lockstep_hold_seconds_bucket{node="alpha",vm="web1",le="0.0001"} 0
lockstep_hold_seconds_bucket{node="alpha",vm="web1",le="0.00025"} 1
lockstep_hold_seconds_bucket{node="alpha",vm="web1",le="0.0005"} 1
lockstep_hold_seconds_bucket{node="alpha",vm="web1",le="0.001"} 1
lockstep_hold_seconds_bucket{node="alpha",vm="web1",le="0.0025"} 1
lockstep_hold_seconds_bucket{node="alpha",vm="web1",le="0.005"} 1
lockstep_hold_seconds_bucket{node="alpha",vm="web1",le="0.01"} 1
lockstep_hold_seconds_bucket{node="alpha",vm="web1",le="0.025"} 1
lockstep_hold_seconds_bucket{node="alpha",vm="web1",le="0.05"} 1
lockstep_hold_seconds_bucket{node="alpha",vm="web1",le="0.1"} 1
lockstep_hold_seconds_bucket{node="alpha",vm="web1",le="0.25"} 1
lockstep_hold_seconds_bucket{node="alpha",vm="web1",le="0.5"} 1
lockstep_hold_seconds_bucket{node="alpha",vm="web1",le="1"} 1
lockstep_hold_seconds_bucket{node="alpha",vm="web1",le="2.5"} 1
lockstep_hold_seconds_bucket{node="alpha",vm="web1",le="10"} 1
lockstep_hold_seconds_bucket{node="alpha",vm="web1",le="+Inf"} 1
lockstep_hold_seconds_sum{node="alpha",vm="web1"} 0.000244140
lockstep_hold_seconds_count{node="alpha",vm="web1"} 1
# HELP lockstep_impaired Whether matching is frozen, input is parked or a gate is shut, 1 or 0; lockstep status shows why.
# TYPE lockstep_impaired gauge
lockstep_impaired{node="alpha",vm="web1"} 1
# HELP lockstep_last_checkpoint_committed Whether the last checkpoint that has ended was committed: 1 or 0.
# TYPE lockstep_last_checkpoint_committed gauge
lockstep_last_checkpoint_committed{node="alpha",vm="web1"} 1
# HELP lockstep_last_checkpoint_frozen_seconds How long the last checkpoint that has ended kept the primary's output back.
# TYPE lockstep_last_checkpoint_frozen_seconds gauge
lockstep_last_checkpoint_frozen_seconds{node="alpha",vm="web1"} 0.03
# HELP lockstep_last_checkpoint_primary_pause_seconds How long the last checkpoint that has ended halted the primary guest.
# TYPE lockstep_last_checkpoint_primary_pause_seconds gauge
lockstep_last_checkpoint_primary_pause_seconds{node="alpha",vm="web1"} 0.02
# HELP lockstep_last_checkpoint_secondary_pause_seconds How long the last checkpoint that has ended halted the secondary guest.
# TYPE lockstep_last_checkpoint_secondary_pause_seconds gauge
lockstep_last_checkpoint_secondary_pause_seconds{node="alpha",vm="web1"} 0.0105
# HELP lockstep_last_checkpoint_timestamp_seconds Unix time at which the last checkpoint that has ended was begun.
# TYPE lockstep_last_checkpoint_timestamp_seconds gauge
lockstep_last_checkpoint_timestamp_seconds{node="alpha",vm="web1"} 1.70000000025e+09
# HELP lockstep_masked_disks Disks on which QEMU hides faults of one replica from the guest.
# TYPE lockstep_masked_disks gauge
lockstep_masked_disks{node="alpha",vm="web1"} 1
# HELP lockstep_output_lease_seconds How long the primary may still transmit without another echo of the secondary's kernel; it is muted from 0 on. Only while it replicates.
# TYPE lockstep_output_lease_seconds gauge
lockstep_output_lease_seconds{node="alpha",vm="web1"} 0.375
# HELP lockstep_overlay_free_bytes What is left for those overlays.
# TYPE lockstep_overlay_free_bytes gauge
lockstep_overlay_free_bytes{disks="d0,d1",host="beta",node="alpha",overlay_dir="/o",vm="web1"} 2
# HELP lockstep_overlay_full Whether a secondary could not start, or came to an end, for want of room for its overlays: 1 or 0.
# TYPE lockstep_overlay_full gauge
lockstep_overlay_full{disks="d0,d1",host="beta",node="alpha",overlay_dir="/o",vm="web1"} 1
# HELP lockstep_overlay_growth_bytes_per_second How fast those overlays grow.
# TYPE lockstep_overlay_growth_bytes_per_second gauge
lockstep_overlay_growth_bytes_per_second{disks="d0,d1",host="beta",node="alpha",overlay_dir="/o",vm="web1"} 3
# HELP lockstep_overlay_used_bytes What a secondary's overlays take, or those of a host that took over and has not merged them yet.
# TYPE lockstep_overlay_used_bytes gauge
lockstep_overlay_used_bytes{disks="d0,d1",host="beta",node="alpha",overlay_dir="/o",vm="web1"} 1
# HELP lockstep_peer_connected Whether the control link holds: 1 or 0.
# TYPE lockstep_peer_connected gauge
lockstep_peer_connected{node="alpha",vm="web1"} 1
# HELP lockstep_peer_insecure Whether the control link is in the clear: 1 or 0.
# TYPE lockstep_peer_insecure gauge
lockstep_peer_insecure{node="alpha",vm="web1"} 0
# HELP lockstep_periodic_mode Whether the guests differ so often that a checkpoint is made at each epoch's end: 1 or 0.
# TYPE lockstep_periodic_mode gauge
lockstep_periodic_mode{node="alpha",vm="web1"} 1
# HELP lockstep_periodic_mode_begun_total How often periodic mode has begun since the daemon's start.
# TYPE lockstep_periodic_mode_begun_total counter
lockstep_periodic_mode_begun_total{node="alpha",vm="web1"} 2
# HELP lockstep_program_attached Programs that are attached: 1.
# TYPE lockstep_program_attached gauge
lockstep_program_attached{attach="tcx egress",device="tapP",node="alpha",program="ls_mirror",vm="web1"} 1
lockstep_program_attached{attach="tcx egress",device="tapQ",node="alpha",program="ls_mirror",vm="web1"} 1
# HELP lockstep_qemu_info QEMU's version, its word for its state, and its COLO mode: 1.
# TYPE lockstep_qemu_info gauge
lockstep_qemu_info{colo="primary",node="alpha",state="colo",version="7.2.22",vm="web1"} 1
# HELP lockstep_qemu_insecure Whether memory and disks go between the two QEMUs in the clear: 1 or 0.
# TYPE lockstep_qemu_insecure gauge
lockstep_qemu_insecure{node="alpha",vm="web1"} 0
# HELP lockstep_qmp_configured Whether there is a QEMU to talk to: 1 or 0.
# TYPE lockstep_qmp_configured gauge
lockstep_qmp_configured{node="alpha",vm="web1"} 1
# HELP lockstep_qmp_connected Whether QEMU's QMP socket is connected: 1 or 0.
# TYPE lockstep_qmp_connected gauge
lockstep_qmp_connected{node="alpha",vm="web1"} 1
# HELP lockstep_released_packets_total Frames that left after they were held, datagrams too; pure ACKs are not among them.
# TYPE lockstep_released_packets_total counter
lockstep_released_packets_total{node="alpha",vm="web1"} 14
# HELP lockstep_replication_copied_bytes_per_second Rate at which disks or memory are being copied to the secondary.
# TYPE lockstep_replication_copied_bytes_per_second gauge
lockstep_replication_copied_bytes_per_second{node="alpha",vm="web1"} 1000
# HELP lockstep_replication_dirtied_bytes_per_second Rate at which the guest writes to its memory while that is copied.
# TYPE lockstep_replication_dirtied_bytes_per_second gauge
lockstep_replication_dirtied_bytes_per_second{node="alpha",vm="web1"} 0
# HELP lockstep_replication_failed_tries Tries to replicate that failed since the last one that lasted.
# TYPE lockstep_replication_failed_tries gauge
lockstep_replication_failed_tries{node="alpha",vm="web1"} 2
# HELP lockstep_replication_refused Whether replication does not begin before somebody does something, as status shows: 1 or 0.
# TYPE lockstep_replication_refused gauge
lockstep_replication_refused{node="alpha",vm="web1"} 1
# HELP lockstep_role This node's part in the pair: 1 for the present one.
# TYPE lockstep_role gauge
lockstep_role{node="alpha",role="primary",vm="web1"} 1
lockstep_role{node="alpha",role="secondary",vm="web1"} 0
# HELP lockstep_session_term Number of the session between the two daemons.
# TYPE lockstep_session_term gauge
lockstep_session_term{node="alpha",vm="web1"} 3
# HELP lockstep_state The pair's state as this node sees it: 1 for the present one.
# TYPE lockstep_state gauge
lockstep_state{node="alpha",state="checkpointing",vm="web1"} 0
lockstep_state{node="alpha",state="failover",vm="web1"} 0
lockstep_state{node="alpha",state="off",vm="web1"} 0
lockstep_state{node="alpha",state="replicating",vm="web1"} 1
lockstep_state{node="alpha",state="resync",vm="web1"} 0
lockstep_state{node="alpha",state="solo",vm="web1"} 0
lockstep_state{node="alpha",state="spare",vm="web1"} 0
lockstep_state{node="alpha",state="start",vm="web1"} 0
# HELP lockstep_up Whether the daemon reports its status: 1 or 0.
# TYPE lockstep_up gauge
lockstep_up{node="alpha",vm="web1"} 1
`
	if err := testutil.CollectAndCompare(c, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
}

// Whatever a Status holds, the scrape is valid.
func TestMetricsOddStatus(t *testing.T) {
	for name, s := range map[string]*Status{
		"none":  nil,
		"empty": {},
		"odd": {
			Role: "observer", State: "a later version's", QMP: QMPStatus{Configured: true, QEMU: "\xff\n\"", State: "\x00"},
			Dropped: map[string]uint64{"": 1<<64 - 1}, Checkpoints: []Checkpoint{{Result: "running"}},
		},
	} {
		c := NewStatusCollector("web1", "alpha", func() *Status { return s })
		r := prometheus.NewPedanticRegistry()
		if err := r.Register(c); err != nil {
			t.Fatal(err)
		}
		families, err := r.Gather()
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if s == nil && (len(families) != 1 || families[0].GetName() != "lockstep_up" || families[0].GetMetric()[0].GetGauge().GetValue() != 0) {
			t.Errorf("of no status it says %v", families)
		}
	}
}

func TestMetricsHandler(t *testing.T) {
	calls := 0
	srv := httptest.NewServer(Process{VM: "web1", Node: "alpha", Version: "v1"}.MetricsHandler(func() *Status { calls++; return fullStatus() }))
	defer srv.Close()
	for range 2 {
		resp, err := srv.Client().Get(srv.URL)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != 200 {
			t.Fatalf("%s, %v", resp.Status, err)
		}
		for _, line := range []string{`lockstep_up{node="alpha",vm="web1"} 1`, `lockstep_build_info{goversion="` + runtime.Version() + `",node="alpha",version="v1",vm="web1"} 1`, "process_start_time_seconds ", "go_goroutines "} {
			if !strings.Contains(string(body), "\n"+line) {
				t.Errorf("the answer lacks %q", line)
			}
		}
	}
	if calls != 2 {
		t.Errorf("two scrapes asked %d times", calls)
	}
}

// A field that somebody adds to Status is a metric too, or is named here.
func TestMetricsWholeStatus(t *testing.T) {
	known := strings.Fields(`VM Node Protocol Config Role State Detail Epoch Term Covered ArbiterTerm Replication Connections HeldPackets HeldBytes ReleasedPackets HalfOpenEvicted
		CheckpointsRequested CheckpointsDone CheckpointPhases Dropped Counters Programs DiskFaults MaskedDisks Unmerged Peer QMP Causes Checkpoints
		Refused Overlays CheckpointCounts HoldTimes LeaseMS GuestClock Periodic Resyncs`)
	if n := reflect.TypeFor[Status]().NumField(); n != len(known) {
		t.Errorf("Status has %d fields, and metrics.go knows of %d: add those that count, then say so here", n, len(known))
	}
}
