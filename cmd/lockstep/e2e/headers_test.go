// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/loader"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Headers that real TCP stacks act upon: errors that quote them, MPTCP, TCP-MD5, urgent
// data.

// routed has the guests reach other networks through the client.
func routed(p *pair) {
	p.t.Helper()
	for _, guest := range []string{p.PVM, p.SVM} {
		lt.Run(p.t, "ip", "-n", guest, "route", "add", "203.0.113.0/24", "via", lt.Client4)
		lt.Run(p.t, "ip", "-n", guest, "route", "add", "2001:db8:77::/48", "via", lt.Client6)
	}
	lt.Run(p.t, "nsenter", "--net=/run/netns/"+p.Client, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1",
		"net.ipv4.icmp_ratelimit=0", "net.ipv6.icmp.ratelimit=0", "net.ipv4.conf.all.send_redirects=0", "net.ipv4.conf.eth0.send_redirects=0")
}

// unreachable has both guests connect to an address that a router calls unreachable, and
// then to the client, from ports that both take. It returns their answers within limit.
func unreachable(p *pair, to, client, from string, limit time.Duration) (said [2]string, err error) {
	p.t.Helper()
	var l net.Listener
	lt.In(p.t, p.Client, func() {
		var err error
		if l, err = net.Listen("tcp", net.JoinHostPort(client, "9009")); err != nil {
			p.t.Fatal(err)
		}
	})
	defer l.Close()
	go acceptAll(l, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	c := p.mustDial(lt.Guest4, portDial)
	r := bufio.NewReader(c)
	c.SetDeadline(time.Now().Add(limit))
	for i, line := range []string{net.JoinHostPort(to, "9") + " " + from, net.JoinHostPort(client, "9009") + " 1" + from} {
		fmt.Fprintln(c, line)
		if said[i], err = r.ReadString('\n'); err != nil {
			return said, err
		}
	}
	return said, nil
}

// TestUnreachable: a router reports to the guest that it cannot reach what it connects to,
// quoting the PVM's SYN. The SVM believes it too, at once, so both go on alike.
func TestUnreachable(t *testing.T) {
	p := newPair(t, lt.Veth, "", "", "compare: {timeout: 300ms}")
	routed(p)
	lt.Run(t, "ip", "-n", p.Client, "route", "add", "unreachable", "203.0.113.0/24")
	lt.Run(t, "ip", "-n", p.Client, "route", "add", "unreachable", "2001:db8:77::/48")
	for _, to := range [][]string{{"203.0.113.9", lt.Client4, "4100"}, {"2001:db8:77::9", lt.Client6, "4101"}} {
		said, err := unreachable(p, to[0], to[1], to[2], 5*time.Second)
		if err != nil || !strings.Contains(said[0], "no route to host") && !strings.Contains(said[0], "network is unreachable") || said[1] != "<nil>\n" {
			t.Errorf("%s: the guests answered %q, %v", to, said, err)
		}
	}
	if s := p.status("alpha"); s.CheckpointsRequested != 0 {
		t.Errorf("%d checkpoints requested: %+v", s.CheckpointsRequested, s.Causes)
	}
}

// TestMutationQuotes: with the PVM's numbers quoted the SVM does not believe the error,
// and goes on trying.
func TestMutationQuotes(t *testing.T) {
	p := newPairWithout(t, loader.MutateQuote, lt.Veth, "", "", "compare: {timeout: 300ms}")
	routed(p)
	lt.Run(t, "ip", "-n", p.Client, "route", "add", "unreachable", "203.0.113.0/24")
	if said, err := unreachable(p, "203.0.113.9", lt.Client4, "4100", 3*time.Second); !os.IsTimeout(err) {
		t.Errorf("the guests answered %q, %v", said, err)
	}
	p.await("alpha", func(s *api.Status) bool { return s.CheckpointsRequested > 0 })
}

// complains has a guest answer the first segment with payload that comes to port with an
// ICMP error that quotes it, as a firewall does, with the numbers that it has seen.
func complains(p *pair, guest string, port uint16) {
	p.t.Helper()
	lt.In(p.t, guest, func() {
		const all = unix.ETH_P_ALL << 8 // in network order: a socket for all protocols receives before the skew is taken out
		dev, err := net.InterfaceByName("eth0")
		if err != nil {
			p.t.Fatal(err)
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, all)
		if err != nil {
			p.t.Fatal(err)
		}
		p.t.Cleanup(func() { unix.Close(fd) })
		if err := errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 20}),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: dev.Index}),
		); err != nil {
			p.t.Fatal(err)
		}
		out, err := net.Dial("ip4:icmp", lt.Client4)
		if err != nil {
			p.t.Fatal(err)
		}
		p.t.Cleanup(func() { out.Close() })
		go func() {
			b := make([]byte, 1<<16)
			for {
				n, err := unix.Read(fd, b)
				if err != nil {
					return
				}
				ip := b[:n]
				if n < 40 || ip[0] != 0x45 {
					continue
				}
				if l4 := 20; ip[9] != unix.IPPROTO_TCP || binary.BigEndian.Uint16(ip[l4+2:]) != port || n <= l4+int(ip[l4+12]>>4)*4 {
					continue
				}
				msg := append([]byte{3, 13, 0, 0, 0, 0, 0, 0}, ip...)
				binary.BigEndian.PutUint16(msg[2:], internetChecksum(msg))
				_, _ = out.Write(msg) // what does not come is missed
				return
			}
		}()
	})
}

func internetChecksum(b []byte) uint16 {
	var sum uint32
	for i, c := range b {
		sum += uint32(c) << (8 * (1 - i&1))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// complaint reports whether what both guests complain of reaches the client within limit.
func complaint(t *testing.T, without loader.Mutation, limit time.Duration) (arrived bool) {
	p := newPairWithout(t, without, lt.Veth, "", "", "compare: {timeout: 300ms}")
	const port = 7000 // portEcho
	var in net.PacketConn
	lt.In(t, p.Client, func() {
		var err error
		if in, err = net.ListenPacket("ip4:icmp", lt.Client4); err != nil {
			t.Fatal(err)
		}
	})
	defer in.Close()
	c := p.mustDial(lt.Guest4, portEcho)
	complains(p, p.PVM, port)
	complains(p, p.SVM, port)
	if err := echo(c, 0); err != nil {
		t.Fatal(err)
	}
	if err := in.SetReadDeadline(time.Now().Add(limit)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1<<16)
	for {
		n, _, err := in.ReadFrom(b)
		if err != nil {
			return false
		}
		if n > 30 && b[0] == 3 && b[1] == 13 && binary.BigEndian.Uint16(b[30:]) == port {
			return true
		}
	}
}

// TestComplaint: both guests quote the remote's segment, which each has received with
// other numbers, and report the same of it.
func TestComplaint(t *testing.T) {
	if !complaint(t, 0, 5*time.Second) {
		t.Error("the guests' ICMP error did not come")
	}
}

// TestMutationComplaint: else their errors differ, and neither leaves.
func TestMutationComplaint(t *testing.T) {
	if complaint(t, loader.MutateQuote, 2*time.Second) {
		t.Error("the guests' ICMP errors are equal without translation")
	}
}

// far makes a host behind the client, on a path that the guest's large frames do not fit.
func far(p *pair) (ns string) {
	p.t.Helper()
	ns = p.Client + "f"
	lt.Run(p.t, "ip", "netns", "add", ns)
	p.t.Cleanup(func() { lt.Run(p.t, "ip", "netns", "del", ns) })
	lt.Run(p.t, "ip", "link", "add", "tofar", "netns", p.Client, "type", "veth", "peer", "name", "eth0", "netns", ns)
	for _, args := range []string{
		p.Client + " link set tofar mtu 1300 up", ns + " link set eth0 up",
		p.Client + " addr add 203.0.113.1/24 dev tofar", ns + " addr add 203.0.113.2/24 dev eth0",
		p.Client + " addr add 2001:db8:77::1/64 dev tofar nodad", ns + " addr add 2001:db8:77::2/64 dev eth0 nodad",
		ns + " route add 10.77.0.0/24 via 203.0.113.1", ns + " route add fd77::/64 via 2001:db8:77::1",
	} {
		lt.Run(p.t, "ip", append([]string{"-n"}, strings.Fields(args)...)...)
	}
	return ns
}

// pathMTU has the SVM take over connections from far away, and then send more than fits
// the path. It returns what became of them.
func pathMTU(t *testing.T, without loader.Mutation, limit time.Duration) map[string]error {
	p, q := coveredPair(t, without)
	routed(p)
	far := far(p)
	const n = 200_000
	conns := make(map[string]net.Conn)
	for _, guest := range []string{lt.Guest4, lt.Guest6} {
		lt.In(t, far, func() {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(guest, portAhead), 10*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			c.SetDeadline(time.Now().Add(20 * time.Second))
			fmt.Fprintln(c, "svm 5") // both have an offset then
			if err := wantPattern(c, 5); err != nil {
				t.Fatal(err)
			}
			conns[guest] = c
		})
	}
	q.Primary.Close()
	p.await("beta", func(s *api.Status) bool { return s.Role == "primary" && s.State == "solo" })
	out := make(map[string]error)
	for guest, c := range conns {
		c.SetDeadline(time.Now().Add(limit))
		fmt.Fprintf(c, "svm %d\n", n)
		out[guest] = wantPattern(c, n)
	}
	return out
}

func wantPattern(r io.Reader, n int) error {
	got, want := make([]byte, n), make([]byte, n)
	if _, err := io.ReadFull(r, got); err != nil {
		return err
	}
	if (&pattern{}).Read(want); string(got) != string(want) {
		return fmt.Errorf("%d bytes, and others than the guest sent", n)
	}
	return nil
}

// TestPathMTU: after a takeover a router reports that a frame does not fit, and quotes the
// numbers that the PVM began with. The guest, whose are others, makes them smaller.
func TestPathMTU(t *testing.T) {
	for guest, err := range pathMTU(t, 0, 10*time.Second) {
		if err != nil {
			t.Errorf("%s: %v", guest, err)
		}
	}
}

// TestMutationPathMTU: else the path is a black hole.
func TestMutationPathMTU(t *testing.T) {
	for guest, err := range pathMTU(t, loader.MutateQuote, 2*time.Second) {
		if !os.IsTimeout(err) {
			t.Errorf("%s: %v, though the guest cannot know", guest, err)
		}
	}
}

// multipath dials the guests, whose service takes MPTCP as Go's listeners do, by MPTCP.
func multipath(p *pair, limit time.Duration) (used bool, err error) {
	p.t.Helper()
	var c net.Conn
	lt.In(p.t, p.Client, func() {
		d := net.Dialer{Timeout: limit}
		d.SetMultipathTCP(true)
		c, err = d.Dial("tcp", net.JoinHostPort(lt.Guest4, portEcho))
	})
	if err != nil {
		return false, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if err := echo(c, 0); err != nil {
		return false, err
	}
	return c.(*net.TCPConn).MultipathTCP()
}

// TestMultipath: a client that offers MPTCP gets TCP, without a checkpoint.
func TestMultipath(t *testing.T) {
	p := newPair(t, lt.Veth, "", "", "compare: {timeout: 300ms}")
	if used, err := multipath(p, 10*time.Second); used || err != nil {
		t.Errorf("MPTCP %v, %v", used, err)
	}
	if s := p.status("alpha"); s.CheckpointsRequested != 0 {
		t.Errorf("%d checkpoints requested: %+v", s.CheckpointsRequested, s.Causes)
	}
}

// TestMultipathKept: with mptcp in the config the guests' keys differ, and the connection
// waits for a checkpoint.
func TestMultipathKept(t *testing.T) {
	p := newPair(t, lt.Veth, "", "", "compare: {timeout: 300ms, mptcp: true}")
	if used, err := multipath(p, 2*time.Second); !os.IsTimeout(err) {
		t.Errorf("MPTCP %v, %v", used, err)
	}
	if s := p.status("alpha"); !causes(s)["syn differs"] {
		t.Errorf("causes %v", s.Causes)
	}
}

// signed has a socket sign what it sends to an address, and demand the same (TCP-MD5).
func signed(to string) sockopt {
	return func(_, _ string, c syscall.RawConn) error {
		sig := unix.TCPMD5Sig{Addr: unix.SockaddrStorage{Family: unix.AF_INET}}
		for i, b := range net.ParseIP(to).To4() {
			sig.Addr.Data[2+i] = b
		}
		sig.Keylen = uint16(copy(sig.Key[:], "a secret"))
		var err error
		if e := c.Control(func(fd uintptr) { err = unix.SetsockoptTCPMD5Sig(int(fd), unix.IPPROTO_TCP, unix.TCP_MD5SIG, &sig) }); e != nil {
			return e
		}
		return err
	}
}

// TestSigned: TCP-MD5's digest covers a sequence number that the SVM does not have. The
// connection is held back until a checkpoint has made them one, and the reason is reported.
func TestSigned(t *testing.T) {
	p := newPair(t, lt.Veth, "", "", "compare: {timeout: 300ms}")
	serveIn(p, "tcp4", "7179", signed(lt.Client4), func(c *net.TCPConn) { io.Copy(c, c) })
	lt.In(t, p.Client, func() {
		d := net.Dialer{Timeout: time.Second, Control: signed(lt.Guest4)}
		if c, err := d.Dial("tcp4", lt.Guest4+":7179"); !os.IsTimeout(err) {
			t.Errorf("connected %v, %v", c != nil, err)
		}
	})
	p.await("alpha", func(s *api.Status) bool { return causes(s)["signed segment"] })
}

func causes(s *api.Status) map[string]bool {
	m := make(map[string]bool)
	for _, c := range s.Causes {
		m[c.Reason] = true
	}
	return m
}

// serveIn gives f each connection to a port of both guests, until the test ends.
func serveIn(p *pair, network, port string, control sockopt, f func(*net.TCPConn)) {
	p.t.Helper()
	for _, guest := range []string{p.PVM, p.SVM} {
		listenPlain(p, guest, network, port, control, f)
	}
}

// listenPlain is listen without MPTCP, which knows neither signatures nor urgent data.
func listenPlain(p *pair, guest, network, port string, control sockopt, f func(*net.TCPConn)) {
	p.t.Helper()
	lt.In(p.t, guest, func() {
		l := net.ListenConfig{Control: control}
		l.SetMultipathTCP(false)
		s, err := l.Listen(context.Background(), network, ":"+port)
		if err != nil {
			p.t.Fatal(err)
		}
		p.t.Cleanup(func() { s.Close() })
		go acceptAll(s, f)
	})
}

// sendUrgent sends a line with an urgent byte in it.
func sendUrgent(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	if _, err := fmt.Fprint(c, "before"); err != nil {
		return err
	}
	if e := raw.Write(func(fd uintptr) bool {
		err = unix.Sendto(int(fd), []byte("at once!"), unix.MSG_OOB, nil)
		return err == nil || !errors.Is(err, unix.EAGAIN)
	}); e != nil || err != nil {
		return errors.Join(e, err)
	}
	_, err = fmt.Fprint(c, "behind\n")
	return err
}

// readUrgent reads what sendUrgent sent.
func readUrgent(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	// Before what stands around it: who has read on does not get it any more.
	var urgent [8]byte
	n := 0
	if e := raw.Control(func(fd uintptr) {
		if _, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}, 5000); err == nil {
			n, _, err = unix.Recvfrom(int(fd), urgent[:], unix.MSG_OOB)
		}
	}); e != nil || err != nil {
		return fmt.Errorf("the urgent byte: %w", errors.Join(e, err))
	}
	if got := string(urgent[:n]); got != "!" {
		return fmt.Errorf("%q urgent", got)
	}
	const want = "beforeat oncebehind\n"
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil {
		return fmt.Errorf("around the urgent byte: %w", err)
	}
	if string(got) != want {
		return fmt.Errorf("%q in band", got)
	}
	return nil
}

// TestUrgentByte: the client's kernel takes the byte for urgent that the guest meant, and
// none is missing of the others.
func TestUrgentByte(t *testing.T) {
	p := newPair(t, lt.Veth, "", "", "")
	serveIn(p, "tcp", "7180", nil, func(c *net.TCPConn) {
		for r := bufio.NewScanner(c); r.Scan(); {
			if err := sendUrgent(c); err != nil {
				return
			}
		}
	})
	for _, guest := range []string{lt.Guest4, lt.Guest6} {
		c := p.mustDial(guest, "7180")
		for i := range 20 {
			fmt.Fprintln(c, "go on")
			if err := readUrgent(c); err != nil {
				t.Fatalf("%s, %d: %v", guest, i, err)
			}
		}
	}
}
