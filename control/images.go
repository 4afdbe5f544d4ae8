// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"lockstep/control/api"
	"lockstep/control/failover"
	"lockstep/control/journal"
	"lockstep/control/qemu"
	"lockstep/control/qmp"
)

// FirstStart says what is done about the disks' contents before a guest replicates for
// the first time. Later they are always copied from the guest that speaks.
type FirstStart string

// What FirstStart may be. The zero value is FirstCompare.
const (
	FirstCompare FirstStart = "compare" // refuse a secondary whose images are not the same
	FirstCopy    FirstStart = "copy"    // copy the primary's images over the secondary's
	FirstTrust   FirstStart = "trust"   // the operator has copied them
)

// imagesRetry paces comparisons that could not be made. Images that differ are compared
// again only when a session begins: QEMU holds them open, so whoever mends them has to
// start it and its daemon anew.
var imagesRetry = backoff{first: 10 * time.Second, last: 10 * time.Minute}

// refusedError keeps a first replication from beginning until somebody does something.
type refusedError struct{ why string }

func (e *refusedError) Error() string { return e.why }

// replicateFirst has QEMU begin to replicate for the first time (P): a replica that was
// never the same must not count as one.
func (d *Daemon) replicateFirst() error {
	l := d.life
	if len(l.Disks) == 0 {
		return d.replicateTo(false)
	}
	peer := d.link
	d.refuse("")
	l.syncing = qemu.Progress{}
	told := d.progress()
	l.cancelSync = d.procedure("compare the images", func(ctx context.Context, m *qmp.Monitor) error {
		return d.imagesFit(ctx, m, told)
	}, func(err error) {
		l.cancelSync, l.syncing = nil, qemu.Progress{}
		d.opt.Progress(qemu.Progress{})
		if err == nil && d.link == peer && l.p.State() == failover.PrimarySync {
			if err := d.replicateTo(l.FirstStart == FirstCopy); err != nil {
				d.fatal = err
			}
			return
		}
		if refused := (*refusedError)(nil); errors.As(err, &refused) {
			d.refuse(refused.why)
		} else if err != nil && d.link == peer && !errors.Is(err, context.Canceled) {
			d.refuse("the images could not be compared: " + err.Error())
			d.tryImagesAgain(peer)
		}
		d.live(failover.Event{Kind: failover.EvSynced})
		if d.link != peer {
			d.paired() // there was one meanwhile
		}
	})
	return nil
}

// imagesFit finds out whether a first replication may begin.
func (d *Daemon) imagesFit(ctx context.Context, m *qmp.Monitor, progress func(qemu.Progress)) error {
	l := d.life
	again := fmt.Sprintf("set qemu.first_start: copy on %s and start its daemon again, which copies %s's images over %s's, whose content is lost", d.opt.Node, d.opt.Node, d.opt.Peer)
	runs := &refusedError{fmt.Sprintf("the guest runs already on %s and its images change, so that nobody can have copied them: %s", d.opt.Node, again)}
	running, _, err := m.Status()
	switch {
	case err != nil:
		return err
	case l.FirstStart == FirstCopy:
		what := fmt.Sprintf("first start: %s's images are copied over %s's: what %s's image holds is lost", d.opt.Node, d.opt.Peer, d.opt.Peer)
		d.log.Warn(what)
		d.event(journal.Sync, what, nil)
		return nil
	case running:
		return runs
	case l.FirstStart == FirstTrust:
		return nil
	}
	sizes, err := l.diskSizes()
	if err != nil {
		return err
	}
	d.log.Info("first start: both hosts' images are compared")
	socket := filepath.Join(filepath.Dir(d.opt.QMP), d.opt.VM+"-"+d.opt.Node+".nbd")
	err = qemu.CompareImages(ctx, m, l.Disks, sizes, l.Peers.NBD, socket, progress)
	var differ *qemu.DifferentError
	switch {
	case errors.Is(err, qemu.ErrRuns):
		return runs
	case errors.As(err, &differ):
		return &refusedError{fmt.Sprintf("disk %s: the images on %s and %s are not the same: byte %d is the first that differs; end both QEMUs and daemons, copy the image yourself and start them again; or %s",
			differ.Disk, d.opt.Node, d.opt.Peer, differ.Offset, again)}
	}
	return err
}

// refuse notes why replication does not begin, here and on S; "": it is tried (P).
func (d *Daemon) refuse(why string) {
	l := d.life
	if l.refused == "" && why == "" {
		return
	}
	d.noteRefused(why)
	d.send(message{Type: "refused", Cause: why})
}

// noteRefused is each side's share.
func (d *Daemon) noteRefused(why string) {
	d.life.refused = why
	if why != "" {
		d.log.Error("replication does not begin", "why", why)
		d.event(journal.Sync, "replication does not begin: "+why, nil)
	}
}

// tryImagesAgain compares again some time later, if that is still to be done.
func (d *Daemon) tryImagesAgain(peer *link) {
	again := d.life.imagesRetry
	d.work.Go(func() {
		if !again.wait(d.ctx) {
			return
		}
		d.post(func() {
			if d.life.imagesRetry = again; d.link == peer {
				d.paired()
			}
		})
	})
}

// statusOfImages adds why replication does not begin.
func (l *pairLife) statusOfImages(s *api.Status) {
	if s.Refused = l.refused; s.Refused == "" {
		return
	}
	if l.p == nil && l.s.State() <= failover.SecondaryPair {
		s.State = "start"
	}
	s.Detail = strings.TrimPrefix(s.Detail+"; "+s.Refused, "; ")
}
