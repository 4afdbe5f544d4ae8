// SPDX-License-Identifier: Apache-2.0

package failover

import (
	"slices"
	"testing"
	"time"
)

// An SVM that has lost the PVM's QEMU gives up only when P has shown since that it lives. If
// P's daemon hangs and its QEMU is dead, the link is whole and silent, and this is the last guest.
func TestUseless(t *testing.T) {
	const ms = int64(time.Millisecond)
	run := func(living bool, mutate func(*Config)) (ops []Op) {
		cfg := DefaultConfig(500*time.Millisecond, 400*time.Millisecond, 3*time.Second)
		mutate(&cfg)
		l := NewSecondary(cfg, 7, true, 0)
		step := func(at int64, ev Event) {
			for _, e := range l.Step(at, ev) {
				ops = append(ops, e.Op)
			}
		}
		step(1*ms, Event{Kind: EvLinkUp, Term: 7})
		step(100*ms, Event{Kind: EvCOLOExit})
		step(110*ms, Event{Kind: EvReceived})
		if living {
			for at := 160 * ms; at < 1200*ms; at += 50 * ms {
				step(at, Event{Kind: EvReceived})
			}
		} else {
			step(1101*ms, Event{Kind: EvTick})
			step(1111*ms, Event{Kind: EvLinkDown})
			step(1700*ms, Event{Kind: EvTick})
		}
		return ops
	}
	none := func(*Config) {}
	if ops := run(true, none); !slices.Contains(ops, OpFenced) || slices.Contains(ops, OpClaim) {
		t.Errorf("P lives: %v", ops)
	}
	if ops := run(false, none); slices.Contains(ops, OpFenced) || !slices.Contains(ops, OpClaim) {
		t.Errorf("P hangs: %v", ops)
	}
	if ops := run(false, func(c *Config) { c.noLiving = true }); !slices.Contains(ops, OpFenced) {
		t.Errorf("the mutation goes unnoticed: %v", ops)
	}
}

// A daemon that was stopped reads what P sent before: that does not show that P lives still.
func TestUselessStopped(t *testing.T) {
	const ms = int64(time.Millisecond)
	const exited = 100
	for from := int64(90); from < 700; from += 10 { // S's daemon is stopped
		for length := int64(10); length < 2000; length += 70 {
			for died := int64(exited); died < exited+500; died += 25 { // and P has found out about its QEMU
				l := NewSecondary(DefaultConfig(500*time.Millisecond, 400*time.Millisecond, 3*time.Second), 7, true, 0)
				l.Step(1*ms, Event{Kind: EvLinkUp, Term: 7})
				read := func(sent int64, kind Kind) {
					at := sent + 1
					if at > from && at < from+length {
						at = from + length
					}
					for _, e := range l.Step(at*ms, Event{Kind: kind, OK: true}) {
						if e.Op == OpFenced {
							t.Fatalf("stopped from %d ms on for %d, P's QEMU dead at %d: given up at %d, because %s", from, length, died, at, l.Why())
						}
					}
				}
				for at := int64(50); at < died; at += 50 {
					read(at, EvReceived)
					if at == exited {
						read(at, EvCOLOExit)
					}
				}
				if died == exited {
					read(exited, EvCOLOExit)
				}
				read(died, EvReceived)
				if read(died, EvPeerDead); l.State() != SecondaryClaim {
					t.Fatalf("stopped from %d ms on for %d, P's QEMU dead at %d: state %d", from, length, died, l.State())
				}
			}
		}
	}
}

// A P whose guest is gone, and which does not know that S has the last one, gives S up when it
// cannot replicate to it. S has asked the arbiter by then, and that decides.
func TestDismissedClaim(t *testing.T) {
	run := func(mutate func(*Config)) (ops []Op, state SecondaryState) {
		cfg := DefaultConfig(500*time.Millisecond, 400*time.Millisecond, 3*time.Second)
		mutate(&cfg)
		l := NewSecondary(cfg, 7, true, 0)
		for i, ev := range []Event{{Kind: EvLinkUp, Term: 7}, {Kind: EvPeerDead, OK: true}, {Kind: EvDismissed}, {Kind: EvClaimed, OK: true, Term: 8}} {
			for _, e := range l.Step(int64(i)*int64(time.Millisecond), ev) {
				ops = append(ops, e.Op)
			}
		}
		return ops, l.State()
	}
	if ops, state := run(func(*Config) {}); slices.Contains(ops, OpFenced) || state < SecondaryLease || state > SecondarySolo {
		t.Errorf("%v, state %d", ops, state)
	}
	if ops, _ := run(func(c *Config) { c.noClaimCounts = true }); !slices.Contains(ops, OpFenced) {
		t.Errorf("the mutation goes unnoticed: %v", ops)
	}
}

// A secondary that has asked the arbiter may be the only guest that is left: it is given up when its QEMU has ended, and
// not because that hangs.
func TestHangingWinner(t *testing.T) {
	begin := []Event{{Kind: EvLinkUp, Term: 7}, {Kind: EvPeerDead, OK: true}, {Kind: EvClaimed, OK: true, Term: 8}}
	for n := 1; n <= len(begin); n++ {
		for _, hangs := range []bool{false, true} {
			l := NewSecondary(DefaultConfig(500*time.Millisecond, 400*time.Millisecond, 3*time.Second), 7, true, 0)
			for i, ev := range append(slices.Clone(begin[:n]), Event{Kind: EvQEMUDead, OK: hangs}) {
				l.Step(int64(i)*int64(time.Millisecond), ev)
			}
			if fenced, want := l.State() == SecondaryFenced, n == 1 || !hangs; fenced != want {
				t.Errorf("behind %d events, with a QEMU that hangs %v: fenced %v", n, hangs, fenced)
			}
		}
	}
}

// A secondary whose guest cannot go on does not take over from a primary of which only the daemon is gone. It does
// when its guest goes on, or when the primary's QEMU, or its host, is gone too.
func TestSickSecondaryWaits(t *testing.T) {
	const ms = int64(time.Millisecond)
	for name, c := range map[string]struct {
		lost Event
		then Kind
		want SecondaryState
	}{
		"its daemon is gone":     {Event{Kind: EvLinkDown, OK: true}, EvTick, SecondaryPair},
		"the guest is well":      {Event{Kind: EvLinkDown, OK: true}, EvGuestHealthy, SecondaryClaim},
		"its QEMU is gone, too":  {Event{Kind: EvLinkDown, OK: true}, EvCOLOExit, SecondaryClaim},
		"nothing of it is heard": {Event{Kind: EvLinkDown}, EvTick, SecondaryClaim},
	} {
		l := NewSecondary(DefaultConfig(500*time.Millisecond, 400*time.Millisecond, 3*time.Second), 7, true, 0)
		l.Step(1*ms, Event{Kind: EvLinkUp, Term: 7})
		l.Step(10*ms, c.lost)
		l.Step(20*ms, Event{Kind: EvGuestFailed})
		if l.Step(4000*ms, Event{Kind: c.then}); l.State() != c.want {
			t.Errorf("%s: state %d, want %d", name, l.State(), c.want)
		}
	}
}

// A P whose guest cannot go on has told S so. Started again, it finds S asking the arbiter still, and does not compete with it.
func TestSickPrimaryAgain(t *testing.T) {
	const ms = int64(time.Millisecond)
	for name, c := range map[string]struct {
		covered bool
		want    PrimaryState
	}{"S may take over": {true, PrimaryFenced}, "nothing covers S": {false, PrimaryClaim}} {
		l := NewPrimary(DefaultConfig(500*time.Millisecond, 400*time.Millisecond, 3*time.Second), 7, PrimaryStart, c.covered, 0)
		l.Step(1*ms, Event{Kind: EvGuestFailed})
		l.Step(2*ms, Event{Kind: EvLinkUp, OK: true})
		if l.Step(600*ms, Event{Kind: EvTick}); l.State() != c.want { // S's kernel, mute, has echoed nothing
			t.Errorf("%s: state %d, want %d", name, l.State(), c.want)
		}
	}
}

// A QEMU that stands still may have a checkpoint that it has not loaded yet. It is ordered to take
// over once it answers and has had time to show that, or when it has not answered for long.
func TestSlowLoad(t *testing.T) {
	const ms = int64(time.Millisecond)
	ordered := func(evs map[int64]Event) int64 {
		l := NewSecondary(DefaultConfig(500*time.Millisecond, 400*time.Millisecond, 3*time.Second), 7, true, 0)
		l.Step(0, Event{Kind: EvLinkUp, Term: 7})
		l.Step(1*ms, Event{Kind: EvPeerDead, OK: true})
		l.Step(2*ms, Event{Kind: EvClaimed, OK: true, Term: 8})
		for at := 3 * ms; at < 10000*ms; at += ms {
			ev, ok := evs[at/ms]
			if !ok {
				ev = Event{Kind: EvTick}
			}
			for _, e := range l.Step(at, ev) {
				if e.Op == OpQEMU {
					return at / ms
				}
			}
		}
		return 0
	}
	for _, c := range []struct {
		name string
		evs  map[int64]Event
		want int64
	}{
		{"loaded", map[int64]Event{900: {Kind: EvStands}, 930: {Kind: EvRuns}}, 930},
		{"nothing to load", map[int64]Event{900: {Kind: EvStands}}, 950},
		{"no answer", nil, 5002},
	} {
		if got := ordered(c.evs); got != c.want {
			t.Errorf("%s: QEMU is ordered to take over after %d ms, want %d", c.name, got, c.want)
		}
	}
}

// A P that does without this SVM, and has not said that its gate is shut, transmits until its lease ends.
func TestPeerDeadUnsaid(t *testing.T) {
	const ms = int64(time.Millisecond)
	for _, said := range []bool{false, true} {
		l := NewSecondary(DefaultConfig(500*time.Millisecond, 400*time.Millisecond, 3*time.Second), 7, true, 0)
		l.Step(0, Event{Kind: EvLinkUp, Term: 7})
		l.Step(10*ms, Event{Kind: EvPeerDead, OK: said, Echoed: 9 * ms})
		l.Step(12*ms, Event{Kind: EvRuns})
		l.Step(14*ms, Event{Kind: EvClaimed, OK: true, Term: 8})
		if state, end := l.State(), l.NextDeadline(); said != (state == SecondaryQEMU) || !said && (state != SecondaryLease || end != (9+404)*ms) {
			t.Errorf("said: %t, and the state is %d until %d", said, state, end)
		}
	}
}
