// SPDX-License-Identifier: Apache-2.0

package tcp

import "net/netip"

// ID is a connection of a stack, the same one in its clones. IDs are not used again.
type ID int

// Listen has the stack accept connections at a port.
func (s *Stack) Listen(port uint16) {
	if s.ports[port] == nil {
		s.ports[port] = new(listener)
	}
}

// Accept returns the next established connection of a port that Listen opened.
func (s *Stack) Accept(port uint16) (ID, bool) {
	l := s.ports[port]
	if l == nil || len(l.ready) == 0 {
		return 0, false
	}
	id := l.ready[0]
	l.ready = l.ready[1:]
	return id, true
}

// Ephemeral ports, as Linux has them by default.
const firstPort, lastPort = 32768, 60999

// Dial begins a connection; localPort 0 chooses a port. Its addresses and ports may be those of a
// connection in TIME-WAIT that has timestamps (tcp_tw_reuse). If they are those of another one, the new one is closed with ErrInUse.
func (s *Stack) Dial(now int64, remote netip.AddrPort, localPort uint16) ID {
	s.now, s.stale = now, true
	t := tuple{remote.Addr(), remote.Port(), localPort}
	for tries := 0; localPort == 0 && tries < 100; tries++ {
		t.local = firstPort + uint16(s.rng.Uint64()%(lastPort-firstPort+1))
		if s.byTuple[t] == nil {
			break
		}
	}
	isn := initialNumber(s, now, t)
	var recent uint32
	var recentAt int64
	if old := s.byTuple[t]; old != nil {
		if old.state != TimeWait || !old.timestamps || now-old.tsRecentAt < 1e9 {
			c := newConn(s, ID(len(s.conns)), t)
			c.err = ErrInUse
			s.conns = append(s.conns, c)
			return c.id
		}
		isn = old.snd.nxt + 65535 + 2
		recent, recentAt = old.tsRecent, old.tsRecentAt
		old.end(nil)
	}
	c := s.add(t)
	c.tsRecent, c.tsRecentAt = recent, recentAt
	c.dial(now, isn)
	return c.id
}

// Write has data be sent, as much as the buffer takes, and returns how much that was. A closed
// connection takes none.
func (s *Stack) Write(now int64, id ID, b []byte) int {
	c := s.conns[id]
	if c.state == Closed || c.state == TimeWait || c.snd.closed {
		return 0
	}
	s.now, s.stale = now, true
	n := min(len(b), s.Room(id))
	c.snd.append(b[:n])
	if c.deferred && n > 0 {
		c.deferred = false
		c.sendSYN(now)
		c.snd.arm(timerHandshake, now+c.snd.rto)
	}
	c.snd.output(now)
	return n
}

// Room is how many bytes Write would take.
func (s *Stack) Room(id ID) int {
	c := s.conns[id]
	if c.state == Closed || c.state == TimeWait || c.snd.closed {
		return 0
	}
	return max(s.cfg.SndBuf-(len(c.snd.buf)-c.snd.off), 0)
}

// WriteUrgent is Write with the urgent pointer behind the last byte (MSG_OOB).
func (s *Stack) WriteUrgent(now int64, id ID, b []byte) int {
	c := s.conns[id]
	if n := min(len(b), s.cfg.SndBuf-(len(c.snd.buf)-c.snd.off)); n > 0 && c.state != Closed && !c.snd.closed {
		c.snd.urgent = true
		c.snd.urgentEnd = c.snd.end() + uint32(n)
		if c.state < Established {
			c.snd.urgentEnd = c.iss + 1 + uint32(len(c.snd.buf)-c.snd.off+n)
		}
	}
	return s.Write(now, id, b)
}

// Read copies what was received to b, and opens the window. At the end of the stream, or when
// nothing more can come, eof is true; Err says why.
func (s *Stack) Read(now int64, id ID, b []byte) (n int, eof bool) {
	c := s.conns[id]
	n = c.rcv.read(b)
	if n > 0 && c.state != Closed {
		s.now, s.stale = now, true
		c.rcv.afterRead(now, n)
	}
	return n, c.rcv.unread() == 0 && (c.rcv.fin || c.state == Closed)
}

// Unread is how many bytes Read would return.
func (s *Stack) Unread(id ID) int { return s.conns[id].rcv.unread() }

// Urgent is how many bytes from the next one that Read returns to the end of urgent data, and whether there is such.
func (s *Stack) Urgent(id ID) (int, bool) {
	r := &s.conns[id].rcv
	n := int(int32(r.urgentEnd-r.nxt)) + r.unread()
	if r.fin {
		n++
	}
	return n, r.urgent && n > 0
}

// CloseWrite sends FIN behind what was written.
func (s *Stack) CloseWrite(now int64, id ID) {
	s.now, s.stale = now, true
	s.conns[id].closeWrite(now)
}

// Close closes both ways. What was received and not read, or is received later, is answered by RST, as Linux does.
func (s *Stack) Close(now int64, id ID) {
	s.now, s.stale = now, true
	s.conns[id].close(now)
}

// Abort closes the connection by RST.
func (s *Stack) Abort(now int64, id ID) {
	s.now, s.stale = now, true
	c := s.conns[id]
	switch c.state {
	case Closed:
	case SynSent, TimeWait:
		c.end(ErrAborted)
	default:
		c.reset(now, ErrAborted)
	}
}

// Find returns the connection with this remote end and local port, if there is one that is not closed.
func (s *Stack) Find(remote netip.AddrPort, localPort uint16) (ID, bool) {
	c := s.byTuple[tuple{remote.Addr(), remote.Port(), localPort}]
	if c == nil {
		return 0, false
	}
	return c.id, true
}

// Open is how many connections are neither closed nor in TIME-WAIT.
func (s *Stack) Open() (n int) {
	for _, c := range s.live {
		if c.state != TimeWait {
			n++
		}
	}
	return n
}

// State is that of a connection.
func (s *Stack) State(id ID) State { return s.conns[id].state }

// Initial are the initial sequence numbers of a connection: its own and the other end's.
func Initial(s *Stack, id ID) (own, remote uint32) { return s.conns[id].iss, s.conns[id].irs }

// Patience is how long a connection waits, ns, for an acknowledgment before it repeats something the first time.
func Patience(s *Stack, id ID) int64 {
	snd := &s.conns[id].snd
	return snd.srtt + 4*snd.rttvar
}

// Next is the sequence number that a connection sends next.
func Next(s *Stack, id ID) uint32 { return s.conns[id].snd.nxt }

// Err is why a connection is closed that its own side did not close: ErrReset, ErrRefused, ErrTimeout, ErrAborted, ErrInUse.
func (s *Stack) Err(id ID) error { return s.conns[id].err }

// Unsent is how many bytes were written and are not acknowledged.
func (s *Stack) Unsent(id ID) int {
	snd := &s.conns[id].snd
	return len(snd.buf) - snd.off
}

// NoDelay turns Nagle's algorithm off.
func (s *Stack) NoDelay(id ID, on bool) { s.conns[id].noDelay = on }

// Tuple is a connection's remote end and local port.
func (s *Stack) Tuple(id ID) (remote netip.AddrPort, localPort uint16) {
	t := s.conns[id].tuple
	return netip.AddrPortFrom(t.addr, t.remote), t.local
}
