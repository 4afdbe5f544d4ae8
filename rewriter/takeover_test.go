// SPDX-License-Identifier: Apache-2.0

package rewriter

import (
	"maps"
	"testing"
	"time"
)

// R22: every connection on which the PVM may have transmitted gets the guard, whatever
// table knows it, and of several the one that knows most of it counts, in any order.
func TestTakeover(t *testing.T) {
	const guard, now = 1 << 24, 77
	pair := Half{
		State: HasPVM | HasSVM | PVMTS | SVMTS, ISNPVM: 10, ISNSVM: 100, TSPVM: 5, TSSVM: 9, UsedPVM: 10, UsedSVM: 100,
	}
	with := func(change func(*Half)) *Half { h := pair; change(&h); return &h }
	kept := Conn{Off: 1, TSOff: 2, Inc: 3, State: GuestFIN, CliAck: 4, ISNSVM: 5, Last: 6}
	fromHalf := Conn{Off: 90, TSOff: 4, Inc: 10, ISNSVM: 100, CliAck: 11, Last: now, State: Guarded, Guard: guard}
	inherited := Conn{State: Inherited | Guarded, Guard: guard, Last: now}
	fromConn := kept
	fromConn.State, fromConn.Guard = GuestFIN|Guarded, guard
	again := Conn{State: Inherited | Guarded, Guard: 1, Last: 2}

	add := []func(*Takeover[string]){
		func(to *Takeover[string]) {
			to.AddConn("open", kept)
			to.AddConn("all", kept)
			to.AddConn("guarded", again)
		},
		func(to *Takeover[string]) {
			to.AddHalf("pair", &pair)
			to.AddHalf("all", &pair)
			to.AddHalf("half and inherited", &pair)
			to.AddHalf("guarded", &pair)
			to.AddHalf("no timestamps", with(func(h *Half) { h.State &^= SVMTS }))
			to.AddHalf("svm unknown", with(func(h *Half) { h.State &^= HasSVM }))
			to.AddHalf("became a connection", with(func(h *Half) { h.State |= Done }))
			to.AddHalf("no pair", with(func(h *Half) { h.UsedSVM = 0 }))
		},
		func(to *Takeover[string]) {
			for _, key := range []string{"inherited", "all", "half and inherited", "guarded"} {
				to.AddInherited(key, 0)
			}
		},
		func(to *Takeover[string]) { to.AddInherited("taken over before", 100) },
		func(to *Takeover[string]) { to.AddInherited("taken over before", 0) },
	}
	noTS := fromHalf
	noTS.TSOff = 0
	want := map[string]Conn{
		"open": fromConn, "all": fromConn, "pair": fromHalf, "half and inherited": fromHalf, "no timestamps": noTS, "inherited": inherited,
		"taken over before": {State: Inherited | Guarded, Guard: guard, ISNSVM: 100, Last: now},
	}
	for _, order := range [][]int{{0, 1, 2, 3, 4}, {0, 2, 1, 4, 3}, {1, 0, 2, 3, 4}, {1, 2, 0, 4, 3}, {2, 0, 1, 3, 4}, {2, 1, 0, 4, 3}} {
		for _, doubt := range []bool{false, true} {
			to := NewTakeover[string](guard, doubt, now)
			for _, i := range order {
				add[i](to)
			}
			got := maps.Collect(to.Guarded())
			for key, c := range got { // an inherited connection has no offset that could be another SVM's
				if (c.State&Doubtful != 0) != (doubt && c.State&Inherited == 0) {
					t.Errorf("order %v, doubt %t: %s is %+v", order, doubt, key, c)
				}
				c.State &^= Doubtful
				got[key] = c
			}
			if !maps.Equal(got, want) {
				t.Errorf("order %v:\n got %+v\nwant %+v", order, got, want)
			}
		}
	}
}

// A checkpoint may have been loaded that nobody has seen: what the guest sends shows it, also where numbers wrap, and
// where the remote's ack is older than what the guest has sent, or newer.
func TestSettle(t *testing.T) {
	const off, ts = 0x90000000, 7
	for _, acked := range []uint32{5, 0x7ffffff0, 0xfffffff0} {
		for _, sent := range []uint32{0, 1, 1 << 20, ^uint32(0), 1<<32 - 1<<20} { // behind the ack, modulo 2^32
			c := Conn{Off: off, TSOff: ts, CliAck: acked, State: Doubtful | Guarded}
			if !c.Settle(acked + sent + off) {
				t.Errorf("acked %#x, sends %#x behind it: not clear", acked, sent)
			}
			if want := (Conn{Off: off, TSOff: ts, CliAck: acked, State: Guarded}); c != want {
				t.Errorf("acked %#x, the SVM as it was sends %#x behind it: %+v", acked, sent, c)
			}
			c.State |= Doubtful
			if !c.Settle(acked + sent) {
				t.Errorf("acked %#x, a copy sends %#x behind it: not clear", acked, sent)
			}
			if want := (Conn{CliAck: acked, State: Guarded}); c != want {
				t.Errorf("acked %#x, a copy of the PVM sends %#x behind it: %+v", acked, sent, c)
			}
		}
	}
}

// Between the two, the segment is no evidence.
func TestSettleUnclear(t *testing.T) {
	const off = 1000
	for at, clear := range map[int32]bool{0: true, 200: true, 201: false, 500: false, 799: false, 800: true, 1000: true, 1333: true, 1334: false, 9000: false, -333: true, -334: false} {
		c := Conn{Off: off, CliAck: 77, State: Doubtful}
		was := c
		if got := c.Settle(77 + uint32(at)); got != clear || !got && c != was {
			t.Errorf("%d behind the ack: %v, %+v", at, got, c)
		}
	}
	if c := (Conn{State: Doubtful}); !c.Settle(1 << 20) {
		t.Error("no offset, and in doubt")
	}
}

// A connection that two hosts took over, one after the other, is translated by both, and
// the edge has the guard in it.
func TestBehind(t *testing.T) {
	c := Conn{Off: 1 << 31, TSOff: 7, Guard: 10, Inc: 3, State: Guarded}
	got := c.Behind(Offset{Seq: 1<<31 + 5, TS: 1<<32 - 3})
	want := c
	want.Off, want.TSOff, want.CliAck = 5, 4, 1<<31-5
	if got != want {
		t.Errorf("behind an edge: %+v, want %+v", got, want)
	}
	c.State |= Doubtful
	if got := c.Behind(Offset{}); got != c {
		t.Errorf("behind no edge: %+v, want %+v", got, c)
	}
	if got := c.Behind(Offset{Seq: 1}); got.State&Doubtful != 0 {
		t.Errorf("one offset for two: %+v", got)
	}
	if off, want := got.Offset(), (Offset{5, 4}); off != want {
		t.Errorf("offset %+v, want %+v", off, want)
	}
	if edge, want := got.Edge(), (Offset{5, 1<<32 - 6}); edge != want {
		t.Errorf("edge %+v, want %+v", edge, want)
	}
}

func TestEnded(t *testing.T) {
	const linger, idle = 2 * time.Second, time.Hour
	for _, c := range []struct {
		state State
		limit time.Duration
		name  string
	}{
		{0, idle, "open"},
		{GuestFIN, idle, "closing"},
		{RemoteFIN | Timestamps, idle, "closing"},
		{GuestFIN | RemoteFIN, linger, "closing"},
		{GuestFIN | RemoteFIN | Unacked, 3 * time.Minute, "closing"},
		{GuestFIN | RemoteFIN | Guarded, 3 * time.Minute, "closing"},
		{GuestFIN | RemoteFIN | Unacked | WasReset, linger, "reset"},
		{WasReset, linger, "reset"},
	} {
		conn := Conn{State: c.state, Last: 5}
		if conn.Ended(5+int64(c.limit), linger, idle) || !conn.Ended(6+int64(c.limit), linger, idle) {
			t.Errorf("state %b does not end after %v", c.state, c.limit)
		}
		if c.state.String() != c.name {
			t.Errorf("state %b is %q, want %q", c.state, c.state, c.name)
		}
	}
	reset := Conn{State: WasReset}
	if !reset.Ended(int64(time.Second)+1, linger, time.Second) {
		t.Error("a linger longer than idle counts")
	}
}

// R9: what makes two SYNs one connection.
func TestPaired(t *testing.T) {
	const parts = HasPVM | HasSVM
	for name, c := range map[string]struct {
		h    Half
		want bool
	}{
		"one part":                   {Half{State: HasPVM}, false},
		"answers of one SYN":         {Half{State: parts, ISNPVM: 1, ISNSVM: 2, CliPVM: 3, CliSVM: 3}, true},
		"answers of two":             {Half{State: parts, ISNPVM: 1, ISNSVM: 2, CliPVM: 3, CliSVM: 4}, false},
		"active opens":               {Half{State: parts | Active | PVMActive, ISNPVM: 1, ISNSVM: 2, CliSVM: 9}, true},
		"one of them paired already": {Half{State: parts | Active | PVMActive, ISNPVM: 1, ISNSVM: 2, UsedSVM: 2}, false},
		"paired before":              {Half{State: parts, ISNPVM: 1, ISNSVM: 2, UsedPVM: 1, UsedSVM: 2, CliSVM: 9}, true},
	} {
		if got := c.h.Paired(); got != c.want {
			t.Errorf("%s: paired %v", name, got)
		}
	}
}
