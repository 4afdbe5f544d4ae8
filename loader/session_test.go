// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"testing"

	"github.com/dchest/siphash"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// A rotation keeps the old keys beside the new ones for a second, the epoch and
// the stream's numbers for good; a session of its own does neither.
func TestRotatedSession(t *testing.T) {
	h := newHosts(t)
	apply(t, h.p, compare.Effect{Op: compare.OpAsk, Tuple: askTuple, Slot: compare.NoSlot, Inc: 1, Seq: 2, To: 3})
	event(t, h.s, compare.EvAsk)
	check(t, h.p.SetEpoch(41)) // a checkpoint under way
	stream := h.p.Signer.No
	if stream == 0 {
		t.Fatal("the stream has no numbers")
	}
	old, next := h.at[h.p], h.at[h.p]
	next.Term, next.Rotated, next.TxKey, next.RxKey = 8, true, [2]uint64{5, 6}, [2]uint64{7, 8}
	before := h.p.Now()
	check(t, h.p.InstallSession(next))
	after := h.p.Now()
	c := h.p.conf
	if until := int64(c.OldUntil); until < before+int64(core.RotationOverlap) || until > after+int64(core.RotationOverlap) {
		t.Errorf("old frames until %d, want %d to %d", until, before+int64(core.RotationOverlap), after+int64(core.RotationOverlap))
	}
	if c.KeyGen != 8 || c.KeyIndex != 0 || c.Epoch != 41 || h.p.Signer.No != stream {
		t.Errorf("term %d, keys %d, epoch %d, stream %d", c.KeyGen, c.KeyIndex, c.Epoch, h.p.Signer.No)
	}
	var signed bpf.LockstepLsRec
	copy(core.BytesOf(&signed), h.p.Signer.Mark(nil)[core.VnetLen+core.RecOff:])
	want := signed
	want.Tag, want.KeyGen, want.Epoch, want.StreamNo = 0, 8, 41, stream+1
	if want.Tag = siphash.Hash(5, 6, core.BytesOf(&want)[8:bpf.LockstepLsConstLS_REC_BASE]); signed != want {
		t.Errorf("user space signed %+v, want %+v", signed, want)
	}
	for index, want := range [][2]uint64{next.RxKey, old.RxKey} {
		var k bpf.LockstepLsKeys
		check(t, h.p.objs.LsKeys.Lookup(uint32(index), &k))
		if k.SipRx != want || k.Mix != old.Digest.Mix {
			t.Errorf("keys %d are %v, want %v", index, k.SipRx, want)
		}
	}

	fresh := next
	fresh.Term, fresh.Rotated, fresh.Epoch = 9, false, 50
	check(t, h.p.InstallSession(fresh))
	if c.OldUntil != 0 || c.KeyGen != 9 || c.Epoch != 50 || h.p.Signer.No != stream+1 {
		t.Errorf("old frames until %d, term %d, epoch %d, stream %d", c.OldUntil, c.KeyGen, c.Epoch, h.p.Signer.No)
	}
}

func TestRules(t *testing.T) {
	devices(t)
	o := options(mountBPFFS(t), "a.lab", Primary)
	o.Rules = []Rule{{Proto: 17, RemotePort: 123}, {Proto: 47}, {Proto: 17, GuestPort: 5353}}
	n, err := Open(o)
	check(t, err)
	defer n.Close()
	var count uint32
	check(t, n.objs.LsNrules.Get(&count))
	if count != 3 {
		t.Errorf("%d rules", count)
	}
	for i, want := range []bpf.LockstepLsRule{{Proto: 17, Rport: 123}, {Proto: 47}, {Proto: 17, Gport: 5353}, {}} {
		var got bpf.LockstepLsRule
		check(t, n.objs.LsRules.Lookup(uint32(i), &got))
		if got != want {
			t.Errorf("rule %d is %+v, want %+v", i, got, want)
		}
	}
}
