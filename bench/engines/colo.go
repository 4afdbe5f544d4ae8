// SPDX-License-Identifier: Apache-2.0

package engines

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/lockstep-ft/lockstep/bench/lab"
)

const prefixLen = 8 // a frame's length and that of its virtio-net header, big endian

// colo is a QEMU without a guest that holds a colo-compare. Frames come and go through
// three Unix sockets.
type colo struct {
	ctx   context.Context
	qemu  string
	dir   string // for the sockets
	cmd   *exec.Cmd
	log   bytes.Buffer
	in    [2]net.Conn // of the guests
	out   net.Conn
	ports ports

	notify   net.Conn
	requests atomic.Uint64 // checkpoints that it has asked for

	prefixes [][prefixLen]byte // feed's
	vec      net.Buffers
	buf      []byte // take's; what is in it lies in [from, to)
	from, to int
}

func newColo(ctx context.Context, qemu, dir string) (*colo, error) {
	c := &colo{ctx: ctx, qemu: qemu, dir: dir, buf: make([]byte, 4*lab.MaxFrame)}
	if err := c.start(); err != nil {
		return nil, errors.Join(err, c.close())
	}
	return c, nil
}

func (c *colo) start() error {
	args := []string{"-machine", "none", "-nodefaults", "-display", "none", "-object", "iothread,id=loop"}
	for _, n := range []string{"primary", "secondary", "out", "notify"} {
		path := filepath.Join(c.dir, n)
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		args = append(args, "-chardev", "socket,server=on,wait=off,id="+n+",path="+path)
	}
	args = append(args, "-object", "colo-compare,id=compare,primary_in=primary,secondary_in=secondary,outdev=out,notify_dev=notify,iothread=loop,vnet_hdr_support=on")
	c.log.Reset()
	c.cmd = exec.CommandContext(c.ctx, c.qemu, args...)
	c.cmd.Stdout, c.cmd.Stderr = &c.log, &c.log
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := c.cmd.Start(); err != nil {
		c.cmd = nil
		return fmt.Errorf("start %s: %w", c.qemu, err)
	}
	var err error
	if c.out, err = c.dial("out"); err != nil {
		return err
	}
	if c.in[pvm], err = c.dial("primary"); err != nil {
		return err
	}
	if c.in[svm], err = c.dial("secondary"); err != nil {
		return err
	}
	if c.notify, err = c.dial("notify"); err != nil {
		return err
	}
	go lab.CountRequests(c.notify, &c.requests)
	return c.ready()
}

// ready waits until QEMU has accepted all three connections: what colo-compare releases
// before that is lost.
func (c *colo) ready() error {
	probe := newFlow(&stream{}, probePort, 0)
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		if err := errors.Join(c.feed(pvm, []frame{probe.synAck()}), c.feed(svm, []frame{probe.synAck()})); err != nil {
			return err
		}
		came := false
		if err := c.take(func([]byte) { came = true }); came || err != nil {
			return err
		}
	}
	return fmt.Errorf("colo-compare releases nothing; QEMU printed: %s", c.printed())
}

func (c *colo) dial(name string) (net.Conn, error) {
	return lab.DialQEMU(c.ctx, filepath.Join(c.dir, name), c.printed)
}

// printed is what QEMU had to say, once it has ended.
func (c *colo) printed() string {
	_ = c.stop() // what it printed counts
	return c.log.String()
}

func (c *colo) stop() error {
	if c.cmd == nil {
		return nil
	}
	err := c.cmd.Process.Kill()
	_ = c.cmd.Wait() // that it was killed is known
	c.cmd = nil
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

func (c *colo) close() error {
	for _, conn := range []net.Conn{c.out, c.in[pvm], c.in[svm], c.notify} {
		if conn != nil {
			conn.Close() // nothing is under way any more
		}
	}
	return c.stop()
}

// renew starts another QEMU.
func (c *colo) renew() error {
	if err := c.close(); err != nil {
		return err
	}
	c.from, c.to = 0, 0
	return c.start()
}

func (c *colo) greet(*flow) error { return nil } // it sees the guests' output only

func (c *colo) ack(*flow, uint32) error { return nil }

func (c *colo) port() (uint16, error) { return c.ports.next() }

func (c *colo) cpu() (time.Duration, error) { return cpuOf(c.cmd.Process.Pid) }

func (c *colo) programs() (time.Duration, error) { return 0, nil }

func (c *colo) feed(g guest, frames []frame) error {
	for len(c.prefixes) < len(frames) {
		c.prefixes = append(c.prefixes, [prefixLen]byte{})
	}
	vec := c.vec[:0]
	for i, f := range frames {
		p := &c.prefixes[i]
		binary.BigEndian.PutUint32(p[:], uint32(len(f.head)+len(f.payload)))
		binary.BigEndian.PutUint32(p[4:], vnetLen)
		vec = append(vec, p[:], f.head)
		if len(f.payload) > 0 {
			vec = append(vec, f.payload)
		}
	}
	c.vec = vec // WriteTo eats its own
	if err := c.in[g].SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := vec.WriteTo(c.in[g]); err != nil {
		return fmt.Errorf("%w: write to colo-compare: %w", errStuck, err)
	}
	return nil
}

func (c *colo) take(visit func([]byte)) error {
	if err := c.out.SetReadDeadline(time.Now().Add(grain)); err != nil {
		return err
	}
	if c.from > 0 {
		c.to = copy(c.buf, c.buf[c.from:c.to])
		c.from = 0
	}
	n, err := c.out.Read(c.buf[c.to:])
	c.to += n
	for c.to-c.from >= prefixLen {
		size := int(binary.BigEndian.Uint32(c.buf[c.from:]))
		skip := int(binary.BigEndian.Uint32(c.buf[c.from+4:]))
		if size > lab.MaxFrame || skip > size {
			return fmt.Errorf("%w: colo-compare announces a frame of %d bytes, %d of them a virtio-net header", errStuck, size, skip)
		}
		if c.to-c.from < prefixLen+size {
			break
		}
		visit(c.buf[c.from+prefixLen+skip : c.from+prefixLen+size])
		c.from += prefixLen + size
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("%w: read from colo-compare: %w", errStuck, err)
	}
	return nil
}

// errStuck: an engine takes and gives nothing any more.
var errStuck = errors.New("the engine is stuck")

// ports gives each connection a port of its own.
type ports struct{ used uint16 }

const probePort = 1 // no connection's

func (p *ports) next() (uint16, error) {
	if p.used == 1<<16-1-probePort {
		return 0, errors.New("all ports of the client were used: run fewer rounds")
	}
	p.used++
	return probePort + p.used, nil
}
