// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// lossy is a world whose guests never repeat anything: their timers are far longer
// than the test looks. The peer link loses records, and mirrored ACKs.
type lossy struct {
	*world
	lost      []*lostRecord
	deaf      bool // the SVM has not got the handshake's last ACK
	left      int  // times that it will not get it again
	svmStarts func()
}

// lostRecord is one that S keeps in its TX stream; it is lost again this often.
type lostRecord struct {
	ev    Event
	again int
}

func (l *lossy) record(s Segment) {
	ev := Event{Kind: EvSVM, Seg: s}
	if n := l.n(0, 2, "losses"); n > 0 {
		l.lost = append(l.lost, &lostRecord{ev, n - 1})
		return
	}
	l.event(ev)
}

// event gives P an event, and S and the SVM what follows.
func (l *lossy) event(ev Event) {
	for _, e := range l.p.Step(l.now, &ev, nil) {
		switch e.Op {
		case OpQuery:
			l.lost = slices.DeleteFunc(l.lost, func(r *lostRecord) bool {
				if r.again--; r.again >= 0 {
					return false
				}
				l.late = append(l.late, r.ev)
				return true
			})
		case OpRemirror:
			if l.left--; l.deaf && l.left < 0 {
				l.deaf = false
				l.svmStarts()
			}
		default:
			l.effect(&e)
		}
	}
}

// heals plays a server that transmits first and then acknowledges a request, and reports
// whether all of that leaves within 200 ms.
func heals(t *rapid.T, mut mutation, deaf bool) bool {
	data := genData(t)
	l := &lossy{world: newWorld(t, Config{Timeout: time.Hour}, data), deaf: deaf}
	l.p.mutate(mut)
	l.left = l.n(0, 1, "remirrored ones lost")
	transmit := func(g *guest, send func(Segment)) {
		for g.sent < len(data) {
			from := g.sent
			g.sent += l.length(len(data) - from)
			send(l.segment(g, from, g.sent, 0))
		}
		g.fin = true
		send(l.segment(g, g.sent, g.sent, FIN))
		g.ack += 300
		g.buf = maxSeq(g.buf, g.ack)
		send(l.segment(g, g.sent, g.sent, 0))
	}
	pvm := func(s Segment) {
		if s.At = l.now; s.Len > 0 || s.Flags&(SYN|FIN) != 0 {
			l.slotNo++
			s.Slot = l.slotNo
			l.slots[s.Slot] = &s
		}
		l.event(Event{Kind: EvPVM, Seg: s})
	}
	svm := func(s Segment) {
		s.Payload = nil
		l.record(s)
	}
	for _, g := range []*guest{&l.pvm, &l.svm} {
		g.ack, g.buf = l.cliISN+1, l.cliISN+60000
	}
	l.svm.syn = true
	pvm(l.segment(&l.pvm, 0, 0, SYN))
	svm(l.segment(&l.svm, 0, 0, SYN))
	l.svmStarts = func() { transmit(&l.svm, svm) }
	run := func(d time.Duration) {
		for end := l.now + int64(d); ; {
			for len(l.late) > 0 {
				ev := l.late[0]
				l.late = l.late[1:]
				l.event(ev)
			}
			if l.now = max(l.now, l.p.NextDeadline()); l.now > end {
				l.now = end
				return
			}
			l.event(Event{Kind: EvTick})
		}
	}
	run(100 * time.Millisecond) // the handshake
	if !l.gotSYN {
		return false
	}
	if l.deaf {
		transmit(&l.pvm, pvm)
	} else {
		l.svmStarts()
		transmit(&l.pvm, pvm)
	}
	run(200 * time.Millisecond)
	if len(l.reasons) > 0 {
		t.Fatalf("checkpoints: %v", l.reasons)
	}
	return l.whole() && l.lastAck == l.pvm.ack
}

// TestLossOnThePeerLink: lost records and a lost last ACK of a handshake heal before
// any guest has to repeat (R6); without the rule they do not.
func TestLossOnThePeerLink(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		if deaf := rapid.Bool().Draw(t, "deaf"); !heals(t, 0, deaf) {
			t.Fatal("does not heal")
		}
	})
	t.Run("turned off", rapid.MakeCheck(func(t *rapid.T) {
		if heals(t, mutR6, true) {
			t.Fatal("heals although the rule is turned off")
		}
	}))
}
