// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"bytes"
	"net/netip"
)

// TCP flags.
const (
	fin uint8 = 1 << iota
	syn
	rst
	psh
	ack
	urg
	ece
	cwr
)

// packet is an IP packet that is for this stack. Its slices are those of the frame.
type packet struct {
	remote  netip.Addr
	proto   uint8
	ce, ect bool // congestion experienced, ECN capable
	payload []byte
	pseudo  uint64 // sum of the pseudo header
	whole   []byte // from the IP header on
}

// parsePacket reads a frame. It refuses frames for others, fragments, extension headers
// other than options, and IP headers that are not whole.
func (s *Stack) parsePacket(frame []byte, p *packet) bool {
	if len(frame) < etherLen+ipv4Len || !bytes.Equal(frame[:6], s.cfg.MAC[:]) {
		return false
	}
	ip := frame[etherLen:]
	switch be.Uint16(frame[12:]) {
	case etherIPv4:
		head, total := int(ip[0]&15)*4, int(be.Uint16(ip[2:]))
		if !s.is4 || ip[0]>>4 != 4 || head < ipv4Len || total < head || total > len(ip) || be.Uint16(ip[6:])&0x3fff != 0 {
			return false
		}
		if [4]byte(ip[16:20]) != s.addr4 {
			return false
		}
		if fold(sum(ip[:head], 0)) != 0 {
			s.bad++
			return false
		}
		p.proto, p.ce, p.whole, p.payload = ip[9], ip[1]&ecnMask == ecnCE, ip[:total], ip[head:total]
		p.ect = ip[1]&ecnMask != 0
		p.remote = netip.AddrFrom4([4]byte(ip[12:16]))
		p.pseudo = sum(ip[12:20], uint64(p.proto)+uint64(len(p.payload)))
	case etherIPv6:
		if s.is4 || len(ip) < ipv6Len || ip[0]>>4 != 6 {
			return false
		}
		total := ipv6Len + int(be.Uint16(ip[4:]))
		if total > len(ip) || [16]byte(ip[24:40]) != s.addr16 {
			return false
		}
		p.proto, p.ce, p.whole, p.payload = ip[6], ip[1]>>4&ecnMask == ecnCE, ip[:total], ip[ipv6Len:total]
		p.ect = ip[1]>>4&ecnMask != 0
		p.remote = netip.AddrFrom16([16]byte(ip[8:24]))
		if !p.skipOptions() {
			return false
		}
		p.pseudo = sum(ip[8:40], uint64(p.proto)+uint64(len(p.payload)))
	default:
		return false
	}
	return true
}

// skipOptions skips IPv6 hop-by-hop and destination options.
func (p *packet) skipOptions() bool {
	for p.proto == protoHopByHop || p.proto == protoDestOptions {
		b := p.payload
		if len(b) < extLen || len(b) < (int(b[1])+1)*8 {
			return false
		}
		p.proto, p.payload = b[0], b[(int(b[1])+1)*8:]
	}
	return true
}

// span is a range of sequence numbers, the end not included.
type span struct{ from, to uint32 }

// segment is a TCP segment that came in.
type segment struct {
	from, to uint16 // ports
	seq, ack uint32
	end      uint32 // the sequence number behind it, SYN and FIN counted
	wnd, urg uint16
	flags    uint8
	ae       bool
	ce, ect  bool
	data     []byte
	options
}

func (g *segment) has(flags uint8) bool { return g.flags&flags != 0 }

// parse reads the TCP segment of a packet, whose checksum has to be right.
func (g *segment) parse(p *packet) bool {
	t := p.payload
	if len(t) < tcpLen {
		return false
	}
	head := int(t[12]>>4) * 4
	if head < tcpLen || head > len(t) {
		return false
	}
	g.from, g.to = be.Uint16(t), be.Uint16(t[2:])
	g.seq, g.ack = be.Uint32(t[4:]), be.Uint32(t[8:])
	g.flags, g.wnd, g.urg = t[13], be.Uint16(t[14:]), be.Uint16(t[18:])
	g.ae, g.ce, g.ect, g.data = t[12]&1 != 0, p.ce, p.ect, t[head:]
	g.end = g.seq + uint32(len(g.data))
	if g.flags&syn != 0 {
		g.end++
	}
	if g.flags&fin != 0 {
		g.end++
	}
	g.options.parse(t[tcpLen:head], g.flags&syn != 0)
	return true
}
