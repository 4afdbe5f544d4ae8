// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"iter"

	"github.com/cilium/ebpf"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// dump is a map of the kernel's without the times in it, which all have to be there.
func dump[V any](d *duel, m *ebpf.Map) map[bpf.LockstepLsTuple]any {
	d.t.Helper()
	out := make(map[bpf.LockstepLsTuple]any)
	for _, key := range keysOf(d.t, m) {
		var v V
		must(d.t, m.Lookup(&key, &v))
		switch v := any(&v).(type) {
		case *bpf.LockstepLsConn:
			v.Last = 0
		case *bpf.LockstepLsHalf:
			v.Last = 0
		case *bpf.LockstepLsCli:
			v.At = 0
			clear(v.Hdr[v.HdrLen:])
		}
		out[key] = v
	}
	return out
}

func fromModel(c bpfmodel.Conn) bpf.LockstepLsConn {
	return bpf.LockstepLsConn{
		Off: c.Off, TsOff: c.TSOff, Inc: c.Inc, State: uint32(c.State), CliAck: c.CliAck, IsnSvm: c.ISNSVM, Guard: c.Guard, TsFirst: c.TSFirst,
	}
}

func conns(m iter.Seq2[bpfmodel.Tuple, bpfmodel.Conn]) map[bpf.LockstepLsTuple]any {
	out := make(map[bpf.LockstepLsTuple]any)
	for key, c := range m {
		out[core.ToTuple(key)] = fromModel(c)
	}
	return out
}

// put has the kernel's map hold what the model's table does.
func (d *duel) put(m *ebpf.Map, entries iter.Seq2[bpfmodel.Tuple, bpfmodel.Conn]) {
	for _, key := range keysOf(d.t, m) {
		must(d.t, m.Delete(&key))
	}
	for key, c := range entries {
		k, v := core.ToTuple(key), fromModel(c)
		v.Last = 1
		must(d.t, m.Put(&k, &v))
	}
}

func (d *duel) halves() map[bpf.LockstepLsTuple]any {
	out := make(map[bpf.LockstepLsTuple]any)
	for key, h := range d.n.m.table.Halves() {
		out[core.ToTuple(key)] = bpf.LockstepLsHalf{
			State: uint32(h.State), IsnPvm: h.ISNPVM, IsnSvm: h.ISNSVM, CliPvm: h.CliPVM, CliSvm: h.CliSVM, TsPvm: h.TSPVM, TsSvm: h.TSSVM,
			UsedPvm: h.UsedPVM, UsedSvm: h.UsedSVM, Win: h.Win, TcpFlags: uint8(h.Flags), Optlen: h.OptLen, Opts: h.Opts,
		}
	}
	return out
}

func (d *duel) inherited() map[bpf.LockstepLsTuple]any {
	out := make(map[bpf.LockstepLsTuple]any)
	for key, ack := range d.n.m.table.Inherited() {
		out[core.ToTuple(key)] = bpf.LockstepLsInh{CliAck: ack}
	}
	return out
}

func (d *duel) remotes() map[bpf.LockstepLsTuple]any {
	out := make(map[bpf.LockstepLsTuple]any)
	for key, c := range d.n.m.cli.All() {
		c.At = 0
		clear(c.Hdr[c.HdrLen:])
		out[core.ToTuple(key)] = c
	}
	return out
}
