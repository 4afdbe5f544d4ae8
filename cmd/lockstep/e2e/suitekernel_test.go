// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Linux's own selftests.

// selftest is one of those that `make deps` compiles.
func selftest(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("..", "..", "..", "bin", "selftests", name))
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		lt.Missing(t, "%v: run make deps", err)
	}
	return path
}

// judged are the guests that have to be right: what is lost on the way to the SVM is lost to it
// for good with mirroring alone.
func judged(p *pair) []string {
	if p.procs["alpha"] == nil {
		return []string{p.PVM}
	}
	return []string{p.PVM, p.SVM}
}

// TestSuitesLoss: mptcp_connect with plain TCP in each of its modes, both ways at once, over
// a peer link that loses 1 % in either direction.
func TestSuitesLoss(t *testing.T) {
	s := suite{
		name: "mptcp_connect", serve: func(*pair, string) {},
		load: func(p *pair) found { return mptcpConnect(p, times(t)) },
	}
	alone := newMirror(t, lt.Impaired)
	p := newPair(t, lt.Impaired, "", "", patient)
	for _, p := range []*pair{alone, p} {
		p.Impair.Set(t, lt.P2S, lt.Rates{Loss: 10}, 1)
		p.Impair.Set(t, lt.S2P, lt.Rates{Loss: 10}, 1)
	}
	s.compare(t, alone, p)
	for dir, name := range map[lt.Direction]string{lt.P2S: "to the secondary", lt.S2P: "to the primary"} {
		if c := p.Impair.Counts(t, dir); c.Lost == 0 {
			t.Errorf("of %d frames %s none was lost", c.Seen, name)
		} else {
			t.Logf("%d of %d frames %s were lost", c.Lost, c.Seen, name)
		}
	}
	p.await("alpha", func(s *api.Status) bool { return s.Connections == 0 })
}

// mptcpConnect: either end sends a file of a random size, in pieces of random sizes, and
// receives the other's.
func mptcpConnect(p *pair, n int) found {
	p.t.Helper()
	tool := selftest(p.t, "mptcp_connect")
	dir := p.t.TempDir()
	total, took, port := 0, time.Duration(0), 10000
	for round := range 2 * n {
		for _, family := range families {
			for _, mode := range []string{"-m poll", "-m mmap", "-m sendfile", "-P saveWithPeek", "-P saveAfterPeek"} {
				port++
				sent := make(map[string]string) // by sender
				for i, who := range []string{"guest", "client"} {
					b := make([]byte, 1+rand.IntN(2<<20))
					(&pattern{pos: uint64(i) << 40}).Read(b)
					if err := os.WriteFile(filepath.Join(dir, who), b, 0o600); err != nil {
						p.t.Fatal(err)
					}
					sent[who] = string(b)
					total += len(b)
				}
				args := func(who string) []string {
					return append(strings.Fields(mode), "-t", "60", "-p", strconv.Itoa(port), "-s", "TCP", "-i", filepath.Join(dir, who))
				}
				guests := make(map[string]*program)
				both(p, func(p *pair, ns string) {
					guests[ns] = begin(p, ns, tool, append(args("guest"), "-l", map[string]string{"v4": "0.0.0.0", "v6": "::"}[family.name])...)
					listens(p, ns, strconv.Itoa(port))
				})
				what := fmt.Sprintf("round %d, %s, %s, %d bytes to the guest, %d to the client", round, family.name, mode, len(sent["client"]), len(sent["guest"]))
				begun := time.Now()
				got := client(p, tool, append(args("client"), family.host)...)
				took += time.Since(begun)
				if got != sent["guest"] {
					p.t.Errorf("%s: the client received %d bytes, and not those that the guests sent", what, len(got))
				}
				for _, ns := range judged(p) {
					if got, err := guests[ns].end(); err != nil || got != sent["client"] {
						p.t.Errorf("%s: %s received %d bytes, and not those that the client sent, %v", what, ns, len(got), err)
					}
				}
				if p.t.Failed() {
					p.t.Fatal(what)
				}
			}
		}
	}
	return found{rate: float64(total) / 1e6 / took.Seconds(), unit: "MB/s"}
}

const (
	portGSO     = "8000"
	gsoSegments = 10 // datagrams in a burst
)

// gsoModes are the ways in which udpgso_bench sends a burst: a large frame that the kernel or the NIC
// cuts, one system call, and one for each datagram.
var gsoModes = []string{"-S %d", "-m", ""}

// onePort has both guests send from the same port.
func onePort(p *pair, ns string) {
	p.t.Helper()
	lt.Run(p.t, "nsenter", "--net=/run/netns/"+ns, "sysctl", "-qw", "net.ipv4.ip_local_port_range=40000 40000")
}

// udpgso: bursts from the client to the guests, and from both guests to the client. All that comes
// in a round fits into a socket's buffer, so that no datagram has a reason to get lost.
func udpgso(p *pair, n int) found {
	p.t.Helper()
	var took time.Duration
	total := 0
	send := func(to map[string]string, from ...string) {
		p.t.Helper()
		begun := time.Now()
		for _, family := range families {
			size := map[string]int{"v4": mtu - headers4, "v6": mtu - headers6}[family.name]
			for _, mode := range gsoModes {
				args := append(strings.Fields(strings.ReplaceAll(mode, "%d", strconv.Itoa(size))),
					"-"+family.name[1:], "-D", to[family.name], "-p", portGSO, "-M", "1", "-s", strconv.Itoa(gsoSegments*size))
				var senders []*program
				for _, ns := range from {
					senders = append(senders, begin(p, ns, selftest(p.t, "udpgso_bench_tx"), args...))
				}
				for _, s := range senders {
					if _, err := s.end(); err != nil {
						p.t.Error(err)
					}
				}
				total += gsoSegments
			}
		}
		took += time.Since(begun)
	}
	each := len(families) * len(gsoModes) * gsoSegments
	for range 3 * n {
		receivers, before := make(map[string]*program), make(map[string]int)
		for _, ns := range append(judged(p), p.Client) {
			before[ns] = datagrams(p, ns)
			// It looks at each byte, and counts.
			receivers[ns] = begin(p, ns, selftest(p.t, "udpgso_bench_rx"), "-v", "-p", portGSO, "-n", strconv.Itoa(each))
			listens(p, ns, portGSO)
		}
		send(map[string]string{"v4": lt.Guest4, "v6": lt.Guest6}, p.Client)
		send(map[string]string{"v4": lt.Client4, "v6": lt.Client6}, p.PVM, p.SVM)
		for ns, r := range receivers {
			lt.Eventually(p.t, 20*time.Second, func() (bool, string) {
				n := datagrams(p, ns) - before[ns]
				return n >= each, fmt.Sprintf("%d of %d datagrams came to %s", n, each, ns)
			})
			r.cmd.Process.Signal(syscall.SIGINT) // its end
			if _, err := r.end(); err != nil {
				p.t.Error(err)
			}
		}
	}
	return found{rate: float64(total) / took.Seconds(), unit: "datagrams/s"}
}

// datagrams are those that programs in a namespace have received.
func datagrams(p *pair, ns string) (n int) {
	p.t.Helper()
	out, err := lt.Command(ns, "nstat", "-asz", "UdpInDatagrams", "Udp6InDatagrams").Output()
	if err != nil {
		p.t.Fatalf("nstat: %v", err)
	}
	for line := range strings.Lines(string(out)) {
		var name string
		var count int
		if k, _ := fmt.Sscan(line, &name, &count); k == 2 {
			n += count
		}
	}
	return n
}
