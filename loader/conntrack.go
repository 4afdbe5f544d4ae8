// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader/core"
	"github.com/lockstep-ft/lockstep/rewriter"
)

// conntrack is what the kernel keeps for each TCP connection.
type conntrack struct {
	role      Role
	conns     *ebpf.Map // ls_conn. S: connections with a known offset
	half      *ebpf.Map // ls_half. S: half-open connections
	inherited *ebpf.Map // ls_inherited. S: connections that came with a checkpoint
	edge      *ebpf.Map // ls_edge: connections that were taken over
	remotes   *ebpf.Map // ls_cli. P: the remotes' newest segments
	hasEdges  *uint32   // in ls_conf: the programs look into ls_edge
}

func newConntrack(role Role, objs *bpf.LockstepObjects, hasEdges *uint32) *conntrack {
	return &conntrack{
		role: role, conns: objs.LsConn, half: objs.LsHalf, inherited: objs.LsInherited, edge: objs.LsEdge, remotes: objs.LsCli,
		hasEdges: hasEdges,
	}
}

// ResetOffsets implements [datapath.NIC].
func (c *conntrack) ResetOffsets() error {
	if err := errors.Join(
		empty[bpf.LockstepLsConn](c.conns), empty[bpf.LockstepLsHalf](c.half), empty[bpf.LockstepLsInh](c.inherited),
	); err != nil {
		return fmt.Errorf("reset offsets: %w", err)
	}
	return nil
}

// empty removes all that is in a map of tuples now.
func empty[V any](m *ebpf.Map) error {
	return take(m, func(bpf.LockstepLsTuple, *V) {})
}

// Sweep implements [datapath.NIC].
func (c *conntrack) Sweep(linger, idle time.Duration) (int, error) {
	now, removed := bootTime(), 0
	maps := []*ebpf.Map{c.conns}
	if c.role == Primary && atomic.LoadUint32(c.hasEdges) != 0 { // S sees no frames of its entries
		maps = append(maps, c.edge)
	}
	for _, m := range maps {
		var ended []bpf.LockstepLsTuple
		err := each(m, func(k bpf.LockstepLsTuple, v *bpf.LockstepLsConn) {
			if conn := fromConn(v); conn.Ended(now, linger, idle) {
				ended = append(ended, k)
			}
		})
		if err == nil {
			err = deleteKeys(m, ended)
		}
		if err != nil {
			return removed, fmt.Errorf("sweep connections: %w", err)
		}
		removed += len(ended)
	}
	return removed, nil
}

// Offsets implements [datapath.NIC].
func (c *conntrack) Offsets(yield func(compare.Tuple, datapath.Offset)) error {
	if err := each(c.conns, func(k bpf.LockstepLsTuple, v *bpf.LockstepLsConn) {
		state := rewriter.State(v.State)
		yield(core.FromTuple(&k), datapath.Offset{
			Seq: v.Off, TS: v.TsOff, Incarnation: v.Inc, Inherited: state&rewriter.Inherited != 0, ClientAck: v.CliAck, Last: int64(v.Last), State: state.String(),
		})
	}); err != nil {
		return fmt.Errorf("list connections: %w", err)
	}
	return nil
}

// newest is the remote's newest segment of a connection; false: evicted, or there was
// none.
func (c *conntrack) newest(t compare.Tuple) (seg bpf.LockstepLsCli, ok bool) {
	key := core.ToTuple(t)
	err := c.remotes.Lookup(&key, &seg)
	return seg, err == nil
}

// acknowledges reports whether a remote's newest segment shows what it has received. A
// SYN without ACK does not, and nothing follows a RST.
func acknowledges(c *bpf.LockstepLsCli) bool {
	return compare.Flags(c.TcpFlags)&(compare.ACK|compare.RST) == compare.ACK
}

// Acked implements [datapath.NIC].
func (c *conntrack) Acked(t compare.Tuple) (ack uint32, ok bool) {
	seg, ok := c.newest(t)
	return seg.Ack, ok && acknowledges(&seg)
}

// knownRemotes are the remotes whose acknowledgment is known.
func (c *conntrack) knownRemotes() (out []datapath.Remote, err error) {
	if err := each(c.remotes, func(t bpf.LockstepLsTuple, seg *bpf.LockstepLsCli) {
		if t.Proto == core.ProtoTCP && acknowledges(seg) {
			out = append(out, datapath.Remote{Tuple: core.FromTuple(&t), Ack: seg.Ack, At: int64(seg.At)})
		}
	}); err != nil {
		return nil, fmt.Errorf("list remotes: %w", err)
	}
	return out, nil
}
