// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/control/datapath"
)

// programs are a role's programs at their attach points.
type programs struct {
	role      Role
	tap, peer netlink.Link
	objs      *bpf.LockstepObjects
	log       *slog.Logger
	attached  []attachedProgram
	list      []datapath.Program
}

// attachment is where a program belongs.
type attachment struct {
	prog   *ebpf.Program
	name   string
	dev    netlink.Link
	attach ebpf.AttachType
}

// attachedProgram is an attachment that was made.
type attachedProgram struct {
	attachment
	link link.Link
	id   link.ID
}

// The programs. Of a role's links that of its program at the tap's ingress, priOut or secOut, tells which
// tap is guarded.
const (
	priOut      = "ls_pri_out"
	digestRx    = "ls_digest_rx"
	mirror      = "ls_mirror"
	peerXDP     = "ls_peer_xdp"
	fastOrder   = "ls_fast_order"
	bucketOrder = "ls_bucket_order"
	secGate     = "ls_sec_gate"
	secOut      = "ls_sec_out"
	secIn       = "ls_sec_in"
)

// attachments are the role's programs, in the order in which they are attached.
func (p *programs) attachments() []attachment {
	if p.role == Secondary {
		return []attachment{
			{p.objs.LsSecGate, secGate, p.tap, ebpf.AttachTCXEgress},
			{p.objs.LsSecOut, secOut, p.tap, ebpf.AttachTCXIngress},
			{p.objs.LsSecIn, secIn, p.peer, ebpf.AttachTCXIngress},
		}
	}
	return []attachment{
		{p.objs.LsPriOut, priOut, p.tap, ebpf.AttachTCXIngress},
		{p.objs.LsDigestRx, digestRx, p.peer, ebpf.AttachTCXIngress},
		{p.objs.LsMirror, mirror, p.tap, ebpf.AttachTCXEgress},
	}
}

// attach attaches a program at the head of its chain and pins the link.
func (p *programs) attach(a attachment, pins pinFolder) error {
	l, err := link.AttachTCX(link.TCXOptions{
		Interface: a.dev.Attrs().Index, Program: a.prog, Attach: a.attach, Anchor: link.Head(),
	})
	if err != nil {
		return fmt.Errorf("attach %s to %s: %w", a.name, a.dev.Attrs().Name, err)
	}
	if err := p.add(a, l); err != nil {
		return err
	}
	if err := l.Pin(pins.link(a.name)); err != nil {
		return fmt.Errorf("pin link of %s: %w", a.name, err)
	}
	return nil
}

// replace updates the pinned link of a, so that its chain is never without one of
// the two programs. A link whose device is gone is made anew.
func (p *programs) replace(a attachment, pins pinFolder) error {
	pin := pins.link(a.name)
	at, err := deviceOf(pin)
	if err != nil {
		return err
	}
	if at != a.dev.Attrs().Index {
		// The peer device, then: tables of another tap are not recovered.
		if err := removePins(pin); err != nil {
			return err
		}
		return p.attach(a, pins)
	}
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return fmt.Errorf("pinned link %s: %w", pin, err)
	}
	if err := p.add(a, l); err != nil {
		return err
	}
	if err := l.Update(a.prog); err != nil {
		return fmt.Errorf("put the new %s in the old one's place: %w", a.name, err)
	}
	return nil
}

// add notes that the link l, which close closes, holds a.
func (p *programs) add(a attachment, l link.Link) error {
	d := attachedProgram{attachment: a, link: l}
	info, err := l.Info()
	if err == nil {
		d.id = info.ID
	}
	p.attached = append(p.attached, d)
	if err != nil {
		return fmt.Errorf("link of %s: %w", a.name, err)
	}
	p.list = append(p.list, datapath.Program{Name: a.name, Device: a.dev.Attrs().Name, Attach: hook(a.attach)})
	return nil
}

func hook(at ebpf.AttachType) string {
	if at == ebpf.AttachTCXEgress {
		return "tcx-egress"
	}
	return "tcx-ingress"
}

// Programs implements [datapath.NIC].
func (p *programs) Programs() []datapath.Program { return p.list }

func (p *programs) close() error {
	var errs []error
	for _, d := range p.attached {
		errs = append(errs, d.link.Close())
	}
	return errors.Join(errs...)
}

// refuseManaged refuses a tap that another lockstep's programs are attached to: each
// would hold what the other released.
func refuseManaged(tap netlink.Link, pins pinFolder) error {
	own, err := pinnedLinks(pins, pins.staging(), pins.leftover())
	if err != nil {
		return err
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
			if name := programName(p.ID); strings.HasPrefix(name, "ls_") {
				return fmt.Errorf("tap %s is already managed: program %s (id %d) of another lockstep is attached; stop that daemon and run `lockstep unload` for it",
					tap.Attrs().Name, name, p.ID)
			}
		}
	}
	return nil
}

// pinnedLinks are the links pinned in the folders.
func pinnedLinks(folders ...pinFolder) (map[link.ID]bool, error) {
	ids := make(map[link.ID]bool)
	for _, f := range folders {
		pins, _ := filepath.Glob(f.link("*"))
		for _, pin := range pins {
			l, err := link.LoadPinnedLink(pin, nil)
			if err != nil {
				return nil, fmt.Errorf("pinned link %s: %w", pin, err)
			}
			info, err := l.Info()
			l.Close()
			if err != nil {
				return nil, fmt.Errorf("pinned link %s: %w", pin, err)
			}
			ids[info.ID] = true
		}
	}
	return ids, nil
}

// programName is a program's name; "?": it is gone.
func programName(id ebpf.ProgramID) string {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return "?"
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return "?"
	}
	return info.Name
}
