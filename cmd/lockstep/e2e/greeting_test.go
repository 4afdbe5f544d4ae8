// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// listen serves TCP in a guest's namespace until the test ends. The network is
// "tcp", or one that goes with the option of the listening socket.
func (p *pair) listen(ns, network, port string, opt sockopt, f func(*net.TCPConn)) {
	p.t.Helper()
	var l net.Listener
	lt.In(p.t, ns, func() {
		var err error
		c := net.ListenConfig{Control: opt}
		if l, err = c.Listen(context.Background(), network, ":"+port); err != nil {
			p.t.Fatal(err)
		}
	})
	p.t.Cleanup(func() { l.Close() })
	go acceptAll(l, f)
}

// netCount is a counter of a namespace's /proc/net/snmp and netstat.
func netCount(t *testing.T, ns, name string) int {
	t.Helper()
	out, err := lt.Command(ns, "cat", "/proc/self/net/snmp", "/proc/self/net/netstat").Output()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		if i := slices.Index(names, name); i > 0 && fields[0] == names[0] {
			n, err := strconv.Atoi(fields[i])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		names = fields
	}
	t.Fatalf("no counter %s", name)
	return 0
}

// TestServerFirst: the server greets first, and the ACK that ends the handshake
// is lost on the peer link, so that the SVM's service does not know of the client
// yet. It must not take the SVM's own timer to heal (R6).
func TestServerFirst(t *testing.T) {
	p := newPair(t, lt.Impaired, "", "", "")
	for _, x := range []struct{ name, port, greeting string }{
		{"ssh", "22", "SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n"},
		{"smtp", "25", "220 mail.example ESMTP Postfix\r\n"},
		{"mysql", "3306", "I\x00\x00\x00\x0a8.0.36\x00\x08\x00\x00\x00abcdefgh\x00\xff\xff\xff\x02\x00\xff\xdf\x15\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00ijklmnopqrst\x00mysql_native\x00"},
	} {
		for _, guest := range []string{p.PVM, p.SVM} {
			p.listen(guest, "tcp", x.port, nil, func(c *net.TCPConn) {
				io.WriteString(c, x.greeting)
				io.Copy(onlyWriter{c}, onlyReader{c})
			})
		}
		for family, host := range map[string]string{"v4": lt.Guest4, "v6": lt.Guest6} {
			t.Run(x.name+"/"+family, func(t *testing.T) {
				p := p.with(t)
				const flags = 0x17 // FIN, SYN, RST, ACK
				before, repeats := p.Impair.Counts(t, lt.P2S).Filtered, netCount(t, p.SVM, "RetransSegs")
				p.Impair.Drop(t, lt.P2S, lt.Filter{TCPMask: flags, TCPFlags: 0x10, Pure: true}, 1)
				begun := time.Now()
				c := p.mustDial(host, x.port)
				c.SetDeadline(begun.Add(5 * time.Second))
				got := make([]byte, len(x.greeting))
				if _, err := io.ReadFull(c, got); err != nil || string(got) != x.greeting {
					t.Fatalf("greeted with %q, %v", got, err)
				}
				t.Logf("greeted after %v", time.Since(begun).Round(100*time.Microsecond))
				if n := p.Impair.Counts(t, lt.P2S).Filtered - before; n != 1 {
					t.Errorf("%d ACKs were lost, want the handshake's", n)
				}
				if now := netCount(t, p.SVM, "RetransSegs"); now != repeats {
					t.Errorf("the SVM had to repeat itself: %d segments, before %d", now, repeats)
				}
				for i := range 100 {
					if err := echo(c, i); err != nil {
						t.Fatal(err)
					}
				}
			})
		}
	}
	if s := p.status("alpha"); s.CheckpointsRequested != 0 {
		t.Errorf("%d checkpoints requested: %+v", s.CheckpointsRequested, s.Causes)
	}
}
