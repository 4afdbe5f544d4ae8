// SPDX-License-Identifier: Apache-2.0

package compare

// conn is what P knows of one connection. Positions are the PVM's.
type conn struct {
	timer
	tuple Tuple
	no    uint64 // of the event that made it; orders connections
	born  int64
	last  int64 // last sign of life

	// Incarnation (R8). incKnown: inc or inherited has been settled. hasInc: inc
	// is the PVM's ISN.
	inc       uint32
	hasInc    bool
	incKnown  bool
	inherited bool

	pvmSeen     bool // the PVM said something that was not a RST
	established bool // and not a SYN
	diverged    bool // blocked until a commit
	why         Reason

	// The PVM's SYN (R3), kept for comparison and announcements.
	synSeen    bool
	synWait    bool // not matched yet: compared is the ISN
	synFlags   Flags
	synAck     uint32
	synOpts    options
	synAt      int64
	announcing bool
	scale      int8 // window scale of the guests, scaleUnknown if not known

	// What the SVM said about its SYN.
	sSYN      bool
	sSYNSame  bool // options and acknowledged number are the PVM's
	sSYNWin   uint16
	openOnSVM bool // the SVM opened this tuple itself, without an offset
	openLink  openLink
	half      halfLink

	// compared: below it PVM and SVM agree. released: highest position sent, the
	// FIN included. Between them lies what R5 has not cut yet. low: what lies
	// below it is unknown, unless rooted, where all the past is common.
	compared, released, low uint32
	floating, rooted        bool
	adopted                 bool // from an earlier daemon: the remote has all below low
	sum                     Sum  // at compared, from the base of svm's points
	svm                     knowledge
	pvmSaid, svmSaid        bool   // pvmEnd, svmEnd hold
	pvmEnd, svmEnd          uint32 // highest end of the data of each
	pFIN, sFIN, cliFIN      mark   // FIN positions; cliFIN: what acknowledges the remote's

	held  deque[piece]
	holds [slotClasses]int // slots
	rst   piece            // the PVM's RST waiting for the SVM's
	// rstHeld, rstSent: states of rst. sRST: what the SVM's RST said.
	rstHeld, rstSent bool
	sRST             svmReset
	clientRST        bool

	// R2: what the PVM and the SVM acknowledged, and what has been sent.
	p, s, out    side
	pAt          int64 // capture time of the newest p
	pSACK, sSACK sackSet
	sBlocks      [4]block // of the SVM's newest segment
	sBlockN      int
	marks        []ackMark // p over time while frozen
	tmpl         template
	tsSent       uint32 // highest TSval sent
	tsKnown      bool
	accECN       bool // AE was seen: with CWR and ECE it is a counter
	sealed       bool // by a digest over the header: frames leave as they are

	// Timers; 0: off.
	waiting  bool // R7's clock runs, from progress
	progress int64
	cutAt    int64
	cutting  bool // it is time to
	askAt    int64
	asks     int
	query    backoff // R6
	mirrorAt int64   // before it nothing is mirrored again
	annAt    int64
	annDelay int64
	annLeft  int
}

// look notes what a segment of the PVM tells of how it has to be treated.
func (p *Primary) look(c *conn, s *Segment) {
	c.accECN = c.accECN || s.Flags&AE != 0
	if !c.pvmSeen || s.Flags&SYN != 0 {
		c.sealed = sealed(s.Opts) && !p.off(mutSealed)
	}
}

const scaleUnknown = -1

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

// create adds a connection, or gives nil when the table is full.
func (p *Primary) create(t *Tuple) *conn {
	if len(p.conns) >= p.cfg.MaxConnections {
		return nil
	}
	var c *conn
	if n := len(p.spare); n > 0 {
		c = p.spare[n-1]
		p.spare = p.spare[:n-1]
	} else {
		c = new(conn)
	}
	c.tuple = *t
	c.timer.conn = c
	p.reset(c)
	p.conns[c.tuple] = c
	p.timers.push(&c.timer)
	return c
}

// reset brings c to the state of a connection nothing is known of. Nothing may
// be held any more.
func (p *Primary) reset(c *conn) {
	p.forget(c)
	p.unlinkOpen(c)
	p.unlinkHalf(c)
	*c = conn{
		timer: c.timer, tuple: c.tuple, no: p.eventNo, born: p.now, last: p.now,
		floating: true, scale: scaleUnknown,
		held: c.held, svm: c.svm, marks: c.marks[:0],
	}
}

// freeHeld drops all that c holds.
func (p *Primary) freeHeld(c *conn, why Reason) {
	for i := range c.held.view() {
		p.freePiece(c, &c.held.view()[i], why)
	}
	c.held.reset()
	p.freeRST(c, why)
}

func (p *Primary) freeRST(c *conn, why Reason) {
	if c.rstHeld {
		p.freePiece(c, &c.rst, why)
		c.rst, c.rstHeld = piece{}, false
	}
}

// remove ends c's tracking.
func (p *Primary) remove(c *conn, why Reason) {
	p.freeHeld(c, why)
	p.forget(c)
	p.unlinkOpen(c)
	p.unlinkHalf(c)
	p.timers.remove(&c.timer)
	delete(p.conns, c.tuple)
	if len(p.spare) < maxSpare {
		p.spare = append(p.spare, c)
	}
}

const maxSpare = 1024

// tableFull frees a frame that no connection can be made for.
func (p *Primary) tableFull(s *Segment) {
	p.drop(s.Slot, ReasonTableFull)
	if p.fullAsked && p.now-p.fullAt < int64(fullEvery) {
		return
	}
	p.fullAsked, p.fullAt = true, p.now
	p.checkpoint(&s.Tuple, ReasonTableFull)
}

// accept reports whether a record belongs to c's incarnation (R8). A connection
// that P met in mid-stream takes over that of the newest record, until something has
// been verified.
func (p *Primary) accept(c *conn, s *Segment) bool {
	switch {
	case p.off(mutR8):
		return true
	case c.incKnown && s.Inherited == c.inherited && (s.Inherited || s.Inc == c.inc):
		return true
	case c.incKnown && !c.floating && !c.unverified():
		// A connection that was half open at a commit may get an offset, of 0,
		// afterwards: its records name the incarnation again.
		return c.hasInc && !s.Inherited && c.inc == s.Inc
	case c.incKnown:
		p.forget(c)
		if !c.floating {
			p.setBase(c, c.compared)
		}
		c.s, c.sSACK, c.sBlockN = side{}, sackSet{}, 0
		c.svmSaid, c.sFIN, c.sRST = false, mark{}, svmReset{}
	}
	c.incKnown, c.inherited = true, s.Inherited
	c.inc, c.hasInc = s.Inc, !s.Inherited
	return true
}

// unverified: c was adopted, and nothing of it has been compared yet.
func (c *conn) unverified() bool { return c.adopted && c.compared == c.low }

// closed reports whether both sides are through with c.
func (c *conn) closed() bool {
	return c.rstSent ||
		c.pFIN.ok && after(c.released, c.pFIN.pos) && c.cliFIN.ok && c.out.ok && !before(c.out.ack, c.cliFIN.pos)
}

// unmatched reports whether something that is not an ACK was said by one side
// only (R7).
func (c *conn) unmatched() bool {
	switch {
	case !c.pvmSeen || c.diverged:
		return false
	case c.openOnSVM:
		return true
	case c.closed():
		return false
	case c.rstHeld || c.sRST.ok:
		return true
	case c.held.len() > 0:
		return true
	}
	return c.svmSaid && after(c.svmEnd, c.compared) || c.sFIN.ok && !before(c.sFIN.pos, c.compared)
}

// diverge blocks c until a commit and asks for a checkpoint.
func (p *Primary) diverge(c *conn, why Reason) {
	if c.diverged {
		return
	}
	c.diverged, c.why = true, why
	p.checkpoint(&c.tuple, why)
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
	case c.pFIN.ok || c.sFIN.ok || c.cliFIN.ok:
		return "closing"
	case c.synSeen && !c.established:
		return "syn"
	case c.floating:
		return "unknown"
	}
	return "established"
}
