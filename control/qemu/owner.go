// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Owner returns the process that listens on the monitor socket which conn is connected
// to. The kernel knows it as soon as the connection is made, accepted or not.
func Owner(conn *net.UnixConn) (*Process, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	fd := -1
	if err := raw.Control(func(s uintptr) {
		if cred, err = unix.GetsockoptUcred(int(s), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			fd, err = unix.GetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		}
	}); err != nil {
		return nil, err
	}
	if err != nil {
		return nil, fmt.Errorf("who listens on %s: %w", conn.RemoteAddr(), err)
	}
	if cred.Pid == 0 {
		unix.Close(fd)
		return nil, fmt.Errorf("who listens on %s is not known: it is a process of another PID namespace", conn.RemoteAddr())
	}
	return watch(int(cred.Pid), fd)
}

// Listens reports whether p still listens on the unix socket that was bound as path. The
// file may have been removed, or belong to another process by now.
func (p *Process) Listens(path string) (listens bool, err error) {
	err = p.each(path, func(fd int) (bool, error) {
		n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
		listens = n == 1
		return listens, err
	})
	return listens, err
}

// Client names the process that p serves on the unix socket bound as path; "": there is
// none. A monitor serves one client at a time. A client that has closed its end does not
// count, even if p has not noticed yet.
func (p *Process) Client(path string) (who string, err error) {
	err = p.each(path, func(fd int) (bool, error) {
		if n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); n == 1 || err != nil {
			return false, err
		}
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		if _, err := unix.Poll(poll, 0); err != nil || poll[0].Revents&(unix.POLLHUP|unix.POLLRDHUP) != 0 {
			return false, err
		}
		cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			return false, err
		}
		who = fmt.Sprintf("process %d", cred.Pid)
		// That process may have ended after handing its socket to another.
		if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cred.Pid)); err == nil {
			who += " (" + strings.TrimSpace(string(name)) + ")"
		}
		return true, nil
	})
	return who, err
}

// each calls f with each of p's sockets that was bound as path or accepted there, until f
// returns enough.
func (p *Process) each(path string, f func(fd int) (enough bool, err error)) error {
	return p.sockets(func(fd int) (bool, error) {
		name, err := unix.Getsockname(fd)
		if err != nil {
			return false, nil // closed meanwhile
		}
		if u, ok := name.(*unix.SockaddrUnix); !ok || u.Name != path {
			return false, nil
		}
		return f(fd)
	})
}

// sockets calls f with a duplicate of each of p's sockets, until f returns enough. It goes
// through p's descriptors, because /proc/net shows the sockets of one network namespace
// only, and an accepted unix connection only in that of its client.
func (p *Process) sockets(f func(fd int) (enough bool, err error)) error {
	dir := fmt.Sprintf("/proc/%d/fd", p.pid)
	all, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range all {
		to, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil || !strings.HasPrefix(to, "socket:") {
			continue // closed meanwhile, or something else
		}
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		fd, err := unix.PidfdGetfd(p.fd, n, 0)
		if errors.Is(err, unix.EBADF) {
			continue // closed meanwhile
		}
		if err != nil {
			return fmt.Errorf("process %d: descriptor %d: %w", p.pid, n, err)
		}
		enough, err := f(fd)
		unix.Close(fd)
		if enough || err != nil {
			return err
		}
	}
	return nil
}

// Stopped reports whether a signal has stopped p (SIGSTOP).
func (p *Process) Stopped() bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.pid))
	_, rest, _ := strings.Cut(string(b), ") ") // after the program's name, in which QEMU's has no parenthesis
	return err == nil && strings.HasPrefix(rest, "T")
}
