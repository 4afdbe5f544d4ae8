// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/binary"
	"unsafe"

	"github.com/dchest/siphash"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
)

// recOff is where user space puts the record in its peer frames: directly after
// struct ls_pre, as they are not made of guests' frames.
const recOff = ethLen + int(unsafe.Sizeof(bpf.LockstepLsPre{}))

// signer makes the peer frames that user space sends (types of abi.h), in a TX stream of
// their own. The gate has the session that they belong to.
type signer struct {
	gate *gate
	dir  bpf.LockstepLsDir
	no   uint64 // the stream's newest number
}

func newSigner(role Role, g *gate) signer {
	if role == Secondary {
		return signer{gate: g, dir: bpf.LockstepLsDirLS_DIR_S2P}
	}
	return signer{gate: g, dir: bpf.LockstepLsDirLS_DIR_P2S}
}

// frame writes virtio-net header, peer frame and signed record into dst: one about
// a connection.
func (s *signer) frame(dst []byte, typ bpf.LockstepLsRecType, e *compare.Effect) []byte {
	rec := bpf.LockstepLsRec{
		T: toTuple(e.Tuple), Inc: e.Inc, Seq: e.Seq, End: e.Seq + e.To, Ack: e.Ack, Win: e.Win,
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
func (s *signer) nackAll(dst []byte) []byte {
	return s.seal(dst, bpf.LockstepLsRecTypeLS_REC_NACK, &bpf.LockstepLsRec{Stride: uint32(bpf.LockstepLsConstLS_STREAM_ALL)})
}

// echo asks S to return the time now, boottime ns (R20).
func (s *signer) echo(dst []byte, now int64) []byte {
	return s.seal(dst, bpf.LockstepLsRecTypeLS_REC_ECHO, &bpf.LockstepLsRec{Sum: [2]uint64{uint64(now)}})
}

// mark shows S where the PVM's STOP lies among its input: what follows, the PVM receives
// after it (R16).
func (s *signer) mark(dst []byte) []byte {
	return s.seal(dst, bpf.LockstepLsRecTypeLS_REC_MARK, new(bpf.LockstepLsRec))
}

// seal numbers and signs rec and writes it with all that stands before it.
func (s *signer) seal(dst []byte, typ bpf.LockstepLsRecType, rec *bpf.LockstepLsRec) []byte {
	dst = append(dst[:0], make([]byte, vnetHdrLen)...)
	conf := s.gate.conf
	dst = append(dst, conf.PeerMac[:]...)
	dst = append(dst, s.gate.mac...)
	dst = binary.BigEndian.AppendUint16(dst, uint16(bpf.LockstepLsConstLS_ETHERTYPE))
	dst = binary.LittleEndian.AppendUint16(dst, uint16(bpf.LockstepLsConstLS_MAGIC))
	dst = binary.LittleEndian.AppendUint16(dst, uint16(recOff))

	s.no++
	rec.Version, rec.Type, rec.Dir = uint8(bpf.LockstepLsConstLS_ABI_VERSION), uint8(typ), uint8(s.dir)
	rec.Len = uint16(bpf.LockstepLsConstLS_REC_BASE)
	rec.Stream, rec.StreamNo = uint16(bpf.LockstepLsConstLS_STREAM_USER), s.no
	rec.KeyGen, rec.Epoch = conf.KeyGen, conf.Epoch
	b := bytesOf(rec)[:rec.Len]
	rec.Tag = siphash.Hash(s.gate.txKey[0], s.gate.txKey[1], b[8:])
	return append(dst, b...)
}

func bytesOf[T any](p *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(p)), unsafe.Sizeof(*p))
}

func toTuple(t compare.Tuple) bpf.LockstepLsTuple {
	return bpf.LockstepLsTuple{Guest: t.Guest, Remote: t.Remote, Gport: t.GuestPort, Rport: t.RemotePort, Vlan: t.VLAN, Vlan2: t.VLAN2, Proto: t.Proto}
}

func fromTuple(t *bpf.LockstepLsTuple) compare.Tuple {
	return compare.Tuple{Guest: t.Guest, Remote: t.Remote, GuestPort: t.Gport, RemotePort: t.Rport, VLAN: t.Vlan, VLAN2: t.Vlan2, Proto: t.Proto}
}
