// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/loader/device"
)

// pair looks at what the config requires of this host.
func (d *doctor) pair(ctx context.Context, c *config.Config, node string) {
	addrs, err := d.m.addresses()
	if err != nil {
		d.missing("control", "", "addresses of this host: %v", err)
		return
	}
	has := func(a netip.Addr) bool { return slices.Contains(addrs, a) }
	if node == "" { // the one whose address this host has
		var here, named, at []string
		for _, n := range c.Nodes {
			if has(n.Control.Addr()) {
				here = append(here, n.Name)
			}
			named, at = append(named, n.Name), append(at, n.Control.Addr().String())
		}
		if len(here) != 1 {
			which := "neither"
			switch {
			case len(here) == 2 && !c.Spares():
				which = "both"
			case c.Spares():
				which = fmt.Sprint(len(here))
			}
			d.missing("control", "name this host with --node", "which of %s is this host? Of their control addresses %s it has %s",
				strings.Join(named, " and "), strings.Join(at, " and "), which)
			return
		}
		node = here[0]
	}
	self, other, _ := c.Node(node) // it is one of them
	others := c.Others(node)
	if i := slices.IndexFunc(others, func(n *config.Node) bool { return has(n.Control.Addr()) }); i >= 0 {
		other = others[i]
	}
	addr := self.Control.Addr()
	switch {
	case has(addr):
		d.ok("control", "this host is %s: it has %s", self.Name, addr)
	case has(other.Control.Addr()):
		d.missing("control", "--node "+other.Name, "%s's address %s is not this host's, but %s's is", self.Name, addr, other.Name)
	default:
		d.missing("control", fmt.Sprintf("ip addr add %s/24 dev DEVICE; or correct nodes.%s.control", addr, self.Name),
			"%s's address %s is not this host's", self.Name, addr)
	}
	if err := c.Unfit(self); err != nil {
		found, fix, _ := strings.Cut(err.Error(), "; ")
		d.missing("config", fix, "%s", found)
	}
	for _, other := range others {
		d.peer(ctx, other, c.Spares())
	}
	d.certificates(c, self, other)
	if err := d.m.writable(c.RunDir); err != nil {
		d.missing("run_dir", fmt.Sprintf("mkdir -p %s; or name another run_dir", c.RunDir), "%v", err)
	} else {
		d.ok("run_dir", "%s", c.RunDir)
	}
	for i, nic := range self.NICs {
		var to []*config.VXLAN
		for _, other := range others {
			if v := c.PeerVXLAN(self, other, i); v != nil {
				to = append(to, v)
			}
		}
		d.nic(i, &nic, to, self.Starts)
	}
	d.failover(ctx, c, self)
}

// failover looks at what a pair needs to begin and to end by itself.
func (d *doctor) failover(ctx context.Context, c *config.Config, self *config.Node) {
	if c.Arbiter.Type == "" {
		d.warn("arbiter", "name one in the config: arbiter: {type: etcd, endpoints: [...]}", "there is none, so no host takes over by itself when the other dies")
		return
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	switch entry, err := d.m.arbiter(ctx, c, self.Name); {
	case err != nil:
		d.missing("arbiter", "without it neither host may transmit alone: docs/ARBITER.md lists what it needs", "%s does not answer: %v", c.Arbiter.Type, err)
	case c.Arbiter.Type == config.ArbiterNone:
		d.warn("arbiter", "name one that both hosts ask", "type none: both hosts may transmit after a partition")
	default:
		d.ok("arbiter", "%s answers: %s", c.Arbiter.Type, entry)
	}
	if err := d.m.writable(c.StateDir); err != nil {
		d.missing("state_dir", fmt.Sprintf("mkdir -p %s; or name another state_dir", c.StateDir), "%v", err)
	} else {
		d.ok("state_dir", "%s", c.StateDir)
	}
	if !self.Starts {
		return
	}
	running, err := d.m.guest(c, self)
	d.memory(c, running != "")
	switch {
	case err != nil:
		d.missing("guest", "correct qemu in the config, or this host", "%s", strings.ReplaceAll(err.Error(), "\n", "; "))
	case running != "":
		d.ok("guest", "%s", running)
	default:
		d.ok("guest", "QEMU can start it")
	}
	rooms, err := d.m.overlays(c, self)
	if err != nil {
		d.missing("overlay_dir", largerOverlays, "%s: %v", self.Name, err)
	}
	for _, o := range rooms {
		d.overlays(c, self, &o)
	}
}

// overlayRoom is a file system for the overlays of a guest's disks.
type overlayRoom struct {
	qemu.OverlaySpace
	most int64 // bytes that they can take at most; 0: not known
}

const (
	largerOverlays = "free some of it, or name a larger overlay_dir: what both guests write between two checkpoints has to be there"
	// busyGuest is a rate at which guests do write now and then, bytes a second.
	busyGuest = 100_000_000
)

// overlays reports how long the room for a secondary's overlays lasts. Either host may come
// to be the secondary's.
func (d *doctor) overlays(c *config.Config, self *config.Node, o *overlayRoom) {
	const name = "overlay_dir"
	what := fmt.Sprintf("%s: %s, of disk %s, has %d MiB", self.Name, o.Dir, strings.Join(o.Disks, ", "), (o.Free+o.Used)>>20)
	room := o.Free + o.Used
	lasts := time.Duration(room/busyGuest) * time.Second
	switch need := qemu.MinOverlayRoom * int64(len(o.Disks)); {
	case room < need:
		d.missing(name, largerOverlays, "%s, and no secondary starts with less than %d MiB", what, need>>20)
	case o.most > 0 && room >= o.most:
		d.ok(name, "%s, as much as overlays can take", what)
	case lasts < c.Checkpoint.Period:
		d.warn(name, largerOverlays, "%s: %v of writing 100 MB/s, and checkpoint.period is %v; checkpoints come earlier then", what, lasts, c.Checkpoint.Period)
	default:
		d.ok(name, "%s: %v of writing 100 MB/s", what, lasts)
	}
}

// peer tries another host's control address, where only a primary listens. Of those of spares any may be off.
func (d *doctor) peer(ctx context.Context, other *config.Node, spares bool) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	switch err := d.m.dial(ctx, other.Control); {
	case err == nil:
		d.ok("peer", "%s's daemon listens on %s", other.Name, other.Control)
	case errors.Is(err, syscall.ECONNREFUSED):
		d.ok("peer", "%s's host answers; no daemon listens on %s, which only the primary's does", other.Name, other.Control)
	default:
		report := d.missing
		if spares {
			report = d.warn
		}
		report("peer", fmt.Sprintf("ip route get %s; let TCP port %d pass the firewalls of both hosts", other.Control.Addr(), other.Control.Port()),
			"%s's host does not answer: %v", other.Name, err)
	}
}

func (d *doctor) certificates(c *config.Config, self, other *config.Node) {
	if c.TLS.Insecure {
		d.warn("tls", "name certificates under tls, and make them with `lockstep keys`", "insecure: who can read the control link can forge the secondary's records")
		return
	}
	files := peerlink.Certificates{VM: c.VM, Node: self.Name, Peer: other.Name}
	files.CA, files.Cert, files.Key = c.TLS.Files(self.Name)
	_, err := files.TLS()
	if err == nil && c.TLS.QEMU && c.Arbiter.Type != "" {
		err = files.CheckQEMU()
	}
	bad := (*peerlink.CertError)(nil)
	switch {
	case errors.As(err, &bad):
		d.missing("tls", bad.Fix, "tls.%s: %s", bad.What, bad.Reason)
	case err != nil:
		d.missing("tls", "", "%v", err)
	case !c.TLS.QEMU:
		d.warn("tls", "remove tls.qemu", "insecure: the guest's memory and disks go between the two QEMUs in the clear")
	default:
		d.ok("tls", "%s is this node's, signed and in time", files.Cert)
	}
}

// nic checks a NIC's devices. to are its VXLANs to each of the other nodes, if it has any; starts: lockstep starts
// this host's QEMU.
func (d *doctor) nic(i int, nic *config.NIC, to []*config.VXLAN, starts bool) {
	name := func(what string) string { return fmt.Sprintf("nics[%d].%s", i, what) }
	// lacks reports an error that has behind "; " what mends it.
	lacks := func(what string, err error) {
		found, fix, _ := strings.Cut(err.Error(), "; ")
		d.missing(name(what), fix, "%s", found)
	}
	if nic.Bridge != "" {
		if err := d.m.bridge(nic.Bridge); err != nil {
			lacks("bridge", err)
		}
	}
	mtu := device.TapMTU
	switch tap, err := d.m.device(nic.Tap); {
	case err != nil && nic.Bridge != "":
		d.ok(name("tap"), "lockstep makes %s, in %s", nic.Tap, nic.Bridge)
	case err != nil:
		d.missing(name("tap"), device.NoTap(nic.Tap, nic.Queues), "there is no device %q: %v", nic.Tap, err)
		return // what is right for the others depends on it
	default:
		if err := d.m.tap(nic.Tap); err != nil {
			lacks("tap", err)
			return
		}
		if starts {
			if err := d.m.queues(nic.Tap, nic.Bridge, nic.Queues); err != nil {
				lacks("tap", err)
			}
		}
		mtu = tap.MTU
		d.ok(name("tap"), "%s, MTU %d", nic.Tap, mtu)
		d.inFront(name("order"), nic.Tap)
	}

	key, dev := name("peer"), nic.PeerDevice
	var v *config.VXLAN
	if len(to) > 0 {
		v = to[0]
		if err := d.m.vxlanFits(v, mtu); err != nil {
			lacks("underlay", err)
			return
		}
		key, dev = name("underlay"), v.Underlay
	}
	l, err := d.m.device(dev)
	switch {
	case err != nil:
		d.missing(key, device.NoPeer, "there is no device %q: %v", dev, err)
		return
	case device.CheckPeerMTU(dev, l.MTU, nic.Tap, mtu) != nil:
		lacks("peer", device.CheckPeerMTU(dev, l.MTU, nic.Tap, mtu))
	case l.Flags&net.FlagUp == 0 && v != nil: // lockstep sets up a peer device itself
		d.warn(key, fmt.Sprintf("ip link set %s up", dev), "%s is down: there is no pair until it is up", dev)
	default:
		d.ok(key, "%s, MTU %d", dev, l.MTU)
	}
	if v != nil {
		for _, v := range to {
			if err := d.m.route(v); err != nil {
				d.missing(name("route"), fmt.Sprintf("ip addr add %s/24 dev %s, or ip route add %s dev %s", v.Local, dev, v.Remote, dev),
					"no way from %s to %s by %s: %v", v.Local, v.Remote, dev, err)
			} else {
				d.ok(name("route"), "from %s to %s by %s", v.Local, v.Remote, dev)
			}
		}
		return // a VXLAN device has no native XDP
	}
	native, err := d.m.nativeXDP(dev)
	switch {
	case nic.XDP == config.XDPOff:
		d.ok(name("xdp"), "switched off in the config")
	case native:
		d.ok(name("xdp"), "%s's driver runs it: forged frames are dropped early", dev)
	case nic.XDP == config.XDPOn && err == nil:
		d.missing(name("xdp"), "peer.xdp: auto", "%s's driver runs no XDP, and the config insists on it", dev)
	case err != nil:
		d.ok(name("xdp"), "not known, and not needed: %v", err)
	default:
		d.ok(name("xdp"), "%s's driver runs none, and none is needed", dev)
	}
}

// inFront looks for who sees the guest's frames before lockstep does.
func (d *doctor) inFront(name, tap string) {
	passOn, read, err := d.m.inFront(tap)
	if err != nil {
		d.warn(name, "", "%v", err)
	}
	for _, what := range passOn {
		found, fix, _ := strings.Cut(what, ": ")
		d.missing(name, fix, "%s", found)
	}
	for _, what := range read {
		d.warn(name, "end it where that matters", "%s", what)
	}
	if len(passOn) == 0 && len(read) == 0 && err == nil {
		d.ok(name, "nothing sees %s's frames before lockstep does", tap)
	}
}
