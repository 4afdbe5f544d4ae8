// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"

	"lockstep/bpf"
	"lockstep/compare"
	"lockstep/control/datapath"
	"lockstep/rewriter"
)

// ResetOffsets implements [datapath.NIC].
func (n *NIC) ResetOffsets() error {
	if err := errors.Join(
		empty[bpf.LockstepLsConn](n.objs.LsConn), empty[bpf.LockstepLsHalf](n.objs.LsHalf), empty[bpf.LockstepLsInh](n.objs.LsInherited),
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
func (n *NIC) Sweep(linger, idle time.Duration) (int, error) {
	now, removed := n.Now(), 0
	maps := []*ebpf.Map{n.objs.LsConn}
	if n.edges() {
		maps = append(maps, n.objs.LsEdge)
	}
	for _, m := range maps {
		var old []bpf.LockstepLsTuple
		err := each(m, func(k bpf.LockstepLsTuple, c *bpf.LockstepLsConn) {
			if conn := fromConn(c); conn.Ended(now, linger, idle) {
				old = append(old, k)
			}
		})
		if err == nil {
			err = deleteKeys(m, old)
		}
		if err != nil {
			return removed, fmt.Errorf("sweep connections: %w", err)
		}
		removed += len(old)
	}
	return removed, nil
}

// Offsets implements [datapath.NIC].
func (n *NIC) Offsets(yield func(compare.Tuple, datapath.Offset)) error {
	if err := each(n.objs.LsConn, func(k bpf.LockstepLsTuple, c *bpf.LockstepLsConn) {
		yield(fromTuple(&k), datapath.Offset{Seq: c.Off, TS: c.TsOff, Incarnation: c.Inc, Last: int64(c.Last), State: rewriter.State(c.State).String()})
	}); err != nil {
		return fmt.Errorf("list connections: %w", err)
	}
	return nil
}

// tells: an ACK tells what the remote has; nobody goes on behind a RST.
func tells(c *bpf.LockstepLsCli) bool {
	return compare.Flags(c.TcpFlags)&(compare.ACK|compare.RST) == compare.ACK
}

// Acked implements [datapath.NIC].
func (n *NIC) Acked(t compare.Tuple) (ack uint32, ok bool) {
	key := toTuple(t)
	var c bpf.LockstepLsCli
	if err := n.objs.LsCli.Lookup(&key, &c); err != nil {
		return 0, false // evicted, or never there
	}
	return c.Ack, tells(&c)
}
