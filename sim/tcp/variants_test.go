// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"testing"
	"time"
)

// TestWraps: sequence numbers and timestamps that wrap early in a connection.
func TestWraps(t *testing.T) {
	cfg := Config{SeqWrap: 5000, TSWrap: 50}
	w := newWorld(t, cfg, cfg, link{delay: 20 * time.Millisecond, loss: 0.02}, 1)
	w.exchange(200_000, 200_000, time.Minute, func(a, b *stream) {
		for _, x := range []*stream{a, b} {
			c := x.s.conns[x.id]
			if c.iss < 1<<32-5000 || c.tsNow(w.now) < 1<<32-60 && c.tsNow(w.now) > 60 {
				t.Errorf("ISN %d, timestamp %d", c.iss, c.tsNow(w.now))
			}
		}
	})
}

// TestExtensionHeaders: IPv6 with options in front of TCP.
func TestExtensionHeaders(t *testing.T) {
	cfg := Config{Addr: addrA6, HopOptions: true, DestOptions: true}
	other := cfg
	other.Addr = addrB6
	w := newWorld(t, cfg, other, link{delay: time.Millisecond}, 1)
	w.keep = true
	w.exchange(10_000, 10_000, time.Minute, nil)
	for _, f := range w.sent {
		if f[etherLen+6] != protoHopByHop || f[etherLen+ipv6Len] != protoDestOptions || f[etherLen+ipv6Len+extLen] != protoTCP {
			t.Fatalf("% x", f[:etherLen+ipv6Len+2*extLen])
		}
	}
}
