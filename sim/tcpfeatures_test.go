// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/lockstep-ft/lockstep/sim/tcp"
)

var rounds = flag.Uint64("rounds", 1, "how often TestTCPFeatures runs each world, with another seed each time")

// feature is something that TCP does, and worlds in which it is done.
type feature struct {
	name    string
	script  string // of the connection
	tune    func(sc *Scenario)
	reached []string // in some of the runs
	every   bool     // trouble behind every frame, not behind 20 of them
	aborts  bool     // the client resets the connection about then
	daemons bool     // it is daemons that die first
}

// tcpFeatures are point by point what docs/TCP.md lists.
var tcpFeatures = []feature{
	{name: "zero window of the client", script: "2 G100 Z900 G300000 E100", reached: []string{"window closed, of the client", "window probe of the guest", "window probe answered by the client"}},
	{name: "zero window of the guest", script: "4 E100 Y900 P300000 E100", reached: []string{"window closed, of the guest", "window probe of the client", "window probe answered by the guest"}},
	{name: "keep-alive", script: "1 E100 W1500 G5000", tune: func(sc *Scenario) { sc.Keepalive = 200 * ms },
		reached: []string{"keep-alive of the guest", "keep-alive of the client"}},
	{name: "urgent data", script: "1 U1 U700 U3000 U40000", reached: []string{"urgent data of the guest", "urgent data of the client", "urgent data arrived"}},
	{name: "half-close by the client", script: "3 E100 G200000 H0", reached: []string{"closing: the guest in close-wait"}},
	{name: "half-close by the guest", script: "1 E100 F200000", reached: []string{"closing: the guest in fin-wait-2"}},
	{name: "handshake", script: "1 W2500 E100", every: true, tune: func(sc *Scenario) { sc.NetDelay = 20 * ms }},
	{name: "close by the client", script: "1 E100", every: true, reached: []string{"closing: the guest in last-ack"}},
	{name: "close by the guest", script: "1 E100 Q-1", every: true, reached: []string{"closing: the guest in fin-wait-1", "closing: the guest in time-wait"}},
	{name: "simultaneous close", script: "1 E100 Q2200", every: true, tune: func(sc *Scenario) { sc.NetDelay = 2 * ms }, reached: []string{"closing: the guest in closing"}},
	{name: "active open", script: "1 E100 O0 E1000", every: true, reached: []string{"the guest opens a connection"}},
	{name: "simultaneous open", script: "1 E100 O1 E1000", every: true, tune: func(sc *Scenario) { sc.NetDelay = 2 * ms }, reached: []string{"simultaneous open"}},
	{name: "active open from other ports", script: "1 E100 O2 E1000", reached: []string{"the guest opens a connection"}},
	resets(tcp.Established), resets(tcp.FinWait1), resets(tcp.FinWait2), resets(tcp.CloseWait), resets(tcp.Closing), resets(tcp.LastAck),
	{name: "RST of the client, who closes", script: "3 E100 Y30 G3000 H0", every: true, aborts: true,
		reached: clientResets(tcp.SynReceived, tcp.Established, tcp.CloseWait, tcp.LastAck)},
	{name: "RST of the client, the guest closes", script: "1 E100 F90000", every: true, aborts: true, reached: clientResets(tcp.FinWait1, tcp.FinWait2, tcp.TimeWait)},
	{name: "RST of the client, both close", script: "1 E100 Q2200", every: true, aborts: true,
		reached: clientResets(tcp.Closing)},
	{name: "ports again, closed by the client", script: "1 E100 N0 E100 N0 G3000", reached: []string{"ports again, client time-wait"}},
	{name: "ports again, closed by the guest", script: "1 E100 N1 E100 N1 G3000", every: true, reached: []string{"ports again, client closed"}},
	{name: "ECN", script: "1 G300000 P300000", tune: func(sc *Scenario) { sc.ECN, sc.Mark = 1, 30 }, reached: []string{"ECE of the guest", "ECE of the client", "CWR of the guest", "CWR of the client"}},
	{name: "AccECN", script: "1 G300000 P300000", tune: func(sc *Scenario) { sc.ECN, sc.Mark = 2, 30 }, reached: []string{"AccECN of the guest", "AccECN of the client"}},
	{name: "SYN cookies", script: "1 E100 G3000 N0 E100 N1 E3000", every: true, tune: func(sc *Scenario) { sc.SynCookies, sc.ECN = true, 1 }, reached: []string{"ports again, client closed"}},
	{name: "SYN cookies without timestamps", script: "1 E100 G3000", every: true, tune: func(sc *Scenario) { sc.SynCookies, sc.NoTimestamps = true, true }},
	{name: "fast open", script: "1 E100 N0 E3000 N1 E100", every: true, tune: func(sc *Scenario) { sc.FastOpen = true }, reached: []string{"data in a SYN of the client"}},
	{name: "fast open by the guest", script: "1 E100 O0 E100 O0 E100 O1 E100", every: true, tune: func(sc *Scenario) { sc.FastOpen = true }, reached: []string{"data in a SYN of the guest"}},
	{name: "older than the daemons", script: "1 E100 W1000 E3000 G9000 W1500 E100", every: true, daemons: true, reached: []string{"action kill-daemon", "takes over"}},
	{name: "older than the pair", script: "1 E100 W1500 E3000 W2000 G9000 E100", tune: alone, reached: []string{"goes alone", "takes over"}},
	{name: "two takeovers", script: "1 E100 G9000 W5500 E3000 W5000 E100", every: true, tune: func(sc *Scenario) {
		sc.Actions = []Action{{At: 4500 * ms, Kind: coveredDeath}}
		sc.SeqWrap, sc.TSWrap = 20000, 400
	}, reached: []string{"takes over"}},
	{name: "no timestamps", script: "1 E100 G100000 P100000", tune: func(sc *Scenario) { sc.NoTimestamps = true }},
	{name: "no SACK", script: "1 E100 G100000 P100000", tune: func(sc *Scenario) { sc.NoSACK = true }},
	{name: "no window scaling", script: "1 E100 G100000 P100000", tune: func(sc *Scenario) { sc.NoScale, sc.RcvBuf = true, 256<<10 }},
	{name: "nothing but the MSS", script: "1 E100 G100000 P100000", tune: func(sc *Scenario) { sc.NoTimestamps, sc.NoSACK, sc.NoScale = true, true, true }},
	{name: "MTU 576", script: "1 E100 G100000 P100000", tune: func(sc *Scenario) { sc.MSS = 536 }},
	{name: "MTU 9000", script: "1 E100 G300000 P300000", tune: func(sc *Scenario) { sc.MSS = 8960 }},
	{name: "IPv6 extension headers", script: "1 E100 G100000 P100000", tune: func(sc *Scenario) { sc.IPv6, sc.HopOptions, sc.DestOptions, sc.MSS = true, true, true, 1424 }},
	{name: "wraps", script: "1 E100 E300 G20000 P20000 W30 E100", every: true, tune: func(sc *Scenario) { sc.SeqWrap, sc.TSWrap = 20000, 400 },
		reached: []string{"sequence numbers wrap, of the guest", "sequence numbers wrap, of the client", "timestamps wrap, of the client", "timestamps wrap, of the guest"}},
}

// alone: the secondary's host is lost, and the connection begins while the primary has no daemon.
func alone(sc *Scenario) {
	sc.Actions = []Action{{At: 400 * ms, Kind: "kill-host", Host: 1, For: 1 * s}, {At: 700 * ms, Kind: "kill-daemon", For: 600 * ms}}
	sc.Actions = append(sc.Actions, Action{At: 2 * s, Kind: coveredDeath})
	sc.Healed = 1500 * ms
}

// resets: the guest resets the connection in a state.
func resets(state tcp.State) feature {
	return feature{
		name: "RST of the guest in " + state.String(), script: fmt.Sprintf("1 E100 X%d", state), every: true,
		tune: func(sc *Scenario) {
			sc.Keepalive = 300 * ms // nobody repeats a RST that is lost
			if state == tcp.Closing {
				sc.NetDelay = 2 * ms
			}
		},
		reached: []string{"reset by the guest in " + state.String()},
	}
}

// clientResets are what is reached by the client's RSTs in these states of the guest.
func clientResets(states ...tcp.State) (reached []string) {
	for _, s := range states {
		reached = append(reached, "reset by a client in "+s.String())
	}
	return reached
}

// world is the seed'th world of a feature, without trouble.
func (f *feature) world(seed uint64) *Scenario {
	r := rand.New(rand.NewPCG(seed, 1<<42))
	sc := &Scenario{
		Seed: seed, Arbiter: arbiterEtcd, NetDelay: []int64{10 * us, 100 * us, 1 * ms}[r.IntN(3)], MSS: 1460, RcvBuf: 64 << 10, Slots: 512,
		Skew: [2]int64{r.Int64N(100 * s), r.Int64N(100 * s)}, Drift: [2]int64{r.Int64N(10000) - 5000, r.Int64N(10000) - 5000}, Healed: 4 * s,
		Autocork: r.IntN(3) == 0,
	}
	if r.IntN(2) == 0 {
		sc.PeerLoss, sc.PeerDup, sc.PeerReorder = 15, 3, 10
	}
	if err := sc.conn(append([]string{"conn", "800ms"}, strings.Fields(f.script)...)); err != nil {
		panic(err)
	}
	if f.aborts {
		sc.Keepalive, sc.NetDelay = 300*ms, 2*ms
	}
	if f.tune != nil {
		f.tune(sc)
	}
	return sc
}

// trouble are the worlds of a feature in which something happens at one moment or another.
func (f *feature) trouble(t *testing.T) (worlds []*Scenario) {
	calm := f.world(0)
	r := Run(calm, "", false)
	if r.Fault != nil {
		t.Fatalf("%v\n%s", r.Fault, calm)
	}
	n, kinds := 20, 3
	if f.aborts {
		kinds = 4
	}
	if f.every {
		n = r.Crossed + 1
	}
	for i := range n * int(*rounds) {
		round := i / n
		i %= n
		behind := 1 + i*r.Crossed/n
		for kind := range kinds {
			sc := f.world(uint64(1000*round + kinds*i + kind))
			f.strike(sc, behind, kind)
			worlds = append(worlds, sc)
		}
	}
	return worlds
}

// strike has something happen behind a frame: a checkpoint or a daemon's death (0), the PVM's death (1), the one shortly
// before the other (2), or nothing but what the feature is (3).
func (f *feature) strike(sc *Scenario, behind, kind int) {
	at, later := sc.Skew[0]%(500*us), sc.Skew[1]%(60*ms) // before, while or after the guests work on the frame
	first := Action{Behind: behind, At: at, Kind: "checkpoint"}
	if f.daemons {
		first.Kind, first.Host, first.For = "kill-daemon", int(sc.Seed/3%2), sc.Skew[1]%(300*ms)
	}
	death := Action{Behind: behind, At: at, Kind: coveredDeath}
	switch kind {
	case 0:
		sc.Actions = append(sc.Actions, first)
	case 1:
		sc.Actions = append(sc.Actions, death)
	case 2:
		first.Behind, death.At = max(behind-int(sc.Skew[1]%4), 1), later
		sc.Actions = append(sc.Actions, first, death)
	}
	if f.aborts {
		sc.Actions = append(sc.Actions, Action{Behind: max(behind-int(sc.Skew[1]%3), 1), At: sc.Drift[0] & 0xfff * us, Kind: clientAborts})
	}
}

// TestTCPFeatures: each of these in worlds with loss on the peer link, in which a checkpoint, the PVM's
// death, or both come behind one frame or another.
func TestTCPFeatures(t *testing.T) {
	for _, f := range tcpFeatures {
		t.Run(f.name, func(t *testing.T) {
			worlds := f.trouble(t)
			reached, total := map[string]int{}, 0
			var mu sync.Mutex
			var next atomic.Int64
			var wg sync.WaitGroup
			for range runtime.GOMAXPROCS(0) {
				wg.Go(func() {
					for i := next.Add(1) - 1; i < int64(len(worlds)); i = next.Add(1) - 1 {
						r := Run(worlds[i], *mutation, false)
						mu.Lock()
						for k, n := range r.Reached {
							reached[k] += n
						}
						total += r.Events
						if r.Fault != nil {
							t.Errorf("%v\n%s", r.Fault, worlds[i])
						} else if r.Open > 0 || r.Lost || r.Idle {
							t.Errorf("the guest has %d connections at the end; lost %v, nobody serves: %v\n%s", r.Open, r.Lost, r.Idle, worlds[i])
						}
						mu.Unlock()
					}
				})
			}
			wg.Wait()
			for _, k := range append(f.reached, "checkpoint loaded", "takes over", "guests' ISNs differ") {
				if reached[k] == 0 {
					t.Errorf("no run has reached %q", k)
				}
			}
			t.Logf("%d worlds, %d events, %d takeovers, %d connections broken", len(worlds), total, reached["takes over"], reached["connection broken"])
			if t.Failed() || testing.Verbose() {
				t.Log(reached)
			}
		})
	}
}
