// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"math"
	"net/netip"
	"path/filepath"
	"strings"

	"github.com/goccy/go-yaml/ast"
)

// Node is one of the hosts.
type Node struct {
	Name       string
	Control    netip.AddrPort // the control link's address on this host
	NICs       []NIC          // as many as the other node has, in the guest's order
	QMP        string         // socket of this host's QEMU; "": none
	GuestAgent string         // socket of the agent in this host's guest; "": none
	Starts     bool           // lockstep starts this host's QEMU, with its socket at QMP
}

// NIC is one guest NIC on one host. Exactly one of Peer's ways is set.
type NIC struct {
	Tap        string
	Bridge     string // lockstep makes the tap, where there is none, and puts it there; "": it is there
	PeerDevice string // an L2 device that exists
	PeerVXLAN  *VXLAN // or one that lockstep makes
	XDP        string // of the peer device's early filter: XDPAuto, XDPOn, XDPOff
	Queues     int    // pairs of queues of a QEMU that lockstep starts, the same on both hosts
	VHost      bool   // the kernel serves them
}

// Values of NIC.XDP.
const (
	XDPAuto = "auto" // where the device's driver runs it itself
	XDPOn   = "on"   // or do not start
	XDPOff  = "off"
)

// VXLAN is a peer link that lockstep makes.
type VXLAN struct {
	ID            uint32
	Port          uint16
	Local, Remote netip.Addr // Remote where there are no spares; see PeerVXLAN
	Underlay      string
	Turns         bool // of what PeerVXLAN returns: it leads to whichever node is the peer
}

// Device is the name of the device that lockstep makes.
func (v *VXLAN) Device() string { return fmt.Sprintf("lsx%d", v.ID) }

// maxNodes are the pair's and the spares.
const maxNodes = 4

func (r *reader) nodes(v value, c *Config) {
	kvs, ok := r.pairs(v)
	if !ok {
		return
	}
	if len(kvs) < 2 || len(kvs) > maxNodes {
		r.refuse(v.pos, fmt.Sprintf("nodes has %s, and a pair has two, with up to %d spares", count(len(kvs), "entry", "entries"), maxNodes-2), "")
		return
	}
	c.Nodes, r.spares = make([]Node, len(kvs)), len(kvs) > 2
	for i, kv := range kvs {
		n := &c.Nodes[i]
		r.checkName(kv.keyPos, kv.key, "a node's name")
		n.Name = kv.key
		r.mapping(kv.val, []field{
			{"control", "the daemons talk to each other there", r.addrPort(&n.Control)},
			{"nics", "it lists the guest's taps", func(v value) { r.nics(v, &n.NICs) }},
			{"qmp", "", monitor(r, &n.QMP)},
			{"guest_agent", "", r.socket(&n.GuestAgent)},
		})
	}
}

// monitor refuses libvirt's monitor of a domain, on which QEMU serves libvirt alone.
func monitor(r *reader, to *string) func(value) {
	return func(v value) {
		r.socket(to)(v)
		dir, file := filepath.Split(*to)
		own := file == "monitor.sock" && strings.HasPrefix(filepath.Base(dir), "domain-")
		if own || strings.HasPrefix(v.node.String(), "libvirt:") || strings.HasPrefix(v.node.String(), `"libvirt:`) {
			r.refuse(v.pos, "libvirt's connection to a domain is libvirt's alone, and is lost while libvirtd restarts", "give the domain a second monitor, and name its socket: docs/LIBVIRT.md")
		}
	}
}

func (r *reader) nics(v value, nics *[]NIC) {
	seq, ok := v.node.(*ast.SequenceNode)
	if !ok {
		r.wrongType(v, "a list like [{tap: tap0, peer: {device: eth1}}]")
		return
	}
	if len(seq.Values) == 0 || len(seq.Values) > maxNICs {
		r.refuse(v.pos, fmt.Sprintf("nics has %s, and a guest has 1 to %d", count(len(seq.Values), "entry", "entries"), maxNICs), "")
		return
	}
	for i, e := range seq.Values {
		nic := NIC{XDP: XDPAuto, Queues: 1}
		r.mapping(r.value(e, fmt.Sprintf("%s[%d]", v.path, i), v.pos), []field{
			{"tap", "it is the guest's device in this host", r.device(&nic.Tap)},
			{"bridge", "", r.device(&nic.Bridge)},
			{"queues", "", r.integer(&nic.Queues, 1, maxQueues)},
			{"vhost", "", r.boolean(&nic.VHost)},
			{"peer", "it is the link to the other host: {device: NAME} or {vxlan: {...}}", func(v value) { r.peer(v, &nic) }},
		})
		*nics = append(*nics, nic)
	}
}

func (r *reader) peer(v value, nic *NIC) {
	before := len(r.errs)
	r.mapping(v, []field{
		{"device", "", r.device(&nic.PeerDevice)},
		{"xdp", "", r.word(&nic.XDP, XDPAuto, XDPOn, XDPOff)},
		{"vxlan", "", func(v value) {
			x := &VXLAN{Port: DefaultVXLANPort}
			nic.PeerVXLAN = x
			var id, port = 0, int(x.Port)
			remote := "it is the other host's address on the underlay"
			if r.spares {
				remote = ""
			}
			r.mapping(v, []field{
				{"id", "it is the VXLAN network identifier, the same on both nodes", r.integer(&id, 1, 1<<24-1)},
				{"port", "", r.integer(&port, 1, math.MaxUint16)},
				{"local", "it is this host's address on the underlay", r.addr(&x.Local)},
				{"remote", remote, r.addr(&x.Remote)},
				{"underlay", "it is the device that carries the VXLAN", r.device(&x.Underlay)},
			})
			x.ID, x.Port = uint32(id), uint16(port)
		}},
	})
	if len(r.errs) > before {
		return
	}
	switch {
	case nic.PeerDevice == "" && nic.PeerVXLAN == nil:
		r.refuse(v.pos, "peer is empty", "write {device: NAME} or {vxlan: {...}}")
	case nic.PeerDevice != "" && nic.PeerVXLAN != nil:
		r.refuse(v.pos, "peer has both device and vxlan", "keep one of the two")
	}
}
