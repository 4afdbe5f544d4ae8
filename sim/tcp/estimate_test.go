// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"net/netip"
	"testing"
	"time"
)

// Karn: what arrived long ago, behind a hole, is no sample of the round trip when the hole is filled.
func TestNoSampleBehindHole(t *testing.T) {
	w := newWorld(t, Config{NoSACK: true, NoTimestamps: true}, Config{}, link{delay: 10 * time.Millisecond}, 1)
	a, _ := w.open()
	n := 0
	w.drop = func(from int, frame []byte) bool {
		if from == 0 && len(frame) > 1000 {
			n++
		}
		return from == 0 && n <= 2 // the first two, and the first ones again
	}
	w.stack[0].Write(w.now, a, make([]byte, 4000))
	w.run(2 * time.Second)
	if s := &w.stack[0].conns[a].snd; w.stack[0].Unsent(a) != 0 || s.srtt > int64(30*time.Millisecond) {
		t.Errorf("%d bytes are left, the round trip is estimated as %v", w.stack[0].Unsent(a), time.Duration(s.srtt))
	}
}

// A connection that takes the place of one in TIME-WAIT begins beyond its numbers.
func TestTimeWaitNumbers(t *testing.T) {
	w := newWorld(t, Config{}, Config{}, link{}, 1)
	a, b := w.open()
	old := w.stack[1].conns[b]
	_, local := w.stack[0].Tuple(a)
	w.stack[1].CloseWrite(w.now, b)
	w.run(0)
	w.stack[0].CloseWrite(w.now, a)
	w.run(2 * time.Second)
	if old.state != TimeWait || w.stack[0].State(a) != Closed {
		t.Fatal(old.state, w.stack[0].State(a))
	}
	w.stack[0].Dial(w.now, netip.AddrPortFrom(addrB, port), local)
	w.run(0)
	id, ok := w.stack[1].Accept(port)
	if !ok || w.stack[1].conns[id].iss != old.snd.nxt+65537 || old.state != Closed {
		t.Errorf("%v %v", ok, old.state)
	}
}
