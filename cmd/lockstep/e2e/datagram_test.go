// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

type sockopt = func(network, address string, c syscall.RawConn) error

// serveUDP serves datagrams in a guest's namespace until the test ends or stop is
// called. The network is "udp", or one that goes with the option.
func (p *pair) serveUDP(ns, network, port string, opt sockopt, f func(c net.PacketConn, from net.Addr, req []byte)) (stop func()) {
	p.t.Helper()
	var c net.PacketConn
	lt.In(p.t, ns, func() {
		var err error
		l := net.ListenConfig{Control: opt}
		if c, err = l.ListenPacket(context.Background(), network, ":"+port); err != nil {
			p.t.Fatal(err)
		}
	})
	p.t.Cleanup(func() { c.Close() })
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			f(c, from, buf[:n])
		}
	}()
	return func() { c.Close() }
}

// dialUDP connects a socket of the client's.
func (p *pair) dialUDP(host, port string, opt sockopt) net.Conn {
	p.t.Helper()
	var c net.Conn
	lt.In(p.t, p.Client, func() {
		var err error
		d := net.Dialer{Control: opt}
		if c, err = d.Dial("udp", net.JoinHostPort(host, port)); err != nil {
			p.t.Fatal(err)
		}
	})
	p.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c
}

// ask sends a request and reads the answer, which is to be want.
func (p *pair) ask(c net.Conn, req, want []byte) {
	p.t.Helper()
	if _, err := c.Write(req); err != nil {
		p.t.Fatal(err)
	}
	p.expect(c, want)
}

func (p *pair) expect(c net.Conn, want []byte) {
	p.t.Helper()
	got := make([]byte, 1<<16)
	n, err := c.Read(got)
	if err != nil || !bytes.Equal(got[:n], want) {
		p.t.Fatalf("answer %.60q (%d bytes), %v; want %.60q (%d bytes)", got[:n], n, err, want, len(want))
	}
}

func echoUDP(c net.PacketConn, from net.Addr, req []byte) { c.WriteTo(req, from) }

var families = []struct{ name, host string }{
	{"v4", lt.Guest4},
	{"v6", lt.Guest6},
}

// Ports of the guests' datagram services.
const (
	portUDP     = "7100" // what comes goes back
	portBurst   = "7101" // eight requests; the SVM answers the last one first
	portTwice   = "7102" // every answer twice
	portChatty  = "7103" // the SVM answers twice
	portNobody  = "7104" // no service
	burst       = 8
	mtu         = 1500
	headers4    = 20 + 8
	headers6    = 40 + 8
	fragmented  = 8000 // bytes
	udpRequests = 200
)

// TestDatagrams: what is not TCP is compared datagram by datagram, in any order,
// and leaves as the PVM sent it.
func TestDatagrams(t *testing.T) {
	p := newPair(t, lt.Veth, "", "", "")
	for guest, ns := range map[string]string{"pvm": p.PVM, "svm": p.SVM} {
		svm := guest == "svm"
		p.serveUDP(ns, "udp", portUDP, nil, echoUDP)
		var waiting [][]byte
		p.serveUDP(ns, "udp", portBurst, nil, func(c net.PacketConn, from net.Addr, req []byte) {
			if waiting = append(waiting, bytes.Clone(req)); len(waiting) < burst {
				return
			}
			for i := range waiting {
				if svm {
					i = burst - 1 - i
				}
				c.WriteTo(waiting[i], from)
			}
			waiting = nil
		})
		p.serveUDP(ns, "udp", portTwice, nil, func(c net.PacketConn, from net.Addr, req []byte) {
			c.WriteTo(req, from)
			c.WriteTo(req, from)
		})
		p.serveUDP(ns, "udp", portChatty, nil, func(c net.PacketConn, from net.Addr, req []byte) {
			if c.WriteTo(req, from); svm {
				c.WriteTo(req, from)
			}
		})
		serveDNS(p, ns)
	}
	seen := lt.OpenWire(t, p.Client, "eth0")
	for _, x := range families {
		t.Run("echo/"+x.name, func(t *testing.T) {
			p := p.with(t)
			c := p.dialUDP(x.host, portUDP, nil)
			room := map[string]int{"v4": mtu - headers4, "v6": mtu - headers6}[x.name]
			for _, size := range []int{0, 1, 3, room - 1, room} {
				req := make([]byte, size)
				(&pattern{}).Read(req)
				p.ask(c, req, req)
			}
			for i := range udpRequests {
				req := fmt.Appendf(nil, "%s request %d.", x.name, i)
				p.ask(c, req, req)
			}
			last := fmt.Sprintf("%s request %d.", x.name, udpRequests-1)
			lt.Eventually(t, 5*time.Second, func() (bool, string) { return seen.Count(last) > 0, "the last answer is not seen" })
			for i := range udpRequests {
				if n := seen.Count(fmt.Sprintf("%s request %d.", x.name, i)); n != 1 {
					t.Fatalf("answer %d came %d times", i, n)
				}
			}
		})
		t.Run("reordered/"+x.name, func(t *testing.T) {
			p := p.with(t)
			c := p.dialUDP(x.host, portBurst, nil)
			for round := range 20 {
				for i := range burst {
					fmt.Fprintf(c, "round %d, request %d", round, i)
				}
				for i := range burst { // the PVM's order
					p.expect(c, fmt.Appendf(nil, "round %d, request %d", round, i))
				}
			}
		})
		t.Run("duplicated/"+x.name, func(t *testing.T) {
			p := p.with(t)
			c := p.dialUDP(x.host, portTwice, nil)
			for i := range 20 {
				req := fmt.Appendf(nil, "say it twice: %d", i)
				p.ask(c, req, req)
				p.expect(c, req)
			}
		})
		t.Run("svm-says-more/"+x.name, func(t *testing.T) {
			p := p.with(t)
			c := p.dialUDP(x.host, portChatty, nil)
			before := p.status("alpha").Dropped[unmatched]
			for i := range 20 { // equal ones, and different ones
				req := fmt.Appendf(nil, "say it once, %s: %d.", x.name, i/2)
				p.ask(c, req, req)
			}
			p.await("alpha", func(s *api.Status) bool { return s.Dropped[unmatched]-before == 20 })
			for i := range 10 {
				if n := seen.Count(fmt.Sprintf("say it once, %s: %d.", x.name, i)); n != 2 {
					t.Errorf("answer %d came %d times, of 2 that the PVM sent", i, n)
				}
			}
		})
		t.Run("fragments/"+x.name, func(t *testing.T) {
			p := p.with(t)
			c := p.dialUDP(x.host, portUDP, nil)
			req := make([]byte, fragmented)
			for i := range 20 {
				(&pattern{pos: uint64(i) << 20}).Read(req)
				p.ask(c, req, req)
			}
		})
		for _, size := range []int{56, 0, 1, fragmented} {
			t.Run(fmt.Sprintf("ping/%s/%d", x.name, size), func(t *testing.T) { ping(p.with(t), x.host, size, 20) })
		}
		t.Run("unreachable/"+x.name, func(t *testing.T) {
			p := p.with(t)
			c := p.dialUDP(x.host, portNobody, nil)
			if _, err := c.Write([]byte("anybody there?")); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Read(make([]byte, 100)); !errors.Is(err, unix.ECONNREFUSED) {
				t.Fatalf("read: %v, want what the ICMP error makes of it", err)
			}
		})
		t.Run("dns/"+x.name, func(t *testing.T) { resolve(p.with(t), x.host) })
		t.Run("multicast/"+x.name, func(t *testing.T) { multicast(p.with(t), x.name, seen) })
	}
	s := p.await("alpha", func(s *api.Status) bool { return s.HeldPackets == 0 })
	if s.CheckpointsRequested != 0 {
		t.Errorf("%d checkpoints requested: %+v", s.CheckpointsRequested, s.Causes)
	}
}

// unmatched is the reason for dropping what only the SVM sent.
const unmatched = "unmatched svm datagram"

func ping(p *pair, host string, size, count int) {
	p.t.Helper()
	out, err := lt.Command(p.Client, "ping", "-n", "-c", strconv.Itoa(count), "-i", "0.01", "-W", "5", "-s", strconv.Itoa(size), host).CombinedOutput()
	if err != nil || !strings.Contains(string(out), fmt.Sprintf("%d received, 0%% packet loss", count)) || strings.Contains(string(out), "duplicates") {
		p.t.Fatalf("ping: %v\n%s", err, out)
	}
}

// serveDNS runs dnsmasq in a guest.
func serveDNS(p *pair, ns string) {
	p.t.Helper()
	begin(p, ns, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--pid-file", "--no-resolv", "--no-hosts", "--local=/test/",
		"--log-facility=-", "--host-record=web1.test,192.0.2.7,2001:db8::7", "--txt-record=web1.test,"+strings.Repeat("long ", 40))
	listens(p, ns, "53")
}

// connectIn connects from a namespace; nil when it cannot.
func (p *pair) connectIn(ns, network, address string) (c net.Conn) {
	lt.In(p.t, ns, func() { c, _ = net.Dial(network, address) })
	return c
}

func resolve(p *pair, host string) {
	p.t.Helper()
	for _, network := range []string{"udp", "tcp"} {
		r := net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
			c := p.connectIn(p.Client, network, net.JoinHostPort(host, "53"))
			if c == nil {
				return nil, errors.New("no connection to the guest's DNS")
			}
			return c, nil
		}}
		for range 10 {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			addrs, err := r.LookupHost(ctx, "web1.test.")
			if len(addrs) != 2 || err != nil {
				p.t.Errorf("%s: web1.test is %v, %v", network, addrs, err)
			}
			txt, err := r.LookupTXT(ctx, "web1.test.")
			if err != nil || len(txt) != 1 || txt[0] != strings.Repeat("long ", 40) {
				p.t.Errorf("%s: the text is %q, %v", network, txt, err)
			}
			_, err = r.LookupHost(ctx, "nobody.test.")
			if e := new(net.DNSError); !errors.As(err, &e) || !e.IsNotFound {
				p.t.Errorf("%s: nobody.test is %v, want not found", network, err)
			}
			cancel()
		}
	}
}

// multicast: both guests send to a group; the client's link sees it once.
func multicast(p *pair, family string, seen *lt.Wire) {
	p.t.Helper()
	const port = 7110
	text := family + " to whom it may concern"
	var senders sync.WaitGroup
	for _, ns := range []string{p.PVM, p.SVM} {
		network, to := "udp4", &net.UDPAddr{IP: net.IPv4(239, 1, 2, 3), Port: port}
		if family == "v6" {
			network, to = "udp6", &net.UDPAddr{IP: net.ParseIP("ff02::4242"), Port: port, Zone: strconv.Itoa(lt.Index(p.t, ns, "eth0"))}
		}
		var c net.PacketConn
		lt.In(p.t, ns, func() {
			l := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
				raw.Control(func(fd uintptr) {
					if family == "v4" {
						err = unix.SetsockoptInet4Addr(int(fd), unix.IPPROTO_IP, unix.IP_MULTICAST_IF, [4]byte(net.ParseIP(lt.Guest4).To4()))
					}
				})
				return err
			}}
			var err error
			if c, err = l.ListenPacket(context.Background(), network, fmt.Sprintf(":%d", port)); err != nil {
				p.t.Fatal(err)
			}
		})
		p.t.Cleanup(func() { c.Close() })
		senders.Go(func() {
			if _, err := c.WriteTo([]byte(text), to); err != nil {
				p.t.Error(err)
			}
		})
	}
	senders.Wait()
	lt.Eventually(p.t, 10*time.Second, func() (bool, string) { return seen.Count(text) > 0, "nothing to the group" })
	p.keepAlive(lt.Guest4, 10) // whatever followed the first one has come, too
	if n := seen.Count(text); n != 1 {
		p.t.Errorf("%d frames to the group, want 1", n)
	}
}

// TestOneSided: what one guest alone sends never leaves. The PVM's asks for a
// checkpoint after the time-out, the SVM's expires, and ICMP errors ask for nothing.
func TestOneSided(t *testing.T) {
	p := newPair(t, lt.Veth, "", "", "compare: {timeout: 200ms}")
	stopPVM := p.serveUDP(p.PVM, "udp", portUDP, nil, echoUDP)
	stopSVM := p.serveUDP(p.SVM, "udp", portUDP, nil, echoUDP)
	seen := p.capture()
	for _, x := range families {
		c := p.dialUDP(x.host, portUDP, nil)
		p.ask(c, []byte("both are here"), []byte("both are here"))
	}
	stopPVM()
	for _, x := range families {
		before := p.status("alpha").Dropped[unmatched]
		fmt.Fprint(p.dialUDP(x.host, portUDP, nil), "the SVM alone answers")
		p.await("alpha", func(s *api.Status) bool { return s.Dropped[unmatched] > before && s.HeldPackets == 0 })
	}
	if s := p.status("alpha"); s.CheckpointsRequested != 0 {
		t.Errorf("the SVM's datagrams and the PVM's ICMP errors asked for %d checkpoints: %+v", s.CheckpointsRequested, s.Causes)
	}
	p.serveUDP(p.PVM, "udp", portUDP, nil, echoUDP)
	stopSVM()
	for _, x := range families {
		before := p.status("alpha").CheckpointsRequested
		fmt.Fprint(p.dialUDP(x.host, portUDP, nil), "the PVM alone answers")
		s := p.await("alpha", func(s *api.Status) bool { return s.CheckpointsRequested > before })
		if cause := s.Causes[len(s.Causes)-1]; !strings.Contains(cause.Flow, portUDP) {
			t.Errorf("%s: the request's cause is %+v, want the lone datagram", x.name, cause)
		}
	}
	if n := seen.count("alone answers"); n != 0 {
		t.Errorf("%d answers of one guest alone reached the client", n)
	}
}

// TestJumbo: frames of 9000 bytes, whole.
func TestJumbo(t *testing.T) {
	p := newPair(t, lt.Jumbo, "", "", "")
	p.serveUDP(p.PVM, "udp", portUDP, nil, echoUDP)
	p.serveUDP(p.SVM, "udp", portUDP, nil, echoUDP)
	seen := lt.OpenWire(t, p.Client, "eth0")
	for i, x := range families {
		req := make([]byte, 8900)
		(&pattern{pos: uint64(i+1) << 40}).Read(req)
		p.ask(p.dialUDP(x.host, portUDP, nil), req, req)
		lt.Eventually(t, 5*time.Second, func() (bool, string) {
			n := seen.Count(string(req))
			return n == 1, fmt.Sprintf("%s: %d frames hold the whole answer", x.name, n)
		})
		ping(p, x.host, 8900, 5)
		p.bothWays(x.host, 10_000_000)
	}
	if s := p.status("alpha"); s.CheckpointsRequested != 0 {
		t.Errorf("%d checkpoints requested: %+v", s.CheckpointsRequested, s.Causes)
	}
}

// setString sets an option of sockets.
func setString(level, opt int, value string) sockopt {
	return func(_, _ string, c syscall.RawConn) (err error) {
		if cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptString(int(fd), level, opt, value) }); cerr != nil {
			return cerr
		}
		return err
	}
}

// TestIPOptions: IPv4 options and IPv6 extension headers in front of TCP and UDP,
// from both ends.
func TestIPOptions(t *testing.T) {
	p := newPair(t, lt.Veth, "", "", "")
	const size = 1_000_000
	port := 7200
	for _, x := range []struct {
		name, host, family string
		level, opt         int
		value              string
	}{
		{"options", lt.Guest4, "4", unix.IPPROTO_IP, unix.IP_OPTIONS, "\x01\x01\x01\x00"},
		{"hop-by-hop", lt.Guest6, "6", unix.IPPROTO_IPV6, unix.IPV6_HOPOPTS, "\x00\x00\x01\x04\x00\x00\x00\x00"},
		{"destination", lt.Guest6, "6", unix.IPPROTO_IPV6, unix.IPV6_DSTOPTS, "\x00\x00\x01\x04\x00\x00\x00\x00"},
	} {
		opt := setString(x.level, x.opt, x.value)
		port++
		service := strconv.Itoa(port)
		for _, ns := range []string{p.PVM, p.SVM} {
			p.serveUDP(ns, "udp"+x.family, service, opt, echoUDP)
			p.listen(ns, "tcp"+x.family, service, opt, func(c *net.TCPConn) {
				if x.level == unix.IPPROTO_IP { // accepted sockets do not inherit these
					raw, err := c.SyscallConn()
					if err == nil {
						err = opt("", "", raw)
					}
					if err != nil {
						t.Error(err)
					}
				}
				io.Copy(onlyWriter{c}, onlyReader{c})
			})
		}
		seen := lt.OpenWire(t, p.Client, "eth0")
		t.Run(x.name+"/udp", func(t *testing.T) {
			p := p.with(t)
			c := p.dialUDP(x.host, service, opt)
			for i := range 100 {
				req := fmt.Appendf(nil, "with options: %d", i)
				p.ask(c, req, req)
			}
		})
		t.Run(x.name+"/tcp", func(t *testing.T) {
			p := p.with(t)
			var c net.Conn
			lt.In(t, p.Client, func() {
				var err error
				d := net.Dialer{Control: opt, Timeout: 10 * time.Second}
				if c, err = d.Dial("tcp", net.JoinHostPort(x.host, service)); err != nil {
					t.Fatal(err)
				}
			})
			defer c.Close()
			c.SetDeadline(time.Now().Add(20 * time.Second))
			var sender sync.WaitGroup
			sender.Go(func() { io.Copy(onlyWriter{c}, io.LimitReader(&pattern{}, size)) })
			defer sender.Wait()
			p.expectPattern(c, size)
		})
		if n := seen.Count(x.value[2:]); n < 100 {
			t.Errorf("%s: %d frames that came had them", x.name, n)
		}
	}
	if s := p.status("alpha"); s.CheckpointsRequested != 0 {
		t.Errorf("%d checkpoints requested: %+v", s.CheckpointsRequested, s.Causes)
	}
}
