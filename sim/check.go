// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"fmt"
	"time"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/failover"
)

// check is what the checkers know.
type check struct {
	speaker   int  // the host that may transmit
	alone     bool // it has won the arbiter, and nobody follows it
	flows     map[flow]*wire
	stalls    int               // checkpoints that a connection needed to go on
	cores     int               // P's compare cores so far: one that did not see a connection begin does not know its window scale
	doubt     bool              // the PVM was stopped unasked since the last commit
	replays   bool              // a takeover sends copies again, with the acknowledgments of their time
	datagrams datagramCounts    // that clients have seen
	confirmed map[uint32]uint32 // what clients were told is on the disk, by key
	answers   int
	waited    int64 // for them, in sum
	frames    int   // that left
	compared  int   // of those, the ones that another guest had to have sent
}

// wire is a connection as clients have seen it.
type wire struct {
	isn       uint32
	opened    uint32 // what its SYN|ACK acknowledges
	end       uint32 // how far its stream has got
	moved     int64  // and when it got there
	acked     bool
	ack, edge uint32
	stamped   bool
	stamp     uint32
	scale     uint8
	core      int  // the compare core that saw it begin
	ahead     bool // its SYN|ACK has not left: the client takes none of it yet
	reset     bool // by the client, which does not go by a window any more
}

// solo: a host transmits alone from now on.
func (w *world) solo(h *host) {
	w.check.speaker, w.check.alone, w.check.doubt = h.id, true, false
	h.replaced = 0
	if w.off && w.fatal == 0 && !w.apart {
		w.failf("power-off", "%s serves, and the guest powered off", h.name)
	}
	if h.qemu != nil && h.qemu.guest != nil {
		rebaseDatagrams(w, h.qemu.guest)
	}
	w.remembers(h)
}

// remembers: what clients were told to be on the disk is on this host's.
func (w *world) remembers(h *host) {
	for key, value := range w.check.confirmed {
		if got := h.disk.read(key); got < value {
			w.failf("disk", "%s serves, with %d for key %d, and %d was confirmed", h.name, got, key, value)
		}
	}
}

// paired: a host has a secondary from now on. It may be one that the arbiter named for a takeover
// which its guest did not live to see.
func (w *world) paired(h *host) {
	w.check.alone, w.check.doubt = false, false
	if w.split() {
		w.check.speaker = h.id
	}
	if w.arbiter.entry.Speaker == h.name {
		w.check.speaker = h.id
		w.port = h.id // its guest's ARP shows the switch where it is
	}
}

// left looks at a frame that leaves a host.
func (w *world) left(h *host, frame []byte) {
	p, ok := parse(frame)
	if !ok {
		w.leftDatagram(h, frame)
		return
	}
	w.check.frames++
	if w.logging {
		w.logf("%s: leaves %v", h.name, p)
	}
	if h.replaced != 0 && w.now > h.replaced+1*s {
		w.failf("fenced", "%s transmits %v, and has known for %v that the arbiter names another", h.name, p, time.Duration(w.now-h.replaced))
	}
	if h.id != w.check.speaker {
		w.failf("two speakers", "%s transmits %v, and %s may", h.name, p, w.hosts[w.check.speaker].name)
		return
	}
	f := p.flow()
	v := w.check.flows[f]
	if own := h.opens(&p); own != nil && v != nil && own.isn != v.isn && own.opened != v.opened && p.seq-v.isn > v.end-v.isn {
		// Its SYN|ACK has not left: what the client cannot take in yet. Of a connection that was taken over
		// the guest's ISN is another one, too, but not what its SYN|ACK acknowledges.
		v = &wire{isn: own.isn, opened: own.opened, end: own.isn + 1, scale: own.scale, core: w.check.cores, ahead: true}
		w.check.flows[f] = v
	}
	// Guests that draw their ISNs at random may draw one again: the copy of a generator gives the same. A SYN|ACK that is
	// repeated acknowledges what has come meanwhile (R2).
	if v == nil || p.syn() && (p.seq != v.isn || p.ack-v.opened > 1<<24 && p.ack != 0 && v.opened != 0) {
		if !p.syn() {
			return // the tail of a connection that was before
		}
		v = &wire{isn: p.seq, opened: p.opens(), end: p.seq, scale: p.scale(), core: w.check.cores}
		w.check.flows[f] = v
	}
	if p.rst() {
		return
	}
	w.forward(h, &p, v)
	if w.compares(h) {
		w.released(h, &p, v)
	}
}

// opens is what the guest has sent on a connection at whose very beginning p is, by its numbers; nil: p is not.
func (h *host) opens(p *packet) *said {
	if p.syn() || h.qemu == nil || h.qemu.guest == nil {
		return nil
	}
	own := h.qemu.guest.said[p.flow()]
	if own == nil || !own.syn || p.seq-own.isn-1 > uint32(own.data.len) {
		return nil
	}
	return own
}

// replicas: while a secondary is covered, its image has every write that its primary's has (R24).
func replicas(w *world, h *host) {
	for key, value := range h.disk.image {
		if got := h.other().disk.image[key]; got != value {
			w.failf("replica", "a checkpoint is committed, and key %d is %d on %s and %d on the secondary's", key, value, h.name, got)
		}
	}
}

// bounded: a flood of SYNs takes no more room than it may (R11).
func bounded(w *world, h *host) {
	if d := h.daemon; d != nil && d.loop != nil && d.loop.Primary != nil {
		others := len(w.sc.Conns)
		for i := range w.sc.Conns {
			opened := false
			for _, r := range w.sc.Conns[i].Requests {
				if r.Kind == 'O' || r.Kind == 'N' && opened { // the guest opens another one, or the client from its end of that one
					others, opened = others+1, true
				}
			}
		}
		if n := d.loop.Primary.Stats().Connections; n > maxHalfOpen+others {
			w.failf("bounds", "%s knows %d connections, of which %d are no flood's", h.name, n, others)
		}
	}
}

// split: two hosts may have served. Without an arbiter, hosts that lost each other may both; and
// an operator who changes the arbiter's entry takes that upon himself.
func (w *world) split() bool { return w.edited || w.sc.Arbiter == arbiterNone && w.apart }

// excuses reports whether a fault of that kind is none: two hosts may have served, or an operator
// has, by force, had a secondary take over that did not know all that clients did.
func (w *world) excuses(kind string) bool {
	switch kind {
	case "connection", "stream", "disk", "ack", "window", "timestamp", "liveness", "datagram", "datagram twice":
		return w.forced || w.split()
	case "two speakers", "guest lost", "availability", "replica":
		return w.split()
	case "release":
		return w.edited
	}
	return false
}

// doubt: P's daemon knows that the PVM was stopped, and not for a checkpoint (R15).
func (w *world) doubt(d *daemon) {
	if d.isPrimary() && d.pair.p.State() == failover.PrimaryPair {
		w.check.doubt = true
	}
}

// inDoubt: a frame of a connection does not leave, since nobody knows in whose numbers it is (R22). The connection may end.
func (w *world) inDoubt(t compare.Tuple) {
	w.reach("in doubt")
	for _, a := range w.client.conns {
		a.lost = a.lost || a.port == t.RemotePort
	}
}

// evicted reports whether P may have lost sight of a connection that goes on (R11).
func (h *host) evicted() bool {
	d := h.daemon
	return d != nil && d.loop != nil && d.loop.Primary != nil && d.loop.Primary.Stats().Evicted > 0
}

// wanted: P asks for a checkpoint. A connection on which both guests make progress needs none (R7):
// what leaves shows it, unless it is the repetition of what could not leave without a lease.
func (w *world) wanted(h *host, flow, why string) {
	w.reach("wanted: " + why)
	if why != compare.ReasonTimeout.String() || h.id != w.check.speaker || h.nic.Count(bpf.LockstepLsReasonLS_R_muted) > 0 {
		return
	}
	for f, v := range w.check.flows {
		if f.String() == flow && !h.evicted() { // a flood can cost S the offset, too, and a checkpoint makes it 0 (R11)
			w.check.stalls++
		}
		if ago := time.Duration(w.now - v.moved); f.String() == flow && ago < w.sc.compare().Timeout/2 {
			w.failf("checkpoints", "%s asks for one because of %s, where something has left %v ago", h.name, flow, ago)
		}
	}
}

// said describes what this host's guest has acknowledged.
func (h *host) said(p *packet) string {
	if h.qemu == nil || h.qemu.guest == nil || h.qemu.guest.said[p.flow()] == nil {
		return "unknown"
	}
	v := h.qemu.guest.said[p.flow()]
	return fmt.Sprintf("%d to %d", v.ack, v.edge)
}

// forward: nothing goes back.
func (w *world) forward(h *host, p *packet, v *wire) {
	if end := p.end(); after(end, v.end) {
		if w.check.doubt && h.pinned().Mode == datapath.ModeHold {
			w.failf("doubt", "%s releases %v, which is new, and the PVM was stopped unasked since the last commit", h.name, *p)
		}
		v.end, v.moved = end, w.now
	}
	if p.hasACK() && !w.check.replays && !h.cookieAgain(p, v) {
		shift := v.scale
		if p.syn() {
			shift = 0
		}
		edge := p.ack + uint32(p.win)<<shift
		lost := uint32(1)<<shift - 1 // what the field cannot express
		switch {
		case v.acked && after(v.ack, p.ack):
			w.failf("ack", "%s: %v, and %d was acknowledged before", h.name, *p, v.ack)
		case p.syn(), v.reset: // the window of one that is repeated is not scaled, and nobody goes by it
		case v.acked && after(v.edge, edge+lost) && v.core == w.check.cores && !h.evicted():
			w.failf("window", "%s: %v, and the window reached to %d before; the guest's own: %s", h.name, *p, v.edge, h.said(p))
		}
		if !v.acked || after(edge, v.edge) {
			v.edge = edge
		}
		v.acked, v.ack = true, p.ack
	}
	if p.syn() && v.ahead {
		v.ahead, v.stamped = false, false
	}
	if ts, ok := p.timestamp(); ok {
		if p.syn() && w.sc.SynCookies {
			return // its low bits are options
		}
		if v.stamped && after(v.stamp, ts) {
			w.failf("timestamp", "%s: %v has timestamp %d, and %d has left before", h.name, *p, ts, v.stamp)
		}
		v.stamped, v.stamp = true, ts
	}
}

// cookieAgain reports whether p is of a connection that a late ACK has made of the SYN cookie again, after the guest
// had closed the first one, or the client reset it. It knows nothing of what came later. A cookie holds for the handshake's
// ACK, and, as in Linux, for a later one whose two numbers have grown by almost as much.
func (h *host) cookieAgain(p *packet, v *wire) bool {
	switch {
	case !h.w.sc.SynCookies || h.qemu == nil || h.qemu.guest == nil:
		return false
	case len(p.payload) == 0 && p.ack == v.opened && p.seq-v.isn <= 1:
		return true
	}
	own := h.qemu.guest.said[p.flow()]
	return own != nil && own.again
}

// released: the SVM could go on from here.
func (w *world) released(h *host, p *packet, v *wire) {
	svm := h.qemu.follower
	if svm == nil || svm.guest == nil {
		w.failf("release", "%s releases %v, and nobody follows", h.name, *p)
		return
	}
	w.check.compared++
	theirs := svm.guest.said[p.flow()].of(v.opened)
	if theirs == nil {
		w.failf("release", "%s releases %v, and the SVM knows nothing of the connection", h.name, *p)
		return
	}
	if theirs.isn != v.isn {
		w.reach("guests' ISNs differ")
	}
	if p.hasACK() {
		shift := v.scale
		if p.syn() {
			shift = 0
		}
		if edge := p.ack + uint32(p.win)<<shift; after(p.ack, theirs.ack) || after(edge, theirs.edge) {
			w.failf("release", "%s acknowledges %v, and the SVM only %d, its window to %d", h.name, *p, theirs.ack, theirs.edge)
			return
		}
	}
	if p.syn() {
		if !theirs.syn {
			w.failf("release", "%s releases %v, which the SVM has not sent", h.name, *p)
		}
		return
	}
	from := int(int32(p.seq - v.isn - 1))
	if from < 0 || len(p.payload) == 0 && !p.fin() {
		return // a keep-alive, or nothing but an acknowledgment
	}
	to := from + len(p.payload)
	if !theirs.data.holds(from, p.payload) {
		w.failf("release", "%s releases %v, bytes %d to %d, and the SVM has sent %d, or others", h.name, *p, from, to, theirs.data.len)
		return
	}
	if p.fin() && (!theirs.fin || to != theirs.data.len) {
		w.failf("release", "%s releases %v, and the SVM has not closed there", h.name, *p)
	}
}
