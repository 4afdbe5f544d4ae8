// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// waiter waits until a ring holds something or it is woken, to the nanosecond: the
// library's reader rounds its deadline down to milliseconds, so that the loop would
// spin through the rest.
type waiter struct {
	ring   int      // a descriptor that the ring's reader owns
	wake   *os.File // eventfd; a File, so that a late wakeUp cannot hit a reused descriptor
	wakeFD int
}

func newWaiter(ring int) (*waiter, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return &waiter{ring: ring, wake: os.NewFile(uintptr(fd), "eventfd"), wakeFD: fd}, nil
}

// wait returns early if wakeUp is called, or was called since the last wait.
func (w *waiter) wait(d time.Duration) error {
	fds := [...]unix.PollFd{{Fd: int32(w.ring), Events: unix.POLLIN}, {Fd: int32(w.wakeFD), Events: unix.POLLIN}}
	ts := unix.NsecToTimespec(int64(max(d, 0)))
	// A signal ends the wait early, as a wake-up does.
	if _, err := unix.Ppoll(fds[:], &ts, nil); err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("wait for the ring: %w", err)
	}
	if fds[1].Revents != 0 {
		var count [8]byte
		if _, err := w.wake.Read(count[:]); err != nil {
			return fmt.Errorf("read eventfd: %w", err)
		}
	}
	return nil
}

func (w *waiter) wakeUp() {
	// It fails if the waiter is closed, which needs no waking.
	_, _ = w.wake.Write([]byte{0: 1, 7: 0})
}

func (w *waiter) close() error { return w.wake.Close() }
