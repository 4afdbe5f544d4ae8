// SPDX-License-Identifier: Apache-2.0

package tcp

import "net/netip"

// TCP fast open (RFC 7413), as Linux has it with TCP_FASTOPEN and TCP_FASTOPEN_CONNECT: who has a peer's cookie sends
// its SYN with the first data that is written.

// fastCookie is what an address has to show.
func fastCookie(s *Stack, remote netip.Addr) []byte {
	return be.AppendUint64(nil, s.hash(tuple{addr: remote}, 3))
}

// dialFast begins a connection whose SYN waits for data, if there is a cookie. It reports false if there is none.
func dialFast(c *conn, now int64, isn uint32) bool {
	if c.s.cfg.FastOpen && len(c.s.cookies[c.tuple.addr]) > 0 {
		prepareDial(c, now, isn)
		c.deferred = true
		return true
	}
	return false
}

// fastSYN is the data of the SYN.
func fastSYN(c *conn) []byte {
	s := &c.snd
	if c.state != SynSent || s.retries > 0 || !c.s.cfg.FastOpen || len(c.s.cookies[c.tuple.addr]) == 0 {
		return nil
	}
	return s.buf[s.off:][:min(len(s.buf)-s.off, c.s.cfg.MSS-60)]
}

// fastOptions appends the cookie, or what asks for one.
func fastOptions(c *conn, b []byte) []byte {
	if !c.s.cfg.FastOpen || c.snd.retries > 0 {
		return b
	}
	var cookie []byte
	switch {
	case c.state == SynSent:
		cookie = c.s.cookies[c.tuple.addr]
	case c.asksCookie:
		cookie = fastCookie(c.s, c.tuple.addr)
	default:
		return b
	}
	b = append(b, optNOP, optNOP, optFastOpen, uint8(2+len(cookie)))
	b = append(b, cookie...)
	return b
}

// fastTaken is how much of the stream the peer has taken with the SYN.
func fastTaken(c *conn, g *segment) uint32 {
	if c.state != SynSent {
		return 0
	}
	return g.ack - c.iss - 1
}

// acceptFast takes the data of a SYN that has the right cookie. The connection can be used before the handshake is over.
func acceptFast(c *conn, now int64, g *segment) {
	s := c.s
	if !s.cfg.FastOpen || !g.fastOpen {
		return
	}
	c.asksCookie = len(g.cookie) == 0
	if string(g.cookie) != string(fastCookie(s, c.tuple.addr)) || len(g.data) == 0 {
		return
	}
	c.fast = true
	c.rcv.take(g.seq+1, g.data[:min(len(g.data), c.rcv.room)])
	c.rcv.wup = c.rcv.nxt // the SYN|ACK's window begins there
}

// openFast lets the application have the connection.
func openFast(c *conn) {
	l := c.s.ports[c.tuple.local]
	l.pending--
	c.listener = false
	l.ready = append(l.ready, c.id)
	c.snd.start(c.iss + 1)
	c.snd.maxWnd = max(c.snd.maxWnd, c.snd.wnd)
}

// handshakeACK reports whether a segment acknowledges the SYN.
func handshakeACK(c *conn, g *segment) bool {
	if c.fast {
		return after(g.ack, c.iss) && !after(g.ack, c.snd.nxt)
	}
	return g.ack == c.snd.nxt
}
