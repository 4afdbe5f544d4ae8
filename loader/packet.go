// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/loader/core"
)

// sendBuffer lets a burst of GSO frames queue in the kernel; a frame that does not fit
// is lost, and the guest retransmits it.
const sendBuffer = 64 << 20

// packetConn sends frames on one device, each with a virtio-net header, by
// sendmmsg.
type packetConn struct {
	fd   int
	msgs []mmsghdr
	iovs []frameParts
}

// frameParts are a frame's head and the parts of its payload.
type frameParts struct {
	v [1 + core.MaxParts]unix.Iovec
	n int
}

// mmsghdr is the kernel's struct. Go aligns it as C does: with four bytes after the
// length on 64 bits, and none on 32.
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
}

// newPacketConn opens a socket that sends to the device with the given mark
// (0: none).
func newPacketConn(ifindex int, mark uint32) (*packetConn, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	set := func(level, opt, val int) {
		if err == nil {
			err = unix.SetsockoptInt(fd, level, opt, val)
		}
	}
	set(unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1)
	set(unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer)
	if mark != 0 {
		set(unix.SOL_SOCKET, unix.SO_MARK, int(mark))
	}
	if err == nil {
		// Protocol 0: the socket receives nothing.
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: ifindex})
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("packet socket on device %d: %w", ifindex, err)
	}
	return &packetConn{fd: fd}, nil
}

// Queue adds a frame: head holds the virtio-net header and the first bytes,
// tail (may be empty) the rest. Both must stay unchanged until flush.
func (c *packetConn) Queue(head, tail []byte) {
	c.iovs = append(c.iovs, frameParts{})
	c.Join(head, tail)
}

// Join makes the frame that was queued last longer (see [core.Outlet]).
func (c *packetConn) Join(head, tail []byte) {
	p := &c.iovs[len(c.iovs)-1]
	p.v[0].Base, p.n = unsafe.SliceData(head), max(p.n, 1)
	p.v[0].SetLen(len(head))
	if len(tail) > 0 {
		p.v[p.n].Base = unsafe.SliceData(tail)
		p.v[p.n].SetLen(len(tail))
		p.n++
	}
}

// flush sends what was queued, in order, and returns how many frames the
// kernel refused. A refused frame is lost, those after it are still sent.
func (c *packetConn) flush() (lost int, err error) {
	c.msgs = c.msgs[:0]
	for i := range c.iovs {
		var m mmsghdr
		m.hdr.Iov = &c.iovs[i].v[0]
		m.hdr.SetIovlen(c.iovs[i].n)
		c.msgs = append(c.msgs, m)
	}
	for rest := c.msgs; len(rest) > 0; {
		n, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(c.fd), uintptr(unsafe.Pointer(&rest[0])), uintptr(len(rest)), unix.MSG_DONTWAIT, 0, 0)
		switch {
		case errno == unix.EINTR:
		case errno != 0:
			lost++
			err = errors.Join(err, fmt.Errorf("send frame: %w", errno))
			rest = rest[1:]
		default:
			rest = rest[n:]
		}
	}
	clear(c.iovs)
	clear(c.msgs)
	c.iovs = c.iovs[:0]
	return lost, err
}

func (c *packetConn) close() error { return unix.Close(c.fd) }
