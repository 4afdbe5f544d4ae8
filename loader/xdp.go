// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"fmt"

	"github.com/cilium/ebpf/link"

	"github.com/lockstep-ft/lockstep/control/datapath"
)

// When to attach ls_peer_xdp.
const (
	XDPOff  = "off"
	XDPOn   = "on"   // or refuse to start
	XDPAuto = "auto" // where the driver runs XDP itself
)

// attachXDP attaches ls_peer_xdp to P's peer device, where it drops early what is not
// authentic, if the driver runs XDP itself: generic XDP would only copy frames. Not on
// S, whose programs rewrite frames with partial checksums, which XDP does not see.
// Nothing depends on it, so that of an earlier daemon is removed first.
func (p *programs) attachXDP(o *Options, pins pinFolder) error {
	pin := pins.link(peerXDP)
	if err := removePins(pin); err != nil {
		return err
	}
	if o.Role != Primary || o.XDP == XDPOff || o.XDP == "" {
		return nil
	}
	prog := datapath.Program{Name: peerXDP, Device: p.peer.Attrs().Name, Attach: "xdp-native"}
	l, err := link.AttachXDP(link.XDPOptions{Program: p.objs.LsPeerXdp, Interface: p.peer.Attrs().Index, Flags: link.XDPDriverMode})
	switch {
	case err != nil && o.XDP == XDPOn:
		return fmt.Errorf("attach %s to %s: %w; peer.xdp: auto goes on without it", peerXDP, prog.Device, err)
	case err != nil:
		p.log.Info("no native XDP on the peer device", "device", prog.Device, "err", err)
		prog.Attach = "none (no native XDP)"
	default:
		defer l.Close()
		if err := l.Pin(pin); err != nil {
			return fmt.Errorf("pin link of %s: %w", peerXDP, err)
		}
	}
	p.list = append(p.list, prog)
	return nil
}
