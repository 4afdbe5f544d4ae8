// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"
)

// MaxFrame is what QEMU's filters and colo-compare take for one frame, in bytes (NET_BUFSIZE).
const MaxFrame = 4096 + 65536

// DialQEMU connects to a Unix socket on which a QEMU listens, or will within 10 s. printed is
// what that QEMU had to say, for the error.
func DialQEMU(ctx context.Context, path string, printed func() string) (net.Conn, error) {
	for deadline := time.Now().Add(10 * time.Second); ; {
		conn, err := net.Dial("unix", path)
		if err == nil {
			return conn, nil
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("QEMU does not listen on its socket %s: %w; it printed: %s", filepath.Base(path), err, printed())
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Chardev is a connection to a socket of a QEMU on which colo-compare and the filters
// take and give frames, without virtio-net headers.
type Chardev struct {
	conn net.Conn
	buf  []byte // received, the beginning of a frame first
}

// DialChardev is [DialQEMU] for frames.
func DialChardev(ctx context.Context, path string, printed func() string) (*Chardev, error) {
	conn, err := DialQEMU(ctx, path, printed)
	if err != nil {
		return nil, err
	}
	return &Chardev{conn: conn}, nil
}

// Close ends the connection.
func (c *Chardev) Close() error { return c.conn.Close() }

// Send gives QEMU a frame, within 10 s.
func (c *Chardev) Send(frame []byte) error {
	if err := c.conn.SetWriteDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	b := append(binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(frame)), uint32(len(frame))), frame...)
	if _, err := c.conn.Write(b); err != nil {
		return fmt.Errorf("send QEMU a frame of %d bytes: %w", len(frame), err)
	}
	return nil
}

// Receive returns the next frame that comes within wait; nil: none does.
func (c *Chardev) Receive(wait time.Duration) ([]byte, error) {
	if err := c.conn.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return nil, err
	}
	for {
		if len(c.buf) >= 4 {
			n := int(binary.BigEndian.Uint32(c.buf))
			if n > MaxFrame {
				return nil, fmt.Errorf("QEMU announces a frame of %d bytes", n)
			}
			if len(c.buf) >= 4+n {
				f := c.buf[4 : 4+n : 4+n]
				c.buf = c.buf[4+n:]
				return f, nil
			}
		}
		more := make([]byte, 64<<10)
		n, err := c.conn.Read(more)
		c.buf = append(c.buf, more[:n]...)
		switch {
		case n > 0:
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil, nil
		case errors.Is(err, io.EOF):
			return nil, errors.New("QEMU has closed the connection")
		case err != nil:
			return nil, fmt.Errorf("receive a frame from QEMU: %w", err)
		}
	}
}
