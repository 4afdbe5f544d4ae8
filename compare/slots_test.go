// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// crowd is connections whose PVM transmits more than the kernel has slots for, while nothing
// comes from S. Their TCP knows SACK, and a timer. The remote acknowledges at once.
type crowd struct {
	t      *rapid.T
	keys   *Keys
	p      *Primary
	now    int64
	conns  []*talker
	slots  map[Slot]*talker
	next   Slot
	most   int  // slots in use
	away   bool // S is
	ring   int  // of so many frames one finds no room in the ring, and P does not learn of it; 0: all do
	frames int
}

// talker transmits segments of segLen bytes. all[i]: what is known of segment i.
type talker struct {
	c      *crowd
	tuple  Tuple
	all    []segState
	sent   int // segments transmitted at least once
	una    int // the first that the remote has not got
	window int
	rto    int64 // when the timer runs out
	left   int   // segments that left
}

type segState struct{ sacked, lost bool }

const (
	segLen    = 100
	unheldRTO = 200 * time.Millisecond
)

func (k *talker) seq(i int) uint32 { return 1001 + uint32(i)*segLen }

// send has the PVM transmit segment i.
func (k *talker) send(i int) {
	c := k.c
	b := make([]byte, segLen)
	s := Segment{Tuple: k.tuple, Seq: k.seq(i), Len: segLen, Ack: 1, Win: 100, Flags: ACK, Slot: NoSlot, At: c.now, Sum: c.keys.Sum(k.seq(i), b)}
	k.all[i].lost = false
	if c.frames++; c.away && c.ring > 0 && c.frames%c.ring == 0 {
		return
	}
	if len(c.slots) < c.most {
		c.next++
		s.Slot, s.Payload = c.next, b
		c.slots[s.Slot] = k
	}
	c.step(Event{Kind: EvPVM, Seg: s})
}

// record: a digest record shows that the SVM has transmitted segments [i, j).
func (k *talker) record(i, j int) {
	for ; i < j; i++ {
		b := make([]byte, segLen)
		s := Segment{Tuple: k.tuple, Seq: k.seq(i), Len: segLen, Ack: 1, Win: 100, Flags: ACK, Slot: NoSlot, Inc: 1000, Sum: k.c.keys.Sum(k.seq(i), b)}
		k.c.step(Event{Kind: EvSVM, Seg: s})
	}
}

// goOn transmits what is lost, then what is new, within the window.
func (k *talker) goOn() {
	flying := 0
	for i := k.una; i < k.sent; i++ {
		if !k.all[i].sacked && !k.all[i].lost {
			flying++
		}
	}
	for i := k.una; i < k.sent && flying < k.window; i++ {
		if k.all[i].lost && !k.all[i].sacked {
			k.send(i)
			flying++
		}
	}
	for k.sent < len(k.all) && flying < k.window {
		k.sent++
		flying++
		k.send(k.sent - 1)
	}
}

func (c *crowd) step(ev Event) {
	for _, e := range c.p.Step(c.now, &ev, nil) {
		switch e.Op {
		case OpFree:
			c.free(e.Slot)
		case OpCheckpoint:
			c.t.Fatalf("a checkpoint is asked for: %v", e.Reason)
		case OpSACK:
			c.sacked(&e)
		case OpSend:
			if e.Slot == NoSlot {
				continue
			}
			k := c.slots[e.Slot]
			if e.Free {
				c.free(e.Slot)
			}
			if e.Flags&SYN == 0 && e.Seq+e.To-e.From == k.seq(k.left+1) {
				k.left++
			}
		}
	}
}

func (c *crowd) free(s Slot) {
	if c.slots[s] == nil {
		c.t.Fatalf("slot %d is freed, which is free", s)
	}
	delete(c.slots, s)
}

// sacked: P has SACK blocks for a connection.
func (c *crowd) sacked(e *Effect) {
	k := c.conns[e.Tuple.RemotePort]
	if e.Seq != k.seq(k.left) {
		c.t.Fatalf("SACK blocks behind %d, the remote has all below %d", e.Seq, k.seq(k.left))
	}
	blocks := sackBlocks(nil, e.Opts[:e.OptLen])
	if len(blocks) == 0 {
		c.t.Fatal("no SACK block")
	}
	newest := 0
	for _, b := range blocks {
		if !after(b.left, e.Seq) || !after(b.right, b.left) {
			c.t.Fatalf("SACK block %v behind %d", b, e.Seq)
		}
		for i := k.left; i < k.sent; i++ {
			if !before(k.seq(i), b.left) && !after(k.seq(i+1), b.right) {
				k.all[i].sacked = true
				newest = i
			}
		}
	}
	for i := k.una; i < newest; i++ {
		k.all[i].lost = true
	}
}

// run lets time pass until d, or until all has left.
func (c *crowd) run(d time.Duration) (timers int) {
	for end := c.now + int64(d); c.now < end; c.now += int64(time.Millisecond) {
		done := true
		for _, k := range c.conns {
			if k.left > k.una { // an ACK comes
				k.una = k.left
				k.window = min(2*k.window, 64)
				k.rto = c.now + int64(unheldRTO)
				if k.una < k.sent && k.all[k.una].sacked { // P gave it up: RFC 2018, 8
					for i := k.una; i < k.sent; i++ {
						k.all[i] = segState{lost: true}
					}
				}
			}
			if k.una < k.sent && c.now >= k.rto {
				timers++
				k.window, k.rto = 1, c.now+int64(unheldRTO)
				for i := k.una; i < k.sent; i++ {
					k.all[i].lost = true
				}
			}
			k.goOn()
			done = done && k.una == len(k.all)
		}
		if c.p.NextDeadline() <= c.now {
			c.step(Event{Kind: EvTick})
		}
		if done {
			break
		}
	}
	return timers
}

// recovers has connections overrun the slots while S is away, of which there are two each
// at least, and reports whether all of it leaves within two RTOs once S is back.
func recovers(t *rapid.T, mut mutation) (ok bool, state string) {
	c := &crowd{t: t, keys: testKeys(7), now: 1e9, slots: map[Slot]*talker{}}
	conns := rapid.IntRange(1, 5).Draw(t, "connections")
	c.ring = rapid.SampledFrom([]int{0, 7, 13}).Draw(t, "ring")
	c.most = rapid.IntRange(2*conns+2, 40).Draw(t, "slots")
	c.p = NewPrimary(Config{Timeout: time.Hour, Slots: c.most}, c.keys)
	c.p.mutate(mut)
	for i := range conns {
		k := &talker{c: c, tuple: Tuple{GuestPort: 80, RemotePort: uint16(i), Proto: 6}, window: rapid.IntRange(1, 30).Draw(t, "window"), rto: 1 << 62}
		k.all = make([]segState, rapid.IntRange(40, 100).Draw(t, "segments"))
		c.conns = append(c.conns, k)
		for _, kind := range []EventKind{EvPVM, EvSVM} {
			s := Segment{Tuple: k.tuple, Seq: 1000, Ack: 1, Win: 100, Flags: SYN | ACK, Slot: NoSlot, Inc: 1000, At: c.now}
			if kind == EvPVM {
				c.next++
				s.Slot, s.Payload = c.next, []byte{}
				c.slots[s.Slot] = k
			}
			c.step(Event{Kind: kind, Seg: s})
		}
	}
	c.away = true
	c.run(time.Duration(rapid.IntRange(1, 2000).Draw(t, "outage, ms")) * time.Millisecond)
	c.away = false
	for _, k := range c.conns {
		k.record(0, len(k.all))
		k.rto = c.now + int64(unheldRTO) // it has backed off no longer than that
	}
	c.run(2 * unheldRTO)
	for _, k := range c.conns {
		if k.una < len(k.all) {
			return false, "segments left over"
		}
	}
	if n := c.p.Stats().HeldPackets; n != 0 || len(c.slots) != 0 || slices.ContainsFunc(c.p.slots[:], func(u slotUse) bool { return u.held != 0 || u.holders != 0 }) {
		t.Fatalf("left over: %d packets, %d slots, %+v", n, len(c.slots), c.p.slots)
	}
	return true, ""
}

// TestRecovery: what found no slot is repeated as soon as the SVM has transmitted it, however few
// slots there are, and no connection starves another one; without room kept free, or
// without SACK, it is not.
func TestRecovery(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		if ok, state := recovers(t, 0); !ok {
			t.Fatal(state)
		}
	})
	for name, mut := range map[string]mutation{"no room": mutRoom, "no SACK": mutR6} {
		t.Run(name, func(t *testing.T) {
			found := false
			rapid.Check(t, func(t *rapid.T) {
				ok, _ := recovers(t, mut)
				found = found || !ok
			})
			if !found {
				t.Error("all leaves although the rule is turned off")
			}
		})
	}
}
