// SPDX-License-Identifier: Apache-2.0

package bpfmodel

import (
	"encoding/binary"

	"github.com/lockstep-ft/lockstep/rewriter"
)

const (
	protoICMP  = 1
	protoICMP6 = 58

	icmpLen  = 8 // before what is quoted
	icmpCsum = 2

	quoteMin = 8 // bytes that every router quotes
)

// ICMPError is a view of a frame with an ICMP error that quotes a TCP header.
type ICMPError struct {
	Frame []byte

	icmp, at, n int // where ICMP begins, the quoted header, and how much of that is there
	tuple       Tuple
}

// Parse makes e a view of frame and reports whether it is such an error. toGuest: it comes
// for the guest, which then has transmitted what is quoted.
func (e *ICMPError) Parse(frame []byte, toGuest bool) bool {
	v6 := false
	ip := frame[min(etherLen, len(frame)):]
	switch {
	case len(ip) < ipv4Len:
		return false
	case binary.BigEndian.Uint16(frame[12:]) == etherIPv6:
		v6 = true
	case binary.BigEndian.Uint16(frame[12:]) != etherIPv4:
		return false
	}
	outer, inner := protoICMP, ipv4Len
	if v6 {
		outer, inner = protoICMP6, ipv6Len
	}
	payload, ok := ipPayload(ip, v6, outer)
	if !ok || len(payload) < icmpLen+inner || !isError(payload[0], v6) {
		return false
	}
	// The length in the quoted header is that of the whole packet.
	q := payload[icmpLen:]
	hlen := inner
	if !v6 {
		hlen = int(q[0]&15) * 4
	}
	if v6 && (q[0]>>4 != 6 || q[6] != protoTCP) ||
		!v6 && (q[0]>>4 != 4 || hlen < ipv4Len || q[9] != protoTCP || binary.BigEndian.Uint16(q[6:])&0x1fff != 0) {
		return false
	}
	if len(q) < hlen+quoteMin {
		return false
	}
	tcp := q[hlen:min(len(q), hlen+tcpLen+maxOpts)]
	if len(tcp) > 12 {
		n := int(tcp[12]>>4) * 4
		if n < tcpLen {
			return false
		}
		tcp = tcp[:min(len(tcp), n)]
	}
	t := Tuple{GuestPort: binary.BigEndian.Uint16(tcp), RemotePort: binary.BigEndian.Uint16(tcp[2:]), Proto: protoTCP}
	if v6 {
		t.Guest, t.Remote = [16]byte(q[8:24]), [16]byte(q[24:40])
	} else {
		t.Guest, t.Remote = mapped(q[12:16]), mapped(q[16:20])
	}
	if !toGuest {
		t.Guest, t.Remote = t.Remote, t.Guest
		t.GuestPort, t.RemotePort = t.RemotePort, t.GuestPort
	}
	icmp := len(frame) - len(ip) + ipHeaderLen(ip, v6)
	*e = ICMPError{Frame: frame, icmp: icmp, at: icmp + icmpLen + hlen, n: len(tcp), tuple: t}
	return true
}

func ipHeaderLen(ip []byte, v6 bool) int {
	if v6 {
		return ipv6Len
	}
	return int(ip[0]&15) * 4
}

// ipPayload is what stands behind a whole IP header, if that is of protocol proto.
func ipPayload(ip []byte, v6 bool, proto int) (payload []byte, ok bool) {
	if v6 {
		if len(ip) < ipv6Len || ip[0]>>4 != 6 || int(ip[6]) != proto {
			return nil, false
		}
		end := ipv6Len + int(binary.BigEndian.Uint16(ip[4:]))
		if end > len(ip) {
			return nil, false
		}
		return ip[ipv6Len:end], true
	}
	hlen, end := int(ip[0]&15)*4, int(binary.BigEndian.Uint16(ip[2:]))
	if ip[0]>>4 != 4 || hlen < ipv4Len || end < hlen || end > len(ip) || int(ip[9]) != proto ||
		binary.BigEndian.Uint16(ip[6:])&0x3fff != 0 {
		return nil, false
	}
	return ip[hlen:end], true
}

func isError(typ byte, v6 bool) bool {
	if v6 {
		return typ < 128
	}
	return typ >= 3 && typ <= 5 || typ == 11 || typ == 12
}

// quoted is the part of the TCP header that is quoted.
func (e *ICMPError) quoted() TCP { return TCP(e.Frame[e.at : e.at+e.n : e.at+e.n]) }

// add adds n to the quoted field at offset at. The quoted checksum answers for it and so
// ICMP's, which covers both, stays; where that is not quoted ICMP's answers.
func (e *ICMPError) add(at int, n uint32) {
	if e.n >= offCsum+2 {
		add(e.Frame[e.at:], at, offCsum, n)
		return
	}
	add(e.Frame[e.icmp:], e.at-e.icmp+at, icmpCsum, n)
}

// acks reports whether the quoted segment acknowledges. Where the flags are not quoted a
// number that is not 0 shows that.
func (e *ICMPError) acks() bool {
	h := e.quoted()
	switch {
	case e.n < offAck+4:
		return false
	case e.n < 14:
		return h.Ack() != 0
	}
	return h.Flags()&ACK != 0
}

func (e *ICMPError) options() Options {
	if e.n <= tcpLen {
		return nil
	}
	return e.quoted().Options()
}

// toSVM gives the error, which quotes what the PVM transmitted, the SVM's numbers.
func (e *ICMPError) toSVM(off rewriter.Offset) {
	e.add(offSeq, off.Seq)
	for at := range e.options().timestamps() {
		e.add(tcpLen+at, off.TS)
	}
}

// toPVM gives the SVM's error, which quotes what the remote transmitted, the PVM's numbers.
func (e *ICMPError) toPVM(off rewriter.Offset) {
	if !e.acks() {
		return
	}
	e.add(offAck, -off.Seq)
	o := e.options()
	for at, end := range o.all() {
		if o[at] != optSACK {
			continue
		}
		for block := at + 2; block+8 <= end; block += 8 {
			e.add(tcpLen+block, -off.Seq)
			e.add(tcpLen+block+4, -off.Seq)
		}
	}
	for at := range o.timestamps() {
		if binary.BigEndian.Uint32(o[at+4:]) != 0 {
			e.add(tcpLen+at+4, -off.TS)
		}
	}
}

// Error translates an ICMP error for the SVM, or of it, in place. alone: it has taken
// over, and connections whose offset was not confirmed are connections by then.
func (t *Table) Error(e *ICMPError, toGuest, alone bool) {
	var off rewriter.Offset
	if c, ok := t.conn[e.tuple]; ok {
		off = c.Offset()
	} else if h := t.half.get(e.tuple); h != nil && h.Paired() && !alone {
		off = h.Offset()
	}
	if toGuest {
		e.toSVM(off)
	} else {
		e.toPVM(off)
	}
}

// ClearChecksum has the quoted checksum read 0, as the digest of the guest's own errors
// has it.
func (e *ICMPError) ClearChecksum() {
	if e.n >= offCsum+2 {
		clear(e.quoted()[offCsum : offCsum+2])
	}
}
