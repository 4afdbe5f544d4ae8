// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"cmp"
	"math"
	"slices"
	"time"
)

// Datagrams have no positions that would order them, and each guest may transmit them
// in another order. So per flow the two sides are compared as multisets: a held
// datagram leaves when the SVM has transmitted an equal one, in the order of the PVM's.

// dgramKey is what makes datagrams of one flow equal. The IP ID is each guest's
// own.
type dgramKey struct {
	seq, n uint32
	frag   uint16
	sum    Sum
}

func (s *Segment) key() dgramKey { return dgramKey{s.Seq, s.Len, s.Frag, s.Sum} }

// dgram is a held datagram of the PVM.
type dgram struct {
	key       dgramKey
	slot      Slot
	confirmed bool // the SVM transmitted it too
	at        int64
	since     int64  // when its time began to run
	no        uint64 // of the event: the order of capture
}

// svmDgram is a datagram of the SVM that the PVM has not transmitted.
type svmDgram struct {
	key   dgramKey
	since int64
}

// dgramFlow is a flow of which one side has transmitted more. It goes when both are even.
// No datagram of svm equals one of held that is not confirmed.
type dgramFlow struct {
	timer
	tuple   Tuple
	no      uint64 // of the event that made it
	born    int64
	held    deque[dgram]
	svm     deque[svmDgram]
	query   backoff // R6
	askedAt int64   // when a checkpoint was asked for; 0: it was not
}

// confirm strikes k off what the SVM alone transmitted, and reports whether it was there.
func (f *dgramFlow) confirm(k *dgramKey) bool {
	for i := range f.svm.view() {
		if f.svm.view()[i].key == *k {
			if i == 0 {
				f.svm.drop(1)
			} else {
				f.svm.remove(i, i+1)
			}
			return true
		}
	}
	return false
}

// confirmHeld marks the first datagram held that is like k and not confirmed, and reports
// whether there is one.
func (f *dgramFlow) confirmHeld(k *dgramKey) bool {
	for i := range f.held.view() {
		if g := &f.held.view()[i]; !g.confirmed && g.key == *k {
			g.confirmed = true
			return true
		}
	}
	return false
}

// datagrams compares what is not TCP. It keeps count of what all flows hold.
type datagrams struct {
	*core
	flows map[Tuple]*dgramFlow
	spare []*dgramFlow
	held  int // datagrams, of all flows
	svm   int // datagrams that the SVM alone transmitted, of all flows
}

func (d *datagrams) create(t *Tuple) *dgramFlow {
	var f *dgramFlow
	if n := len(d.spare); n > 0 {
		f = d.spare[n-1]
		d.spare = d.spare[:n-1]
	} else {
		f = new(dgramFlow)
	}
	*f = dgramFlow{tuple: *t, no: d.eventNo, born: d.now, held: f.held, svm: f.svm}
	f.timer.flow = f
	d.flows[*t] = f
	d.timers.add(&f.timer)
	return f
}

// remove ends f, which holds nothing any more.
func (d *datagrams) remove(f *dgramFlow) {
	d.forget(f)
	f.held.reset()
	d.timers.remove(&f.timer)
	delete(d.flows, f.tuple)
	d.even(&f.tuple)
	if len(d.spare) < maxSpare {
		d.spare = append(d.spare, f)
	}
}

// even has the caller know that nothing waits of flow t.
func (d *datagrams) even(t *Tuple) {
	if d.cfg.FastPath {
		d.emit(OpEven, t)
	}
}

// forget drops what the SVM alone transmitted.
func (d *datagrams) forget(f *dgramFlow) {
	d.svm -= f.svm.len()
	f.svm.reset()
}

// all gives the flows in the order they were made.
func (d *datagrams) all() []*dgramFlow {
	fs := make([]*dgramFlow, 0, len(d.flows))
	for _, f := range d.flows {
		fs = append(fs, f)
	}
	slices.SortFunc(fs, func(a, b *dgramFlow) int { return cmp.Compare(a.no, b.no) })
	return fs
}

// fromPVM takes in a datagram that the PVM transmitted. Over a bound it is dropped,
// as on any link.
func (d *datagrams) fromPVM(s *Segment) {
	g := dgram{key: s.key(), slot: s.Slot, at: s.At, since: d.now, no: d.eventNo}
	if g.slot == NoSlot {
		d.drop(NoSlot, ReasonMalformed)
		return
	}
	if d.solo {
		d.forward(&s.Tuple, &g)
		return
	}
	f := d.flows[s.Tuple]
	if f != nil && f.confirm(&g.key) {
		d.svm--
		g.confirmed = true
	}
	g.confirmed = g.confirmed || d.off(mutDatagram)
	switch {
	case g.confirmed && !d.frozen && (f == nil || f.held.len() == 0):
		d.forward(&s.Tuple, &g)
	case d.held >= d.cfg.MaxDatagrams || f == nil && len(d.flows) >= d.cfg.MaxFlows ||
		f != nil && f.held.len() >= d.cfg.FlowDatagrams:
		d.drop(g.slot, ReasonCrowded)
		if f == nil {
			d.even(&s.Tuple)
		}
	default:
		if f == nil {
			f = d.create(&s.Tuple)
		}
		f.held.insert(f.held.len(), g)
		d.count(&g, 1)
	}
	if f != nil {
		d.pump(f)
	}
}

// fromSVM takes in the record of a datagram that the SVM transmitted.
func (d *datagrams) fromSVM(s *Segment) {
	k := s.key()
	f := d.flows[s.Tuple]
	if f != nil && f.confirmHeld(&k) {
		d.pump(f)
		return
	}
	if d.svm >= d.cfg.MaxUnmatched || f == nil && len(d.flows) >= d.cfg.MaxFlows || f != nil && f.svm.len() >= d.cfg.FlowDatagrams {
		d.stats.Drops[ReasonCrowded]++
		if f == nil {
			d.even(&s.Tuple)
		}
		return
	}
	if f == nil {
		f = d.create(&s.Tuple)
	}
	f.svm.insert(f.svm.len(), svmDgram{k, d.now})
	d.svm++
	d.wait(f)
}

// forward sends a datagram.
func (d *datagrams) forward(t *Tuple, g *dgram) {
	e := d.emit(OpForward, t)
	e.Slot, e.Free = g.slot, true
	d.stats.ReleasedDatagrams++
	d.heldSince(g.at)
	d.stats.ReleasedBytes += uint64(g.key.n)
}

// count keeps the counters of what is held: by n, 1 or -1, of g.
func (d *datagrams) count(g *dgram, n int) {
	d.held += n
	d.stats.HeldPackets += n
	d.stats.HeldBytes += n * int(g.key.n)
}

// take empties f of what it holds, and gives that.
func (d *datagrams) take(f *dgramFlow) []dgram {
	out := slices.Clone(f.held.view())
	for i := range out {
		d.count(&out[i], -1)
	}
	f.held.reset()
	return out
}

// pump does all that f's state allows. f may be gone afterwards.
func (d *datagrams) pump(f *dgramFlow) {
	d.release(f)
	d.wait(f)
}

// release sends what both transmitted, up to the first that the SVM has not. An ICMP
// error that it does not transmit blocks the flow for no longer than Timeout: each guest
// limits the rate of those on its own.
func (d *datagrams) release(f *dgramFlow) {
	for !d.frozen && f.held.len() > 0 {
		switch g := &f.held.view()[0]; {
		case g.confirmed:
			d.forward(&f.tuple, g)
			d.count(g, -1)
		case f.tuple.icmpError() && g.since+int64(d.cfg.Timeout) <= d.now:
			d.count(g, -1)
			d.drop(g.slot, ReasonICMPError)
		default:
			return
		}
		f.held.drop(1)
		f.query = backoff{}
	}
}

// icmpError reports whether t is of ICMP's error messages. A fragment's type is not
// known and 0.
func (t *Tuple) icmpError() bool {
	switch t.Proto {
	case protoICMP:
		switch t.GuestPort {
		case 3, 4, 5, 11, 12: // unreachable, quench, redirect, time exceeded, parameter problem
			return true
		}
	case protoICMPv6:
		return t.GuestPort > 0 && t.GuestPort < 128 // RFC 4443, 2.1
	}
	return false
}

const (
	protoICMP   = 1
	protoICMPv6 = 58
)

// wait ends f when nothing is left of it, else makes sure that its timers are
// looked at in time.
func (d *datagrams) wait(f *dgramFlow) {
	if f.held.len() == 0 && f.svm.len() == 0 {
		d.remove(f)
		return
	}
	if f.held.len() > 0 {
		f.query.run(d.now)
	}
	if at := d.deadline(f); at <= d.now {
		d.fire(f)
	} else if at < f.due {
		d.timers.set(&f.timer, at)
	}
}

// deadline is f's earliest timer.
func (d *datagrams) deadline(f *dgramFlow) int64 {
	at := int64(math.MaxInt64)
	if d.frozen {
		return at
	}
	if f.held.len() > 0 {
		at = max(f.held.view()[0].since, f.askedAt) + int64(d.cfg.Timeout)
		if f.query.at != 0 {
			at = min(at, f.query.at)
		}
	}
	if f.svm.len() > 0 {
		at = min(at, f.svm.view()[0].since+int64(d.cfg.Timeout))
	}
	return at
}

// fire runs f's timers that are due.
func (d *datagrams) fire(f *dgramFlow) {
	if !d.frozen {
		for f.svm.len() > 0 && f.svm.view()[0].since+int64(d.cfg.Timeout) <= d.now {
			f.svm.drop(1)
			d.svm--
			d.stats.Drops[ReasonUnmatched]++
		}
		d.release(f)
		// What is held stays for the commit, unless the SVM transmits it after all.
		if f.held.len() > 0 && max(f.held.view()[0].since, f.askedAt)+int64(d.cfg.Timeout) <= d.now {
			f.askedAt = d.now
			d.checkpoint(&f.tuple, ReasonDatagram, "")
		}
		switch {
		case f.held.len() > 0:
			f.query.run(d.now)
			if f.query.due(d.now) {
				d.query()
			}
		case f.svm.len() == 0:
			d.remove(f)
			return
		}
	}
	d.timers.set(&f.timer, d.deadline(f))
}

// commit appends to out what leaves at a commit. What was captured behind the
// commit point starts afresh, with the SVM of the new epoch.
func (d *datagrams) commit(f *dgramFlow, at int64, out []leaving) []leaving {
	for _, g := range d.take(f) {
		switch {
		case d.before(g.at, at):
			out = append(out, leaving{no: g.no, f: f, dgram: g})
		default:
			g.confirmed = false
			f.held.insert(f.held.len(), g)
			d.count(&g, 1)
		}
	}
	d.forget(f)
	f.askedAt, f.query = 0, backoff{}
	return out
}

// restart sets f going again after a freeze.
func (d *datagrams) restart(f *dgramFlow) {
	for i := range f.held.view() {
		f.held.view()[i].since = d.now
	}
	for i := range f.svm.view() {
		f.svm.view()[i].since = d.now
	}
	d.pump(f)
}

func (f *dgramFlow) describe(now int64) Flow {
	d := Flow{Tuple: f.tuple, State: stateDatagram, no: f.no, Held: f.held.len(), Age: time.Duration(now - f.born)}
	for i := range f.held.view() {
		d.HeldBytes += int(f.held.view()[i].key.n)
	}
	if f.askedAt != 0 && f.held.len() > 0 && f.held.view()[0].since <= f.askedAt {
		d.Diverged, d.Why = true, ReasonDatagram
	}
	return d
}
