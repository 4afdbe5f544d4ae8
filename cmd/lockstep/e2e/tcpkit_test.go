// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Connections of which the test has all three ends in its hands: the client's and both
// guests'.

// door is a port of both guests.
type door struct {
	port string
	came [2]sync.Map // in the PVM, in the SVM: connections by the remote's address
}

// openDoor opens a port of both guests until the test ends.
func openDoor(p *pair, network, port string, opt sockopt) *door {
	p.t.Helper()
	d := &door{port: port}
	for i, guest := range []string{p.PVM, p.SVM} {
		listenPlain(p, guest, network, port, opt, func(c *net.TCPConn) {
			d.came[i].Store(c.RemoteAddr().String(), c)
			<-p.t.Context().Done()
		})
	}
	return d
}

// line is one connection. What one guest does, the other does too.
type line struct {
	t      *testing.T
	c      *net.TCPConn
	guests []*net.TCPConn // the PVM's end and the SVM's, or after a takeover the SVM's
	// What both have sent so far.
	fromClient, fromGuest pattern

	under func(*testing.T) error // what a takeover finds under way, while nothing reaches the client; nil: data, both ways
	after func(*testing.T) error // and what becomes of it
}

// accept gives the guests' ends of a connection from a remote, or the SVM's alone. meanwhile
// is what the remote does while it waits.
func (d *door) accept(t *testing.T, remote string, alone bool, meanwhile func()) (guests []*net.TCPConn) {
	t.Helper()
	for i := range d.came {
		if alone && i == 0 {
			continue
		}
		// An SVM may not believe the ACK before its own timer has sent another SYN|ACK.
		lt.Eventually(t, 40*time.Second, func() (bool, string) {
			meanwhile()
			end, ok := d.came[i].LoadAndDelete(remote)
			if ok {
				guests = append(guests, end.(*net.TCPConn))
			}
			return ok, fmt.Sprintf("guest %d did not accept the connection from %s", i, remote)
		})
	}
	return guests
}

// newLine has the guests' ends of c.
func newLine(t *testing.T, d *door, c *net.TCPConn) *line {
	t.Helper()
	l := &line{t: t, c: c, guests: d.accept(t, c.LocalAddr().String(), false, func() {})}
	l.deadlines(time.Minute)
	l.under, l.after = l.bothWays, l.arrive
	return l
}

func (l *line) ends() []*net.TCPConn { return append([]*net.TCPConn{l.c}, l.guests...) }

func (l *line) deadlines(limit time.Duration) {
	l.t.Helper()
	must(l.t, atOnce(l.ends(), func(c *net.TCPConn) error { return c.SetDeadline(time.Now().Add(limit)) }))
}

// inGuests does f in both guests at once.
func (l *line) inGuests(f func(*net.TCPConn) error) error { return atOnce(l.guests, f) }

// atOnce does f with all ends at once.
func atOnce(ends []*net.TCPConn, f func(*net.TCPConn) error) error {
	var done []<-chan error
	for _, end := range ends {
		done = append(done, beside(func() error { return f(end) }))
	}
	return ended(done...)
}

// beside does f beside what follows.
func beside(f func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	return done
}

func ended(done ...<-chan error) error {
	var errs []error
	for _, d := range done {
		errs = append(errs, <-d)
	}
	return errors.Join(errs...)
}

// next are the next n bytes of a stream.
func next(stream *pattern, n int) []byte {
	b := make([]byte, n)
	stream.Read(b)
	return b
}

func send(b []byte) func(*net.TCPConn) error {
	return func(c *net.TCPConn) error {
		_, err := c.Write(b)
		return err
	}
}

func receive(want []byte) func(*net.TCPConn) error {
	return func(c *net.TCPConn) error {
		got := make([]byte, len(want))
		if n, err := io.ReadFull(c, got); err != nil {
			return fmt.Errorf("%s: %d of %d bytes: %w", c.LocalAddr(), n, len(want), err)
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("%s: bytes differ", c.LocalAddr())
		}
		return nil
	}
}

// toClient transfers n bytes from the guests.
func (l *line) toClient(n int) error {
	b := next(&l.fromGuest, n)
	done := beside(func() error { return l.inGuests(send(b)) })
	return errors.Join(receive(b)(l.c), ended(done))
}

// toGuest transfers n bytes to the guests.
func (l *line) toGuest(n int) error {
	b := next(&l.fromClient, n)
	done := beside(func() error { return send(b)(l.c) })
	return errors.Join(l.inGuests(receive(b)), ended(done))
}

// exchange has something pass both ways, there and back.
func (l *line) exchange() error { return errors.Join(l.toGuest(500), l.toClient(500)) }

// Sizes of what is under way at a takeover.
const underWayDown, underWayUp = 20_000, 5_000

// bothWays has data under way in both directions. A copy of the stream's position is
// sent from, so that arrive expects it.
func (l *line) bothWays(*testing.T) error {
	down, up := l.fromGuest, l.fromClient
	return errors.Join(l.inGuests(send(next(&down, underWayDown))), send(next(&up, underWayUp))(l.c))
}

// arrive is the end of bothWays, and of the connection.
func (l *line) arrive(*testing.T) error {
	return errors.Join(
		receive(next(&l.fromGuest, underWayDown))(l.c),
		l.inGuests(receive(next(&l.fromClient, underWayUp))),
		l.exchange(), l.finish(),
	)
}

// finish closes the connection, the client first.
func (l *line) finish() error {
	err := errors.Join(l.c.CloseWrite(), l.inGuests(atEnd))
	return errors.Join(err, l.inGuests((*net.TCPConn).CloseWrite), atEnd(l.c), l.close())
}

func (l *line) close() error {
	err := l.inGuests((*net.TCPConn).Close)
	return errors.Join(err, l.c.Close())
}

// atEnd expects the other end's FIN.
func atEnd(c *net.TCPConn) error {
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: %d bytes, %w in place of the end", c.LocalAddr(), n, err)
	}
	return nil
}

// port is the client's.
func (l *line) port() uint16 { return uint16(l.c.LocalAddr().(*net.TCPAddr).Port) }

// info is what a kernel knows of an end.
func info(c *net.TCPConn) (i *unix.TCPInfo, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	if e := raw.Control(func(fd uintptr) { i, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }); e != nil {
		return nil, e
	}
	return i, err
}

// Bits of TCPInfo's Options, TCPI_OPT_ of linux/tcp.h.
const (
	optTIMESTAMPS = 1 << iota
	optSACK
	optWSCALE
	optECN
)

// each checks what the kernel knows of every end.
func (l *line) each(right func(*unix.TCPInfo) bool) error {
	for _, c := range l.ends() {
		if i, err := info(c); err != nil || !right(i) {
			return fmt.Errorf("%s: %+v, %w", c.LocalAddr(), i, err)
		}
	}
	return nil
}

// dialed is what came of a connection that a guest makes.
type dialed struct {
	c   *net.TCPConn
	err error
}

// dialOut connects from a port of namespace ns.
func dialOut(ctx context.Context, t *testing.T, ns string, from int, to string, opt sockopt) <-chan dialed {
	done := make(chan dialed, 1)
	go func() {
		var c net.Conn
		var err error
		lt.In(t, ns, func() {
			d := net.Dialer{Timeout: time.Minute, LocalAddr: &net.TCPAddr{Port: from}, KeepAlive: -1, Control: opt}
			c, err = d.DialContext(ctx, "tcp4", to)
		})
		tc, _ := c.(*net.TCPConn)
		done <- dialed{tc, err}
	}()
	return done
}

// setInts sets options of sockets.
func setInts(opts ...[3]int) sockopt {
	return func(_, _ string, c syscall.RawConn) error {
		var errs []error
		if e := c.Control(func(fd uintptr) {
			for _, o := range opts {
				errs = append(errs, unix.SetsockoptInt(int(fd), o[0], o[1], o[2]))
			}
		}); e != nil {
			return e
		}
		return errors.Join(errs...)
	}
}

// dialBy connects to a door with options, from a port unless it is 0.
func dialBy(p *pair, d *door, host string, from int, opt sockopt) *net.TCPConn {
	p.t.Helper()
	var c net.Conn
	lt.In(p.t, p.Client, func() {
		dialer := net.Dialer{Timeout: 10 * time.Second, Control: opt, KeepAlive: -1}
		if from != 0 {
			dialer.LocalAddr = &net.TCPAddr{Port: from}
		}
		var err error
		if c, err = dialer.Dial("tcp", net.JoinHostPort(host, d.port)); err != nil {
			p.t.Fatal(err)
		}
	})
	p.t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// sysctl sets something in a namespace until the function that it returns is called.
func sysctl(t *testing.T, ns, name, value string) (back func()) {
	t.Helper()
	was, err := lt.Command(ns, "sysctl", "-n", name).Output()
	if err != nil {
		t.Fatalf("sysctl %s: %v", name, err)
	}
	set := func(v string) {
		t.Helper()
		lt.Run(t, "nsenter", "--net=/run/netns/"+ns, "sysctl", "-qw", name+"="+v)
	}
	set(value)
	return func() { set(strings.TrimSpace(string(was))) }
}

// Directions that cut may end: what the client gets, and what it sends.
const (
	clientGets  = ebpf.AttachTCXIngress
	clientSends = ebpf.AttachTCXEgress
)

// cut drops all that the client sends, or gets, until the function that it returns is called.
func cut(p *pair, what ebpf.AttachType) (mend func()) {
	p.t.Helper()
	const drop = 2
	l := attach(p, p.Client, "eth0", what, link.Head(), asm.Mov.Imm(asm.R0, drop), asm.Return())
	return func() { l.Close() }
}

// congest has a router report congestion on all that leaves a device (CE), until the
// function that it returns is called.
func congest(p *pair, ns, device string) (mend func()) {
	p.t.Helper()
	const next = -1
	l := attach(p, ns, device, ebpf.AttachTCXEgress, link.Head(), asm.FnSkbEcnSetCe.Call(), asm.Mov.Imm(asm.R0, next), asm.Return())
	return func() { l.Close() }
}

// States as /proc/net/tcp has them.
const (
	established = "01"
	synSent     = "02"
	synReceived = "03"
	finWait1    = "04"
	finWait2    = "05"
	timeWait    = "06"
	closed      = "07"
	closeWait   = "08"
	lastACK     = "09"
	closing     = "0B"
)

// state is that of a guest's socket to a port of the remote's; "": there is none.
func state(t *testing.T, guest string, remote uint16) string {
	t.Helper()
	out, err := lt.Command(guest, "cat", "/proc/self/net/tcp", "/proc/self/net/tcp6").Output()
	if err != nil {
		t.Fatal(err)
	}
	port := ":" + strings.ToUpper(strconv.FormatInt(int64(remote)|1<<16, 16)[1:])
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) > 3 && strings.HasSuffix(f[2], port) {
			return f[3]
		}
	}
	return ""
}

// awaitState waits until a guest's socket has one of these states.
func awaitState(t *testing.T, guest string, remote uint16, want ...string) {
	t.Helper()
	lt.Eventually(t, 10*time.Second, func() (bool, string) {
		is := state(t, guest, remote)
		return slices.Contains(want, is), fmt.Sprintf("%s: the connection from port %d is in state %q, want one of %q", guest, remote, is, want)
	})
}

// awaitCounts waits until counters of all these namespaces are so much above what they are.
func awaitCounts(t *testing.T, name string, more int, namespaces ...string) {
	t.Helper()
	was := make(map[string]int)
	for _, ns := range namespaces {
		was[ns] = netCount(t, ns, name)
	}
	for ns, was := range was {
		lt.Eventually(t, 15*time.Second, func() (bool, string) {
			is := netCount(t, ns, name)
			return is >= was+more, fmt.Sprintf("%s of %s is %d, and was %d", name, ns, is, was)
		})
	}
}
