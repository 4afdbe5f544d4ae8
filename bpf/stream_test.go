// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/lockstep-ft/lockstep/bpf"
)

const window = uint64(bpf.LockstepLsConstLS_WINDOW)

// numbered is a record of stream's number no, of S to P.
func numbered(stream uint16, no uint64) *bpf.LockstepLsRec {
	return &bpf.LockstepLsRec{Version: abiVersion, Type: data, Dir: s2p, KeyGen: keyGen, Epoch: epoch, Stream: stream, StreamNo: no}
}

// asked gives P the frame of r and expects it to be taken and a NACK of [first, last].
func (k *kit) asked(r *bpf.LockstepLsRec, first, last uint64) {
	k.Helper()
	frame := k.wire(r)
	var verdict uint32
	var out []byte
	k.expect(counts{"record_in": 1, "nack_out": 1}, func() { verdict, out, _ = k.run(k.LsDigestRx, input{frame: frame}) })
	want := k.record(&bpf.LockstepLsRec{Type: nack, Dir: p2s, Stride: uint32(r.Stream), Sum: [2]uint64{first, last}}, out, frame, 54)
	if verdict != redirect || !bytes.Equal(out, want) {
		k.Errorf("verdict %d, NACK\n% x, want\n% x", int32(verdict), out, want)
	}
	one[*bpf.LockstepLsEvRec](k)
}

// R6: whoever leaves numbers out is asked for them, once, in place of the frame that
// showed the gap. User space numbers its own and repeats by itself.
func TestNack(t *testing.T) {
	k := newKit(t)
	k.setMode(hold)
	taken := func(stream uint16, no uint64) {
		t.Helper()
		k.check(k.LsDigestRx, k.wire(numbered(stream, no)), drop, "record_in")
		one[*bpf.LockstepLsEvRec](k)
	}
	for _, stream := range []uint16{0, 1, streamMax - 1} {
		taken(stream, 5) // a key generation's first number is as good as any
		taken(stream, 6)
		k.asked(numbered(stream, 8), 7, 7)
		taken(stream, 9)
		taken(stream, 7) // sent again
		k.asked(numbered(stream, 200), 10, 199)
		k.asked(numbered(stream, 200+5*window), 201, 199+5*window)
	}
	taken(userStream, 1)
	taken(userStream, 9)

	// A full ring loses the record; what is missing before it is asked for all the same.
	for no := uint64(10); k.counters()["no_ring"] == 0; no++ {
		k.run(k.LsDigestRx, input{frame: k.wire(numbered(userStream, no))})
	}
	k.expect(counts{"no_ring": 1, "nack_out": 1}, func() { k.run(k.LsDigestRx, input{frame: k.wire(numbered(0, 1<<40))}) })
}

// Every number is taken once, in any order within the window.
func TestWindow(t *testing.T) {
	k := newKit(t)
	k.setMode(hold)
	give := func(stream uint16, no uint64, want string) {
		t.Helper()
		moved := k.counters()
		v, _, _ := k.run(k.LsDigestRx, input{frame: k.wire(numbered(stream, no))})
		now := k.moved(moved)
		delete(now, "nack_out")
		if now.total() != 1 || now[want] != 1 {
			t.Errorf("stream %d, number %d: counted %v, want %s", stream, no, now, want)
		}
		if want != "record_in" && v != drop {
			t.Errorf("stream %d, number %d: verdict %d", stream, no, int32(v))
		}
		if evs := k.events(); len(evs) != int(now["record_in"]) {
			t.Errorf("stream %d, number %d: %d events", stream, no, len(evs))
		}
	}
	for _, stream := range []uint16{0, streamMax - 1, userStream} {
		top := uint64(5000)
		give(stream, top, "record_in")
		give(stream, top, "peer_replay")
		oldest := (top/64 - window/64 + 1) * 64 // words are forgotten whole
		give(stream, oldest-1, "peer_replay")
		give(stream, oldest, "record_in")
		give(stream, oldest, "peer_replay")
		give(stream, 0, "peer_replay")
		for no := top - 1; no > top-200; no-- {
			give(stream, no, "record_in")
			give(stream, no, "peer_replay")
		}
		// Words are reused, without their old bits.
		for _, step := range []uint64{1, 63, 64, 65, window - 64, window - 1, window, window + 1, 3*window + 7, 1 << 40} {
			top += step
			give(stream, top, "record_in")
			for back := uint64(1); back < window-64 && back < step; back += 61 {
				give(stream, top-back, "record_in")
				give(stream, top-back, "peer_replay")
			}
			give(stream, top, "peer_replay")
			give(stream, top-window-64, "peer_replay")
		}
		give(stream, math.MaxUint64, "record_in")
		give(stream, math.MaxUint64, "peer_replay")
	}
	for _, stream := range []uint16{streamMax, streamMax + 1, userStream - 1} {
		give(stream, 1, "peer_replay")
		give(stream, 2, "peer_replay")
	}
}

// What was sent again comes beside the original, in either order, and that is nobody's
// replay; whoever repeats one of both once more is.
func TestWindowAgain(t *testing.T) {
	k := newKit(t)
	k.setMode(hold)
	give := func(no uint64, again bool, want string) {
		t.Helper()
		r := numbered(2, no)
		if again {
			r.Flags = uint8(bpf.LockstepLsRecFlagLS_REC_RETX)
		}
		k.check(k.LsDigestRx, k.wire(r), drop, want)
		k.events()
	}
	give(5000, false, "record_in")
	for range 3 { // asked for as the stream's newest
		give(5000, true, "peer_again")
	}
	give(5000, false, "peer_replay")
	give(5001, true, "record_in")
	give(5001, false, "peer_again") // overtaken
	give(5001, false, "peer_replay")
	give(5000-2*window, true, "peer_again") // too late
	give(5000-2*window, false, "peer_replay")
	// A number in a word that is used again.
	give(5002, true, "record_in")
	for no := uint64(5003); no < 5002+window+64; no++ {
		give(no, false, "record_in")
	}
	give(5002+window, false, "peer_replay")
}

// Numbers at random, against a set.
func TestWindowRandom(t *testing.T) {
	k := newKit(t)
	k.setMode(hold)
	r := rand.New(rand.NewPCG(31, 32))
	seen := make(map[uint64]bool)
	var top uint64
	for range 4000 {
		no := 1 + max(top, window) - window + r.Uint64N(window+100)
		if r.IntN(50) == 0 {
			no = top + r.Uint64N(3*window)
		}
		fresh := !seen[no] && (top == 0 || no/64+window/64 > top/64)
		before := k.counters()
		k.run(k.LsDigestRx, input{frame: k.wire(numbered(3, no))})
		if got := k.moved(before)["record_in"] == 1; got != fresh {
			t.Fatalf("number %d after %d: taken %v, want %v", no, top, got, fresh)
		}
		if seen[no] = true; no > top {
			top = no
		}
		k.events()
	}
}

// Keys change: the old key generation is taken for a while, by its own keys, until its stream
// has seen the new one.
func TestRotation(t *testing.T) {
	k := newKit(t)
	k.conf.Mode = uint32(hold)
	var keys bpf.LockstepLsKeys
	if err := k.LsKeys.Lookup(uint32(1), &keys); err != nil {
		t.Fatal(err)
	}
	old := [2]uint64{77, 78}
	keys.SipRx = old
	if err := k.LsKeys.Put(uint32(0), &keys); err != nil {
		t.Fatal(err)
	}
	give := func(stream uint16, no uint64, ofGen uint32, key [2]uint64, reason string) {
		t.Helper()
		rec := numbered(stream, no)
		rec.KeyGen = ofGen
		k.check(k.LsDigestRx, peerFrame(make([]byte, 54), 54, sign(rec, key), ownMAC, peerMAC), drop, reason)
		k.events()
	}
	hour := uint64(time.Hour)
	k.setConf()
	give(0, 1, keyGen-1, old, "peer_term")
	k.conf.OldUntil = bootNow(t) + hour
	k.setConf()
	give(0, 1, keyGen-1, old, "record_in")
	give(0, 1, keyGen-1, old, "peer_replay")
	give(0, 2, keyGen-1, k.sipRx, "peer_tag")
	give(0, 2, keyGen, old, "peer_tag")
	give(0, 2, keyGen-2, old, "peer_term")
	give(0, 2, keyGen+1, k.sipRx, "peer_term")
	give(1, 9, keyGen-1, old, "record_in")
	give(0, 1, keyGen, k.sipRx, "record_in") // begins afresh
	give(0, 2, keyGen, k.sipRx, "record_in")
	give(0, 3, keyGen-1, old, "peer_replay") // over, for this stream
	give(1, 10, keyGen-1, old, "record_in")
	k.conf.OldUntil = bootNow(t)
	k.setConf()
	give(1, 11, keyGen-1, old, "peer_term")
	give(1, 11, keyGen, k.sipRx, "record_in")
}

// R6: S retransmits the records that it kept, without their boundaries, and counts those
// that it does not have any more.
func TestLiveResend(t *testing.T) {
	l := newLab(t)
	k := l.kit()
	k.setMode(run)
	pin(t)
	f := flows["IPv4"]
	var sent []*bpf.LockstepLsRec
	stream := uint16(0)
	send := func(n, gso int) {
		t.Helper()
		s := seg{seq: uint32(1000 * len(sent)), ack: 5, flags: ack, win: 6, opts: timestamps(1, 2), payload: make([]byte, n)}
		_, out, _ := k.run(k.LsSecOut, input{frame: f.from(s), gsoSize: uint32(gso)})
		rec := segRecord(f, s, 0)
		rec.Flags, rec.Sum = inherited, k.sum(s.seq, s.payload)
		rec.Version, rec.KeyGen, rec.Epoch, rec.StreamNo = abiVersion, keyGen, epoch, uint64(len(sent)+1)
		stream = uint16(out[74+14]) | uint16(out[74+15])<<8
		rec.Stream = stream
		sent = append(sent, rec)
		for _, e := range k.events() {
			k.slot(e.(*bpf.LockstepLsEv).Slot)
		}
	}
	request := func(stream uint16, first, last uint64) []byte {
		return k.fromPeer(&bpf.LockstepLsRec{
			Version: abiVersion, Type: nack, Dir: p2s, KeyGen: keyGen, Epoch: epoch + 7, Stride: uint32(stream), Sum: [2]uint64{first, last},
		})
	}
	again := func(frame []byte, want counts, recs ...*bpf.LockstepLsRec) {
		t.Helper()
		want["nack_in"] = 1
		if len(recs) > 0 {
			want["resent"] = uint64(len(recs))
		}
		k.expect(want, func() {
			if v, _, _ := k.run(k.LsSecIn, input{frame: frame}); v != drop {
				t.Errorf("verdict %d", int32(v))
			}
		})
		for _, rec := range recs {
			rec := *rec
			rec.Flags |= uint8(bpf.LockstepLsRecFlagLS_REC_RETX)
			_, got := l.read(l.far)
			if want := peerFrame(frame, 54, sign(&rec, k.sipTx), peerMAC, ownMAC)[:54+recBase]; !bytes.Equal(got, want) {
				t.Errorf("record %d again\n% x, want\n% x", rec.StreamNo, got, want)
			}
		}
		l.empty(l.far)
	}
	for i := range 10 {
		send(100*i, 0)
	}
	send(3000, 100) // with boundaries
	again(request(stream, 3, 5), counts{}, sent[2:5]...)
	again(request(stream, 11, 11), counts{}, sent[10])
	again(request(stream, 11, 13), counts{"resend_gone": 2}, sent[10]) // not sent yet
	again(request(stream, 6, 5), counts{})
	again(request(stream, 0, 0), counts{"resend_gone": 1}) // not a number
	again(request(uint16(bpf.LockstepLsConstLS_STREAM_ALL), 0, 0), counts{}, sent[10])
	again(request(streamMax-1, 1, 2), counts{}) // no such CPU

	kept := int(bpf.LockstepLsConstLS_SENT)
	for len(sent) < kept+3 {
		send(0, 0)
	}
	again(request(stream, 2, 4), counts{"resend_gone": 2}, sent[3])
	most := int(bpf.LockstepLsConstLS_RESEND_MAX)
	again(request(stream, 100, uint64(kept)), counts{}, sent[99:99+most]...)
	k.conf.KeyGen++ // of an older key generation nothing is sent
	k.setConf()
	r := &bpf.LockstepLsRec{Version: abiVersion, Type: nack, Dir: p2s, KeyGen: keyGen + 1, Stride: uint32(stream), Sum: [2]uint64{100, 101}}
	again(k.fromPeer(r), counts{"resend_gone": 2})
}

// The newest record of every stream comes again, on hosts of more than 64 CPUs too.
func TestLiveResendManyLanes(t *testing.T) {
	const streams = 100
	l := newLab(t)
	k := l.kit(func(s *ebpf.CollectionSpec) {
		s.Maps["ls_lane"].MaxEntries, s.Maps["ls_sent"].MaxEntries = streams, streams*kept
	})
	k.setMode(run)
	for stream := range uint32(streams) {
		no := uint64(kept) + 7 // their place is used again
		rec := numbered(uint16(stream), no)
		rec.Len = uint16(recBase)
		sent := bpf.LockstepLsSent{No: no}
		copy(sent.Rec[:], structBytes(rec))
		if err := k.LsSent.Put(stream*kept+uint32(no)%kept, &sent); err != nil {
			t.Fatal(err)
		}
		if err := k.LsLane.Put(stream, &bpf.LockstepLsTxStream{No: no}); err != nil {
			t.Fatal(err)
		}
	}
	frame := k.fromPeer(&bpf.LockstepLsRec{
		Version: abiVersion, Type: nack, Dir: p2s, KeyGen: keyGen, Epoch: epoch, Stride: uint32(bpf.LockstepLsConstLS_STREAM_ALL),
	})
	k.expect(counts{"nack_in": 1, "resent": streams}, func() { k.run(k.LsSecIn, input{frame: frame}) })
	for stream := range uint16(streams) {
		_, got := l.read(l.far)
		rec := numbered(stream, uint64(kept)+7)
		rec.Flags |= uint8(bpf.LockstepLsRecFlagLS_REC_RETX)
		if want := peerFrame(frame, 54, sign(rec, k.sipTx), peerMAC, ownMAC)[:54+recBase]; !bytes.Equal(got, want) {
			t.Fatalf("stream %d\n% x, want\n% x", stream, got, want)
		}
	}
	l.empty(l.far)
}
