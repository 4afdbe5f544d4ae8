// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
)

const (
	etherLen = 14
	ipv4Len  = 20
	ipv6Len  = 40
	tcpLen   = 20
	udpLen   = 8
	extLen   = 8 // of an IPv6 extension header without real options

	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd

	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58

	protoHopByHop, protoDestOptions = 0, 60

	ecnMask, ecnECT0, ecnCE = 3, 2, 3
)

var be = binary.BigEndian

// Sequence numbers wrap: a is before b when the shorter way from a to b is up.

func before(a, b uint32) bool { return int32(a-b) < 0 }
func after(a, b uint32) bool  { return int32(a-b) > 0 }

func maxSeq(a, b uint32) uint32 {
	if after(b, a) {
		return b
	}
	return a
}

func minSeq(a, b uint32) uint32 {
	if before(b, a) {
		return b
	}
	return a
}

// sum adds b, as 16-bit words, to the ones' complement sum acc. b must begin at an even position.
func sum(b []byte, acc uint64) uint64 {
	var carry uint64
	for len(b) >= 32 {
		acc, carry = bits.Add64(acc, be.Uint64(b), carry)
		acc, carry = bits.Add64(acc, be.Uint64(b[8:]), carry)
		acc, carry = bits.Add64(acc, be.Uint64(b[16:]), carry)
		acc, carry = bits.Add64(acc, be.Uint64(b[24:]), carry)
		b = b[32:]
	}
	for len(b) >= 4 {
		acc, carry = bits.Add64(acc, uint64(be.Uint32(b)), carry)
		b = b[4:]
	}
	if len(b) >= 2 {
		acc, carry = bits.Add64(acc, uint64(be.Uint16(b)), carry)
		b = b[2:]
	}
	if len(b) == 1 {
		acc, carry = bits.Add64(acc, uint64(b[0])<<8, carry)
	}
	return acc>>32 + acc&0xffffffff + carry // small, so that callers can add to it
}

// fold makes a checksum of a sum.
func fold(acc uint64) uint16 {
	acc = acc>>32 + acc&0xffffffff
	acc = acc>>32 + acc&0xffffffff
	acc = acc>>16 + acc&0xffff
	acc = acc>>16 + acc&0xffff
	acc = acc>>16 + acc&0xffff
	return ^uint16(acc)
}

// route is what all packets of one protocol to one address have in common.
type route struct {
	header  [etherLen + ipv6Len + 2*extLen]byte
	n       int    // bytes of header
	ipSum   uint64 // of the IPv4 header, without length, ID and TOS
	pseudo  uint64 // of the pseudo header, without the length
	remote  netip.Addr
	version uint8
}

// route makes the headers of packets to remote.
func (s *Stack) route(remote netip.Addr, proto uint8) route {
	r := route{remote: remote, version: 4, n: etherLen + ipv4Len}
	h := r.header[:]
	copy(h, s.cfg.PeerMAC[:])
	copy(h[6:], s.cfg.MAC[:])
	ip := h[etherLen:]
	if remote.Is4() {
		be.PutUint16(h[12:], etherIPv4)
		ip[0], ip[8], ip[9] = 0x45, 64, proto
		be.PutUint16(ip[6:], 0x4000) // do not fragment
		own, to := s.addr4, remote.As4()
		copy(ip[12:], own[:])
		copy(ip[16:], to[:])
		r.ipSum = sum(ip[:ipv4Len], 0)
		r.pseudo = sum(ip[12:ipv4Len], uint64(proto))
		return r
	}
	r.version, r.n = 6, etherLen+ipv6Len
	be.PutUint16(h[12:], etherIPv6)
	ip[0], ip[6], ip[7] = 0x60, proto, 64
	own, to := s.addr16, remote.As16()
	copy(ip[8:], own[:])
	copy(ip[24:], to[:])
	r.pseudo = sum(ip[8:ipv6Len], uint64(proto))
	next := &ip[6]
	for _, ext := range [...]struct {
		on   bool
		kind uint8
	}{{s.cfg.HopOptions, protoHopByHop}, {s.cfg.DestOptions, protoDestOptions}} {
		if !ext.on {
			continue
		}
		*next = ext.kind
		h := r.header[r.n:]
		h[0], h[2], h[3] = proto, 1, 4 // PadN
		next = &h[0]
		r.n += extLen
	}
	return r
}

// packet allocates a frame whose payload of the IP packet is n bytes long, with the headers
// up to it filled in.
func (s *Stack) packet(r *route, n int, id uint16, tos uint8) (frame, payload []byte) {
	frame = s.alloc(r.n + n)
	copy(frame, r.header[:r.n])
	ip := frame[etherLen:]
	if r.version == 4 {
		total := uint64(ipv4Len + n)
		ip[1] = tos
		be.PutUint16(ip[2:], uint16(total))
		be.PutUint16(ip[4:], id)
		be.PutUint16(ip[10:], fold(r.ipSum+total+uint64(id)+uint64(tos)))
	} else {
		be.PutUint16(ip, 0x6000|uint16(tos)<<4)
		be.PutUint16(ip[4:], uint16(r.n-etherLen-ipv6Len+n))
	}
	return frame, frame[r.n:]
}

// slab sizes: a frame costs no allocation of its own. The first one is small, for stacks that say little.
const firstSlab, nextSlab = 4 << 10, 16 << 10

// alloc returns n bytes that nothing else uses, for a frame that goes out.
func (s *Stack) alloc(n int) []byte {
	if len(s.slab) < n {
		size := nextSlab
		if s.slabs == 0 {
			size = firstSlab
		}
		s.slabs++
		s.slab = make([]byte, max(n, size))
	}
	b := s.slab[:n:n]
	s.slab = s.slab[n:]
	return b
}

// send has a frame wait for Take.
func (s *Stack) send(frame []byte) { s.out = append(s.out, frame) }

// header is a TCP header to be sent, without options and data.
type header struct {
	seq, ack uint32
	wnd, urg uint16
	flags    uint8
	ae       bool
	tos      uint8
	id       uint16
}

// transmit sends a segment. The length of opts is a multiple of 4.
func (s *Stack) transmit(r *route, local, remote uint16, h header, opts, data []byte) {
	head := tcpLen + len(opts)
	frame, t := s.packet(r, head+len(data), h.id, h.tos)
	be.PutUint16(t, local)
	be.PutUint16(t[2:], remote)
	be.PutUint32(t[4:], h.seq)
	be.PutUint32(t[8:], h.ack)
	t[12], t[13] = uint8(head)<<2, h.flags
	if h.ae {
		t[12] |= 1
	}
	be.PutUint16(t[14:], h.wnd)
	be.PutUint16(t[18:], h.urg)
	copy(t[tcpLen:], opts)
	copy(t[head:], data)
	be.PutUint16(t[16:], fold(sum(t, r.pseudo+uint64(len(t)))))
	s.send(frame)
}
