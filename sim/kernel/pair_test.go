// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/nicloop"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// isRecord reports whether a peer frame has a record of the type.
func isRecord(b []byte, typ bpf.LockstepLsRecType) bool {
	return isPeerFrame(b) && b[int(le.Uint16(b[16:]))+9] == uint8(typ)
}

func (r *rig) wantFree() {
	r.Helper()
	if used := r.p.n.Slots(); used != 0 {
		r.Errorf("%d slots of P are taken", used)
	}
}

// Both guests choose their own numbers; the client sees the PVM's, and what it receives
// left because both sent it.
func TestPair(t *testing.T) {
	r := newRig(t)
	r.open()
	if r.client.rcv != r.p.guest.isn+1 {
		t.Errorf("the client received the ISN %#x, want the PVM's", r.client.rcv-1)
	}
	r.send("one")
	r.send("two")
	r.pass(50 * rigMS)
	r.wantReceived("ONETWO")
	if string(r.s.guest.got) != "onetwo" || r.s.guest.peer != r.s.guest.next {
		t.Errorf("the SVM received %q, and %d of its bytes are acknowledged", r.s.guest.got, r.s.guest.next-r.s.guest.peer)
	}
	r.wantFree()
	known := 0
	must(t, r.s.n.Offsets(func(_ compare.Tuple, o datapath.Offset) {
		known++
		if want := r.s.guest.isn - r.p.guest.isn; o.Seq != want || o.Incarnation != r.p.guest.isn {
			t.Errorf("offset %+v, want %#x", o, want)
		}
	}))
	if known != 1 || len(r.wanted) != 0 {
		t.Errorf("%d offsets, checkpoints wanted: %v", known, r.wanted)
	}
}

// What S did not confirm does not leave, and a lost record is sent again (R6).
func TestLostRecord(t *testing.T) {
	r := newRig(t)
	r.open()
	lost := 0
	r.lose = func(b []byte) bool {
		if lost == 0 && isRecord(b, bpf.LockstepLsRecTypeLS_REC_DATA) {
			lost++
			return true
		}
		return false
	}
	r.send("one")
	r.wantReceived("")
	r.pass(20 * rigMS) // nothing behind it shows the gap, so P asks
	r.wantReceived("ONE")

	lost = 0
	r.send("two")
	r.lose = func([]byte) bool { return false }
	r.wantReceived("ONE")
	r.send("three") // its record shows the gap
	r.wantReceived("ONETWOTHREE")
	if n := r.p.n.Count(bpf.LockstepLsReasonLS_R_nackOut); n != 1 {
		t.Errorf("%d gaps were reported, want 1", n)
	}
	r.pass(50 * rigMS)
	r.wantFree()
}

// A mirrored frame that is lost: the client's data is acknowledged once the SVM has it (R2).
func TestLostMirrored(t *testing.T) {
	r := newRig(t)
	r.open()
	r.lose = func(b []byte) bool { return !isPeerFrame(b) }
	r.send("one")
	r.lose = func([]byte) bool { return false }
	r.pass(30 * rigMS)
	r.wantReceived("")
	if r.client.peer != r.client.isn+1 {
		t.Errorf("%d bytes of the client's are acknowledged", r.client.peer-r.client.isn-1)
	}
	r.wire(r.client.again())
	r.pass(30 * rigMS)
	r.wantReceived("ONE")
	if r.client.peer != r.client.next {
		t.Error("the client's data is not acknowledged")
	}
}

// A checkpoint: what comes meanwhile is parked, and the SVM goes on as a copy of the PVM.
func TestCheckpointParks(t *testing.T) {
	r := newRig(t)
	r.open()
	r.send("one")
	must(t, r.p.loop.Freeze())
	must(t, r.s.loop.Park())
	r.send("two") // the PVM answers, before its STOP
	r.wantReceived("ONE")
	if n := r.s.n.Slots(); n == 0 {
		t.Error("nothing is parked")
	}
	r.now += 10 * rigMS
	stop := r.now
	must(t, r.p.n.SetEpoch(2))
	must(t, r.p.n.MarkStop())
	r.run()
	r.now += 10 * rigMS
	loaded := *r.p.guest
	loaded.sent, loaded.got = slices.Clone(loaded.sent), slices.Clone(loaded.got)
	*r.s.guest = loaded
	must(t, r.s.n.SetEpoch(2))
	must(t, r.s.loop.Reset(2))
	must(t, r.s.loop.Unpark(false))
	inside, err := r.p.loop.Commit(2, (stop+r.now)/2, stop, r.now)
	must(t, err)
	if inside {
		t.Error("a frame was captured in the pause")
	}
	r.run()
	r.wantReceived("ONETWO")
	r.send("three")
	r.pass(50 * rigMS)
	r.wantReceived("ONETWOTHREE")
	if n := r.s.n.Count(bpf.LockstepLsReasonLS_R_parked); n == 0 || len(r.wanted) != 0 {
		t.Errorf("%d frames were parked, checkpoints wanted: %v", n, r.wanted)
	}
	r.wantFree()
}

// takeOver: P is dead, and S transmits.
func (r *rig) takeOver(guard uint32) {
	must(r, r.s.loop.Quiet())
	must(r, r.p.loop.Shut())
	must(r, r.s.loop.TakeOver(guard, false))
	r.run()
}

// A takeover sends again what the client has not received, with the PVM's numbers and the
// guard on its timestamps (R22); as the next primary the host goes on translating.
func TestTakeOver(t *testing.T) {
	const guard = 1 << 24
	r := newRig(t)
	r.open()
	r.send("one")
	before := r.client.echo
	r.lose = func(b []byte) bool { return isRecord(b, bpf.LockstepLsRecTypeLS_REC_DATA) }
	r.send("two") // S keeps a copy of the answer, and P knows nothing of it
	r.wantReceived("ONE")
	r.lose = func([]byte) bool { return true }
	r.takeOver(guard)
	r.wantReceived("ONETWO")
	if ahead := r.client.echo - before; ahead < guard || ahead > guard+1000 {
		t.Errorf("the timestamp is %d ahead of the one before, want %d", ahead, guard)
	}
	r.send("three")
	r.wantReceived("ONETWOTHREE")
	if used := r.s.n.Slots(); used != 0 {
		t.Errorf("%d slots are taken after the takeover", used)
	}

	n, err := r.s.n.Promote()
	must(t, err)
	if got := n.Recovered(); got == nil || got.Mode != datapath.ModeSolo || got.Term != 1 {
		t.Errorf("recovered %+v", got)
	}
	edges, err := n.Edges()
	must(t, err)
	if len(edges) != 1 || edges[0].Seq != r.s.guest.isn-r.p.guest.isn {
		t.Errorf("edges %+v", edges)
	}
	r.s.n = n
	r.s.loop = nicloop.NewPrimary(0, n, slog.New(slog.DiscardHandler), nil, compare.Config{}, r.session.Digest)
	must(t, r.s.loop.Solo())
	r.send("four")
	r.wantReceived("ONETWOTHREEFOUR")
	if _, ok := n.Acked(edges[0].Tuple); !ok {
		t.Error("what the client has acknowledged is not known")
	}
}

// A daemon that starts again goes on from the tables (R23).
func TestReopen(t *testing.T) {
	r := newRig(t)
	r.open()
	r.send("one")
	r.lose = func(b []byte) bool { return isRecord(b, bpf.LockstepLsRecTypeLS_REC_DATA) }
	r.send("two") // is held when the daemon dies
	r.lose = func([]byte) bool { return false }
	if r.p.n.Slots() == 0 {
		t.Fatal("nothing is held")
	}
	old := r.p.n
	r.p.n = old.Reopen()
	if _, err := old.Poll(0, nil); err == nil {
		t.Error("the dead daemon's NIC still polls")
	}
	found := r.p.n.Recovered()
	if found == nil || found.Epoch != 1 || found.Term != 1 || found.Mode != datapath.ModeHold || found.Digest != r.session.Digest || len(found.Remotes) != 1 {
		t.Fatalf("recovered %+v", found)
	}
	r.wantFree()
	r.primary(found.Epoch)
	r.p.loop.Restore(time.Hour)
	must(t, r.p.loop.RestoreMode())
	for _, s := range []*side{r.p, r.s} { // the guests repeat what was lost
		s.n.FromGuest(s.guest.again(), 0)
	}
	r.pass(100 * rigMS)
	r.wantReceived("ONETWO")
}

// A tap that is down lets nothing through, and what is released then is lost.
func TestTapDown(t *testing.T) {
	r := newRig(t)
	r.open()
	must(t, r.p.n.SetTap(false))
	r.send("one")
	r.p.n.FromGuest(r.p.guest.data([]byte("X")), 0)
	if used := r.p.n.Slots(); used != 0 || len(r.p.guest.got) > 0 {
		t.Errorf("%d slots taken, the guest received %q", used, r.p.guest.got)
	}
	must(t, r.p.n.Apply([]compare.Effect{{Op: compare.OpNeigh, Tuple: compare.Tuple{Guest: r.p.guest.flow.addr(1)}}}))
	counters, err := r.p.n.Counters()
	must(t, err)
	if counters["release_lost"] != 1 {
		t.Errorf("%d released frames are lost, want 1", counters["release_lost"])
	}
}

// R20: nothing leaves without echoes.
func TestLease(t *testing.T) {
	r := newRig(t)
	r.open()
	must(t, r.p.n.SetLeaseUntil(r.now))
	must(t, r.p.n.SetLeaseDuration(10*time.Millisecond))
	r.send("one")
	r.wantReceived("")
	if r.p.n.Count(bpf.LockstepLsReasonLS_R_muted) == 0 {
		t.Error("nothing was muted")
	}
	must(t, r.p.n.RequestEcho())
	r.run()
	if r.p.n.LastEcho() != r.now || r.s.n.LastEcho() != r.now {
		t.Errorf("echoes at %d and %d, want %d", r.p.n.LastEcho(), r.s.n.LastEcho(), r.now)
	}
	r.p.n.FromGuest(r.p.guest.again(), 0)
	r.run()
	r.wantReceived("ONE")
	r.now += 10 * rigMS
	must(t, r.s.n.SetMode(datapath.ModeQuiet)) // S is taking over
	must(t, r.p.n.RequestEcho())
	r.run()
	if n := r.s.n.Count(bpf.LockstepLsReasonLS_R_echoOut); n != 1 {
		t.Errorf("%d echoes were returned, want 1", n)
	}
}

// After a rotation frames signed with the keys before are taken for a second.
func TestRotation(t *testing.T) {
	r := newRig(t)
	r.open()
	next := r.session
	next.Term, next.Rotated, next.TxKey, next.RxKey = 2, true, [2]uint64{5, 6}, [2]uint64{7, 8}
	must(t, r.p.n.InstallSession(next))
	r.send("one") // S has not rotated yet
	r.wantReceived("ONE")
	r.now += int64(core.RotationOverlap)
	r.send("two")
	r.wantReceived("ONE")
	if n := r.p.n.Count(bpf.LockstepLsReasonLS_R_peerTerm); n == 0 {
		t.Error("no record was refused")
	}
	next.PeerMAC, next.TxKey, next.RxKey = r.p.n.MAC(), next.RxKey, next.TxKey
	must(t, r.s.n.InstallSession(next))
	r.s.n.FromGuest(r.s.guest.again(), 0)
	r.run()
	r.wantReceived("ONETWO")
}

// Large frames: the guests cut their streams in different places, and the client receives
// segments.
func TestLargeFrames(t *testing.T) {
	r := newRig(t)
	r.open()
	data := make([]byte, 50_000)
	for i := range data {
		data[i] = byte(i * i >> 3)
	}
	const gso, large = 1400, 16_000
	for i, s := range []*side{r.p, r.s} {
		for rest := data; len(rest) > 0; {
			n := min(large-3000*i, len(rest))
			s.n.FromGuest(s.guest.data(rest[:n]), gso)
			rest = rest[n:]
		}
	}
	segments := 0
	r.client.seen = func(n int) {
		segments++
		if n > gso {
			t.Errorf("a segment of %d bytes", n)
		}
	}
	r.pass(100 * rigMS)
	if string(r.client.got) != string(data) {
		t.Errorf("the client received %d bytes, want %d, the same", len(r.client.got), len(data))
	}
	if segments < len(data)/gso || len(r.wanted) > 0 {
		t.Errorf("%d segments, checkpoints wanted: %v", segments, r.wanted)
	}
	r.wantFree()
}
