// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/binary"
	"errors"
	"log/slog"
	"sync/atomic"

	"github.com/vishvananda/netlink"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
)

// transmitter carries out effects: it sends frames in the guests' name and records to
// the peer, and frees slots.
type transmitter struct {
	log    *slog.Logger
	frames *frames
	conns  *conntrack
	signer signer

	toTap      outlet // P: released frames; S: frames for the SVM
	retransmit outlet // S: copies, to the tap with the release mark (R22)
	toGuest    outlet // P: frames for the PVM that are not mirrored
	toPeer     outlet

	heads  [batch][maxHeader + signedMax]byte // of the frames that are queued
	nheads int
	frees  []compare.Slot // when what is queued was sent
}

// outlet is a socket on a device, with the counter of what the kernel refused there.
type outlet struct {
	*packetConn
	device string
	lost   *atomic.Uint64
}

// signedMax is room for a peer frame made by user space.
const signedMax = vnetHdrLen + ethLen + 4 + int(bpf.LockstepLsConstLS_REC_BASE)

func (t *transmitter) open(role Role, tap, peer netlink.Link, m marks, c *counters) error {
	mark := m.release
	if role == Secondary {
		mark = m.mirrored
	}
	for _, o := range []struct {
		out  *outlet
		dev  netlink.Link
		mark uint32
		lost *atomic.Uint64
	}{
		{&t.toTap, tap, mark, &c.lost.tap},
		{&t.retransmit, tap, m.release, &c.lost.tap},
		{&t.toGuest, tap, m.mirrored, &c.lost.tap},
		{&t.toPeer, peer, 0, &c.lost.peer},
	} {
		conn, err := newPacketConn(o.dev.Attrs().Index, o.mark)
		if err != nil {
			return err
		}
		*o.out = outlet{conn, o.dev.Attrs().Name, o.lost}
	}
	return nil
}

// outlets are in the order in which they are flushed.
func (t *transmitter) outlets() [4]*outlet {
	return [...]*outlet{&t.toTap, &t.retransmit, &t.toGuest, &t.toPeer}
}

func (t *transmitter) close() error {
	var errs []error
	for _, o := range t.outlets() {
		if o.packetConn != nil {
			errs = append(errs, o.close())
		}
	}
	return errors.Join(errs...)
}

// Apply implements [datapath.NIC].
func (t *transmitter) Apply(effs []compare.Effect) error {
	for i := range effs {
		e := &effs[i]
		if t.nheads == len(t.heads) {
			t.flush()
		}
		switch e.Op {
		case compare.OpSend:
			t.send(e)
		case compare.OpDeliver, compare.OpForward:
			t.deliver(&t.toTap, e.Slot)
		case compare.OpReplay:
			t.deliver(&t.retransmit, e.Slot)
		case compare.OpNeigh:
			t.toTap.queue(neighRequest(t.head(), e), nil)
		case compare.OpRemirror:
			t.repeatACK(&t.toPeer, e)
		case compare.OpSACK:
			t.repeatACK(&t.toGuest, e)
		case compare.OpQuery:
			t.toPeer.queue(t.signer.nackAll(t.head()), nil)
		case compare.OpFree:
			t.frees = append(t.frees, e.Slot)
		case compare.OpAsk:
			t.toPeer.queue(t.signer.frame(t.head(), bpf.LockstepLsRecTypeLS_REC_ASK, e), nil)
		case compare.OpAnnounce:
			t.toPeer.queue(t.signer.frame(t.head(), bpf.LockstepLsRecTypeLS_REC_ANNOUNCE, e), nil)
		case compare.OpAnswer:
			t.toPeer.queue(t.signer.frame(t.head(), bpf.LockstepLsRecTypeLS_REC_ANSWER, e), nil)
		}
	}
	t.flush()
	return nil
}

// RequestEcho implements [datapath.NIC].
func (t *transmitter) RequestEcho() error {
	t.toPeer.queue(t.signer.echo(t.head(), bootTime()), nil)
	t.flush()
	return nil
}

// MarkStop implements [datapath.NIC].
func (t *transmitter) MarkStop() error {
	t.toPeer.queue(t.signer.mark(t.head()), nil)
	t.flush()
	return nil
}

// head is an empty buffer for the first bytes of a frame.
func (t *transmitter) head() []byte {
	t.nheads++
	return t.heads[t.nheads-1][:0]
}

// send queues a frame in the PVM's name. One that cannot be built is counted as lost:
// the guests retransmit it.
func (t *transmitter) send(e *compare.Effect) {
	if e.Free && e.Slot != compare.NoSlot {
		t.frees = append(t.frees, e.Slot)
	}
	l2l3, payload := e.Header[:e.HdrLen], []byte(nil)
	ports := binary.BigEndian.AppendUint16(nil, e.Tuple.GuestPort)
	ports = binary.BigEndian.AppendUint16(ports, e.Tuple.RemotePort)
	var m frameMeta
	ok := true
	if e.Slot != compare.NoSlot {
		l2l3, payload, m, ok = t.frames.part(e.Slot, e.From, e.To)
	}
	var head []byte
	if ok {
		head, ok = buildHeader(t.head(), l2l3, ports, e, m.tpid, m.tci, len(payload), m.gso)
	}
	if !ok {
		t.toTap.lost.Add(1)
		return
	}
	t.toTap.queue(head, payload)
}

// deliver queues the frame in a slot as it was captured, and then frees the slot: a
// parked frame for the SVM, a datagram of the PVM, or a copy that is retransmitted (R22).
func (t *transmitter) deliver(to *outlet, s compare.Slot) {
	t.frees = append(t.frees, s)
	data, m, ok := t.frames.whole(s)
	if !ok {
		to.lost.Add(1)
		return
	}
	to.queue(rawHeader(t.head(), data, &m), data[12:])
}

// dupThresh is how many duplicate ACKs make a sender retransmit (RFC 5681, 3.2).
const dupThresh = 3

// repeatACK sends the remote's newest segment, without its payload, to S or to the PVM
// again (R6). With a SACK option it is to make the guest retransmit what the remote has
// not received: it is sent dupThresh times, and only if the remote has all before that.
func (t *transmitter) repeatACK(to *outlet, e *compare.Effect) {
	c, ok := t.conns.newest(e.Tuple)
	if !ok {
		return // evicted: the guest's own timer has to do
	}
	l4, end := int(c.L4Off), int(c.HdrLen)
	if compare.Flags(c.TcpFlags)&(compare.ACK|compare.RST) != compare.ACK || l4+tcpHdrLen > end || end > len(c.Hdr) {
		return
	}
	flags := compare.Flags(binary.BigEndian.Uint16(c.Hdr[l4+tcpFlagsOff:])&flagsMask) &^ (compare.FIN | compare.SYN | compare.PSH | compare.URG)
	ack := compare.Effect{Seq: c.Seq, Ack: c.Ack, Win: c.Win, Flags: flags}
	opts, times := c.Hdr[l4+tcpHdrLen:end], 1
	if e.OptLen > 0 {
		if c.Ack != e.Seq {
			return
		}
		opts, times = append(timestamp(opts), e.Opts[:e.OptLen]...), dupThresh
	}
	ack.OptLen = uint8(copy(ack.Opts[:], opts))
	tpid := uint16(ethVLAN)
	if c.Flags&uint8(bpf.LockstepLsEvFlagLS_EV_8021AD) != 0 {
		tpid = ethQinQ
	}
	if head, ok := buildHeader(t.head(), c.Hdr[:l4], c.Hdr[l4:l4+4], &ack, tpid, c.Tci, 0, 0); ok {
		for range times {
			to.queue(head, nil)
		}
	}
}

// flush sends what is queued, and frees the slots that were waiting for that.
func (t *transmitter) flush() {
	for _, o := range t.outlets() {
		if lost, err := o.flush(); lost > 0 {
			o.lost.Add(uint64(lost))
			t.log.Debug("frames not sent", "device", o.device, "frames", lost, "err", err)
		}
	}
	t.nheads = 0
	for _, s := range t.frees {
		t.frames.free(s)
	}
	t.frees = t.frees[:0]
}
