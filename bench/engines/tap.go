// SPDX-License-Identifier: Apache-2.0

package engines

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// tap is the side of a tap device that QEMU holds.
type tap struct {
	fd   int // file's
	file *os.File
}

// maxTap is the longest frame of a tap, with its virtio-net header.
const maxTap = vnetLen + ethLen + 1<<16

// openTap makes a tap in the calling thread's network namespace. It is gone when it is
// closed.
func openTap(name string) (*tap, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err == nil {
		err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("make tap %s: %w", name, err)
	}
	return &tap{fd, os.NewFile(uintptr(fd), name)}, nil
}

// send transmits a frame; head begins with the virtio-net header.
func (t *tap) send(head, payload []byte) error {
	for {
		_, err := unix.Writev(t.fd, [][]byte{head, payload})
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN):
			return fmt.Errorf("send a frame of %d bytes on %s: %w", len(head)+len(payload), t.file.Name(), err)
		}
		runtime.Gosched()
	}
}

// discard reads until the tap is closed.
func (t *tap) discard() {
	for buf := make([]byte, maxTap); ; {
		if _, err := t.file.Read(buf); err != nil {
			return
		}
	}
}
