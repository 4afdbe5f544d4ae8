// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/nicloop"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/qmptest"
)

// patience is how long a test waits for what has to come.
const patience = 30 * time.Second

// side is a daemon under test.
type side struct {
	t    *testing.T
	opt  Options
	path *fakePath
	// change alters what a daemon finds.
	change func(*datapath.Recovered)
	edges  []datapath.Edge // that a daemon finds
	known  func(int)       // is told how many edges a daemon knows

	stop context.CancelFunc
	done chan error
	d    *Daemon
}

// hosts makes the two sides of a pair, not started, with QEMUs when pair is given.
func hosts(t *testing.T, pair *qmptest.Pair) (p, s *side) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	ln.Close()
	base := Options{VM: "web1", Control: address, Checkpoint: config.Checkpoint{MinInterval: time.Millisecond}, link: peerlink.DefaultTiming}
	base.link.Retry = time.Millisecond
	base.link.RetryMax = 10 * time.Millisecond
	p, s = &side{t: t, opt: base}, &side{t: t, opt: base}
	p.opt.Node, p.opt.Peer, p.opt.Role = "alpha", "beta", datapath.RolePrimary
	s.opt.Node, s.opt.Peer, s.opt.Role = "beta", "alpha", datapath.RoleSecondary
	dir := t.TempDir()
	p.opt.StatusSocket, s.opt.StatusSocket = filepath.Join(dir, "p.sock"), filepath.Join(dir, "s.sock")
	if pair != nil {
		p.opt.QMP, s.opt.QMP = pair.Primary.Path(), pair.Secondary.Path()
	}
	return p, s
}

func newPair(t *testing.T) *qmptest.Pair {
	t.Helper()
	pair, err := qmptest.NewPair(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pair.Close() })
	return pair
}

// start runs the daemon, with a new data path, over the tables of the daemon before
// it unless they are to be fresh.
func (s *side) start() *side {
	s.t.Helper()
	old := s.path
	s.path = newFakePath(1)
	if s.opt.Role == datapath.RoleSecondary {
		s.path = newFakePath(2)
	}
	if old != nil && !s.opt.Fresh {
		s.path.adopted = old.left()
		s.path.session = datapath.Session{Epoch: s.path.adopted.Epoch, Digest: s.path.adopted.Digest}
		if s.change != nil {
			s.change(s.path.adopted)
		}
	}
	s.path.edges, s.path.known = s.edges, s.known
	s.opt.NICs = []datapath.NIC{s.path}
	s.opt.Log = slog.New(slog.NewTextHandler(logWriter{s.t}, nil)).With("node", s.opt.Node)
	d, err := New(s.opt)
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	s.d, s.stop, s.done = d, stop, make(chan error, 1)
	go func() { s.done <- d.Run(ctx) }()
	s.t.Cleanup(s.end)
	return s
}

// end stops the daemon and waits for it.
func (s *side) end() {
	s.stop()
	if err, ok := <-s.done; ok {
		close(s.done)
		if err != nil {
			s.t.Errorf("%s: %v", s.opt.Node, err)
		}
	}
}

type logWriter struct{ t *testing.T }

func (w logWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSuffix(string(b), "\n"))
	return len(b), nil
}

// await asks for the status until it is as wanted.
func (s *side) await(what string, ok func(api.Status) bool) api.Status {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	var last api.Status
	for {
		if st, err := api.FetchStatus(ctx, s.opt.StatusSocket); err == nil {
			if last = st; ok(st) {
				return st
			}
		} else if !errors.Is(err, api.ErrNoDaemon) && ctx.Err() == nil {
			s.t.Fatal(err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			s.t.Fatalf("%s: waited for %s, last status %+v", s.opt.Node, what, last)
		}
	}
}

// startReplicating starts both sides, and returns when they replicate.
func startReplicating(p, s *side) {
	p.t.Helper()
	p.start()
	s.start()
	p.replicating()
	s.replicating()
}

func (s *side) replicating() api.Status {
	s.t.Helper()
	return s.await("replicating", func(st api.Status) bool { return st.State == "replicating" && st.Peer.Connected })
}

// sent lists what left from a mark on.
func sent(f *fakePath, mark int) []string {
	var out []string
	for _, line := range f.since(mark) {
		if strings.HasPrefix(line, "send ") {
			out = append(out, line)
		}
	}
	return out
}

func TestReplication(t *testing.T) {
	p, s := hosts(t, nil)
	p.start()
	if st := p.await("an answer", func(api.Status) bool { return true }); st.State != "start" || st.Peer.Connected {
		t.Errorf("before the secondary is there: %+v", st)
	}
	s.start()
	st := p.replicating()
	s.replicating()
	p.path.await(t, 0, "session 0", "session 1", "mode hold", "speak")
	s.path.await(t, 0, "session 1", "mode run")

	// Both hosts have the same keys, each its own way round.
	a, b := p.path.session, s.path.session
	if a.TxKey != b.RxKey || a.RxKey != b.TxKey || a.TxKey == a.RxKey || a.Digest != b.Digest || a.Epoch != b.Epoch {
		t.Error("the sessions do not fit together")
	}
	if a.PeerMAC.String() != s.path.mac.String() || b.PeerMAC.String() != p.path.mac.String() {
		t.Errorf("peer addresses %v, %v", a.PeerMAC, b.PeerMAC)
	}
	if st.VM != "web1" || st.Node != "alpha" || st.Role != "primary" || st.Epoch != 1 || st.Term != 1 || st.Peer.Node != "beta" || !st.Peer.Insecure {
		t.Errorf("status %+v", st)
	}
	if st.Dropped["no_slot"] != 2 || len(st.Dropped) != 1 || st.Counters["held"] != 7 || st.Programs["ls_mirror"] != (api.ProgramStatus{Device: "tap0", Attach: "tcx-egress"}) {
		t.Errorf("counters %v, drops %v, programs %v", st.Counters, st.Dropped, st.Programs)
	}

	// What both say leaves, no sooner.
	mark := p.path.mark()
	p.path.pvm(1000, "hello")
	p.await("a held frame", func(st api.Status) bool { return st.HeldPackets == 1 && st.HeldBytes == 5 && st.Connections == 1 })
	if got := sent(p.path, mark); got != nil {
		t.Errorf("left alone: %q", got)
	}
	p.path.svm(1, 1000, "hello")
	p.path.await(t, mark, "send 1000+5")
	p.await("a release", func(st api.Status) bool { return st.ReleasedPackets == 1 && st.HeldPackets == 0 })

	// Datagrams are released too.
	for _, kind := range []compare.EventKind{compare.EvPVM, compare.EvSVM} {
		seg := p.path.segment(0, []byte("hello"))
		seg.Datagram, seg.Proto, seg.Seq, seg.Epoch, seg.At = true, 17, 0, 1, p.path.Now()
		p.path.put(compare.Event{Kind: kind, Seg: seg})
	}
	p.await("a released datagram", func(st api.Status) bool { return st.ReleasedPackets == 2 && st.HeldPackets == 0 })

	flows, err := api.FetchFlows(t.Context(), p.opt.StatusSocket)
	if err != nil || len(flows) != 1 {
		t.Fatalf("flows: %+v, %v", flows, err)
	}
	if f := flows[0]; f.Guest != "10.0.0.2:80" || f.Remote != "10.0.0.9:40000" || f.Compared == nil || *f.Compared != 1005 || f.Offset != nil {
		t.Errorf("flow %+v", f)
	}
	s.path.mu.Lock()
	s.path.offsets[testTuple] = datapath.Offset{Seq: 77, State: "open", Last: s.path.Now()}
	s.path.mu.Unlock()
	flows, err = api.FetchFlows(t.Context(), s.opt.StatusSocket)
	if err != nil || len(flows) != 1 || flows[0].Offset == nil || *flows[0].Offset != 77 || flows[0].State != "open" {
		t.Errorf("flows on S: %+v, %v", flows, err)
	}
	s.path.mu.Lock()
	s.path.offsets[testTuple] = datapath.Offset{Seq: 77, State: "open", Last: s.path.Now() + int64(time.Hour)} // a frame since the list was begun
	s.path.mu.Unlock()
	if flows, err = api.FetchFlows(t.Context(), s.opt.StatusSocket); err != nil || len(flows) != 1 || flows[0].Age != 0 {
		t.Errorf("flows on S: %+v, %v, want an age of 0", flows, err)
	}
	if st := s.replicating(); st.Connections != 1 {
		t.Errorf("S has %d connections, want 1", st.Connections)
	}

	// Without QMP a divergence is counted; nothing is frozen for it.
	p.path.pvm(1005, "primary")
	p.path.svm(1, 1005, "another")
	st = p.await("a request", func(st api.Status) bool { return st.CheckpointsRequested == 1 })
	if st.State != "replicating" || len(st.Causes) != 1 || st.Causes[0].Reason != "payload differs" || st.Causes[0].Flow != testTuple.String() {
		t.Errorf("after a divergence: %+v", st)
	}
}

// R14: a frame captured between STOP and RESUME belongs to no epoch for certain.
func TestFrameInside(t *testing.T) {
	pair := newPair(t)
	p, s := hosts(t, pair)
	startReplicating(p, s)
	first := true
	pair.SetHook(func(stage qmptest.Stage) bool {
		if stage == qmptest.PrimaryResume && first {
			first = false
			// Far enough from STOP and RESUME that the clocks' noise does not matter.
			pause(t)
			p.path.pvm(1000, "while stopped")
			p.await("the frame", func(st api.Status) bool { return st.HeldPackets == 1 })
			pause(t)
		}
		return true
	})
	p.d.checkpoints.want(nicloop.Request{NIC: -1, Reason: "test"})
	st := p.await("a second checkpoint", func(st api.Status) bool { return st.CheckpointsDone == 2 })
	if last := st.Checkpoints[1]; !strings.Contains(last.Cause, "transmitted while it was stopped") {
		t.Errorf("second checkpoint %+v", last)
	}
}

// The secondary dies and comes back, with whole tables and with fresh ones.
func TestSecondaryRestart(t *testing.T) {
	pair := newPair(t)
	p, s := hosts(t, pair)
	startReplicating(p, s)
	p.path.pvm(1000, "same")
	p.path.svm(1, 1000, "same")
	p.path.await(t, 0, "send 1000+4")

	mark := p.path.mark()
	s.end()
	st := p.await("a lost peer", func(st api.Status) bool { return !st.Peer.Connected })
	if st.State != "replicating" || st.Peer.Error == "" || st.Peer.Since.IsZero() {
		t.Errorf("status %+v", st)
	}
	p.path.pvm(1004, "primary")
	p.path.svm(1, 1004, "another")
	p.await("a request", func(st api.Status) bool { return st.CheckpointsRequested == 1 })
	if n := pair.Checkpoints(); n != 0 {
		t.Errorf("%d checkpoints without a secondary", n)
	}
	if got := sent(p.path, mark); got != nil {
		t.Errorf("left: %q", got)
	}
	s.start()
	st = p.await("the checkpoint asked for", func(st api.Status) bool { return st.CheckpointsDone == 1 && st.State == "replicating" })
	if st.Term != 2 || !st.Peer.Connected {
		t.Errorf("status %+v", st)
	}
	p.path.await(t, mark, "send 1004+7")

	s.end()
	s.opt.Fresh = true
	s.start()
	st = p.await("a checkpoint for fresh tables", func(st api.Status) bool { return st.CheckpointsDone == 2 && st.State == "replicating" })
	if last := st.Checkpoints[len(st.Checkpoints)-1]; !strings.Contains(last.Cause, "not whole") || st.Term != 3 {
		t.Errorf("status %+v", st)
	}
	s.path.await(t, 0, "session 3", "mode park", "reset", "mode run")
}

// The primary's daemon starts anew, without tables; its digest keys are new, its
// term is not.
func TestPrimaryRestart(t *testing.T) {
	p, s := hosts(t, nil)
	startReplicating(p, s)
	old := s.path.session
	p.end()
	s.await("a lost peer", func(st api.Status) bool { return !st.Peer.Connected })
	p.opt.Fresh = true
	p.start()
	st := p.replicating()
	s.path.await(t, 0, "session 2")
	if st.Term != 2 || s.path.session.Digest == old.Digest || s.path.session.TxKey == old.TxKey {
		t.Errorf("term %d, or keys kept", st.Term)
	}
	// What an earlier daemon's keys have digested is dropped.
	seg := p.path.segment(1000, []byte("old"))
	seg.At = 1
	mark := p.path.mark()
	p.path.put(compare.Event{Kind: compare.EvPVM, Seg: seg})
	p.path.await(t, mark, "op 2 slot 1 void")
}

func TestDataPathFails(t *testing.T) {
	p, s := hosts(t, nil)
	p.start()
	s.start()
	p.replicating()
	broken := errors.New("ring gone")
	p.path.fail(broken)
	if err := <-p.done; !errors.Is(err, broken) {
		t.Errorf("ended with %v", err)
	}
	close(p.done)
	if !p.path.closed {
		t.Error("the data path stayed open")
	}
	if _, err := api.FetchStatus(t.Context(), p.opt.StatusSocket); !errors.Is(err, api.ErrNoDaemon) {
		t.Errorf("status of a dead daemon: %v", err)
	}
}

func TestStatusSocket(t *testing.T) {
	p, _ := hosts(t, nil)
	if _, err := api.FetchStatus(t.Context(), p.opt.StatusSocket); !errors.Is(err, api.ErrNoDaemon) {
		t.Errorf("before the start: %v", err)
	}
	p.start()
	p.await("an answer", func(api.Status) bool { return true })

	// A second daemon leaves the first one's socket alone.
	o := p.opt
	o.Control = "127.0.0.1:0"
	o.NICs = []datapath.NIC{newFakePath(3)}
	if err := Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), "already answers") {
		t.Errorf("second daemon: %v", err)
	}
	p.await("an answer", func(api.Status) bool { return true })
	p.end()

	// A dead one's is replaced.
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: p.opt.StatusSocket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	if _, err := api.FetchFlows(t.Context(), p.opt.StatusSocket); !errors.Is(err, api.ErrNoDaemon) {
		t.Errorf("dead socket: %v", err)
	}
	p.start()
	p.await("an answer", func(api.Status) bool { return true })

	for _, o := range []Options{
		{},
		{Role: "both", NICs: []datapath.NIC{newFakePath(1)}},
		{Role: datapath.RolePrimary},
	} {
		if err := Run(t.Context(), o); err == nil {
			t.Errorf("options %+v are taken", o)
		}
	}
}
