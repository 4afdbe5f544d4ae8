// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"testing"
	"time"
)

// TestSYNFlood: a flood of SYNs that both guests answer, or the PVM alone, fills no
// table, asks for no checkpoint, and hurts no connection that is there.
func TestSYNFlood(t *testing.T) {
	x := newTranscript(t, 0)
	x.config(Config{MaxConnections: 20, MaxHalfOpen: 12})
	run := func(line string, port int) {
		x.now += int64(10 * time.Microsecond)
		ev := x.parse(line)
		if port > 0 {
			ev.Seg.RemotePort, ev.Seg.Remote[14] = uint16(port), 9
		}
		x.step(line, ev)
	}
	for _, l := range []string{"pvm SA 1000 ack=501", "svm SA 1000 ack=501", "pvm A 1001 ack=501", "svm A 1001 ack=501"} {
		run(l, 0)
	}
	for i := 1; i <= 20000; i++ {
		run("pvm SA 1000 ack=501", i)
		if i%3 == 0 {
			run("svm SA 1000 ack=501", i)
		}
		run("tick", 0)
		if st := x.p.Stats(); st.Connections > 13 || st.HeldPackets > 12 || len(x.slots) > 12 {
			t.Fatalf("after %d: %+v", i, st)
		}
	}
	x.out.Reset()
	run("pvm A 1001..1101 ack=501", 0)
	run("svm A 1001..1101 ack=501", 0)
	st := x.p.Stats()
	if st.Checkpoints != [ReasonCount]uint64{} || st.Drops[ReasonTableFull] > 0 || st.Evicted < 19900 || st.ReleasedBytes != 100 {
		t.Errorf("%+v\n%s", st, x.out.String())
	}
	x.done()
}
