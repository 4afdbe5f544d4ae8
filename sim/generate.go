// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"cmp"
	"math/rand/v2"
	"slices"

	"github.com/lockstep-ft/lockstep/sim/tcp"
)

// Generate draws a scenario.
func Generate(seed uint64) *Scenario {
	sc := draw(seed)
	drawVariant(sc)
	drawPortsAgain(sc)
	drawPeriodic(sc)
	return sc
}

// drawPeriodic has one scenario of five come to periodic mode by few divergences, which any guest has whose clients ask for
// the time. It has random numbers of its own, too.
func drawPeriodic(sc *Scenario) {
	r := rand.New(rand.NewPCG(sc.Seed, 1<<44))
	if r.IntN(5) > 0 {
		return
	}
	sc.Periodic, sc.Epoch = 1+r.IntN(3), []int64{10 * ms, 25 * ms, 50 * ms, 200 * ms}[r.IntN(4)]
	if len(sc.Actions) == 0 && sc.agree() {
		return // the guests are to agree
	}
	for i := range sc.Conns {
		if c := &sc.Conns[i]; r.IntN(2) == 0 && len(c.Requests) > 0 {
			c.Requests = slices.Insert(c.Requests, r.IntN(len(c.Requests)), Request{'T', 0}) // the last one may end the connection
		}
	}
}

// draw draws one in which TCP does only what is usual.
func draw(seed uint64) *Scenario {
	r := rand.New(rand.NewPCG(seed, 1<<40))
	one := func(n int) bool { return r.IntN(n) == 0 }
	sc := &Scenario{
		Seed: seed, Arbiter: []arbiterKind{arbiterEtcd, arbiterFile, arbiterExec}[r.IntN(3)],
		Period:   []int64{0, 300 * ms, 1 * s, 3 * s}[r.IntN(4)],
		NetDelay: []int64{10 * us, 100 * us, 2 * ms, 30 * ms}[r.IntN(4)],
		MSS:      []int{536, 1460, 1460, 8960}[r.IntN(4)], RcvBuf: []int{8 << 10, 64 << 10, 256 << 10}[r.IntN(3)],
		NoSACK: one(5), NoTimestamps: one(5), NoScale: one(6), Autocork: one(3), Slots: []int{48, 512}[r.IntN(2)],
	}
	if one(2) {
		sc.NetLoss, sc.NetReorder = r.IntN(12), r.IntN(12)
	}
	if one(2) {
		sc.PeerLoss, sc.PeerDup, sc.PeerReorder = r.IntN(15), r.IntN(5), r.IntN(12)
	}
	if one(8) {
		sc.RefuseCheckpoint = r.IntN(300)
	}
	for i := range 2 {
		sc.Skew[i], sc.Drift[i] = r.Int64N(100*s), r.Int64N(10000)-5000
	}
	for i := range 1 + r.IntN(5) {
		sc.Conns = append(sc.Conns, drawConn(r, i))
	}
	at := int64(0)
	for range drawCount(r) {
		// One thing often leads to another, and the beginning of a pair is as good a time as any.
		switch r.IntN(4) {
		case 0, 1:
			at += r.Int64N(800 * ms)
		case 2:
			at = 50*ms + r.Int64N(600*ms)
		default:
			at = 100*ms + r.Int64N(9*s)
		}
		at = min(at, 10*s)
		sc.Actions = append(sc.Actions, drawAction(r, at))
	}
	drawMore(rand.New(rand.NewPCG(seed, 1<<41)), sc)
	slices.SortStableFunc(sc.Actions, func(a, b Action) int { return cmp.Compare(a.At, b.At) })
	sc.drawTheme()
	if r := rand.New(rand.NewPCG(seed, 1<<43)); len(sc.Actions) > 0 && r.IntN(20) == 0 {
		sc.Actions = append(sc.Actions, Action{At: 1*s + r.Int64N(8*s), Kind: panicGuest, Host: r.IntN(2)})
		slices.SortStableFunc(sc.Actions, func(a, b Action) int { return cmp.Compare(a.At, b.At) })
	}
	return sc
}

// drawVariant has one scenario of four do unusual things with TCP. It has random numbers of its own, so that all
// else is what it is without.
func drawVariant(sc *Scenario) {
	r := rand.New(rand.NewPCG(sc.Seed, 1<<42))
	one := func(n int) bool { return r.IntN(n) == 0 }
	if !one(4) {
		return
	}
	if one(3) {
		sc.IPv6, sc.HopOptions, sc.DestOptions = true, one(2), one(2)
		sc.Exchanges, sc.Announce, sc.Floods, sc.GSO = nil, 0, nil, false // these are IPv4
	}
	sc.SynCookies, sc.FastOpen = one(4), one(4)
	if sc.ECN = r.IntN(3); sc.ECN > 0 {
		sc.Mark = r.IntN(40)
	}
	if one(3) && !sc.SynCookies { // which know nothing of a beginning
		sc.SeqWrap, sc.TSWrap = 1+r.IntN(100000), 1+r.IntN(10000)
	}
	if one(2) {
		sc.Keepalive = 200*ms + r.Int64N(2*s)
		if len(sc.Actions) > 0 {
			sc.Keepalive += 2 * s // nine probes have to last longer than what is broken
		}
	}
	for i := range sc.Conns {
		if c := &sc.Conns[i]; !slices.ContainsFunc(c.Requests, func(q Request) bool { return q.Kind == 'V' }) {
			drawScript(r, sc, c)
		}
	}
}

// drawScript adds to a connection what is about the connection itself.
func drawScript(r *rand.Rand, sc *Scenario, c *Conn) {
	for range r.IntN(4) {
		q := []Request{
			{'U', 1 + r.Int64N(5000)}, {'Z', r.Int64N(1500)}, {'Y', r.Int64N(1500)}, {'O', r.Int64N(3)}, {'N', r.Int64N(2)},
		}[r.IntN(5)]
		if q.Kind == 'N' && (sc.NoTimestamps || sc.TSWrap > 0) {
			continue // the ports of a connection in TIME-WAIT cannot be used again
		}
		if q.Kind == 'O' && sc.SynCookies {
			q.N &^= 1 // a client that listens and dials at once forgets which of both it was
		}
		c.Requests = slices.Insert(c.Requests, r.IntN(len(c.Requests)+1), q)
	}
	switch r.IntN(6) {
	case 0:
		c.Requests = append(c.Requests, Request{'H', 0})
	case 1:
		c.Requests = append(c.Requests, Request{'F', 1 + r.Int64N(50000)})
	case 2:
		c.Requests = append(c.Requests, Request{'Q', r.Int64N(3*sc.NetDelay/us) - 1})
	case 3:
		if sc.Keepalive > 0 { // else nobody notices a RST that is lost
			c.Requests = append(c.Requests, Request{'X', int64(tcp.Established) + r.Int64N(6)})
		}
	}
}

// drawCount draws how much goes wrong: mostly little, so that what is asked of a pair that met
// one fault is asked often.
func drawCount(r *rand.Rand) int {
	switch r.IntN(8) {
	case 0:
		return 0
	case 1, 2, 3:
		return 1
	case 4, 5:
		return 2 + r.IntN(2)
	}
	return 4 + r.IntN(8)
}

func drawConn(r *rand.Rand, key int) Conn {
	c := Conn{At: 200*ms + r.Int64N(8*s), Pipelined: 1}
	if r.IntN(4) == 0 {
		c.Pipelined = 1 + r.IntN(8)
	}
	size := func() int64 {
		return []int64{1, 100, 1460, 5000, 40000, 1, 100, 1460, 5000, 40000, 400000}[r.IntN(11)] + r.Int64N(100)
	}
	for range 2 + r.IntN(14) {
		switch r.IntN(12) {
		case 0, 1:
			c.Requests = append(c.Requests, Request{'E', size()})
		case 2, 3:
			c.Requests = append(c.Requests, Request{'G', size()})
		case 4:
			c.Requests = append(c.Requests, Request{'P', size()})
		case 5, 6:
			c.Requests = append(c.Requests, Request{'S', int64(key)})
		case 7:
			c.Requests = append(c.Requests, Request{'R', int64(key)})
		case 8:
			c.Requests = append(c.Requests, Request{'T', 0})
		default:
			c.Requests = append(c.Requests, Request{'W', 20 + r.Int64N(1500)})
		}
	}
	return c
}

// drawMore draws what came to the world later, from numbers of its own.
func drawMore(r *rand.Rand, sc *Scenario) {
	if r.IntN(4) == 0 {
		sc.Announce = []int64{30 * ms, 200 * ms, 1 * s}[r.IntN(3)]
	}
	for range max(r.IntN(6)-2, 0) {
		sc.Exchanges = append(sc.Exchanges, Exchange{
			At: 100*ms + r.Int64N(8*s), Kind: "UCI"[r.IntN(3)], Times: 1 + r.IntN(60),
			Pause: []int64{0, 10 * ms, 100 * ms}[r.IntN(3)], Size: []int{0, 40, 512, 1400}[r.IntN(4)],
		})
	}
	if r.IntN(3) == 0 {
		sc.Slow[r.IntN(2)] = []int64{100 * us, 1 * ms, 5 * ms}[r.IntN(3)]
	}
	sc.RandomISN = r.IntN(3) == 0
	for i := range sc.Conns {
		if c := &sc.Conns[i]; r.IntN(3) == 0 {
			at := 1 + r.IntN(len(c.Requests))
			c.Requests = slices.Insert(c.Requests, at, Request{'V', []int64{0, 100, 1000, 5000, 50000}[r.IntN(5)]})
		}
	}
	if r.IntN(8) == 0 {
		sc.Floods = append(sc.Floods, Flood{At: 100*ms + r.Int64N(8*s), SYNs: 10 + r.IntN(300)})
	}
	sc.GSO = r.IntN(3) == 0
	if len(sc.Actions) == 0 { // then nothing goes wrong but loss, and the guests agree
		for i := range sc.Conns {
			c := &sc.Conns[i]
			c.Requests = slices.DeleteFunc(c.Requests, func(r Request) bool { return r.Kind == 'T' })
		}
	}
}

// kinds are the actions' names, sorted.
var kinds = func() (names []string) {
	for k := range actions {
		if !themed[k] && k != clientAborts && k != coveredDeath && k != panicGuest {
			names = append(names, k)
		}
	}
	slices.Sort(names)
	return names
}()

func drawAction(r *rand.Rand, at int64) Action {
	a := Action{At: at, Kind: kinds[r.IntN(len(kinds))], Host: r.IntN(2)}
	if actions[a.Kind].lasts {
		a.For = []int64{20 * ms, 200 * ms, 1 * s, 4 * s}[r.IntN(4)]
		a.For += r.Int64N(a.For)
		a.For = min(a.For, healed-1*s-a.At)
	}
	return a
}
