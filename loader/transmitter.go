// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/binary"

	"lockstep/bpf"
	"lockstep/compare"
)

// signedMax is room for a peer frame made by user space.
const signedMax = vnetHdrLen + ethLen + 4 + int(bpf.LockstepLsConstLS_REC_BASE)

// Apply implements [datapath.NIC].
func (n *NIC) Apply(effs []compare.Effect) error {
	for i := range effs {
		e := &effs[i]
		if n.nheads == len(n.heads) {
			n.flush()
		}
		switch e.Op {
		case compare.OpSend:
			n.send(e)
		case compare.OpDeliver, compare.OpForward:
			n.deliver(n.toTap, e.Slot)
			n.frees = append(n.frees, e.Slot)
		case compare.OpReplay:
			n.deliver(n.replays, e.Slot)
			n.frees = append(n.frees, e.Slot)
		case compare.OpNeigh:
			n.toTap.queue(neighRequest(n.head(), e), nil)
		case compare.OpRemirror:
			n.repeatACK(n.toPeer, e)
		case compare.OpSACK:
			n.repeatACK(n.toGuest, e)
		case compare.OpQuery:
			n.toPeer.queue(n.signer.query(n.head()), nil)
		case compare.OpFree:
			n.frees = append(n.frees, e.Slot)
		case compare.OpAsk:
			n.tell(bpf.LockstepLsRecTypeLS_REC_ASK, e)
		case compare.OpAnnounce:
			n.tell(bpf.LockstepLsRecTypeLS_REC_ANNOUNCE, e)
		case compare.OpAnswer:
			n.tell(bpf.LockstepLsRecTypeLS_REC_ANSWER, e)
		}
	}
	n.flush()
	return nil
}

func (n *NIC) head() []byte {
	n.nheads++
	return n.heads[n.nheads-1][:0]
}

// send queues a frame in the PVM's name. What cannot be built is counted as
// lost: the guests send it again.
func (n *NIC) send(e *compare.Effect) {
	if e.Free && e.Slot != compare.NoSlot {
		n.frees = append(n.frees, e.Slot)
	}
	l2l3, payload := e.Header[:e.HdrLen], []byte(nil)
	ports := binary.BigEndian.AppendUint16(nil, e.Tuple.GuestPort)
	ports = binary.BigEndian.AppendUint16(ports, e.Tuple.RemotePort)
	var m frameMeta
	if e.Slot != compare.NoSlot {
		m = n.meta[e.Slot]
		data := n.slots.data(e.Slot)
		if m.l4 == 0 || e.From > e.To || e.To > m.paylen {
			n.lost.tap.Add(1)
			return
		}
		l2l3, payload = data[:m.l4], data[m.pay+e.From:m.pay+e.To]
	}
	head, ok := buildHeader(n.head(), l2l3, ports, e, m.tpid, m.tci, len(payload), m.gso)
	if !ok {
		n.lost.tap.Add(1)
	} else {
		n.toTap.queue(head, payload)
	}
}

// dupThresh is how many duplicate ACKs make a sender repeat (RFC 5681, 3.2).
const dupThresh = 3

// repeatACK gives S or the PVM the remote's newest segment again, without its payload
// (R6). With a SACK option it is to repeat what the remote has not got: so only if the
// remote has all before that, and as often as it takes.
func (n *NIC) repeatACK(to *packetConn, e *compare.Effect) {
	var c bpf.LockstepLsCli
	key := toTuple(e.Tuple)
	if err := n.objs.LsCli.Lookup(&key, &c); err != nil {
		return // evicted: a chance to heal less
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
	if head, ok := buildHeader(n.head(), c.Hdr[:l4], c.Hdr[l4:l4+4], &ack, tpid, c.Tci, 0, 0); ok {
		for range times {
			to.queue(head, nil)
		}
	}
}

// RequestEcho implements [datapath.NIC].
func (n *NIC) RequestEcho() error {
	n.toPeer.queue(n.signer.echo(n.head(), n.Now()), nil)
	n.flush()
	return nil
}

// MarkStop implements [datapath.NIC].
func (n *NIC) MarkStop() error {
	n.toPeer.queue(n.signer.mark(n.head()), nil)
	n.flush()
	return nil
}

// deliver queues a frame as it came: parked for the SVM, a datagram of the PVM, or a
// copy that is said again (R22).
func (n *NIC) deliver(to *packetConn, s compare.Slot) {
	m, ok := n.meta[s]
	data := n.slots.frame(s)
	if !ok || len(data) < ethLen {
		n.lost.tap.Add(1)
		return
	}
	to.queue(rawHeader(n.head(), data, &m), data[12:])
}

func (n *NIC) tell(typ bpf.LockstepLsRecType, e *compare.Effect) {
	n.toPeer.queue(n.signer.frame(n.head(), typ, e), nil)
}

func (n *NIC) flush() {
	for _, c := range []*packetConn{n.toTap, n.replays, n.toGuest} {
		if lost, err := c.flush(); lost > 0 {
			n.lost.tap.Add(uint64(lost))
			n.log.Debug("frames not sent", "device", n.tap.Attrs().Name, "frames", lost, "err", err)
		}
	}
	if lost, err := n.toPeer.flush(); lost > 0 {
		n.lost.peer.Add(uint64(lost))
		n.log.Debug("frames not sent", "device", n.peer.Attrs().Name, "frames", lost, "err", err)
	}
	n.nheads = 0
	for _, s := range n.frees {
		delete(n.meta, s)
		n.slots.free(s)
	}
	n.frees = n.frees[:0]
}
