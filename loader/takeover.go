// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader/core"
	"github.com/lockstep-ft/lockstep/rewriter"
)

// TakeOver implements [datapath.NIC]. Every connection on which the PVM may have sent
// gets the guard: those with an offset, those whose handshake's last ACK the SVM has not
// received, those that came with a checkpoint, and those that the PVM's host had taken
// over itself.
func (c *conntrack) TakeOver(guard uint32, doubt bool) error {
	plan := rewriter.NewTakeover[bpf.LockstepLsTuple](guard, doubt, bootTime())
	if err := errors.Join(
		each(c.half, func(t bpf.LockstepLsTuple, h *bpf.LockstepLsHalf) {
			plan.AddHalf(t, &rewriter.Half{
				State: rewriter.State(h.State), ISNPVM: h.IsnPvm, ISNSVM: h.IsnSvm,
				TSPVM: h.TsPvm, TSSVM: h.TsSvm, UsedPVM: h.UsedPvm, UsedSVM: h.UsedSvm,
			})
		}),
		each(c.edge, func(t bpf.LockstepLsTuple, v *bpf.LockstepLsConn) { plan.AddInherited(t, v.IsnSvm) }),
		each(c.inherited, func(t bpf.LockstepLsTuple, _ *bpf.LockstepLsInh) { plan.AddInherited(t, 0) }),
		each(c.conns, func(t bpf.LockstepLsTuple, v *bpf.LockstepLsConn) { plan.AddConn(t, fromConn(v)) }),
	); err != nil {
		return fmt.Errorf("take over: %w", err)
	}
	var keys []bpf.LockstepLsTuple
	var conns []bpf.LockstepLsConn
	for t, v := range plan.Guarded() {
		keys, conns = append(keys, t), append(conns, toConn(&v))
	}
	// Those without an offset do without an entry if the table is full.
	dispensable := func(v *bpf.LockstepLsConn) bool { return rewriter.State(v.State)&rewriter.Inherited != 0 }
	if err := putAll(c.conns, keys, conns, dispensable); err != nil {
		return fmt.Errorf("take over connections: %w", err)
	}
	return nil
}

// Edges implements [datapath.NIC].
func (c *conntrack) Edges() ([]datapath.Edge, error) {
	var out []datapath.Edge
	if err := each(c.edge, func(t bpf.LockstepLsTuple, v *bpf.LockstepLsConn) {
		conn := fromConn(v)
		edge := conn.Edge()
		out = append(out, datapath.Edge{Tuple: core.FromTuple(&t), Seq: edge.Seq, TS: edge.TS, ISN: conn.ISNSVM})
	}); err != nil {
		return nil, fmt.Errorf("list what was taken over: %w", err)
	}
	return out, nil
}

// AddEdges implements [datapath.NIC].
func (c *conntrack) AddEdges(edges []datapath.Edge) error {
	keys, conns := make([]bpf.LockstepLsTuple, len(edges)), make([]bpf.LockstepLsConn, len(edges))
	now := uint64(bootTime())
	for i := range edges {
		e := &edges[i]
		keys[i], conns[i] = core.ToTuple(e.Tuple), bpf.LockstepLsConn{Off: e.Seq, TsOff: e.TS, IsnSvm: e.ISN, Last: now}
	}
	if err := putAll(c.edge, keys, conns, needed); err != nil {
		return fmt.Errorf("connections taken over: %w", err)
	}
	if len(edges) > 0 {
		atomic.StoreUint32(c.hasEdges, 1)
	}
	return nil
}

func fromConn(c *bpf.LockstepLsConn) rewriter.Conn {
	return rewriter.Conn{
		Off: c.Off, TSOff: c.TsOff, Inc: c.Inc, State: rewriter.State(c.State), CliAck: c.CliAck, ISNSVM: c.IsnSvm,
		Guard: c.Guard, TSFirst: c.TsFirst, Last: int64(c.Last),
	}
}

func toConn(c *rewriter.Conn) bpf.LockstepLsConn {
	return bpf.LockstepLsConn{
		Off: c.Off, TsOff: c.TSOff, Inc: c.Inc, State: uint32(c.State), CliAck: c.CliAck, IsnSvm: c.ISNSVM,
		Guard: c.Guard, TsFirst: c.TSFirst, Last: uint64(c.Last),
	}
}

// needed is putAll's answer for elements that all have to have a place.
func needed(*bpf.LockstepLsConn) bool { return false }

// inherit makes the edges of a new P out of what a secondary that took over translates.
func (c *conntrack) inherit(old *tables) error {
	edges := make(map[bpf.LockstepLsTuple]rewriter.Offset)
	if err := each(old.maps[bpf.LockstepMapLsEdge], func(t bpf.LockstepLsTuple, v *bpf.LockstepLsConn) {
		edge := fromConn(v)
		edges[t] = edge.Offset()
	}); err != nil {
		return err
	}
	var keys []bpf.LockstepLsTuple
	var conns []bpf.LockstepLsConn
	if err := each(old.maps[bpf.LockstepMapLsConn], func(t bpf.LockstepLsTuple, v *bpf.LockstepLsConn) {
		conn := fromConn(v).Behind(edges[t])
		keys, conns = append(keys, t), append(conns, toConn(&conn))
	}); err != nil {
		return fmt.Errorf("connections taken over: %w", err)
	}
	if err := putAll(c.edge, keys, conns, needed); err != nil {
		return fmt.Errorf("connections taken over: %w", err)
	}
	if len(keys) > 0 {
		atomic.StoreUint32(c.hasEdges, 1)
	}
	return nil
}
