// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"bytes"
	"log/slog"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/nicloop"
)

// side is one host: its NIC, the daemon's loop, and its guest.
type side struct {
	n     *NIC
	loop  *nicloop.Loop
	guest *endpoint
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
	wanted  []string            // checkpoints, by their reasons
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
	r.p = &side{guest: &endpoint{flow: rigFlow, isn: 0xfffffff0, stamp: 5000, clock: clock}}
	r.s = &side{guest: &endpoint{flow: rigFlow, isn: 0x500, stamp: 0xfffffff0, clock: clock}}
	r.p.n = New(host(r.p, func() *NIC { return r.s.n }), Options{Role: datapath.RolePrimary, MAC: []byte{2, 0, 0, 0, 1, 1}})
	r.s.n = New(host(r.s, func() *NIC { return r.p.n }), Options{Role: datapath.RoleSecondary, MAC: []byte{2, 0, 0, 0, 1, 2}})
	keys, err := compare.NewKeys(rand.NewChaCha8([32]byte{3}))
	must(t, err)
	r.session = datapath.Session{Term: 1, Epoch: 1, PeerMAC: r.s.n.MAC(), TxKey: [2]uint64{1, 2}, RxKey: [2]uint64{3, 4}, Digest: *keys}
	other := r.session
	other.PeerMAC, other.TxKey, other.RxKey = r.p.n.MAC(), r.session.RxKey, r.session.TxKey
	r.primary(1)
	r.s.loop = nicloop.NewSecondary(0, r.s.n, slog.New(slog.DiscardHandler), compare.SecondaryConfig{}, *keys)
	must(t, r.p.loop.Install(r.session))
	must(t, r.s.loop.Install(other))
	must(t, r.p.loop.SetMode(datapath.ModeHold))
	must(t, r.p.n.SetLeaseUntil(math.MaxInt64))
	must(t, r.s.loop.SetMode(datapath.ModeRun))
	return r
}

// primary makes P's loop.
func (r *rig) primary(epoch uint32) {
	want := func(q nicloop.Request) { r.wanted = append(r.wanted, q.Reason) }
	r.p.loop = nicloop.NewPrimary(0, r.p.n, slog.New(slog.DiscardHandler), want, compare.Config{Epoch: epoch}, r.session.Digest)
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
		for _, s := range []*side{r.p, r.s} {
			if !s.n.closed && (s.n.Pending() || s.loop.Deadline() <= r.now) {
				must(r, s.loop.Turn(0))
				busy = true
			}
		}
	}
}

// pass lets time pass, the loops' deadlines being met.
func (r *rig) pass(d int64) {
	for end := r.now + d; ; {
		r.now = max(r.now, min(r.p.loop.Deadline(), r.s.loop.Deadline(), end))
		if r.run(); r.now >= end {
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
