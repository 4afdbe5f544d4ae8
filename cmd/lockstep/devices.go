// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"log/slog"

	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader"
	"github.com/lockstep-ft/lockstep/loader/device"
)

func nicKey(n *config.Node, i int) string { return fmt.Sprintf("nodes.%s.nics[%d]", n.Name, i) }

// devices finds or makes the devices of all NICs before anything is attached to
// one: a NIC that cannot work must not leave the others shut.
func devices(k kernel, o runOptions) ([]loader.Options, error) {
	role := loader.Secondary
	if o.role == datapath.RolePrimary {
		role = loader.Primary
	}
	var nics []loader.Options
	for i, nic := range o.self.NICs {
		key := nicKey(o.self, i)
		if nic.Bridge != "" {
			if err := k.ensureTap(nic.Tap, nic.Bridge, nic.Queues); err != nil {
				return nil, notYetError{o.config.Refuse(key+".bridge", err.Error(), "")}
			}
		}
		tap, err := k.device(nic.Tap)
		if err != nil {
			return nil, notYetError{o.config.Refuse(key+".tap", fmt.Sprintf("there is no device %q: %v", nic.Tap, err),
				device.NoTap(nic.Tap, nic.Queues))}
		}
		if o.self.Starts {
			if err := k.checkQueues(nic.Tap, nic.Bridge, nic.Queues); err != nil {
				return nil, notYetError{o.config.Refuse(key+".tap", err.Error(), "")}
			}
		}
		peer := nic.PeerDevice
		if v := o.config.PeerVXLAN(o.self, o.other, i); v != nil {
			if peer, err = k.ensureVXLAN(v, tap.MTU); err != nil {
				return nil, notYetError{o.config.Refuse(key+".peer.vxlan.underlay", err.Error(), "")}
			}
		} else if _, err := k.device(peer); err != nil {
			return nil, notYetError{o.config.Refuse(key+".peer.device", fmt.Sprintf("there is no device %q: %v", peer, err),
				device.NoPeer)}
		}
		n := tables(o.config, o.self, i, o.log)
		n.Role, n.PeerDevice = role, peer
		nics = append(nics, n)
	}
	return nics, nil
}

// tables are what the programs and maps of a node's NIC are made with. Role and peer
// device, which only a daemon has, are left out.
func tables(c *config.Config, self *config.Node, nic int, log *slog.Logger) loader.Options {
	hash := c.Hash()
	o := loader.Options{
		PinDir: c.PinDir, VM: c.VM, Node: self.Name, NIC: nic, Tap: self.NICs[nic].Tap, XDP: self.NICs[nic].XDP,
		MaxConnections: c.Compare.MaxConnections, Slots: c.Compare.Slots, GSOSlots: c.Compare.GSOSlots, MPTCP: c.Compare.MPTCP,
		ConfigHash: hash, Version: versionString(), Log: log,
		Differ: func(pinned [32]byte, alone bool) []string {
			if alone { // no other node depends on the rest
				return config.DifferFixed(pinned, hash)
			}
			return config.Differ(pinned, hash)
		},
	}
	for _, r := range c.Compare.PrimaryOnly {
		o.Rules = append(o.Rules, loader.Rule(r))
	}
	return o
}
