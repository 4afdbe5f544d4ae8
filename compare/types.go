// SPDX-License-Identifier: Apache-2.0

package compare

import "net/netip"

// Tuple names one flow as its guest sees it; the same on both hosts.
type Tuple struct {
	Guest, Remote         [16]byte // IPv4 as ::ffff:a.b.c.d
	GuestPort, RemotePort uint16
	VLAN                  uint16 // VLAN id; 0: untagged
	VLAN2                 uint16 // of an inner tag (QinQ); 0: none
	Proto                 uint8  // IPPROTO_*; ProtoEthernet
}

// Sum is the digest of a byte range of a stream, one element per lane (see
// [Keys]). Sums of adjacent ranges add, lane by lane, modulo 2^64.
type Sum [2]uint64

// Slot names a frame the kernel holds.
type Slot uint32

// NoSlot is the slot of a segment that takes none (a pure ACK).
const NoSlot Slot = 0xffffffff

// Flags are TCP flags as in the header, the four bits between its length and them too.
type Flags uint16

// TCP flags.
const (
	FIN Flags = 1 << iota
	SYN
	RST
	PSH
	ACK
	URG
	ECE
	CWR
	AE // of AccECN; the bits above are reserved
)

// Bound is a sum known at a position: the digest of [payload start, Pos).
type Bound struct {
	Pos uint32
	Sum Sum
}

// ProtoEthernet is the protocol of frames that are not IP: their addresses are
// MACs (the last six bytes), GuestPort is the ethertype. ICMP has type and code in
// GuestPort and RemotePort; fragments and other protocols have 0 there.
const ProtoEthernet = 255

// Segment is one TCP segment or, with Datagram, anything else. Positions are TCP sequence numbers in PVM
// numbering: a SYN and a FIN take one each.
type Segment struct {
	Tuple
	Seq   uint32 // position of the first thing in it, a SYN included
	Len   uint32 // payload bytes
	Ack   uint32
	Win   uint16 // as in the header, unscaled
	Flags Flags
	Urg   uint16 // urgent pointer, from Seq on
	Opts  []byte // TCP options as in the header; valid during Step only
	Sum   Sum    // of the payload; not of the PVM's GSO frames, which Step sums up itself

	// Datagram: not TCP, or not comparable as such. Seq is the position of the
	// payload's first byte (0, or a fragment's offset); Ack, Win, Flags, Opts mean
	// nothing. Frag: a fragment's byte offset | 1 when more follow.
	Datagram bool
	Frag     uint16

	// PVM segments and the SVM's copies only.
	Slot    Slot
	Payload []byte // view into the slot; valid until the slot is freed
	GSO     uint16 // segment size of a GSO frame, else 0
	At      int64  // capture time, boottime ns
	Header  []byte // L2 and L3 header (a pure ACK's template); valid during Step only
	Large   bool   // the frame needs a large slot (PVM, copies)

	// SVM segments only.
	Inc       uint32 // incarnation: the PVM's ISN
	Inherited bool   // the connection came with a checkpoint: Inc means nothing
	Bounds    []Bound
	ClientAck uint32 // copies: the remote's highest ACK known then; 0: none
	Epoch     uint32
}

// PayloadStart is the position of the first payload byte.
func (s *Segment) PayloadStart() uint32 {
	if s.Flags&SYN != 0 {
		return s.Seq + 1
	}
	return s.Seq
}

// End is the position behind the segment, a FIN included.
func (s *Segment) End() uint32 {
	end := s.PayloadStart() + s.Len
	if s.Flags&FIN != 0 {
		end++
	}
	return end
}

// EventKind is the kind of an event.
type EventKind uint8

// Events of the primary side (P), of the secondary side (S) or of both.
const (
	// EvPVM (P): the PVM transmitted Seg. Without a slot and payload although Len is not
	// 0: the kernel dropped it for want of a slot.
	EvPVM EventKind = iota + 1
	// EvSVM (P): a digest record: the SVM transmitted Seg.
	EvSVM
	// EvAnswer (P): S answers: Seg.Sum is the digest of [Seg.Seq, Seg.Seq+Seg.Len).
	EvAnswer
	// EvClient (P): a SYN, FIN or RST of the remote went to the guests.
	// Seg's Seq, Len, Ack, Flags are the remote's, and Opts with a SYN|ACK where the
	// caller has them: they settle whether windows are scaled.
	EvClient
	// EvCopy (S): the SVM transmitted Seg and its frame is kept in Seg.Slot.
	EvCopy
	// EvAsk (S): P asks for the sum over [Seg.Seq, Seg.Seq+Seg.Len).
	EvAsk
	// EvPark (S): a frame for the SVM was parked in Seg.Slot. Only Slot, At and
	// Datagram hold.
	EvPark
	// EvNeigh (P): the SVM asks who has Seg.Remote, in the name of Seg.Guest, whose
	// MAC is in Seg.Opts.
	EvNeigh
	// EvAdopt (P): a connection that an earlier daemon tracked (R23). Seg.Seq is the
	// remote's highest ACK: below it nothing is retransmitted.
	EvAdopt
	// EvMark (S): P's mark of its STOP for Epoch came: what is parked later the PVM
	// had not received before it stopped (R16).
	EvMark
	// EvTick: time passed (see NextDeadline).
	EvTick
	// EvFreeze (P): release nothing from now on, but go on collecting (R13, R15).
	EvFreeze
	// EvThaw (P): release again: the checkpoint did not happen.
	EvThaw
	// EvCommit (P): Epoch has begun. Frames captured before At leave in order (R14),
	// all younger state starts inherited (R8).
	EvCommit
	// EvSolo (P): the SVM is dead and the arbiter's entry names P: everything held
	// leaves (R15, R21).
	EvSolo
	// EvReset (S): a checkpoint was loaded: copies are void. EvUnpark: deliver
	// what was parked, in order.
	EvReset
	EvUnpark
	// EvUnsure (S): a checkpoint may have been loaded of which nobody knows yet. The SVM may have
	// received what is parked: no datagram of that is delivered (R16).
	EvUnsure
	// EvRemote (S): the connection Seg.Tuple, incarnation Seg.Inc or Seg.Inherited, goes on at a takeover, and its remote has
	// acknowledged up to Seg.ClientAck; 0: that is not known.
	EvRemote
	// EvTakeOver (S), after EvRemote for each connection: what the SVM transmits leaves
	// from now on (R22). What the client may not have received is transmitted again.
	EvTakeOver
	// EvYield (P): the kernel has given the connection Seg.Tuple back (R27): the caller takes it.
	EvYield
	// EvGranted (P): what came of an OpGrant: the kernel owns the connection Seg.Tuple now, with
	// Handover, or, without, it does not.
	EvGranted
	// EvOpened (P): the kernel owns a connection from the PVM's SYN|ACK on, Seg, which waits there, or has left (R27). If it
	// is not the kernel's behind this step, the caller takes it.
	EvOpened
	// EvTaken (P): the connection Seg.Tuple is the kernel's no more. Handover is its state; what
	// waited there follows as EvPVM and EvSVM.
	EvTaken
)

// Event is one input to Step.
type Event struct {
	Kind  EventKind
	Seg   Segment
	Epoch uint32 // EvCommit, EvMark, EvReset: the one that begins
	At    int64  // EvCommit: the commit point, boottime ns

	Handover *Handover // EvGranted, EvTaken
}

// Op is the kind of an effect.
type Op uint8

// Effects. The caller carries them out in order.
const (
	// OpSend: send a frame in the PVM's name (P). Header from the frame in
	// Slot, or from Header when Slot is NoSlot; TCP fields from Seq, Ack, Win, Urg,
	// Flags, Opts; payload [From, To) of the frame's payload bytes, counted
	// from its payload's first byte; GSO segment size as in the slot. Free: the
	// slot is free once it was sent.
	OpSend Op = iota + 1
	// OpFree: Slot is free, its frame is dropped. Reason: why.
	OpFree
	// OpAsk: ask S for the sum over [Seq, Seq+To) of Tuple's incarnation Inc (P).
	OpAsk
	// OpAnnounce: announce the PVM's SYN again: Seq is its ISN, with Ack, Flags, Opts (P).
	OpAnnounce
	// OpCheckpoint: a checkpoint is needed (P). Reason: why.
	OpCheckpoint
	// OpAnswer: send P the sum over [Seq, Seq+To) (S).
	OpAnswer
	// OpDeliver: give the frame in Slot to the SVM, then free it (S).
	OpDeliver
	// OpForward: send the frame in Slot as it was captured, then free it (P): a
	// datagram.
	OpForward
	// OpNeigh: ask who has Tuple.Remote, in the name of Tuple.Guest, whose MAC is in
	// Opts (P).
	OpNeigh
	// OpRemirror: send S the header of the remote's newest segment again (R6), with the
	// SACK option in Opts, if any; then only if the remote has acknowledged Seq (P).
	OpRemirror
	// OpQuery: ask S for the newest digest record of every TX stream (R6) (P).
	OpQuery
	// OpAdopt: report with EvAdopt what the remote of Tuple has acknowledged by now (P).
	OpAdopt
	// OpReplay: transmit the copy in Slot in the guest's name, then free it (S).
	OpReplay
	// OpSACK: send the PVM the header of the remote's newest segment again, with the SACK
	// option in Opts, if the remote has acknowledged Seq (P, R6).
	OpSACK
	// OpProbeSVM, OpProbePVM: send S for the SVM, or the PVM, the header of the remote's newest
	// segment with sequence number Seq and a byte that the guest has acknowledged (P, R6).
	OpProbeSVM
	OpProbePVM
	// OpGrant: the kernel may own the connection Tuple (R27); the caller reports with EvGranted (P).
	OpGrant
	// OpTake: take the connection Tuple back (P). OpForget: it is over.
	OpTake
	OpForget
	// OpEven: nothing waits any more of the datagram flow Tuple, which the kernel may own (R27) (P).
	OpEven
)

// Reason is why a frame was dropped or a checkpoint is needed.
type Reason uint8

// Effect is one output of Step.
type Effect struct {
	Op        Op
	Tuple     Tuple
	Slot      Slot
	Free      bool
	From, To  uint32
	Seq, Ack  uint32
	Win, Urg  uint16
	Flags     Flags
	OptLen    uint8
	Opts      [40]byte
	HdrLen    uint8
	Header    [176]byte // L2 and L3 header of a template
	Inc       uint32
	Inherited bool
	Sum       Sum
	Reason    Reason
	Where     string // in what the guests differ (OpCheckpoint); "": not known
}

func (t Tuple) String() string {
	return netip.AddrPortFrom(netip.AddrFrom16(t.Guest).Unmap(), t.GuestPort).String() + ">" +
		netip.AddrPortFrom(netip.AddrFrom16(t.Remote).Unmap(), t.RemotePort).String()
}
