// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"encoding/binary"
	"slices"

	"github.com/dchest/siphash"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// This file is the model of bpf/rec.h: frames of the peer link.

const (
	ethertype  = uint16(bpf.LockstepLsConstLS_ETHERTYPE)
	magic      = uint16(bpf.LockstepLsConstLS_MAGIC)
	version    = uint8(bpf.LockstepLsConstLS_ABI_VERSION)
	recBase    = int(bpf.LockstepLsConstLS_REC_BASE)
	recOffMax  = int(bpf.LockstepLsConstLS_REC_OFF_MAX)
	boundMax   = uint16(bpf.LockstepLsConstLS_BOUND_MAX)
	optsMax    = uint8(bpf.LockstepLsConstLS_OPTS_MAX)
	streamUser = uint16(bpf.LockstepLsConstLS_STREAM_USER)
	streamAll  = uint32(bpf.LockstepLsConstLS_STREAM_ALL)
	streamMax  = uint16(bpf.LockstepLsConstLS_STREAM_MAX)
	keptMax    = uint64(bpf.LockstepLsConstLS_SENT)
	resendMax  = int(bpf.LockstepLsConstLS_RESEND_MAX)
	windowBits = uint64(bpf.LockstepLsConstLS_WINDOW)
	words      = windowBits / 64

	etherLen = 14
	preLen   = 4  // struct ls_pre
	boundLen = 16 // a boundary's sums
	tcpMin   = 20

	dirP2S = uint8(bpf.LockstepLsDirLS_DIR_P2S)
	dirS2P = uint8(bpf.LockstepLsDirLS_DIR_S2P)

	recInherited = uint8(bpf.LockstepLsRecFlagLS_REC_INHERITED)
	recRetx      = uint8(bpf.LockstepLsRecFlagLS_REC_RETX)
)

// peerLink is what the programs know of the peer, and what they send it.
type peerLink struct {
	host  Host
	opts  Options
	conf  bpf.LockstepLsConf
	keys  keyTable
	stats [bpf.LockstepLsReasonLS_R_MAX]uint64

	streamNo uint64 // of the one CPU's stream
	sent     []kept // by number
	windows  map[uint16]*window

	rec bpf.LockstepLsRec // the record that is worked on
}

func (l *peerLink) off(rule bpf.LockstepLsMutation) bool { return l.opts.Mutation&rule != 0 }

func (l *peerLink) count(why bpf.LockstepLsReason) { l.stats[why]++ }

// sentTo are the types of records that are sent in each direction.
var sentTo = [...][]bpf.LockstepLsRecType{
	dirP2S: {
		bpf.LockstepLsRecTypeLS_REC_ANNOUNCE, bpf.LockstepLsRecTypeLS_REC_ASK, bpf.LockstepLsRecTypeLS_REC_NACK,
		bpf.LockstepLsRecTypeLS_REC_ECHO, bpf.LockstepLsRecTypeLS_REC_MARK,
	},
	dirS2P: {
		bpf.LockstepLsRecTypeLS_REC_DATA, bpf.LockstepLsRecTypeLS_REC_ANSWER, bpf.LockstepLsRecTypeLS_REC_DGRAM,
		bpf.LockstepLsRecTypeLS_REC_NEIGH, bpf.LockstepLsRecTypeLS_REC_ECHO,
	},
}

func isPeerFrame(b []byte) bool {
	return len(b) >= etherLen && binary.BigEndian.Uint16(b[12:]) == ethertype
}

// form: is the record in l.rec well-formed, and of a type that is sent in direction dir?
func (l *peerLink) form(dir uint8) bpf.LockstepLsReason {
	r := &l.rec
	switch {
	case r.Version != version:
		return bpf.LockstepLsReasonLS_R_peerVersion
	case r.Dir != dir || !slices.Contains(sentTo[dir], bpf.LockstepLsRecType(r.Type)):
		return bpf.LockstepLsReasonLS_R_peerType
	case r.Nsum > boundMax || r.Optlen > optsMax || int(r.Len) != recBase+int(r.Nsum)*boundLen:
		return bpf.LockstepLsReasonLS_R_peerShort
	}
	return bpf.LockstepLsReasonLS_R_recordIn
}

// authentic: is it of this session and epoch?
func (l *peerLink) authentic() bpf.LockstepLsReason {
	r, c := &l.rec, &l.conf
	index := c.KeyIndex
	if r.KeyGen != c.KeyGen {
		if r.KeyGen != c.KeyGen-1 || uint64(l.host.Now()) >= c.OldUntil {
			return bpf.LockstepLsReasonLS_R_peerTerm
		}
		index ^= 1
	}
	key := l.keys.of[index&1].SipRx
	if siphash.Hash(key[0], key[1], core.BytesOf(r)[8:r.Len]) != r.Tag && !l.off(bpf.LockstepLsMutationLS_MUTATE_TAG) {
		return bpf.LockstepLsReasonLS_R_peerTag
	}
	switch bpf.LockstepLsRecType(r.Type) {
	case bpf.LockstepLsRecTypeLS_REC_ECHO, bpf.LockstepLsRecTypeLS_REC_NACK, bpf.LockstepLsRecTypeLS_REC_MARK:
		return bpf.LockstepLsReasonLS_R_recordIn
	}
	if r.Epoch != c.Epoch && r.Epoch != c.Epoch+1 {
		return bpf.LockstepLsReasonLS_R_peerEpoch
	}
	return bpf.LockstepLsReasonLS_R_recordIn
}

// check copies the record of a peer frame to l.rec and checks it. off is where it stands.
func (l *peerLink) check(b []byte, dir uint8) (why bpf.LockstepLsReason, off int) {
	if len(b) < etherLen+preLen {
		return bpf.LockstepLsReasonLS_R_peerShort, 0
	}
	off = int(binary.LittleEndian.Uint16(b[etherLen+2:]))
	if binary.LittleEndian.Uint16(b[etherLen:]) != magic || off < etherLen+preLen || off > recOffMax {
		return bpf.LockstepLsReasonLS_R_peerJunk, 0
	}
	if off+recBase > len(b) {
		return bpf.LockstepLsReasonLS_R_peerShort, 0
	}
	l.rec = bpf.LockstepLsRec{}
	rec := core.BytesOf(&l.rec)
	copy(rec[:recBase], b[off:])
	if why := l.form(dir); why != bpf.LockstepLsReasonLS_R_recordIn {
		return why, 0
	}
	if off+int(l.rec.Len) > len(b) {
		return bpf.LockstepLsReasonLS_R_peerShort, 0
	}
	copy(rec[recBase:l.rec.Len], b[off+recBase:])
	return l.authentic(), off
}

// window is the anti-replay window of one of the peer's TX streams (RFC 6479).
type window struct {
	keyGen     uint32
	top        uint64
	bits, retx [words]uint64
}

// replay checks l.rec, which is authentic. gap is the first number missing before this one.
func (l *peerLink) replay() (why bpf.LockstepLsReason, gap uint64) {
	r := &l.rec
	why = bpf.LockstepLsReasonLS_R_peerReplay
	if r.Flags&recRetx != 0 {
		why = bpf.LockstepLsReasonLS_R_peerAgain
	}
	if r.Stream >= streamMax && r.Stream != streamUser {
		return bpf.LockstepLsReasonLS_R_peerReplay, 0
	}
	w := l.windows[r.Stream]
	if w == nil {
		w = new(window)
		l.windows[r.Stream] = w
	}
	fresh, again, gap := w.take(r)
	switch {
	case l.off(bpf.LockstepLsMutationLS_MUTATE_REPLAY), fresh:
		return bpf.LockstepLsReasonLS_R_recordIn, gap
	case again:
		return bpf.LockstepLsReasonLS_R_peerAgain, gap
	}
	return why, gap
}

// take reports whether the number of r is new, or that of a record of which either one was
// a retransmission.
func (w *window) take(r *bpf.LockstepLsRec) (fresh, again bool, gap uint64) {
	no := r.StreamNo
	word, bit := no/64, uint64(1)<<(no&63)
	switch at := word % words; {
	case w.keyGen != r.KeyGen:
		if int32(r.KeyGen-w.keyGen) < 0 && w.keyGen != 0 {
			return false, false, 0
		}
		*w = window{keyGen: r.KeyGen, top: no}
	case no > w.top:
		if no != w.top+1 {
			gap = w.top + 1
		}
		from := w.top / 64
		for i := uint64(1); i <= words && from+i <= word; i++ {
			w.bits[(from+i)%words], w.retx[(from+i)%words] = 0, 0
		}
		w.top = no
	case word+words <= w.top/64:
		return false, false, 0
	case w.bits[at]&bit != 0:
		again = w.retx[at]&bit != 0
		w.retx[at] &^= bit
		return false, again, 0
	}
	w.bits[word%words] |= bit
	if r.Flags&recRetx != 0 {
		w.retx[word%words] |= bit
	}
	return true, false, gap
}

// begin fills in l.rec but for the sums, the segment's numbers and the tag.
func (l *peerLink) begin(typ bpf.LockstepLsRecType, dir uint8) *bpf.LockstepLsRec {
	l.rec = bpf.LockstepLsRec{
		Version: version, Type: uint8(typ), Dir: dir, Len: uint16(recBase), KeyGen: l.conf.KeyGen, Epoch: l.conf.Epoch,
	}
	return &l.rec
}

// kept is a record that S sent, for retransmission (R6).
type kept struct {
	no  uint64
	rec [recBase]byte
}

// send numbers and signs l.rec and sends it in a peer frame made of b, at off.
func (l *peerLink) send(b []byte, off int) {
	r := &l.rec
	l.streamNo++
	r.Stream, r.StreamNo = 0, l.streamNo
	if r.Dir == dirS2P {
		if l.sent == nil {
			l.sent = make([]kept, keptMax)
		}
		k := &l.sent[r.StreamNo%keptMax]
		k.no = r.StreamNo
		copy(k.rec[:], core.BytesOf(r))
	}
	l.sign()
	l.host.ToPeer(l.put(b, off))
}

func (l *peerLink) sign() {
	r := &l.rec
	r.Len = uint16(recBase + int(r.Nsum)*boundLen)
	key := l.keys.of[l.conf.KeyIndex&1].SipTx
	r.Tag = siphash.Hash(key[0], key[1], core.BytesOf(r)[8:r.Len])
}

// put makes a peer frame with the signed l.rec at off. The bytes between ls_pre and the
// record are b's.
func (l *peerLink) put(b []byte, off int) []byte {
	const front = etherLen + preLen
	out := make([]byte, off+int(l.rec.Len))
	if len(b) > front {
		copy(out[front:off], b[front:])
	}
	copy(out, l.conf.PeerMac[:])
	copy(out[6:], l.conf.OwnMac[:])
	binary.BigEndian.PutUint16(out[12:], ethertype)
	binary.LittleEndian.PutUint16(out[etherLen:], magic)
	binary.LittleEndian.PutUint16(out[etherLen+2:], uint16(off))
	copy(out[off:], core.BytesOf(&l.rec)[:l.rec.Len])
	return out
}

// recOff is where a record is put in a frame that was p: after any checksum, at an even offset.
func recOff(p *bpfmodel.Segment) int { return min((p.L4+tcpMin+1)&^1, recOffMax) }

// describe has l.rec be about the segment p.
func (l *peerLink) describe(p *bpfmodel.Segment) {
	r, h := &l.rec, p.TCP()
	r.T = core.ToTuple(p.Tuple)
	r.Seq, r.End, r.Ack, r.Win, r.TcpFlags = h.Seq(), p.EndPos(), h.Ack(), h.Win(), uint8(h.Flags())
	r.Optlen = uint8(copy(r.Opts[:], h.Options()))
}

// fill has l.rec be about what the table's record r is.
func (l *peerLink) fill(r *bpfmodel.Record) {
	to := &l.rec
	to.T = core.ToTuple(r.Tuple)
	to.Inc, to.Seq, to.End, to.Ack, to.Win, to.TcpFlags = r.Inc, r.Seq, r.End, r.Ack, r.Win, uint8(r.Flags)
	to.Optlen, to.Opts = r.OptLen, r.Opts
	if r.Inherited {
		to.Flags = recInherited
	}
}

// resend sends records again, without the boundaries (R6).
func (l *peerLink) resend(b []byte, off int) {
	l.count(bpf.LockstepLsReasonLS_R_nackIn)
	stream, first, last := l.rec.Stride, l.rec.Sum[0], l.rec.Sum[1]
	switch {
	case stream == streamAll && l.streamNo > 0:
		first, last = l.streamNo, l.streamNo
	case stream != 0: // no such CPU
		return
	}
	for i := range uint64(resendMax) {
		no := first + i
		if no > last || stream == streamAll && i > 0 {
			return
		}
		var k kept
		if l.sent != nil {
			k = l.sent[no%keptMax]
		}
		r := &l.rec
		*r = bpf.LockstepLsRec{}
		copy(core.BytesOf(r), k.rec[:])
		if k.no != no || r.KeyGen != l.conf.KeyGen {
			l.count(bpf.LockstepLsReasonLS_R_resendGone)
			continue
		}
		r.Nsum, r.Stride = 0, 0
		r.Flags |= recRetx
		l.sign()
		l.count(bpf.LockstepLsReasonLS_R_resent)
		l.host.ToPeer(l.put(b, off))
	}
}
