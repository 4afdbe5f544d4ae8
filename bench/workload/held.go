// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"errors"
	"math/rand/v2"
	"time"

	"golang.org/x/sys/unix"
)

// holder has the connections that stay from job to job.
type holder struct {
	*poller
	conns map[int]*exchange
	fds   []int // of conns, in the order in which they were opened
	rand  *rand.Rand
}

func newHolder() (*holder, error) {
	p, err := newPoller()
	if err != nil {
		return nil, err
	}
	return &holder{poller: p, conns: make(map[int]*exchange), rand: rand.New(rand.NewPCG(1, 2))}, nil
}

// drop resets the connections.
func (h *holder) drop() {
	for _, fd := range h.fds {
		abort(fd)
	}
	h.fds = nil
	clear(h.conns)
}

// hold opens connections, some at a time. Each counts when its first response is there; one that never comes is
// given up together with all that are being opened when there is no progress any more, which may happen some times.
func (c *client) hold(h *holder) error {
	c.poller = h.poller
	first := append(head(c.job, 0), c.pattern[:c.job.Size]...)
	asked, under := make(map[int]bool), 0 // asked: its request was sent
	giveUp := func() {
		for fd := range asked {
			abort(fd)
			delete(h.conns, fd)
		}
		clear(asked)
		under = 0
	}
	defer giveUp()
	for stalls := 0; c.result.Done+c.result.Lost < c.job.N; {
		for ; under < c.job.Conns && c.result.Done+c.result.Lost+under < c.job.N && !c.late(); under++ {
			fd, err := c.dial(unix.EPOLLOUT)
			if err != nil {
				return err
			}
			// However it ends, it is gone at once: as many more, half closed, would disturb what follows.
			if err := reset(fd); err != nil {
				return err
			}
			h.conns[fd], asked[fd] = &exchange{began: time.Now()}, false
		}
		if under == 0 {
			return nil // it is late
		}
		ready, err := c.next()
		if errors.Is(err, errStalled) && stalls < mostStalls {
			stalls++
			c.result.Lost += under
			giveUp()
			continue
		}
		if err != nil {
			return err
		}
		for _, e := range ready {
			fd := int(e.Fd)
			sent, opening := asked[fd]
			if !opening {
				return errBroken // one that was held before
			}
			if !sent {
				if e, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || e != 0 {
					return errors.Join(err, unix.Errno(e))
				}
				if _, err := unix.Write(fd, first); err != nil {
					return err
				}
				asked[fd] = true
				if err := c.watch(unix.EPOLL_CTL_MOD, fd, unix.EPOLLIN); err != nil {
					return err
				}
				continue
			}
			done, err := c.receive(fd, h.conns[fd])
			if err != nil {
				return err
			}
			if done {
				under--
				delete(asked, fd)
				h.fds = append(h.fds, fd)
			}
		}
	}
	return nil
}

// mostStalls is how often hold may be without progress.
const mostStalls = 3

// errBroken: nothing was asked of the connection, so what came is its end.
var errBroken = unix.ECONNRESET

// pick has exchanges on held connections. Each begins on one that was chosen at random of those
// with none under way.
func (c *client) pick(h *holder) error {
	c.poller = h.poller
	under := make(map[int]bool)
	ask := func() error {
		fd := h.fds[h.rand.IntN(len(h.fds))]
		for under[fd] {
			fd = h.fds[h.rand.IntN(len(h.fds))]
		}
		under[fd] = true
		*h.conns[fd] = exchange{began: time.Now()}
		_, err := unix.Write(fd, c.pattern[:c.job.Size])
		return err
	}
	for c.result.Done < c.job.N {
		for len(under) < min(c.job.Conns, len(h.fds)) && c.result.Done+len(under) < c.job.N && !c.late() {
			if err := ask(); err != nil {
				return err
			}
		}
		if len(under) == 0 {
			return nil // it is late, or there is no connection
		}
		ready, err := c.next()
		if err != nil {
			return err
		}
		for _, e := range ready {
			fd := int(e.Fd)
			if !under[fd] {
				return errBroken
			}
			done, err := c.receive(fd, h.conns[fd])
			if err != nil {
				return err
			}
			if done {
				delete(under, fd)
			}
		}
	}
	return nil
}
