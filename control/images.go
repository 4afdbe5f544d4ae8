// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/journal"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qmp"
)

// FirstStart is what is done about the disks' contents before a guest replicates for
// the first time. Later they are always copied from the guest that serves.
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
func (re *replicator) replicateFirst() error {
	fo := re.d.failover
	if len(fo.Disks) == 0 {
		return re.replicateTo(false)
	}
	peer := re.d.peer.link
	re.refuse("")
	re.syncing = qemu.Progress{}
	progress := re.progress()
	re.cancel = re.d.qmp.procedure("compare the images", func(ctx context.Context, m *qmp.Monitor) error {
		return re.imagesFit(ctx, m, progress)
	}, func(err error) {
		re.cancel, re.syncing = nil, qemu.Progress{}
		re.d.opt.Progress(qemu.Progress{})
		if err == nil && re.d.peer.link == peer && fo.p.State() == failover.PrimarySync {
			if err := re.replicateTo(fo.FirstStart == FirstCopy); err != nil {
				re.d.fatal = err
			}
			return
		}
		if refused := (*refusedError)(nil); errors.As(err, &refused) {
			re.refuse(refused.why)
		} else if err != nil && re.d.peer.link == peer && !errors.Is(err, context.Canceled) {
			re.refuse("the images could not be compared: " + err.Error())
			re.tryImagesAgain(peer)
		}
		re.d.failover.step(failover.Event{Kind: failover.EvSynced})
		if re.d.peer.link != peer {
			re.paired() // there was one meanwhile
		}
	})
	return nil
}

// imagesFit finds out whether a first replication may begin.
func (re *replicator) imagesFit(ctx context.Context, m *qmp.Monitor, progress func(qemu.Progress)) error {
	fo := re.d.failover
	again := fmt.Sprintf("set qemu.first_start: copy on %s and start its daemon again, which copies %s's images over %s's, whose content is lost", re.d.opt.Node, re.d.opt.Node, re.d.opt.Peer)
	runs := &refusedError{fmt.Sprintf("the guest runs already on %s and its images change, so that nobody can have copied them: %s", re.d.opt.Node, again)}
	running, _, err := m.Status()
	switch {
	case err != nil:
		return err
	case fo.FirstStart == FirstCopy:
		what := fmt.Sprintf("first start: %s's images are copied over %s's: what %s's image holds is lost", re.d.opt.Node, re.d.opt.Peer, re.d.opt.Peer)
		re.d.log.Warn(what)
		re.d.event(journal.Sync, what, nil)
		return nil
	case running:
		return runs
	case fo.FirstStart == FirstTrust && !fo.state.Alone:
		return nil
	}
	sizes, err := re.diskSizes()
	if err != nil {
		return err
	}
	re.d.log.Info("first start: both hosts' images are compared")
	socket := filepath.Join(filepath.Dir(re.d.opt.QMP), re.d.opt.VM+"-"+re.d.opt.Node+".nbd")
	err = qemu.CompareImages(ctx, m, fo.Disks, sizes, fo.Peers, socket, progress)
	var differ *qemu.DifferentError
	switch {
	case errors.Is(err, qemu.ErrRuns):
		return runs
	case errors.As(err, &differ):
		return &refusedError{fmt.Sprintf("disk %s: the images on %s and %s are not the same: byte %d is the first that differs; end both QEMUs and daemons, copy the image yourself and start them again; or %s",
			differ.Disk, re.d.opt.Node, re.d.opt.Peer, differ.Offset, again)}
	}
	return err
}

// refuse notes why replication does not begin, here and on S; "": it is tried (P).
func (re *replicator) refuse(why string) {
	if re.refused == "" && why == "" {
		return
	}
	re.noteRefused(why)
	re.d.peer.send(peerlink.Refused{Cause: why})
}

// noteRefused is each side's share.
func (re *replicator) noteRefused(why string) {
	re.refused = why
	if why != "" {
		re.d.log.Error("replication does not begin", "why", why)
		re.d.event(journal.Sync, "replication does not begin: "+why, nil)
	}
}

// tryImagesAgain compares again some time later, if that is still to be done.
func (re *replicator) tryImagesAgain(peer *peerlink.Link) {
	again := re.imagesRetry
	re.d.work.Go(func() {
		if !again.wait(re.d.ctx) {
			return
		}
		re.d.post(func() {
			if re.imagesRetry = again; re.d.peer.link == peer {
				re.paired()
			}
		})
	})
}

// statusOfImages adds why replication does not begin.
func (re *replicator) statusOfImages(s *api.Status) {
	if s.Refused = re.refused; s.Refused == "" {
		return
	}
	if re.d.failover.p == nil && re.d.failover.s.State() <= failover.SecondaryPair {
		s.State = "start"
	}
	s.Detail = strings.TrimPrefix(s.Detail+"; "+s.Refused, "; ")
}
