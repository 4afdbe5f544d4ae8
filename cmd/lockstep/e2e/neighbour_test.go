// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/binary"
	"fmt"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestNeighbours: an SVM that knows no neighbours at first, and whose entries
// expire again and again, still answers: its requests are asked by P in the guest's
// name. Twenty periods are ten minutes of a kernel's usual 30 s.
func TestNeighbours(t *testing.T) {
	const periods = 20
	p := newPair(t, lt.Veth, "", "", "")
	p.serveUDP(p.PVM, "udp", portUDP, nil, echoUDP)
	p.serveUDP(p.SVM, "udp", portUDP, nil, echoUDP)
	// The PVM does not ask, or the SVM would live on its answers.
	for _, a := range append([]string{lt.Client6}, lt.ClientAddrs4...) {
		lt.Run(t, "ip", "-n", p.PVM, "neigh", "replace", a, "lladdr", lt.ClientMAC, "dev", "eth0", "nud", "permanent")
		lt.Run(t, "ip", "-n", p.SVM, "neigh", "del", a, "dev", "eth0")
	}
	for _, family := range []string{"ipv4", "ipv6"} {
		lt.Run(t, "nsenter", "--net=/run/netns/"+p.SVM, "sysctl", "-qw",
			"net."+family+".neigh.eth0.base_reachable_time_ms=100", "net."+family+".neigh.eth0.delay_first_probe_time=0")
	}
	svm, seen := lt.OpenSent(t, p.SVM, "eth0"), lt.OpenWire(t, p.Client, "eth0")
	asks := map[string]func([]byte) bool{
		"v4": func(f []byte) bool { return isARP(f) && f[21] == 1 },
		"v6": func(f []byte) bool {
			return binary.BigEndian.Uint16(f[12:]) == unix.ETH_P_IPV6 && f[20] == unix.IPPROTO_ICMPV6 && f[54] == 135
		},
	}
	conns := make(map[string]net.Conn)
	for _, x := range families {
		conns[x.name] = p.dialUDP(x.host, portUDP, nil)
		conns[x.name].SetDeadline(time.Now().Add(60 * time.Second))
	}
	n := 0
	lt.Eventually(t, 50*time.Second, func() (bool, string) {
		n++
		req := fmt.Appendf(nil, "request %d", n)
		for _, c := range conns {
			p.ask(c, req, req)
		}
		v4, v6 := len(svm.Frames(asks["v4"])), len(svm.Frames(asks["v6"]))
		return v4 >= periods && v6 >= periods, fmt.Sprintf("the SVM asked %d and %d times", v4, v6)
	})
	for family, ask := range asks {
		if asked, came := len(svm.Frames(ask)), len(seen.Frames(ask)); came == 0 || came > asked {
			t.Errorf("%s: the SVM asked %d times, the client was asked %d times", family, asked, came)
		}
	}
	p.keepAlive(lt.Guest4, 100)
	p.keepAlive(lt.Guest6, 100)
	if s := p.status("alpha"); s.CheckpointsRequested != 0 {
		t.Errorf("%d checkpoints requested: %+v", s.CheckpointsRequested, s.Causes)
	}
}
