// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// heldByOne bounds the connections of one process: the limit on open files cannot
// always be raised, and is 20 000 here and there.
const heldByOne = 12_500

// portHeld is the first holder's port; each further one has the next.
const portHeld = 7200

// serveHeld echoes on a port, in little memory, until the test closes its input.
func serveHeld(port string) {
	servePort(port, func(c *net.TCPConn) {
		io.CopyBuffer(onlyWriter{c}, onlyReader{c}, make([]byte, 64))
	})
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
}

// holdOpen opens as many connections, from these addresses in turn, as its words
// say: "N ADDRESS PORT ADDRESS,ADDRESS...". For each line of input it echoes on all
// of them and says so; at the input's end it closes them, as many at a time as it has lanes.
func holdOpen(words string) {
	var n int
	var host, port, list string
	if _, err := fmt.Sscan(words, &n, &host, &port, &list); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	from := strings.Split(list, ",")
	conns := make([]net.Conn, n)
	each := func(what string, f func(i int) error) {
		const lanes = 16
		var work sync.WaitGroup
		for lane := range lanes {
			work.Go(func() {
				for i := lane; i < n; i += lanes {
					if err := f(i); err != nil {
						fmt.Fprintf(os.Stderr, "%s connection %d: %v\n", what, i, err)
						os.Exit(1)
					}
				}
			})
		}
		work.Wait()
		fmt.Println(what)
	}
	say := func(i int) error {
		if err := conns[i].SetDeadline(time.Now().Add(time.Minute)); err != nil {
			return err
		}
		return echo(conns[i], i)
	}
	each("opened", func(i int) (err error) {
		d := net.Dialer{Timeout: time.Minute, KeepAlive: -1, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from[i%len(from)])}}
		if conns[i], err = d.Dial("tcp", net.JoinHostPort(host, port)); err != nil {
			return err
		}
		return say(i)
	})
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		each("heard", say)
	}
	each("closed", func(i int) error {
		// Each lane waits for the guest's FIN: a close of all at once is another test.
		if err := conns[i].(*net.TCPConn).CloseWrite(); err != nil {
			return err
		}
		if _, err := io.ReadAll(conns[i]); err != nil {
			return err
		}
		return conns[i].Close()
	})
}

// TestHeldOpen: thousands of connections open at once, LOCKSTEP_SOAK=1 makes them
// 100 000, each echoing once at the start and once at the end.
func TestHeldOpen(t *testing.T) {
	n := 5000
	if os.Getenv("LOCKSTEP_SOAK") == "1" {
		n = 100_000
	}
	p := newPair(t, lt.Veth, "", "", fmt.Sprintf("compare: {timeout: 10s, max_connections: %d}", n+1000))
	from := lt.ClientAddrs4
	for i := range 6 { // 28 000 ports each
		a := fmt.Sprintf("10.77.0.%d", 100+i)
		lt.Run(t, "ip", "-n", p.Client, "addr", "add", a+"/24", "dev", "eth0")
		lt.Run(t, "ip", "-n", p.SVM, "neigh", "replace", a, "lladdr", lt.ClientMAC, "dev", "eth0", "nud", "permanent")
		from = append(from, a)
	}
	var holders []*worker
	began := time.Now()
	for left, port := n, portHeld; left > 0; left, port = left-heldByOne, port+1 {
		for _, guest := range []string{p.PVM, p.SVM} {
			p.work(guest, "held "+strconv.Itoa(port)).says("ready")
		}
		holders = append(holders, p.work(p.Client, fmt.Sprintf("hold %d %s %d %s", min(left, heldByOne), lt.Guest4, port, strings.Join(from, ","))))
	}
	all := func(what string) {
		t.Helper()
		for _, h := range holders {
			h.says(what)
		}
		t.Logf("%s %d connections: %v", what, n, time.Since(began).Round(time.Millisecond))
		began = time.Now()
	}
	all("opened")
	for _, node := range []string{"alpha", "beta"} {
		s := p.await(node, func(s *api.Status) bool { return s.Connections == n && (node == "beta" || s.HeldPackets == 0) })
		t.Logf("%s holds %d connections: %s resident, %d copies", node, s.Connections, resident(t, p.procs[node].Process.Pid), s.HeldPackets)
	}
	began = time.Now()
	for _, h := range holders {
		fmt.Fprintln(h.in)
	}
	all("heard")
	for _, h := range holders {
		h.in.Close()
	}
	all("closed")
	for _, node := range []string{"alpha", "beta"} {
		lt.Eventually(t, time.Minute, func() (bool, string) {
			s := p.status(node)
			if s == nil {
				return false, "no status of " + node
			}
			return s.Connections == 0 && (node == "beta" || s.HeldPackets == 0), fmt.Sprintf("%s: %d connections, %d held", node, s.Connections, s.HeldPackets)
		})
		t.Logf("%s afterwards: %s resident", node, resident(t, p.procs[node].Process.Pid))
	}
	if s := p.status("alpha"); s.CheckpointsRequested != 0 {
		t.Errorf("%d checkpoints requested: %+v", s.CheckpointsRequested, s.Causes)
	}
}
