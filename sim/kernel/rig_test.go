// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"bytes"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
)

// side is one host: its NIC, its core, driven as control's loop does, and its guest.
type side struct {
	n    *NIC
	core interface {
		Step(now int64, ev *compare.Event, out []compare.Effect) []compare.Effect
		NextDeadline() int64
	}
	guest  *endpoint
	clock  func() int64
	evs    []compare.Event
	effs   []compare.Effect
	wanted []compare.Reason // of checkpoints
}

func (s *side) step(ev compare.Event) {
	s.effs = s.core.Step(s.clock(), &ev, s.effs)
	s.apply()
}

func (s *side) apply() {
	for len(s.effs) > 0 {
		var acked []compare.Event
		for i := range s.effs {
			switch e := &s.effs[i]; e.Op {
			case compare.OpCheckpoint:
				s.wanted = append(s.wanted, e.Reason)
			case compare.OpAdopt:
				if ack, ok := s.n.Acked(e.Tuple); ok {
					acked = append(acked, compare.Event{Kind: compare.EvAdopt, Seg: compare.Segment{Tuple: e.Tuple, Seq: ack, Slot: compare.NoSlot}})
				}
			}
		}
		if err := s.n.Apply(s.effs); err != nil {
			panic(err)
		}
		s.effs = s.effs[:0]
		for i := range acked {
			s.effs = s.core.Step(s.clock(), &acked[i], s.effs)
		}
	}
}

// poll does one turn of the loop and reports whether there was anything to do.
func (s *side) poll() bool {
	evs, err := s.n.Poll(time.Hour, s.evs[:0])
	if err != nil {
		panic(err)
	}
	s.evs = evs
	for i := range evs {
		s.effs = s.core.Step(s.clock(), &evs[i], s.effs)
	}
	due := s.core.NextDeadline() <= s.clock()
	if due {
		s.effs = s.core.Step(s.clock(), &compare.Event{Kind: compare.EvTick}, s.effs)
	}
	busy := len(s.effs) > 0
	s.apply()
	return busy || due || len(evs) > 0
}

// rig is a pair with a client, and what is under way between them.
type rig struct {
	testing.TB
	now     int64
	p, s    *side
	client  *endpoint
	queue   []func()            // deliveries, in order
	lose    func(b []byte) bool // on the peer link
	session datapath.Session    // P's view
}

var rigFlow = flow{guest: 1, rem: 2, gport: 80, rport: 4000}

const rigMS = int64(time.Millisecond)

func newRig(t testing.TB) *rig {
	r := &rig{TB: t, now: 1e9, lose: func([]byte) bool { return false }}
	clock := func() int64 { return r.now }
	r.client = &endpoint{flow: rigFlow, toGuest: true, isn: 1000, stamp: 77, clock: clock}
	host := func(s *side, peer func() *NIC) Host {
		return Host{
			Now: clock, Rand: rand.New(rand.NewPCG(1, 1)),
			ToGuest: func(b []byte) {
				r.queue = append(r.queue, func() {
					for _, f := range s.guest.receive(b) {
						s.n.FromGuest(f, 0)
					}
				})
			},
			ToWire: func(b []byte) {
				r.queue = append(r.queue, func() {
					for _, f := range r.client.receive(b) {
						r.wire(f)
					}
				})
			},
			ToPeer: func(b []byte) {
				if !r.lose(b) {
					r.queue = append(r.queue, func() { peer().FromPeer(b) })
				}
			},
		}
	}
	r.p = &side{clock: clock, guest: &endpoint{flow: rigFlow, isn: 0xfffffff0, stamp: 5000, clock: clock}}
	r.s = &side{clock: clock, guest: &endpoint{flow: rigFlow, isn: 0x500, stamp: 0xfffffff0, clock: clock}}
	r.p.n = New(host(r.p, func() *NIC { return r.s.n }), Options{Role: datapath.RolePrimary, MAC: []byte{2, 0, 0, 0, 1, 1}})
	r.s.n = New(host(r.s, func() *NIC { return r.p.n }), Options{Role: datapath.RoleSecondary, MAC: []byte{2, 0, 0, 0, 1, 2}})
	keys, err := compare.NewKeys(rand.NewChaCha8([32]byte{3}))
	must(t, err)
	r.session = datapath.Session{Term: 1, Epoch: 1, PeerMAC: r.s.n.MAC(), TxKey: [2]uint64{1, 2}, RxKey: [2]uint64{3, 4}, Digest: *keys}
	must(t, r.p.n.InstallSession(r.session))
	other := r.session
	other.PeerMAC, other.TxKey, other.RxKey = r.p.n.MAC(), r.session.RxKey, r.session.TxKey
	must(t, r.s.n.InstallSession(other))
	r.p.core = compare.NewPrimary(compare.Config{Epoch: 1, KeepYoung: true}, keys)
	r.s.core = compare.NewSecondary(compare.SecondaryConfig{}, keys)
	must(t, r.p.n.SetLeaseUntil(math.MaxInt64))
	must(t, r.p.n.SetMode(datapath.ModeHold))
	must(t, r.s.n.SetMode(datapath.ModeRun))
	return r
}

// wire: the bridge has a frame for the guest that transmits.
func (r *rig) wire(b []byte) {
	n := r.p.n
	if n.m.mode() == 0 || n.closed {
		n = r.s.n
	}
	n.FromWire(b)
}

// run delivers what is under way, until nothing is.
func (r *rig) run() {
	for busy := true; busy; {
		busy = len(r.queue) > 0
		for len(r.queue) > 0 {
			f := r.queue[0]
			r.queue = r.queue[1:]
			f()
		}
		busy = r.p.poll() || busy
		busy = r.s.poll() || busy
	}
}

// pass lets time pass, the cores' deadlines being met.
func (r *rig) pass(d int64) {
	end := r.now + d
	for {
		at := min(r.p.core.NextDeadline(), r.s.core.NextDeadline(), end)
		r.now = max(r.now, at)
		r.run()
		if r.now >= end {
			return
		}
	}
}

func (r *rig) send(data string) {
	r.Helper()
	r.wire(r.client.data([]byte(data)))
	r.run()
}

// open has the client connect.
func (r *rig) open() {
	r.Helper()
	r.wire(r.client.syn())
	r.run()
	if !r.client.open {
		r.Fatal("the client is not connected")
	}
}

func (r *rig) wantReceived(want string) {
	r.Helper()
	if got := string(r.client.got); got != want {
		r.Fatalf("the client received %q, want %q", got, want)
	}
}

// endpoint is an end of one TCP connection: a guest that answers each request with its
// echo in capitals, or the client. It retransmits nothing by itself.
type endpoint struct {
	flow    flow
	toGuest bool // what it sends
	clock   func() int64

	isn, next, rcv uint32 // own ISN, the next position, and the other's
	peer           uint32 // highest ack of the other end
	stamp, echo    uint32 // TSval at time 0, newest TSval of the other end
	open           bool
	got            []byte
	sent           []byte
	seen           func(n int) // is told of payload that came
}

func (e *endpoint) segment(flags uint8, seq uint32, payload []byte) []byte {
	opts := tsOpt(e.stamp+uint32(e.clock()/rigMS), e.echo)
	if flags&syn != 0 {
		opts = append([]byte{2, 4, 5, 180}, opts...)
	}
	return e.flow.tcp(e.toGuest, seg{seq: seq, ack: e.rcv, flags: flags, win: 60000, opts: opts, payload: payload})
}

func (e *endpoint) syn() []byte {
	e.next = e.isn + 1
	return e.segment(syn, e.isn, nil)
}

func (e *endpoint) data(b []byte) []byte {
	f := e.segment(ack|psh, e.next, b)
	e.next += uint32(len(b))
	e.sent = append(e.sent, b...)
	return f
}

// again is what the other end has not acknowledged.
func (e *endpoint) again() []byte {
	n := e.next - e.peer
	return e.segment(ack|psh, e.peer, e.sent[len(e.sent)-int(n):])
}

// receive takes a segment and returns the answers.
func (e *endpoint) receive(b []byte) (out [][]byte) {
	var s bpfmodel.Segment
	if s.Parse(b, !e.toGuest) != bpfmodel.ClassTCP {
		return nil
	}
	h := s.TCP()
	if e.flow.checksum(!e.toGuest, 6, b[s.L4:s.End]) != 0 {
		panic("wrong checksum")
	}
	if n := len(h.Options()); n >= 10 {
		e.echo = be.Uint32(h.Options()[n-8:])
	}
	flags := h.Flags()
	if flags&bpfmodel.SYN != 0 {
		e.rcv = h.Seq() + 1
		if flags&bpfmodel.ACK == 0 {
			e.next = e.isn + 1
			return [][]byte{e.segment(syn|ack, e.isn, nil)}
		}
		e.open, e.peer = true, h.Ack()
		return [][]byte{e.segment(ack, e.next, nil)}
	}
	if flags&bpfmodel.ACK != 0 {
		if h.Ack()-e.isn > e.next-e.isn {
			return nil // acknowledges what was never sent: not of this connection's numbers
		}
		e.open = true
		if int32(h.Ack()-e.peer) > 0 || e.peer == 0 {
			e.peer = h.Ack()
		}
	}
	pay := s.Payload()
	if len(pay) == 0 {
		return nil
	}
	if e.seen != nil {
		e.seen(len(pay))
	}
	if h.Seq() == e.rcv {
		e.rcv += uint32(len(pay))
		e.got = append(e.got, pay...)
		if !e.toGuest {
			return [][]byte{e.data(bytes.ToUpper(pay))}
		}
	}
	return [][]byte{e.segment(ack, e.next, nil)}
}
