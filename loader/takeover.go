// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"math"
	"sync/atomic"

	"lockstep/bpf"
	"lockstep/control/datapath"
	"lockstep/rewriter"
)

// TakeOver implements [datapath.NIC]. Every connection that the PVM may have
// spoken on gets the guard: those with an offset, those whose last ACK the SVM has
// not heard, those that came with a checkpoint, and those that the PVM's host had
// taken over itself.
func (n *NIC) TakeOver(guard uint32) error {
	plan := rewriter.NewTakeover[bpf.LockstepLsTuple](guard, n.Now())
	if err := errors.Join(
		each(n.objs.LsHalf, func(t bpf.LockstepLsTuple, h *bpf.LockstepLsHalf) {
			plan.AddHalf(t, &rewriter.Half{
				State: rewriter.State(h.State), ISNPVM: h.IsnPvm, ISNSVM: h.IsnSvm,
				TSPVM: h.TsPvm, TSSVM: h.TsSvm, UsedPVM: h.UsedPvm, UsedSVM: h.UsedSvm,
			})
		}),
		each(n.objs.LsEdge, func(t bpf.LockstepLsTuple, _ *bpf.LockstepLsConn) { plan.AddInherited(t) }),
		each(n.objs.LsInherited, func(t bpf.LockstepLsTuple, _ *bpf.LockstepLsInh) { plan.AddInherited(t) }),
		each(n.objs.LsConn, func(t bpf.LockstepLsTuple, c *bpf.LockstepLsConn) { plan.AddConn(t, fromConn(c)) }),
	); err != nil {
		return fmt.Errorf("take over: %w", err)
	}
	var keys []bpf.LockstepLsTuple
	var conns []bpf.LockstepLsConn
	for t, c := range plan.Guarded() {
		keys, conns = append(keys, t), append(conns, toConn(&c))
	}
	// A full table has no place for those that do without an entry.
	dispensable := func(c *bpf.LockstepLsConn) bool { return rewriter.State(c.State)&rewriter.Inherited != 0 }
	if err := putAll(n.objs.LsConn, keys, conns, dispensable); err != nil {
		return fmt.Errorf("take over connections: %w", err)
	}
	return nil
}

// Edges implements [datapath.NIC].
func (n *NIC) Edges() ([]datapath.Edge, error) {
	var out []datapath.Edge
	if err := each(n.objs.LsEdge, func(t bpf.LockstepLsTuple, c *bpf.LockstepLsConn) {
		conn := fromConn(c)
		edge := conn.Edge()
		out = append(out, datapath.Edge{Tuple: fromTuple(&t), Seq: edge.Seq, TS: edge.TS})
	}); err != nil {
		return nil, fmt.Errorf("list what was taken over: %w", err)
	}
	return out, nil
}

// AddEdges implements [datapath.NIC].
func (n *NIC) AddEdges(edges []datapath.Edge) error {
	keys, conns := make([]bpf.LockstepLsTuple, len(edges)), make([]bpf.LockstepLsConn, len(edges))
	now := uint64(n.Now())
	for i := range edges {
		e := &edges[i]
		keys[i], conns[i] = toTuple(e.Tuple), bpf.LockstepLsConn{Off: e.Seq, TsOff: e.TS, Last: now}
	}
	if err := putAll(n.objs.LsEdge, keys, conns, needed); err != nil {
		return fmt.Errorf("connections taken over: %w", err)
	}
	if len(edges) > 0 {
		atomic.StoreUint32(&n.conf.Edges, 1)
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

// needed: a map may not do without it.
func needed(*bpf.LockstepLsConn) bool { return false }

// edges reports whether what a P took over has to be looked after. An S has only been
// told of it, and sees none of its frames.
func (n *NIC) edges() bool { return n.role == Primary && atomic.LoadUint32(&n.conf.Edges) != 0 }

// inherit fills the edges of a P with what an S that took over translates, and has it
// speak as that one did.
func (n *NIC) inherit(old *tables) error {
	edges := make(map[bpf.LockstepLsTuple]rewriter.Offset)
	if err := each(old.maps[bpf.LockstepMapLsEdge], func(t bpf.LockstepLsTuple, c *bpf.LockstepLsConn) {
		edge := fromConn(c)
		edges[t] = edge.Offset()
	}); err != nil {
		return err
	}
	var keys []bpf.LockstepLsTuple
	var conns []bpf.LockstepLsConn
	if err := each(old.maps[bpf.LockstepMapLsConn], func(t bpf.LockstepLsTuple, c *bpf.LockstepLsConn) {
		conn := fromConn(c).Behind(edges[t])
		keys, conns = append(keys, t), append(conns, toConn(&conn))
	}); err != nil {
		return fmt.Errorf("connections taken over: %w", err)
	}
	if err := putAll(n.objs.LsEdge, keys, conns, needed); err != nil {
		return fmt.Errorf("connections taken over: %w", err)
	}
	c, err := old.conf()
	if err != nil {
		return err
	}
	if len(keys) > 0 {
		n.conf.Edges = 1
	}
	n.conf.KeyGen, n.conf.Epoch = c.KeyGen, c.Epoch
	atomic.StoreUint64(&n.conf.LeaseUntil, math.MaxInt64)
	return nil
}

// conf is what the tables' programs go by.
func (t *tables) conf() (c conf, err error) {
	if err := t.maps[bpf.LockstepMapLsConf].Lookup(uint32(0), &c); err != nil {
		return c, fmt.Errorf("read pinned map %s: %w", bpf.LockstepMapLsConf, err)
	}
	return c, nil
}
