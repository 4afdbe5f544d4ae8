// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"

	"lockstep/bpf"
)

// maxHalf bounds half-open connections (R11): a flood costs only these.
const maxHalf = 16384

// sizes are what the config and this host say of the maps.
type sizes struct {
	role                         Role
	connections, slots, gsoSlots int
	cpus                         int // possible ones
}

// lruSlack is how many free elements of an LRU map each CPU keeps for itself while
// others have to evict (LOCAL_FREE_TARGET; seen in 6.18).
const lruSlack = 128

// sized are the programs, with maps of these sizes. What only the other role's
// programs use has one element.
func sized(z sizes) (*ebpf.CollectionSpec, error) {
	spec, err := bpf.LoadLockstep()
	if err != nil {
		return nil, fmt.Errorf("read programs: %w", err)
	}
	if most := int(bpf.LockstepLsConstLS_STREAM_MAX); z.cpus > most {
		return nil, fmt.Errorf("this host has room for %d CPUs, and lockstep for %d", z.cpus, most)
	}
	// An LRU map holds so many before it evicts, whichever CPUs fill it.
	lru := func(entries int) int { return entries + z.cpus*lruSlack }
	entries := map[string]int{
		bpf.LockstepMapLsEdge:  z.connections,
		bpf.LockstepMapLsSlots: z.slots, bpf.LockstepMapLsGslots: z.gsoSlots,
		bpf.LockstepMapLsLane: z.cpus,
	}
	ofPrimary := map[string]int{bpf.LockstepMapLsCli: lru(z.connections)}
	ofSecondary := map[string]int{
		bpf.LockstepMapLsConn:      z.connections,
		bpf.LockstepMapLsInherited: lru(z.connections),
		bpf.LockstepMapLsHalf:      lru(min(maxHalf, z.connections)),
		bpf.LockstepMapLsSent:      z.cpus * int(bpf.LockstepLsConstLS_SENT),
	}
	own, others := ofPrimary, ofSecondary
	if z.role == Secondary {
		own, others = ofSecondary, ofPrimary
	}
	maps.Copy(entries, own)
	for name := range others {
		entries[name] = 1
	}
	for name, n := range entries {
		spec.Maps[name].MaxEntries = uint32(n)
	}
	return spec, nil
}

func (o *Options) sizes() sizes {
	return sizes{o.Role, o.MaxConnections, o.Slots, o.GSOSlots, ebpf.MustPossibleCPU()}
}

// load loads the programs: over old's maps, or, when that is nil, over new ones.
func (n *NIC) load(o Options, old *tables) error {
	spec, err := sized(o.sizes())
	if err != nil {
		return err
	}
	rel := rand.Uint32() | 1
	in := rel ^ (rand.Uint32()<<1 | 2) // differs, and is odd as well, so not 0
	mptcp := uint32(0)
	if o.MPTCP {
		mptcp = 1
	}
	for name, v := range map[string]uint32{
		bpf.LockstepVarLsTap: uint32(n.tap.Attrs().Index), bpf.LockstepVarLsPeer: uint32(n.peer.Attrs().Index),
		bpf.LockstepVarLsMarkRel: rel, bpf.LockstepVarLsMarkIn: in,
		bpf.LockstepVarLsNslots: uint32(o.Slots), bpf.LockstepVarLsNgslots: uint32(o.GSOSlots),
		bpf.LockstepVarLsNrules: uint32(len(o.Rules)), bpf.LockstepVarLsMutate: uint32(o.Mutation), bpf.LockstepVarLsMptcp: mptcp,
	} {
		if err := spec.Variables[name].Set(v); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	if n.maps, err = loadOver(spec, old, &n.objs); err != nil {
		return err
	}
	for i, r := range o.Rules {
		rule := bpf.LockstepLsRule{Gport: r.GuestPort, Rport: r.RemotePort, Proto: r.Proto}
		if err := n.objs.LsRules.Put(uint32(i), &rule); err != nil {
			return fmt.Errorf("rule %d: %w", i, err)
		}
	}
	var meta bpf.LockstepLsMeta
	if old != nil {
		meta = old.meta
		meta.Config = o.ConfigHash
	} else {
		meta = metaOf(o)
		if s := n.tap.Attrs().Statistics; s != nil {
			meta.TapBase = uint32(s.TxPackets + s.TxDropped)
		}
	}
	if err := n.objs.LsMeta.Put(uint32(0), &meta); err != nil {
		return fmt.Errorf("write down what the tables are for: %w", err)
	}
	n.tapBase = meta.TapBase
	if n.conf, err = mapConf(n.objs.LsConf); err != nil {
		return err
	}
	if n.slots, err = mapSlots(n.objs.LsSlots, n.objs.LsGslots); err != nil {
		return err
	}
	if n.ring, err = ringbuf.NewReader(n.objs.LsRing); err != nil {
		return fmt.Errorf("ring: %w", err)
	}
	n.ring.SetDeadline(time.Unix(1, 0)) // long ago: waiting is the waiter's
	if n.waiter, err = newWaiter(n.objs.LsRing.FD()); err != nil {
		return err
	}
	mark := rel
	n.signer.dir = bpf.LockstepLsDirLS_DIR_P2S
	if o.Role == Secondary {
		mark = in
		n.signer.dir = bpf.LockstepLsDirLS_DIR_S2P
	}
	n.signer.own = n.peer.Attrs().HardwareAddr
	if n.toTap, err = newPacketConn(n.tap.Attrs().Index, mark); err != nil {
		return err
	}
	if n.replays, err = newPacketConn(n.tap.Attrs().Index, rel); err != nil {
		return err
	}
	if n.toGuest, err = newPacketConn(n.tap.Attrs().Index, in); err != nil {
		return err
	}
	n.toPeer, err = newPacketConn(n.peer.Attrs().Index, 0)
	return err
}

// CheckPrograms loads all programs with small maps, and lets them go.
func CheckPrograms() error {
	spec, err := sized(sizes{role: Primary, connections: 1, slots: 16, gsoSlots: 1, cpus: 1})
	if err != nil {
		return err
	}
	spec.Maps[bpf.LockstepMapLsRing].MaxEntries = uint32(os.Getpagesize())
	c, err := ebpf.NewCollection(spec)
	if err != nil {
		return fmt.Errorf("load programs: %w", err)
	}
	c.Close()
	return nil
}

// loadOver loads the programs into objs and returns the maps that are pinned.
// With old they are its maps, which stay old's to close.
func loadOver(spec *ebpf.CollectionSpec, old *tables, objs *bpf.LockstepObjects) (map[string]*ebpf.Map, error) {
	var opts ebpf.CollectionOptions
	if old != nil {
		opts.MapReplacements = old.maps
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, opts)
	if err != nil {
		return nil, fmt.Errorf("load programs: %w", err)
	}
	defer coll.Close() // of what objs does not take
	maps := make(map[string]*ebpf.Map)
	for name, m := range coll.Maps {
		if inherited(name) {
			maps[name] = m
		}
	}
	if err := coll.Assign(objs); err != nil {
		return nil, fmt.Errorf("load programs: %w", err)
	}
	return maps, nil
}
