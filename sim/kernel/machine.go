// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"math/rand/v2"
	"net"
	"sync"
	"unsafe"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// Host is what surrounds the NIC on its host. A frame that goes to one of its functions
// belongs to that function, which must not call the NIC before it returns.
type Host struct {
	Now     func() int64       // boottime, ns
	ToGuest func(frame []byte) // into the guest's NIC
	ToWire  func(frame []byte) // out to the bridge: what has left
	ToPeer  func(frame []byte) // onto the peer link
	Rand    *rand.Rand         // where the search for a free slot goes on

	// InDoubt is told of each frame that does not leave since nobody knows in whose numbers it is. May be nil.
	InDoubt func(compare.Tuple)

	// Timer calls f at a boottime. nil: the programs have no timers.
	Timer func(at int64, f func())
}

// Options are those of loader.Options that matter to the kernel. 0 stands for a default.
type Options struct {
	Role              datapath.Role
	MAC               net.HardwareAddr // the peer device's own
	Slots, LargeSlots int              // 256, 8
	RingBytes         int              // a power of two; 1 MiB
	Connections       int              // 65536
	HalfOpen          int              // 16384
	Rules             []bpf.LockstepLsRule
	MPTCP             bool
	Mutation          bpf.LockstepLsMutation // rules that are off
}

// mark says where a frame at the tap's egress comes from.
type mark int

const (
	unmarked mark = iota
	released      // in the guest's name; on S a copy that is retransmitted (R22)
	mirrored      // for the guest, and not mirrored
	parked        // S: for the guest, as it was mirrored
)

// machine are the programs and maps of one NIC: what outlives a daemon.
type machine struct {
	peerLink
	ring  ring
	slots core.Slots
	table *bpfmodel.Table
	cli   *bpfmodel.LRU[bpf.LockstepLsCli]

	fast fastTable

	// Scratch memory of the one CPU.
	cursor  [classes]uint32
	modeled bpfmodel.Record
	p       bpfmodel.Segment
	quote   bpfmodel.ICMPError
}

// keyTable is the map ls_keys.
type keyTable struct {
	of     [2]bpf.LockstepLsKeys
	digest [2]compare.Keys
}

func (t *keyTable) Put(index uint32, k *bpf.LockstepLsKeys) error {
	t.of[index] = *k
	d := &t.digest[index]
	d.Mix = k.Mix
	for lane := range d.K {
		copy(d.K[lane][:], k.K[lane][:])
	}
	return nil
}

func (t *keyTable) Lookup(index uint32, k *bpf.LockstepLsKeys) error {
	*k = t.of[index]
	return nil
}

func newMachine(h Host, o Options) *machine {
	for _, d := range []struct {
		value    *int
		fallback int
	}{{&o.Slots, 256}, {&o.LargeSlots, 8}, {&o.RingBytes, 1 << 20}, {&o.Connections, 65536}, {&o.HalfOpen, 16384}} {
		if *d.value == 0 {
			*d.value = d.fallback
		}
	}
	m := &machine{
		peerLink: peerLink{host: h, opts: o, windows: make(map[uint16]*window)},
		ring:     ring{size: o.RingBytes},
		slots:    core.Slots{Small: aligned(o.Slots * core.SlotSize), Large: aligned(o.LargeSlots * core.LargeSize)},
		cli:      bpfmodel.NewLRU[bpf.LockstepLsCli](o.Connections),
	}
	m.fast = newFastTable(m)
	m.setTable(bpfmodel.New(o.Connections, o.HalfOpen, o.Connections))
	return m
}

// setTable has t follow the options.
func (m *machine) setTable(t *bpfmodel.Table) {
	m.table = t
	t.MPTCP = m.opts.MPTCP
	t.Unannounced, t.Unquoted = m.off(bpf.LockstepLsMutationLS_MUTATE_R9), m.off(bpf.LockstepLsMutationLS_MUTATE_QUOTE)
	t.Unedged = m.off(bpf.LockstepLsMutationLS_MUTATE_EDGE)
}

func (m *machine) mode() bpf.LockstepLsMode { return bpf.LockstepLsMode(m.conf.Mode) }

// leased (R20): may a guest's frame leave now?
func (m *machine) leased() bool {
	return uint64(m.host.Now()) < m.conf.LeaseUntil || m.off(bpf.LockstepLsMutationLS_MUTATE_R20)
}

func (m *machine) strip(p *bpfmodel.Segment) {
	if !m.opts.MPTCP {
		p.StripMPTCP()
	}
}

// primaryOnly: does a rule match this datagram?
func (m *machine) primaryOnly(p *bpfmodel.Segment) bool {
	for _, r := range m.opts.Rules {
		if r.Proto == p.Proto && (r.Gport == 0 || r.Gport == p.GuestPort) && (r.Rport == 0 || r.Rport == p.RemotePort) {
			return true
		}
	}
	return false
}

// fromGuest, toGuest and fromPeer are the tap's ingress and egress, and the peer device's
// ingress.
func (m *machine) fromGuest(b []byte, gso uint16, from mark) {
	if m.opts.Role == datapath.RolePrimary {
		m.priOut(b, gso, from)
	} else {
		m.secOut(b, gso, from)
	}
}

func (m *machine) toGuest(b []byte, gso uint16, from mark) {
	switch {
	case from == released:
		m.count(bpf.LockstepLsReasonLS_R_released)
		m.fromGuest(b, gso, released)
	case m.opts.Role == datapath.RolePrimary:
		m.mirror(b, from)
	default:
		m.gate(b, from)
	}
}

func (m *machine) fromPeer(b []byte) {
	if m.opts.Role == datapath.RolePrimary {
		m.digestRx(b)
	} else {
		m.secIn(b)
	}
}

// leave hands a frame to the bridge. What the guest left to the device to segment is
// segmented here.
func (m *machine) leave(b []byte, gso uint16) {
	if gso == 0 || !segment(b, int(gso), m.host.ToWire) {
		m.host.ToWire(b)
	}
}

// spare has the slots of machines that are over, by their size in bytes: most are never
// used, and clearing a machine's 3 MB took longer than some runs do.
var spare = struct {
	sync.Mutex
	of map[int][][]byte
}{of: make(map[int][][]byte)}

// aligned memory can be a slot's as well as a byte's. What a slot that is free holds means
// nothing.
func aligned(n int) []byte {
	spare.Lock()
	defer spare.Unlock()
	if m := spare.of[n]; len(m) > 0 {
		spare.of[n] = m[:len(m)-1]
		return m[len(m)-1]
	}
	words := make([]uint64, (n+7)/8)
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(words))), n)
}

func isFrom(b []byte, mac [6]byte) bool { return [6]byte(b[6:12]) == mac }
