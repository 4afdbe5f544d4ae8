// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/dchest/siphash"

	"github.com/lockstep-ft/lockstep/bpf"
)

// odd is a record whose fields say what the other host's programs never would.
func odd(r *rand.Rand, rec *bpf.LockstepLsRec) {
	wild := func() uint64 {
		return []uint64{0, 1, r.Uint64N(100), 1 << 31, math.MaxUint32, 1 << 63, math.MaxUint64 - 1, math.MaxUint64, r.Uint64()}[r.IntN(9)]
	}
	for range r.IntN(4) {
		switch r.IntN(14) {
		case 0:
			rec.Type = uint8(r.IntN(12)) | uint8(r.IntN(8)/7)<<5
		case 1:
			rec.Dir = uint8(r.IntN(3))
		case 2:
			rec.Version += uint8(r.IntN(2))
		case 3:
			rec.Nsum = uint16(wild())
		case 4:
			rec.Optlen = uint8(wild())
		case 5:
			rec.KeyGen = uint32(keyGen + r.IntN(5) - 2)
		case 6:
			rec.Epoch = uint32(epoch + r.IntN(5) - 2)
		case 7:
			rec.Stream = []uint16{uint16(r.IntN(4)), streamMax - 1, streamMax, userStream - 1, userStream, uint16(r.Uint32())}[r.IntN(6)]
		case 8:
			rec.StreamNo = wild()
		case 9:
			rec.Stride = uint32([]uint64{0, uint64(bpf.LockstepLsConstLS_STREAM_ALL), wild()}[r.IntN(3)])
		case 10:
			rec.Sum = [2]uint64{wild(), wild()}
		case 11:
			rec.Flags, rec.TcpFlags = uint8(r.Uint32()), uint8(r.Uint32())
		case 12:
			rec.Seq, rec.End, rec.Inc = uint32(wild()), uint32(wild()), uint32(wild())
		case 13:
			copy(rec.Opts[:], randBytes(r, 40))
		}
	}
}

// refused is why a program for records of direction dir drops the peer frame before it looks
// at the stream's numbers; "": it does not. The order is the programs'.
func refused(frame []byte, dir uint8, key [2]uint64) string {
	if len(frame) < 18 {
		return "peer_short"
	}
	at := int(binary.LittleEndian.Uint16(frame[16:]))
	switch {
	case binary.LittleEndian.Uint16(frame[14:]) != uint16(bpf.LockstepLsConstLS_MAGIC) || at < 18 || at > recOffMax:
		return "peer_junk"
	case len(frame) < at+recBase:
		return "peer_short"
	}
	var rec bpf.LockstepLsRec
	b := frame[at:]
	copy(structBytes(&rec), b)
	types := map[uint8][]uint8{p2s: {announce, ask, nack, echo, mark}, s2p: {data, answer, dgram, neigh, echo}}[dir]
	switch {
	case rec.Version != abiVersion:
		return "peer_version"
	case rec.Dir != dir || !slices.Contains(types, rec.Type):
		return "peer_type"
	case int(rec.Nsum) > boundMax || rec.Optlen > 40 || int(rec.Len) != recBase+16*int(rec.Nsum) || len(b) < int(rec.Len):
		return "peer_short"
	case rec.KeyGen != keyGen:
		return "peer_term"
	case siphash.Hash(key[0], key[1], b[8:rec.Len]) != rec.Tag:
		return "peer_tag"
	case rec.Epoch-epoch > 1 && !slices.Contains([]uint8{echo, nack, mark}, rec.Type):
		return "peer_epoch"
	}
	return ""
}

// Records that say anything, with the tag of the other host and without: those without are
// dropped for the reason that the check's order gives, and those with it have the effect of
// their type or none. Nothing that they say has a guest's frame leave, gives a slot away,
// makes a connection or ends a lease.
func TestFuzzSigned(t *testing.T) {
	l := newLab(t)
	k := l.kit()
	seed, r := fuzzSeed(t)
	k.conf.LeaseDuration = 1000
	drops := []string{"peer_replay", "peer_again", "crowded", "no_ring"}
	type role struct {
		prog *ebpf.Program
		mode bpf.LockstepLsMode
		dir  uint8
		key  [2]uint64
		// The effects of each type that is taken, by counter.
		effects map[uint8][]string
	}
	p := map[uint8][]string{data: {"record_in"}, answer: {"record_in"}, dgram: {"record_in"}, neigh: {"record_in"}, echo: {"echo_in"}}
	s := map[uint8][]string{announce: {"record_in", "record_out"}, ask: {"record_in"}, mark: {"record_in"}, nack: {"nack_in"}, echo: {"echo_out"}}
	roles := []role{{k.LsDigestRx, hold, s2p, k.sipRx, p}, {k.LsSecIn, run, p2s, k.sipRx, s}, {k.LsSecIn, park, p2s, k.sipRx, s}}
	taken, forged, rounds := 0, 0, 12_000
	if soaking {
		rounds *= 50
	}
	for round := range rounds {
		p := roles[r.IntN(len(roles))]
		k.conf.LeaseUntil = 0
		k.setMode(p.mode)
		types := make([]uint8, 0, len(p.effects))
		for typ := range p.effects {
			types = append(types, typ)
		}
		slices.Sort(types) // a seed repeats what it did
		rec := randRec(r, types[r.IntN(len(types))], p.dir, r.IntN(boundMax+1)*r.IntN(2))
		k.number(rec, uint16(r.IntN(3)))
		if rec.Flags = 0; r.IntN(8) == 0 && rec.StreamNo > 2 {
			rec.StreamNo -= uint64(1 + r.IntN(2))
		}
		n := recBase + 16*int(rec.Nsum)
		odd(r, rec)
		if rec.Len = uint16(n); r.IntN(16) == 0 {
			rec.Len = uint16(r.IntN(400))
		}
		b := bytes.Clone(structBytes(rec)[:n])
		binary.LittleEndian.PutUint64(b, siphash.Hash(p.key[0], p.key[1], b[8:]))
		off := 18 + r.IntN(recOffMax-18+1)
		frame := peerFrame(make([]byte, off), off, b, ownMAC, peerMAC)
		switch r.IntN(8) {
		case 0: // forged: no key, another's, or a bit changed behind the signer's back
			switch r.IntN(3) {
			case 0:
				binary.LittleEndian.PutUint64(frame[off:], r.Uint64())
			case 1:
				binary.LittleEndian.PutUint64(frame[off:], siphash.Hash(k.sipTx[0], k.sipTx[1], frame[off+8:]))
			default:
				frame[off+r.IntN(len(b))] ^= 1 << r.IntN(8)
			}
		case 1:
			frame = frame[:14+r.IntN(len(frame)-13)]
		}
		want := refused(frame, p.dir, p.key)
		before := k.counters()
		verdict, out, skbMark := k.run(p.prog, input{frame: frame})
		moved := k.moved(before)
		fail := func(what string) {
			t.Helper()
			t.Fatalf("LOCKSTEP_SEED=%d, round %d, %s in mode %d: %s: verdict %d, counted %v, expected %q\n% x", seed, round, p.prog, p.mode, what, int32(verdict), moved, want, frame)
		}
		var conf bpf.LockstepLsConf
		if err := k.LsConf.Lookup(uint32(0), &conf); err != nil {
			t.Fatal(err)
		}
		evs, events, lease := k.events(), 0, uint64(0)
		got := (*bpf.LockstepLsRec)(unsafe.Pointer(&append(bytes.Clone(frame[min(off, len(frame)):]), make([]byte, 1024)...)[0]))
		if want != "" {
			forged++
			if verdict != drop || moved.total() != 1 || moved[want] != 1 {
				fail("refusal")
			}
		} else {
			effect := ""
			for _, name := range slices.Concat(p.effects[got.Type], drops) {
				if moved[name] == 1 {
					effect = name
					delete(moved, name)
					break
				}
			}
			nacked := moved["nack_out"]
			delete(moved, "nack_out")
			if effect == "nack_in" {
				if moved["resent"] > uint64(bpf.LockstepLsConstLS_RESEND_MAX) && got.Stride != uint32(bpf.LockstepLsConstLS_STREAM_ALL) {
					fail("resent too much")
				}
				delete(moved, "resent")
				delete(moved, "resend_gone")
			}
			leaves := effect == "record_out" || effect == "echo_out" || nacked == 1
			switch {
			case effect == "" || len(moved) > 0 || nacked > 1 || nacked == 1 && p.dir == p2s:
				fail("effect")
			case leaves != (verdict == redirect) || !leaves && verdict != drop || leaves && !k.signed(out):
				fail("what leaves")
			}
			if !slices.Contains(drops, effect) {
				taken++
			}
			if effect == "echo_in" {
				lease = got.Sum[0] + k.conf.LeaseDuration
			}
			if effect == "record_in" && got.Type != announce {
				events = 1
			}
		}
		if len(evs) != events {
			fail("events")
		}
		if events == 1 && !bytes.Equal(structBytes(&evs[0].(*bpf.LockstepLsEvRec).Rec)[:got.Len], structBytes(got)[:got.Len]) {
			fail("event")
		}
		conf.Echoed = k.conf.Echoed
		if k.conf.LeaseUntil = lease; conf != k.conf {
			fail("settings")
		}
		if skbMark != 0 {
			fail("a mark")
		}
		emptyTables(k, fail)
		if round%500 == 0 && k.used() != 0 {
			fail("a slot is taken")
		}
		if round%20 == 19 { // a number may have moved a window beyond what follows
			forgetStreams(k)
		}
	}
	if t.Logf("%d records taken, %d refused", taken, forged); taken < rounds/10 || forged < rounds/10 {
		t.Error("too few of either")
	}
}

// emptyTables fails if there is a connection.
func emptyTables(k *kit, fail func(string)) {
	k.Helper()
	var key bpf.LockstepLsTuple
	if err := k.LsConn.NextKey(nil, &key); err == nil {
		fail("a connection")
	}
}

// forgetStreams has the anti-replay windows begin anew, as with new keys.
func forgetStreams(k *kit) {
	k.Helper()
	for stream := range k.LsWin.MaxEntries() {
		if stream > 4 && stream < uint32(streamMax)-1 {
			continue
		}
		if err := k.LsWin.Put(stream, make([]byte, k.LsWin.ValueSize())); err != nil {
			k.Fatal(err)
		}
	}
	clear(k.sent)
}
