// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/qmp"
)

// SetMask switches R24 off: QEMU reports a write as done when one replica took it.
func SetMask(s *Spec, mask bool) { s.mask = mask }

// Foreign has QEMU started with arguments that are refused in a config.
func Foreign(s *Spec) { s.foreign = true }

// Delays counts the connections to and from in on which Nagle's algorithm is on.
func Delays(m *qmp.Monitor, in Incoming) (n int, err error) {
	err = connections(m, in, func(fd int) error {
		on, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY)
		if on == 0 {
			n++
		}
		return err
	})
	return n, err
}

// TLSFolder makes t.Dir with a client's certificates, which the caller may read.
func TLSFolder(t *TLS) (remove func() error, err error) {
	return t.folder(tlsClient, os.Geteuid(), os.Getegid())
}

// OwnPeriod switches R12 off: QEMU makes checkpoints of its own, at the period it has.
func OwnPeriod() Options { return Options{ownPeriod: true} }

// OwnConnection has QEMU make the migration's connection itself under TLS too.
func OwnConnection(o Options) Options { o.ownConnection = true; return o }

// SetLastChanges sets what a copy of changes may leave for the time in which the guest is
// stopped, and returns what it was.
func SetLastChanges(bytes int64) (was int64) {
	was, lastChanges = lastChanges, bytes
	return was
}
