// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Owner is the process that listens on the monitor socket which conn was made to. It
// is known as soon as the connection is made, though nobody may ever take it.
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
		return nil, fmt.Errorf("who listens on %s: a process of another PID namespace", conn.RemoteAddr())
	}
	return watch(int(cred.Pid), fd)
}

// Listens reports whether anything in the network namespace of p, or in this
// process's own for nil, still listens on the unix socket that was bound as path: also
// when the file is gone.
func (p *Process) Listens(path string) (bool, error) {
	socks, err := p.sockets(path)
	for _, s := range socks {
		if s.listens {
			return true, nil
		}
	}
	return false, err
}

// Client names a process other than the caller that p serves on the unix socket path,
// as a monitor serves one client at a time; "": there is none. A client that has
// closed its end does not count, though p may not have noticed.
func (p *Process) Client(path string) (string, error) {
	socks, err := p.sockets(path)
	if err != nil {
		return "", err
	}
	accepted := make(map[string]bool)
	for _, s := range socks {
		if s.accepted {
			accepted["socket:["+s.inode+"]"] = true
		}
	}
	if len(accepted) == 0 {
		return "", nil
	}
	dir := fmt.Sprintf("/proc/%d/fd", p.pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	for _, e := range fds {
		to, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil || !accepted[to] {
			continue
		}
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if who, err := p.otherEnd(n); who != "" || err != nil {
			return who, err
		}
	}
	return "", nil
}

// otherEnd names the process that made the connection which is p's descriptor n.
func (p *Process) otherEnd(n int) (string, error) {
	fd, err := unix.PidfdGetfd(p.fd, n, 0)
	if err != nil {
		return "", fmt.Errorf("process %d: descriptor %d: %w", p.pid, n, err)
	}
	defer unix.Close(fd)
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	if _, err := unix.Poll(poll, 0); err != nil || poll[0].Revents&(unix.POLLHUP|unix.POLLRDHUP) != 0 {
		return "", err
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return "", err
	}
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cred.Pid))
	if err != nil {
		return fmt.Sprintf("process %d", cred.Pid), nil // it has ended, and another goes on with its socket
	}
	return fmt.Sprintf("process %d (%s)", cred.Pid, strings.TrimSpace(string(name))), nil
}

// Stopped reports whether a signal has stopped p (SIGSTOP).
func (p *Process) Stopped() bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.pid))
	_, rest, _ := strings.Cut(string(b), ") ") // QEMU's name has no parenthesis
	return err == nil && strings.HasPrefix(rest, "T")
}

// unixSocket is a line of /proc/net/unix.
type unixSocket struct {
	listens, accepted bool
	inode             string
}

func (p *Process) sockets(path string) (list []unixSocket, err error) {
	who := "self"
	if p != nil {
		who = strconv.Itoa(p.pid)
	}
	f, err := os.Open("/proc/" + who + "/net/unix")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// Num RefCount Protocol Flags Type St Inode Path
		l := strings.SplitN(strings.Join(strings.Fields(lines.Text()), " "), " ", 8)
		if len(l) < 8 || l[7] != path {
			continue
		}
		const acceptsConnections, connected = "00010000", "03" // waiting to be accepted is 02
		list = append(list, unixSocket{listens: l[3] == acceptsConnections, accepted: l[5] == connected, inode: l[6]})
	}
	return list, lines.Err()
}
