// SPDX-License-Identifier: Apache-2.0

package compare

import "testing"

// TestNeighboursAreBounded: an SVM that asks for ever more neighbours gets an answer for so
// many of them at a time only.
func TestNeighboursAreBounded(t *testing.T) {
	x := newTranscript(t, 0)
	ev := x.parse("neigh mac=7")
	ask := func(n int) (passed int) {
		for i := range n {
			ev.Seg.Remote[12], ev.Seg.Remote[13] = byte(i>>8), byte(i)
			passed += len(x.p.Step(x.now, &ev, nil))
		}
		return passed
	}
	for range 3 {
		if n := ask(2 * maxNeighs); n != maxNeighs || len(x.p.neighs.asked) != maxNeighs {
			t.Fatalf("%d passed on, %d remembered", n, len(x.p.neighs.asked))
		}
		if n := ask(2 * maxNeighs); n != 0 {
			t.Fatalf("%d more passed on within a second", n)
		}
		x.now += int64(neighEvery)
	}
	if n := ask(1); n != 1 || len(x.p.neighs.asked) != 1 || x.p.neighs.byTime.len() != 1 {
		t.Fatalf("%d passed on, %d remembered", n, len(x.p.neighs.asked))
	}
}
