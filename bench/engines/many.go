// SPDX-License-Identifier: Apache-2.0

package engines

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"
)

// Many is what became of many connections.
type Many struct {
	Opened   int           // connections whose first frame was released
	Asked    int           // connections on which a further frame was sent, when all had been opened
	Carried  int           // of these those on which it was released
	Requests int           // checkpoints that were asked for
	Each     time.Duration // CPU of the engine for each of the further frames
}

// ManyConnections has a stand-alone colo-compare carry n connections, some at a time: on each both guests send a
// first frame, and when that was done on all of them, on some of them a further one. qemu is the binary; "": qemu-system-x86_64 of the PATH.
func ManyConnections(ctx context.Context, qemu string, n, atATime int) (m Many, err error) {
	if qemu == "" {
		qemu = "qemu-system-x86_64"
	}
	if qemu, err = exec.LookPath(qemu); err != nil {
		return m, fmt.Errorf("QEMU: %w: install it, or name another with colo-compare", err)
	}
	dir, err := os.MkdirTemp("", "lockstep-many-")
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	c, err := newColo(ctx, qemu, dir)
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	if n > 1<<16-1-probePort {
		return m, fmt.Errorf("%d connections of one client to one port: there are not so many ports", n)
	}
	flows := make([]*flow, n)
	s := synthetic()[0]
	for i := range flows {
		port, err := c.port()
		if err != nil {
			return m, err
		}
		flows[i] = newFlow(s, port, 0)
	}
	m.Opened, err = pass(ctx, c, flows, atATime, func(f *flow) frame { return f.synAck() })
	if err != nil {
		return m, err
	}
	asked := flows
	if n > mostAsked {
		asked = nil
		for i := range mostAsked { // old and new ones
			asked = append(asked, flows[i*n/mostAsked])
		}
	}
	m.Asked = len(asked)
	before, err := c.cpu()
	if err != nil {
		return m, err
	}
	m.Carried, err = pass(ctx, c, asked, atATime, func(f *flow) frame { return f.frame(s, nil) })
	if err != nil {
		return m, err
	}
	after, err := c.cpu()
	if err != nil {
		return m, err
	}
	m.Each = (after - before) / time.Duration(m.Asked)
	if m.Carried < m.Asked || m.Opened < n { // what waits asks for a checkpoint when it has waited too long
		select {
		case <-time.After(coloTimeout):
		case <-ctx.Done():
			return m, ctx.Err()
		}
	}
	m.Requests = int(c.requests.Load())
	return m, nil
}

const (
	// coloTimeout is colo-compare's compare_timeout of 3 s, with the time in which it looks for what has waited so long.
	coloTimeout = 7 * time.Second
	// mostAsked bounds how long the further frames take when many are lost.
	mostAsked = 2000
	// gone is how long a frame may be on its way through an engine that has nothing else to do.
	gone = 50 * time.Millisecond
)

// pass has both guests send a frame on each connection, some connections at a time. It counts
// the frames that were released.
func pass(ctx context.Context, e engine, flows []*flow, atATime int, next func(*flow) frame) (released int, err error) {
	for len(flows) > 0 {
		if err := ctx.Err(); err != nil {
			return released, err
		}
		some := flows[:min(atATime, len(flows))]
		flows = flows[len(some):]
		frames, waiting := make([]frame, len(some)), make(map[uint16]bool)
		for i, f := range some {
			frames[i] = next(f)
			waiting[f.port] = true
		}
		for _, g := range []guest{pvm, svm} {
			if err := e.feed(g, frames); err != nil {
				return released, err
			}
		}
		for last := time.Now(); len(waiting) > 0 && time.Since(last) < gone; {
			if err := e.take(func(b []byte) {
				if port, _, ok := endOf(b); ok && waiting[port] {
					delete(waiting, port)
					last = time.Now()
					released++
				}
			}); err != nil {
				return released, err
			}
		}
	}
	return released, nil
}
