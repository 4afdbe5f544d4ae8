// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// The items of TestTCPToTheEnd.

// keepAlives: both ends probe an idle connection, and give it up when two go unanswered.
func keepAlives(t *testing.T, k *tcpKit) *line {
	l := k.line(t, k.plain, lt.Guest4, nil)
	must(t, l.exchange())
	patient := func(count int) error {
		var errs []error
		for _, c := range l.ends() {
			errs = append(errs, c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: count}))
		}
		return errors.Join(errs...)
	}
	must(t, patient(2))
	awaitCounts(t, "TCPKeepAlive", 3, k.PVM, k.SVM, k.Client)
	must(t, errors.Join(l.exchange(), patient(60))) // the client is to get nothing for a while
	l.under = idle
	l.after = func(t *testing.T) error {
		err := errors.Join(l.exchange(), patient(2))
		awaitCounts(t, "TCPKeepAlive", 3, k.SVM, k.Client)
		return errors.Join(err, l.exchange(), l.finish())
	}
	return l
}

// idle has nothing more under way than there is.
func idle(*testing.T) error { return nil }

// zeroClient: the client reads nothing. What tells the guests that it has room again is
// lost, so that they have to ask.
func zeroClient(t *testing.T, k *tcpKit) *line {
	const n = 200_000
	l := k.line(t, k.plain, lt.Guest4, setInts([3]int{unix.SOL_SOCKET, unix.SO_RCVBUF, 4096}))
	b := next(&l.fromGuest, 2*n)
	pvm, svm := l.guests[0], l.guests[1]
	beside(func() error { return send(b)(pvm) }) // which ends in the middle of it when its host dies
	sent := beside(func() error { return send(b)(svm) })
	awaitCounts(t, "TCPWinProbe", 2, k.PVM, k.SVM)
	i, err := info(l.c)
	must(t, err)
	mend := cut(k.pair, clientSends)
	must(t, receive(b[:i.Bytes_received])(l.c))
	mend()
	must(t, receive(b[i.Bytes_received:n])(l.c))
	l.under = idle
	l.after = func(t *testing.T) error {
		return errors.Join(receive(b[n:])(l.c), ended(sent), l.exchange(), l.finish())
	}
	return l
}

// zeroGuest: the guests read nothing, and the client has to ask.
func zeroGuest(t *testing.T, k *tcpKit) *line {
	const n = 200_000
	l := k.line(t, k.small, lt.Guest4, nil)
	b := next(&l.fromClient, 2*n)
	sent := beside(func() error { return send(b)(l.c) })
	awaitCounts(t, "TCPWinProbe", 2, k.Client)
	must(t, l.inGuests(receive(b[:n])))
	l.under = idle
	l.after = func(t *testing.T) error {
		return errors.Join(l.inGuests(receive(b[n:])), ended(sent), l.exchange(), l.finish())
	}
	return l
}

// urgentData: each side sends an urgent byte.
func urgentData(t *testing.T, k *tcpKit) *line {
	l := k.line(t, k.plain, lt.Guest4, nil)
	sends := func() error { return errors.Join(l.inGuests(sendUrgent), sendUrgent(l.c)) }
	reads := func() error { return errors.Join(readUrgent(l.c), l.inGuests(readUrgent)) }
	must(t, errors.Join(sends(), reads()))
	const urg = 0x20
	hasCome(t, k.frames, "an urgent pointer", func(f []byte) bool {
		return toPort(f, l.port()) && f[tcpAt+13]&urg != 0 && binary.BigEndian.Uint16(f[tcpAt+18:]) > 0
	})
	l.under = func(*testing.T) error { return sends() }
	l.after = func(t *testing.T) error { return errors.Join(reads(), sends(), reads(), l.finish()) }
	return l
}

// hasCome expects a frame.
func hasCome(t *testing.T, w *lt.Wire, what string, is func([]byte) bool) {
	t.Helper()
	lt.Eventually(t, 5*time.Second, func() (bool, string) { return len(w.Frames(is)) > 0, "no frame with " + what + " came" })
}

// tcpAt is where the TCP header of a frame with an IPv4 header without options is.
const tcpAt = 14 + 20

// toPort reports whether a frame is such a TCP segment to a port.
func toPort(f []byte, port uint16) bool {
	return len(f) >= tcpAt+20 && bytes.Equal(f[12:15], []byte{8, 0, 0x45}) && f[23] == unix.IPPROTO_TCP && binary.BigEndian.Uint16(f[tcpAt+2:]) == port
}

// bothIn waits until the guests' ends of l are in one of these states.
func (k *tcpKit) bothIn(t *testing.T, l *line, states ...string) {
	t.Helper()
	for _, guest := range k.guestNamespaces() {
		awaitState(t, guest, l.port(), states...)
	}
}

// halfClosedByClient: the client has sent its FIN, and the guests go on.
func halfClosedByClient(t *testing.T, k *tcpKit) *line {
	l := k.line(t, k.plain, lt.Guest4, nil)
	must(t, errors.Join(l.exchange(), l.c.CloseWrite(), l.inGuests(atEnd)))
	k.bothIn(t, l, closeWait)
	must(t, l.toClient(300_000))
	l.under = func(t *testing.T) error {
		down := l.fromGuest
		return l.inGuests(send(next(&down, underWayDown)))
	}
	l.after = func(t *testing.T) error {
		return errors.Join(receive(next(&l.fromGuest, underWayDown))(l.c), l.toClient(300_000),
			l.inGuests((*net.TCPConn).CloseWrite), atEnd(l.c), l.close())
	}
	return l
}

// halfClosedByGuest: the guests have sent their FIN, and the client goes on.
func halfClosedByGuest(t *testing.T, k *tcpKit) *line {
	l := k.line(t, k.plain, lt.Guest4, nil)
	must(t, errors.Join(l.exchange(), l.inGuests((*net.TCPConn).CloseWrite), atEnd(l.c)))
	k.bothIn(t, l, finWait2)
	must(t, l.toGuest(300_000))
	l.under = func(t *testing.T) error {
		up := l.fromClient
		return send(next(&up, underWayUp))(l.c)
	}
	l.after = func(t *testing.T) error {
		return errors.Join(l.inGuests(receive(next(&l.fromClient, underWayUp))), l.toGuest(300_000),
			l.c.CloseWrite(), l.inGuests(atEnd), l.close())
	}
	return l
}

// closeAtOnce: the FINs pass each other. The guests' is lost on its way to the client.
func closeAtOnce(t *testing.T, k *tcpKit) *line {
	cross := func(t *testing.T, l *line) error {
		if err := l.inGuests((*net.TCPConn).CloseWrite); err != nil {
			return err
		}
		k.bothIn(t, l, finWait1)
		if err := l.c.CloseWrite(); err != nil {
			return err
		}
		k.bothIn(t, l, closing)
		return nil
	}
	over := func(t *testing.T, l *line, guests ...string) error {
		err := errors.Join(atEnd(l.c), l.inGuests(atEnd), l.close())
		for _, guest := range guests {
			awaitState(t, guest, l.port(), timeWait, "")
		}
		return err
	}
	l := k.line(t, k.plain, lt.Guest4, nil)
	must(t, l.exchange())
	mend := cut(k.pair, clientGets)
	must(t, cross(t, l))
	mend()
	must(t, over(t, l, k.guestNamespaces()...))

	l = k.line(t, k.plain, lt.Guest4, nil)
	must(t, l.exchange())
	l.under = func(t *testing.T) error { return cross(t, l) }
	l.after = func(t *testing.T) error { return over(t, l, k.SVM) }
	return l
}

// openAtOnce: the client and the guests connect to each other, and the SYNs pass each
// other: nobody listens.
func openAtOnce(t *testing.T, k *tcpKit) *line {
	const clients, guests = 46000, 46001
	mend := cut(k.pair, clientGets)
	remote, guest := fmt.Sprintf("%s:%d", lt.Client4, clients), fmt.Sprintf("%s:%d", lt.Guest4, guests)
	ends := []<-chan dialed{dialOut(t.Context(), t, k.PVM, guests, remote, nil), dialOut(t.Context(), t, k.SVM, guests, remote, nil)}
	for _, guest := range k.guestNamespaces() {
		awaitState(t, guest, clients, synSent)
	}
	ends = append(ends, dialOut(t.Context(), t, k.Client, clients, guest, nil))
	for _, guest := range k.guestNamespaces() {
		awaitState(t, guest, clients, synReceived) // that had sent a SYN
	}
	mend()
	l := &line{t: t}
	for _, end := range ends {
		d := <-end
		must(t, d.err)
		k.t.Cleanup(func() { d.c.Close() })
		l.guests, l.c = append(l.guests, d.c), d.c
	}
	l.guests = l.guests[:2]
	l.deadlines(time.Minute)
	l.under, l.after = l.bothWays, l.arrive
	must(t, l.exchange())
	return l
}

// synCookies: the guests keep nothing of a SYN, and know the client by its ACK alone.
func synCookies(t *testing.T, k *tcpKit) *line {
	for _, guest := range k.guestNamespaces() {
		defer sysctl(t, guest, "net.ipv4.tcp_syncookies", "2")()
	}
	var l *line
	for range 5 {
		was := [2]int{netCount(t, k.PVM, "SyncookiesRecv"), netCount(t, k.SVM, "SyncookiesRecv")}
		l = k.line(t, k.plain, lt.Guest4, nil)
		must(t, l.exchange())
		for i, guest := range k.guestNamespaces() {
			if n := netCount(t, guest, "SyncookiesRecv") - was[i]; n != 1 {
				t.Errorf("guest %d took %d cookies", i, n)
			}
		}
		const options = optTIMESTAMPS | optSACK | optWSCALE // which the timestamp tells
		must(t, l.each(func(i *unix.TCPInfo) bool { return i.Options&options == options }))
	}
	return l
}

// fastOpen: the client's SYN has data, which the guests answer before the handshake is over.
func fastOpen(t *testing.T, k *tcpKit) *line {
	const port = "7191"
	for _, guest := range k.guestNamespaces() {
		sysctl(t, guest, "net.ipv4.tcp_fastopen", "3")
		sysctl(t, guest, "net.ipv4.tcp_fastopen_key", "00112233-44556677-8899aabb-ccddeeff") // a checkpoint has copied it
	}
	d := openDoor(k.pair, "tcp4", port, setInts([3]int{unix.IPPROTO_TCP, unix.TCP_FASTOPEN, 16}))
	opt := setInts([3]int{unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1})
	var l *line
	for i := range 5 {
		was := [2]int{netCount(t, k.PVM, "TCPFastOpenPassive"), netCount(t, k.SVM, "TCPFastOpenPassive")}
		c := dialBy(k.pair, d, lt.Guest4, 0, opt)
		must(t, send([]byte("in the SYN"))(c))
		l = newLine(t, d, c)
		must(t, errors.Join(l.inGuests(receive([]byte("in the SYN"))), l.exchange()))
		for g, guest := range k.guestNamespaces() {
			if n := netCount(t, guest, "TCPFastOpenPassive") - was[g]; i > 0 && n != 1 {
				t.Errorf("connection %d: guest %d took data with %d SYNs", i, g, n)
			}
		}
	}
	return l
}

// reuse: the same addresses and ports again and again, while the guests still remember
// the connection before.
func reuse(t *testing.T, k *tcpKit) *line {
	const port = 46010
	for i := range 10 {
		l := newLine(t, k.plain, dialBy(k.pair, k.plain, lt.Guest4, port, setInts([3]int{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1})))
		must(t, l.exchange())
		if i == 9 {
			return l
		}
		must(t, errors.Join(l.inGuests((*net.TCPConn).CloseWrite), atEnd(l.c), l.c.CloseWrite(), l.inGuests(atEnd), l.close()))
		k.bothIn(t, l, timeWait)
	}
	return nil
}

// congested: a router marks what it would else drop, in both directions.
func congested(t *testing.T, k *tcpKit) *line {
	back := sysctl(t, k.Client, "net.ipv4.tcp_ecn", "1")
	l := k.line(t, k.plain, lt.Guest4, nil)
	back()
	must(t, l.each(func(i *unix.TCPInfo) bool { return i.Options&optECN != 0 }))
	marked := func(t *testing.T, guests ...string) error {
		came := lt.OpenWire(t, k.Client, "eth0")
		was := make(map[string]int)
		for _, guest := range guests {
			was[guest] = netCount(t, guest, "InCEPkts")
		}
		mend := congest(k.pair, k.Client, "eth0")
		err := l.toGuest(300_000)
		mend()
		for guest, was := range was {
			if netCount(t, guest, "InCEPkts") == was {
				t.Errorf("%s got no marked packet", guest)
			}
		}
		mend = congest(k.pair, k.HostP, "vc")
		err = errors.Join(err, l.toClient(300_000))
		mend()
		err = errors.Join(err, l.toClient(300_000))
		const ece, cwr = 0x40, 0x80
		for what, flag := range map[string]byte{"what reports a mark": ece, "what answers such a report": cwr} {
			hasCome(t, came, what, func(f []byte) bool { return toPort(f, l.port()) && f[tcpAt+13]&flag != 0 })
		}
		return err
	}
	must(t, marked(t, k.PVM, k.SVM))
	l.after = func(t *testing.T) error {
		return errors.Join(receive(next(&l.fromGuest, underWayDown))(l.c), l.inGuests(receive(next(&l.fromClient, underWayUp))), marked(t, k.SVM), l.finish())
	}
	return l
}

// without has a client that does not know some options.
func (k *tcpKit) without(t *testing.T, options uint8, names ...string) *line {
	t.Helper()
	for _, name := range names {
		defer sysctl(t, k.Client, "net.ipv4.tcp_"+name, "0")()
	}
	l := k.line(t, k.plain, lt.Guest4, nil)
	must(t, l.each(func(i *unix.TCPInfo) bool { return i.Options&options == 0 }))
	must(t, errors.Join(l.toClient(500_000), l.toGuest(500_000)))
	// With a loss, that is recovered without them.
	mend := cut(k.pair, clientGets)
	b := next(&l.fromGuest, 2000)
	must(t, l.inGuests(send(b)))
	awaitCounts(t, "TCPTimeouts", 1, k.PVM)
	mend()
	must(t, receive(b)(l.c))
	return l
}

// segments has a connection whose segments are as large as the link's MTU has them.
func (k *tcpKit) segments(t *testing.T, host string, least, most uint32) *line {
	t.Helper()
	l := k.line(t, k.plain, host, nil)
	must(t, errors.Join(l.toClient(500_000), l.toGuest(500_000)))
	must(t, l.each(func(i *unix.TCPInfo) bool { return i.Snd_mss >= least && i.Snd_mss <= most }))
	return l
}

// extensionHeaders: each segment has an IPv6 header of options before TCP's.
func extensionHeaders(t *testing.T, k *tcpKit) *line {
	opt := setString(unix.IPPROTO_IPV6, unix.IPV6_DSTOPTS, "\x00\x00\x01\x04\x00\x00\x00\x00")
	d := openDoor(k.pair, "tcp6", "7192", opt)
	l := k.line(t, d, lt.Guest6, opt)
	must(t, errors.Join(l.toClient(100_000), l.toGuest(100_000)))
	hasCome(t, k.frames, "an extension header", func(f []byte) bool {
		return bytes.Equal(f[12:14], []byte{0x86, 0xdd}) && f[20] == unix.IPPROTO_DSTOPTS
	})
	return l
}
