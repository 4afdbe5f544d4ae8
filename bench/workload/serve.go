// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// idle is how long nothing may happen until the service gives up what connections it has but
// those of Hold: they are left over from a job that ended early.
const idle = 10 * time.Second

// fair is how many writes or datagrams one socket gets until it is the next one's turn.
const fair = 64

// server is the guests' service.
type server struct {
	*poller
	listener, datagrams int
	conns               map[int]*conn // by descriptor
	pattern, buf        []byte
	dirty               atomic.Int64 // bytes a second
	dirtier             sync.Once
}

// conn is a connection of the service.
type conn struct {
	head  []byte // as much as has come
	do    Do
	size  int // of writes
	bytes int // to transfer
	done  int

	request []byte // as much as has come, where it is looked at
}

// Serve runs the service on a port until it fails. It writes "ready\n" once it can be reached.
func Serve(port int, out io.Writer) error {
	process()
	p, err := newPoller()
	if err != nil {
		return err
	}
	s := &server{poller: p, conns: make(map[int]*conn), pattern: pattern(), buf: make([]byte, chunk)}
	if s.listener, err = tcp(); err != nil {
		return err
	}
	if s.datagrams, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
		return fmt.Errorf("make a socket: %w", err)
	}
	at := &unix.SockaddrInet4{Port: port}
	// Connections of a service before this one may still wait for their end.
	if err := errors.Join(unix.SetsockoptInt(s.listener, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(s.listener, at), unix.Listen(s.listener, 1024), unix.Bind(s.datagrams, at)); err != nil {
		return fmt.Errorf("listen on port %d: %w", port, err)
	}
	if err := errors.Join(s.watch(unix.EPOLL_CTL_ADD, s.listener, unix.EPOLLIN), s.watch(unix.EPOLL_CTL_ADD, s.datagrams, unix.EPOLLIN)); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(out, "ready"); err != nil {
		return err
	}
	for {
		ready, err := s.wait(idle)
		if err != nil {
			return err
		}
		if len(ready) == 0 {
			for fd, c := range s.conns {
				if c.do != Hold {
					abort(fd)
					delete(s.conns, fd)
				}
			}
		}
		for _, e := range ready {
			switch fd := int(e.Fd); fd {
			case s.listener:
				err = s.accept()
			case s.datagrams:
				err = s.sendBack()
			default:
				if s.serve(fd) != nil { // the client has closed it, or gave it up
					unix.Close(fd)
					delete(s.conns, fd)
				}
			}
			if err != nil {
				return err
			}
		}
	}
}

func (s *server) accept() error {
	fd, _, err := unix.Accept4(s.listener, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
	if err != nil {
		return nil // the client has given it up before it was accepted
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return fmt.Errorf("set TCP_NODELAY: %w", err)
	}
	s.conns[fd] = new(conn)
	return s.watch(unix.EPOLL_CTL_ADD, fd, unix.EPOLLIN)
}

func (s *server) sendBack() error {
	for range fair {
		n, from, err := unix.Recvfrom(s.datagrams, s.buf, 0)
		if errors.Is(err, unix.EAGAIN) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("receive a datagram: %w", err)
		}
		_ = unix.Sendto(s.datagrams, s.buf[:n], 0, from) // what is lost here is lost, as on any link
	}
	return nil
}

// serve does what a ready connection waits for. An error ends it.
func (s *server) serve(fd int) error {
	c := s.conns[fd]
	if c.do == Source {
		return s.send(fd, c)
	}
	want := s.buf
	if len(c.head) < headLen {
		want = s.buf[:headLen-len(c.head)]
	}
	n, err := unix.Read(fd, want)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return nil
	case err != nil:
		return err
	case n == 0:
		return io.EOF
	case len(c.head) < headLen:
		if c.head = append(c.head, want[:n]...); len(c.head) < headLen {
			return nil
		}
		return s.begin(fd, c)
	case c.do == HTTP:
		return s.get(fd, c, want[:n])
	case c.do == Differ:
		return s.differ(fd, c, want[:n])
	case c.do == Pipeline:
		return s.answer(fd, c, n)
	case c.do == Sink:
		if c.done += n; c.done < c.bytes {
			return nil
		}
		_, err = unix.Write(fd, s.pattern[:1]) // not of what was read, which both guests cut in other places
		return err
	}
	// The client waits for what it has sent to come back, so there is room for it.
	_, err = unix.Write(fd, want[:n])
	return err
}

// begin does what a whole head asks for.
func (s *server) begin(fd int, c *conn) error {
	c.do, c.size = Do(c.head[0]), int(binary.BigEndian.Uint32(c.head[1:]))
	c.bytes = int(binary.BigEndian.Uint64(c.head[5:]))
	switch c.do {
	case Source:
		return s.watch(unix.EPOLL_CTL_MOD, fd, unix.EPOLLIN|unix.EPOLLOUT)
	case Hold: // as the client has it
		return reset(fd)
	case Pipeline:
		return delay(fd)
	case HTTP:
		return s.get(fd, c, c.head)
	case Dirty:
		s.dirty.Store(int64(c.bytes))
		s.dirtier.Do(func() {
			runtime.GOMAXPROCS(max(2, runtime.GOMAXPROCS(0))) // this thread waits without Go's knowledge
			go s.write()
		})
		_, err := unix.Write(fd, s.pattern[:1])
		return err
	}
	return nil
}

// get takes what has come of a request for a page, and sends the page once all has.
func (s *server) get(fd int, c *conn, text []byte) error {
	if c.request = append(c.request, text...); !bytes.HasSuffix(c.request, []byte("\r\n\r\n")) {
		return nil
	}
	if _, err := fmt.Sscanf(string(c.request), "GET /%d ", &c.bytes); err != nil {
		return fmt.Errorf("request %q: %w", c.request, err)
	}
	c.do, c.size = Source, chunk
	if _, err := unix.Write(fd, page(c.bytes)); err != nil {
		return err
	}
	return s.watch(unix.EPOLL_CTL_MOD, fd, unix.EPOLLIN|unix.EPOLLOUT)
}

// differ answers whole requests.
func (s *server) differ(fd int, c *conn, text []byte) error {
	c.request = append(c.request, text...)
	for len(c.request) >= c.size {
		answer := c.request[:c.size]
		if answer[0] == differs {
			binary.BigEndian.PutUint64(answer[clockAt:], uint64(time.Now().UnixNano()))
		}
		if _, err := unix.Write(fd, answer); err != nil {
			return err
		}
		c.request = append(c.request[:0], c.request[c.size:]...) // makes no garbage
	}
	return nil
}

// write writes to the guest's memory for as long as the service lives.
func (s *server) write() {
	const often = 10 * time.Millisecond
	memory := make([]byte, dirtied)
	at, owed := 0, 0.0
	for last := time.Now(); ; time.Sleep(often) {
		now := time.Now()
		// A guest that stood still, or was slow, has nothing to catch up with.
		owed += float64(s.dirty.Load()) * min(now.Sub(last), 10*often).Seconds()
		for last = now; owed >= pageSize; owed -= pageSize {
			memory[at]++
			at = (at + pageSize) % dirtied
		}
	}
}

// send sends as much as there is room for.
func (s *server) send(fd int, c *conn) error {
	for range fair {
		if c.done == c.bytes { // the client closes it
			if n, err := unix.Read(fd, s.buf); n == 0 || err != nil && !errors.Is(err, unix.EAGAIN) {
				return io.EOF
			}
			return s.watch(unix.EPOLL_CTL_MOD, fd, unix.EPOLLIN)
		}
		n := min(c.size-c.done%c.size, c.bytes-c.done)
		from := c.done % chunk
		n, err := unix.Write(fd, s.pattern[from:from+n])
		if errors.Is(err, unix.EAGAIN) {
			return nil
		}
		if err != nil {
			return err
		}
		c.done += n
	}
	return nil
}
