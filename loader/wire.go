// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/binary"
	"net"
	"unsafe"

	"github.com/dchest/siphash"

	"lockstep/bpf"
	"lockstep/compare"
)

// recOff is where user space puts the record in its peer frames: straight
// behind struct ls_pre. They carry no old headers.
const recOff = ethLen + int(unsafe.Sizeof(bpf.LockstepLsPre{}))

// signer makes the peer frames that user space sends (types of abi.h).
type signer struct {
	key      [2]uint64
	own, to  net.HardwareAddr
	dir      bpf.LockstepLsDir
	term     uint32
	epoch    uint32
	laneNext uint64
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

// query asks for the newest record of every lane (R6).
func (s *signer) query(dst []byte) []byte {
	return s.seal(dst, bpf.LockstepLsRecTypeLS_REC_NACK, &bpf.LockstepLsRec{Stride: uint32(bpf.LockstepLsConstLS_STREAM_ALL)})
}

// echo asks S to return the time now, boottime ns (R20).
func (s *signer) echo(dst []byte, now int64) []byte {
	return s.seal(dst, bpf.LockstepLsRecTypeLS_REC_ECHO, &bpf.LockstepLsRec{Sum: [2]uint64{uint64(now)}})
}

// mark tells S that the PVM has not heard what follows before its STOP (R16).
func (s *signer) mark(dst []byte) []byte {
	return s.seal(dst, bpf.LockstepLsRecTypeLS_REC_MARK, new(bpf.LockstepLsRec))
}

// seal numbers and signs rec and writes it with all that stands before it.
func (s *signer) seal(dst []byte, typ bpf.LockstepLsRecType, rec *bpf.LockstepLsRec) []byte {
	dst = append(dst[:0], make([]byte, vnetHdrLen)...)
	dst = append(dst, s.to...)
	dst = append(dst, s.own...)
	dst = binary.BigEndian.AppendUint16(dst, uint16(bpf.LockstepLsConstLS_ETHERTYPE))
	dst = binary.LittleEndian.AppendUint16(dst, uint16(bpf.LockstepLsConstLS_MAGIC))
	dst = binary.LittleEndian.AppendUint16(dst, uint16(recOff))

	s.laneNext++
	rec.Version, rec.Type, rec.Dir = uint8(bpf.LockstepLsConstLS_ABI_VERSION), uint8(typ), uint8(s.dir)
	rec.Len = uint16(bpf.LockstepLsConstLS_REC_BASE)
	rec.Stream, rec.StreamNo = uint16(bpf.LockstepLsConstLS_STREAM_USER), s.laneNext
	rec.KeyGen, rec.Epoch = s.term, s.epoch
	b := bytesOf(rec)[:rec.Len]
	rec.Tag = siphash.Hash(s.key[0], s.key[1], b[8:])
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
