// SPDX-License-Identifier: Apache-2.0

package compare

import "time"

// pvm takes in a segment or datagram of the PVM.
func (p *Primary) pvm(s *Segment) {
	if s.Datagram {
		p.datagrams.fromPVM(s)
		return
	}
	if s.Slot == NoSlot && len(s.Payload) == 0 && (s.Len > 0 || s.Flags&(SYN|FIN|RST) != 0) {
		p.noRoom(s)
		return
	}
	if int64(len(s.Payload)) != int64(s.Len) || s.Slot == NoSlot && s.Len > 0 {
		p.drop(s.Slot, ReasonMalformed)
		return
	}
	if p.solo {
		p.pass(s)
		return
	}
	c := p.conns.byTuple[s.Tuple]
	switch {
	case s.Flags&RST != 0:
		if c == nil {
			if c = p.conns.create(&s.Tuple); c == nil {
				p.drop(s.Slot, ReasonTableFull)
				return
			}
		}
		c.last = p.now
		c.look(s, !c.pvmSeen || s.Flags&SYN != 0)
		c.held.setRST(s)
		p.pump(c)
		return
	case s.Flags&SYN != 0:
		if c = p.pvmSYN(c, s); c == nil {
			return
		}
	case c == nil:
		if c = p.conns.createEvicting(&s.Tuple); c == nil {
			p.tableFull(s)
			return
		}
	}
	c.look(s, !c.pvmSeen || s.Flags&SYN != 0)
	c.last, c.pvmSeen = p.now, true
	if c.held.hasRST && s.At-c.held.rst.at > int64(goesOn) {
		c.held.freeRST(ReasonSuperseded)
	}
	grew := c.acks.fromPVM(s, p.frozen)
	c.keep(s)
	c.pvmAt = mark{true, s.PayloadStart()}
	if s.Len == 0 && s.Flags&(SYN|FIN) == 0 {
		c.pureACK(s, grew)
	} else if c.hold(s) {
		p.makeRoom(c, classOf(s.Large))
	}
	if s.Flags&SYN == 0 {
		c.established = true
		c.half.unlink()
	}
	p.pump(c)
}

// pvmSYN finds or makes the connection that a SYN of the PVM belongs to (R8). It
// gives nil when the frame was dropped.
func (p *Primary) pvmSYN(c *conn, s *Segment) *conn {
	passive := s.Flags&ACK != 0
	opened := false // by the SVM too
	switch {
	case c == nil:
		if c = p.conns.createEvicting(&s.Tuple); c == nil {
			p.tableFull(s)
			return nil
		}
	case c.syn.repeated(s):
		if passive && c.syn.flags&ACK == 0 && c.acks.scale == scaleUnknown {
			// The answer in a simultaneous open. It offers the scale that the guest uses from now on; the remote's SYN,
			// which settles that, may have come ahead of the PVM's own.
			c.acks.scaleBy(s.Opts, true)
		}
		return c
	default:
		if why := outlives(c, s); why != ReasonNone {
			if why == ReasonDuplicate && !c.floating {
				c.syn.meet(s)
			}
			p.drop(s.Slot, why)
			return nil
		}
		opened = c.openOnSVM
		c.held.clear(ReasonSuperseded)
		p.conns.reset(c)
	}
	c.inc = incarnation{isn: s.Seq, named: true, settled: true}
	c.syn.begin(s, p.now)
	c.floating, c.rooted = false, true
	c.svm.begin(s.Seq)
	c.released = s.Seq
	c.pvm.reach(s.Seq + 1)
	if _, offered := wscale(s.Opts); passive || !offered {
		c.acks.scaleBy(s.Opts, true)
	}
	p.conns.halfOpened(c)
	if !passive {
		p.pvmOpened(c, opened)
	}
	return c
}

// outlives gives why c goes on though the PVM transmits s, a SYN that is not c's; ReasonNone: another
// connection begins.
func outlives(c *conn, s *Segment) Reason {
	switch {
	case !c.syn.seen && c.pvmSeen && c.inc.named && c.inc.isn == s.Seq:
		return ReasonDuplicate
	case c.syn.answersSame(s) && after(c.released, c.inc.isn) && !c.closed():
		// A guest that answers with SYN cookies forgets what it answered; the
		// remote does not, and keeps to the first answer.
		return ReasonSYNCookie
	}
	return ReasonNone
}

// svm takes in a digest record.
func (p *Primary) svm(s *Segment) {
	if p.solo || !p.inEpoch(s) {
		return
	}
	if s.Datagram {
		p.datagrams.fromSVM(s)
		return
	}
	if s.Len > reach || s.Flags&(SYN|FIN) == SYN|FIN {
		p.stats.Drops[ReasonMalformed]++
		return
	}
	if s.Inherited && s.Flags&(SYN|ACK|RST) == SYN {
		p.svmOpened(s)
		return
	}
	c := p.conns.byTuple[s.Tuple]
	if c == nil {
		// The SVM may be the first to transmit on a connection that came with a
		// checkpoint. Late ACKs and FINs of connections that are over come here too,
		// so it is forgotten soon if the PVM transmits nothing.
		if s.Flags&SYN == 0 {
			c = p.conns.create(&s.Tuple)
		}
		if c == nil {
			p.stats.Drops[ReasonStray]++
			return
		}
	}
	if s.Flags&RST != 0 {
		if r := (svmReset{true, false, s.Seq, s.Ack, s.Flags, p.now}); c.pvmSeen && c.accept(s) && !refusesSYN(s.Flags, s.Seq) {
			r.same = true
			c.svmRST = r
		} else if s.Inherited || !c.pvmSeen {
			c.svmRST = r
		} else {
			p.stats.Drops[ReasonIncarnation]++
			return
		}
		c.last = p.now
		p.pump(c)
		return
	}
	if !c.accept(s) {
		p.stats.Drops[ReasonIncarnation]++
		if c.forgotten {
			p.wait(c)
		}
		return
	}
	c.last = p.now
	if c.svmRST.ok && p.now-c.svmRST.at > int64(goesOn) {
		c.svmRST = svmReset{}
	}
	if s.Flags&SYN != 0 && c.syn.seen {
		c.syn.fromSVM(s)
	}
	if c.syn.svm || !c.syn.waiting {
		c.syn.announced()
	}
	had, next := c.acks.svm.ok, c.svm.extent.next(c.svm.compared)
	ackGrew, grew := c.acks.fromSVM(s)
	if ackGrew {
		c.moved()
	}
	dup := !grew && had && s.Flags&(ACK|SYN|FIN) == ACK && s.Len == 0 &&
		s.Ack == c.acks.svm.ack && !before(s.Seq, next)
	c.repeated(s)
	c.svmAt = mark{true, s.PayloadStart()}
	if !c.svmData(s) {
		p.stats.Drops[ReasonStray]++
	}
	if p.pump(c) && dup && !p.frozen && !c.diverged {
		c.sendACK(c.released)
	}
}

// goesOn is how long after a RST a guest has to transmit on the connection for the RST to
// be ignored; sooner, its segments may have overtaken each other. Linux up to 6.18
// answers with a RST now and then when a segment comes while a handshake ends (its
// lookup without locks finds neither of both sockets); the connection goes on.
const goesOn = 5 * time.Millisecond

// answer takes in S's answer to an ask (R5).
func (p *Primary) answer(s *Segment) {
	if p.solo || !p.inEpoch(s) {
		return
	}
	c := p.conns.byTuple[s.Tuple]
	switch {
	case c == nil || !near(s.Seq, c.svm.compared) || s.Len > reach:
		p.stats.Drops[ReasonStray]++
	case !c.accept(s):
		p.stats.Drops[ReasonIncarnation]++
	default:
		if s.Len > 0 {
			c.sameBytes(c.svm.learn(span{s.Seq, []Bound{{s.Seq + s.Len, s.Sum}}}))
		}
		p.pump(c)
	}
}

// client notes a SYN, FIN or RST of the remote.
func (p *Primary) client(s *Segment) {
	c := p.conns.byTuple[s.Tuple]
	if c == nil {
		return
	}
	if c.owner.kernel {
		p.conns.remoteClosed(c, s.End())
		return
	}
	c.last = p.now
	switch {
	case s.Flags&RST != 0:
		c.clientRST = c.clientRST || !c.acks.refuses(s.Seq, &c.syn)
	case s.Flags&SYN != 0 && c.syn.seen && c.acks.scale == scaleUnknown && len(s.Opts) > 0:
		// The answer to an active open, or the SYN that crosses it, settles whether windows are scaled.
		_, taken := wscale(s.Opts)
		c.acks.scaleBy(c.syn.opts.bytes(), taken)
	}
	if s.Flags&(FIN|SYN|RST) == FIN {
		c.cliFIN = mark{true, s.End()}
	}
	p.wait(c)
}

// pump does all that c's state allows: match, release, acknowledge; then it sets
// the timers. It reports whether c is still there.
func (p *Primary) pump(c *conn) (alive bool) {
	if !p.frozen && !c.diverged {
		c.root()
		goOn(c)
		c.checkFIN()
		c.advance()
	}
	if !p.frozen && !c.diverged {
		c.release()
		if c.matchRST() && !c.pvmSeen {
			p.conns.remove(c, ReasonReset)
			return false
		}
		c.sendGrownACK(c.dataDue())
	}
	p.wait(c)
	return c.heapIdx >= 0
}

// tableFull frees a frame that no connection can be made for.
func (p *Primary) tableFull(s *Segment) {
	p.drop(s.Slot, ReasonTableFull)
	if p.fullAsked && p.now-p.fullAt < int64(fullEvery) {
		return
	}
	p.fullAsked, p.fullAt = true, p.now
	p.checkpoint(&s.Tuple, ReasonTableFull, "")
}
