// SPDX-License-Identifier: Apache-2.0

// Package qmptest simulates QEMU's monitor for tests. A [Server] on a unix socket
// answers as the QEMU of a COLO guest does, misbehaves on request, and records the
// commands. A [Pair] of them goes through checkpoints together. Daemons under test, in
// this process or another, are given the sockets' paths.
package qmptest

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"
)

// Request is a command as it came in.
type Request struct {
	Execute   string          `json:"execute"`
	OutOfBand string          `json:"exec-oob"` // the same, out of band; Execute has it too
	Arguments json.RawMessage `json:"arguments"`
	ID        json.RawMessage `json:"id"`
}

// Fault is a way to misbehave.
type Fault int

// Faults. All but None also hold for connections made later.
const (
	None    Fault = iota
	Silent        // read commands, never answer; a new connection gets no greeting
	Slow          // answer every command after Server's Delay
	Garbage       // answer with a line that is no JSON
	Huge          // answer with a line of 8 MiB
	Refuse        // answer every command but the handshake with an error
	HangUp        // close connections at once
	Early         // send a new connection an event before the greeting
)

// Server is one QEMU's monitor. Like QEMU's, it serves one connection at a time
// and sends events only to a client that is connected.
type Server struct {
	ln   *net.UnixListener
	path string
	done sync.WaitGroup

	mu       sync.Mutex
	conn     *session
	fault    Fault
	diesAt   string // a command; "": none
	delay    time.Duration
	running  bool
	mode     string // of COLO
	requests []Request
	changed  chan struct{} // closed and replaced when requests or conn change
	handle   func(Request) // called after the reply
	replies  map[string]string
	objects  []string // IDs
	closed   bool
}

// session is one client. Writes are in order and never under Server.mu.
type session struct {
	conn       net.Conn
	negotiated bool // under Server.mu
	mu         sync.Mutex
}

func (c *session) write(b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conn.Write(b) // an error means that the client is gone
}

// Listen starts a server on the unix socket path. Its guest runs. mode is COLO's:
// "primary", "secondary" or "none".
func Listen(path, mode string) (*Server, error) {
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("qmp test server: %w", err)
	}
	s := &Server{ln: ln, path: path, running: true, mode: mode, changed: make(chan struct{})}
	s.done.Go(s.accept)
	return s, nil
}

// Path returns the socket's path.
func (s *Server) Path() string { return s.path }

// Close ends the server and removes its socket.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	c := s.conn
	s.mu.Unlock()
	err := s.ln.Close()
	if c != nil {
		c.conn.Close()
	}
	s.done.Wait()
	return err
}

func (s *Server) accept() {
	for {
		conn, err := s.ln.Accept()
		if err != nil {
			return
		}
		c := &session{conn: conn}
		s.mu.Lock()
		s.conn = c
		fault, closed := s.fault, s.closed
		s.signal()
		s.mu.Unlock()
		if fault != HangUp && !closed {
			s.serve(c, fault)
		}
		conn.Close()
		s.mu.Lock()
		s.conn = nil
		s.signal()
		s.mu.Unlock()
	}
}

// signal wakes those who wait for a change; called under mu.
func (s *Server) signal() {
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *Server) serve(c *session, fault Fault) {
	if fault == Early {
		c.write([]byte(`{"timestamp": {"seconds": 1700000000, "microseconds": 0}, "event": "RESUME"}` + "\r\n"))
	}
	if fault != Silent {
		c.write([]byte(`{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "qmptest"}, "capabilities": ["oob"]}}` + "\r\n"))
	}
	lines := bufio.NewScanner(c.conn)
	for lines.Scan() {
		var r Request
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			c.write([]byte(`{"error": {"class": "GenericError", "desc": "JSON parse error"}}` + "\r\n"))
			continue
		}
		if r.OutOfBand != "" {
			r.Execute = r.OutOfBand
		}
		s.mu.Lock()
		s.requests = append(s.requests, r)
		s.signal()
		if r.Execute == s.diesAt {
			s.closed = true
			s.ln.Close()
			s.mu.Unlock()
			return
		}
		fault, delay, handle := s.fault, s.delay, s.handle
		ran := s.running
		answer := s.answer(c, r)
		running := s.running
		s.mu.Unlock()
		if r.Execute == "qmp_capabilities" && fault != Silent {
			fault = None
		}
		switch fault {
		case Silent:
			continue
		case HangUp:
			return
		case Slow:
			t := time.NewTimer(delay)
			<-t.C
		case Garbage:
			c.write([]byte("\x00\xff{]]\r\n"))
			continue
		case Huge:
			huge := make([]byte, 8<<20)
			for i := range huge {
				huge[i] = 'x'
			}
			c.write(fmt.Appendf(nil, `{"return": "%s", "id": %s}`+"\r\n", huge, id(r)))
			continue
		case Refuse:
			c.write(fmt.Appendf(nil, `{"error": {"class": "GenericError", "desc": "refused by the test"}, "id": %s}`+"\r\n", id(r)))
			continue
		}
		switch {
		case ran && !running:
			s.Event("STOP", time.Now())
		case running && !ran:
			s.Event("RESUME", time.Now())
		}
		c.write(answer)
		if handle != nil {
			handle(r)
		}
	}
}

func id(r Request) string {
	if r.ID == nil {
		return "null"
	}
	return string(r.ID)
}

// answer returns the reply of a QEMU that works; called under mu.
func (s *Server) answer(c *session, r Request) []byte {
	ok := func(v string) []byte { return fmt.Appendf(nil, `{"return": %s, "id": %s}`+"\r\n", v, id(r)) }
	switch {
	case r.Execute == "qmp_capabilities":
		c.negotiated = true
		return ok("{}")
	case !c.negotiated:
		return fmt.Appendf(nil, `{"error": {"class": "CommandNotFound", "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}, "id": %s}`+"\r\n", id(r))
	}
	if reply, ok := s.replies[r.Execute]; ok {
		return fmt.Appendf(nil, `{%s, "id": %s}`+"\r\n", reply, id(r))
	}
	switch r.Execute {
	case "query-status":
		status, running := "paused", s.running
		switch {
		case s.mode == Incoming:
			status, running = "inmigrate", false
		case running:
			status = "running"
		}
		return ok(fmt.Sprintf(`{"status": "%s", "singlestep": false, "running": %t}`, status, running))
	case "query-colo-status":
		mode := s.mode
		if mode == Incoming {
			mode = "none"
		}
		return ok(fmt.Sprintf(`{"mode": "%s", "last-mode": "none", "reason": "none"}`, mode))
	case "query-commands":
		return ok(`[{"name": "x-colo-lost-heartbeat"}, {"name": "query-colo-status"}, {"name": "yank"}, {"name": "x-blockdev-change"}]`)
	case "query-migrate-capabilities":
		return ok(`[{"capability": "x-colo", "state": true}]`)
	case "query-kvm":
		return ok(`{"enabled": false, "present": true}`)
	case "qom-get":
		return ok(`"pc-i440fx-7.2-machine"`)
	case "query-migrate-parameters":
		return ok(`{"tls-creds": "some"}`)
	case "query-migrate":
		return ok(`{"status": "colo"}`)
	case "query-qmp-schema", "query-named-block-nodes", "query-yank":
		return ok("[]")
	case "x-colo-lost-heartbeat":
		s.mode = "none"
		return ok("{}")
	case "stop", "cont":
		s.running = r.Execute == "cont"
		return ok("{}")
	case "migrate-set-parameters", "announce-self":
		return ok("{}")
	case "object-add":
		s.objects = append(s.objects, objectID(r))
		return ok("{}")
	case "object-del":
		s.objects = slices.DeleteFunc(s.objects, func(id string) bool { return id == objectID(r) })
		return ok("{}")
	case "qom-list":
		names := make([]string, len(s.objects))
		for i, id := range s.objects {
			names[i] = fmt.Sprintf(`{"name": "%s", "type": "child"}`, id)
		}
		return ok("[" + strings.Join(names, ", ") + "]")
	}
	return fmt.Appendf(nil, `{"error": {"class": "CommandNotFound", "desc": "The command %s has not been found"}, "id": %s}`+"\r\n", r.Execute, id(r))
}

func objectID(r Request) string {
	var args struct{ ID string }
	_ = json.Unmarshal(r.Arguments, &args) // the commands are the daemon's own
	return args.ID
}

// SetFault makes the server misbehave from the next command on, or with None behave.
// HangUp also closes the present connection. delay is for Slow.
func (s *Server) SetFault(f Fault, delay time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault, s.delay = f, delay
	if f == HangUp && s.conn != nil {
		s.conn.conn.Close()
	}
}

// DieAt makes the server end at a command, as a QEMU does that is killed before it
// answers.
func (s *Server) DieAt(command string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.diesAt = command
}

// SetReply sets the reply to a command, in the form `"return": {}`; "": the usual one.
func (s *Server) SetReply(command, reply string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.replies == nil {
		s.replies = make(map[string]string)
	}
	if s.replies[command] = reply; reply == "" {
		delete(s.replies, command)
	}
}

// Incoming is the mode of a QEMU that waits for a primary.
const Incoming = "incoming"

// SetCOLO sets the mode that query-colo-status returns, or [Incoming].
func (s *Server) SetCOLO(mode string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mode = mode
}

// Stop stops the guest and sends STOP, as after an operator's stop. As in QEMU, nothing
// comes of it for one that is stopped.
func (s *Server) Stop() { s.setRunning(false, "STOP") }

// Resume resumes the guest and sends RESUME.
func (s *Server) Resume() { s.setRunning(true, "RESUME") }

// Running reports whether the guest runs: one that does not transmits nothing.
func (s *Server) Running() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.running
}

func (s *Server) setRunning(running bool, event string) {
	s.mu.Lock()
	is := s.running
	s.running = running
	s.mu.Unlock()
	if is != running {
		s.Event(event, time.Now())
	}
}

// Event sends an event with a time.
func (s *Server) Event(name string, at time.Time) {
	s.Raw(fmt.Sprintf(`{"timestamp": {"seconds": %d, "microseconds": %d}, "event": "%s"}`+"\r\n",
		at.Unix(), at.Nanosecond()/1000, name))
}

// Raw writes to the client, if there is one that has completed the handshake.
func (s *Server) Raw(line string) {
	s.mu.Lock()
	c := s.conn
	ready := c != nil && c.negotiated
	s.mu.Unlock()
	if ready {
		c.write([]byte(line))
	}
}

// Requests returns all commands so far, of all connections.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Request(nil), s.requests...)
}

// Await returns when command has come n times in all.
func (s *Server) Await(ctx context.Context, command string, n int) error {
	return s.await(ctx, fmt.Sprintf("%d times %s", n, command), func() bool {
		have := 0
		for _, r := range s.requests {
			if r.Execute == command {
				have++
			}
		}
		return have >= n
	})
}

// AwaitClient returns when a client has completed the handshake.
func (s *Server) AwaitClient(ctx context.Context) error {
	return s.await(ctx, "a client", func() bool { return s.conn != nil && s.conn.negotiated })
}

// await waits for a condition that is evaluated under mu.
func (s *Server) await(ctx context.Context, what string, cond func() bool) error {
	for {
		s.mu.Lock()
		ok, changed := cond(), s.changed
		s.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("qmp test server %s: waiting for %s: %w", s.path, what, context.Cause(ctx))
		}
	}
}
