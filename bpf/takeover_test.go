// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/lockstep-ft/lockstep/bpf"
)

// What the tests of takeovers add to the numbers: the guard of R22, and the edge of a
// takeover before.
const (
	guard  = 20_000
	edge   = 0x80000123
	edgeTS = 0x90000321
)

const (
	stInherited = uint32(bpf.LockstepLsConnBitLS_CONN_INHERITED)
	stGuarded   = uint32(bpf.LockstepLsConnBitLS_CONN_GUARDED)
	stEchoes    = uint32(bpf.LockstepLsConnBitLS_CONN_ECHOES)
)

// turned expects a frame to pass as another.
func (k *kit) turned(prog *ebpf.Program, mark uint32, in, want []byte, reason string) {
	k.Helper()
	k.expect(counts{reason: 1}, func() {
		k.Helper()
		v, out, left := k.run(prog, input{frame: in, mark: mark})
		if v != next || left != 0 || !bytes.Equal(out, want) {
			k.Errorf("verdict %d, mark %#x, frame\n% x, want\n% x", int32(v), left, out, want)
		}
	})
}

func (k *kit) putEdge(f flow, c bpf.LockstepLsConn) {
	k.Helper()
	if err := k.LsEdge.Put(f.tuple(), &c); err != nil {
		k.Fatal(err)
	}
	k.conf.Edges = 1
	k.setConf()
}

func (k *kit) edgeOf(f flow) *bpf.LockstepLsConn {
	var c bpf.LockstepLsConn
	if err := k.LsEdge.Lookup(f.tuple(), &c); err != nil {
		return nil
	}
	return &c
}

// TestTakeover: an S that took over, on connections that its P had taken over itself
// before: numbers go through both translations, timestamps are ahead of the PVM's by
// the guard, and an echo of an earlier one is not taken for an old one.
func TestTakeover(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	for family, f := range flows {
		k.TB = t
		k.opened(f)
		c := k.conn(f)
		c.Guard, c.State = guard, c.State|stGuarded
		if err := k.LsConn.Put(f.tuple(), c); err != nil {
			t.Fatal(err)
		}
		k.putEdge(f, bpf.LockstepLsConn{Off: edge, TsOff: edgeTS})
		k.setMode(solo)
		t.Run(family, func(t *testing.T) {
			k.TB = t
			// Numbers as the remote knows them.
			seq, ts := uint32(isnPVM-edge), uint32(tsPVM-edgeTS)
			in := func(ecr, want uint32) {
				t.Helper()
				k.turned(k.LsSecGate, 0, f.to(seg{seq: 6, ack: seq + 6, flags: ack, opts: timestamps(1, ecr)}),
					f.to(seg{seq: 6, ack: isnSVM + 6, flags: ack, opts: timestamps(1, want)}), "passed")
			}
			in(ts+1, tsSVM+1) // of the PVM's days
			k.turned(k.LsSecOut, 0, f.from(seg{seq: isnSVM + 5, ack: 6, flags: ack, opts: timestamps(tsSVM+10, 1), payload: []byte("x")}),
				f.from(seg{seq: seq + 5, ack: 6, flags: ack, opts: timestamps(ts+10+guard, 1), payload: []byte("x")}), "passed")
			if c := k.conn(f); c.TsFirst != ts+10+guard || c.State&stEchoes != 0 {
				t.Errorf("%+v", c)
			}
			in(ts+2, tsSVM+2) // still on its way
			in(ts+10+guard, tsSVM+10)
			in(ts+11+guard, tsSVM+11)
			// A copy has the PVM's numbers.
			k.turned(k.LsSecOut, markRel, f.from(seg{seq: isnPVM + 5, ack: 6, flags: ack, opts: timestamps(tsPVM+3, 1), payload: []byte("y")}),
				f.from(seg{seq: seq + 5, ack: 6, flags: ack, opts: timestamps(ts+3+guard, 1), payload: []byte("y")}), "released_out")
			// The tuple is used again.
			fresh := f.from(seg{seq: 77, ack: 9, flags: syn | ack, opts: withTS(5, 1)})
			k.turned(k.LsSecOut, 0, fresh, fresh, "passed")
			if k.conn(f) != nil || k.edgeOf(f) != nil {
				t.Error("another connection has the old one's numbers")
			}
		})
		k.setMode(run)
	}
	k.TB = t
	k.expect(counts{"released": 1}, func() {
		frame := flows["IPv4"].from(seg{flags: ack})
		if v, out, mark := k.run(k.LsSecGate, input{frame: frame, mark: markRel}); v != redirect || mark != markRel || !bytes.Equal(out, frame) {
			t.Errorf("a copy is not turned round: verdict %d, mark %#x", int32(v), mark)
		}
	})
	k.none()
}

// TestQuiet: S sends nothing, and keeps its guest's output (R21 i).
func TestQuiet(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	f := k.opened(flows["IPv4"])
	k.setMode(quiet)
	output, copied := seg{seq: isnSVM + 1, ack: 2, flags: ack, payload: []byte("kept")}, seg{seq: isnPVM + 1, ack: 2, flags: ack, payload: []byte("kept")}
	dropped := func(frame []byte) {
		t.Helper()
		k.expect(counts{"shut": 1}, func() {
			if v, _, _ := k.run(k.LsSecOut, input{frame: frame}); v != drop {
				t.Errorf("verdict %d", int32(v))
			}
		})
	}
	dropped(f.from(output))
	ev := one[*bpf.LockstepLsEv](k)
	if got, want := k.slot(ev.Slot), f.from(copied); ev.Type != uint32(bpf.LockstepLsEvTypeLS_EV_COPY) || !bytes.Equal(got, want) {
		t.Errorf("copy of type %d\n% x, want\n% x", ev.Type, got, want)
	}
	dropped(f.from(seg{seq: isnSVM + 5, flags: ack}))
	for _, frame := range linkFrames() {
		dropped(frame)
	}
	k.check(k.LsSecIn, f.to(seg{ack: isnPVM + 1, flags: ack}), drop, "shut")
	k.check(k.LsSecGate, f.to(seg{ack: isnPVM + 1, flags: ack}), drop, "gated")
	asked := k.fromPeer(&bpf.LockstepLsRec{Version: abiVersion, Type: echo, Dir: p2s, KeyGen: keyGen, Epoch: epoch, Sum: [2]uint64{5, 0}})
	k.check(k.LsSecIn, asked, drop, "shut")
	k.none()
}

// TestEdge: P at its outermost edge: what leaves, alone or released, has the numbers
// that the remote knows; what comes has the guest's before anybody looks at it.
func TestEdge(t *testing.T) {
	k := newKit(t)
	seq, ts := uint32(1000), uint32(5000) // the guest's
	for family, f := range flows {
		k.TB = t
		k.putEdge(f, bpf.LockstepLsConn{Off: edge, TsOff: edgeTS, Guard: guard, State: stInherited | stGuarded})
		t.Run(family, func(t *testing.T) {
			k.TB = t
			raw := f.from(seg{seq: seq, ack: 6, flags: ack, opts: timestamps(ts, 1), payload: []byte("x")})
			output := f.from(seg{seq: seq - edge, ack: 6, flags: ack, opts: timestamps(ts-edgeTS+guard, 1), payload: []byte("x")})
			k.setMode(solo)
			k.turned(k.LsPriOut, 0, raw, output, "passed")
			k.turned(k.LsPriOut, markRel, raw, output, "released_out")
			k.setMode(hold)
			k.turned(k.LsPriOut, markRel, raw, output, "released_out")
			received := f.to(seg{seq: 6, ack: seq + 1 - edge, flags: ack, opts: timestamps(1, ts-edgeTS+guard)})
			k.setMode(solo)
			k.turned(k.LsMirror, 0, received, f.to(seg{seq: 6, ack: seq + 1, flags: ack, opts: timestamps(1, ts)}), "passed")
			if e := k.edgeOf(f); e.State != stInherited|stGuarded|stEchoes || e.Last == 0 {
				t.Errorf("edge %+v", e)
			}
			// What is held has the guest's numbers.
			k.setMode(hold)
			k.check(k.LsPriOut, raw, drop, "held")
			ev := one[*bpf.LockstepLsEv](k)
			if got := k.slot(ev.Slot); !bytes.Equal(got, raw) {
				t.Errorf("held\n% x, want\n% x", got, raw)
			}
			// The handshake may not be over when the host takes over.
			k.putEdge(f, bpf.LockstepLsConn{Off: edge, TsOff: edgeTS, Guard: guard, IsnSvm: seq, State: stGuarded})
			repeated := seg{seq: seq, ack: 6, flags: syn | ack, opts: withTS(ts, 1)}
			moved := repeated
			moved.seq, moved.opts = seq-edge, withTS(ts-edgeTS+guard, 1)
			k.turned(k.LsPriOut, markRel, f.from(repeated), f.from(moved), "released_out")
			if k.edgeOf(f) == nil {
				t.Error("a SYN|ACK that is repeated has no edge any more")
			}
			fresh := f.from(seg{seq: 77, ack: 9, flags: syn | ack, opts: withTS(5, 1)})
			k.turned(k.LsPriOut, markRel, fresh, fresh, "released_out")
			if k.edgeOf(f) != nil {
				t.Error("another connection has the old one's edge")
			}
		})
	}
	k.TB = t
	k.none()
}

// TestLiveEdgeMirrored: on a connection that was taken over S, too, receives the guest's numbers.
func TestLiveEdgeMirrored(t *testing.T) {
	l := newLab(t)
	k := l.kit()
	k.setMode(hold)
	seq, ts := uint32(1000), uint32(5000) // the guest's
	for family, f := range flows {
		k.putEdge(f, bpf.LockstepLsConn{Off: edge, TsOff: edgeTS})
		in := f.to(seg{seq: 6, ack: seq - edge, flags: ack, opts: timestamps(1, ts-edgeTS), payload: []byte("x")})
		s := seg{seq: 6, ack: seq, flags: ack, opts: timestamps(1, ts), payload: []byte("x")}
		want := f.to(s)
		k.turned(k.LsMirror, 0, in, want, "mirrored")
		k.sameCli(f.tuple(), wantCli(&sample{frame: want, pos: s.seq, n: 1, l4: f.l4(s), pay: f.l4(s) + 20 + len(s.opts), seg: s}))
		if t.Failed() {
			t.Fatal(family)
		}
	}
	k.none()
}

// TestSignedTakeover: a digest of TCP-MD5 or TCP-AO covers the header. On a connection that
// has no offset the guard would only make it wrong.
func TestSignedTakeover(t *testing.T) {
	k := newKit(t)
	k.setMode(solo)
	for family, f := range flows {
		if err := k.LsConn.Put(f.tuple(), &bpf.LockstepLsConn{State: stInherited | stGuarded, Guard: guard}); err != nil {
			t.Fatal(err)
		}
		for name, signature := range map[string][]byte{
			"TCP-MD5": append([]byte{1, 1, 19, 18}, make([]byte, 16)...),
			"TCP-AO":  append([]byte{29, 16}, make([]byte, 14)...),
		} {
			output := f.from(seg{seq: 5, ack: 6, flags: ack, opts: append(timestamps(7, 8), signature...)})
			k.turned(k.LsSecOut, 0, output, output, "passed")
			received := f.to(seg{seq: 6, ack: 5, flags: ack, opts: append(timestamps(8, guard+9), signature...)})
			k.turned(k.LsSecGate, 0, received, received, "passed")
			if t.Failed() {
				t.Fatal(family, name)
			}
		}
		plain := seg{seq: 5, ack: 6, flags: ack, opts: timestamps(7, 8)}
		moved := plain
		moved.opts = timestamps(7+guard, 8)
		k.turned(k.LsSecOut, 0, f.from(plain), f.from(moved), "passed")
	}
}
