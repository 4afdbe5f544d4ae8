// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"slices"

	"github.com/dchest/siphash"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// record is one of the peer's, with a number that may have been there.
func (d *duel) record() bpf.LockstepLsRec {
	f := pick(d.Rand, d.flows...)
	r := bpf.LockstepLsRec{Version: version, Dir: dirP2S, KeyGen: d.session.Term, Epoch: duelEpoch + uint32(d.IntN(3)), T: f.tuple(), Stream: streamUser}
	r.Type = uint8(pick(d.Rand, bpf.LockstepLsRecTypeLS_REC_ANNOUNCE, bpf.LockstepLsRecTypeLS_REC_ANNOUNCE, bpf.LockstepLsRecTypeLS_REC_ASK,
		bpf.LockstepLsRecTypeLS_REC_NACK, bpf.LockstepLsRecTypeLS_REC_NACK, bpf.LockstepLsRecTypeLS_REC_ECHO, bpf.LockstepLsRecTypeLS_REC_MARK))
	if d.primary {
		r.Dir, r.Stream = dirS2P, pick[uint16](d.Rand, 0, 0, 1, streamUser, 2000)
		r.Type = uint8(pick(d.Rand, bpf.LockstepLsRecTypeLS_REC_DATA, bpf.LockstepLsRecTypeLS_REC_DATA, bpf.LockstepLsRecTypeLS_REC_ANSWER,
			bpf.LockstepLsRecTypeLS_REC_DGRAM, bpf.LockstepLsRecTypeLS_REC_NEIGH, bpf.LockstepLsRecTypeLS_REC_ECHO))
	}
	s := d.segment(false, d.pvm, d.pvm)
	r.Seq, r.Inc, r.End, r.Ack, r.Win, r.TcpFlags = s.seq, s.seq, s.seq+1, s.ack, s.win, s.flags
	r.Optlen = uint8(copy(r.Opts[:], s.opts))
	r.Sum = [2]uint64{d.Uint64(), d.Uint64()}
	switch bpf.LockstepLsRecType(r.Type) {
	case bpf.LockstepLsRecTypeLS_REC_NACK:
		r.Stride = pick(d.Rand, 0, 0, streamAll, 5)
		r.Sum[0] = uint64(d.IntN(int(d.n.m.streamNo) + 2))
		r.Sum[1] = r.Sum[0] + uint64(d.IntN(6))
	case bpf.LockstepLsRecTypeLS_REC_ANNOUNCE:
		r.TcpFlags = pick[uint8](d.Rand, syn, syn|ack)
		r.Ack = pick(d.Rand, d.cli...) + 1
	case bpf.LockstepLsRecTypeLS_REC_DATA:
		if d.IntN(4) == 0 {
			r.Nsum = uint16(1 + d.IntN(int(boundMax)))
			for i := range r.Bound[:r.Nsum] {
				r.Bound[i] = [2]uint64{d.Uint64(), d.Uint64()}
			}
		}
	}
	no := d.peerNo[r.Stream] + 1
	switch d.IntN(12) {
	case 4:
		no -= min(no, 900+uint64(d.IntN(200)))
	case 5, 6:
		no = d.peerLast
		r.Flags = pick[uint8](d.Rand, 0, recRetx)
	case 0:
		no += uint64(1 + d.IntN(4))
	case 1:
		no -= min(no, uint64(d.IntN(5)))
	case 2:
		no += uint64(d.IntN(3000))
	case 3:
		r.Flags = recRetx
		no -= min(no, uint64(d.IntN(5)))
	}
	d.peerNo[r.Stream] = max(d.peerNo[r.Stream], no)
	r.StreamNo, d.peerLast = no, no
	return r
}

// damaged is a peer frame with the record, which may be wrong in any way.
func (d *duel) damaged(r bpf.LockstepLsRec) []byte {
	key := d.session.RxKey
	switch d.IntN(40) {
	case 0:
		r.Version++
	case 1:
		r.Type = uint8(d.IntN(12))
	case 2:
		r.Dir ^= 1
	case 3:
		r.KeyGen--
	case 4:
		key[0]++
	}
	frame := d.seal(&r, key)
	off := int(le.Uint16(frame[16:]))
	switch d.IntN(40) {
	case 0:
		frame[14]++
	case 1:
		le.PutUint16(frame[16:], uint16(d.IntN(400)))
	case 2:
		le.PutUint16(frame[off+12:], r.Len+8) // ls_rec.len
	case 3:
		frame = frame[:off+d.IntN(len(frame)-off)]
	}
	return append(frame, make([]byte, max(0, 60-len(frame)))...)
}

// seal is a peer frame with the signed record.
func (d *duel) seal(r *bpf.LockstepLsRec, key [2]uint64) []byte {
	r.Len = uint16(recBase + int(r.Nsum)*boundLen)
	b := slices.Clone(core.BytesOf(r)[:r.Len])
	le.PutUint64(b, siphash.Hash(key[0], key[1], b[8:]))
	off := 18 + 2*d.IntN(100)
	frame := make([]byte, off, off+len(b))
	copy(frame, d.n.m.conf.OwnMac[:])
	copy(frame[6:], d.n.m.conf.PeerMac[:])
	be.PutUint16(frame[12:], ethertype)
	le.PutUint16(frame[14:], magic)
	le.PutUint16(frame[16:], uint16(off))
	for i := range frame[18:] {
		frame[18+i] = byte(d.Uint32())
	}
	return append(frame, b...)
}

// open goes through a handshake that is likely to succeed, on S.
func (d *duel) open() {
	if d.n.m.conf.Mode != uint32(datapath.ModeRun) {
		return
	}
	f, cli := pick(d.Rand, d.flows...), pick(d.Rand, d.cli...)
	flags, answer := uint8(syn|ack), uint8(ack)
	s := seg{seq: pick(d.Rand, d.svm...), ack: cli + 1, opts: tsOpt(d.near(d.stamps), 7)}
	if d.IntN(3) == 0 {
		flags, answer, s.ack = syn, syn|ack, 0
	}
	s.flags = flags
	a := s
	a.seq, a.opts = pick(d.Rand, d.pvm...), tsOpt(d.near(d.stamps), 7)
	out := func() {
		d.both("handshake", f.tcp(false, s), func(b []byte) { d.k.fromGuest(false, b, 0, unmarked) }, func(b []byte) { d.n.FromGuest(b, 0) })
	}
	if d.IntN(2) == 0 {
		out()
		defer func() {
			d.fromPeer("handshake", f.tcp(true, seg{seq: cli + 1, ack: a.seq + 1, flags: answer, opts: tsOpt(1, d.near(d.stamps))}))
		}()
	}
	d.peerNo[streamUser]++
	r := bpf.LockstepLsRec{
		Version: version, Type: uint8(bpf.LockstepLsRecTypeLS_REC_ANNOUNCE), Dir: dirP2S, Stream: streamUser, StreamNo: d.peerNo[streamUser],
		KeyGen: d.session.Term, Epoch: d.n.m.conf.Epoch, T: f.tuple(), Inc: a.seq, Seq: a.seq, End: a.seq + 1, Ack: a.ack, TcpFlags: a.flags,
	}
	r.Optlen = uint8(copy(r.Opts[:], a.opts))
	d.fromPeer("announcement", d.seal(&r, d.session.RxKey))
	out()
}
