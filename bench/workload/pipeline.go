// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"errors"
	"io"
	"time"

	"golang.org/x/sys/unix"
)

// answer answers each whole request by writes of its own.
func (s *server) answer(fd int, c *conn, n int) error {
	piece := AnswerSize
	if c.bytes > 0 {
		piece = c.bytes
	}
	for c.done += n; c.done >= c.size; c.done -= c.size {
		for at := 0; at < AnswerSize; at += piece {
			// The client has few requests under way, so there is room for what answers them.
			if _, err := unix.Write(fd, s.pattern[at:min(at+piece, AnswerSize)]); err != nil {
				return err
			}
		}
	}
	return nil
}

// pipeline keeps requests under way on each connection. They are answered in their order.
func (c *client) pipeline() (err error) {
	type line struct {
		got   int     // bytes of the response that comes next
		began []int64 // when requests under way did, since the job's begin
	}
	conns, err := openAll[line](c, c.job.Piece)
	defer func() { closeAll(conns, err) }()
	if err != nil {
		return err
	}
	if c.job.Nagle {
		for fd := range conns {
			if err := delay(fd); err != nil {
				return err
			}
		}
	}
	c.began = time.Now()
	sent := 0
	fill := func(fd int, l *line) error {
		for ; len(l.began) < c.job.Under && sent < c.job.N; sent++ {
			l.began = append(l.began, int64(time.Since(c.began)))
			if _, err := unix.Write(fd, c.pattern[:c.job.Size]); err != nil {
				return err
			}
		}
		return nil
	}
	for fd, l := range conns {
		if err := fill(fd, l); err != nil {
			return err
		}
	}
	for c.result.Done < sent && !c.late() {
		ready, err := c.next()
		if err != nil {
			return err
		}
		for _, e := range ready {
			fd := int(e.Fd)
			l := conns[fd]
			n, err := unix.Read(fd, c.buf)
			if err == nil && n == 0 {
				err = io.EOF
			}
			if errors.Is(err, unix.EAGAIN) {
				continue
			} else if err != nil {
				return err
			}
			for l.got += n; l.got >= AnswerSize; l.got -= AnswerSize {
				c.result.Took = append(c.result.Took, int64(time.Since(c.began))-l.began[0])
				l.began = append(l.began[:0], l.began[1:]...)
				c.result.Done++
			}
			if err := fill(fd, l); err != nil {
				return err
			}
		}
	}
	return nil
}
