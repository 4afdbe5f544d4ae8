// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/nicloop"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qmp"
	"github.com/lockstep-ft/lockstep/control/qmptest"
	"github.com/lockstep-ft/lockstep/control/state"
)

// calmLives are lives in which a slow machine is not taken for a dead host.
func calmLives(t *testing.T, pair *qmptest.Pair) (p, s *side, a *sharedArbiter) {
	t.Helper()
	p, s, a = lives(t, pair)
	for _, x := range []*side{p, s} {
		x.opt.Heartbeat.Timeout, x.opt.link.Silence = patience/4, patience/4
	}
	return p, s, a
}

// holdMonitor waits in the queue of p's monitor, has the daemon lose its connection and
// returns when the other client is served in its place.
func (s *side) holdMonitor() *net.UnixConn {
	s.t.Helper()
	conn, err := net.Dial("unix", s.opt.QMP)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	if err := s.d.ask(s.t.Context(), func() { s.d.qmp.conn.Disconnect() }); err != nil {
		s.t.Fatal(err)
	}
	conn.SetReadDeadline(time.Now().Add(patience))
	if n, err := conn.Read(make([]byte, 1000)); err != nil || n == 0 {
		s.t.Fatalf("no greeting: %v", err)
	}
	return conn.(*net.UnixConn)
}

// dials counts attempts to reach QEMU.
func (s *side) dials() *atomic.Int64 {
	n := new(atomic.Int64)
	s.opt.dialQMP = func(ctx context.Context, path string, o *Options, connected func(*net.UnixConn)) (*qmp.Monitor, error) {
		defer n.Add(1)
		return dialMonitor(ctx, path, o, connected)
	}
	return n
}

// tried waits until so many attempts to reach QEMU have ended.
func tried(t *testing.T, n *atomic.Int64, more int64) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	late := time.After(patience)
	for until := n.Load() + more; n.Load() < until; {
		select {
		case <-tick.C:
		case <-late:
			t.Fatal("QEMU is not dialled")
		}
	}
}

// TestHeldMonitor: somebody else is served by the primary's QEMU. It is not dead, the
// pair stays, status names who that is, and lockstep goes on when it has gone. A QEMU
// that ends meanwhile is found dead, and so is one that hangs afterwards.
func TestHeldMonitor(t *testing.T) {
	for _, dies := range []bool{false, true} {
		t.Run(fmt.Sprintf("dies=%v", dies), func(t *testing.T) {
			t.Parallel()
			pair := newPair(t)
			p, s, a := calmLives(t, pair)
			p.opt.Failover.doubt = 100 * time.Millisecond // a doubt that nobody can end is no reason to go on alone
			dials := p.dials()
			startCovered(p, s)
			other := p.holdMonitor()
			want := fmt.Sprintf("another client on its monitor, process %d (", os.Getpid())
			p.await("who holds the monitor", func(st api.Status) bool { return strings.Contains(st.QMP.Error, want) })
			tried(t, dials, maxUnanswered)
			if st := p.await("a status", func(api.Status) bool { return true }); a.now.Term != 1 || st.State == "failover" || st.State == "solo" || !st.Covered {
				t.Fatalf("record %v, state %s, covered %v", a.now, st.State, st.Covered)
			}
			if dies {
				pair.Primary.Close() // the other client is cut off, too
				s.ends(ErrPromoted)
				p.ends(ErrFenced)
				return
			}
			other.Close()
			p.await("a pair", func(st api.Status) bool { return st.QMP.Connected && st.State == "replicating" && st.Covered })
			if want := (arbiter.Entry{Term: 1, Speaker: "alpha"}); a.now != want {
				t.Errorf("the record is %v, want %v", a.now, want)
			}
		})
	}
}

// TestMutationMonitor: were the process not asked, another client on the monitor would
// be the end of a healthy primary.
func TestMutationMonitor(t *testing.T) {
	t.Parallel()
	pair := newPair(t)
	p, s, _ := calmLives(t, pair)
	p.opt.noAskQEMU = true
	startCovered(p, s)
	p.holdMonitor()
	s.ends(ErrPromoted)
	p.ends(ErrFenced)
}

// A primary's daemon is started again and finds another client on the monitor. Of the
// pair that there was it has a session all the same; the secondary would take over else.
func TestRestartWithHeldMonitor(t *testing.T) {
	t.Parallel()
	pair := newPair(t)
	p, s, a := calmLives(t, pair)
	startCovered(p, s)
	other := p.holdMonitor()
	p.end()
	found := datapath.Pinned{Role: datapath.RolePrimary, Mode: datapath.ModeHold}
	begin, err := failover.Decide(datapath.RolePrimary, "alpha", "beta", state.State{Role: "primary", Term: a.now.Term, Covered: a.now.Term}, a.now, found)
	if err != nil {
		t.Fatal(err)
	}
	p.opt.Failover.Begin = begin
	p.start()
	p.await("a session without QMP", func(st api.Status) bool {
		return st.Peer.Connected && !st.QMP.Connected && strings.Contains(st.QMP.Error, "another client")
	})
	other.Close()
	p.await("a pair", func(st api.Status) bool { return st.QMP.Connected && st.State == "replicating" && st.Covered })
	if a.now.Term != 1 {
		t.Errorf("the record is %v", a.now)
	}
}

// Somebody removes the file of the monitor's socket, on which QEMU still listens.
func TestMonitorFileGone(t *testing.T) {
	t.Parallel()
	pair := newPair(t)
	p, s, a := calmLives(t, pair)
	dials := p.dials()
	startCovered(p, s)
	if err := os.Rename(p.opt.QMP, p.opt.QMP+".away"); err != nil {
		t.Fatal(err)
	}
	if err := p.d.ask(t.Context(), func() { p.d.qmp.conn.Disconnect() }); err != nil {
		t.Fatal(err)
	}
	tried(t, dials, 1+maxUnanswered)
	p.await("the reason", func(st api.Status) bool {
		return strings.Contains(st.QMP.Error, "lives, but its monitor cannot be reached")
	})
	if a.now.Term != 1 {
		t.Fatalf("the record is %v", a.now)
	}
	if err := os.Rename(p.opt.QMP+".away", p.opt.QMP); err != nil {
		t.Fatal(err)
	}
	p.await("a pair", func(st api.Status) bool { return st.QMP.Connected && st.State == "replicating" && st.Covered })
}

// A primary whose monitor somebody holds loses its secondary: it goes on alone, and
// tells QEMU when it can.
func TestAloneWithoutMonitor(t *testing.T) {
	pair := newPair(t)
	p, s, a := calmLives(t, pair)
	p.start()
	s.start()
	p.covered()
	other := p.holdMonitor()
	p.await("who holds the monitor", func(st api.Status) bool { return strings.Contains(st.QMP.Error, "another client") })
	mark := p.path.mark()
	pair.Secondary.Close()
	s.ends(ErrAfresh)
	p.await("solo", func(st api.Status) bool { return st.State == "solo" })
	p.path.await(t, mark, "mode solo")
	for _, r := range pair.Primary.Requests() {
		if r.Execute == "x-colo-lost-heartbeat" {
			t.Error("QEMU was told, on a monitor that serves somebody else")
		}
	}
	other.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := pair.Primary.Await(ctx, "x-colo-lost-heartbeat", 1); err != nil {
		t.Error(err)
	}
	p.await("solo", func(st api.Status) bool { return st.State == "solo" && st.QMP.Connected })
	if a.now.Speaker != "alpha" {
		t.Errorf("the record is %v", a.now)
	}
}

// TestDialErrors: this host cannot dial for reasons of its own. QEMU is not dead for
// that.
func TestDialErrors(t *testing.T) {
	for _, errno := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.EACCES, syscall.ENOBUFS, syscall.ENOMEM} {
		t.Run(errno.Error(), func(t *testing.T) {
			t.Parallel()
			pair := newPair(t)
			p, s, a := calmLives(t, pair)
			var fail atomic.Bool
			dials := new(atomic.Int64)
			p.opt.dialQMP = func(ctx context.Context, path string, o *Options, connected func(*net.UnixConn)) (*qmp.Monitor, error) {
				defer dials.Add(1)
				if fail.Load() {
					return nil, fmt.Errorf("qmp: %w", &net.OpError{Op: "dial", Net: "unix", Err: os.NewSyscallError("socket", errno)})
				}
				return dialMonitor(ctx, path, o, connected)
			}
			startCovered(p, s)
			fail.Store(true)
			if err := p.d.ask(t.Context(), func() { p.d.qmp.conn.Disconnect() }); err != nil {
				t.Fatal(err)
			}
			p.await("the reason", func(st api.Status) bool {
				return strings.Contains(st.QMP.Error, "lives, but its monitor cannot be reached") && strings.Contains(st.QMP.Error, errno.Error())
			})
			tried(t, dials, maxUnanswered)
			if st := p.await("a status", func(api.Status) bool { return true }); a.now.Term != 1 || st.State == "failover" {
				t.Fatalf("record %v, state %s", a.now, st.State)
			}
			fail.Store(false)
			p.await("a pair", func(st api.Status) bool { return st.QMP.Connected && st.State == "replicating" && st.Covered })
		})
	}
}

// endedQEMU is the process of a QEMU that has just ended, which nobody has been told.
func endedQEMU(t *testing.T) *qemu.Process {
	t.Helper()
	spec := &qemu.Spec{VM: "web1", Node: "ended", Dir: t.TempDir()}
	file := filepath.Join(spec.Dir, "web1-ended.pid")
	played := exec.CommandContext(t.Context(), "sh", "-c", "read line", "-pidfile", file, "-")
	if _, err := played.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := played.Start(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(strconv.Itoa(played.Process.Pid)), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := qemu.Find(spec)
	for late := time.Now().Add(patience); err != nil; p, err = qemu.Find(spec) { // the kernel is about to lay its arguments down
		if time.Now().After(late) {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
	played.Process.Kill()
	played.Wait()
	if p.Alive() {
		t.Fatal("it lives")
	}
	return p
}

// TestNoClaimWithDeadQEMU: a primary misses its secondary, and its QEMU has ended, of which its
// monitor's socket has not told yet. It does not ask the arbiter: it would win, and nobody serve. Nor does a
// secondary whose QEMU has ended, nor does it ask the primary for its place.
func TestNoClaimWithDeadQEMU(t *testing.T) {
	for name, event := range map[string]failover.Kind{
		"primary": failover.EvPeerDead, "secondary": failover.EvPeerDead, "secondary, by order": failover.EvTakeOver,
	} {
		t.Run(name, func(t *testing.T) {
			pair := newPair(t)
			p, s, a := calmLives(t, pair)
			startCovered(p, s)
			x := s
			if name == "primary" {
				x = p
			}
			ended := endedQEMU(t)
			if err := x.d.ask(t.Context(), func() {
				x.d.qmp.process.set(ended)
				x.d.failover.step(failover.Event{Kind: event})
			}); err != nil {
				t.Fatal(err)
			}
			if x == s {
				s.ends(ErrAfresh)
				if a.now.Speaker != "alpha" {
					t.Errorf("the record is %v", a.now)
				}
				return
			}
			s.ends(ErrPromoted)
			p.ends(ErrFenced)
			if a.now.Speaker != "beta" {
				t.Errorf("the record is %v", a.now)
			}
		})
	}
}

// TestPatientSecondary: a secondary's QEMU stands still for longer than a command may take. It keeps its connection, so
// that what QEMU does next is seen; one that does not wake is dead after as long as before.
func TestPatientSecondary(t *testing.T) {
	for _, wakes := range []bool{true, false} {
		t.Run(fmt.Sprintf("wakes=%v", wakes), func(t *testing.T) {
			pair := newPair(t)
			p, s, _ := calmLives(t, pair)
			dials := s.dials()
			startCovered(p, s)
			before := dials.Load()
			mark := len(pair.Secondary.Requests())
			pair.Secondary.SetFault(qmptest.Silent, 0)
			if !wakes {
				s.ends(ErrAfresh)
				return
			}
			tick := time.NewTicker(time.Millisecond)
			defer tick.Stop()
			for len(pair.Secondary.Requests()) < mark+2 { // one was not answered in time
				<-tick.C
			}
			pair.Secondary.SetFault(qmptest.None, 0)
			done := s.await("a status", func(api.Status) bool { return true }).CheckpointsDone
			p.d.checkpoints.want(nicloop.Request{NIC: -1, Reason: "test"})
			s.await("a checkpoint", func(st api.Status) bool { return st.QMP.Connected && st.CheckpointsDone > done })
			if n := dials.Load(); n != before {
				t.Errorf("dialled %d times more", n-before)
			}
		})
	}
}
