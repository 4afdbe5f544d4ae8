// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"encoding/binary"
	"slices"

	"github.com/lockstep-ft/lockstep/loader/core"
)

// outlet is a packet socket: it takes a virtio-net header and a frame.
type outlet struct {
	queue [][][]byte
	lost  *uint64
	send  func(frame []byte, gso uint16)
}

func (o *outlet) Queue(head, tail []byte) { o.queue = append(o.queue, [][]byte{head, tail}) }

func (o *outlet) Join(head, tail []byte) {
	last := &o.queue[len(o.queue)-1]
	(*last)[0], *last = head, append(*last, tail)
}

func (o *outlet) Lost() { *o.lost++ }

func (o *outlet) Flush() {
	for _, f := range o.queue {
		vnet, frame := f[0][:core.VnetLen], slices.Concat(f...)[core.VnetLen:]
		if vnet[0]&core.VnetCsum != 0 {
			complete(frame, int(binary.LittleEndian.Uint16(vnet[6:])), int(binary.LittleEndian.Uint16(vnet[8:])))
		}
		o.send(frame, binary.LittleEndian.Uint16(vnet[4:]))
	}
	o.queue = o.queue[:0]
}

// complete does what a device does with a partial checksum: it covers the frame from start
// on, and is at off behind that.
func complete(frame []byte, start, off int) {
	binary.BigEndian.PutUint16(frame[start+off:], ^core.Checksum(frame[start:]))
}

// Places in TCP, UDP and IP headers.
const (
	tcpSeq   = 4
	tcpFlags = 13
	tcpCsum  = 16
	udpLen   = 8
	udpCsum  = 6
	ipID     = 4
	ipCsum   = 10
	ipSrc4   = 12
	ipSrc6   = 8
	ip6Len   = 40

	flagFIN, flagPSH, flagCWR = 0x01, 0x08, 0x80
)

// segment cuts a large frame as a device does, into segments with gso bytes of payload
// each, and gives them to out. false: it is not one.
func segment(b []byte, gso int, out func([]byte)) bool {
	l3 := core.L3Offset(b)
	ip := b[l3:]
	l4, proto, v4 := l3+ip6Len, ip[6], ip[0]>>4 == 4
	if v4 {
		l4, proto = l3+int(ip[0]&15)*4, ip[9]
	}
	pay := l4 + udpLen
	if proto == core.ProtoTCP {
		pay = l4 + int(b[l4+12]>>4)*4
	} else if proto != core.ProtoUDP {
		return false
	}
	if len(b)-pay <= gso {
		return false
	}
	for at, i := pay, 0; at < len(b); at, i = at+gso, i+1 {
		end := min(at+gso, len(b))
		s := slices.Concat(b[:pay], b[at:end])
		ip := s[l3:l4]
		l4len := len(s) - l4
		var pseudo []byte
		if v4 {
			binary.BigEndian.PutUint16(ip[2:], uint16(len(s)-l3))
			binary.BigEndian.PutUint16(ip[ipID:], binary.BigEndian.Uint16(ip[ipID:])+uint16(i))
			ip[ipCsum], ip[ipCsum+1] = 0, 0
			binary.BigEndian.PutUint16(ip[ipCsum:], ^core.Checksum(ip))
			pseudo = ip[ipSrc4 : ipSrc4+8]
		} else {
			binary.BigEndian.PutUint16(ip[4:], uint16(len(s)-l3-ip6Len))
			pseudo = ip[ipSrc6 : ipSrc6+32]
		}
		csum := udpCsum
		if proto == core.ProtoTCP {
			csum = tcpCsum
			binary.BigEndian.PutUint32(s[l4+tcpSeq:], binary.BigEndian.Uint32(b[l4+tcpSeq:])+uint32(at-pay))
			if end < len(b) {
				s[l4+tcpFlags] &^= flagFIN | flagPSH
			}
			if i > 0 {
				s[l4+tcpFlags] &^= flagCWR
			}
		} else {
			binary.BigEndian.PutUint16(s[l4+4:], uint16(l4len))
		}
		binary.BigEndian.PutUint16(s[l4+csum:], core.Checksum(pseudo, []byte{0, proto, byte(l4len >> 8), byte(l4len)}))
		complete(s, l4, csum)
		out(s)
	}
	return true
}
