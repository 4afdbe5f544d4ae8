// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// Durations in ns.
const (
	us = int64(time.Microsecond)
	ms = int64(time.Millisecond)
	s  = int64(time.Second)
)

// world is one run.
type world struct {
	sc       *Scenario
	now      int64 // ns since the beginning
	stood    int64 // for so long the guest that serves has stood still
	queue    queue
	made     uint64 // events so far
	attempts int    // checkpoints of COLO's so far
	steps    int
	begin    func(*Action)
	crossed  int // frames between guest and clients so far

	hosts   [2]*host
	arbiter *arbiter
	client  *client
	talks   map[flow]*talk
	port    int // the switch's idea of where the guest is
	cut     struct{ peer, control, qemu int }
	armed   []armed

	check     check
	qemus     int            // started so far
	booted    bool           // a guest was, once
	forced    bool           // an operator had an uncovered secondary take over
	fatal     int            // actions so far that may each cost a host
	kills     int            // actions that kill a guest, so far
	saved     bool           // the pair was covered at the first
	off       bool           // the guest powered off
	apart     bool           // the hosts may have lost each other, and both live
	edited    bool           // an operator has changed the arbiter's entry
	excused   bool           // connections may be stuck: see kill-daemon
	guestLost bool           // and another one was booted: its connections end
	mutation  string         // a rule that is switched off
	reached   map[string]int // states and events, for coverage
	fault     *Fault         // the first thing that was wrong
	logging   bool
	lines     []string // of the log, newest last
	streams   [16]*rand.Rand
}

// armed is an action that waits for something to be reached.
type armed struct {
	on    string
	after int64
	do    func()
}

// The streams of random numbers. Each thing has its own, so that leaving one out of a scenario
// changes the others little.
const (
	rndNet = iota
	rndPeer
	rndGuest // and one more for the other host
	_
	rndQEMU
	_
	rndDaemon
	_
	rndArbiter
	rndControl
	rndClient
	rndDisk
	rndKeys
)

func newWorld(sc *Scenario) *world {
	w := &world{sc: sc, reached: make(map[string]int), talks: make(map[flow]*talk)}
	for i := range w.streams {
		w.streams[i] = rand.New(rand.NewPCG(sc.Seed, uint64(i)))
	}
	return w
}

func (w *world) rnd(stream int) *rand.Rand { return w.streams[stream] }

// between draws a duration of [lo, hi).
func (w *world) between(stream int, lo, hi int64) int64 {
	return lo + w.rnd(stream).Int64N(hi-lo)
}

// chance is true in n of 1000.
func (w *world) chance(stream, n int) bool { return n > 0 && w.rnd(stream).IntN(1000) < n }

// after has do be done when d has passed.
func (w *world) after(d int64, do func()) { w.push(d, do, nil) }

func (w *world) push(d int64, do func(), a *alarm) {
	w.made++
	w.queue.push(event{w.now + max(d, 0), w.made, do, a})
}

// set has the alarm go off when d has passed, and not when it was set for before.
func (w *world) set(a *alarm, d int64) {
	w.unset(a)
	w.push(d, a.do, a)
}

func (w *world) unset(a *alarm) {
	if a.set {
		w.queue.remove(a.place)
	}
}

// run lets time pass up to until, or to the first fault.
func (w *world) run(until int64) {
	for w.fault == nil && len(w.queue) > 0 && w.queue[0].at <= until {
		e := w.queue.remove(0)
		w.now = e.at
		e.do()
		if w.steps++; w.steps > maxSteps {
			w.failf("steps", "the run does not end: %d events by %v", w.steps, time.Duration(w.now))
		}
	}
	if w.fault == nil {
		w.now = max(w.now, until)
	}
}

// maxSteps bounds a run.
const maxSteps = 5_000_000

// Fault is what a run found to be wrong.
type Fault struct {
	Kind string // the same for the same kind of fault
	What string
	At   time.Duration
	Log  []string // what led to it, when the run kept a log
}

func (f *Fault) Error() string { return fmt.Sprintf("%s at %v: %s", f.Kind, f.At, f.What) }

func (w *world) failf(kind, format string, args ...any) {
	if w.fault == nil && !w.excuses(kind) {
		w.fault = &Fault{Kind: kind, What: fmt.Sprintf(format, args...), At: time.Duration(w.now), Log: slices.Clone(w.lines)}
	}
}

// maxLines bounds the log.
const maxLines = 4000

func (w *world) logf(format string, args ...any) {
	if !w.logging {
		return
	}
	if len(w.lines) == maxLines {
		w.lines = slices.Delete(w.lines, 0, maxLines/4)
	}
	w.lines = append(w.lines, fmt.Sprintf("%12.6f ", float64(w.now)/1e9)+fmt.Sprintf(format, args...))
}

// reach notes for coverage that something has happened, and does what waits for that.
func (w *world) reach(what string) {
	w.reached[what]++
	w.armed = slices.DeleteFunc(w.armed, func(a armed) bool {
		if a.on != what {
			return false
		}
		w.after(a.after, a.do)
		return true
	})
}
