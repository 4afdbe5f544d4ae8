// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/qmp"
)

// NoDelay switches Nagle's algorithm off on QEMU's connections to and from in, the
// secondary's addresses, where QEMU leaves it on, but at one end of the disks'. A checkpoint
// is written in small pieces that go back and forth, and would wait for the other host's
// delayed ACK, 40 ms or more. The setting lasts as long as the connection.
func NoDelay(m *qmp.Monitor, in Incoming) error {
	return connections(m, in, func(fd int) error { return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) })
}

// connections calls f with a duplicate of each TCP connection of QEMU's to or from in.
func connections(m *qmp.Monitor, in Incoming, f func(fd int) error) error {
	migration, isTCP := strings.CutPrefix(in.Migration, "tcp:")
	if !isTCP {
		return nil
	}
	at, err := netip.ParseAddrPort(migration)
	if err != nil {
		return fmt.Errorf("migration address %s: %w", in.Migration, err)
	}
	p, err := Owner(m.Conn())
	if err != nil {
		return err
	}
	defer p.Release()
	found := false
	err = p.sockets(func(fd int) (bool, error) {
		local, localErr := unix.Getsockname(fd)
		remote, remoteErr := unix.Getpeername(fd)
		if localErr != nil || remoteErr != nil {
			return false, nil // it listens, or was closed meanwhile
		}
		for _, a := range []netip.AddrPort{addrPort(local), addrPort(remote)} {
			if a == at || a == in.NBD && a.IsValid() {
				found = found || a == at
				return false, f(fd)
			}
		}
		return false, nil
	})
	if err == nil && !found {
		err = errors.New("QEMU has no connection there")
	}
	if err != nil {
		return fmt.Errorf("migration address %s: %w", in.Migration, err)
	}
	return nil
}

// addrPort is the zero value for other addresses than IP's.
func addrPort(a unix.Sockaddr) netip.AddrPort {
	switch a := a.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port))
	}
	return netip.AddrPort{}
}
