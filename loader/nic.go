// SPDX-License-Identifier: Apache-2.0

// Package loader puts the kernel half in place and serves it as a
// [datapath.NIC]: it loads, pins and attaches the programs, turns ring
// records into events of package compare, and carries out its effects.
package loader

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"lockstep/bpf"
	"lockstep/compare"
	"lockstep/control/datapath"
	"lockstep/loader/device"
	"lockstep/rewriter"
)

// Role is what a NIC's programs are attached for.
type Role int

// Roles.
const (
	Primary Role = iota + 1
	Secondary
)

func (r Role) String() string {
	switch r {
	case Primary:
		return string(datapath.RolePrimary)
	case Secondary:
		return string(datapath.RoleSecondary)
	}
	return fmt.Sprintf("%d", int(r))
}

// Options describe one guest NIC.
type Options struct {
	PinDir, VM, Node string
	NIC              int
	Role             Role
	Tap, PeerDevice  string // device names
	MaxConnections   int
	Slots, GSOSlots  int      // held frames of up to 1984 bytes, and of up to 68 KiB
	Rules            []Rule   // of datagrams that leave uncompared
	MPTCP            bool     // the guests may use it
	XDP              string   // XDPOff, XDPOn, XDPAuto; "": off
	ConfigHash       [32]byte // of what both nodes must agree on
	// Differ names the settings that keep a config from going on with the tables that one
	// of another hash made; alone: the guest speaks alone. nil: all do.
	Differ  func(pinned [32]byte, alone bool) []string
	Version string // of this lockstep
	Discard bool   // what is pinned for this NIC goes, whatever it is
	Log     *slog.Logger

	// Mutation switches a rule of the kernel half off ; tests
	// only: nothing in the config or on the command line reaches it.
	Mutation Mutation
}

// Rule lets datagrams of the PVM leave uncompared. A port of 0 is any.
type Rule struct {
	Proto                 uint8
	GuestPort, RemotePort uint16
}

// Mutation is a rule switched off.
type Mutation uint32

// MutateR9 has the rewriter ignore announcements and guess. MutateR6 leaves gaps
// in a lane's numbers alone, MutateR20 lets guests speak for ever, MutateReplay takes
// records again and again, MutateTag takes forged ones, MutateGuard leaves timestamps
// behind and MutateEdge numbers as they are where a connection was taken over,
// MutateQuote what ICMP errors quote, and MutateMode has released frames leave in every
// mode. MutateWait has SetMode return while programs go by the mode before.
const (
	MutateR9     = Mutation(bpf.LockstepLsMutationLS_MUTATE_R9)
	MutateR6     = Mutation(bpf.LockstepLsMutationLS_MUTATE_R6)
	MutateR20    = Mutation(bpf.LockstepLsMutationLS_MUTATE_R20)
	MutateReplay = Mutation(bpf.LockstepLsMutationLS_MUTATE_REPLAY)
	MutateTag    = Mutation(bpf.LockstepLsMutationLS_MUTATE_TAG)
	MutateGuard  = Mutation(bpf.LockstepLsMutationLS_MUTATE_GUARD)
	MutateEdge   = Mutation(bpf.LockstepLsMutationLS_MUTATE_EDGE)
	MutateQuote  = Mutation(bpf.LockstepLsMutationLS_MUTATE_QUOTE)
	MutateMode   = Mutation(bpf.LockstepLsMutationLS_MUTATE_MODE)
	MutateWait   = Mutation(1 << 31) // SetMode does not wait
)

// maxHalf bounds half-open connections (R11): a flood costs only these.
const maxHalf = 16384

// batch bounds the events of one Poll.
const batch = 256

// NIC is the kernel half of one guest NIC.
type NIC struct {
	log       *slog.Logger
	role      Role
	tap, peer netlink.Link
	objs      bpf.LockstepObjects
	maps      map[string]*ebpf.Map // those of objs that are pinned, by name
	guards    []guard
	rt        *netlink.Handle // these two are kept open: who is first is found out without descriptors, too
	packets   *os.File
	readers   map[string]int      // packet sockets on the tap that CheckOrder has told of: process by inode
	adopted   *datapath.Recovered // nil: the tables were made anew
	programs  []datapath.Program
	conf      *confMemory
	slots     slots
	ring      *ringbuf.Reader
	waiter    *waiter
	records   [batch]ringbuf.Record
	samples   [batch]sample
	bounds    [batch][]compare.Bound
	tagged    [batch][int(bpf.LockstepLsConstLS_L4MAX) + 4]byte // templates with their tag
	meta      map[compare.Slot]frameMeta

	toTap, toPeer *packetConn
	replays       *packetConn // S: to the tap, with the release mark
	toGuest       *packetConn // P: to the tap, not to be mirrored
	heads         [batch][maxHeader + signedMax]byte
	nheads        int
	frees         []compare.Slot
	signer        signer

	hasty   bool   // tests only: MutateWait
	noUFO   bool   // a mutation, only tests set it: what the guest left as UFO leaves as USO
	noWatch bool   // a mutation, only tests set it: packet sockets are not looked at
	tapBase uint32 // the tap's frame count before the first one was let in, mod 2^32
	lost    struct{ tap, peer, events, unread atomic.Uint64 }
}

// signedMax is room for a peer frame made by user space.
const signedMax = vnetHdrLen + ethLen + 4 + int(bpf.LockstepLsConstLS_REC_BASE)

// sample is room for any ring record, aligned as the records are.
type sample [118]uint64

// frameMeta is what the kernel told about a frame in a slot.
type frameMeta struct {
	l3, l4, pay, paylen uint32
	gso, tpid, tci      uint16
	csumStart, csumOff  uint16
	partial, udp, ufo   bool
}

// attachment is where a program belongs.
type attachment struct {
	prog   *ebpf.Program
	name   string
	dev    netlink.Link
	attach ebpf.AttachType
}

// guard is an attachment that was made.
type guard struct {
	attachment
	link link.Link
	id   link.ID
}

// Open loads the programs, attaches them to the tap and the peer device and
// pins everything. Programs start shut. What an earlier daemon left pinned for
// this NIC goes on: its tables stay, its programs are replaced, without a moment
// in which none guards the tap (R23). Tables of another lockstep, size, role or
// config are refused.
func Open(o Options) (_ *NIC, err error) {
	tap, err := netlink.LinkByName(o.Tap)
	if err != nil {
		return nil, fmt.Errorf("tap %s: %w", o.Tap, err)
	}
	if err := device.CheckTap(o.Tap); err != nil {
		return nil, err
	}
	peer, err := netlink.LinkByName(o.PeerDevice)
	if err != nil {
		return nil, fmt.Errorf("peer device %s: %w", o.PeerDevice, err)
	}
	if peer.Attrs().MTU < tap.Attrs().MTU {
		return nil, fmt.Errorf("peer device %s has MTU %d, less than tap %s with %d: ip link set %s mtu %d",
			o.PeerDevice, peer.Attrs().MTU, o.Tap, tap.Attrs().MTU, o.PeerDevice, tap.Attrs().MTU)
	}
	dir := nicDir(o.PinDir, o.VM, o.Node, o.NIC)
	if err := refuseManaged(tap, dir); err != nil {
		return nil, err
	}
	var old *tables
	var taken *tables // an S's that took over; its guest is P's now
	if !o.Discard {
		if old, taken, err = goOnFrom(dir, o, tap); err != nil {
			return nil, err
		}
		defer old.close()
		defer taken.close()
	}
	n := &NIC{log: o.Log, role: o.Role, tap: tap, peer: peer, meta: make(map[compare.Slot]frameMeta), hasty: o.Mutation&MutateWait != 0}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	if n.rt, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	if n.packets, err = openPackets(); err != nil {
		return nil, err
	}
	if err := n.load(o, old); err != nil {
		return nil, err
	}
	if err := device.PreparePeer(peer); err != nil {
		return nil, err
	}
	if taken != nil {
		if err := n.inherit(taken); err != nil {
			return nil, err
		}
	}
	if old != nil {
		err = n.adopt(o.Role, dir)
	} else {
		err = n.attach(o.Role, dir, taken != nil)
	}
	if err == nil && taken != nil {
		n.adopted, err = n.found(o.Role)
	}
	if err == nil {
		err = n.attachXDP(o, dir)
	}
	if err != nil {
		return nil, err
	}
	return n, nil
}

// refuseManaged makes sure that no other lockstep guards the tap: two would
// each hold what the other released.
func refuseManaged(tap netlink.Link, dir string) error {
	own := make(map[link.ID]bool)
	var pins []string
	for _, d := range []string{dir, stagingDir(dir), leftDir(dir)} {
		in, _ := filepath.Glob(filepath.Join(d, linkPrefix+"*"))
		pins = append(pins, in...)
	}
	for _, pin := range pins {
		l, err := link.LoadPinnedLink(pin, nil)
		if err != nil {
			return fmt.Errorf("pinned link %s: %w", pin, err)
		}
		info, err := l.Info()
		l.Close()
		if err != nil {
			return fmt.Errorf("pinned link %s: %w", pin, err)
		}
		own[info.ID] = true
	}
	for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
		q, err := link.QueryPrograms(link.QueryOptions{Target: tap.Attrs().Index, Attach: at})
		if err != nil {
			return fmt.Errorf("query programs of %s: %w (tcx needs kernel 6.6)", tap.Attrs().Name, err)
		}
		for _, p := range q.Programs {
			if id, ok := p.LinkID(); ok && own[id] {
				continue
			}
			prog, err := ebpf.NewProgramFromID(p.ID)
			if err != nil {
				continue // gone meanwhile
			}
			info, err := prog.Info()
			prog.Close()
			if err == nil && strings.HasPrefix(info.Name, "ls_") {
				return fmt.Errorf("tap %s is already managed: program %s (id %d) of another lockstep is attached; stop that daemon and run `lockstep unload` for it",
					tap.Attrs().Name, info.Name, p.ID)
			}
		}
	}
	return nil
}

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

// attach attaches new programs, in front of those that may be there, and takes these
// away. solo: the guest speaks alone, and goes on to.
func (n *NIC) attach(role Role, dir string, solo bool) error {
	// What a daemon pinned that failed half-way may be all that guards the tap.
	staging, left := stagingDir(dir), leftDir(dir)
	if err := os.Rename(staging, left); err != nil && !errors.Is(err, os.ErrNotExist) {
		if err := removePins(staging); err != nil { // left holds the older ones
			return err
		}
	}
	if err := os.MkdirAll(staging, 0o700); err != nil {
		return fmt.Errorf("create pin folder: %w", err)
	}
	for name, m := range n.maps {
		if err := m.Pin(filepath.Join(staging, name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	for _, a := range n.attachments(role) {
		if err := n.guard(a, staging); err != nil {
			return err
		}
	}
	// The new programs guard already; the old ones go with their pins.
	for _, old := range []string{dir, left} {
		if err := removePins(old); err != nil {
			return err
		}
	}
	if solo { // not before: two would translate
		atomic.StoreUint32(&n.conf.Mode, uint32(datapath.ModeSolo))
	}
	if err := os.Rename(staging, dir); err != nil {
		return fmt.Errorf("put pins in place: %w", err)
	}
	return nil
}

// attachments are a role's programs, where they belong, in the order in which they
// are attached.
func (n *NIC) attachments(role Role) []attachment {
	if role == Secondary {
		return []attachment{
			{n.objs.LsSecGate, "ls_sec_gate", n.tap, ebpf.AttachTCXEgress},
			{n.objs.LsSecOut, secOut, n.tap, ebpf.AttachTCXIngress},
			{n.objs.LsSecIn, "ls_sec_in", n.peer, ebpf.AttachTCXIngress},
		}
	}
	return []attachment{
		{n.objs.LsPriOut, priOut, n.tap, ebpf.AttachTCXIngress},
		{n.objs.LsDigestRx, "ls_digest_rx", n.peer, ebpf.AttachTCXIngress},
		{n.objs.LsMirror, "ls_mirror", n.tap, ebpf.AttachTCXEgress},
	}
}

// The programs at the tap's ingress: where their links are, the guest is.
const (
	priOut = "ls_pri_out"
	secOut = "ls_sec_out"
)

// guard attaches a program at the head of its chain and pins the link in dir.
func (n *NIC) guard(a attachment, dir string) error {
	l, err := link.AttachTCX(link.TCXOptions{
		Interface: a.dev.Attrs().Index, Program: a.prog, Attach: a.attach, Anchor: link.Head(),
	})
	if err != nil {
		return fmt.Errorf("attach %s to %s: %w", a.name, a.dev.Attrs().Name, err)
	}
	if err := n.guarded(a, l); err != nil {
		return err
	}
	if err := l.Pin(filepath.Join(dir, linkPrefix+a.name)); err != nil {
		return fmt.Errorf("pin link of %s: %w", a.name, err)
	}
	return nil
}

// guarded notes that the link l, which Close closes, holds a in its place.
func (n *NIC) guarded(a attachment, l link.Link) error {
	g := guard{attachment: a, link: l}
	info, err := l.Info()
	if err == nil {
		g.id = info.ID
	}
	n.guards = append(n.guards, g)
	if err != nil {
		return fmt.Errorf("link of %s: %w", a.name, err)
	}
	n.programs = append(n.programs, datapath.Program{Name: a.name, Device: a.dev.Attrs().Name, Attach: hook(a.attach)})
	return nil
}

func hook(at ebpf.AttachType) string {
	if at == ebpf.AttachTCXEgress {
		return "tcx-egress"
	}
	return "tcx-ingress"
}

// Wake implements [datapath.NIC].
func (n *NIC) Wake() { n.waiter.wakeUp() }

// Now implements [datapath.NIC].
func (n *NIC) Now() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // the clock exists since Linux 2.6.39
	}
	return ts.Nano()
}

// MAC implements [datapath.NIC].
func (n *NIC) MAC() net.HardwareAddr { return n.signer.own }

// Programs implements [datapath.NIC].
func (n *NIC) Programs() []datapath.Program { return n.programs }

// SetMode implements [datapath.NIC].
func (n *NIC) SetMode(m datapath.Mode) error {
	atomic.StoreUint32(&n.conf.Mode, uint32(m))
	if m != datapath.ModeShut && m != datapath.ModeQuiet || n.hasty {
		return nil
	}
	// Who looked at the mode before may still let a frame out, or return an echo.
	return grace()
}

// SetEpoch implements [datapath.NIC].
func (n *NIC) SetEpoch(e uint32) error {
	n.signer.epoch = e
	atomic.StoreUint32(&n.conf.Epoch, e)
	return nil
}

// SetLeaseUntil implements [datapath.NIC].
func (n *NIC) SetLeaseUntil(t int64) error {
	atomic.StoreUint64(&n.conf.LeaseUntil, uint64(t))
	return nil
}

// SetLeaseDuration implements [datapath.NIC].
func (n *NIC) SetLeaseDuration(d time.Duration) error {
	atomic.StoreUint64(&n.conf.LeaseDuration, uint64(d))
	return nil
}

// rotation is how long frames of the term before are taken once keys rotated:
// those on their way, and what the peer signs until it has the new keys too.
const rotation = time.Second

// InstallSession implements [datapath.NIC]. Frames of the old term are
// refused from the moment the term changes, but for a rotation's.
func (n *NIC) InstallSession(s datapath.Session) error {
	k := bpf.LockstepLsKeys{SipTx: s.TxKey, SipRx: s.RxKey, Mix: s.Digest.Mix}
	for lane := range k.K {
		m := copy(k.K[lane][:], s.Digest.K[lane][:])
		copy(k.K[lane][m:], s.Digest.K[lane][:])
	}
	index := s.Term & 1
	if err := n.objs.LsKeys.Put(index, &k); err != nil {
		return fmt.Errorf("install keys: %w", err)
	}
	copy(n.conf.PeerMac[:], s.PeerMAC)
	copy(n.conf.OwnMac[:], n.signer.own)
	oldUntil := uint64(0)
	if s.Rotated {
		oldUntil = uint64(n.Now() + int64(rotation))
	}
	// Before the term: no frame of the old one is refused between the two. Until the
	// term changes, term - 1 would be verified with the new keys, and so refused.
	atomic.StoreUint64(&n.conf.OldUntil, oldUntil)
	atomic.StoreUint32(&n.conf.KeyIndex, index)
	atomic.StoreUint32(&n.conf.KeyGen, s.Term)
	n.signer.key, n.signer.term = s.TxKey, s.Term
	n.signer.to = append(net.HardwareAddr(nil), n.conf.PeerMac[:]...)
	if s.Rotated {
		return nil // the epoch may be changing at this very moment (R13)
	}
	atomic.StoreUint32(&n.conf.Epoch, s.Epoch)
	n.signer.epoch = s.Epoch
	return nil
}

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

// Counters implements [datapath.NIC].
func (n *NIC) Counters() (map[string]uint64, error) {
	out := map[string]uint64{
		"release_lost":  n.lost.tap.Load(),
		"peer_lost":     n.lost.peer.Load(),
		"event_refused": n.lost.events.Load(),
		"tap_unread":    n.lost.unread.Load(),
	}
	names, cpus := bpf.ReasonNames(), ebpf.MustPossibleCPU()
	reasons, perCPU := make([]uint32, len(names)), make([]bpf.LockstepLsCount, len(names)*cpus)
	var cursor ebpf.MapBatchCursor
	got, err := n.objs.LsStats.BatchLookup(&cursor, reasons, perCPU, nil)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, fmt.Errorf("read counters: %w", err)
	}
	if got != len(names) {
		return nil, fmt.Errorf("read counters: %d of %d", got, len(names))
	}
	for i, reason := range reasons {
		out[names[reason]] = packets(perCPU[i*cpus : (i+1)*cpus])
	}
	return out, nil
}

func (n *NIC) counter(reason uint32) (uint64, error) {
	var perCPU []bpf.LockstepLsCount
	if err := n.objs.LsStats.Lookup(reason, &perCPU); err != nil {
		return 0, fmt.Errorf("read counter %s: %w", bpf.ReasonName(int(reason)), err)
	}
	return packets(perCPU), nil
}

func packets(perCPU []bpf.LockstepLsCount) (sum uint64) {
	for _, c := range perCPU {
		sum += c.Packets
	}
	return sum
}

// DrainTap implements [datapath.NIC]: a tap counts a frame as sent when its
// reader takes it, so what the gate let in and the tap has not counted is still
// on its way. What a guest that boots, or has crashed, has not read at ctx's
// deadline goes: to it that is a loss, and the PVM has heard it. So does what is there
// when the tap has counted more than was let in, for then nobody knows how much it is.
func (n *NIC) DrainTap(ctx context.Context) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		in, err := n.counter(uint32(bpf.LockstepLsReasonLS_R_letIn))
		if err != nil {
			return err
		}
		dev, err := netlink.LinkByIndex(n.tap.Attrs().Index)
		if err != nil {
			return fmt.Errorf("tap %s: %w", n.tap.Attrs().Name, err)
		}
		s := dev.Attrs().Statistics
		if s == nil {
			return fmt.Errorf("tap %s: no statistics", n.tap.Attrs().Name)
		}
		// A difference of counts, neither of which has grown by 2^31 meanwhile.
		unread := int32(n.tapBase + uint32(in) - uint32(s.TxPackets+s.TxDropped))
		if unread == 0 {
			return nil
		}
		if unread < 0 {
			return n.purgeTap(unread)
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return n.purgeTap(unread)
			}
			return fmt.Errorf("tap %s: the SVM has not read all frames: %w", n.tap.Attrs().Name, ctx.Err())
		case <-tick.C:
		}
	}
}

// purgeTap drops what waits in the tap's queue: unread frames by its count, which is
// right again afterwards.
func (n *NIC) purgeTap(unread int32) error {
	if err := emptyQueue(n.tap.Attrs().Index); err != nil {
		return fmt.Errorf("tap %s: drop what the SVM does not read: %w", n.tap.Attrs().Name, err)
	}
	n.lost.unread.Add(uint64(max(unread, 0)))
	// They were let in, and will never be counted as sent.
	n.tapBase -= uint32(unread)
	var meta bpf.LockstepLsMeta
	if err := n.objs.LsMeta.Lookup(uint32(0), &meta); err != nil {
		return fmt.Errorf("read what the tables are for: %w", err)
	}
	meta.TapBase = n.tapBase
	if err := n.objs.LsMeta.Put(uint32(0), &meta); err != nil {
		return fmt.Errorf("write down what the tap has lost: %w", err)
	}
	return nil
}

// emptyQueue drops what waits in a tap's queue. A shorter queue has no room for it
// (tun_queue_resize, seen in 6.18), and one of length 0 for nothing.
func emptyQueue(index int) error {
	dev, err := netlink.LinkByIndex(index)
	if err != nil {
		return err
	}
	length := dev.Attrs().TxQLen
	if err := netlink.LinkSetTxQLen(dev, 0); err != nil {
		return err
	}
	return netlink.LinkSetTxQLen(dev, length)
}

// Poll implements [datapath.NIC].
func (n *NIC) Poll(wait time.Duration, evs []compare.Event) ([]compare.Event, error) {
	if n.ring.AvailableBytes() == 0 {
		if err := n.waiter.wait(wait); err != nil {
			return evs, err
		}
	}
	for i := 0; i < batch && n.ring.AvailableBytes() > 0; i++ {
		r := &n.records[i]
		r.RawSample = bytesOf(&n.samples[i])[:0]
		if err := n.ring.ReadInto(r); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break // discarded ones alone
			}
			return evs, fmt.Errorf("read ring: %w", err)
		}
		var ok bool
		if evs, ok = n.event(i, len(r.RawSample), evs); !ok {
			n.lost.events.Add(1)
		}
	}
	return evs, nil
}

// Apply implements [datapath.NIC].
func (n *NIC) Apply(effs []compare.Effect) error {
	for i := range effs {
		e := &effs[i]
		if n.nheads == len(n.heads) {
			n.flush()
		}
		switch e.Op {
		case compare.OpSend:
			n.send(e)
		case compare.OpDeliver, compare.OpForward:
			n.deliver(n.toTap, e.Slot)
			n.frees = append(n.frees, e.Slot)
		case compare.OpReplay:
			n.deliver(n.replays, e.Slot)
			n.frees = append(n.frees, e.Slot)
		case compare.OpNeigh:
			n.toTap.queue(neighRequest(n.head(), e), nil)
		case compare.OpRemirror:
			n.repeatACK(n.toPeer, e)
		case compare.OpSACK:
			n.repeatACK(n.toGuest, e)
		case compare.OpQuery:
			n.toPeer.queue(n.signer.query(n.head()), nil)
		case compare.OpFree:
			n.frees = append(n.frees, e.Slot)
		case compare.OpAsk:
			n.tell(bpf.LockstepLsRecTypeLS_REC_ASK, e)
		case compare.OpAnnounce:
			n.tell(bpf.LockstepLsRecTypeLS_REC_ANNOUNCE, e)
		case compare.OpAnswer:
			n.tell(bpf.LockstepLsRecTypeLS_REC_ANSWER, e)
		}
	}
	n.flush()
	return nil
}

func (n *NIC) head() []byte {
	n.nheads++
	return n.heads[n.nheads-1][:0]
}

// send queues a frame in the PVM's name. What cannot be built is counted as
// lost: the guests send it again.
func (n *NIC) send(e *compare.Effect) {
	if e.Free && e.Slot != compare.NoSlot {
		n.frees = append(n.frees, e.Slot)
	}
	l2l3, payload := e.Header[:e.HdrLen], []byte(nil)
	ports := binary.BigEndian.AppendUint16(nil, e.Tuple.GuestPort)
	ports = binary.BigEndian.AppendUint16(ports, e.Tuple.RemotePort)
	var m frameMeta
	if e.Slot != compare.NoSlot {
		m = n.meta[e.Slot]
		data := n.slots.data(e.Slot)
		if m.l4 == 0 || e.From > e.To || e.To > m.paylen {
			n.lost.tap.Add(1)
			return
		}
		l2l3, payload = data[:m.l4], data[m.pay+e.From:m.pay+e.To]
	}
	head, ok := buildHeader(n.head(), l2l3, ports, e, m.tpid, m.tci, len(payload), m.gso)
	if !ok {
		n.lost.tap.Add(1)
	} else {
		n.toTap.queue(head, payload)
	}
}

// dupThresh is how many duplicate ACKs make a sender repeat (RFC 5681, 3.2).
const dupThresh = 3

// repeatACK gives S or the PVM the remote's newest segment again, without its payload
// (R6). With a SACK option it is to repeat what the remote has not got: so only if the
// remote has all before that, and as often as it takes.
func (n *NIC) repeatACK(to *packetConn, e *compare.Effect) {
	var c bpf.LockstepLsCli
	key := toTuple(e.Tuple)
	if err := n.objs.LsCli.Lookup(&key, &c); err != nil {
		return // evicted: a chance to heal less
	}
	l4, end := int(c.L4Off), int(c.HdrLen)
	if compare.Flags(c.TcpFlags)&(compare.ACK|compare.RST) != compare.ACK || l4+tcpHdrLen > end || end > len(c.Hdr) {
		return
	}
	flags := compare.Flags(binary.BigEndian.Uint16(c.Hdr[l4+tcpFlagsOff:])&flagsMask) &^ (compare.FIN | compare.SYN | compare.PSH | compare.URG)
	ack := compare.Effect{Seq: c.Seq, Ack: c.Ack, Win: c.Win, Flags: flags}
	opts, times := c.Hdr[l4+tcpHdrLen:end], 1
	if e.OptLen > 0 {
		if c.Ack != e.Seq {
			return
		}
		opts, times = append(timestamp(opts), e.Opts[:e.OptLen]...), dupThresh
	}
	ack.OptLen = uint8(copy(ack.Opts[:], opts))
	tpid := uint16(ethVLAN)
	if c.Flags&uint8(bpf.LockstepLsEvFlagLS_EV_8021AD) != 0 {
		tpid = ethQinQ
	}
	if head, ok := buildHeader(n.head(), c.Hdr[:l4], c.Hdr[l4:l4+4], &ack, tpid, c.Tci, 0, 0); ok {
		for range times {
			to.queue(head, nil)
		}
	}
}

// RequestEcho implements [datapath.NIC].
func (n *NIC) RequestEcho() error {
	n.toPeer.queue(n.signer.echo(n.head(), n.Now()), nil)
	n.flush()
	return nil
}

// MarkStop implements [datapath.NIC].
func (n *NIC) MarkStop() error {
	n.toPeer.queue(n.signer.mark(n.head()), nil)
	n.flush()
	return nil
}

// deliver queues a frame as it came: parked for the SVM, a datagram of the PVM, or a
// copy that is said again (R22).
func (n *NIC) deliver(to *packetConn, s compare.Slot) {
	m, ok := n.meta[s]
	data := n.slots.frame(s)
	if !ok || len(data) < ethLen {
		n.lost.tap.Add(1)
		return
	}
	to.queue(rawHeader(n.head(), data, &m), data[12:])
}

func (n *NIC) tell(typ bpf.LockstepLsRecType, e *compare.Effect) {
	n.toPeer.queue(n.signer.frame(n.head(), typ, e), nil)
}

func (n *NIC) flush() {
	for _, c := range []*packetConn{n.toTap, n.replays, n.toGuest} {
		if lost, err := c.flush(); lost > 0 {
			n.lost.tap.Add(uint64(lost))
			n.log.Debug("frames not sent", "device", n.tap.Attrs().Name, "frames", lost, "err", err)
		}
	}
	if lost, err := n.toPeer.flush(); lost > 0 {
		n.lost.peer.Add(uint64(lost))
		n.log.Debug("frames not sent", "device", n.peer.Attrs().Name, "frames", lost, "err", err)
	}
	n.nheads = 0
	for _, s := range n.frees {
		delete(n.meta, s)
		n.slots.free(s)
	}
	n.frees = n.frees[:0]
}

// Close implements [datapath.NIC]: pins stay, the programs go on.
func (n *NIC) Close() error {
	var errs []error
	if n.rt != nil {
		n.rt.Close()
	}
	if n.packets != nil {
		errs = append(errs, n.packets.Close())
	}
	if n.ring != nil {
		errs = append(errs, n.ring.Close())
	}
	if n.waiter != nil {
		errs = append(errs, n.waiter.close())
	}
	for _, c := range []*packetConn{n.toTap, n.replays, n.toGuest, n.toPeer} {
		if c != nil {
			errs = append(errs, c.close())
		}
	}
	for _, g := range n.guards {
		errs = append(errs, g.link.Close())
	}
	errs = append(errs, n.slots.unmap(), n.conf.unmap(), n.objs.Close())
	return errors.Join(errs...)
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
