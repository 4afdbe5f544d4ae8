// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Ports of the guests' service.
const (
	portEcho   = "7000" // what comes goes back
	portSource = "7001" // "N\n": N bytes of pattern, then FIN
	portSink   = "7002" // counts until FIN, answers "OK N\n"
	portDiffer = "7003" // a line: a line that differs between the guests
	portCut    = "7004" // "a,b n\n": n bytes, cut at a by the PVM and at b by the SVM
	portAhead  = "7005" // "pvm n\n" or "svm n\n": n bytes, from that guest at once, from the other later
	portClock  = "7006" // a line: the guest's clock, which no other guest's agrees with
	portDirty  = "7008" // 16 MiB of the guest's memory change, over and over, until the connection closes; a line when all have
	portEnd    = "7009" // "poweroff\n", "reboot\n": the guest's end
	portCAS    = "7010" // registers that are read, written and swapped: registers_test.go
	portLock   = "7020" // a line: the lock, "locked"; the next line: "unlocked"
	portRandom = "7021" // UDP: what comes, and something random
	portDial   = "7019" // "ADDRESS LOCALPORT\n": the guest connects there, and answers with the outcome
	portDisk   = "7007" // "write NAME TEXT\n": a file on the guest's disk, and it is there when the answer comes; "fill NAME MIB\n": so much; "read NAME\n"
)

// serveGuest is the service inside a guest; as is "guest pvm" or "guest svm".
func serveGuest(as string) {
	svm := as == "guest svm"
	runAgent()
	for port, f := range map[string]func(*net.TCPConn){
		portEcho: func(c *net.TCPConn) { io.Copy(onlyWriter{c}, onlyReader{c}) },
		portSource: func(c *net.TCPConn) {
			var n int64
			if _, err := fmt.Fscanln(c, &n); err == nil {
				io.Copy(onlyWriter{c}, io.LimitReader(&pattern{}, n))
			}
		},
		portSink: func(c *net.TCPConn) {
			n, _ := io.Copy(io.Discard, c)
			fmt.Fprintf(c, "OK %d\n", n)
		},
		portDiffer: func(c *net.TCPConn) {
			for r := bufio.NewScanner(c); r.Scan(); {
				fmt.Fprintln(c, "answer of", as)
			}
		},
		portHTTP: serveHTTP,
		portAhead: func(c *net.TCPConn) {
			var first string
			var n int64
			for {
				if _, err := fmt.Fscanln(c, &first, &n); err != nil {
					return
				}
				if as != "guest "+first {
					time.Sleep(150 * time.Millisecond) // being behind is what is tested
				}
				io.Copy(onlyWriter{c}, io.LimitReader(&pattern{}, n))
			}
		},
		portTLS: serveTLS,
		portClock: func(c *net.TCPConn) {
			for r := bufio.NewScanner(c); r.Scan(); {
				fmt.Fprintln(c, r.Text(), time.Now().UnixNano())
			}
		},
		portDisk: serveDisk,
		portCAS:  serveRegisters,
		portLock: serveLock(),
		portEnd: func(c *net.TCPConn) {
			for r := bufio.NewScanner(c); r.Scan(); {
				how := map[string]int{"poweroff": unix.LINUX_REBOOT_CMD_POWER_OFF, "reboot": unix.LINUX_REBOOT_CMD_RESTART}[r.Text()]
				nicsDown()
				fmt.Fprintln(c, r.Text(), unix.Reboot(how))
			}
		},
		portDial: func(c *net.TCPConn) {
			for r := bufio.NewScanner(c); r.Scan(); {
				to, port, _ := strings.Cut(r.Text(), " ")
				fmt.Fprintln(c, dialFrom(to, port))
			}
		},
		portDirty: func(c *net.TCPConn) {
			b := dirty()
			stop := make(chan struct{})
			go func() { io.Copy(io.Discard, c); close(stop) }()
			for i := byte(1); ; i++ {
				for at := 0; at < len(b); at += 4096 {
					b[at] = i
				}
				if i == 1 {
					fmt.Fprintln(c, "dirty")
				}
				select {
				case <-stop:
					return
				case <-time.After(10 * time.Millisecond):
				}
			}
		},
		portCut: func(c *net.TCPConn) {
			var p, s, n int
			for {
				if _, err := fmt.Fscanf(c, "%d,%d %d\n", &p, &s, &n); err != nil {
					return
				}
				cut := p
				if svm {
					cut = s
				}
				b := make([]byte, n)
				(&pattern{}).Read(b)
				for ; len(b) > 0; b = b[min(cut, len(b)):] {
					c.Write(b[:min(cut, len(b))])
				}
			}
		},
	} {
		servePort(port, f)
	}
	serveRandom()
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin) // until the test closes it
}

// dialFrom connects from a port that both guests take, and closes at once.
func dialFrom(to, port string) error {
	local, err := net.ResolveTCPAddr("tcp", ":"+port)
	if err != nil {
		return err
	}
	d := net.Dialer{LocalAddr: local, Timeout: 20 * time.Second}
	c, err := d.Dial("tcp", to)
	if err != nil {
		return err
	}
	return c.Close()
}

// dirty is memory that the guest, which has little, allocates once.
var dirty = sync.OnceValue(func() []byte { return make([]byte, 16<<20) })

// serveDisk writes and reads files on the guest's first disk.
func serveDisk(c *net.TCPConn) {
	for r := bufio.NewScanner(c); r.Scan(); {
		what, rest, _ := strings.Cut(r.Text(), " ")
		name, text, _ := strings.Cut(rest, " ")
		path := filepath.Join("/disk", name)
		if what == "read" {
			// The disk is asked, not the guest's memory.
			if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
				fmt.Fprintln(c, err)
				continue
			}
			b, err := os.ReadFile(path)
			fmt.Fprintf(c, "%s %v\n", b, err)
			continue
		}
		f, err := os.Create(path)
		if mib, bad := strconv.Atoi(text); err == nil && what == "fill" && bad == nil {
			_, err = io.Copy(onlyWriter{f}, io.LimitReader(&pattern{}, int64(mib)<<20))
		} else if err == nil {
			_, err = f.WriteString(text)
		}
		if err == nil {
			err = f.Sync()
		}
		if err == nil {
			err = f.Close()
		}
		fmt.Fprintln(c, "wrote", name, err)
	}
}

// servePort gives f each connection to a port, until the process ends.
func servePort(port string, f func(*net.TCPConn)) {
	l, err := net.Listen("tcp", ":"+port)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	go acceptAll(l, f)
}

// acceptAll gives f each connection, and closes it behind f, until l closes.
func acceptAll(l net.Listener, f func(*net.TCPConn)) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			f(c.(*net.TCPConn))
		}()
	}
}

// Hide the splice paths, whose segmentation is the kernel's.
type onlyReader struct{ io.Reader }

type onlyWriter struct{ io.Writer }

// pattern is an endless stream in which no two places nearby look alike.
type pattern struct{ pos uint64 }

func (p *pattern) Read(b []byte) (int, error) {
	for i := range b {
		x := (p.pos >> 3) * 0x9e3779b97f4a7c15
		b[i] = byte(x >> (8 * (p.pos & 7)))
		p.pos++
	}
	return len(b), nil
}

// nicsDown takes the guest's NICs down before its end: newer kernels reset virtio devices then, and virtio-net's
// driver may spin for ever where something that it has sent is under way.
func nicsDown() {
	nics, err := net.Interfaces()
	if err != nil {
		return
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	for _, nic := range nics {
		if r, err := unix.NewIfreq(nic.Name); err == nil { // without flags
			_ = unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r)
		}
	}
}
