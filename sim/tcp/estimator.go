// SPDX-License-Identifier: Apache-2.0

package tcp

import "time"

const (
	maxRTO      = 120 * time.Second
	firstRTO    = time.Second
	fallbackRTO = 3 * time.Second // after a handshake that gave no sample (RFC 6298, 5.7)
)

// estimator estimates the round trip time: ns.
type estimator struct {
	srtt, rttvar, minRTT int64
	rto                  int64 // doubled by each timeout, until there is a new sample (Karn)
	backoff              uint  // of window probes
}

// sample takes a round trip time into account (RFC 6298).
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

// double is what a timeout does.
func (s *estimator) double() { s.rto = min(2*s.rto, int64(maxRTO)) }

// probeTimeout is the time to the next window probe.
func (s *estimator) probeTimeout() int64 {
	d := s.rto
	for range min(s.backoff, 16) {
		d = min(2*d, int64(maxRTO))
	}
	return d
}
