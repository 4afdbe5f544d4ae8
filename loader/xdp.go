// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"fmt"
	"path/filepath"

	"github.com/cilium/ebpf/link"

	"lockstep/control/datapath"
)

const peerXDP = "ls_peer_xdp"

// When to attach ls_peer_xdp.
const (
	XDPOff  = "off"
	XDPOn   = "on"   // or refuse to start
	XDPAuto = "auto" // where the driver runs XDP itself
)

// attachXDP has XDP drop early what is not authentic on P's peer device, where its
// driver runs XDP itself: the generic one would only copy frames. On S it would
// stand before a path that rewrites frames whose partial checksums it does not see.
// Nothing depends on it, so an earlier daemon's is taken away first.
func (n *NIC) attachXDP(o Options, dir string) error {
	pin := filepath.Join(dir, linkPrefix+peerXDP)
	if err := removePins(pin); err != nil {
		return err
	}
	if o.Role != Primary || o.XDP == XDPOff || o.XDP == "" {
		return nil
	}
	p := datapath.Program{Name: peerXDP, Device: n.peer.Attrs().Name, Attach: "xdp-native"}
	l, err := link.AttachXDP(link.XDPOptions{Program: n.objs.LsPeerXdp, Interface: n.peer.Attrs().Index, Flags: link.XDPDriverMode})
	switch {
	case err != nil && o.XDP == XDPOn:
		return fmt.Errorf("attach %s to %s: %w; peer.xdp: auto goes on without it", peerXDP, p.Device, err)
	case err != nil:
		n.log.Info("no native XDP on the peer device", "device", p.Device, "err", err)
		p.Attach = "none (no native XDP)"
	default:
		defer l.Close()
		if err := l.Pin(pin); err != nil {
			return fmt.Errorf("pin link of %s: %w", peerXDP, err)
		}
	}
	n.programs = append(n.programs, p)
	return nil
}
