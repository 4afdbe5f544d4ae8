// SPDX-License-Identifier: Apache-2.0

package core

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
)

// Lengths and places in bytes, and ethertypes, protocols and virtio-net's kinds.
const (
	EthLen      = 14
	minIPHeader = 20
	ip4CsumOff  = 10
	TCPLen      = 20
	tcpFlagsOff = 12 // the header's length is in it too
	flagsMask   = 0xfff
	TCPCsum     = 16
	TCPUrg      = 18
	VnetLen     = 10  // struct virtio_net_hdr
	MaxHeader   = 320 // virtio-net, Ethernet, tags, IP and TCP headers as built here

	ethARP      = unix.ETH_P_ARP
	EthVLAN     = unix.ETH_P_8021Q
	EthIPv6     = unix.ETH_P_IPV6
	ethQinQ     = unix.ETH_P_8021AD
	ProtoTCP    = unix.IPPROTO_TCP
	ProtoUDP    = unix.IPPROTO_UDP
	ProtoICMPv6 = unix.IPPROTO_ICMPV6

	VnetCsum     = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM
	GSOTCPv4     = unix.VIRTIO_NET_HDR_GSO_TCPV4
	GSOTCPv6     = unix.VIRTIO_NET_HDR_GSO_TCPV6
	GSOFragments = unix.VIRTIO_NET_HDR_GSO_UDP    // fragments of one datagram
	GSODatagrams = unix.VIRTIO_NET_HDR_GSO_UDP_L4 // datagrams
	GSOECN       = unix.VIRTIO_NET_HDR_GSO_ECN    // CWR is the first segment's alone

	optNOP       = 1
	optTimestamp = 8
)

// L3Offset is where the IP header of a frame begins: after at most two tags.
func L3Offset(frame []byte) int {
	l3 := EthLen
	for range 2 {
		if len(frame) < l3+4 {
			break
		}
		if t := binary.BigEndian.Uint16(frame[l3-2:]); t != EthVLAN && t != ethQinQ {
			break
		}
		l3 += 4
	}
	return l3
}

// BuildHeader writes the virtio-net header and the frame's headers up to the
// payload into dst and returns what it used. l2l3 is the original Ethernet and IP
// header, tci the VLAN tag that stood beside it with its ethertype (0: none); the
// TCP fields come from e; payLen bytes of payload follow in the caller's iovec. The
// checksum is left to the device (partial).
func BuildHeader(dst, l2l3, ports []byte, e *compare.Effect, tpid, tci uint16, payLen int, gso uint16) ([]byte, bool) {
	if len(l2l3) < L3Offset(l2l3)+minIPHeader || int(e.OptLen) > len(e.Opts) || cap(dst) < VnetLen+4+len(l2l3)+TCPLen+int(e.OptLen) {
		return nil, false
	}
	dst = append(dst[:0], make([]byte, VnetLen)...)
	dst = append(dst, l2l3[:12]...)
	if tci != 0 {
		dst = AppendTag(dst, tpid, tci)
	}
	dst = append(dst, l2l3[12:]...)
	l3 := VnetLen + L3Offset(dst[VnetLen:])
	l4 := len(dst)
	dst = append(dst, ports[:4]...)
	dst = binary.BigEndian.AppendUint32(dst, e.Seq)
	dst = binary.BigEndian.AppendUint32(dst, e.Ack)
	optLen := (int(e.OptLen) + 3) &^ 3
	dst = binary.BigEndian.AppendUint16(dst, uint16((TCPLen+optLen)/4)<<12|uint16(e.Flags)&flagsMask)
	dst = binary.BigEndian.AppendUint16(dst, e.Win)
	dst = append(dst, 0, 0) // checksum
	dst = binary.BigEndian.AppendUint16(dst, e.Urg)
	dst = append(dst, e.Opts[:optLen]...)

	tcpLen := len(dst) - l4 + payLen
	ip := dst[l3:l4]
	var pseudo uint32
	v4 := ip[0]>>4 == 4
	if v4 {
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+tcpLen))
		ip[ip4CsumOff], ip[ip4CsumOff+1] = 0, 0
		binary.BigEndian.PutUint16(ip[ip4CsumOff:], ^fold(sum16(0, ip)))
		pseudo = sum16(0, ip[12:20])
	} else {
		if len(ip) < 40 {
			return nil, false
		}
		binary.BigEndian.PutUint16(ip[4:], uint16(len(ip)-40+tcpLen))
		pseudo = sum16(0, ip[8:40])
	}
	pseudo += uint32(tcpLen) + ProtoTCP
	binary.BigEndian.PutUint16(dst[l4+TCPCsum:], fold(pseudo))

	vh := dst[:VnetLen]
	vh[0] = VnetCsum
	if gso != 0 && payLen > int(gso) {
		vh[1] = GSOTCPv6
		if v4 {
			vh[1] = GSOTCPv4
		}
		if e.Flags&compare.CWR != 0 {
			vh[1] |= GSOECN
		}
		binary.LittleEndian.PutUint16(vh[2:], uint16(len(dst)-VnetLen))
		binary.LittleEndian.PutUint16(vh[4:], gso)
	}
	binary.LittleEndian.PutUint16(vh[6:], uint16(l4-VnetLen))
	binary.LittleEndian.PutUint16(vh[8:], TCPCsum)
	return dst, true
}

// timestamp is the timestamp option among TCP options, with two NOPs before it, or nothing.
func timestamp(opts []byte) []byte {
	for len(opts) > 1 && opts[0] != 0 {
		n := 1
		if opts[0] != optNOP {
			if n = int(opts[1]); n < 2 || n > len(opts) {
				break
			}
			if opts[0] == optTimestamp && n == 10 {
				return append([]byte{optNOP, optNOP}, opts[:n]...)
			}
		}
		opts = opts[n:]
	}
	return nil
}

func sum16(s uint32, b []byte) uint32 {
	for ; len(b) >= 2; b = b[2:] {
		s += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	return s
}

func fold(s uint32) uint16 {
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}

// NeighRequest writes an ARP request or a neighbour solicitation for e.Tuple.Remote in
// the guest's name, with its virtio-net header. The guest's MAC is in e.Opts.
func NeighRequest(dst []byte, e *compare.Effect) []byte {
	t := &e.Tuple
	mac, target := e.Opts[:6], t.Remote[:]
	guest, v4 := t.Guest[12:], netip.AddrFrom16(t.Guest).Is4In6()
	dst = append(dst[:0], make([]byte, VnetLen)...)
	if v4 {
		dst = append(dst, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
	} else {
		dst = append(dst, 0x33, 0x33, 0xff, target[13], target[14], target[15])
	}
	dst = append(dst, mac...)
	for _, id := range []uint16{t.VLAN, t.VLAN2} {
		if id != 0 {
			dst = AppendTag(dst, EthVLAN, id)
		}
	}
	if v4 {
		dst = binary.BigEndian.AppendUint16(dst, ethARP)
		dst = append(dst, 0, 1, 8, 0, 6, 4, 0, 1) // Ethernet, IPv4, their lengths, request
		dst = append(append(dst, mac...), guest...)
		return append(append(dst, 0, 0, 0, 0, 0, 0), target[12:]...)
	}
	dst = binary.BigEndian.AppendUint16(dst, EthIPv6)
	ip := len(dst)
	dst = append(dst, 0x60, 0, 0, 0, 0, 32, ProtoICMPv6, 255)
	dst = append(dst, t.Guest[:]...)
	dst = append(dst, 0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, target[13], target[14], target[15])
	icmp := len(dst)
	dst = append(dst, 135, 0, 0, 0, 0, 0, 0, 0)
	dst = append(append(dst, target...), 1, 1) // source link-layer address
	dst = append(dst, mac...)
	sum := sum16(sum16(32+ProtoICMPv6, dst[ip+8:icmp]), dst[icmp:])
	binary.BigEndian.PutUint16(dst[icmp+2:], ^fold(sum))
	return dst
}

// tpid is the ethertype of the VLAN tag beside the frame.
func tpid(ev *bpf.LockstepLsEv) uint16 {
	if ev.Flags&uint8(bpf.LockstepLsEvFlagLS_EV_8021AD) != 0 {
		return ethQinQ
	}
	return EthVLAN
}

func AppendTag(dst []byte, tpid, tci uint16) []byte {
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(dst, tpid), tci)
}

// rawHeader writes the virtio-net header of a frame as it was captured, its
// MAC addresses and its VLAN tag; data[12:] follows.
func rawHeader(dst, data []byte, m *frameMeta) []byte {
	dst = append(dst[:0], make([]byte, VnetLen)...)
	dst = append(dst, data[:12]...)
	tag := uint16(0)
	if m.tci != 0 {
		dst = AppendTag(dst, m.tpid, m.tci)
		tag = 4
	}
	vh := dst[:VnetLen]
	if m.partial {
		vh[0] = VnetCsum
		binary.LittleEndian.PutUint16(vh[6:], m.csumStart+tag)
		binary.LittleEndian.PutUint16(vh[8:], m.csumOff)
	}
	if m.gso != 0 {
		switch {
		case m.ufo:
			vh[1] = GSOFragments
		case m.udp:
			vh[1] = GSODatagrams
		case data[m.l3]>>4 == 4:
			vh[1] = GSOTCPv4
		default:
			vh[1] = GSOTCPv6
		}
		binary.LittleEndian.PutUint16(vh[2:], uint16(m.pay)+tag)
		binary.LittleEndian.PutUint16(vh[4:], m.gso)
	}
	return dst
}

// Checksum is the Internet checksum's sum of parts, of which all but the last have an even
// length.
func Checksum(parts ...[]byte) uint16 {
	var s uint32
	for _, p := range parts {
		s = uint32(fold(sum16(s, p)))
	}
	return fold(s)
}
