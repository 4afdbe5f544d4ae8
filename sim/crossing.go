// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"time"

	"github.com/lockstep-ft/lockstep/sim/tcp"
)

// talk is what was seen of a connection between the guest and a client.
type talk struct {
	side   [2]talker // the guest, and the client
	closes bool      // a FIN was seen
}

// talker is one end's newest segment.
type talker struct {
	ack     uint32
	win     uint16
	probed  bool // the other end has probed its window since
	stamp   uint32
	stamped bool
}

var sides = [2]string{"guest", "client"}

// cross is a frame between the guest and a client. It has happen what is to happen behind so many
// frames, takes down for coverage what the frame shows, and returns it as it arrives. reset: it is a client's RST.
func (w *world) cross(frame []byte, fromGuest bool) (arrives []byte, reset bool) {
	w.crossed++
	for i := range w.sc.Actions {
		if a := &w.sc.Actions[i]; a.Behind == w.crossed {
			w.after(a.At, func() { w.begin(a) })
		}
	}
	p, ok := parse(frame)
	if !ok {
		return frame, false
	}
	f, side := p.flow(), 0
	if !fromGuest {
		f, side = flow{p.src, p.srcPort, p.dstPort}, 1
	}
	t := w.talks[f]
	if t == nil || p.syn() && !p.hasACK() {
		t = new(talk)
		w.talks[f] = t
	}
	observe(w, t, &p, f, side)
	if w.sc.Mark > 0 && p.tos&3 == 2 && w.chance(rndNet, w.sc.Mark) {
		w.reach("congestion marked, of the " + sides[side])
		frame = marked(frame)
	}
	return frame, !fromGuest && p.rst()
}

// observe takes down what a segment shows.
func observe(w *world, t *talk, p *packet, f flow, side int) {
	who := sides[side]
	own, other := &t.side[side], &t.side[1-side]
	if side == 1 && p.syn() && p.option(3) == nil {
		w.unscaled(f)
	}
	if p.syn() || p.rst() {
		switch {
		case p.rst():
			w.reach("RST of the " + who)
			if v := w.check.flows[f]; v != nil && side == 1 {
				v.reset = true
			}
			if a := w.client.at(f); side == 0 && p.hasACK() && a != nil && a.now().Kind == 'X' {
				w.reach("reset by the guest in " + tcp.State(a.now().N).String())
			}
		case p.hasACK() && side == 1 && w.talkedFirst(f):
			w.reach("simultaneous open")
		}
		if len(p.payload) > 0 {
			w.reach("data in a SYN of the " + who)
		}
	} else {
		if len(p.payload) == 0 && !p.fin() && p.seq == other.ack-1 {
			if other.win == 0 {
				other.probed = true
				w.reach("window probe of the " + who)
			} else {
				w.reach("keep-alive of the " + who)
			}
		}
		if p.win == 0 {
			w.reach("window closed, of the " + who)
		}
		if own.probed {
			own.probed = false
			w.reach("window probe answered by the " + who)
		}
		if p.flags&32 != 0 {
			w.reach("urgent data of the " + who)
		}
		if p.flags&64 != 0 {
			w.reach("ECE of the " + who)
		}
		if p.ae && len(p.payload) > 0 {
			w.reach("AccECN of the " + who)
		}
		if p.flags&128 != 0 {
			w.reach("CWR of the " + who)
		}
		own.ack, own.win = p.ack, p.win
	}
	if end := p.seq + uint32(len(p.payload)); end < p.seq {
		w.reach("sequence numbers wrap, of the " + who)
	}
	if ts, ok := p.timestamp(); ok {
		if own.stamped && ts < own.stamp && after(ts, own.stamp) {
			w.reach("timestamps wrap, of the " + who)
		}
		own.stamp, own.stamped = ts, true
	}
	if t.closes = t.closes || p.fin(); t.closes {
		w.reach("closing: the guest in " + w.guestState(f))
	}
}

// unscaled: the client does not scale windows, so the guest does not either, whatever its SYN has offered.
func (w *world) unscaled(f flow) {
	if v := w.check.flows[f]; v != nil {
		v.scale = 0
	}
	for _, h := range w.hosts {
		if q := h.qemu; q != nil && q.guest != nil && q.guest.said[f] != nil {
			q.guest.said[f].scale = 0
		}
	}
}

// talkedFirst reports whether the client has opened this connection, too.
func (w *world) talkedFirst(f flow) bool {
	return slices.ContainsFunc(w.client.conns, func(a *asking) bool { return a.dialed && a.listens == f.remotePort })
}

// guestState is that of a connection in the guest that serves.
func (w *world) guestState(f flow) string {
	q := w.hosts[w.check.speaker].qemu
	if q == nil || q.guest == nil {
		return "no state"
	}
	id, ok := q.guest.stack.Find(netip.AddrPortFrom(f.remote, f.remotePort), f.guestPort)
	if !ok {
		return tcp.Closed.String()
	}
	return q.guest.stack.State(id).String()
}

// meets: a client's RST is about to arrive.
func (w *world) meets(frame []byte) {
	p, _ := parse(frame)
	w.reach("reset by a client in " + w.guestState(flow{p.src, p.srcPort, p.dstPort}))
}

// marked is a frame in which the network says that it is congested.
func marked(frame []byte) []byte {
	frame = slices.Clone(frame)
	if frame[12] == 0x86 {
		frame[15] |= 3 << 4
		return frame
	}
	// RFC 1624; ECT(0) becomes CE, one more.
	frame[15] |= 3
	sum := uint32(^binary.BigEndian.Uint16(frame[24:])) + 1
	binary.BigEndian.PutUint16(frame[24:], ^uint16(sum+sum>>16))
	return frame
}

func duration(ns int64) time.Duration { return time.Duration(ns) }
