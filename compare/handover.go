// SPDX-License-Identifier: Apache-2.0

package compare

import "time"

// Handover is the state of a TCP connection whose owner changes (R27). P's kernel owns one of
// which nothing waits but ACKs, or that the remote has just opened, and decides by the rules of this package
// about what comes; it gives back what is not the common case. All positions are the PVM's.
type Handover struct {
	Inc       uint32 // incarnation: the PVM's ISN; with Inherited it means nothing
	Inherited bool
	Released  uint32 // below it both guests' streams are equal, and have left
	Scale     uint8  // of the guests' windows
	TS        bool   // segments have timestamps: TSSent is the newest that has left
	TSSent    uint32
	TSLast    uint32 // the PVM's newest
	HasPure   bool   // Pure is what the PVM's newest pure ACK acknowledges
	Pure      uint32
	ACK       Effect // with HasPure: such an ACK, of which the numbers are left out; of one that was taken back its header alone
	SYN       bool   // taken back while the SYN|ACK waits: nothing else holds
	FIN       bool   // taken back after both guests' FINs have left, just below Released

	// What the guests have acknowledged of the remote's stream, and what has been transmitted of it.
	PVM, SVM, Sent Acked

	// What the kernel has done since it owned the connection.
	Frames, Bytes, ACKs, Records uint64
	Waiting                      int // frames and records there, which come in the events behind
}

// Acked is what one side has acknowledged: the highest ACK, the right edge of the window, and the
// newest echo of the remote's timestamps that came with it.
type Acked struct {
	Ack, Edge, Echo uint32
	Win             uint16
	Echoes          bool
}

const (
	offerAfter = time.Millisecond
	// Where the kernel had less to do than so many frames and ACKs, it gets the connection again after
	// twice as long, up to so many times as long as at first.
	offerWorth = 32
	offerMax   = 128
	// A connection that the kernel owns is looked at so often, and so long after the remote's FIN: by then most
	// are over.
	ownedFor  = time.Second
	closedFor = 50 * time.Millisecond
)

// ownership is whether P's kernel owns a connection.
type ownership struct {
	offered bool // OpGrant is on its way
	opening bool // the kernel has owned it from its SYN|ACK on
	kernel  bool
	known   bool  // the kernel has an entry of it
	looking bool  // it is taken back to see what has become of it
	lookAt  int64 // the kernel's: when that is due
	offerAt int64 // not before it is the connection offered; 0: none yet
	wait    time.Duration
}

// plain reports whether options are what the kernel knows: none, or timestamps as guests lay them out.
func (o *options) plain() bool {
	return o.n == 0 || o.n == 12 && usualTS(o.bytes())
}

// quiet reports whether nothing of c waits but an ACK of the kind that the kernel can make, and
// nothing about it is out of the ordinary, so that the kernel may own it.
func quiet(c *conn) bool {
	switch a := &c.acks; {
	case c.frozen, c.diverged, c.sealed, c.synHeld(), c.openOnSVM, c.accECN, c.tuple.VLAN != 0:
	case !c.established, !c.rooted, c.floating, c.adopted, !c.inc.settled:
	case c.pvm.fin.ok, c.svm.extent.fin.ok, c.clientRST, c.svmRST.ok, c.rstSent, c.held.hasRST:
	case c.held.len() > 0, c.released != c.svm.compared, c.svm.ahead(), c.pvm.beyond(c.released), len(c.svm.loose) > 0:
	case !a.pvm.ok, !a.svm.ok, !a.sent.ok, a.ahead, a.scale == scaleUnknown:
	case a.pvmSACK.above(a.pvm.ack), a.svmSACK.above(a.svm.ack), a.nblocks > 0, c.ackAt != 0:
	case !c.tmpl.ok, c.tmpl.flags&^(ACK|PSH) != 0, !c.tmpl.opts.plain():
	case a.pvm.ack != a.svm.ack && !(c.tmpl.pure && c.pureUpTo.ok && !after(a.pvm.ack, c.pureUpTo.pos)):
	default:
		return true
	}
	return false
}

// offer has the caller hand c over, where that is worth it.
func (p *Primary) offer(c *conn) {
	o := &c.owner
	if !p.cfg.FastPath || o.offered || o.kernel || !c.established || c.heapIdx < 0 {
		return
	}
	if o.offerAt == 0 {
		o.wait = p.cfg.OfferAfter
		o.offerAt = p.now + int64(o.wait)
	}
	if p.now < o.offerAt || !quiet(c) {
		return
	}
	o.offered, o.known = true, true
	p.emit(OpGrant, &c.tuple)
}

// Owners are the connections of a [Primary], by who owns them.
type Owners struct{ conns *connTable }

// Owners gives them.
func (p *Primary) Owners() Owners { return Owners{&p.conns} }

// Offer gives the state of a connection that an OpGrant is about, unless it is no longer quiet. What
// came of it is an EvGranted.
func (o Owners) Offer(t *Tuple) (Handover, bool) {
	c := o.conns.byTuple[*t]
	if c == nil || !c.owner.offered || !quiet(c) {
		return Handover{}, false
	}
	a, m := &c.acks, &c.tmpl
	h := Handover{
		Inc: c.inc.isn, Inherited: c.inc.inherited, Released: c.released,
		Scale: uint8(a.scale), TS: m.opts.n > 0, TSSent: c.tsSent, TSLast: m.tsVal(),
		PVM: a.pvm.acked(), SVM: a.svm.acked(), Sent: a.sent.acked(),
	}
	if m.pure && c.pureUpTo.ok {
		h.HasPure, h.Pure = true, c.pureUpTo.pos
		h.ACK = Effect{
			Op: OpSend, Tuple: c.tuple, Slot: NoSlot, Flags: ACK, OptLen: m.opts.n, Opts: m.opts.b, HdrLen: m.hdrLen, Header: m.hdr,
		}
	}
	return h, true
}

// Offers reports whether connections are offered to the kernel at all.
func (o Owners) Offers() bool { return o.conns.cfg.FastPath }

// Holds reports whether an event is for [Primary.Step] only after its connection was taken back, because the kernel
// owns that. The remote's FIN is not: it says where the remote has closed, and the guests' ACKs of it are like any.
func (o Owners) Holds(ev *Event) bool {
	return o.Kernel(&ev.Seg.Tuple) && (ev.Kind != EvClient || ev.Seg.Flags&(FIN|SYN|RST) != FIN)
}

// Kernel reports whether the kernel owns a connection.
func (o Owners) Kernel(t *Tuple) bool {
	if o.conns.owned == 0 {
		return false
	}
	c := o.conns.byTuple[*t]
	return c != nil && c.owner.kernel
}

// All appends the connections that the kernel owns.
func (o Owners) All(ts []Tuple) []Tuple {
	if o.conns.owned == 0 {
		return ts
	}
	for t, c := range o.conns.byTuple {
		if c.owner.kernel {
			ts = append(ts, t)
		}
	}
	return ts
}

// granted takes in what came of an offer.
func (p *Primary) granted(t *Tuple, h *Handover) {
	c := p.conns.byTuple[*t]
	if c == nil || !c.owner.offered {
		return
	}
	o := &c.owner
	o.offered = false
	if h == nil {
		// Mostly an event of it was on its way. One that is never quiet for long meets a moment without.
		o.offerAt = p.now + int64(p.cfg.OfferAfter)
		return
	}
	p.conns.own(c)
}

// opened takes in the PVM's SYN|ACK of a connection that the kernel owns from there on, unless it is part of one that goes on:
// the caller takes that back.
func (p *Primary) opened(s *Segment) {
	c := p.conns.byTuple[s.Tuple]
	if p.solo || c != nil && goesOnHere(c, s) {
		p.emit(OpForget, &s.Tuple)
		return
	}
	if c = p.pvmSYN(c, s); c == nil {
		p.emit(OpForget, &s.Tuple)
		return
	}
	c.look(s, true)
	c.last, c.pvmSeen = p.now, true
	c.keepSYN(s)
	c.half.unlink()
	p.conns.opening.push(&c.half)
	p.conns.makeHalfRoom(c)
	c.owner.opening, c.owner.known, c.owner.wait = true, true, p.cfg.OfferAfter
	p.conns.own(c)
}

// goesOnHere reports whether a SYN|ACK of the PVM belongs to c, of which more than that is known here, or to none.
func goesOnHere(c *conn, s *Segment) bool {
	if c.owner.kernel || c.owner.offered || c.diverged {
		return true
	}
	if c.syn.repeated(s) {
		return c.established
	}
	return outlives(c, s) != ReasonNone
}

// own notes that the kernel owns c.
func (t *connTable) own(c *conn) {
	o := &c.owner
	o.kernel, o.looking, o.lookAt = true, false, t.now+int64(ownedFor)
	t.owned++
	c.query = backoff{}
	c.stall.stop()
	c.asks.stop()
	t.timers.set(&c.timer, c.deadline())
}

// taken takes a connection back from the kernel. What waited of it there comes in the events behind.
func (p *Primary) taken(t *Tuple, h *Handover) {
	c := p.conns.byTuple[*t]
	if c == nil || !c.owner.kernel {
		return
	}
	if h == nil { // what the kernel knew is lost: the connection is met in mid-stream
		p.conns.remove(c, ReasonVoid)
		return
	}
	o := &c.owner
	opening := o.opening
	p.conns.disown(c)
	if opening && (h.SYN || before(h.Released, c.released)) { // its SYN|ACK waits, and comes behind
		c.tmpl.ok = false
		p.conns.halfOpened(c)
		p.conns.forgetOwner(c)
		p.wait(c)
		return
	}
	if opening {
		c.held.clear(ReasonDuplicate) // the kernel's is not the first one
		c.syn.opened()
		c.placed = true
	}
	if h.HasPure || h.Bytes > 0 || h.FIN {
		c.established = true
	} else if !c.established {
		c.tmpl.ok = false
		p.conns.halfOpened(c)
	}
	c.released = h.Released
	c.svm.setBase(h.Released)
	end := h.Released
	if h.FIN {
		end--
		c.pvm.close(end)
		c.svm.extent.close(end)
		c.finAt, c.finAgain = p.now, p.now
	}
	c.pvm.reach(end)
	c.svm.extent.reach(end)
	a := &c.acks
	a.pvm, a.svm, a.sent = h.PVM.side(), h.SVM.side(), h.Sent.side()
	if h.TS {
		c.tsSent, c.tsKnown = h.TSSent, true
		c.tmpl.setTSVal(h.TSLast)
	}
	if h.HasPure {
		c.pureUpTo = mark{true, h.Pure}
		c.tmpl.hdrLen, c.tmpl.pure = uint8(copy(c.tmpl.hdr[:], h.ACK.Header[:h.ACK.HdrLen])), true
	}
	c.stats.ReleasedPackets += h.Frames
	c.stats.ReleasedBytes += h.Bytes
	c.stats.SentACKs += h.ACKs
	c.stats.Records += h.Records
	switch {
	case o.looking:
		o.offerAt = p.now
	case h.Frames+h.ACKs < offerWorth:
		o.wait = min(2*o.wait, offerMax*p.cfg.OfferAfter)
		o.offerAt = p.now + int64(o.wait)
	default:
		o.wait = p.cfg.OfferAfter
		o.offerAt = p.now + int64(o.wait)
	}
	busy := h.Frames+h.ACKs+h.Records > 0 || h.Waiting > 0 || h.PVM.Ack != h.SVM.Ack
	if !busy || h.FIN || !c.established && h.Waiting == 0 { // another one has its place, and it gets one again when something comes
		p.conns.forgetOwner(c)
	}
	if busy {
		c.last = p.now
		p.pump(c)
		return
	}
	p.arm(c)
}

// remoteClosed notes the remote's FIN on a connection that the kernel owns, which is mostly over soon.
func (t *connTable) remoteClosed(c *conn, at uint32) {
	c.cliFIN = mark{true, at}
	const step = int64(closedFor) // many at a time
	c.owner.lookAt = min(c.owner.lookAt, (t.now+2*step)/step*step)
	t.timers.set(&c.timer, c.deadline())
}

// disown: the kernel does not own c any more.
func (t *connTable) disown(c *conn) {
	t.owned--
	c.half.unlink()
	c.owner.kernel, c.owner.opening = false, false
}

// forgetOwner has the kernel forget c, which is not its own.
func (t *connTable) forgetOwner(c *conn) {
	t.emit(OpForget, &c.tuple)
	c.owner.known = false
}

// forget has the kernel forget the entry of a connection that is over.
func (t *connTable) forget(c *conn) {
	if c.owner.kernel {
		t.disown(c)
	}
	if c.owner.known {
		t.emit(OpForget, &c.tuple)
	}
	c.owner = ownership{}
}

func (d *side) acked() Acked {
	return Acked{Ack: d.ack, Edge: d.edge, Echo: d.echo, Win: d.win, Echoes: d.echoes}
}

func (a *Acked) side() side {
	return side{ok: true, echoes: a.Echoes, ack: a.Ack, edge: a.Edge, win: a.Win, echo: a.Echo}
}
