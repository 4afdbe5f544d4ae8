// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/qmptest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// tcpKit is a pair whose guests' and client's sockets are the test's.
type tcpKit struct {
	*pair
	qemu        *qmptest.Pair
	plain       *door
	pvm, client *lt.Skew
	frames      *lt.Wire // what comes to the client
	lines       map[string]*line
	small       *door // with little memory for what comes
}

// line makes a connection that outlives the sub-test.
func (k *tcpKit) line(t *testing.T, d *door, host string, opt sockopt) *line {
	t.Helper()
	return newLine(t, d, dialBy(k.pair, d, host, 0, opt))
}

// guestNamespaces are both guests'.
func (k *tcpKit) guestNamespaces() []string { return []string{k.PVM, k.SVM} }

// tcpItems are the parts of TCP that each have to be seen. Each makes a connection that
// uses one, proves that it does, and is left open for the takeover.
var tcpItems = []struct {
	name string
	make func(*testing.T, *tcpKit) *line
}{
	{"plain", func(t *testing.T, k *tcpKit) *line {
		l := k.line(t, k.plain, lt.Guest4, nil)
		must(t, l.exchange())
		return l
	}},
	{"keep-alives", keepAlives},
	{"the client's window is zero", zeroClient},
	{"the guest's window is zero", zeroGuest},
	{"urgent data", urgentData},
	{"the client is through", halfClosedByClient},
	{"the guest is through", halfClosedByGuest},
	{"both close at once", closeAtOnce},
	{"both open at once", openAtOnce},
	{"SYN cookies", synCookies},
	{"fast open", fastOpen},
	{"again from TIME_WAIT", reuse},
	{"ECN", congested},
	{"no timestamps", func(t *testing.T, k *tcpKit) *line { return k.without(t, optTIMESTAMPS, "timestamps") }},
	{"no SACK", func(t *testing.T, k *tcpKit) *line { return k.without(t, optSACK, "sack") }},
	{"no window scaling", func(t *testing.T, k *tcpKit) *line { return k.without(t, optWSCALE, "window_scaling") }},
	{"no options", func(t *testing.T, k *tcpKit) *line {
		return k.without(t, optTIMESTAMPS|optSACK|optWSCALE, "timestamps", "sack", "window_scaling")
	}},
	{"MTU 576", func(t *testing.T, k *tcpKit) *line {
		lt.Run(t, "ip", "-n", k.Client, "route", "add", lt.Guest4, "dev", "eth0", "mtu", "576", "advmss", "536")
		t.Cleanup(func() { lt.Run(t, "ip", "-n", k.Client, "route", "del", lt.Guest4) })
		return k.segments(t, lt.Guest4, 500, 536)
	}},
	{"MTU 9000", func(t *testing.T, k *tcpKit) *line { return k.segments(t, lt.Guest6, 8900, 9000) }},
	{"IPv6 extension headers", extensionHeaders},
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wraps opens connections whose sequence numbers end in what a takeover finds under way,
// and whose timestamps end about then.
func (k *tcpKit) wraps(t *testing.T) {
	t.Helper()
	const guard = 1 << 24
	for _, ticks := range []uint32{300, 1000, 2000, 4000, guard + 1500} {
		k.pvm.Wrap(t, 500+underWayDown/2, ticks)
		k.Skew.Wrap(t, 500+underWayDown/4, ticks/2)
		k.client.Wrap(t, 500+underWayUp/2, ticks)
		l := k.line(t, k.plain, lt.Guest4, nil)
		must(t, l.exchange())
		l.after = func(t *testing.T) error {
			err := errors.Join(receive(next(&l.fromGuest, underWayDown))(l.c), l.inGuests(receive(next(&l.fromClient, underWayUp))))
			lt.Eventually(t, 10*time.Second, func() (bool, string) {
				err = errors.Join(err, l.exchange())
				seq, ts := l.wrapped(k.frames)
				return err != nil || seq && ts, fmt.Sprintf("sequence numbers have wrapped: %t, timestamps: %t", seq, ts)
			})
			return errors.Join(err, l.finish())
		}
		k.lines[fmt.Sprintf("wraps, %d ticks", ticks)] = l
	}
	for _, s := range []*lt.Skew{k.pvm, k.Skew, k.client} {
		s.Wrap(t, 0, 0)
	}
}

// wrapped reports whether each number was in the last quarter and then in the first, in
// what has come to the client.
func (l *line) wrapped(w *lt.Wire) (seq, ts bool) {
	var quarters [2][4]bool
	for _, f := range w.Frames(func(f []byte) bool { return toPort(f, l.port()) && f[tcpAt+13]&flagSYN == 0 }) {
		quarters[0][f[tcpAt+4]>>6] = true  // of the sequence number
		quarters[1][f[tcpAt+24]>>6] = true // of the timestamp, behind two NOPs
	}
	return quarters[0][3] && quarters[0][0], quarters[1][3] && quarters[1][0]
}

// TestTCPToTheEnd: each part of TCP, with real stacks, without a checkpoint; then, with a
// connection of each open that is older than the daemons, the primary dies.
func TestTCPToTheEnd(t *testing.T) {
	p, q := coveredPairOn(t, 0, lt.JumboReachable, "heartbeat: {restart: 20s}")
	k := &tcpKit{pair: p, qemu: q, lines: make(map[string]*line)}
	lt.Run(t, "ip", "-n", p.Client, "route", "replace", "10.77.0.0/24", "dev", "eth0", "proto", "kernel", "src", lt.Client4, "mtu", "1500", "advmss", "1460")
	k.pvm, k.client = lt.AddSkew(t, p.PVM, "eth0"), lt.AddSkew(t, p.Client, "eth0")
	k.frames = lt.OpenWire(t, p.Client, "eth0")
	k.plain = openDoor(p, "tcp", "7190", nil)
	k.small = openDoor(p, "tcp", "7189", setInts([3]int{unix.SOL_SOCKET, unix.SO_RCVBUF, 4096}))
	before := p.status("alpha").CheckpointsRequested
	for _, x := range tcpItems {
		t.Run(x.name, func(t *testing.T) { k.lines[x.name] = x.make(t, k) })
	}
	if t.Failed() {
		return
	}
	if s := p.status("alpha"); s.CheckpointsRequested != before {
		t.Errorf("%d checkpoints requested: %+v", s.CheckpointsRequested-before, s.Causes)
	}
	p.restart(p.alpha(), p.beta())
	for _, node := range []string{"alpha", "beta"} {
		p.await(node, func(s *api.Status) bool { return s.Covered })
	}
	k.wraps(t)
	mend := cut(p, clientGets)
	for name, l := range k.lines {
		if err := l.under(t); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	q.Primary.Close()
	p.await("beta", func(s *api.Status) bool { return s.Role == "primary" && s.State == "solo" })
	mend()
	for _, l := range k.lines {
		l.guests[0].Close() // nothing that it sends leaves any more
		l.guests = l.guests[1:]
	}
	t.Run("after the takeover", func(t *testing.T) {
		for name, l := range k.lines {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				l.deadlines(20 * time.Second)
				must(t, l.after(t))
			})
		}
	})
	p.await("beta", func(s *api.Status) bool { return s.Connections == 0 })
}
