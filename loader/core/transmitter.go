// SPDX-License-Identifier: Apache-2.0

package core

import (
	"encoding/binary"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
)

// Transmitter carries out effects: it sends frames in the guests' name and records to
// the peer, and frees slots.
type Transmitter struct {
	Frames *Store
	Newest func(compare.Tuple) (seg bpf.LockstepLsCli, ok bool) // the remote's newest segment of a connection
	Signer Signer

	ToTap      Outlet // P: released frames; S: frames for the SVM
	Retransmit Outlet // S: copies, to the tap with the release mark (R22)
	ToGuest    Outlet // P: frames for the PVM that are not mirrored
	ToPeer     Outlet

	heads  [batch][MaxHeader + signedMax]byte // of the frames that are queued
	nheads int
	sent   sent
	frees  []compare.Slot // when what is queued was sent
}

// Outlet is a device that takes frames, with a mark of its own.
type Outlet interface {
	// Queue adds a frame: head holds the virtio-net header and the first bytes, tail (may
	// be empty) the rest. Both stay unchanged until Flush.
	Queue(head, tail []byte)
	// Join makes the frame that was queued last longer: head takes the place of its own, and tail
	// comes behind what it has. Up to MaxParts tails are joined.
	Join(head, tail []byte)
	// Flush sends what was queued, in order. A frame that is refused is lost.
	Flush()
	// Lost counts a frame that could not be made.
	Lost()
}

// batch bounds the frames that are queued at once.
const batch = 256

// signedMax is room for a peer frame made by user space.
const signedMax = VnetLen + EthLen + 4 + int(bpf.LockstepLsConstLS_REC_BASE)

// Apply carries out effects in order, as [datapath.Frames] has it.
func (t *Transmitter) Apply(effs []compare.Effect) {
	for i := range effs {
		e := &effs[i]
		if t.nheads == len(t.heads) {
			t.flush()
		}
		if e.Op != compare.OpSend && e.Op != compare.OpFree {
			t.sent.e = nil
		}
		switch e.Op {
		case compare.OpSend:
			t.send(e)
		case compare.OpDeliver, compare.OpForward:
			t.deliver(t.ToTap, e.Slot)
		case compare.OpReplay:
			t.deliver(t.Retransmit, e.Slot)
		case compare.OpNeigh:
			t.ToTap.Queue(NeighRequest(t.head(), e), nil)
		case compare.OpRemirror, compare.OpProbeSVM:
			t.repeatACK(t.ToPeer, e)
		case compare.OpSACK, compare.OpProbePVM:
			t.repeatACK(t.ToGuest, e)
		case compare.OpQuery:
			t.ToPeer.Queue(t.Signer.nackAll(t.head()), nil)
		case compare.OpFree:
			t.frees = append(t.frees, e.Slot)
		case compare.OpAsk:
			t.ToPeer.Queue(t.Signer.frame(t.head(), bpf.LockstepLsRecTypeLS_REC_ASK, e), nil)
		case compare.OpAnnounce:
			t.ToPeer.Queue(t.Signer.frame(t.head(), bpf.LockstepLsRecTypeLS_REC_ANNOUNCE, e), nil)
		case compare.OpAnswer:
			t.ToPeer.Queue(t.Signer.frame(t.head(), bpf.LockstepLsRecTypeLS_REC_ANSWER, e), nil)
		}
	}
	t.flush()
}

// RequestEcho asks S to return the time now, boottime ns (R20).
func (t *Transmitter) RequestEcho(now int64) {
	t.ToPeer.Queue(t.Signer.echo(t.head(), now), nil)
	t.flush()
}

// MarkStop marks for S where the PVM's STOP lies among its input (R16).
func (t *Transmitter) MarkStop() {
	t.ToPeer.Queue(t.Signer.Mark(t.head()), nil)
	t.flush()
}

// head is an empty buffer for the first bytes of a frame.
func (t *Transmitter) head() []byte {
	t.nheads++
	return t.heads[t.nheads-1][:0]
}

// send queues a frame in the PVM's name. One that cannot be built is counted as lost:
// the guests retransmit it.
func (t *Transmitter) send(e *compare.Effect) {
	if e.Free && e.Slot != compare.NoSlot {
		t.frees = append(t.frees, e.Slot)
	}
	l2l3, payload := e.Header[:e.HdrLen], []byte(nil)
	ports := binary.BigEndian.AppendUint16(nil, e.Tuple.GuestPort)
	ports = binary.BigEndian.AppendUint16(ports, e.Tuple.RemotePort)
	var m frameMeta
	ok := true
	if e.Slot != compare.NoSlot {
		l2l3, payload, m, ok = t.Frames.part(e.Slot, e.From, e.To)
	}
	if ok && t.join(e, l2l3, ports, payload, &m) {
		return
	}
	var head []byte
	if ok {
		head, ok = BuildHeader(t.head(), l2l3, ports, e, m.tpid, m.tci, len(payload), m.gso)
	}
	t.sent = sent{}
	if !ok {
		t.ToTap.Lost()
		return
	}
	t.ToTap.Queue(head, payload)
	t.sent = sent{e: e, head: head, l2l3: l2l3, meta: m, flags: e.Flags, bytes: len(payload), part: 1}
}

// deliver queues the frame in a slot as it was captured, and then frees the slot: a
// parked frame for the SVM, a datagram of the PVM, or a copy that is retransmitted (R22).
func (t *Transmitter) deliver(to Outlet, s compare.Slot) {
	t.frees = append(t.frees, s)
	data, m, ok := t.Frames.whole(s)
	if !ok {
		to.Lost()
		return
	}
	to.Queue(rawHeader(t.head(), data, &m), data[12:])
}

// DupThresh is how many duplicate ACKs make a sender retransmit (RFC 5681, 3.2).
const DupThresh = 3

// probe is what a probe has in the place of a byte that the guest has received.
var probe [1]byte

// repeatACK sends the remote's newest segment, without its payload, to S or to the PVM
// again (R6). With a SACK option it is to make the guest retransmit what the remote has
// not received: it is sent DupThresh times, and only if the remote has all before that.
func (t *Transmitter) repeatACK(to Outlet, e *compare.Effect) {
	c, ok := t.Newest(e.Tuple)
	if !ok {
		return // evicted: the guest's own timer has to do
	}
	l4, end := int(c.L4Off), int(c.HdrLen)
	if compare.Flags(c.TcpFlags)&(compare.ACK|compare.RST) != compare.ACK || l4+TCPLen > end || end > len(c.Hdr) {
		return
	}
	flags := compare.Flags(binary.BigEndian.Uint16(c.Hdr[l4+tcpFlagsOff:])&flagsMask) &^ (compare.FIN | compare.SYN | compare.PSH | compare.URG)
	ack := compare.Effect{Seq: c.Seq, Ack: c.Ack, Win: c.Win, Flags: flags}
	opts, times, payload := c.Hdr[l4+TCPLen:end], 1, []byte(nil)
	if e.Op == compare.OpProbeSVM || e.Op == compare.OpProbePVM {
		ack.Seq, payload = e.Seq, probe[:]
	}
	if e.OptLen > 0 {
		if c.Ack != e.Seq {
			return
		}
		opts, times = append(timestamp(opts), e.Opts[:e.OptLen]...), DupThresh
	}
	ack.OptLen = uint8(copy(ack.Opts[:], opts))
	tpid := uint16(EthVLAN)
	if c.Flags&uint8(bpf.LockstepLsEvFlagLS_EV_8021AD) != 0 {
		tpid = ethQinQ
	}
	if head, ok := BuildHeader(t.head(), c.Hdr[:l4], c.Hdr[l4:l4+4], &ack, tpid, c.Tci, len(payload), 0); ok {
		for range times {
			to.Queue(head, payload)
		}
	}
}

// flush sends what is queued, and frees the slots that were waiting for that.
func (t *Transmitter) flush() {
	for _, o := range []Outlet{t.ToTap, t.Retransmit, t.ToGuest, t.ToPeer} {
		o.Flush()
	}
	t.nheads, t.sent = 0, sent{}
	for _, s := range t.frees {
		t.Frames.free(s)
	}
	t.frees = t.frees[:0]
}
