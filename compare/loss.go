// SPDX-License-Identifier: Apache-2.0

package compare

import "time"

// Loss on the peer link is repaired before a guest's timer has to (R6). A lost digest
// record is the newest of its TX stream, or leaves a gap that the caller asks for, so the
// newest of all streams are asked for when something waits. A frame of the remote that
// the SVM did not receive shows in what the SVM retransmits or does not transmit.

const (
	queryEvery    = 5 * time.Millisecond
	remirrorEvery = 5 * time.Millisecond
)

// backoff times tries, ever more seldom: after 5, 10, 20 … ms, maxAsks
// times at most.
type backoff struct {
	at int64 // 0: off
	n  int   // tries
}

// run starts the clock if it does not run and has not run out.
func (b *backoff) run(now int64) {
	if b.at == 0 && b.n == 0 {
		b.at = now + int64(askAgain)
	}
}

// due reports whether it is time for a try, and sets the next one.
func (b *backoff) due(now int64) bool {
	if b.at == 0 || b.at > now {
		return false
	}
	if b.n++; b.n == maxAsks {
		b.at = 0
	} else {
		b.at = now + int64(askAgain)<<b.n
	}
	return true
}

// stuck reports whether something of the PVM waits for the SVM.
func (c *conn) stuck() bool {
	return c.pvmSeen && !c.diverged && !c.closed() &&
		(c.held.len() > 0 || c.held.hasRST || c.acks.svmBehind())
}

// query asks S for the newest digest records. All streams and connections share one limit.
func (k *core) query() {
	if k.now < k.queryAt || k.off(mutR6) {
		return
	}
	k.queryAt = k.now + int64(queryEvery)
	k.stats.Queries++
	k.emit(OpQuery, &Tuple{})
}

// unstick does what may get c going again. An SVM that transmits nothing where the PVM did
// may have missed a segment of the remote, such as the last ACK of its handshake.
func (c *conn) unstick() {
	c.core.query()
	if c.adopted {
		c.emit(OpAdopt, &c.tuple)
	}
	c.sack()
	if c.held.len() > 0 && !c.syn.waiting && !c.svm.ahead() {
		c.remirror()
	}
}

// remirror gives S the remote's newest header again.
func (c *conn) remirror() {
	if c.now < c.mirrorAt || c.off(mutR6) {
		return
	}
	c.mirrorAt = c.now + int64(remirrorEvery)
	c.stats.Remirrors++
	c.emit(OpRemirror, &c.tuple)
}

// probe has the guest that has acknowledged less acknowledge what it has received, which it
// may be delaying: it is sent the last byte that it acknowledged again (RFC 9293, 3.10.7.4).
func (t *sender) probe() {
	op, a := OpProbeSVM, &t.acks
	at := a.svm.ack
	if after(at, a.pvm.ack) {
		op, at = OpProbePVM, a.pvm.ack
	}
	t.stats.Probes++
	t.emit(op, &t.tuple).Seq = at - 1
}

// watchLag has the guest probed that has acknowledged less than the other one for CutDelay, while
// they are out of step: what both have sent has left, and it ends in the middle of a segment of
// one of them. That guest may wait for an ACK of its segment, the other one delay its own, and the
// remote wait for one of what it has sent (Nagle's algorithm at both ends).
func (t *sender) watchLag(outOfStep bool) {
	a := &t.acks
	low := minSeq(a.pvm.ack, a.svm.ack)
	switch {
	case !outOfStep || a.pvm.ack == a.svm.ack || !a.may(ACK) || t.frozen || t.syn.waiting || t.sealed || t.off(mutR6):
		t.lag = backoff{}
	case t.lag == (backoff{}) || low != t.lagAt:
		t.lag, t.lagAt = backoff{at: t.now + int64(t.cfg.CutDelay)}, low
	}
}

// sackAsked is how many times S is asked about a hole in the SVM's stream before the SVM
// is made to retransmit it.
const sackAsked = 3

// sack has a guest retransmit what is missing at the compared point, where data behind it
// is at hand: the guest gets the SACK blocks that the remote would send if that data had
// left. Its own timer has grown with all the time that its frames were held. Should P drop
// what it reported in a block, the guest finds it unacknowledged, and retransmits it (RFC
// 2018, 8).
func (c *conn) sack() {
	if c.floating || c.syn.waiting || c.off(mutR6) {
		return
	}
	if held := c.held.view(); len(held) > 0 && after(held[0].start, c.svm.compared) {
		var there sackSet
		for i := range held {
			there.add(block{held[i].start, held[i].end}, c.svm.compared)
		}
		c.sackAs(OpSACK, c.svm.compared, &there)
	}
	if from, _, ok := c.svm.hole(); ok && from == c.svm.compared && c.query.n >= sackAsked {
		var there sackSet
		for i := range c.svm.loose {
			there.add(block{c.svm.loose[i].from, c.svm.loose[i].end()}, from)
		}
		c.sackAs(OpRemirror, from, &there)
	}
}

func (t *sender) sackAs(op Op, seq uint32, there *sackSet) {
	var o options
	o.ackOptions(nil, there.b[:min(there.n, maxBlocks)])
	e := t.emit(op, &t.tuple)
	e.Seq, e.OptLen, e.Opts = seq, o.n, o.b
}

// maxBlocks is how many SACK blocks fit beside a timestamp (RFC 2018, 3).
const maxBlocks = 3

// repeated looks at a digest record before its sums are taken in: if all of it is
// compared already, the SVM has missed the remote's ACK or window. A window probe or a
// keep-alive is an ACK from below the compared point: nobody else answers it, for what
// the SVM transmits does not leave.
func (c *conn) repeated(s *Segment) {
	if c.frozen || c.diverged || c.floating || c.syn.waiting || !near(s.Seq, c.svm.compared) {
		return
	}
	if end := s.End(); before(s.Seq, c.svm.compared) && !after(end, c.svm.compared) {
		c.remirror()
	}
}
