// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"lockstep/control/datapath"
)

// attachment is where a program belongs.
type attachment struct {
	prog   *ebpf.Program
	name   string
	dev    netlink.Link
	attach ebpf.AttachType
}

// guard is an attachment that was made.
type guard struct {
	attachment
	link link.Link
	id   link.ID
}

// refuseManaged makes sure that no other lockstep guards the tap: two would
// each hold what the other released.
func refuseManaged(tap netlink.Link, dir string) error {
	own := make(map[link.ID]bool)
	var pins []string
	for _, d := range []string{dir, stagingDir(dir), leftDir(dir)} {
		in, _ := filepath.Glob(filepath.Join(d, linkPrefix+"*"))
		pins = append(pins, in...)
	}
	for _, pin := range pins {
		l, err := link.LoadPinnedLink(pin, nil)
		if err != nil {
			return fmt.Errorf("pinned link %s: %w", pin, err)
		}
		info, err := l.Info()
		l.Close()
		if err != nil {
			return fmt.Errorf("pinned link %s: %w", pin, err)
		}
		own[info.ID] = true
	}
	for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
		q, err := link.QueryPrograms(link.QueryOptions{Target: tap.Attrs().Index, Attach: at})
		if err != nil {
			return fmt.Errorf("query programs of %s: %w (tcx needs kernel 6.6)", tap.Attrs().Name, err)
		}
		for _, p := range q.Programs {
			if id, ok := p.LinkID(); ok && own[id] {
				continue
			}
			prog, err := ebpf.NewProgramFromID(p.ID)
			if err != nil {
				continue // gone meanwhile
			}
			info, err := prog.Info()
			prog.Close()
			if err == nil && strings.HasPrefix(info.Name, "ls_") {
				return fmt.Errorf("tap %s is already managed: program %s (id %d) of another lockstep is attached; stop that daemon and run `lockstep unload` for it",
					tap.Attrs().Name, info.Name, p.ID)
			}
		}
	}
	return nil
}

// attach attaches new programs, in front of those that may be there, and takes these
// away. solo: the guest speaks alone, and goes on to.
func (n *NIC) attach(role Role, dir string, solo bool) error {
	// What a daemon pinned that failed half-way may be all that guards the tap.
	staging, left := stagingDir(dir), leftDir(dir)
	if err := os.Rename(staging, left); err != nil && !errors.Is(err, os.ErrNotExist) {
		if err := removePins(staging); err != nil { // left holds the older ones
			return err
		}
	}
	if err := os.MkdirAll(staging, 0o700); err != nil {
		return fmt.Errorf("create pin folder: %w", err)
	}
	for name, m := range n.maps {
		if err := m.Pin(filepath.Join(staging, name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	for _, a := range n.attachments(role) {
		if err := n.guard(a, staging); err != nil {
			return err
		}
	}
	// The new programs guard already; the old ones go with their pins.
	for _, old := range []string{dir, left} {
		if err := removePins(old); err != nil {
			return err
		}
	}
	if solo { // not before: two would translate
		atomic.StoreUint32(&n.conf.Mode, uint32(datapath.ModeSolo))
	}
	if err := os.Rename(staging, dir); err != nil {
		return fmt.Errorf("put pins in place: %w", err)
	}
	return nil
}

// attachments are a role's programs, where they belong, in the order in which they
// are attached.
func (n *NIC) attachments(role Role) []attachment {
	if role == Secondary {
		return []attachment{
			{n.objs.LsSecGate, "ls_sec_gate", n.tap, ebpf.AttachTCXEgress},
			{n.objs.LsSecOut, secOut, n.tap, ebpf.AttachTCXIngress},
			{n.objs.LsSecIn, "ls_sec_in", n.peer, ebpf.AttachTCXIngress},
		}
	}
	return []attachment{
		{n.objs.LsPriOut, priOut, n.tap, ebpf.AttachTCXIngress},
		{n.objs.LsDigestRx, "ls_digest_rx", n.peer, ebpf.AttachTCXIngress},
		{n.objs.LsMirror, "ls_mirror", n.tap, ebpf.AttachTCXEgress},
	}
}

// The programs at the tap's ingress: where their links are, the guest is.
const (
	priOut = "ls_pri_out"
	secOut = "ls_sec_out"
)

// guard attaches a program at the head of its chain and pins the link in dir.
func (n *NIC) guard(a attachment, dir string) error {
	l, err := link.AttachTCX(link.TCXOptions{
		Interface: a.dev.Attrs().Index, Program: a.prog, Attach: a.attach, Anchor: link.Head(),
	})
	if err != nil {
		return fmt.Errorf("attach %s to %s: %w", a.name, a.dev.Attrs().Name, err)
	}
	if err := n.guarded(a, l); err != nil {
		return err
	}
	if err := l.Pin(filepath.Join(dir, linkPrefix+a.name)); err != nil {
		return fmt.Errorf("pin link of %s: %w", a.name, err)
	}
	return nil
}

// guarded notes that the link l, which Close closes, holds a in its place.
func (n *NIC) guarded(a attachment, l link.Link) error {
	g := guard{attachment: a, link: l}
	info, err := l.Info()
	if err == nil {
		g.id = info.ID
	}
	n.guards = append(n.guards, g)
	if err != nil {
		return fmt.Errorf("link of %s: %w", a.name, err)
	}
	n.programs = append(n.programs, datapath.Program{Name: a.name, Device: a.dev.Attrs().Name, Attach: hook(a.attach)})
	return nil
}

func hook(at ebpf.AttachType) string {
	if at == ebpf.AttachTCXEgress {
		return "tcx-egress"
	}
	return "tcx-ingress"
}

// replace updates the pinned link of a, so that its chain is never without one of
// the two programs. A link whose device is gone is made anew.
func (n *NIC) replace(a attachment, dir string) error {
	pin := filepath.Join(dir, linkPrefix+a.name)
	at, err := deviceOf(pin)
	if err != nil {
		return err
	}
	if at != a.dev.Attrs().Index {
		// The peer device, then: another tap never comes here.
		if err := removePins(pin); err != nil {
			return err
		}
		return n.guard(a, dir)
	}
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return fmt.Errorf("pinned link %s: %w", pin, err)
	}
	if err := n.guarded(a, l); err != nil {
		return err
	}
	if err := l.Update(a.prog); err != nil {
		return fmt.Errorf("put the new %s in the old one's place: %w", a.name, err)
	}
	return nil
}
