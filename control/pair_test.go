// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/nicloop"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qmptest"
	"github.com/lockstep-ft/lockstep/control/state"
)

// sharedArbiter is one that both hosts reach, until it is cut.
type sharedArbiter struct {
	mu    sync.Mutex
	now   arbiter.Entry
	cut   bool
	reads int
}

// set changes the entry by somebody else's hand, and returns how often it was read
// before.
func (a *sharedArbiter) set(now arbiter.Entry) (reads int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.now = now
	return a.reads
}

// await returns when the entry was read so often.
func (a *sharedArbiter) await(t *testing.T, reads int) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		a.mu.Lock()
		n := a.reads
		a.mu.Unlock()
		if n >= reads {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the entry was read %d times, want %d", n, reads)
		}
		runtime.Gosched()
	}
}

func (a *sharedArbiter) Read(context.Context) (arbiter.Entry, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.reads++
	if a.cut {
		return arbiter.Entry{}, errors.New("the arbiter is cut off")
	}
	return a.now, nil
}

func (a *sharedArbiter) Settle(ctx context.Context) (arbiter.Entry, error) { return a.Read(ctx) }
func (a *sharedArbiter) Close() error                                      { return nil }

func (a *sharedArbiter) Swap(_ context.Context, old, next arbiter.Entry) (arbiter.Entry, bool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.cut:
		return arbiter.Entry{}, false, errors.New("the arbiter is cut off")
	case a.now == old:
		a.now = next
	}
	return a.now, a.now == next, nil
}

func (a *sharedArbiter) setCut(cut bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cut = cut
}

// lives makes two sides that fail over, not started.
func lives(t *testing.T, pair *qmptest.Pair) (p, s *side, a *sharedArbiter) {
	t.Helper()
	p, s = hosts(t, pair)
	a = &sharedArbiter{now: arbiter.Entry{Term: 1, Speaker: "alpha"}}
	dir := t.TempDir()
	for _, x := range []*side{p, s} {
		store, err := state.Open(dir, "web1", x.opt.Node)
		if err != nil {
			t.Fatal(err)
		}
		b, err := failover.Decide(x.opt.Role, x.opt.Node, x.opt.Peer, state.State{}, a.now, datapath.Pinned{})
		if err != nil {
			t.Fatal(err)
		}
		x.opt.Failover = &Failover{Begin: b, Arbiter: a, Store: store}
		x.opt.link.Silence, x.opt.link.Ping = 400*time.Millisecond, 20*time.Millisecond
		x.opt.Heartbeat.Lease, x.opt.Heartbeat.Interval, x.opt.Heartbeat.Timeout = 200*time.Millisecond, 10*time.Millisecond, 400*time.Millisecond
		x.opt.qmpTimeout, x.opt.qmpPoll = 400*time.Millisecond, 50*time.Millisecond
	}
	return p, s, a
}

// ends waits for how a daemon's part ends.
func (s *side) ends(want error) {
	s.t.Helper()
	select {
	case err := <-s.done:
		close(s.done)
		if !errors.Is(err, want) {
			s.t.Errorf("%s ended with %v, want %v", s.opt.Node, err, want)
		}
	case <-time.After(patience):
		s.t.Fatalf("%s does not end", s.opt.Node)
	}
}

// startCovered starts both sides, and returns when S may take over.
func startCovered(p, s *side) {
	p.t.Helper()
	p.start()
	s.start()
	p.covered()
	s.covered()
}

func (s *side) covered() {
	s.t.Helper()
	s.await("covered", func(st api.Status) bool { return st.Covered && st.State == "replicating" })
}

// TestLifeQMPFaults: whatever the primary's QEMU does to its monitor, the daemon does not
// hang: it finds its QEMU dead, shuts its gates, and the other host takes over.
func TestLifeQMPFaults(t *testing.T) {
	for name, fault := range map[string]qmptest.Fault{
		"silent": qmptest.Silent, "hangs up": qmptest.HangUp, "garbage": qmptest.Garbage, "huge": qmptest.Huge, "slow": qmptest.Slow,
	} {
		t.Run(name, func(t *testing.T) {
			pair := newPair(t)
			p, s, _ := lives(t, pair)
			startCovered(p, s)
			mark := s.path.mark()
			pair.Primary.SetFault(fault, time.Second)
			if fault == qmptest.Garbage || fault == qmptest.Huge || fault == qmptest.HangUp {
				// It answers anew each time, and so lives; somebody ends it.
				p.await("an error", func(st api.Status) bool { return st.QMP.Error != "" })
				pair.Primary.Close()
			}
			s.ends(ErrPromoted)
			s.path.await(t, mark, "mode quiet", "take over", "speak", "mode solo")
			p.path.await(t, 0, "mode hold", "mode shut")
			p.ends(ErrFenced)
		})
	}
}

// TestQEMUDiesAtCommand: the primary's QEMU dies at each command of a checkpoint. Whatever
// that looks like at first, the secondary takes over: a claim of the primary's would leave
// nobody.
func TestQEMUDiesAtCommand(t *testing.T) {
	begin := func(t *testing.T) (pair *qmptest.Pair, p, s *side, a *sharedArbiter) {
		pair = newPair(t)
		p, s, a = lives(t, pair)
		pair.Primary.SetReply("x-debug-query-block-graph", `"return": {"nodes": [`+
			`{"id": 1, "type": "block-driver", "name": "vda"}, `+
			`{"id": 2, "type": "block-driver", "name": "parent0"}, `+
			`{"id": 3, "type": "block-driver", "name": "nbd0"}], "edges": [`+
			`{"parent": 1, "child": 2, "name": "children.0"}, `+
			`{"parent": 1, "child": 3, "name": "children.1"}]}`)
		startCovered(p, s)
		p.d.post(func() { p.d.failover.Disks = []qemu.Disk{{ID: "vda"}} }) // of which a played QEMU cannot make a replica
		return pair, p, s, a
	}
	pair, p, _, _ := begin(t)
	mark := len(pair.Primary.Requests())
	done := p.await("a status", func(api.Status) bool { return true }).CheckpointsDone
	p.d.checkpoints.want(nicloop.Request{NIC: -1, Reason: "test"})
	p.await("a checkpoint", func(st api.Status) bool { return st.CheckpointsDone > done })
	var commands []string
	for _, r := range pair.Primary.Requests()[mark:] {
		if !slices.Contains(commands, r.Execute) {
			commands = append(commands, r.Execute)
		}
	}
	if !slices.Contains(commands, "x-debug-query-block-graph") {
		t.Fatalf("a checkpoint takes %v", commands)
	}
	for _, command := range commands {
		t.Run(command, func(t *testing.T) {
			pair, p, s, a := begin(t)
			pair.Primary.DieAt(command)
			p.d.checkpoints.want(nicloop.Request{NIC: -1, Reason: "test"})
			s.ends(ErrPromoted)
			p.ends(ErrFenced)
			if a.now.Speaker != "beta" {
				t.Errorf("the entry is %v", a.now)
			}
		})
	}
}

// TestQEMUEnded: somebody ends the primary's QEMU, which tells of it, and of what it loses
// on its way. The secondary takes over.
func TestQEMUEnded(t *testing.T) {
	for _, reason := range []string{"host-signal", "host-qmp-quit"} {
		t.Run(reason, func(t *testing.T) {
			pair := newPair(t)
			p, s, a := lives(t, pair)
			startCovered(p, s)
			pair.Primary.Raw(fmt.Sprintf(`{"timestamp": {"seconds": 1, "microseconds": 0}, "event": "SHUTDOWN", "data": {"guest": false, "reason": "%s"}}`+"\r\n", reason))
			pair.Primary.Raw(`{"timestamp": {"seconds": 1, "microseconds": 0}, "event": "COLO_EXIT", "data": {"mode": "primary", "reason": "error"}}` + "\r\n")
			s.ends(ErrPromoted)
			p.ends(ErrFenced)
			if a.now.Speaker != "beta" {
				t.Errorf("the entry is %v", a.now)
			}
		})
	}
}

// TestNoCheckpointOfStoppedGuest: QEMU is not asked for a checkpoint of a guest that a
// disk's error has stopped, though its STOP has not come yet: it would abort, and the guest
// that serves be lost to a disk of the secondary's.
func TestNoCheckpointOfStoppedGuest(t *testing.T) {
	pair := newPair(t)
	p, s, _ := lives(t, pair)
	p.opt.qmpPoll = patience // which would find the guest's state
	startCovered(p, s)
	pair.Primary.SetReply("query-status", `"return": {"running": false, "status": "io-error"}`)
	mark := len(pair.Primary.Requests())
	p.d.checkpoints.want(nicloop.Request{NIC: -1, Reason: "test"})
	p.await("a failed attempt", func(st api.Status) bool {
		return slices.ContainsFunc(st.Checkpoints, func(c api.Checkpoint) bool { return strings.Contains(c.Result, "the guest is stopped: io-error") })
	})
	for _, r := range pair.Primary.Requests()[mark:] {
		if r.Execute == "migrate-set-parameters" {
			t.Error("QEMU was asked")
		}
	}
}

// TestPausedByADeadDaemon: a daemon that died after it stopped the guest to ask for a
// checkpoint leaves that to the next one. A guest that somebody else stopped stays so.
func TestPausedByADeadDaemon(t *testing.T) {
	for _, ours := range []bool{true, false} {
		pair := newPair(t)
		p, s, _ := lives(t, pair)
		if ours {
			pair.Primary.SetReply("qom-list", `"return": [{"name": "lockstep-pause", "type": "child<rng-builtin>"}]`)
		}
		pair.Primary.Stop()
		p.start()
		s.start()
		want := "paused"
		if ours {
			want = "running"
		}
		p.await(want, func(st api.Status) bool { return st.QMP.Connected && st.QMP.State == want })
		continued := slices.ContainsFunc(pair.Primary.Requests(), func(r qmptest.Request) bool { return r.Execute == "cont" })
		if continued != ours {
			t.Errorf("stopped by a daemon: %t, resumed: %t", ours, continued)
		}
	}
}

// TestBrokenDevice: an SVM with a device that QEMU has given up is no replica, whatever is
// committed: P goes on alone, and S begins afresh.
func TestBrokenDevice(t *testing.T) {
	pair := newPair(t)
	p, s, _ := lives(t, pair)
	startCovered(p, s)
	pair.Secondary.SetReply("x-query-virtio-status", `"return": {"broken": true}`)
	pair.Secondary.SetReply("x-query-virtio", `"return": [{"path": "/machine/nic/virtio-backend"}]`)
	s.ends(ErrAfresh)
	p.await("solo", func(st api.Status) bool { return st.State == "solo" && st.ArbiterTerm == 2 })
}

// TestNoArbiter: without the arbiter's answer nobody speaks; with it one host does.
func TestNoArbiter(t *testing.T) {
	pair := newPair(t)
	p, s, a := lives(t, pair)
	startCovered(p, s)
	a.setCut(true)
	mark := s.path.mark()
	pair.Primary.Close()
	s.await("failover", func(st api.Status) bool { return st.State == "failover" })
	s.path.await(t, mark, "mode quiet")
	p.ends(ErrFenced)
	for _, line := range s.path.since(mark) {
		if line == "mode solo" || line == "take over" {
			t.Errorf("S spoke, and nobody knows whether it may: %q", s.path.since(mark))
		}
	}
	a.setCut(false)
	s.ends(ErrPromoted)
	s.path.await(t, mark, "mode quiet", "take over", "mode solo")
	if a.now != (arbiter.Entry{Term: 2, Speaker: "beta"}) {
		t.Errorf("the record is %v", a.now)
	}
}

// TestUncovered: an S that no commit covers does not take over, and begins afresh.
func TestUncovered(t *testing.T) {
	pair := newPair(t)
	p, s, a := lives(t, pair)
	pair.SetHook(func(qmptest.Stage) bool { return false }) // no checkpoint comes to pass
	p.start()
	s.start()
	p.await("a checkpoint", func(st api.Status) bool { return st.State == "checkpointing" })
	pair.Primary.Close()
	p.ends(ErrFenced)
	s.await("no link", func(st api.Status) bool { return !st.Peer.Connected })
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	<-ctx.Done() // longer than a covered one would wait
	if st := s.await("a status", func(api.Status) bool { return true }); st.State == "failover" || a.now.Speaker != "alpha" {
		t.Errorf("state %s, record %v", st.State, a.now)
	}
}

// TestStuck: no checkpoint comes to pass, and so nothing leaves; after a while P goes on
// without S, which begins afresh.
func TestStuck(t *testing.T) {
	pair := newPair(t)
	p, s, _ := lives(t, pair)
	p.opt.Failover.doubt = 300 * time.Millisecond
	pair.SetHook(func(qmptest.Stage) bool { return false })
	p.start()
	s.start()
	s.ends(ErrAfresh)
	p.await("solo", func(st api.Status) bool { return st.State == "solo" && st.ArbiterTerm == 2 })
	p.path.await(t, 0, "mode hold", "mode solo")
}

// TestForcedFailover: a takeover that would lose what the guest has told clients is
// refused, unless it is forced.
func TestForcedFailover(t *testing.T) {
	pair := newPair(t)
	p, s, a := lives(t, pair)
	pair.SetHook(func(qmptest.Stage) bool { return false })
	p.start()
	s.start()
	p.await("a checkpoint", func(st api.Status) bool { return st.State == "checkpointing" && st.Peer.Connected })
	s.await("a session", func(st api.Status) bool { return st.Peer.Connected })
	if _, err := api.OrderFailover(t.Context(), s.opt.StatusSocket, false); err == nil || !strings.Contains(err.Error(), "use --force") {
		t.Errorf("failover of an uncovered secondary: %v", err)
	}
	if _, err := api.OrderFailover(t.Context(), p.opt.StatusSocket, false); a.now.Speaker != "alpha" {
		t.Errorf("the record is %v, %v", a.now, err)
	}
	s.ends(ErrAfresh) // the primary went on alone, because it was asked to

	pair2 := newPair(t)
	p, s, a = lives(t, pair2)
	pair2.SetHook(func(qmptest.Stage) bool { return false })
	p.start()
	s.start()
	s.await("a session", func(st api.Status) bool { return st.Peer.Connected })
	p.await("a checkpoint", func(st api.Status) bool { return st.State == "checkpointing" && st.Peer.Connected })
	a.setCut(true)
	if _, err := api.OrderFailover(t.Context(), s.opt.StatusSocket, true); err == nil || !strings.Contains(err.Error(), "cannot be reached") {
		t.Errorf("failover without an arbiter: %v", err)
	}
	a.setCut(false)
	// While no lease binds the primary, force is not enough.
	if _, err := api.OrderFailover(t.Context(), s.opt.StatusSocket, true); err == nil || !strings.Contains(err.Error(), "without a lease") {
		t.Errorf("failover from a primary that has asked for no echo: %v", err)
	}
	if err := s.path.RequestEcho(); err != nil {
		t.Fatal(err)
	}
	if done, err := api.OrderFailover(t.Context(), s.opt.StatusSocket, true); err != nil || done.Result != "transmits alone" {
		t.Error(done, err)
	}
	s.ends(ErrPromoted)
	p.ends(ErrFenced)
}

// TestFailoverLost: an order that somebody else has been quicker than is no success.
func TestFailoverLost(t *testing.T) {
	p, s, a := lives(t, newPair(t))
	startCovered(p, s)
	a.set(arbiter.Entry{Term: 3, Speaker: "beta"})
	if done, err := api.OrderFailover(t.Context(), p.opt.StatusSocket, false); err == nil || !strings.Contains(err.Error(), "names beta") {
		t.Errorf("%v, %v", done, err)
	}
	p.ends(ErrFenced)
	s.ends(ErrAfresh)
}

// TestFencedLater: a primary that transmits alone finds out that the arbiter names
// another node since (R26).
func TestFencedLater(t *testing.T) {
	for name, mutated := range map[string]bool{"rule": false, "mutation": true} {
		t.Run(name, func(t *testing.T) {
			p, s, a := lives(t, newPair(t))
			p.opt.entryEvery = 10 * time.Millisecond
			p.opt.Failover.noR26Entry = mutated
			p.start()
			s.start()
			p.covered()
			if _, err := api.OrderFailover(t.Context(), p.opt.StatusSocket, false); err != nil {
				t.Fatal(err)
			}
			s.ends(ErrAfresh)
			reads := a.set(arbiter.Entry{Term: 3, Speaker: "beta"})
			if !mutated {
				p.ends(ErrFenced)
				p.path.await(t, 0, "mode solo", "mode shut")
				return
			}
			a.await(t, reads+3)
			if st := p.await("a status", func(api.Status) bool { return true }); st.State != "solo" {
				t.Errorf("without the rule the primary is in state %q", st.State)
			}
		})
	}
}

// TestUncoveredAsks: a primary whose secondary nothing covers asks the arbiter, too,
// before it transmits alone (R26).
func TestUncoveredAsks(t *testing.T) {
	pair := newPair(t)
	p, s, a := lives(t, pair)
	pair.SetHook(func(qmptest.Stage) bool { return false }) // no checkpoint comes to pass
	p.start()
	s.start()
	p.await("a checkpoint", func(st api.Status) bool { return st.State == "checkpointing" && st.Peer.Connected })
	a.setCut(true)
	mark := p.path.mark()
	pair.Secondary.Close()
	s.ends(ErrAfresh)
	p.await("failover", func(st api.Status) bool { return st.State == "failover" })
	for _, line := range p.path.since(mark) {
		if line == "mode solo" {
			t.Error("the primary transmits, and nobody knows whether it may")
		}
	}
	a.setCut(false)
	p.await("solo", func(st api.Status) bool { return st.State == "solo" && st.ArbiterTerm == 2 })
}

// Who is shut has no lease left, and an echo that is still on its way opens none: nothing
// takes echoes when it is closed.
func TestShutEndsLease(t *testing.T) {
	f := newFakePath(1)
	n := aloneLoop(f)
	if err := errors.Join(n.Hold(1, time.Second), n.Turn(0)); err != nil {
		t.Fatal(err)
	}
	mark := f.mark()
	if err := errors.Join(n.Shut(), n.Turn(0)); err != nil {
		t.Fatal(err)
	}
	if want := []string{"mode shut", "speak"}; !slices.Equal(f.since(mark), want) || f.lease != 0 {
		t.Errorf("%v, lease until %d", f.since(mark), f.lease)
	}
}
