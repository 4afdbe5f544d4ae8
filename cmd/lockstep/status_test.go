// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lockstep-ft/lockstep/control/api"
)

func TestPrintStatus(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.Local)
	s := api.Status{
		VM: "web1", Node: "alpha", Role: "primary", State: "checkpointing", Detail: "the PVM stopped unasked", Epoch: 7,
		Connections: 2, HeldPackets: 3, HeldBytes: 4500, ReleasedPackets: 1 << 33,
		CheckpointsRequested: 5, CheckpointsDone: 4,
		Dropped: map[string]uint64{"muted": 2, "no_slot": 9, "shut": 0},
		Programs: map[string]api.ProgramStatus{
			"ls_mirror":  {Device: "tapP", Attach: "tcx-egress"},
			"ls_pri_out": {Device: "tapP", Attach: "tcx-ingress"},
		},
		Peer:       api.PeerStatus{Node: "beta", Connected: true, Since: at},
		GuestClock: api.GuestClock{PausedSeconds: 22.04},
		QMP:        api.QMPStatus{Configured: true, Connected: true, Since: at, State: "running"},
		Causes:     []api.Cause{{At: at, Reason: "payload differs", Flow: "10.0.0.2:80>10.0.0.9:40000"}, {At: at, Reason: "timeout"}},
	}
	var out bytes.Buffer
	if err := printStatus(&out, s); err != nil {
		t.Fatal(err)
	}
	want := `web1 on alpha:  primary, checkpointing, epoch 7: the PVM stopped unasked
peer:           beta, connected since 2026-01-02 03:04:05
qemu:           connected since 2026-01-02 03:04:05: running
guest paused:   22.0 s in all
connections:    2
held:           3 packets, 4500 bytes
released:       8589934592 packets
checkpoints:    5 requested, 4 done
last causes:    03:04:05 payload differs 10.0.0.2:80>10.0.0.9:40000
                03:04:05 timeout 
dropped:        9 no_slot
                2 muted
programs:       ls_mirror   tapP  tcx-egress
                ls_pri_out  tapP  tcx-ingress
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}

	out.Reset()
	s.Peer.Connected, s.Peer.Insecure, s.Dropped, s.QMP = false, true, nil, api.QMPStatus{Insecure: true}
	s.Peer.Error = "connection refused"
	ahead := -0.254
	s.GuestClock = api.GuestClock{Agent: true, BehindSeconds: &ahead, Looked: &at, Sets: 3, Error: "guest agent: no answer in time"}
	if err := printStatus(&out, s); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"peer:           beta, NOT CONNECTED since 2026-01-02 03:04:05: connection refused\n",
		"INSECURE:       the control link is not protected (tls: {insecure: true}); `lockstep keys` makes certificates\n",
		"INSECURE:       memory and disks go between the two QEMUs in the clear (tls.qemu, tls.insecure, or a pair that began so)\n",
		"guest paused:   0.0 s in all; its clock was 0.25 s ahead of this host's at 03:04:05, and has been set 3 times; NOT SET: guest agent: no answer in time\n",
		"qemu:           no qmp socket in the config\n", "dropped:        nothing\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}
