// SPDX-License-Identifier: Apache-2.0

package core

import (
	"bytes"

	"github.com/lockstep-ft/lockstep/compare"
)

// MaxParts bounds the slots that one frame is made of.
const MaxParts = 4

// maxIP is the most that an IP header can say of a packet's length.
const maxIP = 1<<16 - 1

// sent is the newest frame that was queued in the PVM's name. The guests' GSO frames seldom end at
// the same position: a digest record lets the rest of one of the PVM's leave and the front of the
// next one. The two leave as one frame, as if the PVM had made it, and cost half as much on their
// way to the remote and back.
type sent struct {
	e           *compare.Effect // nil: what comes next begins a frame of its own
	head, l2l3  []byte
	meta        frameMeta
	flags       compare.Flags // of what was queued last
	bytes, part int
}

// join adds the frame of e to the one before, where it goes on from that as the next of its GSO
// segments. It reports whether it did.
func (t *Transmitter) join(e *compare.Effect, l2l3, ports, payload []byte, m *frameMeta) bool {
	s := &t.sent
	o := s.e
	switch {
	case o == nil, s.part == MaxParts, m.gso == 0 || m.gso != s.meta.gso, m.tci != s.meta.tci || m.tpid != s.meta.tpid:
	case o.Tuple != e.Tuple, e.Seq != o.Seq+uint32(s.bytes), s.bytes%int(m.gso) != 0:
	case s.flags != compare.ACK, e.Flags&^compare.PSH != compare.ACK, e.Urg != 0, e.Ack != o.Ack, e.Win != o.Win:
	case e.OptLen != o.OptLen || !bytes.Equal(e.Opts[:e.OptLen], o.Opts[:o.OptLen]), !sameIP(l2l3, s.l2l3):
	case len(l2l3)+TCPLen+int(e.OptLen)+s.bytes+len(payload) > maxIP:
	default:
		both := *o
		both.Flags = e.Flags
		head, ok := BuildHeader(s.head[:0], s.l2l3, ports, &both, m.tpid, m.tci, s.bytes+len(payload), m.gso)
		if !ok {
			return false
		}
		t.ToTap.Join(head, payload)
		s.flags, s.bytes, s.part = e.Flags, s.bytes+len(payload), s.part+1
		return true
	}
	return false
}

// sameIP reports whether two frames' headers up to TCP's are the same but for the packet's length,
// IPv4's ID, which counts on from segment to segment, and the checksum over those.
func sameIP(a, b []byte) bool {
	l3 := L3Offset(a)
	if len(a) != len(b) || len(a) < l3+minIPHeader {
		return false
	}
	same := func(from, to int) bool { return bytes.Equal(a[from:to], b[from:to]) }
	if a[l3]>>4 == 4 {
		return same(0, l3+2) && same(l3+6, l3+ip4CsumOff) && same(l3+ip4CsumOff+2, len(a))
	}
	return same(0, l3+4) && same(l3+6, len(a))
}
