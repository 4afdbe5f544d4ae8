// SPDX-License-Identifier: Apache-2.0

// Package loader puts the kernel half in place and serves it as a
// [datapath.NIC]: it loads, pins and attaches the programs, turns ring
// records into events of package compare, and carries out its effects.
package loader

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader/core"
	"github.com/lockstep-ft/lockstep/loader/device"
)

// NIC is the kernel half of one guest NIC. Each of its parts owns some of the tables
// and devices and serves its share of [datapath.NIC].
type NIC struct {
	*gate
	*conntrack
	*receiver
	*transmitter
	*tapDrain
	*programs
	*chainGuard
	*counters
	*fastPath

	objs      *bpf.LockstepObjects
	frames    *core.Store
	recovered *datapath.Recovered // nil: the tables were made at this start
	closers   []func() error      // undo what Open did for this process, the last one first
}

var _ datapath.NIC = (*NIC)(nil)

// Open loads the programs, attaches them to the tap and the peer device and pins
// everything. The programs start in mode SHUT. If an earlier daemon left tables
// pinned for this NIC, Open recovers them and replaces the programs one by one, so
// that the tap is never without (R23). Tables of another ABI, size, role or config
// are refused.
func Open(o Options) (_ *NIC, err error) {
	tap, peer, err := devicesOf(&o)
	if err != nil {
		return nil, err
	}
	pins := nicDir(o.PinDir, o.VM, o.Node, o.NIC)
	if err := refuseManaged(tap, pins); err != nil {
		return nil, err
	}
	var found recoveredTables
	if !o.Discard {
		if found, err = recoverTables(pins, o, tap); err != nil {
			return nil, err
		}
		defer found.close()
	}
	n := new(NIC)
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	maps, err := n.assemble(&o, tap, peer, found.sameRole)
	if err != nil {
		return nil, err
	}
	if err := device.PreparePeer(peer); err != nil {
		return nil, err
	}
	switch {
	case found.sameRole != nil:
		err = n.resume(pins)
	case found.promoted != nil:
		err = n.resumePromoted(found.promoted, pins, maps)
	default:
		err = n.attachNew(pins, maps, nil)
	}
	if err == nil {
		err = n.attachXDP(&o, pins)
	}
	if err != nil {
		return nil, err
	}
	return n, nil
}

// devicesOf finds the tap and the peer device and refuses what is unfit.
func devicesOf(o *Options) (tap, peer netlink.Link, err error) {
	if tap, err = netlink.LinkByName(o.Tap); err != nil {
		return nil, nil, fmt.Errorf("tap %s: %w", o.Tap, err)
	}
	if err := device.CheckTap(o.Tap); err != nil {
		return nil, nil, err
	}
	if peer, err = netlink.LinkByName(o.PeerDevice); err != nil {
		return nil, nil, fmt.Errorf("peer device %s: %w", o.PeerDevice, err)
	}
	if err := device.CheckPeerMTU(o.PeerDevice, peer.Attrs().MTU, o.Tap, tap.Attrs().MTU); err != nil {
		return nil, nil, err
	}
	return tap, peer, nil
}

// assemble loads the programs, over the maps of old or, when that is nil, over new
// ones, and makes the NIC's parts. It returns the maps to pin, by name.
func (n *NIC) assemble(o *Options, tap, peer netlink.Link, old *tables) (map[string]*ebpf.Map, error) {
	objs, maps, marks, err := loadPrograms(o, tap, peer, old)
	if err != nil {
		return nil, err
	}
	n.objs = objs
	n.onClose(objs.Close)
	meta, err := writeMeta(objs.LsMeta, o, tap, old)
	if err != nil {
		return nil, err
	}
	n.counters = &counters{stats: objs.LsStats}
	n.tapDrain = &tapDrain{counters: n.counters, tap: tap, meta: objs.LsMeta, base: meta.TapBase}
	n.programs = &programs{role: o.Role, tap: tap, peer: peer, objs: objs, log: o.Log}
	n.onClose(n.programs.close)
	if n.chainGuard, err = newChainGuard(n.programs, o.Log); err != nil {
		return nil, err
	}
	n.onClose(n.chainGuard.close)
	if n.gate, err = newGate(objs, peer, o.Mutation&MutateWait != 0); err != nil {
		return nil, err
	}
	n.onClose(n.gate.close)
	n.conntrack = newConntrack(o.Role, objs, &n.gate.conf.Edges)
	slots, err := mapSlots(objs.LsSlots, objs.LsGslots)
	if err != nil {
		return nil, err
	}
	n.onClose(func() error { return unmapSlots(slots) })
	n.frames = core.NewStore(slots)
	if n.receiver, err = newReceiver(objs.LsRing, n.frames, n.counters); err != nil {
		return nil, err
	}
	n.onClose(n.receiver.close)
	n.fastPath = newFastPath(objs, &n.receiver.Decoder)
	n.transmitter = &transmitter{log: o.Log}
	n.Transmitter.Frames, n.Newest, n.Signer = n.frames, n.newest, newSigner(o.Role, &n.gate.Gate)
	n.onClose(n.transmitter.close)
	return maps, n.transmitter.open(o.Role, tap, peer, marks, n.counters)
}

func (n *NIC) onClose(f func() error) { n.closers = append(n.closers, f) }

// attachNew pins the maps and attaches the programs, in front of those that may be
// there, and then removes these with their pins. ready (may be nil) is called when
// the new programs are the only ones.
func (n *NIC) attachNew(pins pinFolder, maps map[string]*ebpf.Map, ready func()) error {
	staging, err := pins.stage()
	if err != nil {
		return err
	}
	for name, m := range maps {
		if err := m.Pin(staging.path(name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	for _, a := range n.attachments() {
		if err := n.programs.attach(a, staging); err != nil {
			return err
		}
	}
	if err := errors.Join(removePins(string(pins)), removePins(string(pins.leftover()))); err != nil {
		return err
	}
	if ready != nil {
		ready()
	}
	return pins.commit()
}

// resume goes on from the tables that a dead daemon of the same role left: it puts
// the new programs in the place of the old ones, which kept running meanwhile. What
// those held or reported is dropped: the guests retransmit it. The programs are shut
// when it returns.
func (n *NIC) resume(pins pinFolder) (err error) {
	if n.recovered, err = n.recoveredState(); err != nil {
		return err
	}
	atomic.StoreUint32(&n.conf.Mode, uint32(datapath.ModeShut))
	for _, a := range n.attachments() {
		if err := n.programs.replace(a, pins); err != nil {
			return err
		}
	}
	// A program that read the mode before may still be filling slots.
	if err := waitRCU(); err != nil {
		return err
	}
	if err := n.receiver.discard(); err != nil {
		return err
	}
	n.frames.FreeAll()
	return errors.Join(removePins(string(pins.staging())), removePins(string(pins.leftover())))
}

// resumePromoted makes the primary of a secondary that took over: its translations
// become the edges of the new tables, and its guest goes on transmitting.
func (n *NIC) resumePromoted(old *tables, pins pinFolder, maps map[string]*ebpf.Map) (err error) {
	if err := n.conntrack.inherit(old); err != nil {
		return err
	}
	conf, err := old.conf()
	if err != nil {
		return err
	}
	n.gate.Inherit(&conf)
	// Not in mode SOLO before the old programs are gone: both would translate.
	if err := n.attachNew(pins, maps, n.gate.goSolo); err != nil {
		return err
	}
	n.recovered, err = n.recoveredState()
	return err
}

// recoveredState is what an earlier daemon's tables say of the session.
func (n *NIC) recoveredState() (*datapath.Recovered, error) {
	r, err := n.gate.RecoveredSession()
	if err == nil && n.programs.role == Primary {
		r.Remotes, err = n.conntrack.knownRemotes()
	}
	if err != nil {
		return nil, err
	}
	return r, nil
}

// Recovered implements [datapath.NIC].
func (n *NIC) Recovered() *datapath.Recovered { return n.recovered }

// Now implements [datapath.NIC].
func (n *NIC) Now() int64 { return bootTime() }

func bootTime() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // the clock exists since Linux 2.6.39
	}
	return ts.Nano()
}

// Close implements [datapath.NIC]. Pins stay, and the programs continue.
func (n *NIC) Close() error {
	var errs []error
	for i := range n.closers {
		errs = append(errs, n.closers[len(n.closers)-1-i]())
	}
	n.closers = nil
	return errors.Join(errs...)
}
