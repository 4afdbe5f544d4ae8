// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/binary"

	"lockstep/compare"
)

const (
	ethLen      = 14
	ip4CsumOff  = 10
	tcpHdrLen   = 20
	tcpCsumOff  = 16
	maxHeader   = 256 // Ethernet, tag, IP and TCP headers as built here
	vnetHdrLen  = 10  // struct virtio_net_hdr
	vnetCsum    = 1   // VIRTIO_NET_HDR_F_NEEDS_CSUM
	gsoTCPv4    = 1   // VIRTIO_NET_HDR_GSO_TCPV4
	gsoTCPv6    = 4   // VIRTIO_NET_HDR_GSO_TCPV6
	ethIPv4     = 0x0800
	ethIPv6     = 0x86dd
	protoTCP    = 6
	vlanTag     = 0x8100
	minIPHeader = 20
)

// buildHeader writes the virtio-net header and the frame's headers up to the
// payload into dst and returns what it used. l2l3 is the original Ethernet and
// IP header, tci the VLAN tag (0: none); the TCP fields come from e; payload bytes of payLen follow behind it in the
// caller's iovec. The checksum is left to the device (partial): the bytes were
// compared with the SVM's, so there is no old checksum worth keeping.
func buildHeader(dst, l2l3, ports []byte, e *compare.Effect, tci uint16, payLen int, gso uint16) ([]byte, bool) {
	if len(l2l3) < ethLen+minIPHeader || int(e.OptLen) > len(e.Opts) || cap(dst) < vnetHdrLen+4+len(l2l3)+tcpHdrLen+int(e.OptLen) {
		return nil, false
	}
	dst = append(dst[:0], make([]byte, vnetHdrLen)...)
	dst = append(dst, l2l3[:12]...)
	if tci != 0 {
		dst = binary.BigEndian.AppendUint16(dst, vlanTag)
		dst = binary.BigEndian.AppendUint16(dst, tci)
	}
	dst = append(dst, l2l3[12:ethLen]...)
	l3 := len(dst)
	dst = append(dst, l2l3[ethLen:]...)
	l4 := len(dst)
	dst = append(dst, ports[:4]...)
	dst = binary.BigEndian.AppendUint32(dst, e.Seq)
	dst = binary.BigEndian.AppendUint32(dst, e.Ack)
	optLen := (int(e.OptLen) + 3) &^ 3
	dst = append(dst, byte((tcpHdrLen+optLen)/4)<<4, byte(e.Flags))
	dst = binary.BigEndian.AppendUint16(dst, e.Win)
	dst = append(dst, 0, 0, 0, 0)
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
	pseudo += uint32(tcpLen) + protoTCP
	binary.BigEndian.PutUint16(dst[l4+tcpCsumOff:], fold(pseudo))

	vh := dst[:vnetHdrLen]
	vh[0] = vnetCsum
	if gso != 0 && payLen > int(gso) {
		vh[1] = gsoTCPv6
		if v4 {
			vh[1] = gsoTCPv4
		}
		binary.LittleEndian.PutUint16(vh[2:], uint16(len(dst)-vnetHdrLen))
		binary.LittleEndian.PutUint16(vh[4:], gso)
	}
	binary.LittleEndian.PutUint16(vh[6:], uint16(l4-vnetHdrLen))
	binary.LittleEndian.PutUint16(vh[8:], tcpCsumOff)
	return dst, true
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
