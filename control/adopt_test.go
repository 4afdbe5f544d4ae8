// SPDX-License-Identifier: Apache-2.0

package control

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/nicloop"
)

// TestAdopt: either daemon, or both, die and come back over their tables. Whether a
// checkpoint is asked for depends on what they find.
func TestAdopt(t *testing.T) {
	tests := []struct {
		name           string
		p, s           bool // dies
		conns          int  // with an offset, on S
		freshP, freshS bool
		pFinds, sFinds func(*datapath.Recovered)
		whole          bool
	}{
		{name: "primary", p: true, conns: 3, whole: true},
		{name: "secondary", s: true, conns: 3, whole: true},
		{name: "both", p: true, s: true, conns: 3, whole: true},
		{name: "primary without tables", p: true, conns: 3, freshP: true},
		{name: "primary without tables, no connections", p: true, freshP: true, whole: true},
		{name: "primary without keys", p: true, conns: 3, pFinds: func(a *datapath.Recovered) { a.Digest = compare.Keys{} }},
		{name: "primary in another epoch", p: true, conns: 3, pFinds: func(a *datapath.Recovered) { a.Epoch++ }},
		{name: "secondary in another epoch", s: true, conns: 3, sFinds: func(a *datapath.Recovered) { a.Epoch++ }},
		{name: "secondary parked", s: true, conns: 3, sFinds: func(a *datapath.Recovered) { a.Mode = datapath.ModePark }},
		{name: "secondary shut", s: true, sFinds: func(a *datapath.Recovered) { a.Mode = datapath.ModeShut }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			pair := newPair(t)
			p, s := hosts(t, pair)
			startReplicating(p, s)
			p.d.checkpoints.want(nicloop.Request{NIC: -1, Reason: "test"}) // an epoch that nobody begins in
			// The played SVM may stop before P has heard of the PVM's STOP: then there is a second attempt.
			epoch := p.await("a commit", func(st api.Status) bool { return st.CheckpointsDone > 0 && st.State == "replicating" }).Epoch
			s.await("the epoch", func(st api.Status) bool { return st.Epoch == epoch && st.State == "replicating" })
			made := pair.Checkpoints()
			before := p.path.session.Digest

			if tt.p {
				p.end()
				s.await("a lost peer", func(st api.Status) bool { return !st.Peer.Connected })
			}
			if tt.s {
				s.end()
				if !tt.p {
					p.await("a lost peer", func(st api.Status) bool { return !st.Peer.Connected })
				}
			}
			p.opt.Fresh, s.opt.Fresh = tt.freshP, tt.freshS
			offsets := func() {
				s.path.mu.Lock()
				defer s.path.mu.Unlock()
				for i := range tt.conns {
					tuple := testTuple
					tuple.RemotePort += uint16(i)
					s.path.offsets[tuple] = datapath.Offset{Seq: 1}
				}
			}
			p.change = tt.pFinds
			s.change = func(a *datapath.Recovered) { // before there is a session, which tells P of them
				offsets()
				if tt.sFinds != nil {
					tt.sFinds(a)
				}
			}
			if !tt.s {
				offsets()
			}
			if tt.p {
				p.start()
			}
			if tt.s {
				s.start()
			}
			p.await("a session", func(st api.Status) bool { return st.Peer.Connected && st.Term == 2 })
			if !tt.whole {
				st := p.await("a checkpoint", func(st api.Status) bool {
					return st.State == "replicating" && slices.ContainsFunc(st.Checkpoints, func(c api.Checkpoint) bool {
						return strings.Contains(c.Cause, "not whole") && c.Result == "committed"
					})
				})
				if st.Term != 2 {
					t.Errorf("status %+v", st)
				}
				return
			}
			st := p.replicating()
			s.replicating()
			if n := pair.Checkpoints(); n != made {
				t.Errorf("%d checkpoints, and there were %d when the daemon ended: %+v", n, made, st.Checkpoints)
			}
			if p.path.session.Digest != s.path.session.Digest {
				t.Error("the digest keys do not fit together")
			}
			if tt.freshP {
				return
			}
			if st.Epoch != epoch || p.path.session.Digest != before {
				t.Errorf("epoch %d, the keys kept: %v; want %d and kept", st.Epoch, p.path.session.Digest == before, epoch)
			}
			mark := p.path.mark()
			p.path.pvm(1000, "same")
			p.path.svm(2, 1000, "same")
			p.path.await(t, mark, "send 1000+4")
		})
	}
}

// An adopted P goes on holding before there is a session, and hears nothing leave;
// its keys stay in the kernel.
func TestAdoptAlone(t *testing.T) {
	p, s := hosts(t, nil)
	p.start()
	s.start()
	p.replicating()
	s.end()
	p.end()
	p.start()
	p.path.await(t, 0, "mode hold")
	p.path.pvm(1000, "same")
	p.path.svm(1, 1000, "same")
	p.await("the frame", func(st api.Status) bool { return st.HeldPackets == 1 && st.State == "start" })
	if trace := p.path.since(0); len(sent(p.path, 0)) != 0 || slices.ContainsFunc(trace, func(l string) bool { return strings.HasPrefix(l, "session") }) {
		t.Errorf("without a session: %q", trace)
	}
	s.start()
	s.path.await(t, 0, "mode run")
	p.path.await(t, 0, "session 2", "send 1000+4")
}

// The core hears of the connections that are young enough.
func TestAdoptedRemotes(t *testing.T) {
	path := newFakePath(1)
	now := path.Now()
	young, old := testTuple, testTuple
	old.RemotePort++
	path.adopted = &datapath.Recovered{Mode: datapath.ModeHold, Remotes: []datapath.Remote{
		{Tuple: young, Ack: 77, At: now - int64(time.Minute)}, {Tuple: old, Ack: 78, At: now - int64(time.Hour)},
	}}
	n := aloneLoop(path)
	n.Restore(30 * time.Minute)
	walk := n.Primary.WalkFlows()
	if flows, _ := walk.Next(n.Primary, 9, nil); len(flows) != 1 || flows[0].Tuple != young || flows[0].Released != 77 {
		t.Errorf("recovered %+v", flows)
	}
}

// A foreign program in front shuts the NIC, at the tap the tap as well; when it is
// gone, the mode is the one that was wanted last.
func TestForeignProgram(t *testing.T) {
	pair := newPair(t)
	p, s := hosts(t, pair)
	p.opt.orderEvery, s.opt.orderEvery = time.Millisecond, time.Millisecond
	startReplicating(p, s)

	mark := p.path.mark()
	p.path.intrude("program foreign (id 7) is in front of ls_pri_out on tap0", true)
	p.path.await(t, mark, "mode shut", "tap down")
	st := p.await("the reason", func(st api.Status) bool { return strings.Contains(st.Detail, "program foreign (id 7)") })
	if st.Counters["intruded"] != 1 {
		t.Errorf("counters %v", st.Counters)
	}
	p.path.intrude("", false)
	p.path.await(t, mark, "mode shut", "tap down", "tap up", "mode hold")
	p.await("no reason", func(st api.Status) bool { return st.Detail == "" && st.Counters["intruded"] == 1 })

	// On the peer device the tap stays up. A checkpoint parks S and unparks it; the
	// kernel hears nothing of it.
	sm := s.path.mark()
	s.path.intrude("program foreign (id 8) is in front of ls_sec_in on peer0", false)
	s.path.await(t, sm, "mode shut")
	p.d.checkpoints.want(nicloop.Request{NIC: -1, Reason: "test"})
	p.await("a commit", func(st api.Status) bool { return st.CheckpointsDone == 1 })
	if trace := s.path.since(sm); slices.Contains(trace, "mode park") || slices.Contains(trace, "mode run") || slices.Contains(trace, "tap down") {
		t.Errorf("with a program in front: %q", trace)
	}
	s.path.intrude("", false)
	s.path.await(t, sm, "mode shut", "mode run")

	// Whose order cannot be told is not trusted.
	mark = p.path.mark()
	p.path.mu.Lock()
	p.path.orderErr = errors.New("no such device")
	p.path.mu.Unlock()
	p.path.await(t, mark, "mode shut", "tap down")
}
