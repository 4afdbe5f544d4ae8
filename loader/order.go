// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
)

// CheckOrder implements [control.DataPath].
func (n *NIC) CheckOrder() (intruder string, tap bool, err error) {
	for _, g := range n.guards {
		dev := g.dev.Attrs()
		q, err := link.QueryPrograms(link.QueryOptions{Target: dev.Index, Attach: g.attach})
		if err != nil {
			return "", true, fmt.Errorf("query programs of %s: %w", dev.Name, err)
		}
		what := fmt.Sprintf("%s is not attached to %s any more", g.name, dev.Name)
		for i, p := range q.Programs {
			if id, ok := p.LinkID(); ok && id == g.id {
				if i == 0 {
					what = ""
				} else {
					first := q.Programs[0].ID
					what = fmt.Sprintf("program %s (id %d) is in front of %s on %s (%s)", programName(first), first, g.name, dev.Name, hook(g.attach))
				}
				break
			}
		}
		if what == "" {
			continue
		}
		if onTap := dev.Index == n.tap.Attrs().Index; intruder == "" || onTap && !tap {
			intruder, tap = what, onTap
		}
	}
	return intruder, tap, nil
}

func programName(id ebpf.ProgramID) string {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return "?" // gone meanwhile
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return "?"
	}
	return info.Name
}

// SetTap implements [control.DataPath].
func (n *NIC) SetTap(up bool) error {
	set, how := netlink.LinkSetDown, "down"
	if up {
		set, how = netlink.LinkSetUp, "up"
	}
	if err := set(n.tap); err != nil {
		return fmt.Errorf("set tap %s %s: %w", n.tap.Attrs().Name, how, err)
	}
	return nil
}
