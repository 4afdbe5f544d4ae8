// SPDX-License-Identifier: Apache-2.0

package tcp

import "time"

// Marks of a segment in the retransmission queue.
const (
	segSacked  uint8 = 1 << iota
	segLost          // taken for lost, and counted as not in flight
	segRetrans       // retransmitted, and that is in flight
	segEver          // ever retransmitted
	segFIN
)

// seg is a segment that was sent and is not acknowledged.
type seg struct {
	from, to uint32 // FIN counted
	marks    uint8
	sentAt   int64 // the last time
}

func (g *seg) is(marks uint8) bool { return g.marks&marks != 0 }

// caState is Linux's state of congestion control.
type caState uint8

const (
	caOpen     caState = iota
	caDisorder         // something was SACKed
	caCWR              // reducing cwnd: ECN or a tail loss probe
	caRecovery         // fast retransmit
	caLoss             // after a retransmission timeout
)

const (
	initialCwnd  = 10
	infiniteCwnd = 1 << 30
	dupThresh    = 3
	maxRTO       = 120 * time.Second
	firstRTO     = time.Second
)

// sender is the state of what goes out. Sequence numbers of the stream: una ≤ nxt.
type sender struct {
	una, nxt uint32 // oldest unacknowledged, next to send
	sentOnce uint32 // what was sent for the first time ends here: retransmissions begin before it
	wnd      uint32 // of the peer
	wl1      uint32 // sequence number of its last update
	maxWnd   uint32
	scale    uint8
	mss      int // as the peer takes it, without timestamps

	buf []byte // from off on: what was written and is not acknowledged
	off int
	seq uint32 // of buf[off]

	closed  bool // FIN follows what was written
	finSent bool

	noSACK    bool
	urgent    bool
	urgentEnd uint32
	smallEnd  uint32 // the end of the last segment below the MSS (Minshall)

	segs  []seg // from first on
	first int

	// Counts of segments, as Linux's sacked_out, lost_out, retrans_out. Without SACK, sacked counts duplicate ACKs.
	sacked, lost, retrans int

	ca             caState
	cwnd, cwndCnt  int
	ssthresh       int
	cwndLimited    bool
	highSeq        uint32 // what had been sent when ca changed
	priorCwnd      int    // to be restored by undo
	priorSsthresh  int
	undo           bool // the reduction can turn out wrong
	undoFrom       uint32
	undoRetrans    int // retransmissions that no D-SACK told of
	retransStamp   uint32
	stamped        bool
	prrDelivered   int
	prrOut         int
	frto           bool
	reduced        bool // CWR goes out with the next data
	tlpHigh        uint32
	tlpOut         bool
	tlpRetransmits bool
	lastSentAt     int64

	srtt, rttvar, minRTT int64
	rto                  int64
	backoff              uint
	retries              int // of the same segment; of window probes
	stuckSince           int64

	// RACK: the segment sent last of those that arrived.
	rackAt   int64
	rackEnd  uint32
	rackRTT  int64
	fack     uint32 // highest SACKed
	disorder bool   // segments were seen to arrive out of order
}

func (s *sender) init() {
	s.cwnd, s.ssthresh, s.rto = initialCwnd, infiniteCwnd, int64(firstRTO)
	s.maxWnd = 0
}

// start sets the numbers of the first byte of the stream.
func (s *sender) start(seq uint32) {
	s.una, s.nxt, s.sentOnce, s.seq, s.smallEnd, s.fack, s.highSeq = seq, seq, seq, seq, seq, seq, seq
}

func (s *sender) packets() int  { return len(s.segs) - s.first }
func (s *sender) inFlight() int { return s.packets() - s.sacked - s.lost + s.retrans }

// finAcked reports whether the peer has everything, the FIN too.
func (s *sender) finAcked() bool { return s.finSent && s.una == s.nxt }

// append takes what was written.
func (s *sender) append(b []byte) {
	if s.off > 0 && len(s.buf)+len(b) > cap(s.buf) {
		n := copy(s.buf, s.buf[s.off:])
		s.buf, s.off = s.buf[:n], 0
	}
	s.buf = append(s.buf, b...)
}

// bytes is what the stream has from seq on, n bytes of it.
func (s *sender) bytes(seq uint32, n int) []byte {
	from := s.off + int(seq-s.seq)
	return s.buf[from : from+n]
}

// drop lets go of what was acknowledged.
func (s *sender) drop(to uint32) {
	n := min(int(to-s.seq), len(s.buf)-s.off) // the FIN is no byte of it
	s.off += n
	s.seq += uint32(n)
	if s.off == len(s.buf) {
		s.buf, s.off = s.buf[:0], 0
	}
}

// end is the sequence number behind what was written.
func (s *sender) end() uint32 { return s.seq + uint32(len(s.buf)-s.off) }

// pending reports whether something waits to be sent for the first time.
func (s *sender) pending() bool { return !s.finSent && (s.end() != s.nxt || s.closed) }

// left is how many bytes were never sent.
func (s *sender) left() int {
	if s.finSent {
		return 0
	}
	return int(s.end() - s.nxt)
}

// shift removes the first segment.
func (s *sender) shift() {
	s.first++
	if s.first == len(s.segs) {
		s.segs, s.first = s.segs[:0], 0
	}
}

// push adds a segment.
func (s *sender) push(g seg) {
	if s.first > 0 && len(s.segs) == cap(s.segs) {
		n := copy(s.segs, s.segs[s.first:])
		s.segs, s.first = s.segs[:n], 0
	}
	s.segs = append(s.segs, g)
}

// forget takes a segment that leaves the queue or is delivered out of the counts.
func (s *sender) forget(g *seg) {
	if g.is(segLost) {
		s.lost--
	}
	if g.is(segRetrans) {
		s.retrans--
	}
	g.marks &^= segLost | segRetrans
}

// lose marks a segment as lost, once more if its retransmission was lost.
func (s *sender) lose(g *seg) {
	if g.is(segRetrans) {
		s.retrans--
	}
	if !g.is(segLost) {
		s.lost++
	}
	g.marks = g.marks&^segRetrans | segLost
}

// measure takes a round trip time into account (RFC 6298).
func (s *sender) measure(rtt int64, minRTO time.Duration) {
	rtt = max(rtt, 1)
	if s.minRTT == 0 || rtt < s.minRTT {
		s.minRTT = rtt
	}
	if s.srtt == 0 {
		s.srtt, s.rttvar = rtt, rtt/2
	} else {
		s.rttvar += (max(s.srtt-rtt, rtt-s.srtt) - s.rttvar) / 4
		s.srtt += (rtt - s.srtt) / 8
	}
	// Linux bounds the variance, not the sum.
	s.rto = min(s.srtt+max(4*s.rttvar, int64(minRTO)), int64(maxRTO))
}

// timeout is the retransmission timeout with its backoff.
func (s *sender) timeout() int64 { return s.backed(s.rto) }

func (s *sender) backed(d int64) int64 {
	for range min(s.backoff, 16) {
		d = min(2*d, int64(maxRTO))
	}
	return d
}

// grow is slow start and congestion avoidance (Reno), if cwnd was what limited.
func (s *sender) grow(acked, before int) {
	if s.cwnd < s.ssthresh {
		if !s.cwndLimited && s.cwnd >= 2*before {
			return
		}
		n := min(acked, s.ssthresh-s.cwnd)
		s.cwnd += n
		acked -= n
	} else if !s.cwndLimited {
		return
	}
	s.cwndCnt += acked
	if s.cwndCnt >= s.cwnd && s.cwnd >= s.ssthresh {
		s.cwndCnt -= s.cwnd
		s.cwnd++
	}
}

// halved is the new ssthresh after a loss.
func (s *sender) halved() int { return max(s.cwnd/2, 2) }

// reduce begins a reduction of cwnd by proportional rate (RFC 6937).
func (s *sender) reduce() {
	s.highSeq, s.tlpOut = s.nxt, false
	s.prrDelivered, s.prrOut, s.cwndCnt = 0, 0, 0
	s.priorCwnd = s.cwnd
	s.ssthresh = s.halved()
}

// prr sets cwnd while it is being reduced.
func (s *sender) prr(delivered int, advanced, newlyLost bool) {
	if delivered <= 0 || s.priorCwnd == 0 {
		return
	}
	s.prrDelivered += delivered
	flight := s.inFlight()
	n := 0
	if delta := s.ssthresh - flight; delta < 0 {
		n = (s.ssthresh*s.prrDelivered+s.priorCwnd-1)/s.priorCwnd - s.prrOut
	} else {
		n = max(s.prrDelivered-s.prrOut, delivered)
		if advanced && !newlyLost {
			n++
		}
		n = min(delta, n)
	}
	if s.prrOut == 0 {
		n = max(n, 1) // a fast retransmit goes out in any case
	}
	s.cwnd = flight + max(n, 0)
}

// endReduction ends what reduce began.
func (s *sender) endReduction() {
	if s.ssthresh < infiniteCwnd && (s.ca == caCWR || s.undo) {
		s.cwnd = max(s.ssthresh, 1)
	}
}
