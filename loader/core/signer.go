// SPDX-License-Identifier: Apache-2.0

package core

import (
	"encoding/binary"
	"unsafe"

	"github.com/dchest/siphash"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
)

// RecOff is where user space puts the record in its peer frames: directly after
// struct ls_pre, as they are not made of guests' frames.
const RecOff = EthLen + int(unsafe.Sizeof(bpf.LockstepLsPre{}))

// Signer makes the peer frames that user space sends (types of abi.h), in a TX stream of
// their own. The gate has the session that they belong to.
type Signer struct {
	Gate *Gate
	Dir  bpf.LockstepLsDir
	No   uint64 // the stream's newest number
}

// frame writes virtio-net header, peer frame and signed record into dst: one about
// a connection.
func (s *Signer) frame(dst []byte, typ bpf.LockstepLsRecType, e *compare.Effect) []byte {
	rec := bpf.LockstepLsRec{
		T: ToTuple(e.Tuple), Inc: e.Inc, Seq: e.Seq, End: e.Seq + e.To, Ack: e.Ack, Win: e.Win,
		TcpFlags: uint8(e.Flags), Optlen: e.OptLen, Sum: e.Sum, Opts: e.Opts,
	}
	if e.Inherited {
		rec.Flags = uint8(bpf.LockstepLsRecFlagLS_REC_INHERITED)
	}
	if typ == bpf.LockstepLsRecTypeLS_REC_ANNOUNCE {
		rec.Inc, rec.End = e.Seq, e.Seq+1
	}
	return s.seal(dst, typ, &rec)
}

// nackAll asks for the newest record of every stream (R6).
func (s *Signer) nackAll(dst []byte) []byte {
	return s.seal(dst, bpf.LockstepLsRecTypeLS_REC_NACK, &bpf.LockstepLsRec{Stride: uint32(bpf.LockstepLsConstLS_STREAM_ALL)})
}

// echo asks S to return the time now, boottime ns (R20).
func (s *Signer) echo(dst []byte, now int64) []byte {
	return s.seal(dst, bpf.LockstepLsRecTypeLS_REC_ECHO, &bpf.LockstepLsRec{Sum: [2]uint64{uint64(now)}})
}

// Mark shows S where the PVM's STOP lies among its input: what follows, the PVM receives
// after it (R16).
func (s *Signer) Mark(dst []byte) []byte {
	return s.seal(dst, bpf.LockstepLsRecTypeLS_REC_MARK, new(bpf.LockstepLsRec))
}

// seal numbers and signs rec and writes it with all that stands before it.
func (s *Signer) seal(dst []byte, typ bpf.LockstepLsRecType, rec *bpf.LockstepLsRec) []byte {
	dst = append(dst[:0], make([]byte, VnetLen)...)
	conf := s.Gate.Conf
	dst = append(dst, conf.PeerMac[:]...)
	dst = append(dst, s.Gate.Own...)
	dst = binary.BigEndian.AppendUint16(dst, uint16(bpf.LockstepLsConstLS_ETHERTYPE))
	dst = binary.LittleEndian.AppendUint16(dst, uint16(bpf.LockstepLsConstLS_MAGIC))
	dst = binary.LittleEndian.AppendUint16(dst, uint16(RecOff))

	s.No++
	rec.Version, rec.Type, rec.Dir = uint8(bpf.LockstepLsConstLS_ABI_VERSION), uint8(typ), uint8(s.Dir)
	rec.Len = uint16(bpf.LockstepLsConstLS_REC_BASE)
	rec.Stream, rec.StreamNo = uint16(bpf.LockstepLsConstLS_STREAM_USER), s.No
	rec.KeyGen, rec.Epoch = conf.KeyGen, conf.Epoch
	b := BytesOf(rec)[:rec.Len]
	rec.Tag = siphash.Hash(s.Gate.txKey[0], s.Gate.txKey[1], b[8:])
	return append(dst, b...)
}

func BytesOf[T any](p *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(p)), unsafe.Sizeof(*p))
}

func ToTuple(t compare.Tuple) bpf.LockstepLsTuple {
	return bpf.LockstepLsTuple{Guest: t.Guest, Remote: t.Remote, Gport: t.GuestPort, Rport: t.RemotePort, Vlan: t.VLAN, Vlan2: t.VLAN2, Proto: t.Proto}
}

func FromTuple(t *bpf.LockstepLsTuple) compare.Tuple {
	return compare.Tuple{Guest: t.Guest, Remote: t.Remote, GuestPort: t.Gport, RemotePort: t.Rport, VLAN: t.Vlan, VLAN2: t.Vlan2, Proto: t.Proto}
}
