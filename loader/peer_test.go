// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"testing"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/loader/core"
)

var askTuple = compare.Tuple{
	Guest: addr(10, 0, 0, 1), Remote: addr(10, 0, 0, 2), GuestPort: 80, RemotePort: 40000, VLAN: 5, Proto: core.ProtoTCP,
}

func apply(t testing.TB, n *NIC, effs ...compare.Effect) {
	t.Helper()
	check(t, n.Apply(effs))
	for name, lost := range map[string]uint64{"release_lost": n.lost.tap.Load(), "peer_lost": n.lost.peer.Load()} {
		if lost != 0 {
			t.Fatalf("%s is %d", name, lost)
		}
	}
}

func TestAskAndAnswer(t *testing.T) {
	h := newHosts(t)
	// The range wraps.
	ask := compare.Effect{Op: compare.OpAsk, Tuple: askTuple, Slot: compare.NoSlot, Inc: 0x1234, Seq: 0xffffff00, To: 4096}
	apply(t, h.p, ask)
	got := event(t, h.s, compare.EvAsk)
	if got.Tuple != askTuple || got.Inc != ask.Inc || got.Seq != ask.Seq || got.Len != ask.To || got.Inherited || got.Epoch != 40 {
		t.Errorf("asked %+v, came %+v", ask, got)
	}
	answer := ask
	answer.Op, answer.Sum, answer.Inherited, answer.Inc = compare.OpAnswer, compare.Sum{1 << 63, 77}, true, 0
	apply(t, h.s, answer)
	got = event(t, h.p, compare.EvAnswer)
	if got.Tuple != askTuple || got.Seq != ask.Seq || got.Len != ask.To || got.Sum != answer.Sum || !got.Inherited {
		t.Errorf("answered %+v, came %+v", answer, got)
	}
	counts(t, h.s, "record_in", 1)
	counts(t, h.p, "record_in", 1)
}

func TestPeerFramesRefused(t *testing.T) {
	h := newHosts(t)
	ask := compare.Effect{Op: compare.OpAsk, Tuple: askTuple, Slot: compare.NoSlot, Inc: 1, Seq: 2, To: 3}
	answer := ask
	answer.Op = compare.OpAnswer

	wrongKey, otherTerm := h.at[h.p], h.at[h.p]
	wrongKey.TxKey[1]++
	otherTerm.Term++
	check(t, h.p.InstallSession(wrongKey))
	apply(t, h.p, ask)
	counts(t, h.s, "peer_tag", 1)
	check(t, h.p.InstallSession(otherTerm))
	apply(t, h.p, ask)
	counts(t, h.s, "peer_term", 1)

	// The other way: P now is in another term than S.
	apply(t, h.s, answer)
	counts(t, h.p, "peer_term", 1)
	wrongKey = h.at[h.s]
	wrongKey.TxKey[0]++
	check(t, h.s.InstallSession(wrongKey))
	check(t, h.p.InstallSession(h.at[h.p]))
	apply(t, h.s, answer)
	counts(t, h.p, "peer_tag", 1)

	// An epoch ahead by one is taken, by two or behind is not.
	check(t, h.p.SetEpoch(42))
	apply(t, h.p, ask)
	check(t, h.p.SetEpoch(39))
	apply(t, h.p, ask)
	counts(t, h.s, "peer_epoch", 2)
	check(t, h.p.SetEpoch(41))
	apply(t, h.p, ask)
	if got := event(t, h.s, compare.EvAsk); got.Epoch != 41 || got.Tuple != askTuple {
		t.Errorf("came %+v", got)
	}

	for _, n := range []*NIC{h.p, h.s} {
		if evs, err := n.Poll(0, nil); err != nil || len(evs) != 0 {
			t.Errorf("refused frames made events %+v, %v", evs, err)
		}
	}
}
