// SPDX-License-Identifier: Apache-2.0

package tcp

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
)

// recovery is the state of congestion control and of loss recovery.
type recovery struct {
	c *conn

	ca            caState
	cwnd, cwndCnt int // segments
	ssthresh      int
	cwndLimited   bool
	highSeq       uint32 // what had been sent when ca changed
	reduced       bool   // CWR goes out with the next data

	priorCwnd     int // to be restored by undo
	priorSsthresh int
	undo          bool // the reduction can turn out wrong
	undoFrom      uint32
	undoRetrans   int    // retransmissions that no D-SACK told of
	retransStamp  uint32 // the timestamp of the first one, if stamped
	stamped       bool

	prrDelivered, prrOut int // segments since the reduction began (RFC 6937)

	frto           bool // the timeout can turn out spurious (RFC 5682)
	tlpOut         bool // a tail loss probe is out
	tlpHigh        uint32
	tlpRetransmits bool

	// RACK: the segment sent last of those that arrived.
	rackOrder uint32
	rackNew   bool // since losses were last looked for
	rackRTT   int64
	fack      uint32 // highest SACKed
	disorder  bool   // segments were seen to arrive out of order
}

// grow is slow start and congestion avoidance (Reno), if cwnd was what limited.
func (v *recovery) grow(acked, before int) {
	s := &v.c.snd
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
func (v *recovery) halved() int { return max(v.cwnd/2, 2) }

// reduce begins a reduction of cwnd by proportional rate (RFC 6937).
func (v *recovery) reduce() {
	s := &v.c.snd
	s.highSeq, s.tlpOut = s.nxt, false
	s.prrDelivered, s.prrOut, s.cwndCnt = 0, 0, 0
	s.priorCwnd = s.cwnd
	s.ssthresh = s.halved()
}

// prr sets cwnd while it is being reduced.
func (v *recovery) prr(delivered int, advanced, newlyLost bool) {
	s := &v.c.snd
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
func (v *recovery) endReduction() {
	s := &v.c.snd
	if s.ssthresh < infiniteCwnd && (s.ca == caCWR || s.undo) {
		s.cwnd = max(s.ssthresh, 1)
	}
}
