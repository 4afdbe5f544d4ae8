// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"net/netip"
	"slices"
)

// maxDatagrams is how many wait for ReceiveUDP, and for ReceivePong.
const maxDatagrams = 1024

type datagram struct {
	remote netip.AddrPort
	port   uint16
	data   []byte
}

// SendUDP sends a datagram.
func (s *Stack) SendUDP(now int64, local uint16, remote netip.AddrPort, b []byte) {
	s.now = now
	r := s.route(remote.Addr(), protoUDP)
	s.ipID++
	frame, u := s.packet(&r, udpLen+len(b), s.ipID, 0)
	be.PutUint16(u, local)
	be.PutUint16(u[2:], remote.Port())
	be.PutUint16(u[4:], uint16(len(u)))
	copy(u[udpLen:], b)
	check := fold(sum(u, r.pseudo+uint64(len(u))))
	if check == 0 {
		check = 0xffff
	}
	be.PutUint16(u[6:], check)
	s.send(frame)
}

// ReceiveUDP returns the next datagram that came in for a port.
func (s *Stack) ReceiveUDP(port uint16) ([]byte, netip.AddrPort, bool) {
	for i := range s.datagrams {
		if d := s.datagrams[i]; d.port == port {
			s.datagrams = slices.Delete(s.datagrams, i, i+1)
			return d.data, d.remote, true
		}
	}
	return nil, netip.AddrPort{}, false
}

func udpIn(s *Stack, p *packet) {
	u := p.payload
	if len(u) < udpLen || int(be.Uint16(u[4:])) != len(u) {
		return
	}
	if be.Uint16(u[6:]) != 0 && fold(sum(u, p.pseudo)) != 0 {
		s.bad++
		return
	}
	if len(s.datagrams) >= maxDatagrams {
		return
	}
	s.datagrams = append(s.datagrams, datagram{
		remote: netip.AddrPortFrom(p.remote, be.Uint16(u)), port: be.Uint16(u[2:]), data: slices.Clone(u[udpLen:]),
	})
}

// Types of ICMP and ICMPv6 messages.
const (
	echoRequest, echoReply   = 8, 0
	echoRequest6, echoReply6 = 128, 129
	minEcho                  = 8
)

// icmpIn answers echo requests, and keeps answers for ReceivePong.
func icmpIn(s *Stack, p *packet) {
	m := p.payload
	pseudo, request, reply := uint64(0), uint8(echoRequest), uint8(echoReply)
	if p.proto == protoICMPv6 {
		pseudo, request, reply = p.pseudo, echoRequest6, echoReply6
	}
	if len(m) < minEcho || m[0] != request && m[0] != reply || m[1] != 0 || (p.proto == protoICMPv6) == s.is4 {
		return
	}
	if fold(sum(m, pseudo)) != 0 {
		s.bad++
		return
	}
	switch {
	case m[0] == request:
		sendEcho(s, p.remote, reply, m[4:])
	case len(s.pongs) < maxDatagrams:
		s.pongs = append(s.pongs, slices.Clone(m[4:]))
	}
}

// sendEcho sends an echo request or reply with what stands behind its checksum.
func sendEcho(s *Stack, remote netip.Addr, typ uint8, rest []byte) {
	proto := uint8(protoICMP)
	if !s.is4 {
		proto = protoICMPv6
	}
	r := s.route(remote, proto)
	s.ipID++
	frame, b := s.packet(&r, 4+len(rest), s.ipID, 0)
	b[0] = typ
	copy(b[4:], rest)
	pseudo := uint64(0)
	if !s.is4 {
		pseudo = r.pseudo + uint64(len(b))
	}
	be.PutUint16(b[2:], fold(sum(b, pseudo)))
	s.send(frame)
}

// Ping sends an ICMP echo request.
func (s *Stack) Ping(now int64, remote netip.Addr, id, seq uint16, data []byte) {
	s.now = now
	typ := uint8(echoRequest)
	if !s.is4 {
		typ = echoRequest6
	}
	sendEcho(s, remote, typ, slices.Concat(be.AppendUint16(be.AppendUint16(nil, id), seq), data))
}

// ReceivePong returns the next echo reply that came in for an identifier.
func (s *Stack) ReceivePong(id uint16) (seq uint16, data []byte, ok bool) {
	for i, m := range s.pongs {
		if be.Uint16(m) == id {
			s.pongs = slices.Delete(s.pongs, i, i+1)
			return be.Uint16(m[2:]), m[4:], true
		}
	}
	return 0, nil, false
}
