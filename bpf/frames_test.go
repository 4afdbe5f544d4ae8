// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"math/rand/v2"
	"slices"

	"github.com/lockstep-ft/lockstep/bpf"
)

// class is what a frame is to the programs.
type class int

const (
	isTCP class = iota
	isDgram
	isLink // leaves from the PVM only
	isAsk  // so, and the SVM's is handed to the primary
	isBad
)

// sample is a frame and what the programs are to make of it.
type sample struct {
	name  string
	class class
	frame []byte

	ip           int // version, 0 for other protocols
	proto        uint8
	gport, rport uint16
	vlan, vlan2  uint16
	l3, l4, pay  int // l3: 14 unless set
	n            int // payload bytes
	pos          uint32
	frag         uint16
	seg          seg // isTCP
}

// Ports and numbers of the samples.
const (
	gport, rport = 53, 40000
	segSeq       = 0xfffffff0 // its payload goes over the wrap
)

func (s *sample) tuple() bpf.LockstepLsTuple {
	t := bpf.LockstepLsTuple{Gport: s.gport, Rport: s.rport, Vlan: s.vlan, Vlan2: s.vlan2, Proto: s.proto}
	switch s.ip {
	case 4:
		t.Guest, t.Remote = flows["IPv4"].guest.Addr().As16(), flows["IPv4"].remote.Addr().As16()
	case 6:
		t.Guest, t.Remote = flows["IPv6"].guest.Addr().As16(), flows["IPv6"].remote.Addr().As16()
	default:
		copy(t.Guest[10:], guestMAC)
		copy(t.Remote[10:], remoteMAC)
	}
	return t
}

func (s *sample) payload() []byte { return s.frame[s.pay:][:s.n] }

// event is the event of the sample, without slot, sum and time.
func (s *sample) event(kind bpf.LockstepLsEvType) *bpf.LockstepLsEv {
	ev := &bpf.LockstepLsEv{
		Type: uint32(kind), Slot: noSlot, T: s.tuple(), Seq: s.pos, Paylen: uint32(s.n),
		L3Off: uint16(s.l3), L4Off: uint16(s.l4), PayOff: uint16(s.pay), Frag: s.frag, FrameLen: uint32(len(s.frame)),
	}
	if s.class == isDgram {
		ev.Flags = uint8(bpf.LockstepLsEvFlagLS_EV_DGRAM)
		return ev
	}
	ev.Ack, ev.Win, ev.TcpFlags = s.seg.ack, s.seg.win, s.seg.flags
	ev.HdrLen = ev.PayOff
	copy(ev.Hdr[:], s.frame[:s.pay])
	return ev
}

// recOff is where the record stands in a frame that was the sample.
func (s *sample) recOff() int { return min((s.l4+21)&^1, recOffMax) }

var (
	remoteMAC = []byte{2, 1, 1, 1, 1, 1}
	guestMAC  = []byte{2, 2, 2, 2, 2, 2}
)

// samples are frames of every kind, from the guest or to it.
func samples(fromGuest bool) []*sample {
	r := rand.New(rand.NewPCG(21, 22))
	src4, dst4 := flows["IPv4"].guest.Addr(), flows["IPv4"].remote.Addr()
	src6, dst6 := flows["IPv6"].guest.Addr(), flows["IPv6"].remote.Addr()
	sport, dport := uint16(gport), uint16(rport)
	srcMAC, dstMAC := guestMAC, remoteMAC
	if !fromGuest {
		src4, dst4, src6, dst6, sport, dport, srcMAC, dstMAC = dst4, src4, dst6, src6, dport, sport, dstMAC, srcMAC
	}
	rnd := func(n int) []byte { return randBytes(r, n) }
	eth := func(proto uint16, body ...[]byte) []byte {
		return slices.Concat(dstMAC, srcMAC, be.AppendUint16(nil, proto), slices.Concat(body...))
	}
	ip4 := func(proto byte, frag uint16, opts int, body ...[]byte) []byte {
		b := slices.Concat(body...)
		ip := append(make([]byte, 20), bytes.Repeat([]byte{1}, opts)...)
		ip[0], ip[8], ip[9] = byte(0x45+opts/4), 64, proto
		be.PutUint16(ip[2:], uint16(len(ip)+len(b)))
		be.PutUint16(ip[6:], frag)
		copy(ip[12:], src4.AsSlice())
		copy(ip[16:], dst4.AsSlice())
		be.PutUint16(ip[10:], ^onesSum(0, ip))
		return append(ip, b...)
	}
	ip6 := func(proto byte, body ...[]byte) []byte {
		b := slices.Concat(body...)
		ip := make([]byte, 40)
		ip[0], ip[6], ip[7] = 0x60, proto, 64
		be.PutUint16(ip[4:], uint16(len(b)))
		copy(ip[8:], src6.AsSlice())
		copy(ip[24:], dst6.AsSlice())
		return append(ip, b...)
	}
	ext := func(next byte, n int) []byte { // an extension header of n bytes
		return append([]byte{next, byte(n/8 - 1), 1, byte(n - 4)}, make([]byte, n-4)...)
	}
	frag6 := func(next byte, off uint16, more uint16) []byte {
		return be.AppendUint32(be.AppendUint16([]byte{next, 0}, off|more), 0x1234)
	}
	udp := func(n int) []byte {
		b := be.AppendUint16(be.AppendUint16(nil, sport), dport)
		return append(be.AppendUint32(b, uint32(8+n)<<16|0xbeef), rnd(n)...)
	}
	data := seg{seq: segSeq, ack: 77, flags: ack | psh, win: 99, payload: rnd(40)}
	tcp := func() []byte {
		b := be.AppendUint16(be.AppendUint16(nil, sport), dport)
		b = be.AppendUint32(be.AppendUint32(b, data.seq), data.ack)
		b = append(b, 5<<4, data.flags)
		return slices.Concat(be.AppendUint16(b, data.win), make([]byte, 4), data.payload)
	}
	icmp := func(typ, code byte, n int) []byte { return append([]byte{typ, code, 0xab, 0xcd}, rnd(n)...) }
	pad := []byte("padding is no payload")

	all := []*sample{
		{name: "UDP", class: isDgram, frame: eth(0x800, ip4(17, 0x4000, 0, udp(11))), ip: 4, proto: 17, gport: gport, rport: rport, l4: 34, pay: 42, n: 11},
		{name: "UDP of a slot", class: isDgram, frame: eth(0x800, ip4(17, 0, 0, udp(1942))), ip: 4, proto: 17, gport: gport, rport: rport, l4: 34, pay: 42, n: 1942},
		{name: "UDP large", class: isDgram, frame: eth(0x800, ip4(17, 0, 0, udp(3300))), ip: 4, proto: 17, gport: gport, rport: rport, l4: 34, pay: 42, n: 3300},
		{name: "UDP padded", class: isDgram, frame: eth(0x800, ip4(17, 0, 0, udp(3)), pad), ip: 4, proto: 17, gport: gport, rport: rport, l4: 34, pay: 42, n: 3},
		{name: "UDP empty", class: isDgram, frame: eth(0x800, ip4(17, 0, 0, udp(0)), pad), ip: 4, proto: 17, gport: gport, rport: rport, l4: 34, pay: 42},
		{name: "UDP IP options", class: isDgram, frame: eth(0x800, ip4(17, 0, 40, udp(11))), ip: 4, proto: 17, gport: gport, rport: rport, l4: 74, pay: 82, n: 11},
		{name: "UDPv6", class: isDgram, frame: eth(0x86dd, ip6(17, udp(1000))), ip: 6, proto: 17, gport: gport, rport: rport, l4: 54, pay: 62, n: 1000},
		{name: "UDPv6 padded", class: isDgram, frame: eth(0x86dd, ip6(17, udp(1)), pad), ip: 6, proto: 17, gport: gport, rport: rport, l4: 54, pay: 62, n: 1},
		{name: "ICMP echo", class: isDgram, frame: eth(0x800, ip4(1, 0, 0, icmp(8, 0, 60))), ip: 4, proto: 1, gport: 8, l4: 34, pay: 38, n: 60, pos: 4},
		{name: "ICMP error", class: isDgram, frame: eth(0x800, ip4(1, 0, 0, icmp(3, 3, 32))), ip: 4, proto: 1, gport: 3, rport: 3, l4: 34, pay: 38, n: 32, pos: 4},
		{name: "ICMP bare", class: isDgram, frame: eth(0x800, ip4(1, 0, 0, icmp(0, 7, 0)), pad), ip: 4, proto: 1, rport: 7, l4: 34, pay: 38, pos: 4},
		{name: "ICMPv6 echo", class: isDgram, frame: eth(0x86dd, ip6(58, icmp(128, 0, 60))), ip: 6, proto: 58, gport: 128, l4: 54, pay: 58, n: 60, pos: 4},
		{name: "ICMPv6 error", class: isDgram, frame: eth(0x86dd, ip6(58, icmp(1, 4, 44))), ip: 6, proto: 58, gport: 1, rport: 4, l4: 54, pay: 58, n: 44, pos: 4},

		{name: "first fragment", class: isDgram, frame: eth(0x800, ip4(17, 0x2000, 0, udp(40))), ip: 4, proto: 17, l4: 34, pay: 34, n: 48, frag: 1},
		{name: "middle fragment", class: isDgram, frame: eth(0x800, ip4(17, 0x2000|700, 0, rnd(80))), ip: 4, proto: 17, l4: 34, pay: 34, n: 80, pos: 5600, frag: 5601},
		{name: "last fragment", class: isDgram, frame: eth(0x800, ip4(17, 8191, 8, rnd(5)), pad), ip: 4, proto: 17, l4: 42, pay: 42, n: 5, pos: 65528, frag: 65528},
		{name: "TCP fragment", class: isDgram, frame: eth(0x800, ip4(6, 0x2000, 0, tcp())), ip: 4, proto: 6, l4: 34, pay: 34, n: 60, frag: 1},
		{name: "first fragment v6", class: isDgram, frame: eth(0x86dd, ip6(44, frag6(17, 0, 1), udp(40))), ip: 6, proto: 17, l4: 62, pay: 62, n: 48, frag: 1},
		{name: "middle fragment v6", class: isDgram, frame: eth(0x86dd, ip6(44, frag6(17, 1600, 1), rnd(80))), ip: 6, proto: 17, l4: 62, pay: 62, n: 80, pos: 1600, frag: 1601},
		{name: "last fragment v6", class: isDgram, frame: eth(0x86dd, ip6(0, ext(44, 8), frag6(58, 65528, 0), rnd(5)), pad), ip: 6, proto: 58, l4: 70, pay: 70, n: 5, pos: 65528, frag: 65528},
		{name: "atomic fragment UDP", class: isDgram, frame: eth(0x86dd, ip6(44, frag6(17, 0, 0), udp(40))), ip: 6, proto: 17, gport: gport, rport: rport, l4: 62, pay: 70, n: 40},
		{name: "atomic fragment TCP", frame: eth(0x86dd, ip6(44, frag6(6, 0, 6), tcp())), ip: 6, l4: 62},

		{name: "GRE", class: isDgram, frame: eth(0x800, ip4(47, 0, 0, rnd(50)), pad), ip: 4, proto: 47, l4: 34, pay: 34, n: 50},
		{name: "ESP", class: isDgram, frame: eth(0x800, ip4(50, 0, 0, rnd(51))), ip: 4, proto: 50, l4: 34, pay: 34, n: 51},
		{name: "SCTPv6", class: isDgram, frame: eth(0x86dd, ip6(132, rnd(52))), ip: 6, proto: 132, l4: 54, pay: 54, n: 52},
		{name: "nothing next", class: isDgram, frame: eth(0x86dd, ip6(59), pad), ip: 6, proto: 59, l4: 54, pay: 54},

		{name: "TCP", frame: eth(0x800, ip4(6, 0, 0, tcp())), ip: 4, l4: 34},
		{name: "TCPv6", frame: eth(0x86dd, ip6(6, tcp()), pad), ip: 6, l4: 54},
		{name: "TCP IP options", frame: eth(0x800, ip4(6, 0, 12, tcp())), ip: 4, l4: 46},
		{name: "hop-by-hop TCP", frame: eth(0x86dd, ip6(0, ext(6, 8), tcp())), ip: 6, l4: 62},
		{name: "hop-by-hop and destination TCP", frame: eth(0x86dd, ip6(0, ext(60, 16), ext(6, 24), tcp())), ip: 6, l4: 94},
		{name: "destination UDP", class: isDgram, frame: eth(0x86dd, ip6(60, ext(17, 16), udp(9))), ip: 6, proto: 17, gport: gport, rport: rport, l4: 70, pay: 78, n: 9},
		{name: "hop-by-hop UDP", class: isDgram, frame: eth(0x86dd, ip6(0, ext(17, 8), udp(9)), pad), ip: 6, proto: 17, gport: gport, rport: rport, l4: 62, pay: 70, n: 9},
		{name: "routing TCP", class: isDgram, frame: eth(0x86dd, ip6(43, ext(6, 24), tcp())), ip: 6, proto: 6, l4: 78, pay: 78, n: 60},
		{name: "routing UDP", class: isDgram, frame: eth(0x86dd, ip6(43, ext(60, 8), ext(17, 8), udp(9))), ip: 6, proto: 17, l4: 70, pay: 70, n: 17},
		{name: "8 headers", class: isDgram, frame: eth(0x86dd, ip6(60, bytes.Repeat(ext(60, 8), 7), ext(17, 8), udp(9))), ip: 6, proto: 17, gport: gport, rport: rport, l4: 118, pay: 126, n: 9},
		{name: "9 headers", class: isDgram, frame: eth(0x86dd, ip6(60, bytes.Repeat(ext(60, 8), 8), ext(17, 8), udp(9))), ip: 6, proto: 60, l4: 118, pay: 118, n: 25},
		{name: "TCP just before the limit", frame: eth(0x86dd, ip6(60, ext(6, 120), tcp())), ip: 6, l4: 174},
		{name: "TCP beyond the limit", class: isDgram, frame: eth(0x86dd, ip6(60, ext(6, 128), tcp())), ip: 6, proto: 6, l4: 182, pay: 182, n: 60},
		{name: "UDP beyond the limit", class: isDgram, frame: eth(0x86dd, ip6(60, ext(17, 400), udp(9))), ip: 6, proto: 17, gport: gport, rport: rport, l4: 454, pay: 462, n: 9},

		{name: "PTP", class: isDgram, frame: eth(0x88f7, rnd(60)), proto: 255, gport: 0x88f7, l4: 14, pay: 14, n: 60},
		{name: "ethertype without payload", class: isDgram, frame: eth(0x9000), proto: 255, gport: 0x9000, l4: 14, pay: 14},
		{name: "LLC padded", class: isDgram, frame: eth(38, rnd(38), pad), proto: 255, gport: 38, l4: 14, pay: 14, n: 38},
		{name: "VLAN UDP", class: isDgram, frame: eth(0x8100, []byte{0xa0, 5, 8, 0}, ip4(17, 0, 0, udp(4))), ip: 4, proto: 17, gport: gport, rport: rport, vlan: 5, l3: 18, l4: 38, pay: 46, n: 4},
		{name: "VLAN TCPv6", frame: eth(0x8100, []byte{0x1f, 0xff, 0x86, 0xdd}, ip6(6, tcp())), ip: 6, vlan: 4095, l3: 18, l4: 58},
		{name: "priority UDPv6", class: isDgram, frame: eth(0x8100, []byte{0xe0, 0, 0x86, 0xdd}, ip6(17, udp(4))), ip: 6, proto: 17, gport: gport, rport: rport, l3: 18, l4: 58, pay: 66, n: 4},
		{name: "QinQ UDP", class: isDgram, frame: eth(0x88a8, []byte{0, 100, 0x81, 0, 0x20, 5, 8, 0}, ip4(17, 0, 0, udp(4)), pad), ip: 4, proto: 17, gport: gport, rport: rport, vlan: 100, vlan2: 5, l3: 22, l4: 42, pay: 50, n: 4},
		{name: "QinQ TCP", frame: eth(0x8100, []byte{0, 100, 0x81, 0, 0, 5, 8, 0}, ip4(6, 0, 0, tcp())), ip: 4, vlan: 100, vlan2: 5, l3: 22, l4: 42},
		{name: "three tags", class: isDgram, frame: eth(0x88a8, []byte{0, 100, 0x81, 0, 0, 5, 0x81, 0, 0, 6, 8, 0}, rnd(30)), proto: 255, gport: 0x8100, vlan: 100, vlan2: 5, l3: 22, l4: 22, pay: 22, n: 34},

		{name: "UDP short", class: isBad, frame: eth(0x800, ip4(17, 0, 0, rnd(7)), pad)},
		{name: "UDPv6 short", class: isBad, frame: eth(0x86dd, ip6(17, rnd(7)), pad)},
		{name: "ICMP short", class: isBad, frame: eth(0x800, ip4(1, 0, 0, rnd(3)), pad)},
		{name: "TCP short behind options", class: isBad, frame: eth(0x86dd, ip6(0, ext(6, 8), tcp()[:19]), pad)},
		{name: "header cut", class: isBad, frame: eth(0x86dd, ip6(0, ext(17, 8)[:7]), pad)},
		{name: "header beyond the packet", class: isBad, frame: eth(0x86dd, ip6(60, ext(17, 24)[:16]), make([]byte, 40))},
		{name: "fragment header cut", class: isBad, frame: eth(0x86dd, ip6(44, frag6(17, 8, 1)[:4]), pad)},
		{name: "packet longer than the frame", class: isBad, frame: eth(0x86dd, ip6(17, udp(20)))[:80]},
		{name: "LLC longer than the frame", class: isBad, frame: eth(39, rnd(38))},
		{name: "tag cut", class: isBad, frame: eth(0x8100, []byte{0, 5, 8})},
		{name: "inner tag cut", class: isBad, frame: eth(0x88a8, []byte{0, 5, 0x81, 0, 0})},
		{name: "nothing behind the tag", class: isBad, frame: eth(0x8100, []byte{0, 5, 8, 0}, rnd(19))},

		{name: "IGMP", class: isLink, frame: eth(0x800, ip4(2, 0, 4, rnd(8)))},
		{name: "MLD", class: isLink, frame: eth(0x86dd, ip6(0, ext(58, 8), icmp(143, 0, 20)))},
		{name: "router advertisement", class: isLink, frame: eth(0x86dd, ip6(58, icmp(134, 0, 20)))},
		{name: "neighbour advertisement", class: isLink, frame: eth(0x86dd, ip6(58, icmp(136, 0, 20)))},
		{name: "LLDP", class: isLink, frame: eth(0x88cc, rnd(40))},
		{name: "RARP", class: isLink, frame: eth(0x8035, rnd(28))},
		{name: "VLAN RARP", class: isLink, frame: eth(0x8100, []byte{0, 5, 0x80, 0x35}, rnd(28))},
	}
	arp := func(op byte, spa, tpa []byte) []byte {
		return slices.Concat([]byte{0, 1, 8, 0, 6, 4, 0, op}, srcMAC, spa, make([]byte, 6), tpa)
	}
	ns := func(src []byte) []byte {
		p := ip6(58, icmp(135, 0, 4), dst6.AsSlice(), []byte{1, 1}, srcMAC)
		copy(p[8:24], src)
		return p
	}
	g, to := src4.AsSlice(), dst4.AsSlice()
	all = append(all,
		&sample{name: "ARP request", class: isAsk, frame: eth(0x806, arp(1, g, to), pad), ip: 4},
		&sample{name: "VLAN ARP request", class: isAsk, frame: eth(0x8100, []byte{0x60, 9, 8, 6}, arp(1, g, to)), ip: 4, vlan: 9},
		&sample{name: "neighbour solicitation", class: isAsk, frame: eth(0x86dd, ns(src6.AsSlice())), ip: 6, proto: 58},
		&sample{name: "QinQ neighbour solicitation", class: isAsk, frame: eth(0x88a8, []byte{0, 7, 0x81, 0, 0, 8, 0x86, 0xdd}, ns(src6.AsSlice())), ip: 6, proto: 58, vlan: 7, vlan2: 8},
		&sample{name: "ARP probe", class: isLink, frame: eth(0x806, arp(1, make([]byte, 4), to))},
		&sample{name: "ARP announcement", class: isLink, frame: eth(0x806, arp(1, g, g))},
		&sample{name: "ARP reply", class: isLink, frame: eth(0x806, arp(2, g, to))},
		&sample{name: "ARP short", class: isLink, frame: eth(0x806, arp(1, g, to)[:27])},
		&sample{name: "address detection", class: isLink, frame: eth(0x86dd, ns(make([]byte, 16)))},
		&sample{name: "solicitation cut", class: isLink, frame: eth(0x86dd, ip6(58, icmp(135, 0, 19)))},
	)
	for _, s := range all {
		if s.l3 == 0 {
			s.l3 = 14
		}
		if s.class == isTCP {
			s.proto, s.gport, s.rport, s.seg = 6, gport, rport, data
			s.pay, s.n, s.pos = s.l4+20, len(data.payload), data.seq
		}
	}
	return all
}
