// SPDX-License-Identifier: Apache-2.0

package compare

import "time"

// conn is what P knows of one connection. Positions are the PVM's.
type conn struct {
	timer
	sender
	owner ownership
	no    uint64 // of the event that made it; orders connections
	born  int64
	last  int64 // last sign of life

	pvmSeen     bool // the PVM transmitted something that was not a RST
	established bool // and not a SYN
	diverged    bool // blocked until a commit
	why         Reason

	openOnSVM bool // the SVM opened this tuple itself, without an offset
	open      link[*conn]
	half      link[*conn]

	// What the PVM transmitted, what of it has not left, and what the SVM did. Between
	// the released and the compared point lies what R5 has not cut yet. low: what lies
	// below it is unknown, unless rooted, where all the past is common.
	pvm              extent
	held             heldQueue
	svm              stream
	low              uint32
	floating, rooted bool
	adopted          bool // from an earlier daemon: the remote has all below low
	pvmAt, svmAt     mark // where the newest segment of each begins

	cliFIN mark // what acknowledges the remote's FIN
	// When the PVM's FIN came first, and last.
	finAt, finAgain int64
	svmRST          svmReset
	forgotten       bool // S has lost the offset: the SVM's newest record was of a connection from before a checkpoint
	rstSent         bool
	clientRST       bool

	// Timers; 0: off.
	stall    stallClock
	cuts     cutClock
	cutting  bool // it is time to
	asks     askClock
	query    backoff // R6
	mirrorAt int64   // before it nothing is mirrored again
}

// mark is an optional position.
type mark struct {
	ok  bool
	pos uint32
}

func (m mark) is(pos uint32) bool { return m.ok && m.pos == pos }

// svmReset is a RST of the SVM. same: it belongs to the connection's incarnation. at: when
// its record came.
type svmReset struct {
	ok, same bool
	seq, ack uint32
	flags    Flags
	at       int64
}

// accept reports whether a digest record belongs to c's incarnation (R8). A connection
// that P met in mid-stream takes over that of the newest record, until something has
// been verified.
func (c *conn) accept(s *Segment) bool {
	switch {
	case c.off(mutR8):
		return true
	case c.inc.names(s):
		c.forgotten = false
		return true
	case c.inc.settled && !c.floating && !(c.adopted && c.svm.compared == c.low):
		c.forgotten = s.Inherited && c.inc.named
		return c.inc.namesAgain(s)
	case c.inc.settled:
		c.svm.forget()
		if !c.floating {
			c.svm.setBase(c.svm.compared)
		}
		c.acks.forgetSVM()
		c.svm.extent, c.svmRST = extent{}, svmReset{}
	}
	c.inc.take(s)
	return true
}

// closed reports whether both sides are through with c.
func (c *conn) closed() bool {
	return c.rstSent ||
		c.pvm.fin.ok && after(c.released, c.pvm.fin.pos) && c.cliFIN.ok && c.acks.sent.ok && !before(c.acks.sent.ack, c.cliFIN.pos)
}

// unmatched reports whether something that is not an ACK was transmitted by one side
// only (R7), or an ACK which the other one does not confirm as S has lost the offset (R11).
func (c *conn) unmatched() bool {
	switch {
	case !c.pvmSeen || c.diverged:
		return false
	case c.openOnSVM:
		return true
	case c.closed():
		return false
	case c.held.hasRST || c.svmRST.ok:
		return true
	case c.held.len() > 0, c.forgotten && c.acks.svmBehind():
		return true
	}
	fin := c.svm.extent.fin
	return c.svm.ahead() || fin.ok && !before(fin.pos, c.svm.compared)
}

// diverge blocks c until a commit and asks for a checkpoint. where: as that of an [Effect].
func (c *conn) diverge(why Reason, where string) {
	if c.diverged {
		return
	}
	c.diverged, c.why = true, why
	c.checkpoint(&c.tuple, why, where)
}

func (c *conn) state() string {
	switch {
	case c.diverged:
		return "diverged"
	case c.rstSent || c.clientRST:
		return "reset"
	case c.closed():
		return "closed"
	case !c.pvmSeen:
		return "svm-only"
	case c.pvm.fin.ok || c.svm.extent.fin.ok || c.cliFIN.ok:
		return "closing"
	case c.syn.seen && !c.established:
		return "syn"
	case c.floating:
		return "unknown"
	}
	return "established"
}

func (c *conn) describe(now int64) Flow {
	f := Flow{
		Tuple: c.tuple, State: c.state(), Inc: c.inc.isn, Inherited: c.inc.inherited || !c.inc.settled,
		Compared: c.svm.compared, Released: c.released,
		Held: c.held.len(), Age: time.Duration(now - c.born),
		Diverged: c.diverged, Why: c.why, Kernel: c.owner.kernel, no: c.no,
	}
	for i := range c.held.view() {
		f.HeldBytes += len(c.held.view()[i].payload)
	}
	if c.held.hasRST {
		f.Held++
	}
	return f
}
