// SPDX-License-Identifier: Apache-2.0

package tcp

import "time"

const (
	maxRTO   = 120 * time.Second
	firstRTO = time.Second
)

// estimator estimates the round trip time: ns.
type estimator struct {
	srtt, rttvar, minRTT int64
	rto                  int64
	backoff              uint
}

// measure takes a round trip time into account (RFC 6298).
func (s *estimator) sample(rtt int64, minRTO time.Duration) {
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
func (s *estimator) timeout() int64 { return s.backed(s.rto) }

func (s *estimator) backed(d int64) int64 {
	for range min(s.backoff, 16) {
		d = min(2*d, int64(maxRTO))
	}
	return d
}
