// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"testing"
)

// TestSteadyStateAllocatesNothing: matching a data segment, in both orders.
func TestSteadyStateAllocatesNothing(t *testing.T) {
	for _, svmFirst := range []bool{false, true} {
		x := newTranscript(t, 0)
		pvm, svm := x.parse("pvm SA 1000 ack=501 ws=7 ts=1"), x.parse("svm SA 1000 ack=501 ws=7 ts=1")
		pvm.Seg.Slot = 1
		out := x.p.Step(x.now, &pvm, nil)
		out = x.p.Step(x.now, &svm, out[:0])
		if len(out) != 1 || out[0].Op != OpSend {
			t.Fatalf("the handshake gave %v", out)
		}
		pvm, svm = x.parse("pvm PA 1001..2449 ack=501 ts=2 sack=601-701"), x.parse("svm PA 1001..2449 ack=501 ts=2")
		pvm.Seg.Slot = 2
		first, second := &pvm, &svm
		if svmFirst {
			first, second = &svm, &pvm
		}
		out = make([]Effect, 0, 8)
		n := testing.AllocsPerRun(10000, func() {
			x.now += 1000
			sum := x.keys.Sum(pvm.Seg.Seq, pvm.Seg.Payload)
			pvm.Seg.Sum, svm.Seg.Sum = sum, sum
			out = x.p.Step(x.now, first, out[:0])
			out = x.p.Step(x.now, second, out)
			if len(out) != 1 || out[0].Op != OpSend || !out[0].Free || out[0].To != 1448 {
				t.Fatalf("SVM first %v: %+v", svmFirst, out)
			}
			for _, s := range []*Segment{&pvm.Seg, &svm.Seg} {
				s.Seq += s.Len
				s.Ack += 10
			}
		})
		if n != 0 {
			t.Errorf("SVM first %v: %v allocations per segment", svmFirst, n)
		}
	}
}

func BenchmarkMatch(b *testing.B) {
	x := newTranscript(b, 0)
	x.p.asserts = false // as in production
	pvm, svm := x.parse("pvm SA 1000 ack=501 ws=7 ts=1"), x.parse("svm SA 1000 ack=501 ws=7 ts=1")
	pvm.Seg.Slot = 1
	x.p.Step(x.now, &pvm, nil)
	x.p.Step(x.now, &svm, nil)
	pvm, svm = x.parse("pvm PA 1001..2449 ack=501 ts=2"), x.parse("svm PA 1001..2449 ack=501 ts=2")
	pvm.Seg.Slot = 2
	var out []Effect
	for b.Loop() {
		x.now += 1000
		out = x.p.Step(x.now, &pvm, out[:0])
		out = x.p.Step(x.now, &svm, out)
		pvm.Seg.Seq += 1448
		svm.Seg.Seq += 1448
	}
}
