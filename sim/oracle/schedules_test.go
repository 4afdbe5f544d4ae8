// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

var (
	schedules = flag.Int("schedules", 200, "how many random schedules TestSchedules plays")
	firstSeed = flag.Uint64("seed", 1, "of the first one")
)

// schedule is what both guests send on one connection: one stream, each with cuts of its own, in
// an interleaving of its own.
type schedule struct {
	seed    uint64
	length  int
	order   []*packet // from the PVM or the SVM
	differs int       // where a byte of the SVM's is another, counted from 1; 0: nowhere
}

// differOneIn: in every so many schedules a byte differs.
const differOneIn = 4

func newSchedule(seed uint64) *schedule {
	r := rand.New(rand.NewPCG(seed, 0))
	s := &schedule{seed: seed, length: 1 + r.IntN(4000)}
	if r.IntN(differOneIn) == 0 {
		s.differs = 1 + r.IntN(s.length)
	}
	// Small and large segments: what an interactive and what a bulk sender does.
	largest := []int{3, 50, 700, 1460}[r.IntN(4)]
	s.length = min(s.length, 60*largest)
	s.differs = min(s.differs, s.length)
	cut := func(from who) (all []*packet) {
		for at := 0; at < s.length; {
			n := min(1+r.IntN(largest), s.length-at)
			p := &packet{from: from, kind: "tcp", conn: 1, flags: flagACK, seq: uint32(1 + at), ack: 1, win: defaultWin, ttl: defaultTTL}
			p.payload = streamAt(p.seq, n)
			if i := s.differs - 1 - at; from == svm && i >= 0 && i < n {
				p.payload[i] ^= 1
			}
			if r.IntN(3) == 0 {
				p.flags |= flagPSH
			}
			at += n
			all = append(all, p)
		}
		return all
	}
	a, b := cut(pvm), cut(svm)
	for len(a) > 0 || len(b) > 0 {
		of := &a
		if len(a) == 0 || len(b) > 0 && r.IntN(2) == 0 {
			of = &b
		}
		n := min(1+r.IntN(4), len(*of)) // guests send in bursts
		s.order = append(s.order, (*of)[:n]...)
		*of = (*of)[n:]
	}
	return s
}

// left is what reached the client until a checkpoint was asked for.
type left struct {
	stream     []byte // from position 1 on, as far as it is whole
	checkpoint bool
}

// play has the guests send the schedule.
func (s *schedule) play(e engine, base uint16) (l left, err error) {
	r := &scenario{engine: e, world: newWorld(base)}
	if _, err := r.open(nil); err != nil {
		return l, err
	}
	e.take()
	for _, p := range s.order {
		if err := e.send(p.from, p.frame(r.world)); err != nil {
			return l, err
		}
	}
	got := make(map[int]byte) // by position
	for deadline := time.Now().Add(patience); ; {
		if err := e.settle(); err != nil {
			return l, err
		}
		for _, ev := range e.take() {
			switch {
			case ev.to == 0:
				l.checkpoint = true
			case ev.to == client && !l.checkpoint:
				if err := note(got, ev.frame, r.world); err != nil {
					return l, err
				}
			}
		}
		if l.checkpoint || len(got) == s.length || time.Now().After(deadline) {
			break
		}
		time.Sleep(time.Millisecond)
	}
	for i := 1; i <= s.length; i++ {
		b, ok := got[i]
		if !ok {
			break
		}
		l.stream = append(l.stream, b)
	}
	if len(l.stream) < len(got) {
		return l, fmt.Errorf("%d bytes left, of which only the first %d are in one piece", len(got), len(l.stream))
	}
	return l, nil
}

// note takes in a frame's payload.
func note(got map[int]byte, frame []byte, w *world) error {
	t := frame[34:]
	head := int(t[12] >> 4 * 4)
	seq := int(int32(binary.BigEndian.Uint32(t[4:]) - w.of(1).pvm))
	for i, b := range t[head : int(binary.BigEndian.Uint16(frame[16:]))-20] {
		if before, ok := got[seq+i]; ok && before != b {
			return fmt.Errorf("position %d left twice, with different bytes", seq+i)
		}
		got[seq+i] = b
	}
	return nil
}

// TestSchedules: whatever the cuts and the interleaving, both engines let the same stream leave, and
// neither lets out a byte at or behind one that differs before it has asked for a checkpoint. What
// lockstep acknowledges, both guests have.
func TestSchedules(t *testing.T) {
	const ports = 8 // of the client, for each
	if *schedules > 6000 {
		t.Fatal("the ports of the client are enough for 6000 schedules")
	}
	t.Parallel() // some of the scenarios mostly wait
	p, c := startPair(t, patientPair), startColo(t, patientQEMU)
	// QEMU's proxy acknowledges what the secondary has not received, and is not asked.
	for i := range max(1, *schedules/4) {
		seed := *firstSeed + uint64(i)
		if err := playACKs(p, seed, uint16(1000+ports*(*schedules+i))); err != nil {
			t.Fatalf("lockstep, acknowledgments: %v; run it alone with -run TestSchedules -schedules 1 -seed %d", err, seed)
		}
	}
	differing := 0
	for i := range *schedules {
		s := newSchedule(*firstSeed + uint64(i))
		want := streamAt(1, s.length)
		if s.differs > 0 {
			differing++
		}
		for _, x := range []struct {
			name string
			engine
		}{{"qemu", c}, {"lockstep", p}} {
			l, err := s.play(x.engine, uint16(1000+ports*i))
			switch {
			case err != nil:
			case !bytes.HasPrefix(want, l.stream):
				err = fmt.Errorf("what left is not what the PVM sent")
			case s.differs == 0 && (l.checkpoint || len(l.stream) < s.length):
				err = fmt.Errorf("the guests sent the same, and %d of %d bytes left; a checkpoint was asked for: %t", len(l.stream), s.length, l.checkpoint)
			case s.differs > 0 && !l.checkpoint:
				err = fmt.Errorf("byte %d of %d differs, and no checkpoint was asked for", s.differs, s.length)
			case s.differs > 0 && len(l.stream) >= s.differs:
				err = fmt.Errorf("byte %d differs, and %d bytes left before the checkpoint", s.differs, len(l.stream))
			}
			if err != nil {
				t.Fatalf("%s: %v; run it alone with -run TestSchedules -schedules 1 -seed %d", x.name, err, s.seed)
			}
			if s.differs > 0 {
				// What waits leaves before the next one.
				if err := x.checkpoint(); err != nil {
					t.Fatal(err)
				}
				x.take()
			}
		}
	}
	if differing == 0 && *schedules > 1 {
		t.Error("no schedule had guests that differ")
	}
	t.Logf("%d schedules, %d of them with a byte that differs", *schedules, differing)
}

// A seed says everything: its schedule is the same each time.
func TestScheduleOfSeed(t *testing.T) {
	a, b := newSchedule(7), newSchedule(7)
	same := slices.EqualFunc(a.order, b.order, func(x, y *packet) bool {
		return x.from == y.from && x.seq == y.seq && x.flags == y.flags && bytes.Equal(x.payload, y.payload)
	})
	if !same || a.differs != b.differs {
		t.Error("two schedules of one seed differ")
	}
}
