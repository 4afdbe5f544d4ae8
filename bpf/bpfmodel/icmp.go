// SPDX-License-Identifier: Apache-2.0

package bpfmodel

import (
	"encoding/binary"

	"github.com/lockstep-ft/lockstep/rewriter"
)

const (
	icmpLen  = 8 // before what is quoted
	icmpCsum = 2

	quoteMin = 8 // bytes that every router quotes
	quoteExt = 4 // IPv6 extension headers that are walked
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
	var s Segment
	return s.Parse(frame, toGuest) == ClassDatagram && e.Find(&s, toGuest)
}

// Find is Parse for a frame that is parsed already.
func (e *ICMPError) Find(s *Segment, toGuest bool) bool {
	if !s.Datagram || s.Frag != 0 || !isError(s.Proto, s.GuestPort) {
		return false
	}
	t := Tuple{VLAN: s.VLAN, VLAN2: s.VLAN2, Proto: protoTCP}
	at, ok := s.L4+icmpLen, false
	if s.Proto == protoICMP {
		at, ok = quotedIPv4(s.Frame, at, &t)
	} else {
		at, ok = quotedIPv6(s.Frame, at, &t)
	}
	if !ok || at+quoteMin > s.End {
		return false
	}
	tcp := s.Frame[at:min(s.End, at+tcpLen+maxOpts)]
	if len(tcp) > 12 {
		n := int(tcp[12]>>4) * 4
		if n < tcpLen {
			return false
		}
		tcp = tcp[:min(len(tcp), n)]
	}
	t.GuestPort, t.RemotePort = binary.BigEndian.Uint16(tcp), binary.BigEndian.Uint16(tcp[2:])
	if !toGuest {
		t.Guest, t.Remote = t.Remote, t.Guest
		t.GuestPort, t.RemotePort = t.RemotePort, t.GuestPort
	}
	*e = ICMPError{Frame: s.Frame, icmp: s.L4, at: at, n: len(tcp), tuple: t}
	return true
}

func isError(proto uint8, typ uint16) bool {
	switch proto {
	case protoICMP6:
		return typ < 128
	case protoICMP:
		return typ >= 3 && typ <= 5 || typ == 11 || typ == 12
	}
	return false
}

// quotedIPv4 reads the quoted header at at, with its sender as t's guest, and returns where
// TCP follows. The length in it is that of the whole packet, and means nothing here.
func quotedIPv4(frame []byte, at int, t *Tuple) (l4 int, ok bool) {
	if at+ipv4Len > len(frame) {
		return 0, false
	}
	ip := frame[at:]
	if ip[0]>>4 != 4 || ip[0]&15 < 5 || ip[9] != protoTCP || binary.BigEndian.Uint16(ip[6:])&0x1fff != 0 {
		return 0, false
	}
	t.Guest, t.Remote = mapped(ip[12:16]), mapped(ip[16:20])
	return at + int(ip[0]&15)*4, true
}

func quotedIPv6(frame []byte, at int, t *Tuple) (l4 int, ok bool) {
	if at+ipv6Len > len(frame) {
		return 0, false
	}
	ip := frame[at:]
	if ip[0]>>4 != 6 {
		return 0, false
	}
	t.Guest, t.Remote = [16]byte(ip[8:24]), [16]byte(ip[24:40])
	proto := ip[6]
	at += ipv6Len
	for range quoteExt {
		if proto != protoHopByHop && proto != protoDestOpts && proto != protoFragment {
			break
		}
		if at+4 > len(frame) {
			return 0, false
		}
		ext := frame[at:]
		if proto == protoFragment {
			if binary.BigEndian.Uint16(ext[2:])&0xfff8 != 0 {
				return 0, false
			}
			at += 8
		} else {
			at += (int(ext[1]) + 1) * 8
		}
		proto = ext[0]
	}
	return at, proto == protoTCP
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
	c, ok := t.conn[e.tuple]
	switch {
	case t.Unquoted:
	case ok && alone:
		e.pass(&c, t.edgeOf(e.tuple), toGuest)
	case ok:
		e.move(c.Offset(), toGuest)
	case alone:
	default:
		if h := t.half.Get(e.tuple); h != nil && h.Paired() {
			e.move(h.Offset(), toGuest)
		}
	}
}

// pass translates by a connection that was taken over, and by the edge beyond it.
func (e *ICMPError) pass(c *Conn, edge rewriter.Offset, toGuest bool) {
	off := rewriter.Offset{Seq: c.Off + edge.Seq, TS: c.TSOff + edge.TS}
	if toGuest && c.TSFirst != 0 || !toGuest && c.State&rewriter.Echoes != 0 {
		off.TS -= c.Guard
	}
	e.move(off, toGuest)
}

func (e *ICMPError) move(off rewriter.Offset, toGuest bool) {
	if toGuest {
		e.toSVM(off)
	} else {
		e.toPVM(off)
	}
}

// ClearChecksum has the quoted checksum read 0, as the digest of the guest's own errors
// has it, and returns what it was.
func (e *ICMPError) ClearChecksum() (was uint16) {
	if e.n >= offCsum+2 {
		was = e.quoted().Checksum()
		e.SetChecksum(0)
	}
	return was
}

// SetChecksum sets the quoted checksum, if it is quoted.
func (e *ICMPError) SetChecksum(sum uint16) {
	if e.n >= offCsum+2 {
		binary.BigEndian.PutUint16(e.quoted()[offCsum:], sum)
	}
}
