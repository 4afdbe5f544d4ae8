// SPDX-License-Identifier: Apache-2.0

// Package loader puts the kernel half in place and serves it as a
// [control.DataPath]: it loads, pins and attaches the programs, turns ring
// records into events of package compare, and carries out its effects.
package loader

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
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
	"lockstep/control"
)

// Role is what a NIC's programs are attached for.
type Role int

// Roles.
const (
	Primary Role = iota + 1
	Secondary
)

// Options describe one guest NIC.
type Options struct {
	PinDir, VM, Node string
	NIC              int
	Role             Role
	Tap, PeerDevice  string // device names
	MaxConnections   int
	Slots, GSOSlots  int // held frames of up to 1984 bytes, and of up to 68 KiB
	Log              *slog.Logger

	// Mutation switches a rule of the kernel half off ; tests
	// only: nothing in the config or on the command line reaches it.
	Mutation Mutation
}

// Mutation is a rule switched off.
type Mutation uint32

// MutateR9 has the rewriter ignore announcements and guess.
const MutateR9 = Mutation(bpf.LockstepLsMutationLS_MUTATE_R9)

// maxHalf bounds half-open connections (R11): a flood costs only these.
const maxHalf = 16384

// batch bounds the events of one Poll.
const batch = 256

// NIC is the kernel half of one guest NIC.
type NIC struct {
	log       *slog.Logger
	tap, peer netlink.Link
	objs      bpf.LockstepObjects
	links     []link.Link
	programs  []control.Program
	conf      *confMemory
	slots     slots
	ring      *ringbuf.Reader
	waiter    *waiter
	records   [batch]ringbuf.Record
	samples   [batch]sample
	bounds    [batch][]compare.Bound
	meta      map[compare.Slot]frameMeta

	toTap, toPeer *packetConn
	heads         [batch][maxHeader + signedMax]byte
	nheads        int
	frees         []compare.Slot
	signer        signer

	tapBase uint64 // the tap's frame count before the first one was let in
	lost    struct{ tap, peer, events atomic.Uint64 }
}

// signedMax is room for a peer frame made by user space.
const signedMax = vnetHdrLen + ethLen + 4 + int(bpf.LockstepLsConstLS_REC_BASE)

// sample is room for any ring record, aligned as the records are.
type sample [118]uint64

// frameMeta is what the kernel told about a frame in a slot.
type frameMeta struct {
	l4, pay, paylen    uint32
	gso, tci           uint16
	csumStart, csumOff uint16
	partial            bool
}

type attachment struct {
	prog   *ebpf.Program
	dev    netlink.Link
	attach ebpf.AttachType
}

// Open loads the programs, attaches them to the tap and the peer device and
// pins everything. Programs start shut. What an earlier daemon left pinned for
// this NIC is replaced without a moment in which no program guards the tap.
func Open(o Options) (_ *NIC, err error) {
	tap, err := netlink.LinkByName(o.Tap)
	if err != nil {
		return nil, fmt.Errorf("tap %s: %w", o.Tap, err)
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
	n := &NIC{log: o.Log, tap: tap, peer: peer, meta: make(map[compare.Slot]frameMeta)}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	if err := n.load(o); err != nil {
		return nil, err
	}
	if err := preparePeer(peer); err != nil {
		return nil, err
	}
	stats := tap.Attrs().Statistics
	if stats != nil {
		n.tapBase = stats.TxPackets + stats.TxDropped
	}
	if err := n.attach(o.Role, dir); err != nil {
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

func (n *NIC) load(o Options) error {
	spec, err := bpf.LoadLockstep()
	if err != nil {
		return fmt.Errorf("read programs: %w", err)
	}
	spec.Maps[bpf.LockstepMapLsConn].MaxEntries = uint32(o.MaxConnections)
	spec.Maps[bpf.LockstepMapLsHalf].MaxEntries = uint32(min(maxHalf, o.MaxConnections))
	spec.Maps[bpf.LockstepMapLsSlots].MaxEntries = uint32(o.Slots)
	spec.Maps[bpf.LockstepMapLsGslots].MaxEntries = uint32(o.GSOSlots)
	rel := rand.Uint32() | 1
	in := rel ^ (rand.Uint32()<<1 | 2) // differs, and is odd as well, so not 0
	for name, v := range map[string]uint32{
		bpf.LockstepVarLsTap: uint32(n.tap.Attrs().Index), bpf.LockstepVarLsPeer: uint32(n.peer.Attrs().Index),
		bpf.LockstepVarLsMarkRel: rel, bpf.LockstepVarLsMarkIn: in,
		bpf.LockstepVarLsNslots: uint32(o.Slots), bpf.LockstepVarLsNgslots: uint32(o.GSOSlots),
		bpf.LockstepVarLsMutate: uint32(o.Mutation),
	} {
		if err := spec.Variables[name].Set(v); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	if err := spec.LoadAndAssign(&n.objs, nil); err != nil {
		return fmt.Errorf("load programs: %w", err)
	}
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
	n.toPeer, err = newPacketConn(n.peer.Attrs().Index, 0)
	return err
}

func (n *NIC) attach(role Role, dir string) error {
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
	maps := map[string]*ebpf.Map{
		bpf.LockstepMapLsConf: n.objs.LsConf, bpf.LockstepMapLsKeys: n.objs.LsKeys, bpf.LockstepMapLsStats: n.objs.LsStats,
		bpf.LockstepMapLsSlots: n.objs.LsSlots, bpf.LockstepMapLsGslots: n.objs.LsGslots, bpf.LockstepMapLsRing: n.objs.LsRing,
		bpf.LockstepMapLsConn: n.objs.LsConn, bpf.LockstepMapLsHalf: n.objs.LsHalf, bpf.LockstepMapLsLane: n.objs.LsLane,
	}
	for name, m := range maps {
		if err := m.Pin(filepath.Join(staging, name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	list := []attachment{
		{n.objs.LsPriOut, n.tap, ebpf.AttachTCXIngress},
		{n.objs.LsDigestRx, n.peer, ebpf.AttachTCXIngress},
		{n.objs.LsMirror, n.tap, ebpf.AttachTCXEgress},
	}
	if role == Secondary {
		list = []attachment{
			{n.objs.LsSecGate, n.tap, ebpf.AttachTCXEgress},
			{n.objs.LsSecOut, n.tap, ebpf.AttachTCXIngress},
			{n.objs.LsSecIn, n.peer, ebpf.AttachTCXIngress},
		}
	}
	for _, a := range list {
		info, err := a.prog.Info()
		if err != nil {
			return fmt.Errorf("program info: %w", err)
		}
		l, err := link.AttachTCX(link.TCXOptions{
			Interface: a.dev.Attrs().Index, Program: a.prog, Attach: a.attach, Anchor: link.Head(),
		})
		if err != nil {
			return fmt.Errorf("attach %s to %s: %w", info.Name, a.dev.Attrs().Name, err)
		}
		n.links = append(n.links, l)
		if err := l.Pin(filepath.Join(staging, linkPrefix+info.Name)); err != nil {
			return fmt.Errorf("pin link of %s: %w", info.Name, err)
		}
		how := "tcx-ingress"
		if a.attach == ebpf.AttachTCXEgress {
			how = "tcx-egress"
		}
		n.programs = append(n.programs, control.Program{Name: info.Name, Device: a.dev.Attrs().Name, Attach: how})
	}
	// The new programs guard already; the old ones go with their pins.
	for _, old := range []string{dir, left} {
		if err := removePins(old); err != nil {
			return err
		}
	}
	if err := os.Rename(staging, dir); err != nil {
		return fmt.Errorf("put pins in place: %w", err)
	}
	return nil
}

// Unload removes what is pinned for a node, programs and maps. The tap of a
// secondary is set down first: its guest is a second copy and must not be heard.
// Without force, a folder that is not whole is
// refused.
func Unload(pinDir, vm, node string, force bool) error {
	release, err := Lock(pinDir, vm, node)
	if err != nil {
		return err
	}
	defer release()
	dir := nodeDir(pinDir, vm, node)
	nics, err := filepath.Glob(filepath.Join(dir, "nic*"))
	if err != nil {
		return fmt.Errorf("list pins: %w", err)
	}
	for _, nic := range nics {
		if err := silence(filepath.Join(nic, linkPrefix+"ls_sec_out")); err != nil && !force {
			return fmt.Errorf("%w; --force removes the pins all the same", err)
		}
	}
	return removePins(dir)
}

// silence sets the tap that the pinned link guards down. No such pin is no error.
func silence(pin string) error {
	if _, err := os.Stat(pin); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return fmt.Errorf("pinned link %s: %w", pin, err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("pinned link %s: %w", pin, err)
	}
	tcx := info.TCX()
	if tcx == nil || tcx.Ifindex == 0 {
		return nil // the device is gone
	}
	dev, err := netlink.LinkByIndex(int(tcx.Ifindex))
	if err != nil {
		return fmt.Errorf("the secondary's tap (device %d): %w", tcx.Ifindex, err)
	}
	if err := netlink.LinkSetDown(dev); err != nil {
		return fmt.Errorf("set the secondary's tap %s down: %w", dev.Attrs().Name, err)
	}
	return nil
}

// Wake implements [control.DataPath].
func (n *NIC) Wake() { n.waiter.wakeUp() }

// Now implements [control.DataPath].
func (n *NIC) Now() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // the clock exists since Linux 2.6.39
	}
	return ts.Nano()
}

// MAC implements [control.DataPath].
func (n *NIC) MAC() net.HardwareAddr { return n.signer.own }

// Programs implements [control.DataPath].
func (n *NIC) Programs() []control.Program { return n.programs }

// SetMode implements [control.DataPath].
func (n *NIC) SetMode(m control.Mode) error {
	atomic.StoreUint32(&n.conf.Mode, uint32(m))
	return nil
}

// SetEpoch implements [control.DataPath].
func (n *NIC) SetEpoch(e uint32) error {
	n.signer.epoch = e
	atomic.StoreUint32(&n.conf.Epoch, e)
	return nil
}

// SetSpeakUntil implements [control.DataPath].
func (n *NIC) SetSpeakUntil(t int64) error {
	atomic.StoreUint64(&n.conf.SpeakUntil, uint64(t))
	return nil
}

// InstallSession implements [control.DataPath]. Frames of the old term are
// refused from the moment the term changes.
func (n *NIC) InstallSession(s control.Session) error {
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
	atomic.StoreUint32(&n.conf.KeyIndex, index)
	atomic.StoreUint32(&n.conf.Term, s.Term)
	atomic.StoreUint32(&n.conf.Epoch, s.Epoch)
	n.signer.key, n.signer.term, n.signer.epoch, n.signer.laneNext = s.TxKey, s.Term, s.Epoch, 0
	n.signer.to = append(net.HardwareAddr(nil), n.conf.PeerMac[:]...)
	return nil
}

// ResetOffsets implements [control.DataPath].
func (n *NIC) ResetOffsets() error {
	var conns, halves []bpf.LockstepLsTuple
	conns, err := keysOf[bpf.LockstepLsConn](n.objs.LsConn, nil)
	if err == nil {
		halves, err = keysOf[bpf.LockstepLsHalf](n.objs.LsHalf, nil)
	}
	if err == nil {
		err = deleteKeys(n.objs.LsConn, conns)
	}
	if err == nil {
		err = deleteKeys(n.objs.LsHalf, halves)
	}
	if err != nil {
		return fmt.Errorf("reset offsets: %w", err)
	}
	return nil
}

// keysOf lists the keys whose values pass (nil: all).
func keysOf[V any](m *ebpf.Map, pass func(*V) bool) ([]bpf.LockstepLsTuple, error) {
	var (
		keys []bpf.LockstepLsTuple
		k    bpf.LockstepLsTuple
		v    V
	)
	it := m.Iterate()
	for it.Next(&k, &v) {
		if pass == nil || pass(&v) {
			keys = append(keys, k)
		}
	}
	// Programs insert and remove meanwhile: an aborted walk is a short one.
	if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return nil, err
	}
	return keys, nil
}

func deleteKeys(m *ebpf.Map, keys []bpf.LockstepLsTuple) error {
	for i := range keys {
		if err := m.Delete(&keys[i]); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
	return nil
}

// fins are the state bits of a connection that both ends closed.
const fins = uint32(bpf.LockstepLsConnBitLS_CONN_GFIN | bpf.LockstepLsConnBitLS_CONN_RFIN)

// connState names a connection's state bits.
func connState(bits uint32) string {
	switch {
	case bits&uint32(bpf.LockstepLsConnBitLS_CONN_RST) != 0:
		return "reset"
	case bits&fins != 0:
		return "closing"
	}
	return "open"
}

// Sweep implements [control.DataPath].
func (n *NIC) Sweep(linger, idle time.Duration) (int, error) {
	now := n.Now()
	old, err := keysOf(n.objs.LsConn, func(c *bpf.LockstepLsConn) bool {
		limit := idle
		if c.State&uint32(bpf.LockstepLsConnBitLS_CONN_RST) != 0 || c.State&fins == fins {
			limit = min(linger, idle)
		}
		return now-int64(c.Last) > int64(limit)
	})
	if err == nil {
		err = deleteKeys(n.objs.LsConn, old)
	}
	if err != nil {
		return 0, fmt.Errorf("sweep connections: %w", err)
	}
	return len(old), nil
}

// Offsets implements [control.DataPath].
func (n *NIC) Offsets(yield func(compare.Tuple, control.Offset)) error {
	var (
		k bpf.LockstepLsTuple
		c bpf.LockstepLsConn
	)
	it := n.objs.LsConn.Iterate()
	for it.Next(&k, &c) {
		yield(fromTuple(&k), control.Offset{Seq: c.Off, TS: c.TsOff, Incarnation: c.Inc, Last: int64(c.Last), State: connState(c.State)})
	}
	if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return fmt.Errorf("list connections: %w", err)
	}
	return nil
}

// Counters implements [control.DataPath].
func (n *NIC) Counters() (map[string]uint64, error) {
	out := map[string]uint64{
		"release_lost":  n.lost.tap.Load(),
		"peer_lost":     n.lost.peer.Load(),
		"event_refused": n.lost.events.Load(),
	}
	for i, name := range bpf.ReasonNames() {
		c, err := n.count(uint32(i))
		if err != nil {
			return nil, err
		}
		out[name] = c
	}
	return out, nil
}

func (n *NIC) count(reason uint32) (packets uint64, err error) {
	var perCPU []bpf.LockstepLsCount
	if err := n.objs.LsStats.Lookup(reason, &perCPU); err != nil {
		return 0, fmt.Errorf("read counter %s: %w", bpf.ReasonName(int(reason)), err)
	}
	for _, c := range perCPU {
		packets += c.Packets
	}
	return packets, nil
}

// DrainTap implements [control.DataPath]: a tap counts a frame as sent when its
// reader takes it, so what the gate let in and the tap has not counted is still
// on its way.
func (n *NIC) DrainTap(ctx context.Context) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		in, err := n.count(uint32(bpf.LockstepLsReasonLS_R_letIn))
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
		if s.TxPackets+s.TxDropped-n.tapBase >= in {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("tap %s: the SVM has not read all frames: %w", n.tap.Attrs().Name, ctx.Err())
		case <-tick.C:
		}
	}
}

// Poll implements [control.DataPath].
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

// Apply implements [control.DataPath].
func (n *NIC) Apply(effs []compare.Effect) error {
	for i := range effs {
		e := &effs[i]
		if n.nheads == len(n.heads) {
			n.flush()
		}
		switch e.Op {
		case compare.OpSend:
			n.send(e)
		case compare.OpDeliver:
			n.deliver(e.Slot)
			n.frees = append(n.frees, e.Slot)
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
	tci := e.Tuple.VLAN
	if m.tci != 0 {
		tci = m.tci
	}
	head, ok := buildHeader(n.head(), l2l3, ports, e, tci, len(payload), m.gso)
	if !ok {
		n.lost.tap.Add(1)
	} else {
		n.toTap.queue(head, payload)
	}
}

// deliver queues a parked frame for the SVM, as it came.
func (n *NIC) deliver(s compare.Slot) {
	m, ok := n.meta[s]
	data := n.slots.frame(s)
	if !ok || len(data) < ethLen {
		n.lost.tap.Add(1)
		return
	}
	n.toTap.queue(rawHeader(n.head(), data, &m), data[12:])
}

func (n *NIC) tell(typ bpf.LockstepLsRecType, e *compare.Effect) {
	n.toPeer.queue(n.signer.frame(n.head(), typ, e), nil)
}

func (n *NIC) flush() {
	if lost, err := n.toTap.flush(); lost > 0 {
		n.lost.tap.Add(uint64(lost))
		n.log.Debug("frames not sent", "device", n.tap.Attrs().Name, "frames", lost, "err", err)
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

// Close implements [control.DataPath]: pins stay, the programs go on.
func (n *NIC) Close() error {
	var errs []error
	if n.ring != nil {
		errs = append(errs, n.ring.Close())
	}
	if n.waiter != nil {
		errs = append(errs, n.waiter.close())
	}
	for _, c := range []*packetConn{n.toTap, n.toPeer} {
		if c != nil {
			errs = append(errs, c.close())
		}
	}
	for _, l := range n.links {
		errs = append(errs, l.Close())
	}
	errs = append(errs, n.slots.unmap(), n.conf.unmap(), n.objs.Close())
	return errors.Join(errs...)
}
