// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// CheckOrder implements [datapath.NIC].
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
	if tap {
		return intruder, tap, nil
	}
	front, err := n.inFront()
	if err != nil {
		return "", true, err
	}
	if front != "" {
		intruder, tap = front, true
	}
	return intruder, tap, nil
}

// inFront names what sees the tap's frames before tcx does and can pass them on. Who
// only reads is told of in the log, once.
func (n *NIC) inFront() (string, error) {
	tap, err := n.rt.LinkByIndex(n.tap.Attrs().Index)
	if err != nil {
		return "", fmt.Errorf("tap %s: %w", n.tap.Attrs().Name, err)
	}
	if x := foreignXDP(tap); x != "" {
		return x, nil
	}
	if n.noWatch {
		return "", nil
	}
	all, err := watchers(n.packets, tap.Attrs().Index, n.readers)
	if err != nil {
		return "", err
	}
	readers := make(map[string]int)
	for _, w := range all {
		if w.PassOn != "" {
			return w.passesOn(tap.Attrs().Name), nil
		}
		readers[w.inode] = w.pid
		if _, told := n.readers[w.inode]; !told {
			n.log.Warn(w.reads(tap.Attrs().Name))
		}
	}
	n.readers = readers
	return "", nil
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

// SetTap implements [datapath.NIC].
func (n *NIC) SetTap(up bool) error {
	set, how := n.rt.LinkSetDown, "down"
	if up {
		set, how = n.rt.LinkSetUp, "up"
	}
	if err := set(n.tap); err != nil {
		return fmt.Errorf("set tap %s %s: %w", n.tap.Attrs().Name, how, err)
	}
	return nil
}
