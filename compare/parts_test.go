// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"math"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// A list is what a slice of its elements would be, and an element leaves it once.
func TestList(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var l list[int]
		links := make([]link[int], 8)
		for i := range links {
			links[i].of = i
		}
		var want []int
		for range rapid.IntRange(0, 60).Draw(t, "steps") {
			i := rapid.IntRange(0, len(links)-1).Draw(t, "element")
			if k := slices.Index(want, i); k >= 0 {
				want = slices.Delete(want, k, k+1)
				links[i].unlink()
				links[i].unlink()
			} else {
				want = append(want, i)
				l.push(&links[i])
			}
			var got, back []int
			for k := l.first; k != nil; k = k.next {
				got = append(got, k.of)
			}
			for k := l.last; k != nil; k = k.prev {
				back = append(back, k.of)
			}
			slices.Reverse(back)
			if !slices.Equal(got, want) || !slices.Equal(back, want) || l.n != len(want) {
				t.Fatalf("%v forwards, %v backwards, %d of them, want %v", got, back, l.n, want)
			}
		}
	})
}

// In whatever order the records of a stream come, cut and repeated, each sum that is
// known is the right one; once all came, all positions are known, unless the budget made
// it forget. A record of other bytes is noticed.
func TestStream(t *testing.T) {
	keys := testKeys(3)
	rapid.Check(t, func(t *rapid.T) {
		base := genPos.Draw(t, "base")
		data := rapid.SliceOfN(rapid.Byte(), 1, 300).Draw(t, "data")
		cuts := slices.Compact(slices.Sorted(slices.Values(rapid.SliceOfN(rapid.IntRange(1, len(data)), 0, 12).Draw(t, "cuts"))))
		if len(cuts) == 0 || cuts[len(cuts)-1] != len(data) {
			cuts = append(cuts, len(data))
		}
		cuts = append([]int{0}, cuts...)
		at := func(i int) uint32 { return base + uint32(cuts[i]) }
		sum := func(i, j int) Sum { return keys.Sum(at(i), data[cuts[i]:cuts[j]]) }
		var spans []span
		for i := 0; i < len(cuts)-1; {
			j := rapid.IntRange(i+1, len(cuts)-1).Draw(t, "end")
			s := span{from: at(i)}
			for k := i + 1; k <= j; k++ {
				s.bounds = append(s.bounds, Bound{at(k), sum(i, k)})
			}
			spans = append(spans, s)
			i = j
		}
		spans = append(spans, rapid.SliceOfN(rapid.SampledFrom(spans), 0, 3).Draw(t, "again")...)
		budget := &pointBudget{perStream: rapid.SampledFrom([]int{6, 1000}).Draw(t, "budget"), max: 1000}
		s := &stream{budget: budget}
		s.setBase(base)
		for _, i := range rapid.Permutation(indices(len(spans))).Draw(t, "order") {
			if !s.learn(spans[i]) {
				t.Fatal("the stream contradicts itself")
			}
			if err := s.check(); err != nil {
				t.Fatal(err)
			}
		}
		if n := s.points.len() + s.nloose; n != budget.used {
			t.Fatalf("%d points, %d counted", n, budget.used)
		}
		for i := range cuts {
			switch got, ok := s.find(at(i)); {
			case !ok && budget.forgotten == 0:
				t.Fatalf("the sum at %d is not known", cuts[i])
			case ok && got != sum(0, i):
				t.Fatalf("the sum at %d is wrong", cuts[i])
			}
		}
		if _, _, hole := s.hole(); hole && budget.forgotten == 0 {
			t.Fatal("a hole although all is known")
		}
		other := spans[0]
		other.bounds = slices.Clone(other.bounds)
		other.bounds[len(other.bounds)-1].Sum[1]++
		if budget.forgotten == 0 && s.learn(other) {
			t.Fatal("other bytes are taken for the same")
		}
		s.forget()
		if budget.used != 0 {
			t.Fatalf("%d points left over", budget.used)
		}
	})
}

func indices(n int) []int {
	is := make([]int, n)
	for i := range is {
		is[i] = i
	}
	return is
}

func TestExtent(t *testing.T) {
	var pvm extent
	for i, c := range []struct {
		end  uint32
		fin  bool
		want bool
	}{
		{100, false, true}, {50, false, true}, {90, true, false}, {100, true, true}, {100, true, true},
		{101, false, false}, {99, true, false}, {60, false, true},
	} {
		if got := pvm.add(c.end, c.fin); got != c.want {
			t.Errorf("frame %d, to %d, FIN %v: taken %v", i, c.end, c.fin, got)
		}
	}
	if got := pvm.next(7); got != 101 {
		t.Errorf("the stream goes on at %d", got)
	}
	if got := (&extent{}).next(7); got != 7 {
		t.Errorf("a stream of nothing goes on at %d", got)
	}
	svm := extent{known: true, end: 100}
	if pvm.goesOn(&svm) || svm.goesOn(&pvm) {
		t.Error("an SVM that is as far goes on behind the FIN")
	}
	if svm.reach(101); !pvm.goesOn(&svm) || svm.goesOn(&pvm) {
		t.Error("the SVM goes on behind the FIN unnoticed")
	}
	if svm = (extent{fin: mark{true, 99}}); !pvm.goesOn(&svm) || !svm.goesOn(&pvm) {
		t.Error("two FINs are no difference")
	}
}

// R2: whatever the guests acknowledge, what is transmitted is never above either, and
// never goes back; with the guests' last word nothing more has grown.
func TestACKState(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := ackState{scale: rapid.SampledFrom([]int8{scaleUnknown, 0, 7, 14}).Draw(t, "scale")}
		start := genPos.Draw(t, "start")
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			s := Segment{
				Ack: start + uint32(rapid.IntRange(0, 1<<20).Draw(t, "ack")), Win: uint16(rapid.IntRange(0, 0xffff).Draw(t, "win")),
				Flags: rapid.SampledFrom([]Flags{ACK, ACK, ACK, SYN | ACK, RST | ACK, SYN}).Draw(t, "flags"),
			}
			if rapid.Bool().Draw(t, "svm") {
				a.fromSVM(&s)
			} else {
				a.fromPVM(&s, false)
			}
			if !a.may(ACK) || rapid.IntRange(0, 2).Draw(t, "transmit") == 0 {
				continue
			}
			before := a.sent
			m, grown := a.minimum(ACK, false)
			ack, win := a.transmit(ACK, false)
			if ack != m.ack || win != m.win {
				t.Fatalf("transmitted %d and %d, may %+v", ack, win, m)
			}
			if err := a.check(false); err != nil {
				t.Fatal(err)
			}
			if before.ok && (after(before.ack, ack) || after(before.edge, a.sent.edge)) {
				t.Fatalf("%+v goes back to %+v", before, a.sent)
			}
			if more := !before.ok || before.ack != ack || before.edge != a.sent.edge; grown != more && a.scale != scaleUnknown {
				t.Fatalf("grown %v, from %+v to %+v", grown, before, a.sent)
			}
			if _, again := a.minimum(ACK, false); again {
				t.Fatal("it has grown again with nothing in between")
			}
		}
	})
}

// However frames overlap, what is held is disjoint, in order, and all that came and no
// more; every slot is freed once.
func TestHeldQueue(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		k := &core{slots: [slotClasses]slotUse{{limit: 99}, {limit: 99}}}
		q := heldQueue{core: k}
		base := genPos.Draw(t, "base")
		var want [64]bool
		slots := 0
		for range rapid.IntRange(1, 30).Draw(t, "frames") {
			from := rapid.IntRange(0, len(want)-1).Draw(t, "from")
			to := rapid.IntRange(from+1, len(want)).Draw(t, "to")
			slots++
			var h piece
			h.fill(&Segment{
				Seq: base + uint32(from), Len: uint32(to - from), Payload: make([]byte, to-from), Slot: Slot(slots),
				Large: rapid.Bool().Draw(t, "large"),
			}, uint64(slots))
			for i := from; i < to; i++ {
				want[i] = true
			}
			if i, fresh := q.trim(&h); fresh {
				q.insert(i, &h)
			} else {
				k.drop(h.slot, ReasonDuplicate)
			}
			if err := q.check(); err != nil {
				t.Fatal(err)
			}
		}
		var got [64]bool
		for i := range q.view() {
			for at := q.view()[i].start; at != q.view()[i].end; at++ {
				got[at-base] = true
			}
		}
		if got != want {
			t.Fatalf("held %v, came %v", got, want)
		}
		q.setRST(&Segment{Flags: RST, Slot: Slot(slots + 1)})
		q.clear(ReasonVoid)
		freed := make(map[Slot]int)
		for _, e := range k.effects {
			freed[e.Slot]++
		}
		if len(freed) != slots+1 || len(k.effects) != slots+1 || k.stats.HeldPackets != 0 || k.stats.HeldBytes != 0 || q.holds != [slotClasses]int{} {
			t.Fatalf("%d effects on %d slots of %d, %+v", len(k.effects), len(freed), slots+1, k.stats)
		}
		for class, u := range k.slots {
			if u.held != 0 || u.holders != 0 {
				t.Fatalf("class %d: %+v", class, u)
			}
		}
	})
}

// R9: a SYN is announced ever more seldom, until S knows it; after a commit so many times.
func TestAnnouncements(t *testing.T) {
	var h handshake
	h.begin(&Segment{Seq: 1000, Flags: SYN}, 0)
	last, wait := int64(0), int64(announceFirst)
	for i := range 10 {
		if h.due-last != wait {
			t.Fatalf("announcement %d after %v, want %v", i, time.Duration(h.due-last), time.Duration(wait))
		}
		last, wait = h.due, min(2*wait, int64(announceMax))
		if !h.next(last) {
			t.Fatalf("announcement %d is not due", i)
		}
	}
	if h.announced(); h.due != 0 || h.next(last) {
		t.Error("it is announced although S knows it")
	}
	h.commit(false)
	h.announce(0, h.left)
	n := 0
	for ; h.next(h.due); n++ {
	}
	if n != announceAgain {
		t.Errorf("announced %d times after a commit", n)
	}
	if h.commit(true); h.announcing {
		t.Error("an established connection is announced")
	}
}

// R8: which records belong to a connection.
func TestIncarnation(t *testing.T) {
	named, inherited := Segment{Inc: 7}, Segment{Inc: 7, Inherited: true}
	for name, c := range map[string]struct {
		i                     incarnation
		named, inherits, more bool
	}{
		"unknown":             {incarnation{}, false, false, false},
		"opened":              {incarnation{isn: 7, named: true, settled: true}, true, false, true},
		"opened as another":   {incarnation{isn: 8, named: true, settled: true}, false, false, false},
		"since a commit":      {incarnation{isn: 7, named: true, settled: true, inherited: true}, false, true, true},
		"known from a commit": {incarnation{settled: true, inherited: true}, false, true, false},
	} {
		if n, i, m := c.i.names(&named), c.i.names(&inherited), c.i.namesAgain(&named); n != c.named || i != c.inherits || m != c.more {
			t.Errorf("%s: names %v, inherited %v, names again %v", name, n, i, m)
		}
	}
	var i incarnation
	for _, s := range []*Segment{&named, &inherited} {
		if i.take(s); !i.names(s) {
			t.Errorf("%+v does not name what was taken from %+v", i, s)
		}
	}
}

func TestClocks(t *testing.T) {
	var all [leads]int
	k := stallClock{all: &all, usual: &delays{timeout: 100}}
	if d := k.deadline(time.Second); d != math.MaxInt64 {
		t.Errorf("a clock that stands runs out at %d", d)
	}
	k.run(true, leadNone, 5)
	k.run(true, leadNone, 9)
	if d := k.deadline(10); d != 15 {
		t.Errorf("the clock runs out at %d", d)
	}
	k.run(false, leadNone, 20)
	k.run(true, leadNone, 30)
	if d := k.deadline(10); d != 40 {
		t.Errorf("begun again the clock runs out at %d", d)
	}

	if at := k.lookAt(); at != 30+100 {
		t.Errorf("where nothing is known it is looked at at %d", at)
	}
	k.moved(42) // after 12
	if at := k.lookAt(); at != 42+12+2*6 {
		t.Errorf("it is looked at at %d", at)
	}
	k.usual.timeout = 1000
	if at := k.lookAt(); at != 42+200 { // a part of the timeout
		t.Errorf("with a long timeout it is looked at at %d", at)
	}
	k.usual.timeout = 15
	if at := k.lookAt(); at != 42+15 {
		t.Errorf("with a short timeout it is looked at at %d", at)
	}
	other := stallClock{all: &all, usual: k.usual}
	other.run(true, leadSVM, 50)
	if k.look(leadPVM) || k.lookAt() != math.MaxInt64 {
		t.Error("the other guest leads nowhere for long")
	}
	if !other.look(leadSVM) {
		t.Error("each guest leads on one")
	}
	if k.run(true, leadNone, 60); other.look(leadSVM) {
		t.Error("the PVM does not lead any more")
	}
	k.look(leadPVM)
	other.stop()
	if k.stop(); all[leadPVM] != 0 || all[leadSVM] != 0 {
		t.Errorf("of clocks that stand: %v", all)
	}

	// However quick a service was, it may become slow.
	d := &delays{timeout: 1000}
	for range 100 {
		d.add(0)
	}
	for range 100 {
		d.add(400)
	}
	if d.mean < 300 || d.mean > 400 {
		t.Errorf("delays of 400 are %d on average", d.mean)
	}
	for d.add(5000); d.mean < 900; d.add(5000) {
		if d.unusual() > 1000 {
			t.Fatalf("%+v", d)
		}
	}

	var a askClock
	a.start(0, askAgain)
	a.start(1, askDelay)
	if want := 1 + int64(askDelay); a.at != want {
		t.Errorf("the first question at %d, want %d", a.at, want)
	}
	a.again(100)
	a.start(101, askDelay)
	if want := 100 + int64(askAgain); a.at != want || a.n != 1 {
		t.Errorf("question %d at %d, want %d", a.n, a.at, want)
	}
	if a.stop(); a != (askClock{}) {
		t.Errorf("stopped: %+v", a)
	}
}
