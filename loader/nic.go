// SPDX-License-Identifier: Apache-2.0

// Package loader puts the kernel half in place and serves it as a
// [datapath.NIC]: it loads, pins and attaches the programs, turns ring
// records into events of package compare, and carries out its effects.
package loader

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"lockstep/bpf"
	"lockstep/compare"
	"lockstep/control/datapath"
	"lockstep/loader/device"
)

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

// Now implements [datapath.NIC].
func (n *NIC) Now() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // the clock exists since Linux 2.6.39
	}
	return ts.Nano()
}

// Programs implements [datapath.NIC].
func (n *NIC) Programs() []datapath.Program { return n.programs }

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
