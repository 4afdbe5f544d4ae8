// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"

	"github.com/lockstep-ft/lockstep/bpf"
)

// flow is a connection between the guest and a remote.
type flow struct {
	guest, remote netip.AddrPort
	vlan          uint16
}

var flows = map[string]flow{
	"IPv4": {guest: netip.MustParseAddrPort("192.0.2.1:80"), remote: netip.MustParseAddrPort("198.51.100.9:40000")},
	"IPv6": {guest: netip.MustParseAddrPort("[2001:db8::1]:80"), remote: netip.MustParseAddrPort("[2001:db8:7::9]:40000")},
}

func (f flow) tuple() bpf.LockstepLsTuple {
	return bpf.LockstepLsTuple{
		Guest: f.guest.Addr().As16(), Remote: f.remote.Addr().As16(),
		Gport: f.guest.Port(), Rport: f.remote.Port(), Vlan: f.vlan, Proto: 6,
	}
}

const (
	fin = 1 << iota
	syn
	rst
	psh
	ack
)

// seg is a TCP segment.
type seg struct {
	seq, ack uint32
	flags    uint8
	win      uint16
	opts     []byte // multiple of 4
	payload  []byte
	ipOpts   int    // bytes of IPv4 options
	padding  []byte // behind the IP packet
}

// end is the position behind the segment.
func (s seg) end() uint32 {
	return s.seq + uint32(len(s.payload)) + uint32(s.flags&fin) + uint32(s.flags&syn>>1)
}

var be = binary.BigEndian

// from is the frame of s from the guest, to the one to it.
func (f flow) from(s seg) []byte { return f.frame(s, f.guest, f.remote) }

func (f flow) to(s seg) []byte { return f.frame(s, f.remote, f.guest) }

func (f flow) frame(s seg, src, dst netip.AddrPort) []byte {
	tcp := make([]byte, 20, 20+len(s.opts)+len(s.payload))
	be.PutUint16(tcp, src.Port())
	be.PutUint16(tcp[2:], dst.Port())
	be.PutUint32(tcp[4:], s.seq)
	be.PutUint32(tcp[8:], s.ack)
	tcp[12], tcp[13] = byte(5+len(s.opts)/4)<<4, s.flags
	be.PutUint16(tcp[14:], s.win)
	tcp = append(append(tcp, s.opts...), s.payload...)
	be.PutUint16(tcp[16:], ^onesSum(pseudo(src.Addr(), dst.Addr(), len(tcp)), tcp))

	frame := append(make([]byte, 0, 134+len(s.payload)), 2, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2)
	if src.Addr().Is4() {
		ip := make([]byte, 20+s.ipOpts)
		for i := range s.ipOpts {
			ip[20+i] = 1
		}
		ip[0], ip[8], ip[9] = byte(0x45+s.ipOpts/4), 64, 6
		be.PutUint16(ip[2:], uint16(len(ip)+len(tcp)))
		copy(ip[12:], src.Addr().AsSlice())
		copy(ip[16:], dst.Addr().AsSlice())
		be.PutUint16(ip[10:], ^onesSum(0, ip))
		frame = append(append(frame, 8, 0), ip...)
	} else {
		ip := make([]byte, 40)
		ip[0], ip[6], ip[7] = 0x60, 6, 64
		be.PutUint16(ip[4:], uint16(len(tcp)))
		copy(ip[8:], src.Addr().AsSlice())
		copy(ip[24:], dst.Addr().AsSlice())
		frame = append(append(frame, 0x86, 0xdd), ip...)
	}
	return append(append(frame, tcp...), s.padding...)
}

// l4 is where the TCP header of f's frames is.
func (f flow) l4(s seg) int {
	if f.guest.Addr().Is4() {
		return 34 + s.ipOpts
	}
	return 54
}

func pseudo(src, dst netip.Addr, n int) uint32 {
	return uint32(onesSum(onesSumWide(6+uint32(n)), append(src.AsSlice(), dst.AsSlice()...)))
}

func onesSumWide(v uint32) uint32 { return v>>16 + v&0xffff }

// onesSum is the one's complement sum of b and sum (RFC 1071).
func onesSum(sum uint32, b []byte) uint16 {
	for i, c := range b {
		sum += uint32(c) << (8 * (1 - i&1))
		sum = onesSumWide(sum)
	}
	return uint16(onesSumWide(sum))
}

// checksumRight: does the TCP checksum of a frame of f hold?
func (f flow) checksumRight(frame []byte, l4 int) bool {
	var tcp []byte
	if f.guest.Addr().Is4() {
		tcp = frame[l4 : 14+int(be.Uint16(frame[16:]))]
	} else {
		tcp = frame[l4 : 54+int(be.Uint16(frame[18:]))]
	}
	return onesSum(pseudo(f.guest.Addr(), f.remote.Addr(), len(tcp)), tcp) == 0xffff
}

// timestamps are the options that Linux sends on every segment.
func timestamps(val, ecr uint32) []byte {
	return be.AppendUint32(be.AppendUint32([]byte{1, 1, 8, 10}, val), ecr)
}

func randBytes(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// opts40 pads options for a record.
func opts40(opts []byte) (b [40]byte) {
	copy(b[:], opts)
	return b
}
