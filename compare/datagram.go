// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"cmp"
	"math"
	"slices"
	"time"
)

// Datagrams have no positions that would order them, and each guest may say them
// in another order. So per flow the two sides are compared as multisets: a held
// datagram leaves when the SVM has said an equal one, in the order of the PVM's.

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
	key   dgramKey
	slot  Slot
	said  bool // by the SVM too
	at    int64
	since int64  // when its time began to run
	no    uint64 // of the event: the order of capture
}

// saidDgram is a datagram of the SVM that the PVM has not said.
type saidDgram struct {
	key   dgramKey
	since int64
}

// dgramFlow is a flow that one side has said more of. It goes when both are even.
type dgramFlow struct {
	timer
	tuple   Tuple
	no      uint64 // of the event that made it
	born    int64
	held    deque[dgram]
	said    deque[saidDgram]
	query   backoff // R6
	askedAt int64   // when a checkpoint was asked for; 0: it was not
}

func (p *Primary) createFlow(t *Tuple) *dgramFlow {
	var f *dgramFlow
	if n := len(p.spareFlows); n > 0 {
		f = p.spareFlows[n-1]
		p.spareFlows = p.spareFlows[:n-1]
	} else {
		f = new(dgramFlow)
	}
	*f = dgramFlow{tuple: *t, no: p.eventNo, born: p.now, held: f.held, said: f.said}
	f.timer.flow = f
	p.flows[*t] = f
	p.timers.push(&f.timer)
	return f
}

// removeFlow ends f, which holds nothing any more.
func (p *Primary) removeFlow(f *dgramFlow) {
	p.forgetSaid(f)
	f.held.reset()
	p.timers.remove(&f.timer)
	delete(p.flows, f.tuple)
	if len(p.spareFlows) < maxSpare {
		p.spareFlows = append(p.spareFlows, f)
	}
}

func (p *Primary) forgetSaid(f *dgramFlow) {
	p.said -= f.said.len()
	f.said.reset()
}

// allFlows gives the flows in the order they were made.
func (p *Primary) allFlows() []*dgramFlow {
	fs := make([]*dgramFlow, 0, len(p.flows))
	for _, f := range p.flows {
		fs = append(fs, f)
	}
	slices.SortFunc(fs, func(a, b *dgramFlow) int { return cmp.Compare(a.no, b.no) })
	return fs
}

// pvmDatagram takes in a datagram that the PVM said. Over a bound it is dropped,
// as on any link.
func (p *Primary) pvmDatagram(s *Segment) {
	g := dgram{key: s.key(), slot: s.Slot, at: s.At, since: p.now, no: p.eventNo}
	if g.slot == NoSlot {
		p.drop(NoSlot, ReasonMalformed)
		return
	}
	if p.solo {
		p.passDatagram(&s.Tuple, &g)
		return
	}
	f := p.flows[s.Tuple]
	g.said = f != nil && p.takeSaid(f, &g.key) || p.off(mutDatagram)
	switch {
	case g.said && !p.frozen && (f == nil || f.held.len() == 0):
		p.passDatagram(&s.Tuple, &g)
	case p.dgrams >= p.cfg.MaxDatagrams || f == nil && len(p.flows) >= p.cfg.MaxFlows ||
		f != nil && f.held.len() >= p.cfg.FlowDatagrams:
		p.drop(g.slot, ReasonCrowded)
	default:
		if f == nil {
			f = p.createFlow(&s.Tuple)
		}
		f.held.insert(f.held.len(), g)
		p.dgrams++
		p.stats.HeldPackets++
		p.stats.HeldBytes += int(g.key.n)
	}
	if f != nil {
		p.pumpFlow(f)
	}
}

// svmDatagram takes in the record of a datagram that the SVM said.
func (p *Primary) svmDatagram(s *Segment) {
	k := s.key()
	f := p.flows[s.Tuple]
	if f != nil {
		for i := range f.held.view() {
			if g := &f.held.view()[i]; !g.said && g.key == k {
				g.said = true
				p.pumpFlow(f)
				return
			}
		}
	}
	if p.said >= p.cfg.MaxSaid || f == nil && len(p.flows) >= p.cfg.MaxFlows || f != nil && f.said.len() >= p.cfg.FlowDatagrams {
		p.stats.Drops[ReasonCrowded]++
		return
	}
	if f == nil {
		f = p.createFlow(&s.Tuple)
	}
	f.said.insert(f.said.len(), saidDgram{k, p.now})
	p.said++
	p.waitFlow(f)
}

// takeSaid reports whether the SVM has said k once more than the PVM, and strikes it
// off.
func (p *Primary) takeSaid(f *dgramFlow, k *dgramKey) bool {
	for i, r := range f.said.view() {
		if r.key == *k {
			if i == 0 {
				f.said.drop(1)
			} else {
				f.said.remove(i, i+1)
			}
			p.said--
			return true
		}
	}
	return false
}

// passDatagram sends a datagram.
func (p *Primary) passDatagram(t *Tuple, g *dgram) {
	e := p.emit(OpForward, t)
	e.Slot, e.Free = g.slot, true
	p.stats.ReleasedDatagrams++
	p.stats.ReleasedBytes += uint64(g.key.n)
}

// forward sends a held datagram.
func (p *Primary) forward(f *dgramFlow, g *dgram) {
	p.passDatagram(&f.tuple, g)
	p.unheldDatagram(g)
}

func (p *Primary) unheldDatagram(g *dgram) {
	p.dgrams--
	p.stats.HeldPackets--
	p.stats.HeldBytes -= int(g.key.n)
}

// pumpFlow does all that f's state allows. f may be gone afterwards.
func (p *Primary) pumpFlow(f *dgramFlow) {
	p.releaseFlow(f)
	p.waitFlow(f)
}

// releaseFlow sends what both said, up to the first that the SVM has not. An ICMP
// error that it does not say stands in nobody's way for longer than Timeout: guests
// limit the rate of those, each for itself.
func (p *Primary) releaseFlow(f *dgramFlow) {
	for !p.frozen && f.held.len() > 0 {
		switch g := &f.held.view()[0]; {
		case g.said:
			p.forward(f, g)
		case f.tuple.icmpError() && g.since+int64(p.cfg.Timeout) <= p.now:
			p.unheldDatagram(g)
			p.drop(g.slot, ReasonICMPError)
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

// waitFlow ends f when nothing is left of it, else makes sure that its timers are
// looked at in time.
func (p *Primary) waitFlow(f *dgramFlow) {
	if f.held.len() == 0 && f.said.len() == 0 {
		p.removeFlow(f)
		return
	}
	if f.held.len() > 0 {
		f.query.run(p.now)
	}
	if d := p.flowDeadline(f); d <= p.now {
		p.fireFlow(f)
	} else if d < f.due {
		p.timers.set(&f.timer, d)
	}
}

// flowDeadline is f's earliest timer.
func (p *Primary) flowDeadline(f *dgramFlow) int64 {
	d := int64(math.MaxInt64)
	if p.frozen {
		return d
	}
	if f.held.len() > 0 {
		d = max(f.held.view()[0].since, f.askedAt) + int64(p.cfg.Timeout)
		if f.query.at != 0 {
			d = min(d, f.query.at)
		}
	}
	if f.said.len() > 0 {
		d = min(d, f.said.view()[0].since+int64(p.cfg.Timeout))
	}
	return d
}

// fireFlow runs f's timers that are due.
func (p *Primary) fireFlow(f *dgramFlow) {
	if !p.frozen {
		for f.said.len() > 0 && f.said.view()[0].since+int64(p.cfg.Timeout) <= p.now {
			f.said.drop(1)
			p.said--
			p.stats.Drops[ReasonUnmatched]++
		}
		p.releaseFlow(f)
		// What is held stays for the commit, unless the SVM says it after all.
		if f.held.len() > 0 && max(f.held.view()[0].since, f.askedAt)+int64(p.cfg.Timeout) <= p.now {
			f.askedAt = p.now
			p.checkpoint(&f.tuple, ReasonDatagram)
		}
		switch {
		case f.held.len() > 0:
			f.query.run(p.now)
			if f.query.due(p.now) {
				p.query()
			}
		case f.said.len() == 0:
			p.removeFlow(f)
			return
		}
	}
	p.timers.set(&f.timer, p.flowDeadline(f))
}

// commitFlow appends to out what leaves at a commit. What was captured behind the
// commit point starts afresh, with the SVM of the new epoch, or is dropped.
func (p *Primary) commitFlow(f *dgramFlow, at int64, out []leaving) []leaving {
	held := f.held.view()
	young := 0
	for _, g := range held {
		switch {
		case p.before(g.at, at):
			out = append(out, leaving{no: g.no, f: f, dgram: g})
		case p.cfg.KeepYoung:
			g.said = false
			held[young] = g
			young++
		default:
			p.unheldDatagram(&g)
			p.drop(g.slot, ReasonYoung)
		}
	}
	f.held.remove(young, len(held))
	p.forgetSaid(f)
	f.askedAt, f.query = 0, backoff{}
	return out
}

// restartFlow sets f going again after a freeze.
func (p *Primary) restartFlow(f *dgramFlow) {
	for i := range f.held.view() {
		f.held.view()[i].since = p.now
	}
	for i := range f.said.view() {
		f.said.view()[i].since = p.now
	}
	p.pumpFlow(f)
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
