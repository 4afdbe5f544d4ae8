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

const (
	data     = uint8(bpf.LockstepLsRecTypeLS_REC_DATA)
	announce = uint8(bpf.LockstepLsRecTypeLS_REC_ANNOUNCE)
	ask      = uint8(bpf.LockstepLsRecTypeLS_REC_ASK)
	answer   = uint8(bpf.LockstepLsRecTypeLS_REC_ANSWER)
	dgram    = uint8(bpf.LockstepLsRecTypeLS_REC_DGRAM)
	neigh    = uint8(bpf.LockstepLsRecTypeLS_REC_NEIGH)
	nack     = uint8(bpf.LockstepLsRecTypeLS_REC_NACK)
	echo     = uint8(bpf.LockstepLsRecTypeLS_REC_ECHO)
	mark     = uint8(bpf.LockstepLsRecTypeLS_REC_MARK)
	p2s      = uint8(bpf.LockstepLsDirLS_DIR_P2S)
	s2p      = uint8(bpf.LockstepLsDirLS_DIR_S2P)

	inherited = uint8(bpf.LockstepLsRecFlagLS_REC_INHERITED)
	boundMax  = int(bpf.LockstepLsConstLS_BOUND_MAX)
	recOffMax = int(bpf.LockstepLsConstLS_REC_OFF_MAX)
)

// randRec is a record that the other host could have sent, with nsum boundaries.
func randRec(r *rand.Rand, typ, dir uint8, nsum int) *bpf.LockstepLsRec {
	rec := new(bpf.LockstepLsRec)
	copy(structBytes(rec), randBytes(r, recBase+nsum*16))
	rec.Version, rec.Type, rec.Dir = abiVersion, typ, dir
	rec.KeyGen, rec.Epoch = keyGen, epoch
	rec.Nsum, rec.Optlen = uint16(nsum), uint8(r.IntN(41))
	return rec
}

// Records that are right come out as they are; the tags are dchest/siphash's.
func TestRecordIn(t *testing.T) {
	k := newKit(t)
	r := rand.New(rand.NewPCG(3, 4))
	progs := []struct {
		name  string
		mode  bpf.LockstepLsMode
		dir   uint8
		types []uint8
	}{
		{"ls_digest_rx", hold, s2p, []uint8{data, answer, dgram, neigh}},
		{"ls_sec_in", run, p2s, []uint8{ask, mark}},
		{"ls_sec_in", park, p2s, []uint8{ask, mark}},
	}
	for _, p := range progs {
		prog := k.LsDigestRx
		if p.name == "ls_sec_in" {
			prog = k.LsSecIn
		}
		for _, typ := range p.types {
			k.setMode(p.mode)
			for nsum := range boundMax + 1 {
				rec := randRec(r, typ, p.dir, nsum)
				rec.Epoch += uint32(nsum & 1) // the next epoch may have begun there
				k.number(rec, []uint16{0, streamMax - 1, userStream}[nsum%3])
				off := 18 + 2*r.IntN((recOffMax-18)/2+1)
				frame := peerFrame(make([]byte, off), off, sign(rec, k.sipRx), ownMAC, peerMAC)
				frame = append(frame, make([]byte, nsum%3)...) // padding
				k.check(prog, frame, drop, "record_in")
				ev := one[*bpf.LockstepLsEvRec](k)
				if diff := cmp.Diff(rec, &ev.Rec); diff != "" || ev.At == 0 {
					t.Fatalf("%s, %d boundaries: (-want +got)\n%s", p.name, nsum, diff)
				}
			}
		}
	}
}

func TestRecordRefused(t *testing.T) {
	k := newKit(t)
	r := rand.New(rand.NewPCG(5, 6))
	for _, p := range []struct {
		name     string
		mode     bpf.LockstepLsMode
		dir, typ uint8
		bad      []uint8 // types of the other direction
	}{
		{"ls_digest_rx", hold, s2p, data, []uint8{announce, ask, nack, mark, 0, 10, 31, 32 + data, 255}},
		{"ls_sec_in", run, p2s, ask, []uint8{data, answer, dgram, neigh, 0, 10, 31, 32 + ask, 255}},
	} {
		t.Run(p.name, func(t *testing.T) {
			k.TB = t
			k.setMode(p.mode)
			prog := k.LsDigestRx
			if p.name == "ls_sec_in" {
				prog = k.LsSecIn
			}
			good := randRec(r, p.typ, p.dir, 2)
			good.TcpFlags &^= syn // which has only half of the ring
			refuse := func(reason string, change func(rec *bpf.LockstepLsRec)) {
				t.Helper()
				rec := *good
				change(&rec)
				k.check(prog, k.fromPeer(&rec), drop, reason)
			}
			refuse("peer_version", func(rec *bpf.LockstepLsRec) { rec.Version++ })
			refuse("peer_type", func(rec *bpf.LockstepLsRec) { rec.Dir ^= 1 })
			refuse("peer_type", func(rec *bpf.LockstepLsRec) { rec.Dir = 2 })
			for _, typ := range p.bad {
				refuse("peer_type", func(rec *bpf.LockstepLsRec) { rec.Type = typ })
			}
			refuse("peer_term", func(rec *bpf.LockstepLsRec) { rec.KeyGen++ })
			refuse("peer_epoch", func(rec *bpf.LockstepLsRec) { rec.Epoch += 2 })
			refuse("peer_epoch", func(rec *bpf.LockstepLsRec) { rec.Epoch-- })
			refuse("peer_short", func(rec *bpf.LockstepLsRec) { rec.Optlen = 41 })

			frame := k.fromPeer(good)
			recEnd := len(frame)
			for n := 14; n < recEnd; n++ {
				k.check(prog, frame[:n], drop, "peer_short")
			}
			for i := 54; i < recEnd; i++ { // no bit of the record may change
				b := bytes.Clone(frame)
				b[i] ^= 0x80 >> (r.IntN(8) * strict(i-54))
				k.expect(counts{refusal(i - 54): 1}, func() {
					if v, _, _ := k.run(prog, input{frame: b}); v != drop {
						t.Errorf("byte %d: verdict %d", i-54, int32(v))
					}
				})
			}
			lie := func(reason string, change func(b []byte)) {
				t.Helper()
				b := bytes.Clone(frame)
				change(b)
				k.check(prog, b, drop, reason)
			}
			lie("peer_junk", func(b []byte) { b[14]++ })
			lie("peer_junk", func(b []byte) { b[15]++ })
			for _, off := range []int{0, 14, 17, recOffMax + 1, 0x1234, 0xffff} {
				lie("peer_junk", func(b []byte) { b[16], b[17] = byte(off), byte(off>>8) })
			}
			lie("peer_short", func(b []byte) { be.PutUint16(b[54+12:], 0) })
			k.none()

			// The other host's own tag does not do: directions have their keys.
			rec := *good
			k.check(prog, peerFrame(make([]byte, 54), 54, sign(&rec, k.sipTx), ownMAC, peerMAC), drop, "peer_tag")

			k.conf.KeyIndex ^= 1 // keys of another key generation
			k.setConf()
			k.check(prog, frame, drop, "peer_tag")
			k.conf.KeyIndex ^= 1
			k.setConf()
			for full := k.counters()["no_ring"]; k.counters()["no_ring"] == full; {
				k.run(prog, input{frame: k.fromPeer(good)})
			}
			k.check(prog, k.fromPeer(good), drop, "no_ring")
			k.events()
		})
	}
}

// refusal is why a record with byte i changed is refused.
func refusal(i int) string {
	switch i {
	case 8:
		return "peer_version"
	case 9, 10:
		return "peer_type"
	case 12, 13: // len
		return "peer_short"
	case 24, 25, 26, 27:
		return "peer_term"
	case 95, 100, 101: // optlen, nsum
		return "peer_short"
	}
	return "peer_tag"
}

// strict: 0 for bytes that another valid value must not take the place of.
func strict(i int) int {
	if i == 9 || i == 95 {
		return 0
	}
	return 1
}

func TestPeerModes(t *testing.T) {
	k := newKit(t)
	r := rand.New(rand.NewPCG(7, 8))
	junk := flows["IPv4"].to(seg{flags: ack})
	for _, m := range []bpf.LockstepLsMode{shut, run, park, solo} {
		k.setMode(m)
		k.check(k.LsDigestRx, k.fromPeer(randRec(r, data, s2p, 0)), drop, "shut")
		k.check(k.LsDigestRx, junk, drop, "shut")
	}
	for _, m := range []bpf.LockstepLsMode{shut, hold, solo} {
		k.setMode(m)
		k.check(k.LsSecIn, k.fromPeer(randRec(r, ask, p2s, 0)), drop, "shut")
		k.check(k.LsSecIn, junk, drop, "shut")
	}
	k.setMode(hold)
	k.check(k.LsDigestRx, junk, drop, "peer_junk")
	k.setMode(run)
	own := bytes.Clone(junk) // P's network stack speaking for itself
	copy(own[6:], peerMAC[:])
	k.check(k.LsSecIn, own, drop, "peer_junk")
	k.none()
}

// The digest in the programs is the one of the compare core, wherever a segment
// begins and ends.
func TestDigest(t *testing.T) {
	k := newKit(t)
	k.setMode(hold)
	r := rand.New(rand.NewPCG(9, 10))
	f := flows["IPv4"]
	for i := range 400 {
		payload := randBytes(r, 1+r.IntN(3600))
		switch i % 4 {
		case 1:
			clear(payload)
		case 2: // the largest sums
			for i := range payload {
				payload[i] = 0xff
			}
		}
		seq := r.Uint32()
		if i%3 == 0 {
			seq = -uint32(r.IntN(4000)) // over the wrap
		}
		if v, _, _ := k.run(k.LsPriOut, input{frame: f.from(seg{seq: seq, flags: ack, payload: payload})}); v != drop {
			t.Fatalf("verdict %d", int32(v))
		}
		ev := one[*bpf.LockstepLsEv](k)
		k.slot(ev.Slot)
		if want := k.sum(seq, payload); ev.Sum != want {
			t.Fatalf("%d bytes at %d: sum %x, want %x", len(payload), seq, ev.Sum, want)
		}
	}
}

// The kernel's sums of a stream's segments add up to the core's sum of the whole, however the
// stream is cut and wherever it begins.
func TestDigestLaw(t *testing.T) {
	k := newKit(t)
	k.setMode(hold)
	r := rand.New(rand.NewPCG(13, 14))
	f := flows["IPv6"]
	for align := range 16 {
		stream := randBytes(r, 1+r.IntN(64<<10))
		clear(stream[len(stream)/2:][:len(stream)/4])
		pos := -uint32(r.IntN(len(stream)))&^15 | uint32(align) // over the wrap
		var sum [2]uint64
		for at := 0; at < len(stream); {
			n := min(1+r.IntN([]int{7, 1448, 3400}[r.IntN(3)]), len(stream)-at)
			if v, _, _ := k.run(k.LsPriOut, input{frame: f.from(seg{seq: pos + uint32(at), flags: ack, payload: stream[at : at+n]})}); v != drop {
				t.Fatalf("verdict %d", int32(v))
			}
			ev := one[*bpf.LockstepLsEv](k)
			k.slot(ev.Slot)
			sum[0], sum[1] = sum[0]+ev.Sum[0], sum[1]+ev.Sum[1]
			at += n
		}
		if want := k.sum(pos, stream); sum != want {
			t.Fatalf("%d bytes at %#x: the segments' sums add up to %x, the whole has %x", len(stream), pos, sum, want)
		}
	}
}

// bounds are the boundaries that a record has for a GSO payload at pos.
func (k *kit) bounds(pos uint32, payload []byte, gso int) (stride, n int, b [boundMax][2]uint64) {
	if gso == 0 {
		return 0, 0, b
	}
	for stride = gso; (len(payload)-1)/stride > boundMax; {
		stride += gso
	}
	for ; (n+1)*stride < len(payload); n++ {
		b[n] = k.sum(pos, payload[:(n+1)*stride])
	}
	if n == 0 {
		stride = 0
	}
	return stride, n, b
}

func TestSecOutBoundaries(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	r := rand.New(rand.NewPCG(11, 12))
	for _, gso := range []int{1, 2, 7, 70, 71, 72, 73, 74, 100, 536, 1448, 1749, 1750, 1751, 3499, 3500, 3501, 60000} {
		for _, n := range []int{1, 2, 3, 49, 50, 1448, 3499, 3500} {
			t.Run(fmt.Sprintf("%d by %d", n, gso), func(t *testing.T) {
				k.TB = t
				f := flows["IPv6"]
				s := seg{seq: -uint32(r.IntN(n)), ack: 3, flags: ack, payload: randBytes(r, n)}
				frame := f.from(s)
				var verdict uint32
				var out []byte
				k.expect(counts{"record_out": 1}, func() {
					verdict, out, _ = k.run(k.LsSecOut, input{frame: frame, gsoSize: uint32(gso)})
				})
				stride, nsum, bound := k.bounds(s.seq, s.payload, gso)
				want := k.record(&bpf.LockstepLsRec{
					Type: data, Dir: s2p, Flags: inherited, T: f.tuple(), Seq: s.seq, End: s.end(), Ack: 3, TcpFlags: ack,
					Sum: k.sum(s.seq, s.payload), Stride: uint32(stride), Nsum: uint16(nsum), Bound: bound,
				}, out, frame, 74)
				if verdict != redirect || !bytes.Equal(out, want) {
					t.Errorf("verdict %d, frame\n% x, want\n% x", int32(verdict), out, want)
				}
				ev := one[*bpf.LockstepLsEv](k)
				if got := k.slot(ev.Slot); !bytes.Equal(got, frame) || int(ev.GsoSize) != gso {
					t.Errorf("copy with gso_size %d is\n% x", ev.GsoSize, got)
				}
			})
		}
	}
}
