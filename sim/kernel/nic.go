// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader/core"
	"github.com/lockstep-ft/lockstep/rewriter"
)

// batch bounds the events of one Poll, as the loader's does.
const batch = 256

var errClosed = errors.New("the NIC is closed")

// NIC is the kernel half of one guest NIC with a daemon's view of it. The fields may be
// changed between calls.
type NIC struct {
	// Drain is DrainTap; nil: the SVM has always read everything.
	Drain func(context.Context) error
	// Intruder is a foreign program in front of ours; "": there is none. OnTap: it is at
	// the guest's tap.
	Intruder string
	OnTap    bool
	// TapDown: SetTap has set the tap down, and no frame passes it.
	TapDown bool

	*fastPath
	m         *machine
	gate      core.Gate
	decoder   core.Decoder
	transmit  core.Transmitter
	buffers   [batch]core.Buffer
	recovered *datapath.Recovered
	lost      struct{ tap, peer, events uint64 }
	closed    bool
}

var _ interface {
	datapath.NIC
	datapath.FastPath
} = (*NIC)(nil)

// New returns a NIC with tables of its own, in mode SHUT.
func New(h Host, o Options) *NIC { return open(newMachine(h, o)) }

// open is a daemon's view of m, before anything was done with it.
func open(m *machine) *NIC {
	n := &NIC{m: m, gate: core.Gate{Conf: &m.conf, Keys: &m.keys, Own: m.opts.MAC}}
	store := core.NewStore(m.slots)
	n.decoder.Frames, n.decoder.Seen, n.decoder.Buckets = store, core.NewNumbers(), core.NewBuckets(m.fast.order)
	n.fastPath = &fastPath{&m.fast, &n.decoder}
	t := &n.transmit
	t.Frames, t.Newest = store, n.newest
	t.Signer = core.Signer{Gate: &n.gate, Dir: bpf.LockstepLsDirLS_DIR_P2S}
	toTap := released
	if m.opts.Role == datapath.RoleSecondary {
		t.Signer.Dir, toTap = bpf.LockstepLsDirLS_DIR_S2P, parked
	}
	tap := func(from mark) *outlet {
		return &outlet{lost: &n.lost.tap, send: func(b []byte, gso uint16) {
			if n.TapDown {
				n.lost.tap++
				return
			}
			m.toGuest(b, gso, from)
		}}
	}
	t.ToTap, t.Retransmit, t.ToGuest = tap(toTap), tap(released), tap(mirrored)
	t.ToPeer = &outlet{lost: &n.lost.peer, send: func(b []byte, _ uint16) { m.host.ToPeer(b) }}
	return n
}

// Reopen is the NIC of a new daemon, which finds the tables that this one leaves (R23):
// what was held or reported is dropped, and the programs are shut. This NIC is dead then.
func (n *NIC) Reopen() *NIC {
	m := n.m
	next := n.successor(m)
	m.conf.Mode = uint32(datapath.ModeShut)
	m.ring.reset()
	m.slots.FreeAll()
	m.cursor = [classes]uint32{}
	m.fast = newFastTable(m)
	return next
}

// Release is the end of the tables. Others have their memory from now on, and nobody may use
// the NIC.
func (n *NIC) Release() {
	n.m.slots.FreeAll()
	n.m.fast.of = nil
	spare.Lock()
	defer spare.Unlock()
	for _, mem := range [][]byte{n.m.slots.Small, n.m.slots.Large} {
		spare.of[len(mem)] = append(spare.of[len(mem)], mem)
	}
	n.m = nil
}

// Promote is the NIC of the primary that a secondary becomes which took over: its
// translations become edges of new tables, and its guest goes on transmitting (R22). This
// NIC is dead then.
func (n *NIC) Promote() (*NIC, error) {
	old := n.m
	o := old.opts
	o.Role = datapath.RolePrimary
	m := newMachine(old.host, o)
	for key, c := range old.table.Promoted() {
		if !m.table.AddEdge(key, c) {
			return nil, errors.New("connections taken over: the table of edges is full")
		}
		m.conf.Edges = 1
	}
	m.conf.Mode = uint32(datapath.ModeSolo)
	m.conf.KeyGen, m.conf.Epoch = old.conf.KeyGen, old.conf.Epoch
	next := n.successor(m)
	next.gate.Inherit(&old.conf)
	return next, nil
}

// successor is the next daemon's view of m, with what it finds there.
func (n *NIC) successor(m *machine) *NIC {
	n.closed = true
	next := open(m)
	next.Drain, next.Intruder, next.OnTap, next.TapDown = n.Drain, n.Intruder, n.OnTap, n.TapDown
	r, err := next.gate.RecoveredSession()
	if err != nil {
		panic(err) // a key table in memory can be read
	}
	if m.opts.Role == datapath.RolePrimary {
		for key, c := range m.cli.All() {
			if key.Proto == core.ProtoTCP && acknowledges(&c) {
				r.Remotes = append(r.Remotes, datapath.Remote{Tuple: key, Ack: c.Ack, At: int64(c.At)})
			}
		}
	}
	next.recovered = r
	return next
}

// FromGuest: the guest transmitted a frame, which gso (0: none) asks to have cut into
// segments of so many bytes. The frame is the NIC's from now on, as in the next two.
func (n *NIC) FromGuest(frame []byte, gso uint16) {
	if !n.TapDown {
		n.m.fromGuest(frame, gso, unmarked)
	}
}

// FromWire: the bridge has a frame for the guest.
func (n *NIC) FromWire(frame []byte) {
	if !n.TapDown {
		n.m.toGuest(frame, 0, unmarked)
	}
}

// FromPeer: the peer link delivered a frame.
func (n *NIC) FromPeer(frame []byte) { n.m.fromPeer(frame) }

// Pinned is what a new daemon would find.
func (n *NIC) Pinned() datapath.Pinned {
	return datapath.Pinned{Role: n.m.opts.Role, Mode: datapath.Mode(n.m.conf.Mode)}
}

// Slots counts the slots that are taken, of both sizes.
func (n *NIC) Slots() (used int) {
	for _, s := range []struct {
		mem  []byte
		size int
	}{{n.m.slots.Small, core.SlotSize}, {n.m.slots.Large, core.LargeSize}} {
		for at := 0; at < len(s.mem); at += s.size {
			if s.mem[at] != byte(slotFree) {
				used++
			}
		}
	}
	return used
}

// Pending reports whether Poll would return something.
func (n *NIC) Pending() bool { return !n.m.ring.empty() }

// Poll implements [datapath.NIC]. It does not wait.
func (n *NIC) Poll(_ time.Duration, evs []compare.Event) ([]compare.Event, error) {
	if n.closed {
		return evs, errClosed
	}
	for i := range n.buffers {
		e := n.m.ring.next()
		if e == nil {
			break
		}
		b := &n.buffers[i]
		copy(b.Sample[:], e.words[:])
		var ok bool
		if evs, ok = n.decoder.Event(b, e.len, evs); !ok {
			n.lost.events++
		}
	}
	return evs, nil
}

// Wake implements [datapath.NIC]. Nothing waits.
func (n *NIC) Wake() {}

// Apply implements [datapath.NIC].
func (n *NIC) Apply(effs []compare.Effect) error {
	if n.closed {
		return errClosed
	}
	n.transmit.Apply(effs)
	return nil
}

// Now implements [datapath.NIC].
func (n *NIC) Now() int64 { return n.m.host.Now() }

// SetMode implements [datapath.NIC].
func (n *NIC) SetMode(mode datapath.Mode) error { return n.gate.SetMode(mode) }

// SetEpoch implements [datapath.NIC].
func (n *NIC) SetEpoch(e uint32) error { return n.gate.SetEpoch(e) }

// InstallSession implements [datapath.NIC].
func (n *NIC) InstallSession(s datapath.Session) error { return n.gate.Install(s, n.Now()) }

// SetLeaseUntil implements [datapath.NIC].
func (n *NIC) SetLeaseUntil(t int64) error { return n.gate.SetLeaseUntil(t) }

// SetLeaseDuration implements [datapath.NIC].
func (n *NIC) SetLeaseDuration(d time.Duration) error { return n.gate.SetLeaseDuration(d) }

// RequestEcho implements [datapath.NIC].
func (n *NIC) RequestEcho() error {
	n.transmit.RequestEcho(n.Now())
	return nil
}

// LastEcho implements [datapath.NIC].
func (n *NIC) LastEcho() int64 { return n.gate.LastEcho() }

// MarkStop implements [datapath.NIC].
func (n *NIC) MarkStop() error {
	n.transmit.MarkStop()
	return nil
}

// DrainTap implements [datapath.NIC]. It does not wait.
func (n *NIC) DrainTap(ctx context.Context) error {
	if n.Drain == nil {
		return nil
	}
	return n.Drain(ctx)
}

// ResetOffsets implements [datapath.NIC].
func (n *NIC) ResetOffsets() error {
	n.m.table.Reset()
	return nil
}

// Offsets implements [datapath.NIC].
func (n *NIC) Offsets(yield func(compare.Tuple, datapath.Offset)) error {
	for key, c := range n.m.table.Conns() {
		yield(key, datapath.Offset{
			Seq: c.Off, TS: c.TSOff, Incarnation: c.Inc, Inherited: c.State&rewriter.Inherited != 0, ClientAck: c.CliAck, Last: c.Last, State: c.State.String(),
		})
	}
	return nil
}

// Sweep implements [datapath.NIC].
func (n *NIC) Sweep(linger, idle time.Duration) (removed int, err error) {
	if n.m.opts.Role == datapath.RolePrimary { // S sees no frames of its edges
		return n.m.table.SweepEdges(n.Now(), linger, idle), nil
	}
	return n.m.table.Sweep(n.Now(), linger, idle), nil
}

func (n *NIC) newest(t compare.Tuple) (seg bpf.LockstepLsCli, ok bool) {
	if c := n.m.cli.Get(t); c != nil {
		return *c, true
	}
	return seg, false
}

// acknowledges reports whether a remote's newest segment shows what it has received.
func acknowledges(c *bpf.LockstepLsCli) bool {
	return bpfmodel.Flags(c.TcpFlags)&(bpfmodel.ACK|bpfmodel.RST) == bpfmodel.ACK
}

// Acked implements [datapath.NIC].
func (n *NIC) Acked(t compare.Tuple) (ack uint32, ok bool) {
	c := n.m.cli.Get(t)
	if c == nil || !acknowledges(c) {
		return 0, false
	}
	return c.Ack, true
}

// TakeOver implements [datapath.NIC].
func (n *NIC) TakeOver(guard uint32, doubt bool) error {
	if n.m.off(bpf.LockstepLsMutationLS_MUTATE_GUARD) {
		guard = 0
	}
	if !n.m.table.TakeOver(guard, doubt, n.Now()) {
		return errors.New("take over connections: the table is full")
	}
	return nil
}

// Edges implements [datapath.NIC].
func (n *NIC) Edges() (out []datapath.Edge, _ error) {
	for key, c := range n.m.table.Edges() {
		edge := c.Edge()
		out = append(out, datapath.Edge{Tuple: key, Seq: edge.Seq, TS: edge.TS, ISN: c.ISNSVM})
	}
	return out, nil
}

// AddEdges implements [datapath.NIC].
func (n *NIC) AddEdges(edges []datapath.Edge) error {
	for _, e := range edges {
		if !n.m.table.AddEdge(e.Tuple, rewriter.Conn{Off: e.Seq, TSOff: e.TS, ISNSVM: e.ISN, Last: n.Now()}) {
			return fmt.Errorf("connections taken over: no room for %s", e.Tuple)
		}
		n.m.conf.Edges = 1
	}
	return nil
}

// CheckOrder implements [datapath.NIC].
func (n *NIC) CheckOrder() (intruder string, tap bool, err error) { return n.Intruder, n.OnTap, nil }

// SetTap implements [datapath.NIC].
func (n *NIC) SetTap(up bool) error {
	n.TapDown = !up
	return nil
}

// MAC implements [datapath.NIC].
func (n *NIC) MAC() net.HardwareAddr { return n.gate.MAC() }

// Conf is what the programs go by now.
func (n *NIC) Conf() bpf.LockstepLsConf { return n.m.conf }

// Count is how many frames were counted under a reason.
func (n *NIC) Count(why bpf.LockstepLsReason) uint64 { return n.m.stats[why] }

// Counters implements [datapath.NIC].
func (n *NIC) Counters() (map[string]uint64, error) {
	out := map[string]uint64{"release_lost": n.lost.tap, "peer_lost": n.lost.peer, "event_refused": n.lost.events, "tap_unread": 0}
	for i, name := range bpf.ReasonNames() {
		out[name] = n.m.stats[i]
	}
	return out, nil
}

// Programs implements [datapath.NIC].
func (n *NIC) Programs() []datapath.Program {
	if n.m.opts.Role == datapath.RoleSecondary {
		return []datapath.Program{
			{Name: "ls_sec_gate", Device: "tap", Attach: "tcx-egress"},
			{Name: "ls_sec_out", Device: "tap", Attach: "tcx-ingress"},
			{Name: "ls_sec_in", Device: "peer", Attach: "tcx-ingress"},
		}
	}
	return []datapath.Program{
		{Name: "ls_pri_out", Device: "tap", Attach: "tcx-ingress"},
		{Name: "ls_digest_rx", Device: "peer", Attach: "tcx-ingress"},
		{Name: "ls_mirror", Device: "tap", Attach: "tcx-egress"},
	}
}

// Recovered implements [datapath.NIC].
func (n *NIC) Recovered() *datapath.Recovered { return n.recovered }

// Close implements [datapath.NIC]. The programs go on.
func (n *NIC) Close() error {
	n.closed = true
	return nil
}
