// SPDX-License-Identifier: Apache-2.0

package tcp

import "testing"

// BenchmarkSmall is a request and an answer of 64 bytes: two segments, in and out.
func BenchmarkSmall(b *testing.B) {
	w := newWorld(b, Config{}, Config{}, link{}, 1)
	ia, ib := w.open()
	msg := make([]byte, 64)
	s := w.stack
	frames := 0
	pass := func(from int) {
		for _, f := range s[from].Take() {
			s[1-from].Input(w.now, f)
			frames++
		}
		s[0].NextDeadline()
		s[1].NextDeadline()
	}
	b.ReportAllocs()
	for b.Loop() {
		w.now += 1e5
		s[0].Write(w.now, ia, msg)
		pass(0)
		s[1].Read(w.now, ib, msg)
		s[1].Write(w.now, ib, msg)
		pass(1)
		s[0].Read(w.now, ia, msg)
		pass(0)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(frames), "ns/frame")
}

// BenchmarkBulk is a stream of full segments and its ACKs.
func BenchmarkBulk(b *testing.B) {
	w := newWorld(b, Config{}, Config{}, link{}, 1)
	ia, ib := w.open()
	chunk := make([]byte, 32<<10)
	s := w.stack
	frames := 0
	b.ReportAllocs()
	for b.Loop() {
		w.now += 1e5
		s[0].Write(w.now, ia, chunk)
		for from := 0; ; from = 1 - from {
			out := s[from].Take()
			if len(out) == 0 {
				break
			}
			for _, f := range out {
				s[1-from].Input(w.now, f)
				frames++
			}
			s[1].Read(w.now, ib, chunk)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(frames), "ns/frame")
}

// BenchmarkClone is a checkpoint of a stack with ten connections.
func BenchmarkClone(b *testing.B) {
	w := newWorld(b, Config{}, Config{}, link{}, 1)
	for range 10 {
		ia, _ := w.open()
		w.stack[0].Write(w.now, ia, make([]byte, 3000))
	}
	b.ReportAllocs()
	for b.Loop() {
		w.stack[0].Clone()
	}
}
