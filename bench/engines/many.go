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
	Each     time.Duration // CPU of the engine for each of the further frames
	Held     int           // connections on which the PVM had sent one more, and the SVM not yet, when another connection came
	Survived int           // of these those on which it was released when the SVM had sent it, too
	Requests int           // checkpoints that were asked for
}

// ManyConnections has a stand-alone colo-compare carry n connections, some at a time: on each both guests send a
// first frame, and when that was done on all of them, on some of them a further one. Then the
// PVM is ahead on some, and one more connection comes. qemu is the binary; "": qemu-system-x86_64 of the PATH.
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
	flows := make([]*flow, n)
	s := synthetic()[0]
	for i := range flows {
		port, err := c.port()
		if err != nil {
			return m, err
		}
		flows[i] = newFlow(s, port, 0)
	}
	last := flows[n-1]
	flows = flows[:n-1]
	m.Opened, err = pass(ctx, c, flows, atATime, (*flow).synAck)
	if err != nil {
		return m, err
	}
	asked := flows
	if n > mostAsked {
		asked = nil
		for i := range mostAsked { // old and new ones
			asked = append(asked, flows[i*len(flows)/mostAsked])
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
	if err := m.another(ctx, c, asked[:min(mostHeld, len(asked))], last, s); err != nil {
		return m, err
	}
	if m.Carried < m.Asked || m.Opened < n || m.Survived < m.Held { // what waits asks for a checkpoint when it has waited too long
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
	// mostHeld is far below the frames that it keeps of all connections.
	mostHeld = 256
	// gone is how long a frame may be on its way through an engine that has nothing else to do.
	gone = 50 * time.Millisecond
)

// another has the last connection come while frames are held.
func (m *Many) another(ctx context.Context, c *colo, ahead []*flow, last *flow, s *stream) error {
	frames, waiting := make([]frame, len(ahead)), make(map[uint16]bool)
	for i, f := range ahead {
		frames[i] = f.frame(s, nil)
		waiting[f.port] = true
	}
	m.Held = len(ahead)
	if err := c.feed(pvm, frames); err != nil {
		return err
	}
	opened, err := pass(ctx, c, []*flow{last}, 1, (*flow).synAck)
	if err != nil {
		return err
	}
	m.Opened += opened
	if err := c.feed(svm, frames); err != nil {
		return err
	}
	m.Survived, err = await(c, waiting)
	return err
}

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
		n, err := await(e, waiting)
		released += n
		if err != nil {
			return released, err
		}
	}
	return released, nil
}

// await counts the connections, by their ports, of which a frame is released before nothing comes any more.
func await(e engine, waiting map[uint16]bool) (released int, err error) {
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
	return released, nil
}
