// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"errors"
	"net/netip"
	"slices"

	"github.com/lockstep-ft/lockstep/sim/tcp"
)

// What may become of a connection whose ports were another one's a moment ago, or of one in its handshake, though nobody
// does anything wrong: TCP has it so, with a proxy or without.

// wireOf is the connection that the newest SYN|ACK has begun when a frame of the guest's leaves; nil: none.
func (c *client) wireOf(frame []byte) *wire {
	p, ok := parse(frame)
	if !ok {
		return nil
	}
	return c.w.check.flows[p.flow()]
}

// mixes gives up a connection that takes data of the one before it, named by of, for its own. That one was reset, so nobody
// has waited for what was under way; its numbers lie in the window where it was faster than the clock of ISNs, and there are no
// timestamps, or those of the same millisecond (RFC 9293, 3.4.3).
func (c *client) mixes(frame []byte, of *wire) {
	p, ok := parse(frame)
	if !ok || len(p.payload) == 0 {
		return
	}
	a := c.at(p.flow())
	if a == nil || a.again == 0 || of == c.wireOf(frame) || c.stack.State(a.id) != tcp.Established {
		return
	}
	if _, isn := tcp.Initial(c.stack, a.id); p.end()-isn-1 < 1<<20 { // more than is under way within that time
		c.w.reach("data of the connection before")
		a.lost, a.mixed = true, true
	}
}

// mixesAtGuest is mixes for a frame of the client's: the guest may take it for data that the connection has yet to send.
func (c *client) mixesAtGuest(frame []byte) {
	p, ok := parse(frame)
	if !ok || len(p.payload) == 0 {
		return
	}
	a := c.at(flow{p.src, p.srcPort, p.dstPort})
	if a == nil || a.again == 0 {
		return
	}
	if ahead := p.end() - tcp.Next(c.stack, a.id) - 1; ahead < 1<<20 {
		c.w.reach("data of the connection before, at the guest")
		a.lost, a.mixed = true, true
	}
}

// misses reports whether both ends were to open a connection at once, and the guest, which was late, refused the client's SYN.
// A repetition of that which meets the guest's own SYN later is of no connection that the client knows, and resets the guest's.
func (c *client) misses(a *asking) bool {
	return a.moving && a.dialed && a.now().Kind == 'O' && errors.Is(c.stack.Err(a.dial), tcp.ErrRefused)
}

// opening reports whether the guest has answered nothing on this connection: its handshake may not be over.
func (a *asking) opening() bool {
	return !slices.ContainsFunc(a.plan.Requests[a.first:a.reply], func(r Request) bool { return r.Kind != 'W' && r.Kind != 'Z' })
}

// refused reports whether the guest may have refused a connection in its handshake. It keeps nothing of a SYN that it has
// answered with a cookie: what overtakes the handshake's last ACK belongs to nothing, and Linux answers it by a RST.
func (c *client) refused(a *asking) bool {
	q := c.w.hosts[c.w.check.speaker].qemu
	if !c.w.sc.SynCookies || !a.opening() || q == nil || q.guest == nil {
		return false
	}
	own := q.guest.said[flow{c.w.sc.clientAddr(), a.port, servicePort}]
	if own == nil || !own.refused {
		return false
	}
	c.w.reach("refused ahead of its cookie")
	return true
}

// astray reports whether the guest is at an earlier connection from the same port: a late ACK has made one of that one's SYN
// cookie. Neither end has sent what the other's segments acknowledge, so both ignore them (RFC 9293, 3.10.7.4), and go on
// until they give up: no proxy can help them.
func (c *client) astray(a *asking) bool {
	q := c.w.hosts[c.w.check.speaker].qemu
	if !c.w.sc.SynCookies || q == nil || q.guest == nil {
		return false
	}
	stack := q.guest.stack
	_, port := c.stack.Tuple(a.id)
	id, ok := stack.Find(netip.AddrPortFrom(c.w.sc.clientAddr(), port), servicePort)
	if state := c.stack.State(a.id); !ok || stack.State(id) != tcp.Established || state != tcp.Established && state != tcp.FinWait2 {
		return false
	}
	begun, _ := tcp.Initial(c.stack, a.id)
	_, met := tcp.Initial(stack, id)
	if begun != met {
		c.w.reach("guest at an earlier connection by its cookie")
	}
	return begun != met
}

// patience is how long the ends of a connection wait before they repeat something: long, where a frozen guest's late answers have
// been taken for the time of the network; twice as long for the second time.
func (c *client) patience(a *asking) int64 {
	most := tcp.Patience(c.stack, a.id)
	if q := c.w.hosts[c.w.check.speaker].qemu; q != nil && q.guest != nil {
		_, port := c.stack.Tuple(a.id)
		if id, ok := q.guest.stack.Find(netip.AddrPortFrom(c.w.sc.clientAddr(), port), servicePort); ok {
			most = max(most, tcp.Patience(q.guest.stack, id))
		}
	}
	return most
}

// flooded reports whether a flood can have cost a connection its SYN|ACK each time (R11): the guest repeats it together with
// those of the flood, which take all slots that SYNs may use.
func (c *client) flooded(a *asking) bool {
	return len(c.w.sc.Floods) > 0 && c.stack.State(a.id) == tcp.SynSent
}
