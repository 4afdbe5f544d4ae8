// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"flag"
	"os"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestMain(m *testing.M) {
	Assertions = true
	// A run takes a fraction of a millisecond; the command line may say otherwise.
	if err := flag.Set("rapid.checks", "600"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

func genData(t *rapid.T) []byte {
	n := rapid.SampledFrom([]int{0, 1, 300, 12000, 60000}).Draw(t, "stream length")
	b := make([]byte, n)
	x := uint32(rapid.IntRange(1, 1<<20).Draw(t, "stream"))
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return b
}

// TestSameStreamsLeave: however two equal streams are cut, repeated, overtaken and
// lost, all of it leaves, nothing before the SVM transmitted it, and nobody asks for a
// checkpoint. The world checks each frame.
func TestSameStreamsLeave(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t, Config{Timeout: time.Hour}, genData(t))
		w.open()
		for range w.n(0, 120, "acts") {
			w.act()
		}
		w.settle()
		w.mustBeWhole()
		if len(w.reasons) > 0 {
			t.Fatalf("checkpoints: %v", w.reasons)
		}
		w.end()
	})
}

// TestDifferentStreamsDoNot: a byte that differs never leaves, and both having
// transmitted it asks for exactly one checkpoint.
func TestDifferentStreamsDoNot(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		data := genData(t)
		if len(data) == 0 {
			data = []byte{1}
		}
		w := newWorld(t, Config{Timeout: time.Hour}, data)
		at := rapid.IntRange(0, len(data)-1).Draw(t, "differs at")
		w.svm.data[at] ^= byte(rapid.IntRange(1, 255).Draw(t, "by"))
		w.open()
		for range w.n(0, 120, "acts") {
			w.act()
		}
		w.settle()
		if w.got[at] || w.gotFIN {
			t.Fatalf("byte %d left", at)
		}
		if !slices.Equal(w.reasons, []Reason{ReasonPayload}) {
			t.Fatalf("checkpoints: %v", w.reasons)
		}
		w.end()
	})
}

// TestRestart: a daemon that starts again in mid-stream takes over the connection:
// nobody asks for a checkpoint, and all leaves.
func TestRestart(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t, Config{Timeout: time.Hour}, genData(t))
		w.adopts = true
		w.open()
		for range w.n(1, 3, "restarts") {
			for range w.n(0, 60, "acts") {
				w.act()
			}
			w.restart()
		}
		for range w.n(0, 60, "acts") {
			w.act()
		}
		w.settle()
		w.mustBeWhole()
		if len(w.reasons) > 0 {
			t.Fatalf("checkpoints: %v", w.reasons)
		}
		w.end()
	})
}

// TestCheckpoints: whatever the guests disagree on, after a commit they agree, and
// all leaves in the end; nothing leaves before. P may forget everything meanwhile,
// and a connection may be followed by another one of the same tuple.
func TestCheckpoints(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		data := genData(t)
		w := newWorld(t, Config{}, data)
		differ := func() {
			for range w.n(0, min(2, len(data)), "differences") {
				w.svm.data[w.n(0, len(data)-1, "differs at")] ^= 1
			}
		}
		differ()
		w.adopts = rapid.Bool().Draw(t, "adopts")
		w.open()
		for range w.n(0, 5, "turns") {
			for range w.n(0, 40, "acts") {
				w.act()
			}
			switch w.n(0, 5, "turn") {
			case 0:
				w.restart()
			case 1:
				data = genData(t)
				w.dial(data)
				differ()
				w.open()
			default:
				w.checkpoint()
			}
		}
		for w.settle(); len(w.reasons) > 0 && !w.whole(); w.settle() {
			w.reasons = nil
			w.checkpoint()
		}
		w.mustBeWhole()
		w.end()
	})
}

func (w *world) mustBeWhole() {
	w.t.Helper()
	if !w.whole() {
		for _, f := range w.p.Flows() {
			w.t.Logf("%+v", f)
		}
		w.fatalf("byte %d of %d did not leave (FIN left: %v), %v", slices.Index(w.got, false), len(w.got), w.gotFIN, w.reasons)
	}
}

// end lets the connection expire: no slot may be left then.
func (w *world) end() {
	w.t.Helper()
	w.tick(3 * time.Hour)
	w.tick(3 * time.Hour)
	if st := w.p.Stats(); len(w.slots) > 0 || st.HeldPackets != 0 || st.HeldBytes != 0 || st.Connections != 0 || st.Flows != 0 || w.p.points.used != 0 {
		w.fatalf("left over: slots %v, %d points, %+v", w.slots, w.p.points.used, st)
	}
	w.secondary(Event{Kind: EvReset})
	if len(w.sSlots) > 0 {
		w.fatalf("S keeps slots %v", w.sSlots)
	}
}
