// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"errors"
	"fmt"
	"math"
	"net/netip"

	"github.com/lockstep-ft/lockstep/sim/tcp"
)

// Variant is what TCP does in some worlds only. Guests and clients are alike in it.
type Variant struct {
	IPv6                    bool
	HopOptions, DestOptions bool // IPv6 extension headers
	SynCookies, FastOpen    bool
	ECN                     int // 1: RFC 3168, 2: AccECN
	Mark                    int // the network marks frames that can be marked, in 1/1000
	Keepalive               int64
	SeqWrap, TSWrap         int // numbers wrap so many bytes, or ticks, after a connection's beginning at most
}

func (v *Variant) config(c *tcp.Config) {
	c.HopOptions, c.DestOptions, c.ECN = v.HopOptions, v.DestOptions, v.ECN > 0
	c.AccECN, c.SynCookies, c.FastOpen = v.ECN > 1, v.SynCookies, v.FastOpen
	c.Keepalive = duration(v.Keepalive)
	c.SeqWrap, c.TSWrap = uint32(v.SeqWrap), uint32(v.TSWrap)
}

func (v *Variant) guestAddr() netip.Addr {
	if v.IPv6 {
		return guestAddr6
	}
	return guestAddr
}

func (v *Variant) clientAddr() netip.Addr {
	if v.IPv6 {
		return clientAddr6
	}
	return clientAddr
}

// script is how far a client is with requests that are about the connection itself:
//
//	U n  n bytes there and back, the last of them urgent
//	Z n  the client reads nothing for n ms, so its window closes
//	Y n  the guest reads nothing for n ms
//	H    the client sends FIN, and the guest what it still has to send
//	F n  the guest sends FIN, and the client n bytes behind that
//	Q n  the guest closes; the client does so n µs after it has asked for that, with n < 0 when it has got the FIN
//	N n  the connection is closed, first by the client (0) or by the guest (1), and another one opened between the same ports
//	O n  the guest opens a connection, on which the script goes on: (1) while the client opens it too, (2) from a port that it draws
//	X n  the guest resets the connection in state n
type script struct {
	deaf     int64 // nothing is read before then
	finAt    int64 // FIN is sent then; 0: behind the last answer
	urgentTo int   // the urgent byte in out is in front of this
	mark     int   // what of in was in front of the end of urgent data, and that byte
	half     bool  // the guest has sent FIN, and goes on receiving
	moving   bool  // the script goes on on another connection, which is not there yet
	dialAt   int64 // that one is dialed; 0: not
	dialed   bool
	dial     tcp.ID
	listens  uint16 // where the guest opens one to
}

// at is what a flow's connection is for; nil: for nothing any more.
func (c *client) at(f flow) *asking {
	for _, a := range c.conns {
		if a.open {
			if _, port := c.stack.Tuple(a.id); port == f.remotePort {
				return a
			}
		}
	}
	return nil
}

// now is the request that is under way, 0 if none is.
func (a *asking) now() (r Request) {
	if a.reply < len(a.plan.Requests) {
		r = a.plan.Requests[a.reply]
	}
	return r
}

// wakeAt is when the client has something to do on a connection; math.MaxInt64: never.
func (a *asking) wakeAt(now int64) int64 {
	next := int64(math.MaxInt64)
	for _, at := range [...]int64{a.rest, a.deaf, a.finAt, a.dialAt} {
		if at > now {
			next = min(next, at)
		}
	}
	return next
}

// begin begins with a request. took: there is nothing to be sent for it. stop: it has to wait.
func (c *client) begin(a *asking, r *Request) (took, stop bool) {
	w := c.w
	switch r.Kind {
	case 'Z', 'Q', 'N', 'O', 'X', 'U', 'F':
		if a.reply < a.next {
			return false, true
		}
	}
	switch r.Kind {
	case 'U':
		a.out = fmt.Appendf(a.out, "U %d\n", r.N)
		a.out = append(a.out, pattern(int(r.N))...)
		a.urgentTo, a.mark = len(a.out), 0
	case 'Z':
		a.deaf = w.now + r.N*ms
		a.next, a.reply = a.next+1, a.reply+1
		return true, false
	case 'Y', 'F':
		a.out = fmt.Appendf(a.out, "%c %d\n", r.Kind, r.N)
	case 'H':
		if c.stack.State(a.id) == tcp.SynSent && c.stack.Unsent(a.id) > 0 { // that would be forgotten, too
			return false, true
		}
		c.shut(a)
	case 'Q':
		a.out = append(a.out, "Q\n"...)
		if r.N >= 0 {
			a.finAt = w.now + r.N*us
		}
	case 'X':
		a.out = fmt.Appendf(a.out, "X %d\n", r.N)
		switch tcp.State(r.N) {
		case tcp.CloseWait, tcp.LastAck:
			a.finAt = w.now
		case tcp.Closing:
			a.finAt = w.now + w.sc.NetDelay + 100*us
		}
	case 'N':
		a.moving = true
		if r.N == 0 && c.stack.State(a.id) != tcp.SynSent { // else it would only be forgotten
			c.shut(a)
		} else {
			a.out = append(a.out, "Q\n"...)
		}
	case 'O':
		a.moving, a.listens = true, 30000+uint16(c.opened)
		c.opened++
		c.stack.Listen(a.listens)
		a.out = fmt.Appendf(a.out, "O %d %d\n", a.listens, r.N)
		if r.N == 1 {
			a.dialAt = w.now + w.sc.NetDelay + 200*us
		}
	}
	return false, false
}

func (c *client) shut(a *asking) {
	a.shut = true
	c.stack.CloseWrite(c.w.now, a.id)
	if c.stack.State(a.id) == tcp.Closed { // its SYN had waited for data
		c.w.after(1*us, c.goOn)
	}
}

// done: the request under way is over.
func (c *client) done(a *asking) {
	a.reply++
	a.sent = a.sent[1:]
	a.moved = c.w.now
	c.w.check.answers++
}

// due does what the script has time for now.
func (c *client) due(a *asking) {
	w := c.w
	if a.finAt > 0 && a.finAt <= w.now && !a.shut && len(a.out) == 0 {
		c.shut(a)
	}
	if a.moving {
		c.move(a)
	}
}

// move has the script go on on another connection as soon as that is there.
func (c *client) move(a *asking) {
	w := c.w
	remote := netip.AddrPortFrom(w.sc.guestAddr(), servicePort)
	_, port := c.stack.Tuple(a.id)
	if a.now().Kind == 'N' {
		switch state := c.stack.State(a.id); {
		case state == tcp.TimeWait && a.dialAt == 0:
			a.dialAt = w.now + 1100*ms // tcp_tw_reuse
			return
		case state == tcp.TimeWait && a.dialAt <= w.now, state == tcp.Closed:
			id := c.stack.Dial(w.now, remote, port)
			if c.stack.Err(id) != nil { // a segment that came in TIME-WAIT has made it younger
				a.dialAt = w.now + 100*ms
				return
			}
			w.reach(fmt.Sprintf("ports again, client %v", state))
			c.done(a)
			c.goOnWith(a, id)
		}
		return
	}
	if a.dialAt > 0 && a.dialAt <= w.now {
		a.dialAt, a.dialed = 0, true
		a.dial = c.stack.Dial(w.now, netip.AddrPortFrom(remote.Addr(), a.listens), a.listens)
	}
	id, ok := c.stack.Accept(a.listens)
	if !ok && a.dialed && c.stack.State(a.dial) == tcp.Established {
		id, ok = a.dial, true
	}
	if ok {
		c.stack.Close(w.now, a.id)
		w.reach("the guest opens a connection")
		c.goOnWith(a, id) // which the guest greets
	}
}

func (c *client) goOnWith(a *asking, id tcp.ID) {
	a.first = a.reply
	a.id, a.in, a.shut, a.script = id, nil, false, script{}
}

// ends: the guest has closed its side of a connection. It reports true if it is not to be closed now.
func (c *client) ends(a *asking, state tcp.State) bool {
	r := a.now()
	switch {
	case a.half:
		return state != tcp.Closed && state != tcp.TimeWait
	case r.Kind == 'H' || r.Kind == 'Q':
		c.done(a)
	case r.Kind == 'X':
		if state != tcp.Closed && state != tcp.TimeWait {
			return true
		}
		c.done(a) // it was closed here before the RST came
	case a.moving:
		if r.Kind == 'N' && !a.shut {
			c.shut(a)
		}
		return true
	}
	return false
}

// expects reports whether a connection was to end with this error.
func (c *client) expects(a *asking, err error) bool {
	r := a.now()
	if r.Kind != 'X' || !errors.Is(err, tcp.ErrReset) {
		return false
	}
	c.done(a)
	return true
}

// urgent takes down where the stack says that urgent data ends.
func (c *client) urgent(a *asking) {
	if n, ok := c.stack.Urgent(a.id); ok && a.now().Kind == 'U' {
		a.mark = len(a.in) + n
	}
}

// write writes what it can of out, and returns how much that is.
func (c *client) write(a *asking) int {
	if a.urgentTo == 0 {
		return c.stack.Write(c.w.now, a.id, a.out)
	}
	n := c.stack.Write(c.w.now, a.id, a.out[:a.urgentTo-1])
	if n == a.urgentTo-1 {
		n += c.stack.WriteUrgent(c.w.now, a.id, a.out[n:n+1])
	}
	a.urgentTo -= n
	return n
}

// answered: the answer to r has come.
func (c *client) answered(a *asking, r *Request) {
	switch r.Kind {
	case 'U':
		if a.mark != int(r.N) {
			c.w.failf("urgent", "connection %d: urgent data ends at %d, and has to at %d", a.id, a.mark, r.N)
		}
		c.w.reach("urgent data arrived")
	case 'F':
		a.half, a.out = true, pattern(int(r.N))
	}
}

// Actions that Generate does not draw: a client's connection is reset, which it has to expect; the QEMU that
// serves dies, as soon as the other host can take over. And one that it draws by itself: a guest panics, which the other one does not.
const (
	clientAborts = "client-aborts"
	coveredDeath = "covered-death"
	panicGuest   = "panic-guest"
)

func (w *world) killCovered() {
	if !w.covered(w.hosts[w.check.speaker]) {
		w.after(5*ms, w.killCovered)
		return
	}
	w.begin(&Action{Kind: "kill-qemu", Host: w.check.speaker})
}

// abort has the client reset the first connection that it has.
func (c *client) abort() {
	for _, a := range c.conns {
		if a.open {
			c.stack.Abort(c.w.now, a.id)
			a.open, a.ended = false, true
			c.goOn()
			return
		}
	}
}

// ending is how far a guest is with such requests.
type ending struct {
	sleep int64 // nothing is read before then, on the guest's clock; 0: it does not sleep
	oob   bool  // the last byte of the body goes back as urgent data
	half  bool  // FIN follows what was written, and the body is read behind that
	abort tcp.State
}

// sleeps reports whether the service does not read now.
func (c *serving) sleeps(now int64) bool {
	if c.sleep > now {
		return true
	}
	if c.sleep > 0 {
		c.sleep = 0
		c.out = append(c.out, "Y\n"...)
	}
	return false
}

// variant is a request of [script].
func (g *guest) variant(now int64, id tcp.ID, c *serving, kind byte, number func(int) int, random func() uint32) {
	switch kind {
	case 'U':
		c.body, c.echo, c.oob = number(1), true, true
	case 'Y':
		c.sleep = now + int64(number(1))*ms
	case 'F':
		c.out = append(c.out, "F\n"...)
		c.body, c.echo, c.half = number(1), false, true
	case 'X':
		c.abort = tcp.State(number(1))
	case 'O':
		to, _ := g.stack.Tuple(id)
		port := uint16(number(1))
		remote := netip.AddrPortFrom(to.Addr(), port)
		if number(2) == 2 {
			port = 33000 + uint16(random()%20000)
		}
		id := g.stack.Dial(now, remote, port)
		g.conns[id] = &serving{out: []byte("O\n")}
		g.order = append(g.order, id)
	}
}

// write writes n bytes of out, or fewer, and returns how many.
func (g *guest) write(now int64, id tcp.ID, c *serving, n int) int {
	if !c.oob || c.body > 0 || n < len(c.out) {
		return g.stack.Write(now, id, c.out[:n])
	}
	wrote := g.stack.Write(now, id, c.out[:n-1])
	if wrote == n-1 && g.stack.WriteUrgent(now, id, c.out[n-1:]) == 1 {
		wrote, c.oob = n, false
	}
	return wrote
}

// end ends a connection in one of the unusual ways.
func (g *guest) end(now int64, id tcp.ID, c *serving) {
	if c.half && len(c.out) == 0 {
		g.stack.CloseWrite(now, id)
	}
	switch c.abort {
	case tcp.Closed:
		return
	case tcp.FinWait1, tcp.FinWait2, tcp.Closing:
		g.stack.CloseWrite(now, id)
	case tcp.LastAck:
		if c.eof {
			g.stack.CloseWrite(now, id)
		}
	}
	if !c.closed && g.stack.State(id) == c.abort {
		c.closed = true
		g.stack.Abort(now, id)
	}
}
