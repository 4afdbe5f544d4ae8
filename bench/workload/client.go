// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// client does jobs.
type client struct {
	*poller
	job     *Job
	to      *unix.SockaddrInet4
	pattern []byte
	buf     []byte
	began   time.Time
	result  Result
}

// Client reads jobs from in, each as JSON, and does them with the service at the address, an IPv4
// one with its port. Of each it writes "done\n" at once when it has ended, so that what it has cost can be read,
// and then its Result as JSON on a line.
func Client(address string, in io.Reader, out io.Writer) error {
	process()
	at, err := netip.ParseAddrPort(address)
	if err != nil || !at.Addr().Is4() {
		return fmt.Errorf("%q is no IPv4 address with a port: %w", address, err)
	}
	h, err := newHolder()
	if err != nil {
		return err
	}
	jobs, w := json.NewDecoder(in), bufio.NewWriter(out)
	p := pattern()
	if _, err := fmt.Fprintln(out, "ready"); err != nil {
		return err
	}
	for {
		var j Job
		if err := jobs.Decode(&j); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read a job: %w", err)
		}
		r, err := do(&j, at, p, h)
		if err != nil {
			return fmt.Errorf("job %c: %w", j.Do, err)
		}
		fmt.Fprintln(w, "done")
		if err := w.Flush(); err != nil {
			return err
		}
		if err := json.NewEncoder(w).Encode(r); err != nil {
			return fmt.Errorf("write a result: %w", err)
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
}

// errStalled: what came of the job until then counts.
var errStalled = errors.New("no progress")

func do(j *Job, at netip.AddrPort, pattern []byte, h *holder) (*Result, error) {
	p, err := newPoller()
	if err != nil {
		return nil, err
	}
	defer unix.Close(p.fd)
	c := &client{poller: p, job: j, to: &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}, pattern: pattern, buf: make([]byte, chunk)}
	if j.Do != Source && j.Do != Sink && j.Do != UDP {
		c.result.Took = make([]int64, 0, j.N)
	}
	c.began = time.Now()
	switch j.Do {
	case Echo, Differ:
		err = c.echo()
	case Connect, Fetch, HTTP:
		one := map[Do]func() error{Connect: c.connectOnce, Fetch: c.fetch, HTTP: c.fetch}[j.Do]
		for err == nil && c.result.Done < j.N && !c.late() {
			err = one()
		}
	case Source:
		err = c.source(j.N, &c.result.Done)
	case Sink:
		err = c.sink()
	case Pipeline:
		err = c.pipeline()
	case Dirty:
		err = c.dirty()
	case UDP:
		err = c.udp()
	case Hold:
		err = c.hold(h)
	case Pick:
		err = c.pick(h)
	case Drop:
		h.drop()
	default:
		return nil, fmt.Errorf("there is no such job")
	}
	c.result.Wall = time.Since(c.began)
	switch {
	case errors.Is(err, errStalled):
		c.result.Stalled = fmt.Sprintf("no progress for %v", j.Stall)
		c.result.Wall -= j.Stall
	case errors.Is(err, io.EOF), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.EPIPE), errors.Is(err, unix.ETIMEDOUT):
		c.result.Stalled = fmt.Sprintf("a connection broke (%v)", err)
	case err != nil:
		return nil, err
	case c.result.Done == 0 && j.N > 0 && c.late():
		c.result.Stalled = fmt.Sprintf("nothing was done in %v", j.Limit)
	}
	return &c.result, nil
}

// late: the time is over.
func (c *client) late() bool { return time.Since(c.began) > c.job.Limit }

// next waits for sockets, until the job has stalled.
func (c *client) next() ([]unix.EpollEvent, error) {
	ready, err := c.wait(c.job.Stall)
	if err == nil && len(ready) == 0 {
		err = errStalled
	}
	return ready, err
}

// dial connects, without waiting for it.
func (c *client) dial(events uint32) (int, error) {
	fd, err := tcp()
	if err != nil {
		return -1, err
	}
	if err := unix.Connect(fd, c.to); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		unix.Close(fd)
		return -1, fmt.Errorf("connect to the guest: %w", err)
	}
	return fd, c.watch(unix.EPOLL_CTL_ADD, fd, events)
}

// connected waits until a connection that was dialled stands.
func (c *client) connected(fd int) error {
	if _, err := c.next(); err != nil {
		return err
	}
	if e, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || e != 0 {
		return errors.Join(err, unix.Errno(e))
	}
	return c.watch(unix.EPOLL_CTL_MOD, fd, unix.EPOLLIN)
}

// open is a new connection that the service knows the job of.
func (c *client) open(bytes int) (int, error) {
	fd, err := c.dial(unix.EPOLLOUT)
	if err != nil {
		return -1, err
	}
	if err = c.connected(fd); err == nil {
		first := head(c.job, bytes)
		if c.job.Do == HTTP {
			first = fmt.Appendf(nil, get, bytes)
		}
		_, err = unix.Write(fd, first)
	}
	if err != nil {
		abort(fd)
		return -1, err
	}
	return fd, nil
}

// exchange is one that is under way.
type exchange struct {
	got     int
	differs bool
	began   time.Time
}

// receive reads what has come of a response. done: all of it has.
func (c *client) receive(fd int, x *exchange) (done bool, err error) {
	n, err := unix.Read(fd, c.buf[:c.job.Size-x.got])
	switch {
	case errors.Is(err, unix.EAGAIN):
		return false, nil
	case err != nil:
		return false, err
	case n == 0:
		return false, io.EOF
	case !x.differs && !bytes.Equal(c.buf[:n], c.pattern[x.got:x.got+n]):
		return false, errors.New("the response is not the request")
	}
	if x.got += n; x.got < c.job.Size {
		return false, nil
	}
	c.result.Took = append(c.result.Took, int64(time.Since(x.began)))
	c.result.Done++
	return true, nil
}

// openAll opens the job's connections, with what is known of each by descriptor. After an error they are those
// that are there.
func openAll[T any](c *client, bytes int) (map[int]*T, error) {
	conns := make(map[int]*T)
	for range c.job.Conns {
		fd, err := c.open(bytes)
		if err != nil {
			return conns, err
		}
		conns[fd] = new(T)
	}
	return conns, nil
}

// closeAll ends a job's connections: with a reset if it failed, so that nothing of them is sent later.
func closeAll[T any](conns map[int]*T, err error) {
	for fd := range conns {
		if err != nil {
			abort(fd)
		} else {
			unix.Close(fd)
		}
	}
}

func (c *client) echo() (err error) {
	conns, err := openAll[exchange](c, 0)
	defer func() { closeAll(conns, err) }()
	if err != nil {
		return err
	}
	marked := bytes.Clone(c.pattern[:c.job.Size])
	marked[0] = differs
	share := 0
	request := func(fd int) error {
		text := c.pattern[:c.job.Size]
		share += c.job.Share // evenly spread
		x := exchange{differs: share >= 100, began: time.Now()}
		if x.differs {
			share -= 100
			text = marked
		}
		*conns[fd] = x
		_, err := unix.Write(fd, text)
		return err
	}
	c.began = time.Now()
	for fd := range conns {
		if err := request(fd); err != nil {
			return err
		}
	}
	for under := len(conns); under > 0; {
		ready, err := c.next()
		if err != nil {
			return err
		}
		for _, e := range ready {
			fd := int(e.Fd)
			done, err := c.receive(fd, conns[fd])
			if err != nil {
				return err
			}
			if !done {
				continue
			}
			if under--; c.result.Done+under < c.job.N && !c.late() {
				if err := request(fd); err != nil {
					return err
				}
				under++
			}
		}
	}
	return nil
}

func (c *client) connectOnce() error {
	x := exchange{began: time.Now()}
	fd, err := c.dial(unix.EPOLLOUT)
	if err != nil {
		return err
	}
	err = c.connected(fd)
	if err == nil {
		_, err = unix.Write(fd, append(head(c.job, 0), c.pattern[:c.job.Size]...))
	}
	for done := false; err == nil && !done; {
		if _, err = c.next(); err == nil {
			done, err = c.receive(fd, &x)
		}
	}
	if err != nil {
		abort(fd)
		return err
	}
	return unix.Close(fd)
}

// source receives bytes on a new connection. What has come of them is added to done.
func (c *client) source(bytes int, done *int) error {
	fd, err := c.open(bytes)
	if err != nil {
		return err
	}
	left := bytes
	if c.job.Do == HTTP {
		left += len(page(bytes))
	}
	for left > 0 {
		if c.late() {
			abort(fd)
			return nil
		}
		if _, err = c.next(); err != nil {
			break
		}
		n, e := unix.Read(fd, c.buf)
		if errors.Is(e, unix.EAGAIN) {
			continue
		}
		if e == nil && n == 0 {
			e = io.EOF
		}
		if err = e; err != nil {
			break
		}
		left -= n
		*done += n
	}
	if err != nil {
		abort(fd)
		return err
	}
	return unix.Close(fd)
}

// dirty returns when the guest has heard it.
func (c *client) dirty() error {
	fd, err := c.open(c.job.N)
	if err != nil {
		return err
	}
	if _, err = c.next(); err == nil {
		_, err = unix.Read(fd, c.buf)
	}
	if err != nil {
		abort(fd)
		return err
	}
	c.result.Done = c.job.N
	return unix.Close(fd)
}

func (c *client) fetch() error {
	began, got := time.Now(), 0
	if err := c.source(FetchSize, &got); err != nil || got < FetchSize {
		return err
	}
	c.result.Took = append(c.result.Took, int64(time.Since(began)))
	c.result.Done++
	return nil
}

func (c *client) sink() error {
	fd, err := c.open(c.job.N)
	if err != nil {
		return err
	}
	if err := c.watch(unix.EPOLL_CTL_MOD, fd, unix.EPOLLOUT); err != nil {
		return err
	}
	for sent := 0; sent < c.job.N; {
		if c.late() {
			c.result.Done = sent // as far as this end knows
			abort(fd)
			return nil
		}
		if _, err = c.next(); err != nil {
			break
		}
		n, e := unix.Write(fd, c.pattern[:min(chunk, c.job.N-sent)])
		if errors.Is(e, unix.EAGAIN) {
			continue
		}
		if err = e; err != nil {
			break
		}
		sent += n
		c.result.Done = sent
	}
	if err == nil {
		err = c.watch(unix.EPOLL_CTL_MOD, fd, unix.EPOLLIN)
	}
	if err == nil {
		_, err = c.next()
	}
	if err != nil {
		abort(fd)
		return err
	}
	return unix.Close(fd)
}

// resend is how long a datagram may be under way.
const resend = 200 * time.Millisecond

func (c *client) udp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("make a socket: %w", err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Connect(fd, c.to), c.watch(unix.EPOLL_CTL_ADD, fd, unix.EPOLLIN)); err != nil {
		return fmt.Errorf("prepare a datagram socket: %w", err)
	}
	sent, under, progress := uint64(0), 0, time.Now()
	datagram := bytes.Clone(c.pattern[:c.job.Size])
	fill := func() {
		for ; under < c.job.Conns && c.result.Done+under < c.job.N; under++ {
			sent++
			binary.BigEndian.PutUint64(datagram, sent)
			_, _ = unix.Write(fd, datagram) // what is lost here is lost, as on any link
		}
	}
	for fill(); under > 0 && !c.late(); fill() {
		ready, err := c.wait(resend)
		if err != nil {
			return err
		}
		if len(ready) == 0 {
			if time.Since(progress) > c.job.Stall {
				return errStalled
			}
			c.result.Lost += under
			under = 0
		}
		for len(ready) > 0 {
			if _, err := unix.Read(fd, c.buf); errors.Is(err, unix.EAGAIN) {
				break
			} else if err != nil {
				return err
			}
			progress = time.Now()
			c.result.Done++
			under = max(0, under-1) // it may be one that was given up
		}
	}
	return nil
}
