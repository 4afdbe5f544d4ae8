// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// chainGuard finds out who receives the guest's frames before lockstep's programs do.
type chainGuard struct {
	programs *programs
	log      *slog.Logger
	// Kept open: the check works without free descriptors, too.
	rt      *netlink.Handle
	packets *os.File
	readers map[string]int // packet sockets on the tap that were logged: process by inode
	noWatch bool           // a mutation, only tests set it: packet sockets are not looked for
}

func newChainGuard(p *programs, log *slog.Logger) (*chainGuard, error) {
	rt, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	packets, err := openPackets()
	if err != nil {
		rt.Close()
		return nil, err
	}
	return &chainGuard{programs: p, log: log, rt: rt, packets: packets}, nil
}

func (c *chainGuard) close() error {
	c.rt.Close()
	return c.packets.Close()
}

// CheckOrder implements [datapath.NIC].
func (c *chainGuard) CheckOrder() (intruder string, tap bool, err error) {
	for _, a := range c.programs.attached {
		what, err := inFrontOf(&a)
		if err != nil {
			return "", true, err
		}
		if what == "" {
			continue
		}
		if onTap := a.dev.Attrs().Index == c.programs.tap.Attrs().Index; intruder == "" || onTap && !tap {
			intruder, tap = what, onTap
		}
	}
	if tap {
		return intruder, tap, nil
	}
	front, err := c.beforeTCX()
	if err != nil {
		return "", true, err
	}
	if front != "" {
		intruder, tap = front, true
	}
	return intruder, tap, nil
}

// inFrontOf names the program in front of a in its chain, or says that a is not
// attached; "": a is the first.
func inFrontOf(a *attachedProgram) (string, error) {
	dev := a.dev.Attrs()
	q, err := link.QueryPrograms(link.QueryOptions{Target: dev.Index, Attach: a.attach})
	if err != nil {
		return "", fmt.Errorf("query programs of %s: %w", dev.Name, err)
	}
	for i, p := range q.Programs {
		if id, ok := p.LinkID(); !ok || id != a.id {
			continue
		}
		if i == 0 {
			return "", nil
		}
		first := q.Programs[0].ID
		return fmt.Sprintf("program %s (id %d) is in front of %s on %s (%s)", programName(first), first, a.name, dev.Name, hook(a.attach)), nil
	}
	return fmt.Sprintf("%s is not attached to %s any more", a.name, dev.Name), nil
}

// beforeTCX names what receives the tap's frames before tcx does and can pass them on.
// What can only read them is logged, once.
func (c *chainGuard) beforeTCX() (string, error) {
	tap, err := c.rt.LinkByIndex(c.programs.tap.Attrs().Index)
	if err != nil {
		return "", fmt.Errorf("tap %s: %w", c.programs.tap.Attrs().Name, err)
	}
	if x := foreignXDP(tap); x != "" {
		return x, nil
	}
	if c.noWatch {
		return "", nil
	}
	all, err := watchers(c.packets, tap.Attrs().Index, c.readers)
	if err != nil {
		return "", err
	}
	readers := make(map[string]int)
	for _, w := range all {
		if w.passOnBy != "" {
			return w.passesOn(tap.Attrs().Name), nil
		}
		readers[w.inode] = w.pid
		if _, logged := c.readers[w.inode]; !logged {
			c.log.Warn(w.reads(tap.Attrs().Name))
		}
	}
	c.readers = readers
	return "", nil
}

// SetTap implements [datapath.NIC].
func (c *chainGuard) SetTap(up bool) error {
	set, how := c.rt.LinkSetDown, "down"
	if up {
		set, how = c.rt.LinkSetUp, "up"
	}
	tap := c.programs.tap
	if err := set(tap); err != nil {
		return fmt.Errorf("set tap %s %s: %w", tap.Attrs().Name, how, err)
	}
	return nil
}
