// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/dchest/siphash"

	"github.com/lockstep-ft/lockstep/bpf"
)

// soaking has the fuzz tests run longer, each time from another seed.
var soaking = os.Getenv("LOCKSTEP_SOAK") != ""

// fuzzSeed is LOCKSTEP_SEED, to repeat a failure, or a new one in a soak.
func fuzzSeed(t *testing.T) (uint64, *rand.Rand) {
	t.Helper()
	seed := uint64(51)
	if s := os.Getenv("LOCKSTEP_SEED"); s != "" {
		if _, err := fmt.Sscan(s, &seed); err != nil {
			t.Fatalf("LOCKSTEP_SEED %q is no number", s)
		}
	} else if soaking {
		seed = rand.Uint64()
	}
	t.Logf("LOCKSTEP_SEED=%d", seed)
	return seed, rand.New(rand.NewPCG(seed, 52))
}

// signed: is out a peer frame with a record that this host signed?
func (k *kit) signed(out []byte) bool {
	if len(out) < 18 || !bytes.Equal(out[:14], slices.Concat(peerMAC[:], ownMAC[:], []byte{0x88, 0xb5})) {
		return false
	}
	at := int(binary.LittleEndian.Uint16(out[16:]))
	if len(out) < at+recBase {
		return false
	}
	rec := out[at:]
	return len(rec) == int(binary.LittleEndian.Uint16(rec[12:])) && siphash.Hash(k.sipTx[0], k.sipTx[1], rec[8:]) == binary.LittleEndian.Uint64(rec)
}

// Frames of every kind, spoiled at random, through every program: each is counted,
// nothing held gets out, nothing forged gets in, and slots and ring stay whole.
func TestFuzz(t *testing.T) {
	l := newLab(t)
	l.jumbo()
	k := l.kit(setRules(bpf.LockstepLsRule{Proto: 17, Gport: gport}))
	k.conf.LeaseDuration = 1
	seed, r := fuzzSeed(t)
	var guests [2][][]byte // to it, from it
	for from := range 2 {
		for _, s := range samples(from == 1) {
			guests[from] = append(guests[from], s.frame)
		}
	}
	for _, f := range flows {
		for _, s := range []seg{{seq: 1, flags: syn, opts: withTS(1, 0)}, {seq: 1, ack: 2, flags: syn | ack}, {seq: 3, ack: 4, flags: fin | ack}, {flags: rst}, {seq: 5, ack: 6, flags: ack}} {
			guests[0], guests[1] = append(guests[0], f.to(s)), append(guests[1], f.from(s))
		}
	}
	peerReasons := []string{"peer_junk", "peer_short", "peer_version", "peer_type", "peer_tag", "peer_term", "peer_epoch"}
	programs := []struct {
		prog *ebpf.Program
		mode bpf.LockstepLsMode
		from int // of the guest; 2, 3: frames of S, of P
		may  map[uint32][]string
	}{
		{k.LsPriOut, hold, 1, map[uint32][]string{next: {"passed", "primary_only"}, redirect: {"announced"}, drop: {"held", "held_ack", "malformed"}}},
		{k.LsPriOut, shut, 1, map[uint32][]string{drop: {"shut"}}},
		{k.LsSecOut, run, 1, map[uint32][]string{redirect: {"record_out", "neigh_out", "pending"}, drop: {"svm_only", "pending", "malformed"}}},
		{k.LsSecOut, park, 1, map[uint32][]string{drop: {"shut"}}},
		{k.LsMirror, hold, 0, map[uint32][]string{next: {"mirrored"}}},
		{k.LsMirror, run, 0, map[uint32][]string{drop: {"shut"}}},
		{k.LsSecIn, run, 0, map[uint32][]string{redirect: {"delivered"}, drop: peerReasons}},
		{k.LsSecIn, park, 0, map[uint32][]string{drop: append(peerReasons, "parked")}},
		{k.LsSecGate, run, 0, map[uint32][]string{drop: {"gated"}}},
		{k.LsSecGate, solo, 0, map[uint32][]string{next: {"passed"}}},
		{k.LsDigestRx, hold, 2, map[uint32][]string{drop: append(peerReasons, "record_in", "echo_in")}},
		{k.LsDigestRx, hold, 0, map[uint32][]string{drop: peerReasons}},
		{k.LsSecIn, run, 3, map[uint32][]string{drop: append(peerReasons, "record_in", "nack_in"), redirect: {"delivered", "echo_out", "record_out"}}},
	}
	before := k.counters()
	taken, n, rounds := 0, 0, 900
	if soaking {
		rounds *= 50
	}
	for round := range rounds {
		for _, p := range programs {
			k.conf.LeaseUntil = math.MaxUint64
			muted := round%4 == 3
			if muted && p.mode != solo {
				k.conf.LeaseUntil = 1
			}
			k.setMode(p.mode)
			var frame, rec []byte // rec: what makes the frame genuine
			switch p.from {
			case 2, 3:
				dir, types := s2p, []uint8{data, answer, dgram, neigh, echo}
				if p.from == 3 {
					dir, types = p2s, []uint8{announce, ask, mark, nack, echo}
				}
				g := randRec(r, types[r.IntN(5)], dir, r.IntN(boundMax+1)*r.IntN(2))
				if g.Type == nack {
					g.Stride, g.Sum = 0, [2]uint64{1, 0}
				} else if g.Type == echo {
					g.Sum[0] = 0
				}
				frame = k.fromPeer(g)
				rec = bytes.Clone(frame[54:])
			default:
				frame = guests[p.from][r.IntN(len(guests[p.from]))]
			}
			frame = spoiled(r, frame)
			gso := [8]uint32{5: 1, 6: 536, 7: 1448}[r.IntN(8)]
			if p.prog == k.LsMirror {
				gso = 0 // a device would have to segment its clone, and such a frame has no type
			}
			verdict, out, mark := k.run(p.prog, input{frame: frame, gsoSize: gso})
			n++
			now := k.counters()
			moved := make(counts)
			for name := range now {
				if d := now[name] - before[name]; d > 0 {
					moved[name] = d
				}
			}
			before = now
			fail := func(what string) {
				t.Helper()
				t.Fatalf("LOCKSTEP_SEED=%d, round %d, %s in mode %d: %s: verdict %d, counted %v\n% x", seed, round, p.prog, p.mode, what, int32(verdict), moved, frame)
			}
			if moved.total() != 1 {
				fail("counters")
			}
			var reason string
			for reason = range moved {
			}
			// Both programs of the guest's output, against the model.
			m := model(frame, p.from == 0)
			guests := p.prog == k.LsPriOut && p.mode == hold || p.prog == k.LsSecOut && p.mode == run
			leaves := frame
			if p.prog != k.LsSecIn && p.prog != k.LsDigestRx && !slices.Contains([]string{"shut", "gated"}, reason) {
				leaves = m.Frame
			}
			if muted && p.prog == k.LsPriOut && p.mode == hold && m.mayLeave() && reason == "muted" && verdict == drop {
				continue
			}
			if guests && !slices.Contains(m.reasons(p.prog == k.LsPriOut), reason) {
				fail(fmt.Sprintf("the model has %v", m.reasons(p.prog == k.LsPriOut)))
			}
			if !slices.Contains(p.may[verdict], reason) {
				fail("reason")
			}
			if p.prog == k.LsPriOut && verdict == next && (muted || !m.mayLeave()) {
				fail("left")
			}
			if verdict == redirect {
				if ok := reason == "delivered"; ok != (mark == markIn) || !ok && !k.signed(out) {
					fail("frame that leaves")
				}
			} else if !bytes.Equal(out, leaves) && reason != "record_in" {
				fail("frame changed")
			}
			isPeer := len(frame) > 18 && bytes.Equal(frame[12:18], []byte{0x88, 0xb5, 0x4c, 0x53, 54, 0})
			genuine := rec != nil && isPeer && len(frame) >= 54+len(rec) && bytes.Equal(frame[54:54+len(rec)], rec)
			if in := slices.Contains([]string{"record_in", "echo_in", "echo_out", "nack_in"}, reason) || p.from == 3 && reason == "record_out"; in != genuine {
				fail("genuine")
			} else if in {
				taken++
			}
			evs := k.events()
			for _, e := range evs {
				switch ev := e.(type) {
				case *bpf.LockstepLsEv:
					if ev.Slot != noSlot {
						if got := k.slot(ev.Slot); !bytes.Equal(got, leaves) {
							fail("slot")
						}
					}
					if what := m.differs(ev, k.sum); guests && what != "" {
						fail(what + " of the event, by the model")
					}
				case *bpf.LockstepLsEvRec:
					if !genuine || !bytes.Equal(structBytes(&ev.Rec)[:len(rec)], rec) {
						fail("record in the ring")
					}
				}
			}
			reported := slices.Contains([]string{"held", "held_ack", "announced", "parked"}, reason) || reason == "record_in" && rec != nil && rec[9] != announce
			if reported && len(evs) != 1 || len(evs) > 1 {
				fail("events")
			}
		}
	}
	k.none()
	if used := k.used(); used != 0 {
		t.Errorf("%d slots left", used)
	}
	if t.Logf("%d frames, %d genuine records", n, taken); taken < 200 || n < 10000 {
		t.Error("too few frames")
	}
}
