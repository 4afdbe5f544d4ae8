// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"cmp"
	"slices"
	"time"
)

// Config bounds and times a [Primary]. Zero fields take the default.
type Config struct {
	Timeout  time.Duration // R7's compare_timeout; 1 s
	CutDelay time.Duration // R5; 1 ms

	MaxConnections int           // 65536
	Linger         time.Duration // what a connection is kept for that is closed, or of which nothing is compared; 2 s
	MaxHalfOpen    int           // connections that are not established; 16384
	HalfOpen       time.Duration // what a connection may take to open; 60 s
	Idle           time.Duration // 2 h

	// What the kernel can hold of TCP: frames of the usual size and large ones. An eighth
	// is kept free, so that what fills a hole finds a slot.
	Slots, LargeSlots int // 12288, 768

	MaxPoints  int // known positions of SVM streams, over all connections; 1 Mi
	ConnPoints int // in one connection; 4096
	MaxNext    int // records of the next epoch kept until its commit; 4096

	// Datagrams that one guest has transmitted and the other has not.
	MaxFlows      int // 16384
	MaxDatagrams  int // held, over all flows; 4096
	FlowDatagrams int // of each side, in one flow; 1024
	MaxUnmatched  int // of the SVM, over all flows; 16384

	// FastPath: connections of which nothing waits are offered to the kernel (R27).
	// OfferAfter is how long after it is established here, or was given back: one that is over
	// sooner is not worth it; 1 ms.
	FastPath   bool
	OfferAfter time.Duration

	Epoch uint32 // the one to start in
}

func (c *Config) setDefaults() {
	c.Timeout = cmp.Or(c.Timeout, time.Second)
	c.CutDelay = cmp.Or(c.CutDelay, time.Millisecond)
	c.MaxConnections = cmp.Or(c.MaxConnections, 1<<16)
	c.Linger = cmp.Or(c.Linger, 2*time.Second)
	c.MaxHalfOpen = cmp.Or(c.MaxHalfOpen, 1<<14)
	c.HalfOpen = cmp.Or(c.HalfOpen, time.Minute)
	c.Idle = cmp.Or(c.Idle, 2*time.Hour)
	c.Slots = cmp.Or(c.Slots, 12288)
	c.LargeSlots = cmp.Or(c.LargeSlots, 768)
	c.MaxPoints = cmp.Or(c.MaxPoints, 1<<20)
	c.ConnPoints = cmp.Or(c.ConnPoints, 1<<12)
	c.MaxNext = cmp.Or(c.MaxNext, 1<<12)
	c.MaxFlows = cmp.Or(c.MaxFlows, 1<<14)
	c.MaxDatagrams = cmp.Or(c.MaxDatagrams, 1<<12)
	c.FlowDatagrams = cmp.Or(c.FlowDatagrams, 1<<10)
	c.OfferAfter = cmp.Or(c.OfferAfter, offerAfter)
	c.MaxUnmatched = cmp.Or(c.MaxUnmatched, 1<<14)
}

// Primary decides what leaves on P. It holds no lock: one goroutine drives it.
//
// It takes in events, finds the connection or flow that one is about, and has it do
// what its state allows; what a connection knows and may do is in [conn] and the values
// that it is made of.
type Primary struct {
	core
	epoch     uint32
	conns     connTable
	datagrams datagrams
	neighs    neighbours
	next      []Segment // records of epochs to come (R17)
	fullAsked bool
	fullAt    int64
}

// Stats counts events since the start, but for Connections, Flows and Held, which are as
// of now.
type Stats struct {
	Connections   int
	Flows         int // of datagrams
	HeldPackets   int
	HeldBytes     int // payload
	ReleasedBytes uint64
	// ReleasedPackets counts sent frames that were held, SentACKs those made from
	// a template.
	ReleasedPackets, SentACKs uint64
	ReleasedDatagrams         uint64
	Records                   uint64 // digest records of the SVM
	Asks, Announces           uint64
	Queries, Remirrors        uint64 // R6
	Probes                    uint64 // R6: of a guest that may be delaying its ACK
	Adopted                   uint64 // connections met in mid-stream
	Evicted                   uint64 // half-open connections that made room (R11)
	// CommitWait is how long the output that the last commit released had waited for the
	// SVM when the PVM stopped, at most.
	CommitWait time.Duration
	// HoldTimes are those of the frames and datagrams that left, from when they were captured.
	HoldTimes          Histogram
	Checkpoints, Drops [ReasonCount]uint64
}

// Flow describes a connection, or a flow of datagrams of which one guest has transmitted
// more; for that State is "datagram", and positions mean nothing.
type Flow struct {
	Tuple     Tuple
	State     string
	Inc       uint32 // the PVM's ISN, where it is known
	Inherited bool   // known since a commit, or not from its start
	Compared  uint32 // below it both guests transmitted the same
	Released  uint32 // highest position sent
	Held      int    // packets
	HeldBytes int
	Age       time.Duration
	Diverged  bool
	Why       Reason // of the divergence
	Kernel    bool   // the kernel owns it, and knows newer positions (R27)

	no uint64 // rises from one to the next that is made
}

const stateDatagram = "datagram"

// NewPrimary makes the decision core of P. keys are those of the kernel.
func NewPrimary(cfg Config, keys *Keys) *Primary {
	cfg.setDefaults()
	p := &Primary{
		core: core{
			cfg: cfg, keys: keys, asserts: Assertions, opens: make(openTable), delays: make(map[uint16]*delays),
			slots:  [slotClasses]slotUse{{limit: slotLimit(cfg.Slots)}, {limit: slotLimit(cfg.LargeSlots)}},
			points: pointBudget{perStream: cfg.ConnPoints, max: cfg.MaxPoints},
		},
		epoch: cfg.Epoch,
	}
	p.conns = connTable{core: &p.core, byTuple: make(map[Tuple]*conn)}
	p.datagrams = datagrams{core: &p.core, flows: make(map[Tuple]*dgramFlow)}
	p.neighs = neighbours{asked: make(map[neighKey]struct{})}
	return p
}

// Step takes in one event at boottime now, in ns, and appends to out what is to be
// done, in order. ev and what it points to is not kept, but for a held frame's
// Payload.
func (p *Primary) Step(now int64, ev *Event, out []Effect) []Effect {
	p.now, p.effects = now, out
	p.eventNo++
	switch ev.Kind {
	case EvPVM:
		p.pvm(&ev.Seg)
	case EvSVM:
		p.stats.Records++
		p.svm(&ev.Seg)
	case EvAnswer:
		p.answer(&ev.Seg)
	case EvClient:
		p.client(&ev.Seg)
	case EvAdopt:
		p.adopt(&ev.Seg)
	case EvNeigh:
		p.neigh(&ev.Seg)
	case EvTick:
		p.tick()
	case EvFreeze:
		p.freeze()
	case EvThaw:
		p.thaw()
	case EvCommit:
		p.commit(ev.Epoch, ev.At)
	case EvSolo:
		p.goSolo()
	case EvOpened:
		p.opened(&ev.Seg)
	case EvGranted:
		p.granted(&ev.Seg.Tuple, ev.Handover)
	case EvTaken:
		p.taken(&ev.Seg.Tuple, ev.Handover)
	}
	if p.asserts {
		if err := p.check(); err != nil {
			panic(err)
		}
	}
	out, p.effects = p.effects, nil
	return out
}

// Stats gives the counters.
func (p *Primary) Stats() Stats {
	s := p.stats
	s.Connections, s.Flows = len(p.conns.byTuple), len(p.datagrams.flows)
	s.Drops[ReasonForgotten] += p.points.forgotten
	return s
}

// FlowWalk lists the connections and the flows of datagrams a part at a time: the
// goroutine that walks is the one that releases frames, and others wait meanwhile.
type FlowWalk struct{ left []*timer }

// WalkFlows begins a walk over what is there now.
func (p *Primary) WalkFlows() FlowWalk { return FlowWalk{slices.Clone(p.timers)} }

// Next appends the next n flows to fs, in no order (see [SortFlows]), without those that
// have ended since the walk began. It reports whether there may be more. Ages are as of
// the last Step.
func (w *FlowWalk) Next(p *Primary, n int, fs []Flow) ([]Flow, bool) {
	n = min(n, len(w.left))
	for _, t := range w.left[:n] {
		switch {
		case t.heapIdx < 0: // ended
		case t.flow != nil:
			fs = append(fs, t.flow.describe(p.now))
		default:
			fs = append(fs, t.conn.describe(p.now))
		}
	}
	w.left = w.left[n:]
	return fs, len(w.left) > 0
}

// SortFlows puts connections, and behind them flows of datagrams, in the order in
// which they were made.
func SortFlows(fs []Flow) {
	slices.SortFunc(fs, func(a, b Flow) int {
		if x, y := a.State == stateDatagram, b.State == stateDatagram; x != y {
			if y {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.no, b.no)
	})
}
