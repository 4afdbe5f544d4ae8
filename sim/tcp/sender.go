// SPDX-License-Identifier: Apache-2.0

package tcp

// sender is the state of what goes out. Sequence numbers of the stream: una ≤ nxt.
type sender struct {
	c *conn

	una, nxt   uint32 // oldest unacknowledged, next to send
	sentOnce   uint32 // what was sent for the first time ends here: retransmissions begin before it
	lastSentAt int64

	wnd    uint32 // of the peer
	wl1    uint32 // sequence number of its last update
	maxWnd uint32
	scale  uint8
	mss    int // as the peer takes it, without timestamps

	closed    bool // FIN follows what was written
	finSent   bool
	urgent    bool
	urgentEnd uint32
	pushed    uint32 // the end of the last segment with PSH
	smallEnd  uint32 // the end of the last segment below the MSS (Minshall)

	retries    int // of the same segment; of window probes
	stuckSince int64

	sendBuffer
	scoreboard
	estimator
	recovery
}

func (s *sender) init() {
	s.cwnd, s.ssthresh, s.rto = initialCwnd, infiniteCwnd, int64(firstRTO)
	s.maxWnd = 0
}

// start sets the numbers of the first byte of the stream.
func (s *sender) start(seq uint32) {
	s.una, s.nxt, s.sentOnce, s.seq, s.smallEnd, s.fack, s.highSeq, s.pushed = seq, seq, seq, seq, seq, seq, seq, seq
}

// taken is start, and the peer has n bytes already.
func (s *sender) taken(seq, n uint32) {
	s.seq = seq
	s.drop(seq + n)
	s.start(seq + n)
}

// finAcked reports whether the peer has everything, the FIN too.
func (s *sender) finAcked() bool { return s.finSent && s.una == s.nxt }

// pending reports whether something waits to be sent for the first time.
func (s *sender) pending() bool { return !s.finSent && (s.end() != s.nxt || s.closed) }

// left is how many bytes were never sent.
func (s *sender) left() int {
	if s.finSent {
		return 0
	}
	return int(s.end() - s.nxt)
}

// sendBuffer is what was written and is not acknowledged.
type sendBuffer struct {
	buf []byte // from off on
	off int
	seq uint32 // of buf[off]
}

// append takes what was written.
func (s *sendBuffer) append(b []byte) {
	if s.off > len(s.buf)/2 && len(s.buf)+len(b) > cap(s.buf) {
		n := copy(s.buf, s.buf[s.off:])
		s.buf, s.off = s.buf[:n], 0
	}
	s.buf = append(s.buf, b...)
}

// bytes is what the stream has from seq on, n bytes of it.
func (s *sendBuffer) bytes(seq uint32, n int) []byte {
	from := s.off + int(seq-s.seq)
	return s.buf[from : from+n]
}

// drop lets go of what was acknowledged.
func (s *sendBuffer) drop(to uint32) {
	n := min(int(to-s.seq), len(s.buf)-s.off) // the FIN is no byte of it
	s.off += n
	s.seq += uint32(n)
	if s.off == len(s.buf) {
		s.buf, s.off = s.buf[:0], 0
	}
}

// end is the sequence number behind what was written.
func (s *sendBuffer) end() uint32 { return s.seq + uint32(len(s.buf)-s.off) }
