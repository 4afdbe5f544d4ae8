// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"lockstep/control/config"
)

func nicKey(n *config.Node, i int) string { return fmt.Sprintf("nodes.%s.nics[%d]", n.Name, i) }

// devices finds or makes the devices of all NICs before anything is attached to
// one: a NIC that cannot work must not leave the others shut.
func devices(k kernel, o runOptions) ([]nicOptions, error) {
	var nics []nicOptions
	for i, nic := range o.self.NICs {
		key := nicKey(o.self, i)
		if nic.Bridge != "" {
			if err := k.ensureTap(nic.Tap, nic.Bridge); err != nil {
				return nil, notYetError{o.config.Refuse(key+".bridge", err.Error(), "")}
			}
		}
		tap, err := k.device(nic.Tap)
		if err != nil {
			return nil, notYetError{o.config.Refuse(key+".tap", fmt.Sprintf("there is no device %q: %v", nic.Tap, err),
				fmt.Sprintf("make it first, with `ip tuntap add dev %s mode tap`, or name the bridge that it is to be in: then lockstep makes it", nic.Tap))}
		}
		peer := nic.PeerDevice
		if v := nic.PeerVXLAN; v != nil {
			if peer, err = k.ensureVXLAN(v, tap.MTU); err != nil {
				return nil, notYetError{o.config.Refuse(key+".peer.vxlan.underlay", err.Error(), "")}
			}
		} else if _, err := k.device(peer); err != nil {
			return nil, notYetError{o.config.Refuse(key+".peer.device", fmt.Sprintf("there is no device %q: %v", peer, err),
				"make it first, or have lockstep make a VXLAN: peer: {vxlan: {...}}")}
		}
		nics = append(nics, nicOptions{
			pinDir: o.config.PinDir, vm: o.config.VM, node: o.self.Name, index: i,
			primary: o.primary, tap: nic.Tap, peer: peer, compare: o.config.Compare,
			rules: o.config.Compare.PrimaryOnly, xdp: nic.XDP, hash: o.config.Hash(), log: o.log,
		})
	}
	return nics, nil
}
