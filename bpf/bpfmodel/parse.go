// SPDX-License-Identifier: Apache-2.0

package bpfmodel

import (
	"encoding/binary"

	"github.com/lockstep-ft/lockstep/compare"
)

const (
	etherLen = 14
	ipv4Len  = 20
	ipv6Len  = 40
	arpLen   = 28

	etherIPv4 = 0x0800
	etherARP  = 0x0806
	etherRARP = 0x8035
	etherVLAN = 0x8100
	etherIPv6 = 0x86dd
	etherQinQ = 0x88a8
	etherLLDP = 0x88cc
	llcMax    = 1500 // an ethertype up to it is the length of what follows

	protoHopByHop = 0
	protoICMP     = 1
	protoIGMP     = 2
	protoTCP      = 6
	protoUDP      = 17
	protoRouting  = 43
	protoFragment = 44
	protoICMP6    = 58
	protoDestOpts = 60

	l4Max     = 176 // bytes before a TCP header; more: compared as a datagram
	extMax    = 8   // IPv6 extension headers that are walked
	solicit   = 135 // neighbour solicitation
	vlanID    = 0xfff
	moreFrags = 0x2000
)

// Tuple names one flow as its guest sees it.
type Tuple = compare.Tuple

// Class is what a frame is to the programs.
type Class uint8

// Classes.
const (
	ClassTCP       Class = iota // a whole TCP segment
	ClassLink                   // ARP, ND, MLD, IGMP, LLDP, RARP: not compared
	ClassDatagram               // anything else that is well-formed
	ClassMalformed              // headers cut short or contradicting themselves
)

// Segment is a view of a frame, as the programs parse it. Its outer VLAN tag may be out of
// band, as the kernel keeps it.
type Segment struct {
	Frame   []byte // from the Ethernet header; behind the IP packet may be padding
	TCI     uint16 // VLAN tag out of band; 0: there is none
	Partial bool   // the checksum covers the pseudo header only

	Tuple
	L3, L4, Pay, End int    // where the headers, the payload and what is behind it begin
	Datagram         bool   // of ClassDatagram
	Pos              uint32 // of a datagram: the position that its digest begins at
	Frag             uint16 // byte offset of a fragment | 1 when more follow
	Asks             bool   // ARP request or neighbour solicitation of Guest for Remote
}

// Parse makes s a view of frame. toGuest: the guest is the receiver, else the sender. Of a
// frame of ClassMalformed as much is set as was understood.
func (s *Segment) Parse(frame []byte, toGuest bool) Class {
	*s = Segment{Frame: frame, TCI: s.TCI, Partial: s.Partial}
	tagged := s.TCI != 0
	s.VLAN = s.TCI & vlanID
	if len(frame) < etherLen {
		return ClassMalformed
	}
	s.L3 = etherLen
	proto := binary.BigEndian.Uint16(frame[12:])
	for range 2 {
		if proto != etherVLAN && proto != etherQinQ {
			break
		}
		if len(frame) < s.L3+4 {
			return ClassMalformed
		}
		id := binary.BigEndian.Uint16(frame[s.L3:]) & vlanID
		if tagged {
			s.VLAN2 = id
		} else {
			s.VLAN = id
		}
		tagged = true
		proto = binary.BigEndian.Uint16(frame[s.L3+2:])
		s.L3 += 4
	}
	switch proto {
	case etherIPv4:
		return s.parseIPv4(toGuest)
	case etherIPv6:
		return s.parseIPv6(toGuest)
	case etherARP:
		s.parseARP()
		return ClassLink
	case etherRARP, etherLLDP:
		return ClassLink
	}
	s.Proto, s.GuestPort = compare.ProtoEthernet, proto
	var src, dst [16]byte
	copy(dst[10:], frame[:6])
	copy(src[10:], frame[6:12])
	s.between(src, dst, toGuest)
	n := len(frame) - s.L3
	if proto <= llcMax {
		if int(proto) > n {
			return ClassMalformed
		}
		n = int(proto)
	}
	return s.datagram(s.L3, s.L3, s.L3+n, 0)
}

// between sets the addresses.
func (s *Segment) between(src, dst [16]byte, toGuest bool) {
	if toGuest {
		src, dst = dst, src
	}
	s.Guest, s.Remote = src, dst
}

// datagram: what lies from pay to end is digested from position pos on.
func (s *Segment) datagram(l4, pay, end int, pos uint32) Class {
	s.Datagram = true
	s.L4, s.Pay, s.End, s.Pos = l4, pay, end, pos
	return ClassDatagram
}

// fragment is digested at its own position. Its ports are not used: only the first has them.
func (s *Segment) fragment(at, end int, pos uint16, more bool) Class {
	s.Frag = pos
	if more {
		s.Frag |= 1
	}
	return s.datagram(at, at, end, uint32(pos))
}

func (s *Segment) parseIPv4(toGuest bool) Class {
	ip := s.Frame[s.L3:]
	if len(ip) < ipv4Len {
		return ClassMalformed
	}
	hlen, n := int(ip[0]&15)*4, int(binary.BigEndian.Uint16(ip[2:]))
	if ip[0]>>4 != 4 || hlen < ipv4Len || n < hlen || n > len(ip) {
		return ClassMalformed
	}
	s.Proto = ip[9]
	if s.Proto == protoIGMP {
		return ClassLink
	}
	s.between(mapped(ip[12:16]), mapped(ip[16:20]), toGuest)
	if frag := binary.BigEndian.Uint16(ip[6:]); frag&0x3fff != 0 {
		return s.fragment(s.L3+hlen, s.L3+n, frag&0x1fff*8, frag&moreFrags != 0)
	}
	return s.parseL4(s.L3+hlen, s.L3+n, toGuest)
}

func (s *Segment) parseIPv6(toGuest bool) Class {
	ip := s.Frame[s.L3:]
	if len(ip) < ipv6Len {
		return ClassMalformed
	}
	at := s.L3 + ipv6Len
	end := at + int(binary.BigEndian.Uint16(ip[4:]))
	if ip[0]>>4 != 6 || end > len(s.Frame) {
		return ClassMalformed
	}
	s.between([16]byte(ip[8:24]), [16]byte(ip[24:40]), toGuest)
	s.Proto = ip[6]
	routed := false
	for range extMax {
		proto := s.Proto
		if proto != protoHopByHop && proto != protoDestOpts && proto != protoRouting && proto != protoFragment {
			break
		}
		if at+8 > end {
			return ClassMalformed
		}
		ext := s.Frame[at:]
		s.Proto = ext[0]
		if proto == protoFragment {
			at += 8
			if frag := binary.BigEndian.Uint16(ext[2:]); frag&0xfff9 != 0 {
				return s.fragment(at, end, frag&0xfff8, frag&1 != 0)
			}
			continue
		}
		routed = routed || proto == protoRouting
		at += (int(ext[1]) + 1) * 8
		if at > end {
			return ClassMalformed
		}
	}
	if s.Proto == protoICMP6 && s.parseICMP6Link(at) {
		return ClassLink
	}
	// The pseudo header has the final destination, not the header's: not translatable.
	if routed {
		return s.datagram(at, at, end, 0)
	}
	return s.parseL4(at, end, toGuest)
}

// parseICMP6Link: ND is 133 to 137, MLD 130 to 132 and 143.
func (s *Segment) parseICMP6Link(at int) bool {
	if at >= len(s.Frame) {
		return false
	}
	typ := s.Frame[at]
	if typ != 143 && (typ < 130 || typ > 137) {
		return false
	}
	// Duplicate address detection has no sender address.
	if typ == solicit && s.Guest != [16]byte{} {
		s.Remote = [16]byte{}
		if s.Asks = at+24 <= len(s.Frame); s.Asks {
			s.Remote = [16]byte(s.Frame[at+8:])
		}
	}
	return true
}

// parseARP: probes have no sender address, announcements ask for their own.
func (s *Segment) parseARP() {
	arp := s.Frame[s.L3:]
	if len(arp) < arpLen || binary.BigEndian.Uint16(arp[6:]) != 1 || binary.BigEndian.Uint16(arp[2:]) != etherIPv4 || arp[4] != 6 || arp[5] != 4 {
		return
	}
	from, to := [4]byte(arp[14:]), [4]byte(arp[24:])
	if from == [4]byte{} || from == to {
		return
	}
	s.Guest, s.Remote, s.Asks = mapped(from[:]), mapped(to[:]), true
}

// parseL4 parses what lies from l4 to end behind the IP headers. The checksum of UDP and
// ICMP is not digested: it follows from the rest.
func (s *Segment) parseL4(l4, end int, toGuest bool) Class {
	b := s.Frame[l4:end]
	switch s.Proto {
	case protoTCP:
		if l4 > l4Max {
			break
		}
		if len(b) < tcpLen {
			return ClassMalformed
		}
		h := TCP(b)
		if h.Len() < tcpLen || h.Len() > len(b) {
			return ClassMalformed
		}
		s.L4, s.Pay, s.End = l4, l4+h.Len(), end
		s.ports(h.SrcPort(), h.DstPort(), toGuest)
		return ClassTCP
	case protoUDP:
		if len(b) < 8 {
			return ClassMalformed
		}
		s.ports(binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:]), toGuest)
		return s.datagram(l4, l4+8, end, 0)
	case protoICMP, protoICMP6:
		if len(b) < 4 {
			return ClassMalformed
		}
		s.GuestPort, s.RemotePort = uint16(b[0]), uint16(b[1])
		return s.datagram(l4, l4+4, end, 4)
	}
	return s.datagram(l4, l4, end, 0)
}

func (s *Segment) ports(src, dst uint16, toGuest bool) {
	if toGuest {
		src, dst = dst, src
	}
	s.GuestPort, s.RemotePort = src, dst
}

func mapped(b []byte) (a [16]byte) {
	a[10], a[11] = 0xff, 0xff
	copy(a[12:], b)
	return a
}

// TCP is the segment's header.
func (s *Segment) TCP() TCP { return TCP(s.Frame[s.L4:s.Pay:s.Pay]) }

// Payload is the segment's payload; Ethernet padding is not.
func (s *Segment) Payload() []byte { return s.Frame[s.Pay:s.End:s.End] }

// PayloadPos is the position of the payload's first byte: a SYN comes before it.
func (s *Segment) PayloadPos() uint32 {
	switch h := s.TCP(); {
	case s.Datagram:
		return s.Pos
	case h.Flags()&SYN != 0:
		return h.Seq() + 1
	default:
		return h.Seq()
	}
}

// EndPos is the position behind the segment. A SYN and a FIN take one each (R3).
func (s *Segment) EndPos() uint32 {
	end := s.PayloadPos() + uint32(s.End-s.Pay)
	if s.TCP().Flags()&FIN != 0 {
		end++
	}
	return end
}
