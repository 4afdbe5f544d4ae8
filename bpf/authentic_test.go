// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lockstep-ft/lockstep/bpf"
)

// The primary's MARK and the secondary's NEIGH reach user space as they are.
func TestTold(t *testing.T) {
	k := newKit(t)
	r := rand.New(rand.NewPCG(33, 34))
	k.setMode(park)
	rec := randRec(r, mark, p2s, 0)
	k.check(k.LsSecIn, k.fromPeer(rec), drop, "record_in")
	if diff := cmp.Diff(rec, &one[*bpf.LockstepLsEvRec](k).Rec); diff != "" {
		t.Error(diff)
	}
	k.setMode(hold)
	rec = randRec(r, neigh, s2p, 0)
	k.check(k.LsDigestRx, k.fromPeer(rec), drop, "record_in")
	if diff := cmp.Diff(rec, &one[*bpf.LockstepLsEvRec](k).Rec); diff != "" {
		t.Error(diff)
	}
}

// Every field of every kind of record, changed once behind the signer's back.
func TestAuthentic(t *testing.T) {
	k := newKit(t)
	r := rand.New(rand.NewPCG(35, 36))
	fields := []struct {
		name   string
		at     int
		reason string
	}{
		{"tag", 0, "peer_tag"}, {"version", 8, "peer_version"}, {"type", 9, "peer_type"}, {"dir", 10, "peer_type"},
		{"flags", 11, "peer_tag"}, {"len", 12, "peer_short"}, {"stream", 14, "peer_tag"}, {"stream_no", 16, "peer_tag"},
		{"key_gen", 24, "peer_term"}, {"epoch", 28, "peer_tag"}, {"guest", 32, "peer_tag"}, {"remote", 48, "peer_tag"},
		{"gport", 64, "peer_tag"}, {"rport", 66, "peer_tag"}, {"vlan", 68, "peer_tag"}, {"vlan2", 70, "peer_tag"},
		{"proto", 72, "peer_tag"}, {"tuple's padding", 73, "peer_tag"}, {"inc", 76, "peer_tag"}, {"seq", 80, "peer_tag"},
		{"end", 84, "peer_tag"}, {"ack", 88, "peer_tag"}, {"win", 92, "peer_tag"}, {"tcp_flags", 94, "peer_tag"},
		{"optlen", 95, "peer_short"}, {"stride", 96, "peer_tag"}, {"nsum", 100, "peer_short"}, {"frag", 102, "peer_tag"},
		{"sum", 104, "peer_tag"}, {"other sum", 112, "peer_tag"}, {"opts", 120, "peer_tag"}, {"opts' end", 159, "peer_tag"},
		{"bound", 160, "peer_tag"}, {"last bound", 160 + 31, "peer_tag"},
	}
	for _, c := range []struct {
		typ, dir uint8
		taken    string
	}{
		{data, s2p, "record_in"}, {answer, s2p, "record_in"}, {dgram, s2p, "record_in"}, {neigh, s2p, "record_in"}, {echo, s2p, "echo_in"},
		{announce, p2s, "record_in"}, {ask, p2s, "record_in"}, {mark, p2s, "record_in"}, {nack, p2s, "nack_in"}, {echo, p2s, "echo_out"},
	} {
		t.Run(fmt.Sprintf("type %d, direction %d", c.typ, c.dir), func(t *testing.T) {
			k.TB = t
			prog := k.LsSecIn
			k.setMode(run)
			if c.dir == s2p {
				prog = k.LsDigestRx
				k.setMode(hold)
			}
			rec := randRec(r, c.typ, c.dir, 2)
			if c.typ == nack {
				rec.Stride, rec.Sum = 0, [2]uint64{1, 0}
			}
			frame := k.fromPeer(rec)
			for _, f := range fields {
				b := bytes.Clone(frame)
				if b[54+f.at] ^= 0x80; f.name == "flags" {
					b[54+f.at] ^= 0x81
				}
				k.check(prog, b, drop, f.reason)
				if t.Failed() {
					t.Fatal(f.name)
				}
			}
			k.none()
			k.expect(counts{c.taken: 1}, func() { k.run(prog, input{frame: frame}) })
			k.events()
		})
	}
}
