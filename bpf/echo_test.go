// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"math"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
)

func bootNow(t *testing.T) uint64 {
	t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		t.Fatal(err)
	}
	return uint64(ts.Nano())
}

// R20: an echo extends the output lease to its own time plus T, and never shortens it.
func TestEchoIn(t *testing.T) {
	k := newKit(t)
	k.conf.Mode, k.conf.LeaseDuration, k.conf.LeaseUntil = uint32(hold), 50, 0
	k.setConf()
	until := func() uint64 {
		t.Helper()
		var c bpf.LockstepLsConf
		if err := k.LsConf.Lookup(uint32(0), &c); err != nil {
			t.Fatal(err)
		}
		if c.Echoed < k.conf.Echoed {
			t.Errorf("echoed at %d, and then at %d", k.conf.Echoed, c.Echoed)
		}
		k.conf.Echoed = c.Echoed
		if k.conf.LeaseUntil = c.LeaseUntil; c != k.conf {
			t.Errorf("settings %+v, want %+v", c, k.conf)
		}
		return c.LeaseUntil
	}
	rec := func(asked uint64) *bpf.LockstepLsRec {
		r := k.number(numbered(0, 0), 0)
		r.Type, r.Sum = echo, [2]uint64{asked, 0}
		return r
	}
	for _, c := range []struct{ asked, want uint64 }{{1000, 1050}, {999, 1050}, {1001, 1051}, {0, 1051}, {1 << 60, 1<<60 + 50}, {1000, 1<<60 + 50}} {
		k.check(k.LsDigestRx, k.wire(rec(c.asked)), drop, "echo_in")
		if got := until(); got != c.want {
			t.Errorf("lease_until %d, want %d", got, c.want)
		}
	}
	refuse := func(reason string, change func(r *bpf.LockstepLsRec)) {
		t.Helper()
		r := rec(1 << 61)
		change(r)
		k.sent[0]--
		k.check(k.LsDigestRx, k.wire(r), drop, reason)
		if got := until(); got != 1<<60+50 {
			t.Errorf("%s: lease_until %d", reason, got)
		}
	}
	refuse("peer_term", func(r *bpf.LockstepLsRec) { r.KeyGen-- })
	refuse("peer_term", func(r *bpf.LockstepLsRec) { r.KeyGen++ })
	refuse("peer_type", func(r *bpf.LockstepLsRec) { r.Dir = p2s })
	refuse("peer_replay", func(r *bpf.LockstepLsRec) { r.StreamNo-- })
	r := rec(1 << 61)
	r.Epoch += 1000 // echoes are of no epoch
	k.check(k.LsDigestRx, k.wire(r), drop, "echo_in")
	if got := until(); got != 1<<61+50 {
		t.Errorf("lease_until %d", got)
	}
	k.conf.LeaseUntil = math.MaxUint64 // solo
	k.setConf()
	k.check(k.LsDigestRx, k.wire(rec(1<<61)), drop, "echo_in")
	if until() != math.MaxUint64 {
		t.Error("an echo ended a lease without end")
	}
	// An echo behind a gap is taken, and the gap asked for.
	k.sent[0]++
	k.expect(counts{"echo_in": 1, "nack_out": 1}, func() { k.run(k.LsDigestRx, input{frame: k.wire(rec(1))}) })
	k.none()
}

// S returns echoes unless it is quiet.
func TestEchoOut(t *testing.T) {
	k := newKit(t)
	rec := func() *bpf.LockstepLsRec {
		return &bpf.LockstepLsRec{Version: abiVersion, Type: echo, Dir: p2s, KeyGen: keyGen, Epoch: epoch, Sum: [2]uint64{1 << 50, 5}}
	}
	for _, mode := range []bpf.LockstepLsMode{run, park} {
		k.setMode(mode)
		for _, ofEpoch := range []uint32{epoch, epoch - 9, epoch + 9} {
			r := rec()
			r.Epoch = ofEpoch
			frame := k.fromPeer(r)
			var verdict uint32
			var out []byte
			k.expect(counts{"echo_out": 1}, func() { verdict, out, _ = k.run(k.LsSecIn, input{frame: frame}) })
			want := k.record(&bpf.LockstepLsRec{Type: echo, Dir: s2p, Sum: [2]uint64{1 << 50}}, out, frame, 54)
			if verdict != redirect || !bytes.Equal(out, want) {
				t.Errorf("verdict %d, echo\n% x, want\n% x", int32(verdict), out, want)
			}
			k.check(k.LsSecIn, frame, drop, "peer_replay")
		}
		other := rec()
		other.KeyGen++
		k.check(k.LsSecIn, k.fromPeer(other), drop, "peer_term")
	}
	for _, mode := range []bpf.LockstepLsMode{shut, hold, solo} {
		k.setMode(mode)
		k.check(k.LsSecIn, k.fromPeer(rec()), drop, "shut")
	}
	k.none()
}
