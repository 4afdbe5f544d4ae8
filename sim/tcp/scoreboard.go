// SPDX-License-Identifier: Apache-2.0

package tcp

// Marks of a segment in the retransmission queue.
const (
	segSacked  uint8 = 1 << iota
	segLost          // taken for lost, and counted as not in flight
	segRetrans       // retransmitted, and that is in flight
	segEver          // ever retransmitted
	segFIN
	segPush // has PSH
)

// seg is a segment that was sent and is not acknowledged.
type seg struct {
	from, to uint32 // FIN counted
	marks    uint8
	sentAt   int64  // the last time
	order    uint32 // of transmissions of the connection, the last time
}

func (g *seg) is(marks uint8) bool { return g.marks&marks != 0 }

// scoreboard is the retransmission queue, with what is known of its segments.
type scoreboard struct {
	segs  []seg // from first on
	first int

	// Counts of segments, as Linux's sacked_out, lost_out, retrans_out. Without SACK, sacked counts duplicate ACKs.
	order                 uint32 // of the last transmission
	noSACK                bool
	sacked, lost, retrans int
}

func (s *scoreboard) packets() int { return len(s.segs) - s.first }

func (s *scoreboard) inFlight() int { return s.packets() - s.sacked - s.lost + s.retrans }

// nextOrder numbers transmissions, of which many can have the same time.
func (s *scoreboard) nextOrder() uint32 {
	s.order++
	return s.order
}

// shift removes the first segment.
func (s *scoreboard) shift() {
	s.first++
	if s.first == len(s.segs) {
		s.segs, s.first = s.segs[:0], 0
	}
}

// push adds a segment.
func (s *scoreboard) push(g seg) {
	if s.first > 0 && len(s.segs) == cap(s.segs) {
		n := copy(s.segs, s.segs[s.first:])
		s.segs, s.first = s.segs[:n], 0
	}
	s.segs = append(s.segs, g)
}

// forget takes a segment that leaves the queue or is delivered out of the counts.
func (s *scoreboard) forget(g *seg) {
	if g.is(segLost) {
		s.lost--
	}
	if g.is(segRetrans) {
		s.retrans--
	}
	g.marks &^= segLost | segRetrans
}

// lose marks a segment as lost, once more if its retransmission was lost.
func (s *scoreboard) lose(g *seg) {
	if g.is(segRetrans) {
		s.retrans--
	}
	if !g.is(segLost) {
		s.lost++
	}
	g.marks = g.marks&^segRetrans | segLost
}

// count adds n to the counts that a segment's marks are in.
func (s *scoreboard) count(marks uint8, n int) {
	if marks&segSacked != 0 {
		s.sacked += n
	}
	if marks&segLost != 0 {
		s.lost += n
	}
	if marks&segRetrans != 0 {
		s.retrans += n
	}
}

func (s *scoreboard) forgetJoined(g *seg) {
	s.count(g.marks, -1)
	if s.sacked > 0 && g.marks&segSacked == 0 && s.reno() {
		s.sacked--
	}
}

// reno reports whether the peer sends no SACK: then duplicate ACKs are counted.
func (s *scoreboard) reno() bool { return s.noSACK }

// limitReno: no more duplicate ACKs count than segments can be behind the hole.
func (s *scoreboard) limitReno() {
	s.sacked = min(s.sacked, max(s.packets()-max(s.lost, 1), 0))
}

func (s *scoreboard) addReno() (delivered int) {
	before := s.sacked
	s.sacked++
	s.limitReno()
	return max(s.sacked-before, 0)
}
