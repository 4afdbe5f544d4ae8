// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What receives a guest's frames before lockstep's tcx programs do: XDP on the tap, and
// packet sockets for all protocols (ETH_P_ALL). The kernel gives these a copy of every
// frame before tcx runs, also of frames that lockstep then holds or drops.

// watcher is a packet socket that reads all of a tap's frames.
type watcher struct {
	owner    string // "process 7 (name)"
	passOnBy string // what the owner could pass frames on by; "": nothing that is known
	inode    string
	pid      int
}

// foreignXDP names an XDP program on a tap, where lockstep has none.
func foreignXDP(tap netlink.Link) string {
	x := tap.Attrs().Xdp
	if x == nil || !x.Attached {
		return ""
	}
	return fmt.Sprintf("XDP program %s (id %d) is in front of lockstep's on %s: ip link set %[3]s xdp off", programName(ebpf.ProgramID(x.ProgId)), x.ProgId, tap.Attrs().Name)
}

// passesOn describes a watcher that can pass frames on.
func (w *watcher) passesOn(tap string) string {
	return fmt.Sprintf("%s reads every frame of %s in front of lockstep's programs (a packet socket), and can pass them on (%s): take %[2]s out of it, and put it into a bridge",
		w.owner, tap, w.passOnBy)
}

// reads describes one that is not known to be able to.
func (w *watcher) reads(tap string) string {
	return fmt.Sprintf("%s reads every frame of %s, also output that clients have not received yet (a packet socket)", w.owner, tap)
}

// InFront names what is in front of lockstep's programs on a tap and can pass frames
// on, and what only reads them.
func InFront(tap string) (passOn, read []string, err error) {
	l, err := netlink.LinkByName(tap)
	if err != nil {
		return nil, nil, fmt.Errorf("tap %s: %w", tap, err)
	}
	if x := foreignXDP(l); x != "" {
		passOn = append(passOn, x)
	}
	f, err := openPackets()
	if err != nil {
		return passOn, nil, err
	}
	defer f.Close()
	all, err := watchers(f, l.Attrs().Index, nil)
	for _, w := range all {
		if w.passOnBy != "" {
			passOn = append(passOn, w.passesOn(tap))
		} else {
			read = append(read, w.reads(tap))
		}
	}
	return passOn, read, err
}

// openPackets opens the list of packet sockets in this thread's network namespace. It
// may be read again and again.
func openPackets() (*os.File, error) {
	f, err := os.Open("/proc/thread-self/net/packet")
	if err != nil {
		return nil, fmt.Errorf("packet sockets: %w", err)
	}
	return f, nil
}

// watchers lists the packet sockets that read all frames of a device. known are the
// processes that had some, by inode; nil: none.
func watchers(f *os.File, ifindex int, known map[string]int) (list []watcher, err error) {
	socks, err := packetSockets(f)
	if err != nil {
		return nil, err
	}
	for inode, s := range socks {
		// Others are handed what tcx and the bridge have let pass.
		if !s.all || s.ifindex != ifindex && s.ifindex != 0 {
			continue
		}
		w := watcher{inode: inode, pid: known[inode]}
		if w.pid == 0 || !holds(w.pid, inode) {
			w.pid = holder(inode)
		}
		switch pid := w.pid; {
		case pid != 0:
			name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
			w.owner = fmt.Sprintf("process %d (%s)", pid, strings.TrimSpace(string(name)))
			w.passOnBy = wayOut(pid, inode)
		default:
			again, err := packetSockets(f)
			if err != nil {
				return nil, err
			}
			if _, there := again[inode]; !there {
				continue // closed meanwhile
			}
			w.owner, w.passOnBy = "a process that cannot be seen here", "nobody knows"
		}
		list = append(list, w)
	}
	return list, nil
}

type packetSocket struct {
	all     bool // bound, to all protocols
	ifindex int  // 0: of any device
}

// packetSockets reads openPackets' file, by inode.
func packetSockets(f *os.File) (map[string]packetSocket, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, fmt.Errorf("packet sockets: %w", err)
	}
	socks := make(map[string]packetSocket)
	lines := bufio.NewScanner(f)
	lines.Scan() // sk RefCnt Type Proto Iface R Rmem User Inode
	for lines.Scan() {
		l := strings.Fields(lines.Text())
		if len(l) < 9 {
			return nil, fmt.Errorf("packet sockets: %q is not understood", lines.Text())
		}
		const allProtocols, running = "0003", "1"
		ifindex, err := strconv.Atoi(l[4])
		if err != nil {
			return nil, fmt.Errorf("packet sockets: %q is not understood", lines.Text())
		}
		socks[l[8]] = packetSocket{all: l[3] == allProtocols && l[5] == running, ifindex: ifindex}
	}
	return socks, lines.Err()
}

// holder is a process that has the socket open; 0: none that can be seen.
func holder(inode string) int {
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		if pid, err := strconv.Atoi(filepath.Base(p)); err == nil && holds(pid, inode) {
			return pid
		}
	}
	return 0
}

func holds(pid int, inode string) bool {
	for _, to := range descriptors(pid) {
		if to == "socket:["+inode+"]" {
			return true
		}
	}
	return false
}

// descriptors are what a process has open, by number.
func descriptors(pid int) map[int]string {
	open := make(map[int]string)
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, _ := os.ReadDir(dir) // gone meanwhile, or not this user's
	for _, e := range fds {
		if n, err := strconv.Atoi(e.Name()); err == nil {
			open[n], _ = os.Readlink(filepath.Join(dir, e.Name()))
		}
	}
	return open
}

// wayOut is what else a process has open through which it could pass frames on, as a
// user-space switch or router does and a program that captures does not. Whoever means to
// deceive can send through the very socket that it reads from; that is not detectable.
func wayOut(pid int, inode string) string {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return "" // it has ended
	}
	defer unix.Close(pidfd)
	for n, to := range descriptors(pid) {
		for _, dev := range []string{"/dev/net/tun", "/dev/tap", "/dev/vfio/", "/dev/vhost-", "/dev/uio", "/dev/infiniband/"} {
			if strings.HasPrefix(to, dev) {
				return to
			}
		}
		if !strings.HasPrefix(to, "socket:[") || to == "socket:["+inode+"]" {
			continue
		}
		fd, err := unix.PidfdGetfd(pidfd, n, 0)
		if err != nil {
			continue
		}
		domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
		unix.Close(fd)
		if err == nil && domain == unix.AF_PACKET {
			return "another packet socket"
		}
		if err == nil && domain == unix.AF_XDP {
			return "an XDP socket"
		}
	}
	return ""
}
