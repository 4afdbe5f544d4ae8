// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"syscall"

	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qmp"
)

// A QEMU whose monitor cannot be reached is not dead yet: a monitor serves one client
// at a time, and this host may be out of descriptors. Its process is asked: it is dead
// when that is gone, or when it takes no connection though it serves nobody else.

// reach is why a monitor could not be reached.
type reach uint8

const (
	qemuLives reach = iota + 1 // or nothing shows that it does not
	qemuMute                   // it may hang: maxUnanswered of these in a row, and it counts as dead
	qemuEnded
)

// dialQMP is how QEMU's monitor is dialled, but in tests.
type dialQMP func(ctx context.Context, path string, o *Options, connected func(*net.UnixConn)) (*qmp.Monitor, error)

func dialMonitor(ctx context.Context, path string, o *Options, connected func(*net.UnixConn)) (*qmp.Monitor, error) {
	return qmp.DialTo(ctx, path, o.qmpTimeout, connected)
}

// owner is the process that listens on a monitor socket, as far as it is known.
type owner struct {
	path  string        // as the process bound it
	guest *qemu.Spec    // of a QEMU that lockstep starts; nil: of somebody else's
	proc  *qemu.Process // nil: not known
	mu    sync.Mutex    // held where proc changes, and where another goroutine than the watcher's looks at it

	noAsk bool // mutation: the process is not asked
}

// set makes p the process that is known.
func (o *owner) set(p *qemu.Process) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.proc != nil {
		o.proc.Release()
	}
	o.proc = p
}

// dead reports, without waiting, whether the process is known to have ended.
func (o *owner) dead() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.proc != nil && !o.proc.Alive()
}

// connected takes the process from a connection to its socket.
func (o *owner) connected(conn *net.UnixConn) {
	p, err := qemu.Owner(conn)
	if err != nil {
		return // the one known so far, then
	}
	o.set(p)
	o.path = conn.RemoteAddr().String()
}

func (o *owner) forget() { o.set(nil) }

// ended is closed when the process has ended; nil where it is not known.
func (o *owner) ended() <-chan struct{} {
	if o.proc == nil {
		return nil
	}
	return o.proc.Done()
}

// judge finds out what it means that the monitor could not be reached, and why.
func (o *owner) judge(err error) (reach, error) {
	noAnswer := errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, qmp.ErrTimeout) || errors.Is(err, context.DeadlineExceeded)
	switch {
	case o.noAsk && noAnswer:
		return qemuMute, err
	case o.noAsk:
		return qemuEnded, err
	}
	if o.proc == nil && o.guest != nil {
		p, notFound := qemu.Find(o.guest)
		if errors.Is(notFound, qemu.ErrNotRunning) {
			return qemuEnded, err
		}
		o.set(p)
	}
	if o.proc != nil && !o.proc.Alive() {
		pid := o.proc.Pid()
		o.forget()
		return qemuEnded, fmt.Errorf("QEMU, process %d, has ended: %w", pid, err)
	}
	switch {
	case noAnswer:
		if o.proc == nil || o.proc.Stopped() {
			return qemuMute, err
		}
		client, unknown := o.proc.Client(o.path)
		if client == "" {
			return qemuMute, errors.Join(err, unknown)
		}
		return qemuLives, fmt.Errorf("QEMU, process %d, serves another client on its monitor, %s, and takes one at a time: nothing leaves and no checkpoint is made until that one closes its connection; give it a monitor of its own (-qmp)",
			o.proc.Pid(), client)
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		if o.proc == nil {
			return qemuEnded, err
		}
		listens, unknown := o.proc.Listens(o.path)
		if !listens && unknown == nil {
			o.forget()
			return qemuEnded, err // it is about to end, and its guest does not run any more
		}
	}
	if o.proc == nil {
		return qemuLives, fmt.Errorf("whether QEMU lives is not known: %w", err)
	}
	return qemuLives, fmt.Errorf("QEMU, process %d, lives, but its monitor cannot be reached: %w", o.proc.Pid(), err)
}

// slowToAnswer: QEMU's process has just taken a connection into its queue, and is given
// a moment to answer before it counts as out of reach. To find out what it is that
// keeps it takes longer than a secondary waits for a daemon that is started again.
func (mo *monitor) slowToAnswer(ctx context.Context) {
	mo.d.work.Go(func() {
		again := backoff{last: mo.d.opt.qmpTimeout / 4, first: mo.d.opt.qmpTimeout / 4}
		if !again.wait(ctx) {
			return
		}
		mo.d.post(func() {
			if mo.d.failover != nil && mo.conn == nil {
				mo.outOfReach = true
			}
		})
	})
}

// hangs: QEMU has not answered on its connection for as long as two more would have taken.
func (mo *monitor) hangs(r reach, why error) {
	if r == qemuMute {
		mo.unanswered = maxUnanswered - 1
	}
	mo.unreachable(r, why)
}

// unreachable: no connection to QEMU could be made.
func (mo *monitor) unreachable(r reach, why error) {
	fo := mo.d.failover
	if fo == nil || !mo.hadQEMU {
		return // it comes
	}
	mo.outOfReach = r == qemuLives
	switch r {
	case qemuLives:
		mo.unanswered = 0
	case qemuMute:
		mo.unanswered++
	case qemuEnded:
		mo.unanswered = maxUnanswered
	}
	if mo.unanswered == maxUnanswered {
		mo.qemuGone(why.Error(), r == qemuMute)
	}
}
