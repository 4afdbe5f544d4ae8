// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/qmptest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// portStates is where the guests listen for TestTCPStates, portDials the first port that
// they connect from.
const (
	portStates = 7193
	portDials  = 46100
)

// stateLine is a connection that a raw peer holds in a state.
type stateLine struct {
	*rawPeer
	p     *pair
	door  *door
	from  int // the guests' port, if they connect
	dials []<-chan dialed
	stop  context.CancelFunc // of their trying

	guests []*net.TCPConn
	alone  bool // the SVM has taken over

	unread            int // bytes that the guests have not read
	peerFIN, guestFIN bool
}

// tcpStates are those that a connection may have in the guests.
var tcpStates = []struct {
	name, state string
	reach       func(*stateLine)
}{
	{"SYN_SENT", synSent, (*stateLine).guestsDial},
	{"SYN_RECEIVED", synReceived, func(s *stateLine) {
		s.send(flagSYN, nil)
		s.await(flagSYN | flagACK)
	}},
	{"SYN_RECEIVED, both open", synReceived, func(s *stateLine) {
		s.guestsDial()
		s.send(flagSYN, nil)
		s.await(flagSYN | flagACK)
	}},
	{"ESTABLISHED", established, (*stateLine).open},
	{"ESTABLISHED, AccECN offered", established, func(s *stateLine) {
		s.accurate = true
		s.open()
		s.await(flagECE) // Linux up to 6.18 has ECN alone
	}},
	{"data for the client", established, func(s *stateLine) {
		s.open()
		s.do(send(make([]byte, 4000)))
		s.awaitData(4100)
	}},
	{"data for the guest", established, func(s *stateLine) {
		s.open()
		s.send(flagACK, make([]byte, 1000))
		s.unread = 1000
		s.awaitACK()
	}},
	{"FIN_WAIT_1", finWait1, (*stateLine).guestsClose},
	{"FIN_WAIT_2", finWait2, func(s *stateLine) {
		s.guestsClose()
		s.send(flagACK, nil)
	}},
	{"CLOSING", closing, func(s *stateLine) {
		s.guestsClose()
		s.ack-- // as if their FIN were still on its way
		s.send(flagFIN|flagACK, nil)
		s.ack++
		s.peerFIN = true
		s.awaitACK()
	}},
	{"TIME_WAIT", timeWait, func(s *stateLine) {
		s.guestsClose()
		s.close()
	}},
	{"CLOSE_WAIT", closeWait, func(s *stateLine) {
		s.open()
		s.close()
	}},
	{"LAST_ACK", lastACK, func(s *stateLine) {
		s.open()
		s.close()
		s.do(atEnd)
		s.do((*net.TCPConn).CloseWrite)
		s.guestFIN = true
		s.await(flagFIN)
	}},
}

// goesOn are the ways that it may go on from there.
var goesOn = []struct {
	name string
	end  func(s *stateLine, state string)
}{
	{"goes on", (*stateLine).goOn},
	{"the client resets it", (*stateLine).clientResets},
	{"the guest resets it", (*stateLine).guestsReset},
}

// do does f in both guests.
func (s *stateLine) do(f func(*net.TCPConn) error) {
	s.t.Helper()
	must(s.t, atOnce(s.guests, f))
}

// guestsDial has the guests connect to the peer.
func (s *stateLine) guestsDial() {
	ctx, stop := context.WithCancel(s.p.t.Context())
	s.stop = stop
	for _, guest := range []string{s.p.PVM, s.p.SVM} {
		s.dials = append(s.dials, dialOut(ctx, s.p.t, guest, s.from, s.addr.String(), nil))
	}
	s.guest = uint16(s.from)
	s.await(flagSYN)
}

// accept gets the guests' ends.
func (s *stateLine) accept() {
	s.t.Helper()
	if s.dials == nil {
		s.guests = s.door.accept(s.t, s.addr.String(), s.alone, s.look)
	}
	for _, d := range s.dials {
		end := <-d
		must(s.t, end.err)
		s.guests = append(s.guests, end.c)
	}
	for _, g := range s.guests {
		s.p.t.Cleanup(func() { g.Close() })
	}
	s.do(func(g *net.TCPConn) error { return g.SetDeadline(time.Now().Add(time.Minute)) })
}

// open has the peer connect, and something pass both ways.
func (s *stateLine) open() {
	s.send(flagSYN, nil)
	s.await(flagSYN | flagACK)
	s.send(flagACK, nil)
	s.accept()
	s.send(flagACK, make([]byte, 100))
	s.do(receive(make([]byte, 100)))
	s.do(send(make([]byte, 100)))
	s.awaitData(100)
	s.send(flagACK, nil)
}

// guestsClose has an open connection that the guests close, before the peer knows.
func (s *stateLine) guestsClose() {
	s.open()
	s.do((*net.TCPConn).CloseWrite)
	s.guestFIN = true
	s.await(flagFIN)
}

// close is the peer's.
func (s *stateLine) close() {
	s.send(flagFIN|flagACK, nil)
	s.peerFIN = true
	s.awaitACK()
}

// in waits until the guests that serve have the connection in one of these states.
func (s *stateLine) in(states ...string) {
	s.t.Helper()
	for _, guest := range []string{s.p.PVM, s.p.SVM} {
		if !s.alone || guest == s.p.SVM {
			awaitState(s.t, guest, s.addr.Port(), states...)
		}
	}
}

// goOn has the connection go through its life to the end.
func (s *stateLine) goOn(state string) {
	switch state {
	case synSent:
		s.send(flagSYN|flagACK, nil)
	case synReceived:
		s.send(flagACK, nil)
	case timeWait:
		s.repeatFIN()
		return
	}
	if s.guests == nil {
		s.accept()
	}
	if !s.peerFIN {
		s.send(flagACK, make([]byte, 300))
		s.close()
		s.do(receive(make([]byte, s.unread+300)))
		s.do(atEnd)
	}
	if !s.guestFIN {
		n := len(s.got) + 5000
		s.do(send(make([]byte, 5000)))
		s.do((*net.TCPConn).CloseWrite)
		s.fetch(n)
	}
	s.await(flagFIN)
	s.send(flagACK, nil)
	s.in("", timeWait)
}

// clientResets has the peer end it.
func (s *stateLine) clientResets(string) {
	s.send(flagRST|flagACK, nil)
	s.in("")
}

// guestsReset has the guests end it, by a close that is a reset, or where TCP knows none
// by what they answer to the peer afterwards.
func (s *stateLine) guestsReset(state string) {
	reset := func(g *net.TCPConn) error {
		if err := g.SetLinger(0); err != nil {
			return err
		}
		return g.Close()
	}
	switch state {
	case timeWait:
		return // there is nobody to do it
	case synSent:
		s.stop()
		s.in("")
		s.send(flagSYN|flagACK, nil)
	case synReceived: // what the peer acknowledges was never sent
		s.ack += 1000
		s.send(flagACK, nil)
	default:
		s.do(reset)
		s.in("")
		if state == closing || state == lastACK { // nobody is told
			s.send(flagACK, nil)
		}
	}
	s.await(flagRST)
	if s.rst != s.ack {
		s.t.Errorf("the RST has the sequence number %d, want %d", s.rst, s.ack)
	}
	if state == synReceived {
		s.ack -= 1000
		s.clientResets(state)
	}
}

// TestTCPStates: a peer holds connections of the guests' stacks in every state of TCP.
// There nothing happens, or a checkpoint, or a takeover; then they go on to their end, or
// are reset from either side. No guest keeps a socket of one that was, nor lockstep an entry.
func TestTCPStates(t *testing.T) {
	p, q := coveredPair(t, 0)
	pvm := lt.AddSkew(t, p.PVM, "eth0")
	q.SetHook(func(s qmptest.Stage) bool {
		if s == qmptest.SecondaryResume {
			p.Skew.Copy(t, pvm)
		}
		return true
	})
	w := floodable(p)
	d := openDoor(p, "tcp", strconv.Itoa(portStates), nil)
	gone := func(nodes ...string) {
		t.Helper()
		for _, node := range nodes {
			lt.Eventually(t, 30*time.Second, func() (bool, string) {
				flows, err := p.lockstep("flows", "-c", p.config, "--node", node, "--json").Output()
				return err == nil && string(bytes.TrimSpace(flows)) == "[]", fmt.Sprintf("%s still has %s, %v", node, flows, err)
			})
		}
	}
	n := 0
	round := func(name string, happens func(), alone bool) {
		t.Run(name, func(t *testing.T) {
			var lines []*stateLine
			for _, x := range tcpStates {
				for range goesOn {
					n++
					addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 78, 1, byte(n)}), uint16(20000+n))
					s := &stateLine{rawPeer: newRawPeer(t, w, addr, portStates), p: p, door: d, from: portDials + n}
					if !t.Run(x.name, func(t *testing.T) {
						s.t = t
						x.reach(s)
						s.in(x.state)
					}) {
						return
					}
					lines = append(lines, s)
				}
			}
			happens()
			for i, s := range lines {
				x, y := tcpStates[i/len(goesOn)], goesOn[i%len(goesOn)]
				if alone {
					s.takenOver()
				}
				if !t.Run(x.name+"/"+y.name, func(t *testing.T) {
					s.t = t
					s.in(x.state)
					y.end(s, x.state)
				}) {
					return
				}
			}
		})
	}
	before := p.status("alpha").CheckpointsRequested
	round("nothing", func() {}, false)
	if s := p.status("alpha"); s.CheckpointsRequested != before {
		t.Errorf("%d checkpoints requested: %+v", s.CheckpointsRequested-before, s.Causes)
	}
	gone("alpha", "beta")
	round("a checkpoint", func() {
		if out, err := p.lockstep("checkpoint", "-c", p.config, "--node", "alpha").CombinedOutput(); err != nil {
			t.Fatalf("checkpoint: %v\n%s", err, out)
		}
	}, false)
	gone("alpha", "beta")
	round("a takeover", func() {
		q.Primary.Close()
		p.await("beta", func(s *api.Status) bool { return s.Role == "primary" && s.State == "solo" })
	}, true)
	gone("beta")
}

// takenOver leaves the SVM alone.
func (s *stateLine) takenOver() {
	s.alone = true
	if s.guests != nil {
		s.guests[0].Close()
		s.guests = s.guests[1:]
	}
	if s.dials != nil {
		s.dials = s.dials[1:]
	}
}
