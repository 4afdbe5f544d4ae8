// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"strings"

	"github.com/lockstep-ft/lockstep/control/qemu"
)

// relations checks values against each other.
func (r *reader) relations(c *Config) {
	at := func(format string, a ...any) Pos { return c.pos(fmt.Sprintf(format, a...)) }
	a := &c.Nodes[0]
	for i := range c.Nodes[1:] {
		b := &c.Nodes[i+1]
		for _, o := range c.Nodes[:i+1] {
			if o.Control == b.Control || c.Spares() && o.Control.Addr() == b.Control.Addr() { // by its address P knows who connects
				r.refuse(at("nodes.%s.control", b.Name), fmt.Sprintf("%s and %s have the same control address", o.Name, b.Name), "give each host its own")
			}
		}
		if len(a.NICs) != len(b.NICs) {
			r.refuse(at("nodes.%s.nics", b.Name), fmt.Sprintf("%s has %s and %s has %d", a.Name, count(len(a.NICs), "NIC", "NICs"), b.Name, len(b.NICs)),
				"the guest is the same on both: list the same number, in the same order")
			return
		}
	}
	for _, n := range c.Nodes {
		seen := make(map[string]string)
		use := func(dev, key string) {
			if was, dup := seen[dev]; dup {
				r.refuse(at("nodes.%s.%s", n.Name, key), fmt.Sprintf("device %q is already %s of this node", dev, was), "give each its own device")
				return
			}
			seen[dev] = key
		}
		for i, nic := range n.NICs {
			use(nic.Tap, fmt.Sprintf("nics[%d].tap", i))
			if v := nic.PeerVXLAN; v == nil {
				use(nic.PeerDevice, fmt.Sprintf("nics[%d].peer.device", i))
			} else {
				use(v.Device(), fmt.Sprintf("nics[%d].peer.vxlan.id", i))
				if c.Spares() {
					continue // underlay looks at it
				}
				if v.Local.Is4() != v.Remote.Is4() || v.Local == v.Remote {
					r.refuse(at("nodes.%s.nics[%d].peer.vxlan.remote", n.Name, i), fmt.Sprintf("remote %s does not go with local %s", v.Remote, v.Local),
						"give two different addresses of one family")
				}
			}
		}
		if n.GuestAgent != "" && n.QMP == "" {
			r.refuse(at("nodes.%s.guest_agent", n.Name), "there is a guest_agent, and no QEMU whose guest it is in", "add qmp, or describe the guest under qemu")
		} else if n.GuestAgent != "" && n.GuestAgent == n.QMP {
			r.refuse(at("nodes.%s.guest_agent", n.Name), "guest_agent is the same socket as qmp, which is QEMU's own monitor", "name the socket of the chardev of QEMU's port org.qemu.guest_agent.0")
		}
		if s := c.Socket(n.Name); len(s) > maxSocket {
			r.refuse(at("run_dir"), fmt.Sprintf("the status socket's path %q has %d bytes, and the kernel takes %d", s, len(s), maxSocket), "shorten run_dir, vm or the node's name")
		}
	}
	links(r, c)
	withSpares(r, c)
	r.guest(c)
	if h := c.Heartbeat; h.Lease > h.Timeout {
		r.refuse(at("heartbeat.lease"), fmt.Sprintf("lease %v is above timeout %v", h.Lease, h.Timeout), "a host that counts as dead must no longer transmit; lower it")
	} else if h.Interval > h.Lease/3 {
		r.refuse(at("heartbeat.interval"), fmt.Sprintf("interval %v is above a third of lease %v", h.Interval, h.Lease), "one lost echo must not mute the guest; lower it or raise lease")
	}
	if h := &c.Heartbeat; h.Restart == 0 {
		h.Restart = max(DefaultHeartbeatRestart, h.Timeout)
	} else if h.Restart < h.Timeout {
		r.refuse(at("heartbeat.restart"), fmt.Sprintf("restart %v is below timeout %v", h.Restart, h.Timeout), "a daemon that ends on a living host is given at least the time of a host that does not answer; raise it")
	}
	if c.Compare.CutDelay >= c.Compare.Timeout {
		r.refuse(at("compare.cut_delay"), fmt.Sprintf("cut_delay %v is not below timeout %v", c.Compare.CutDelay, c.Compare.Timeout), "a cut that waits for the timeout never happens; lower it")
	}
	if c.Checkpoint.MinInterval > c.Checkpoint.Period {
		r.refuse(at("checkpoint.min_interval"), fmt.Sprintf("min_interval %v is above period %v", c.Checkpoint.MinInterval, c.Checkpoint.Period), "lower it or raise the period")
	}
}

// links checks the peer links of each pair that the nodes can be.
func links(r *reader, c *Config) {
	at := func(format string, a ...any) Pos { return c.pos(fmt.Sprintf(format, a...)) }
	a := &c.Nodes[0]
	for i := range a.NICs {
		for _, b := range c.Nodes[1:] {
			x, y := a.NICs[i].PeerVXLAN, b.NICs[i].PeerVXLAN
			key := fmt.Sprintf("nodes.%s.nics[%d].peer", b.Name, i)
			if c.Spares() && (x == nil) != (y == nil) {
				r.refuse(at("%s", key), fmt.Sprintf("%s and %s have peer links of different kinds, and any two of the nodes may become the pair", a.Name, b.Name),
					"write a device on all of them, of one L2 network, or a vxlan on all of them")
				continue
			}
			if x == nil || y == nil {
				continue // the other end is somebody else's VXLAN device
			}
			differ := func(field string, got, want any) {
				if got != want {
					r.refuse(at("%s.vxlan.%s", key, field), fmt.Sprintf("%s is %v, and the other end of this link, on %s, makes it %v", field, got, a.Name, want),
						"the two ends must match")
				}
			}
			differ("id", y.ID, x.ID)
			differ("port", y.Port, x.Port)
			if !c.Spares() {
				differ("local", y.Local, x.Remote)
				differ("remote", y.Remote, x.Local)
			}
		}
		if c.Spares() {
			underlay(r, c, i)
		}
	}
}

// underlay checks the VXLANs of a NIC among more than two nodes, which lockstep directs to whoever is the peer.
func underlay(r *reader, c *Config, nic int) {
	for i, n := range c.Nodes {
		v := n.NICs[nic].PeerVXLAN
		if v == nil {
			return
		}
		key := fmt.Sprintf("nodes.%s.nics[%d].peer.vxlan", n.Name, nic)
		if v.Remote.IsValid() {
			r.refuse(c.pos(key+".remote"), fmt.Sprintf("remote names one other host, and %s may be a pair with any of %s", n.Name, count(len(c.Nodes)-1, "other", "others")),
				"remove it: the other end is the local of whichever node is the peer")
		}
		for _, o := range c.Nodes[:i] {
			if w := o.NICs[nic].PeerVXLAN; w != nil && (v.Local == w.Local || v.Local.Is4() != w.Local.Is4()) {
				r.refuse(c.pos(key+".local"), fmt.Sprintf("local %s does not go with local %s of %s", v.Local, w.Local, o.Name), "give each host its own address, of one family")
			}
		}
	}
}

// withSpares refuses what knows of two nodes alone.
func withSpares(r *reader, c *Config) {
	if !c.Spares() {
		return
	}
	const fix = "name an arbiter of type etcd or file, or describe two nodes alone"
	switch c.Arbiter.Type {
	case ArbiterEtcd, ArbiterFile:
	case ArbiterExec:
		r.refuse(c.pos("arbiter.type"), "there are spare nodes, and the protocol of an exec command is for two nodes alone", fix)
	default:
		r.refuse(c.pos("arbiter"), "there are spare nodes, and without an arbiter none of them knows which other node transmits", fix)
	}
	if c.Migration.Unix != "" {
		r.refuse(c.pos("migration.unix"), "there are spare nodes, whose QEMUs cannot all wait at one socket", "remove migration.unix, which is for two QEMUs on one host")
	}
}

// guest checks how the guest is run and moved.
func (r *reader) guest(c *Config) {
	at := func(format string, a ...any) Pos { return c.pos(fmt.Sprintf(format, a...)) }
	m := &c.Migration
	if m.Port == m.NBDPort && m.Unix == "" {
		r.refuse(at("migration"), fmt.Sprintf("port and nbd_port are both %d", m.Port), "give each its own")
	}
	for _, n := range c.Nodes {
		if n.QMP == "" {
			continue // nothing migrates
		}
		for _, p := range []struct {
			key  string
			port uint16
		}{{"port", m.Port}, {"nbd_port", m.NBDPort}} {
			if p.port == n.Control.Port() && (p.key != "port" || m.Unix == "") {
				r.refuse(at("migration.%s", p.key), fmt.Sprintf("%s is %d, which %s uses for the control link", p.key, p.port, n.Name), "give each its own")
			}
		}
	}
	q, a := c.QEMU, &c.Nodes[0]
	if q == nil {
		return
	}
	if accel, _, _ := strings.Cut(q.Accel, ","); accel == "tcg" && strings.HasPrefix(q.CPU+",", "host,") {
		r.refuse(at("qemu.cpu"), "cpu host needs accel kvm", "write another CPU model, or remove the key for max")
	}
	if q.User != "" && m.Unix != "" {
		r.refuse(at("qemu.user"), "user does not go with migration.unix: the other QEMU may not use the socket", "remove migration.unix, which is for two QEMUs on one host, or user")
	}
	if q.Kernel == "" && q.Initrd != "" {
		r.refuse(at("qemu.initrd"), "initrd needs kernel", "name the kernel, or remove initrd")
	}
	if q.Kernel == "" && q.Append != "" {
		r.refuse(at("qemu.append"), "append needs kernel", "name the kernel, or remove append")
	}
	if nics := len(c.Nodes[0].NICs); len(q.MACs) != nics {
		r.refuse(at("qemu.macs"), fmt.Sprintf("macs has %s, and the guest has %s", count(len(q.MACs), "entry", "entries"), count(nics, "NIC", "NICs")), "give one per NIC, or remove the key")
	}
	for i := range a.NICs {
		most := a.NICs[i].Queues
		for _, b := range c.Nodes[1:] {
			x, y := a.NICs[i].Queues, b.NICs[i].Queues
			if x != y {
				r.refuse(at("nodes.%s.nics[%d]", b.Name, i), fmt.Sprintf("queues is %d, and %s has %d", y, a.Name, x), "the guest is the same on both: give both NICs as many")
			}
			most = max(most, y)
		}
		if x := most; x > 1 && !strings.HasPrefix(q.NICModel, "virtio-net") {
			r.refuse(at("qemu.nic_model"), fmt.Sprintf("a NIC of model %s has one queue, and nics[%d] asks for %d", q.NICModel, i, x), "use a virtio-net NIC, or remove queues")
		}
	}
	if len(q.Offloads) > 0 && !strings.HasPrefix(q.NICModel, "virtio-net") {
		r.refuse(at("qemu.offloads"), fmt.Sprintf("these are properties of a virtio-net NIC, and nic_model is %s", q.NICModel), "remove offloads, or use a virtio-net NIC")
	}
	for i, d := range q.Disks {
		if d.AIO == "native" && d.Cache != qemu.CacheNone && d.Cache != qemu.CacheDirectsync {
			r.refuse(at("qemu.disks[%d].aio", i), "aio native needs a disk that passes the host's page cache by", "write cache: none or cache: directsync, or aio: threads")
		}
		for j, o := range q.Disks[:i] {
			if d.ID == o.ID {
				r.refuse(at("qemu.disks[%d].id", i), fmt.Sprintf("id %q is already that of disks[%d]", d.ID, j), "give each disk its own")
			}
			if d.Image == o.Image {
				r.refuse(at("qemu.disks[%d].image", i), fmt.Sprintf("image %q is already that of disks[%d]", d.Image, j), "give each disk its own")
			}
		}
	}
}
