// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"net/netip"
	"slices"
)

// maxDatagrams is how many wait for ReceiveUDP.
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

func (s *Stack) udpIn(p *packet) {
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

// icmpIn answers echo requests.
func (s *Stack) icmpIn(p *packet) {
	m := p.payload
	pseudo, reply := uint64(0), uint8(echoReply)
	want := uint8(echoRequest)
	if p.proto == protoICMPv6 {
		pseudo, want, reply = p.pseudo, echoRequest6, echoReply6
	}
	if len(m) < minEcho || m[0] != want || m[1] != 0 || (p.proto == protoICMPv6) == s.is4 {
		return
	}
	if fold(sum(m, pseudo)) != 0 {
		s.bad++
		return
	}
	r := s.route(p.remote, p.proto)
	s.ipID++
	frame, b := s.packet(&r, len(m), s.ipID, 0)
	copy(b, m)
	b[0], b[2], b[3] = reply, 0, 0
	if p.proto == protoICMPv6 {
		pseudo = r.pseudo + uint64(len(m))
	}
	be.PutUint16(b[2:], fold(sum(b, pseudo)))
	s.send(frame)
}
