// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"

	"github.com/lockstep-ft/lockstep/sim/tcp"
)

var (
	guestAddr   = netip.AddrFrom4([4]byte{10, 0, 0, 1})
	clientAddr  = netip.AddrFrom4([4]byte{10, 0, 0, 2})
	floodAddr   = netip.AddrFrom4([4]byte{10, 0, 0, 3})
	guestAddr6  = netip.MustParseAddr("fd00::1")
	clientAddr6 = netip.MustParseAddr("fd00::2")
)

// client is everybody outside the pair: one stack with many connections.
type client struct {
	w           *world
	stack       *tcp.Stack
	conns       []*asking
	questioners []*questioner
	wakeUp      alarm
	opened      int      // connections by the guest
	last        [2]int64 // when the newest frame arrives at the switch, and at the client
}

// asking is a connection and what is asked on it, one after the other.
type asking struct {
	plan  *Conn
	id    tcp.ID
	port  uint16
	open  bool
	begun bool
	next  int // request to be sent
	reply int // request whose answer is due
	first int // the first one on this connection
	rest  int64
	out   []byte
	in    []byte
	shut  bool
	ended bool
	lost  bool  // the guest that it was with is gone
	mixed bool  // it has data of the connection before it
	broke bool  // the other end reset it, or it timed out
	moved int64 // when it last read, or wrote
	wrote uint32
	sent  []int64 // when each request was
	quits bool    // it is about to reset the connection
	again int     // where it goes on after that; 0: it has not
	reset int64   // when it has, by the time for which the guest that serves has run
	script
}

func newClient(w *world) *client {
	c := &client{w: w}
	c.wakeUp.do = c.goOn
	cfg := w.sc.stack()
	cfg.MAC, cfg.PeerMAC = [6]byte{2, 0, 0, 0, 0, 2}, [6]byte{2, 0, 0, 0, 0, 1}
	cfg.Addr, cfg.Secret = w.sc.clientAddr(), w.rnd(rndClient).Uint64()
	c.stack = tcp.New(cfg, w.rnd(rndClient).Uint64())
	for i := range w.sc.Conns {
		a := &asking{plan: &w.sc.Conns[i]}
		c.conns = append(c.conns, a)
		w.after(a.plan.At, func() {
			a.begun, a.open, a.port = true, true, uint16(20000+i)
			c.dial(a)
			c.goOn()
		})
	}
	for i := range w.sc.Floods {
		c.flood(i)
	}
	for i := range w.sc.Exchanges {
		c.question(i)
	}
	return c
}

func (c *client) dial(a *asking) {
	a.id = c.stack.Dial(c.w.now, netip.AddrPortFrom(c.w.sc.guestAddr(), servicePort), a.port)
}

// flood are SYNs of an address that does not answer.
func (c *client) flood(i int) {
	w, f := c.w, &c.w.sc.Floods[i]
	cfg := w.sc.stack()
	cfg.MAC, cfg.PeerMAC = [6]byte{2, 0, 0, 0, 0, 2}, [6]byte{2, 0, 0, 0, 0, 1}
	cfg.Addr, cfg.Secret = floodAddr, w.rnd(rndClient).Uint64()
	stack := tcp.New(cfg, w.rnd(rndClient).Uint64())
	w.after(f.At, func() {
		for n := range f.SYNs {
			stack.Dial(w.now, netip.AddrPortFrom(guestAddr, servicePort), uint16(1000*(i+1)+n))
		}
		c.send(stack.Take())
	})
}

// receive is a frame from the switch.
func (c *client) receive(frame []byte) {
	w, sc := c.w, c.w.sc
	frame, _ = w.cross(frame, true)
	if w.chance(rndNet, sc.NetLoss) {
		return
	}
	of := c.wireOf(frame)
	w.after(c.delay(1), func() {
		c.mixes(frame, of)
		c.stack.Input(w.now, frame)
		c.goOn()
	})
}

// delay is a frame's time on the network, in which it may overtake others.
func (c *client) delay(way int) int64 {
	w, sc := c.w, c.w.sc
	d := sc.NetDelay + w.between(rndNet, 5*us, 30*us)
	if w.chance(rndNet, sc.NetReorder) {
		return d + w.between(rndNet, 50*us, 3*ms)
	}
	at := max(w.now+d, c.last[way]+1)
	c.last[way] = at
	return at - w.now
}

// goOn lets the client do all that it can.
func (c *client) goOn() {
	w := c.w
	c.stack.Tick(w.now)
	for _, a := range c.conns {
		if a.open {
			c.work(a)
		}
	}
	for _, q := range c.questioners {
		c.ask(q)
	}
	c.send(c.stack.Take())
	next := c.nextQuestion(c.stack.NextDeadline())
	for _, a := range c.conns {
		if a.open {
			next = min(next, a.wakeAt(w.now))
		}
	}
	if next == math.MaxInt64 {
		w.unset(&c.wakeUp)
		return
	}
	w.set(&c.wakeUp, max(next-w.now, 1*us))
}

// send has frames go to where the guest is thought to be.
func (c *client) send(frames [][]byte) {
	w := c.w
	for _, f := range frames {
		if w.chance(rndNet, w.sc.NetLoss) {
			continue
		}
		f, reset := w.cross(f, false)
		w.after(c.delay(0), func() {
			if reset {
				w.meets(f)
			}
			c.mixesAtGuest(f)
			w.hosts[w.port].fromWire(f)
		})
	}
}

// work goes on with one connection.
func (c *client) work(a *asking) {
	w := c.w
	var buf [4096]byte
	c.due(a)
	for a.deaf <= w.now {
		c.urgent(a)
		n, eof := c.stack.Read(w.now, a.id, buf[:])
		a.in = append(a.in, buf[:n]...)
		if n > 0 {
			a.moved = w.now
		}
		c.answers(a)
		if n > 0 {
			continue
		}
		state := c.stack.State(a.id)
		if err := c.stack.Err(a.id); err != nil {
			if a.again > 0 && (w.now-w.stood-a.reset < stale || errors.Is(err, tcp.ErrRefused)) {
				c.reopen(a)
				return
			}
			a.open, a.ended, a.broke = false, true, true
			w.logf("client: connection %d: %v", a.id, err)
			if c.expects(a, err) {
				return
			}
			if errors.Is(err, tcp.ErrTimeout) && w.fatal > 1 && !w.serves() {
				w.reach("connection timed out while nobody served")
				a.lost = true // as nobody may be left who does (see quiet)
			}
			w.reach("connection broken")
			// A flood may cost a connection that is half-open: its offset is forgotten (R11).
			if flooded := len(w.sc.Floods) > 0 && a.opening(); !a.lost && !flooded && !c.refused(a) {
				w.failf("connection", "connection %d broke: %v, at request %d of %d", a.id, err, a.reply, len(a.plan.Requests))
			}
			return
		}
		if eof || state == tcp.Closed {
			if c.ends(a, state) {
				break
			}
			if a.reply < len(a.plan.Requests) && !a.mixed {
				w.failf("stream", "connection %d ended by the guest at request %d of %d", a.id, a.reply, len(a.plan.Requests))
			}
			c.stack.Close(w.now, a.id)
			a.open, a.ended = false, true
			return
		}
		break
	}
	for a.next < len(a.plan.Requests) && a.rest <= w.now && !a.moving && len(a.out) == 0 {
		r := &a.plan.Requests[a.next]
		if r.Kind == 'V' {
			if c.quit(a, r.N*us) {
				return
			}
			break
		}
		if a.next-a.reply >= max(a.plan.Pipelined, 1) {
			break
		}
		if r.Kind == 'W' {
			if a.reply < a.next {
				break
			}
			a.rest = w.now + r.N*ms
			a.next, a.reply = a.next+1, a.reply+1
			break
		}
		if took, stop := c.begin(a, r); stop {
			break
		} else if took {
			continue
		}
		a.next++
		a.sent = append(a.sent, w.now)
		switch r.Kind {
		case 'E', 'P':
			a.out = fmt.Appendf(a.out, "%c %d\n", r.Kind, r.N)
			a.out = append(a.out, pattern(int(r.N))...)
		case 'G', 'R':
			a.out = fmt.Appendf(a.out, "%c %d\n", r.Kind, r.N)
		case 'S':
			a.wrote++
			a.out = fmt.Appendf(a.out, "S %d %d\n", r.N, a.wrote)
		case 'T':
			a.out = append(a.out, "T\n"...)
		}
	}
	if len(a.out) > 0 {
		n := c.write(a)
		if a.out = a.out[n:]; n > 0 {
			a.moved = w.now
		}
	}
	if a.reply == len(a.plan.Requests) && len(a.out) == 0 && !a.shut {
		c.shut(a)
	}
}

// quit resets a connection when so much time has passed, and opens the next one.
func (c *client) quit(a *asking, after int64) bool {
	w := c.w
	if !a.quits && after > 0 {
		a.quits, a.rest = true, w.now+after
		return false
	}
	w.reach("connection reset by the client")
	c.stack.Abort(w.now, a.id)
	a.again, a.reset, a.quits = a.next+1, w.now-w.stood, false
	c.reopen(a)
	w.after(1*us, c.goOn) // a SYN that waits for data sends nothing that has the client go on
	return true
}

// stale is how long what was under way on a connection may break the next one from the same port:
// what acknowledges another SYN is answered by a RST, whose number the next one may take for its own. A guest that has missed
// the RST may be in SYN-RECEIVED for longer: it refuses another SYN in its window (Linux's tcp_check_req), and is not there then.
const stale = 5 * s

// reopen opens the next connection from the same port.
func (c *client) reopen(a *asking) {
	c.dial(a)
	a.next, a.reply, a.first, a.in, a.out, a.sent = a.again, a.again, a.again, nil, nil, nil
	a.shut = false
}

// answers looks at what has come.
func (c *client) answers(a *asking) {
	w := c.w
	for a.reply < a.next && !a.mixed {
		r := &a.plan.Requests[a.reply]
		var want []byte
		n := 0
		switch r.Kind {
		case 'W':
		case 'E', 'G', 'U':
			if n = int(r.N); len(a.in) < n {
				return
			}
			want = pattern(n)
		default:
			if n = bytes.IndexByte(a.in, '\n') + 1; n == 0 {
				return
			}
		}
		got := a.in[:n]
		switch r.Kind {
		case 'E', 'G', 'U':
			if !bytes.Equal(got, want) {
				w.failf("stream", "connection %d: other bytes in the answer to request %d", a.id, a.reply)
			}
		case 'P', 'Y', 'F', 'O':
			if string(got) != string(r.Kind)+"\n" {
				w.failf("stream", "connection %d: answer %q to request %d", a.id, got, a.reply)
			}
		case 'S', 'R':
			var key, value uint32
			if k, err := fmt.Sscanf(string(got), string(r.Kind)+" %d %d\n", &key, &value); k != 2 || err != nil || key != uint32(r.N) {
				w.failf("stream", "connection %d: answer %q to request %d", a.id, got, a.reply)
				return
			}
			confirmed := w.check.confirmed[key]
			if r.Kind == 'S' {
				w.check.confirmed[key] = max(confirmed, value)
			} else if value < confirmed {
				w.failf("disk", "key %d reads as %d, and %d was confirmed", key, value, confirmed)
			}
		case 'T':
			if len(got) != 11 || got[0] != 'T' {
				w.failf("stream", "connection %d: answer %q to request %d", a.id, got, a.reply)
			}
		}
		c.answered(a, r)
		a.in = slices.Delete(a.in, 0, n)
		w.check.waited += w.now - a.sent[0]
		a.sent = a.sent[1:]
		a.reply++
		w.check.answers++
	}
}

// ended reports whether every connection is over.
func (c *client) ended() bool {
	return !slices.ContainsFunc(c.conns, func(a *asking) bool { return !a.ended && !a.lost }) &&
		!slices.ContainsFunc(c.questioners, func(q *questioner) bool { return !q.ended })
}
