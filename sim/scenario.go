// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"cmp"
	"net"
	"runtime/debug"
	"slices"
	"time"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/checkpoint"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader"
	"github.com/lockstep-ft/lockstep/sim/kernel"
	"github.com/lockstep-ft/lockstep/sim/tcp"
)

// Scenario is all that a run depends on. Times are in ns, chances in 1/1000.
type Scenario struct {
	noFastPath bool // the daemons compare all

	Seed    uint64
	Arbiter arbiterKind
	Period  int64 // between two checkpoints; 0: none that nothing asks for

	Periodic int // so many divergences within a minute lead to periodic mode (R28); 0: none do
	Epoch    int64

	NetDelay            int64
	NetLoss, NetReorder int

	PeerLoss, PeerDup, PeerReorder int

	RefuseCheckpoint int // QEMU's COLO ends when a checkpoint is asked for

	MSS                  int
	NoSACK, NoTimestamps bool
	NoScale, Autocork    bool
	RcvBuf               int
	RandomISN            bool
	GSO                  bool     // guests leave segmentation to their device
	Slow                 [2]int64 // what a guest's CPU takes for a frame that comes in, on the average
	Slots                int
	Skew                 [2]int64 // of the hosts' clocks
	Drift                [2]int64 // in parts per million
	Variant                       // of TCP
	Healed               int64    // when everything that was broken is mended; 0: after 15 s

	Announce int64 // how often a guest announces itself by multicast; 0: never

	Conns     []Conn
	Floods    []Flood
	Exchanges []Exchange
	Actions   []Action
}

// Conn is a client's connection.
type Conn struct {
	At        int64
	Pipelined int // requests under way at once
	Requests  []Request
}

// Flood are SYNs of nobody, at once.
type Flood struct {
	At   int64
	SYNs int
}

// Request is what a client asks for: see guest.request and variants.go. 'W' is to wait, N ms. 'V' is to reset the
// connection N us after the last request, whatever came of that, and to open another one from
// the same port.
type Request struct {
	Kind byte
	N    int64
}

// Action is something that happens to the world. What lasts, lasts For.
type Action struct {
	Behind int // so many frames between guest and clients, and At after that
	At     int64
	Kind   string // one of actions
	Host   int
	For    int64
	On     string // if set, it happens when this is reached the first time after At (see world.reach), and
	After  int64  // so much later
}

func (sc *Scenario) stack() tcp.Config {
	c := tcp.Config{
		MSS: sc.MSS, NoSACK: sc.NoSACK, NoTimestamps: sc.NoTimestamps, NoScale: sc.NoScale, Autocork: sc.Autocork,
		RcvBuf: sc.RcvBuf, WindowScale: 7, RandomISN: sc.RandomISN, Backlog: 1024,
	}
	sc.Variant.config(&c)
	return c
}

func (sc *Scenario) periodic(c *checkpoint.Config) {
	c.PeriodicAbove, c.PeriodicEnough, c.Epoch = sc.Periodic, sc.Periodic, sc.Epoch
	c.PeriodicFirst, c.PeriodicMost = 2*s, 8*s
}

func (sc *Scenario) kernel(role datapath.Role, mac net.HardwareAddr) kernel.Options {
	return kernel.Options{Role: role, HalfOpen: maxHalfOpen, Slots: sc.Slots, LargeSlots: largeSlots, MAC: mac}
}

// copies is as cmd/lockstep derives it.
func (sc *Scenario) copies() compare.SecondaryConfig {
	return compare.SecondaryConfig{MaxCopies: sc.Slots / 2, MaxLarge: largeSlots / 2}
}

// largeSlots are for frames that no usual slot holds.
const largeSlots = 48

// maxHalfOpen bounds the half-open connections that are known, on either host.
const maxHalfOpen = 64

func (sc *Scenario) compare() compare.Config {
	eager := time.Duration(0)
	if sc.Seed%4 < 2 {
		eager = 1
	}
	return compare.Config{
		Timeout: time.Second, Linger: 2 * time.Second, Idle: 2 * time.Hour, MaxHalfOpen: maxHalfOpen,
		Slots: loader.TCPSlots(sc.Slots), LargeSlots: loader.TCPSlots(largeSlots),
		FastPath: sc.Seed%4 != 3 && !sc.noFastPath, OfferAfter: eager,
	}
}

// healed is when everything that was broken is mended, and end when everything has to be over.
const (
	healed   = 15 * s
	finished = 75 * s
)

// Result is what a run came to.
type Result struct {
	Fault    *Fault         // nil: nothing was wrong
	Reached  map[string]int // states and events, and how often
	Events   int
	Answers  int
	Waited   time.Duration // for them, in sum
	Frames   int           // that left
	Compared int           // of those, the ones that the SVM had to have sent
	Lost     bool          // the guest was, and another one was booted
	Idle     bool          // nobody serves at the end
	Open     int           // connections that the guest has at the end, but for those in TIME-WAIT
	Crossed  int           // frames between guest and clients
	Log      []string      // what happened, if it was asked for
}

// Run runs a scenario. log: the fault has what led to it.
func Run(sc *Scenario, mutation string, log bool) (r Result) {
	w := newWorld(sc)
	defer func() {
		if p := recover(); p != nil {
			w.failf("panic", "%v\n%s", p, debug.Stack())
			r.Fault, r.Log, r.Reached = w.fault, w.lines, w.reached
		}
	}()
	w.logging, w.mutation, w.begin = log, mutation, w.act
	w.check = check{flows: map[flow]*wire{}, datagrams: datagramCounts{}, confirmed: map[uint32]uint32{}}
	w.arbiter = &arbiter{w: w}
	for i := range w.hosts {
		w.hosts[i] = &host{w: w, id: i, name: names[i], alive: true, disk: newDisk(), offset: 1000*s + sc.Skew[i], rate: 1 + float64(sc.Drift[i])/1e6}
	}
	w.client = newClient(w)
	w.hosts[0].boot(datapath.RolePrimary, false)
	w.hosts[1].boot(datapath.RoleSecondary, false)
	for i := range sc.Actions { // before those that they wait for
		if a := &sc.Actions[i]; a.On != "" {
			w.after(a.At, func() { w.armed = append(w.armed, armed{a.On, a.After, func() { w.act(a) }}) })
		}
	}
	for i := range sc.Actions {
		if a := &sc.Actions[i]; a.Behind == 0 && a.On == "" {
			w.after(a.At, func() { w.act(a) })
		}
	}
	healed := cmp.Or(sc.Healed, int64(healed))
	w.run(healed)
	for t := healed; w.fault == nil && t < finished; t += 1 * s {
		w.mend()
		w.run(t + 1*s)
		if w.client.ended() && t > healed+3*s {
			break
		}
	}
	if w.fault == nil {
		w.quiet()
	}
	r = Result{Reached: w.reached, Events: w.steps, Answers: w.check.answers, Waited: time.Duration(w.check.waited), Frames: w.check.frames, Compared: w.check.compared, Lost: w.guestLost, Idle: !w.serves(), Log: w.lines}
	r.Fault, r.Crossed = w.fault, w.crossed
	if q := w.hosts[w.check.speaker].qemu; q != nil && q.guest != nil {
		r.Open = q.guest.stack.Open()
	}
	for _, h := range w.hosts {
		h.dropNIC()
	}
	return r
}

// agree reports whether nothing goes wrong but loss, there are slots for what is under way, and the
// guests send the same. An SVM that misses a RST, and the SYN behind it therefore, does not: nobody
// repeats a RST. It misses one over a link that loses or reorders, and one that a slow PVM has not read when it is
// copied. Known: with fast open the SVM sends data behind its SYN|ACK. What it sends before S knows of the PVM's has no
// record, and it repeats that by its timer alone, one segment after the other. Nor can the SVM keep up without SACK, where
// each loss is a timeout that doubles, if it loses what the PVM does not.
func (sc *Scenario) agree() bool {
	loss := sc.PeerLoss+sc.PeerReorder > 0
	misses := loss || sc.Slow[0] > 0
	return len(sc.Actions) == 0 && !sc.FastOpen && sc.RefuseCheckpoint == 0 && sc.Slots >= 512 && !(loss && sc.NoSACK && sc.NetLoss > 0) && !slices.ContainsFunc(sc.Conns, func(c Conn) bool {
		return slices.ContainsFunc(c.Requests, func(r Request) bool { return r.Kind == 'T' || misses && r.Kind == 'V' })
	})
}

// serves reports whether a guest is there that can talk to clients.
func (w *world) serves() bool {
	h := w.hosts[w.check.speaker]
	mode := h.pinned().Mode
	return h.works() && h.qemu != nil && h.qemu.running() && h.qemu.works() && !h.qemu.guest.panicked && (mode == datapath.ModeSolo || mode == datapath.ModeHold)
}

// quiet looks at the world at its end.
func (w *world) quiet() {
	for i := 0; i < 50 && !w.serves(); i++ { // it may be in mid-checkpoint
		w.run(w.now + 100*ms)
	}
	if !w.serves() {
		w.reach("nobody serves")
		if w.fatal <= 1 {
			w.failf("availability", "nobody serves, after %d faults that a pair has to survive", w.fatal)
		}
		return
	}
	if !w.client.ended() {
		for _, a := range w.client.conns {
			if !a.ended && !a.lost && !w.excused && !w.client.astray(a) && !w.client.flooded(a) && !w.client.misses(a) && w.now-a.moved > 20*s+4*w.client.patience(a) { // else it is but slow
				w.failf("liveness", "connection %d is stuck at request %d of %d", a.id, a.reply, len(a.plan.Requests))
			}
		}
		for _, q := range w.client.questioners {
			if !q.ended && w.now-q.asked > 20*s {
				w.failf("liveness", "exchange %d has had no answer to question %d since %v", q.port, q.no, time.Duration(q.asked))
			}
		}
		return
	}
	if n := w.check.stalls; n > 0 && w.sc.agree() && w.reached["tap overflow"] == 0 && w.reached["guest late"] == 0 {
		w.failf("checkpoints", "%d checkpoints were asked for because one guest sent what the other had not, and nothing was wrong but loss", n)
	}
	w.run(w.now + 3*s)
	for w.fault == nil && slices.ContainsFunc(w.client.conns, func(a *asking) bool { return w.now-a.moved < 3*s }) { // a guest that was off has begun late
		w.run(w.now + 3*s)
	}
	d := w.hosts[w.check.speaker].daemon
	if active := slices.ContainsFunc(w.client.conns, func(a *asking) bool { return !a.ended }); !active && w.sc.Announce == 0 && len(w.sc.Floods) == 0 && w.fault == nil && d != nil && d.loop != nil && d.loop.Primary != nil {
		if held := d.loop.Primary.Stats().HeldPackets; held > 0 {
			w.failf("liveness", "%d frames are held, and nobody has sent anything for seconds", held)
		}
	}
}
