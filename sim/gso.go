// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"bytes"
	"encoding/binary"

	"github.com/lockstep-ft/lockstep/loader/core"
)

// large is a frame that a guest leaves to its device to cut into segments.
type large struct {
	frame []byte
	gso   uint16 // bytes of payload of a segment; 0: it is not to be cut
	end   uint32 // its position
	full  bool   // nothing can follow in it
}

// Places in an Ethernet frame with IPv4 and TCP, and the flags that only the last segment has.
const (
	ipAt, tcpAt      = 14, 34
	lastFlags        = 1 | 8 // FIN, PSH
	segmentationSize = 65535 // of an IP packet
)

// offload joins the segments that a stack has cut, as one does that leaves that to its device (TSO):
// those that follow each other on one connection, of the same size but for the last.
func offload(frames [][]byte) (out []large) {
	for _, f := range frames {
		p, ok := parse(f)
		if !ok || len(p.payload) == 0 || p.flags&^lastFlags != 16 {
			out = append(out, large{frame: f, full: true})
			continue
		}
		if n := len(out); n == 0 || !out[n-1].join(&p) {
			out = append(out, large{frame: f, gso: uint16(len(p.payload)), end: p.end(), full: p.flags&lastFlags != 0})
		}
	}
	for i := range out {
		if l := &out[i]; len(l.frame) > tcpAt && l.gso > 0 {
			l.finish()
		}
	}
	return out
}

// join puts a segment behind, if it fits.
func (l *large) join(p *packet) bool {
	first, ok := parse(l.frame)
	if !ok || l.full || first.flow() != p.flow() || l.end != p.seq || first.ack != p.ack || first.win != p.win || len(p.payload) > int(l.gso) ||
		len(l.frame)+len(p.payload) > ipAt+segmentationSize || !bytes.Equal(first.opts, p.opts) {
		return false
	}
	l.frame = append(l.frame, p.payload...)                                 // the stack leaves no room behind a frame
	binary.BigEndian.PutUint16(l.frame[ipAt+2:], uint16(len(l.frame)-ipAt)) // for parse
	l.frame[tcpAt+13] |= p.flags
	l.end = p.end()
	l.full = p.flags&lastFlags != 0 || len(p.payload) < int(l.gso)
	return true
}

// finish completes the headers.
func (l *large) finish() {
	ip, tcp := l.frame[ipAt:tcpAt], l.frame[tcpAt:]
	head := int(tcp[12]>>4) * 4
	if len(tcp)-head <= int(l.gso) {
		l.gso = 0 // it is one segment
		return
	}
	binary.BigEndian.PutUint16(ip[10:], 0)
	binary.BigEndian.PutUint16(ip[10:], ^core.Checksum(ip))
	binary.BigEndian.PutUint16(tcp[16:], 0)
	length := binary.BigEndian.AppendUint16([]byte{0, 6}, uint16(len(tcp)))
	binary.BigEndian.PutUint16(tcp[16:], ^core.Checksum(ip[12:], length, tcp))
}
