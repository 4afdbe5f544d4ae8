// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// How the pairs here pace their checkpoints.
const (
	leastInterval = 250 * time.Millisecond
	unasked       = "checkpoint: {period: 1h, min_interval: 250ms}\n"
)

// pacing watches that checkpoints begin at least leastInterval apart. The status
// holds only the last ones, so it is looked at often.
type pacing struct {
	last  time.Time
	epoch uint32
}

func (g *pacing) look(t *testing.T, s *api.Status) {
	t.Helper()
	for _, c := range s.Checkpoints {
		if !c.At.After(g.last) {
			continue
		}
		// A clock step of a millisecond is not a checkpoint too many.
		if gap := c.At.Sub(g.last); !g.last.IsZero() && gap < leastInterval-5*time.Millisecond {
			t.Errorf("checkpoints of epochs %d and %d began %v apart, want at least %v", g.epoch, c.Epoch, gap, leastInterval)
		}
		g.last, g.epoch = c.At, c.Epoch
	}
}

// settle waits until nothing is tracked, held or frozen, and checks that the pair
// then works as before, without a checkpoint.
func settle(p *pair, g *pacing, limit time.Duration) {
	p.t.Helper()
	var s *api.Status
	for _, node := range []string{"alpha", "beta"} {
		lt.Eventually(p.t, limit, func() (bool, string) {
			if s = p.status(node); s == nil {
				return false, "no status of " + node
			}
			if node == "alpha" {
				g.look(p.t, s)
			}
			s.Counters = nil
			text, _ := json.Marshal(s)
			return s.Connections == 0 && (node == "beta" || s.HeldPackets == 0 && s.HeldBytes == 0 && s.State == "replicating"), string(text)
		})
	}
	before := p.status("alpha")
	p.t.Run("afterwards", func(t *testing.T) { // which closes its connections
		p.with(t).keepAlive(lt.Guest4, 200)
		p.with(t).source(lt.Guest4, 1_000_000)
	})
	after := p.await("alpha", func(s *api.Status) bool { return s.Connections == 0 && s.HeldPackets == 0 })
	if n := after.CheckpointsRequested - before.CheckpointsRequested; n != 0 {
		p.t.Errorf("%d checkpoints requested afterwards: %+v", n, after.Causes)
	}
}

// TestFullTable: more connections than the tables hold are refused, counted, and
// ask for checkpoints no faster than they may come.
func TestFullTable(t *testing.T) {
	const limit = 64
	q := qemuPair(t)
	p := newPair(t, lt.Veth, q.Primary.Path(), q.Secondary.Path(), fmt.Sprintf("%scompare: {max_connections: %d}", unasked, limit))
	p.await("alpha", ready)
	// A checkpoint of this kit copies no guest, so what the guests' stacks still have
	// to say about these connections stays apart: let them give up soon.
	for _, ns := range []string{p.Client, p.PVM, p.SVM} {
		lt.Run(t, "nsenter", "--net=/run/netns/"+ns, "sysctl", "-qw", "net.ipv4.tcp_retries2=3", "net.ipv4.tcp_orphan_retries=1", "net.ipv4.tcp_fin_timeout=1")
	}
	var (
		g       pacing
		mu      sync.Mutex
		conns   []net.Conn
		dialing sync.WaitGroup
	)
	for i := range 3 * limit {
		dialing.Go(func() {
			if c, err := p.dialNth(i); err == nil {
				mu.Lock()
				defer mu.Unlock()
				conns = append(conns, c)
			}
		})
	}
	s := p.await("alpha", func(s *api.Status) bool {
		g.look(t, s)
		if s.Connections > limit {
			t.Fatalf("P tracks %d connections, more than %d", s.Connections, limit)
		}
		return s.Dropped["table full"] > 0 && s.CheckpointsDone > 0
	})
	t.Logf("table full: %d connections, %d dropped, %d checkpoints", s.Connections, s.Dropped["table full"], s.CheckpointsDone)
	if sec := p.status("beta"); sec.Connections > limit {
		t.Errorf("S tracks %d connections, more than %d", sec.Connections, limit)
	}
	dialing.Wait()
	for _, c := range conns {
		c.Close()
	}
	settle(p, &g, time.Minute)
}

// TestFullSlots: held frames stay within their slots; what finds none is dropped, and
// repeated once the SVM has sent it, without a checkpoint, and without waiting for the
// guest's timers more than a few times, though the rest of the transfer overruns the slots
// again and again.
func TestFullSlots(t *testing.T) {
	// A guest's first window is five frames of two segments, so four connections need 20
	// large slots at once, and there are 12 for TCP.
	const slots, gsoSlots = 64, 16
	q := qemuPair(t)
	limits := fmt.Sprintf("slots: %d, gso_slots: %d", slots, gsoSlots)
	p := newWorldPair(t, lt.Impaired, q.Primary.Path(), q.Secondary.Path(), unasked+"compare: {timeout: 1m, "+limits+"}")
	// S keeps its copies: without them P may have to wait for the timeout, and the
	// checkpoint it ends in, which copies no guest here.
	whole, err := os.ReadFile(p.config)
	if err != nil {
		t.Fatal(err)
	}
	p.own["beta"] = p.config + ".beta"
	if err := os.WriteFile(p.own["beta"], []byte(strings.Replace(string(whole), ", "+limits, "", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	p.start()
	p.await("alpha", ready)
	var g pacing
	noRoom := func(s *api.Status) uint64 { return s.Dropped["no_slot"] + s.Dropped["no room"] }
	// All that reports the SVM's output to P. Echoes go on.
	records := lt.Filter{Types: []uint8{uint8(bpf.LockstepLsRecTypeLS_REC_DATA), uint8(bpf.LockstepLsRecTypeLS_REC_ANSWER)}}
	for _, outage := range []struct {
		name, host string
		begin, end func()
	}{
		{"records lost, IPv4", lt.Guest4, func() { p.Impair.Drop(t, lt.S2P, records, lt.AllOf) }, func() { p.Impair.Drop(t, lt.S2P, records, 0) }},
		{"records lost, IPv6", lt.Guest6, func() { p.Impair.Drop(t, lt.S2P, records, lt.AllOf) }, func() { p.Impair.Drop(t, lt.S2P, records, 0) }},
		{"SVM cut off", lt.Guest4, func() { p.SetLink(t, p.HostS, "tapS", false) }, func() { p.SetLink(t, p.HostS, "tapS", true) }},
	} {
		t.Run(outage.name, func(t *testing.T) {
			p := p.with(t)
			const n = 100_000
			conns := make([]*net.TCPConn, 4)
			for i := range conns {
				conns[i] = p.mustDial(outage.host, portCut)
			}
			p.await("beta", func(s *api.Status) bool { return s.Connections == len(conns) })
			before, timers := noRoom(p.status("alpha")), netCount(t, p.PVM, "TCPTimeouts")
			outage.begin()
			defer outage.end() // when the test fails before
			for _, c := range conns {
				fmt.Fprintf(c, "2896,2896 %d\n", n)
			}
			// The slots are full, and each connection's timer has run out.
			s := p.await("alpha", func(s *api.Status) bool {
				g.look(t, s)
				if most := slots*2048 + gsoSlots*69632; s.HeldBytes > most || s.HeldPackets > slots+gsoSlots {
					t.Fatalf("%d packets, %d bytes held, more than all slots (%d)", s.HeldPackets, s.HeldBytes, most)
				}
				return noRoom(s) > before && netCount(t, p.PVM, "TCPTimeouts") >= timers+len(conns)
			})
			t.Logf("slots full: %d packets, %d bytes held, %d dropped", s.HeldPackets, s.HeldBytes, noRoom(s)-before)
			timers = netCount(t, p.PVM, "TCPTimeouts")
			begun := time.Now()
			outage.end()
			var readers sync.WaitGroup
			for _, c := range conns {
				c.SetDeadline(time.Now().Add(20 * time.Second))
				readers.Go(func() {
					if err := readPattern(c, n); err != nil {
						t.Error(err)
					}
				})
			}
			readers.Wait()
			timers = netCount(t, p.PVM, "TCPTimeouts") - timers
			t.Logf("all there after %v, in which the PVM's timers ran out %d times", time.Since(begun).Round(time.Millisecond), timers)
			// Held frames have made each timer long: a few are a second, dozens a minute.
			if most := 3 * len(conns); timers > most {
				t.Errorf("the PVM's timers ran out %d times, want at most %d", timers, most)
			}
			for _, c := range conns {
				c.Close()
			}
			after := p.await("alpha", func(s *api.Status) bool { return s.Connections == 0 && s.HeldPackets == 0 })
			if after.CheckpointsRequested != 0 {
				t.Errorf("%d checkpoints requested: %+v", after.CheckpointsRequested, after.Causes)
			}
			if after.Counters["peer_replay"] != 0 {
				t.Errorf("%d records taken for replays", after.Counters["peer_replay"])
			}
		})
	}
	settle(p, &g, time.Minute)
}

// syn is a SYN, or a segment with other flags, from an address that no host has.
func syn(from netip.AddrPort, seq uint32, flags byte) []byte {
	port, _ := strconv.Atoi(portEcho)
	return toGuest4(from, uint16(port), seq, 0, uint16(flags), []byte{2, 4, 1460 >> 8, 1460 & 0xff}, nil) // MSS
}

// flood sends n SYNs from as many addresses and ports, none of which answers.
func flood(p *pair, w *lt.Wire, first, n int, flags byte, seqAdd uint32) {
	p.t.Helper()
	for i := first; i < first+n; i++ {
		from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 78, byte(i >> 8), byte(i)}), uint16(1024+i%60000))
		w.Send(p.t, syn(from, uint32(i)*2654435761+seqAdd, flags))
	}
}

// floodable lets the guests send answers to the flood's addresses, to the client.
func floodable(p *pair) *lt.Wire {
	p.t.Helper()
	for _, guest := range []string{p.PVM, p.SVM} {
		lt.Run(p.t, "ip", "-n", guest, "route", "add", "10.78.0.0/16", "via", lt.Client4)
	}
	return lt.OpenWire(p.t, p.Client, "eth0")
}

// TestHalfOpenFlood: tens of thousands of SYNs that are never completed cost other
// half-open connections only: not the table, not those that are open.
func TestHalfOpenFlood(t *testing.T) {
	const limit, n = 1024, 30_000
	q := qemuPair(t)
	p := newPair(t, lt.Veth, q.Primary.Path(), q.Secondary.Path(), fmt.Sprintf("%scompare: {max_connections: %d, slots: 512}", unasked, limit))
	p.await("alpha", ready)
	w := floodable(p)
	meant := p.mustDial(lt.Guest4, portEcho)
	var g pacing
	look := func() *api.Status {
		t.Helper()
		s := p.await("alpha", func(s *api.Status) bool { return true })
		g.look(t, s)
		if s.Connections > limit || s.HeldPackets > 512+1024 {
			t.Fatalf("%d connections, %d packets held: more than the tables take", s.Connections, s.HeldPackets)
		}
		return s
	}
	const step = 2000
	for i := 0; i < n; i += step {
		flood(p, w, i, step, flagSYN, 0)
		look()
		if err := echo(meant, i); err != nil {
			t.Fatalf("after %d SYNs the open connection: %v", i+step, err)
		}
	}
	s := p.await("alpha", func(s *api.Status) bool { return s.HalfOpenEvicted > 0 })
	t.Logf("flooded: %d connections, %d evicted, dropped %v", s.Connections, s.HalfOpenEvicted, s.Dropped)
	if s.CheckpointsRequested != 0 {
		t.Errorf("%d checkpoints requested: %+v", s.CheckpointsRequested, s.Causes)
	}
	if sec := p.status("beta"); sec.Connections > limit {
		t.Errorf("S tracks %d connections, more than %d", sec.Connections, limit)
	}
	meant.Close()
	flood(p, w, 0, n, flagRST, 1) // the flood takes itself back
	settle(p, &g, 2*time.Minute)
}

// TestFullRing: with P's daemon stopped the ring fills up, half of it with a flood of
// SYNs, and no more: the rest with answers to what is of no connection; frames that cannot be
// told of are dropped for both guests and counted, and what checkpoints that costs
// come at their pace.
func TestFullRing(t *testing.T) {
	const ring = 16 << 20
	const n = ring / 300 // an event is larger
	q := qemuPair(t)
	p := newPair(t, lt.Veth, q.Primary.Path(), q.Secondary.Path(), unasked+"compare: {slots: 512}")
	p.await("alpha", ready)
	w := floodable(p)
	var g pacing
	daemon := p.procs["alpha"].Process
	if err := daemon.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { daemon.Signal(syscall.SIGCONT) })
	flood(p, w, 0, n, flagSYN, 0)
	flood(p, w, n, n, flagACK, 0)
	if err := daemon.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	s := p.await("alpha", func(s *api.Status) bool {
		g.look(t, s)
		return s.Dropped["no_ring"] > 0 && s.Dropped["crowded"] > 0 && s.State == "replicating"
	})
	t.Logf("ring full: %d connections, %d frames dropped, %d of SYNs before, %d checkpoints requested, %d done",
		s.Connections, s.Dropped["no_ring"], s.Dropped["crowded"], s.CheckpointsRequested, s.CheckpointsDone)
	flood(p, w, 0, n, flagRST, 1)
	settle(p, &g, 2*time.Minute)
}

// resident is a process' memory.
func resident(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "\nVmRSS:")
	line, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(line)
}
