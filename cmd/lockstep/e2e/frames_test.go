// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Frames that no socket sends, from the guest to the client.

// eth is a frame of an ethertype.
func eth(ethertype uint16, body []byte) []byte {
	var f []byte
	for _, mac := range []string{lt.ClientMAC, lt.GuestMAC} {
		hw, err := net.ParseMAC(mac)
		if err != nil {
			panic(err)
		}
		f = append(f, hw...)
	}
	return append(binary.BigEndian.AppendUint16(f, ethertype), body...)
}

// tagged puts VLAN tags into a frame, the outer one first.
func tagged(frame []byte, tags ...uint32) []byte {
	var b []byte
	for _, tag := range tags {
		b = binary.BigEndian.AppendUint32(b, tag)
	}
	return slices.Insert(slices.Clone(frame), 12, b...)
}

// Tags for tagged: TPID, then TCI.
const (
	vlan42  = unix.ETH_P_8021Q<<16 | 42
	qinq700 = unix.ETH_P_8021AD<<16 | 700
)

// ones is the one's complement sum of the Internet checksum (RFC 1071).
func ones(sum uint32, b []byte) uint32 {
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return sum
}

// ip4 is a packet of the guest's. frag is the header's word of flags and offset.
func ip4(proto byte, id, frag uint16, body []byte) []byte {
	h := make([]byte, 20)
	h[0], h[8], h[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(h[2:], uint16(len(h)+len(body)))
	binary.BigEndian.PutUint16(h[4:], id)
	binary.BigEndian.PutUint16(h[6:], frag)
	copy(h[12:], netip.MustParseAddr(lt.Guest4).AsSlice())
	copy(h[16:], netip.MustParseAddr(lt.Client4).AsSlice())
	binary.BigEndian.PutUint16(h[10:], ^uint16(ones(0, h)))
	return append(h, body...)
}

// ip6 is a packet of the guest's.
func ip6(next byte, body []byte) []byte {
	h := make([]byte, 40)
	h[0], h[6], h[7] = 0x60, next, 64
	binary.BigEndian.PutUint16(h[4:], uint16(len(body)))
	copy(h[8:], netip.MustParseAddr(lt.Guest6).AsSlice())
	copy(h[24:], netip.MustParseAddr(lt.Client6).AsSlice())
	return append(h, body...)
}

// fragment6 puts a fragment header before a part of a packet (RFC 8200 4.5).
func fragment6(next byte, id uint32, offset int, more bool, part []byte) []byte {
	h := []byte{next, 0, 0, 0}
	binary.BigEndian.PutUint16(h[2:], uint16(offset))
	if more {
		h[3] |= 1
	}
	return ip6(unix.IPPROTO_FRAGMENT, append(binary.BigEndian.AppendUint32(h, id), part...))
}

// udpBody is a UDP datagram of the guest's, with a checksum for either family.
func udpBody(v6 bool, from, to uint16, payload []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(payload)))
	b = append(b, 0, 0)
	b = append(b, payload...)
	guest, client := lt.Guest4, lt.Client4
	if v6 {
		guest, client = lt.Guest6, lt.Client6
	}
	sum := ones(unix.IPPROTO_UDP+uint32(len(b)), netip.MustParseAddr(guest).AsSlice())
	sum = ones(ones(sum, netip.MustParseAddr(client).AsSlice()), b)
	if binary.BigEndian.PutUint16(b[6:], ^uint16(sum)); sum == 0xffff {
		b[6], b[7] = 0xff, 0xff
	}
	return b
}
