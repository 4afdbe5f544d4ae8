// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/lockstep-ft/lockstep/bpf"
)

// maxHalf bounds half-open connections (R11): a flood costs only these.
const maxHalf = 16384

// sizes are the maps' sizes, by the config and this host.
type sizes struct {
	role                         Role
	connections, slots, gsoSlots int
	cpus                         int // possible CPUs
}

// fastShare: one connection in so many may be the kernel's (R27). It is those that are busy.
const fastShare = 4

// lruSlack is how many free elements of an LRU map each CPU keeps for itself while
// others have to evict (LOCAL_FREE_TARGET; seen in 6.18).
const lruSlack = 128

// sized are the role's programs, with maps of these sizes. Maps that only the other role's
// programs use have one element.
func sized(z sizes) (*ebpf.CollectionSpec, error) {
	spec, err := bpf.LoadLockstep()
	if err != nil {
		return nil, fmt.Errorf("read programs: %w", err)
	}
	if most := int(bpf.LockstepLsConstLS_STREAM_MAX); z.cpus > most {
		return nil, fmt.Errorf("this host has room for %d CPUs, and lockstep for %d", z.cpus, most)
	}
	// With the slack an LRU map holds so many before it evicts, whichever CPUs fill it.
	lru := func(entries int) int { return entries + z.cpus*lruSlack }
	entries := map[string]int{
		bpf.LockstepMapLsEdge:  z.connections,
		bpf.LockstepMapLsSlots: z.slots, bpf.LockstepMapLsGslots: z.gsoSlots,
		bpf.LockstepMapLsLane: z.cpus,
	}
	ofPrimary := map[string]int{
		bpf.LockstepMapLsCli: lru(z.connections), bpf.LockstepMapLsFast: max(1, z.connections/fastShare),
		bpf.LockstepMapLsFastUdp: int(bpf.LockstepLsConstLS_BUCKETS),
	}
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
	programs := programsOf(z.role, new(bpf.LockstepPrograms))
	maps.DeleteFunc(spec.Programs, func(name string, _ *ebpf.ProgramSpec) bool { return programs[name] == nil })
	return spec, nil
}

// programsOf are the programs that a host of this role needs, by name, and where p has them. The verifier
// takes its time over each.
func programsOf(role Role, p *bpf.LockstepPrograms) map[string]**ebpf.Program {
	if role == Secondary {
		return map[string]**ebpf.Program{secGate: &p.LsSecGate, secOut: &p.LsSecOut, secIn: &p.LsSecIn}
	}
	return map[string]**ebpf.Program{
		priOut: &p.LsPriOut, digestRx: &p.LsDigestRx, mirror: &p.LsMirror, peerXDP: &p.LsPeerXdp, fastOrder: &p.LsFastOrder, bucketOrder: &p.LsBucketOrder,
	}
}

func (o *Options) sizes() sizes {
	return sizes{o.Role, o.MaxConnections, o.Slots, o.GSOSlots, ebpf.MustPossibleCPU()}
}

// marks are how the programs recognize the frames that lockstep itself sends to the
// tap. They are random, so that no other mark is taken for one.
type marks struct {
	release  uint32 // turned round at the tap's egress, as if the guest had sent it
	mirrored uint32 // for the guest, and not mirrored
	parked   uint32 // S: for the guest, to be translated as a mirrored frame is
}

// loadPrograms loads the programs, over old's maps or, when that is nil, over new ones.
// It returns the maps to pin, by name.
func loadPrograms(o *Options, tap, peer netlink.Link, old *tables) (*bpf.LockstepObjects, map[string]*ebpf.Map, marks, error) {
	spec, err := sized(o.sizes())
	if err != nil {
		return nil, nil, marks{}, err
	}
	m := marks{release: rand.Uint32() | 1}
	m.mirrored = m.release ^ (rand.Uint32()<<1 | 2) // differs, and is odd as well, so not 0
	for m.parked = m.release; m.parked == m.release || m.parked == m.mirrored; {
		m.parked = rand.Uint32() | 1
	}
	mptcp := uint32(0)
	if o.MPTCP {
		mptcp = 1
	}
	for name, v := range map[string]uint32{
		bpf.LockstepVarLsTap: uint32(tap.Attrs().Index), bpf.LockstepVarLsPeer: uint32(peer.Attrs().Index),
		bpf.LockstepVarLsMarkRel: m.release, bpf.LockstepVarLsMarkIn: m.mirrored, bpf.LockstepVarLsMarkPark: m.parked,
		bpf.LockstepVarLsNslots: uint32(o.Slots), bpf.LockstepVarLsNgslots: uint32(o.GSOSlots),
		bpf.LockstepVarLsNrules: uint32(len(o.Rules)), bpf.LockstepVarLsMutate: uint32(o.Mutation), bpf.LockstepVarLsMptcp: mptcp,
	} {
		if err := spec.Variables[name].Set(v); err != nil {
			return nil, nil, marks{}, fmt.Errorf("set %s: %w", name, err)
		}
	}
	objs := new(bpf.LockstepObjects)
	maps, err := loadOver(o.Role, spec, old, objs)
	if err != nil {
		return nil, nil, marks{}, err
	}
	for i, r := range o.Rules {
		rule := bpf.LockstepLsRule{Gport: r.GuestPort, Rport: r.RemotePort, Proto: r.Proto}
		if err := objs.LsRules.Put(uint32(i), &rule); err != nil {
			return nil, nil, marks{}, errors.Join(fmt.Errorf("rule %d: %w", i, err), objs.Close())
		}
	}
	return objs, maps, m, nil
}

// loadOver loads the role's programs into objs, over old's maps if it is not nil, and returns
// the maps to pin, by name.
func loadOver(role Role, spec *ebpf.CollectionSpec, old *tables, objs *bpf.LockstepObjects) (map[string]*ebpf.Map, error) {
	var opts ebpf.CollectionOptions
	if old != nil {
		opts.MapReplacements = old.maps
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, opts)
	if err != nil {
		return nil, fmt.Errorf("load programs: %w", err)
	}
	defer coll.Close() // what objs does not take
	maps := make(map[string]*ebpf.Map)
	for name, m := range coll.Maps {
		if isPinned(name) {
			maps[name] = m
		}
	}
	if err := errors.Join(coll.Assign(&objs.LockstepMaps), coll.Assign(&objs.LockstepVariables)); err != nil {
		return nil, fmt.Errorf("load programs: %w", err)
	}
	for name, at := range programsOf(role, &objs.LockstepPrograms) {
		*at = coll.DetachProgram(name)
	}
	return maps, nil
}

// isPinned reports whether a map is pinned and recovered by the next daemon. Neither the
// programs' scratch memory is, nor the connections that they own, nor the object's data sections.
func isPinned(name string) bool {
	return strings.HasPrefix(name, "ls_") && name != bpf.LockstepMapLsScratch && !strings.HasPrefix(name, bpf.LockstepMapLsFast)
}

// CheckPrograms loads all programs with small maps, and unloads them.
func CheckPrograms() error {
	for _, role := range []Role{Primary, Secondary} {
		spec, err := sized(sizes{role: role, connections: 1, slots: 16, gsoSlots: 1, cpus: 1})
		if err != nil {
			return err
		}
		spec.Maps[bpf.LockstepMapLsRing].MaxEntries = uint32(os.Getpagesize())
		c, err := ebpf.NewCollection(spec)
		if err != nil {
			return fmt.Errorf("load programs: %w", err)
		}
		c.Close()
	}
	return nil
}
