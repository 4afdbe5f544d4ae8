// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/journal"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qmp"
	"github.com/lockstep-ft/lockstep/control/state"
)

// replicator begins replication and ends it (P), or makes QEMU ready for a primary's (S).
type replicator struct {
	d        *Daemon
	cancel   context.CancelFunc // P: of the replication that begins; nil: none does
	syncing  qemu.Progress      // how far it is
	begun    time.Time          // P: when the last one did
	refused  string             // why replication does not begin, which somebody has to mend; "": nothing is known
	gaveUp   string             // why it was cancelled
	syncedOn *peerlink.Link     // the session in which it ended well
	tries    tries
	ending   bool   // P: QEMU is being ordered to go on alone
	unended  string // why it has not; "": it was not tried
	endAgain backoff

	imagesRetry backoff // P: of comparisons that could not be made

	points  points
	resyncs []string // what was copied to the secondary, of each disk

	sizing    sync.Mutex
	sizes     []int64        // of the disks; nil: not asked for yet
	hello     peerlink.Hello // P: of the session there is
	caps      qemu.Caps      // of this host's QEMU
	unfit     error          // why that cannot be part of a pair
	prepared  chan struct{}  // S: closed when QEMU waits for a primary's
	ready     bool           // S: that is so
	preparing bool           // S: QEMU is being made ready
	prepAgain backoff
	edgesOn   *peerlink.Link // P: the link on which the edges are sent
	edgesSent *peerlink.Link // P: and the one on which all were
}

// replicate has QEMU begin to replicate to S's (P).
func (re *replicator) replicate() error {
	if !re.d.failover.state.Replicated {
		return re.replicateFirst()
	}
	return re.replicateTo(true)
}

// replicateTo does it; resync: the disks are copied first.
func (re *replicator) replicateTo(resync bool) error {
	fo := re.d.failover
	if err := re.d.failover.remember(func(st *state.State) { st.Replicated = true }); err != nil {
		return err
	}
	peer := re.d.peer.link
	re.d.log.Info("replication begins", "to", fo.Peers.Migration, "disks", len(fo.Disks), "copy_disks", resync && len(fo.Disks) > 0)
	re.d.event(journal.Sync, "replication begins", map[string]any{"copy_disks": resync && len(fo.Disks) > 0})
	re.syncing, re.gaveUp, re.begun = qemu.Progress{}, "", time.Now()
	re.points, re.resyncs = points{kept: neverKept}, nil
	o := qemu.Options{Resync: resync, Since: re.hello.Point, Unstarted: re.d.guest.unstarted, Limits: fo.Limits, Progress: re.progress(),
		Copied: func(c qemu.Copied) { re.d.post(func() { re.copied(c) }) }}
	re.cancel = re.d.qmp.procedure("replicate", func(ctx context.Context, m *qmp.Monitor) error {
		caps, err := qemu.Probe(m)
		if err != nil {
			return err
		}
		if err := qemu.CheckNICs(m, len(re.d.nics)); err != nil {
			return err
		}
		return qemu.Replicate(ctx, m, caps, fo.Disks, fo.Peers, o)
	}, func(err error) {
		re.cancel, re.syncing = nil, qemu.Progress{}
		re.d.opt.Progress(qemu.Progress{})
		if err != nil {
			if re.gaveUp != "" {
				err = fmt.Errorf("%s (%w)", re.gaveUp, err)
			}
			re.tries.fail(err.Error())
			re.d.log.Error("replication did not begin", "err", err, "try", re.tries.failed, "next_in", re.tries.again.next)
			re.d.event(journal.Sync, "replication did not begin: "+err.Error(), map[string]any{"try": re.tries.failed, "next_in": re.tries.again.next.String()})
			if re.d.peer.link == peer {
				re.d.peer.send(peerlink.Dismiss{}) // S's QEMU has to wait anew
			}
		}
		if err == nil {
			re.syncedOn, re.d.qmp.info.clear = peer, false
			re.d.log.Info("the first checkpoint stops the guest for longer than those after it: it has all of the memory")
		}
		re.d.failover.step(failover.Event{Kind: failover.EvSynced, OK: err == nil})
		if re.d.peer.link != peer {
			re.paired() // there was one meanwhile
		}
	})
	return nil
}

// stopSync gives up the replication that begins, if one does.
func (re *replicator) stopSync(why string) {
	if re.cancel != nil {
		re.cancel()
		re.gaveUp = why
	}
}

// progress hands on how far something is, to whoever waits for it and to status.
func (re *replicator) progress() func(qemu.Progress) {
	var last time.Time
	return func(p qemu.Progress) {
		if time.Since(last) < progressEvery {
			return
		}
		last = time.Now()
		re.d.opt.Progress(p)
		re.d.post(func() { re.syncing = p })
	}
}

// progressEvery is between two reports of how far a replication is that begins.
const progressEvery = 200 * time.Millisecond

// paired gives the failover machine a session, once QEMU's mode is known (P).
func (re *replicator) paired() {
	fo := re.d.failover
	if fo == nil || fo.p == nil || !re.d.peer.linkUp || re.d.qmp.conn == nil {
		return // QMP's connection or the session comes
	}
	peer, mode := re.d.peer.link, ""
	re.d.qmp.procedure("ask for COLO's mode", func(_ context.Context, m *qmp.Monitor) (err error) {
		mode, err = m.COLO()
		return err
	}, func(err error) {
		if err != nil || re.d.peer.link != peer || !re.d.peer.linkUp {
			return
		}
		if fo.p.State() == failover.PrimaryPair && re.syncedOn == peer {
			return // the session in which the pair began, and only QMP's connection is new
		}
		ok := mode == "primary" && re.hello.COLO
		if re.mustWait(ok) {
			return
		}
		re.d.failover.step(failover.Event{Kind: failover.EvLinkUp, OK: ok})
		if fo.p.State() == failover.PrimaryPair && re.edgesOn != peer {
			re.sendEdges() // what was sent on the link before this one may be lost
		}
	})
}

// fitsQEMU is an error until this host's QEMU is connected, because what a session means
// depends on what that does, and unless the two QEMUs can be a pair (P). Of a pair that
// there was, and a QEMU that lives but cannot be reached, it is still what it was; were
// there no session, S would take over.
func (re *replicator) fitsQEMU(ctx context.Context, h *peerlink.Hello) error {
	var caps qemu.Caps
	var unfit error
	known := false
	if err := re.d.ask(ctx, func() {
		known = re.d.qmp.outOfReach && re.d.failover.p.State() == failover.PrimaryPair
		if re.d.qmp.conn != nil {
			caps, unfit = re.caps, re.unfit
		}
	}); err != nil || known {
		return err
	}
	switch {
	case unfit != nil:
		return fmt.Errorf("the primary's QEMU cannot replicate: %w", unfit)
	case caps.Machine == "":
		return errors.New("the primary's QEMU is not connected yet")
	case h.Machine == "":
		return nil // an older lockstep does not send it
	case re.d.failover.anyMachine:
		return nil
	}
	return qemu.SameMachine(caps, qemu.Caps{Version: h.QEMU, Machine: h.Machine})
}

// probe finds out what P's QEMU can do.
func (re *replicator) probe() {
	fo := re.d.failover
	if fo == nil || fo.p == nil {
		return
	}
	var caps qemu.Caps
	re.d.qmp.procedure("probe", func(_ context.Context, m *qmp.Monitor) (err error) {
		caps, err = qemu.Probe(m)
		return err
	}, func(err error) {
		if re.caps, re.unfit = caps, err; err != nil {
			re.d.log.Error("QEMU cannot replicate", "err", err)
		}
	})
}

// prepare makes S's QEMU ready for P's, after which S may connect.
func (re *replicator) prepare() {
	fo := re.d.failover
	if fo == nil || fo.s == nil || re.ready || re.preparing {
		return
	}
	re.preparing = true
	var caps qemu.Caps
	re.d.qmp.procedure("prepare", func(ctx context.Context, m *qmp.Monitor) (err error) {
		if caps, err = qemu.Probe(m); err != nil {
			return err
		}
		if err := qemu.CheckNICs(m, len(re.d.nics)); err != nil {
			return err
		}
		if fo.Begin.Anew { // an SVM that follows on is of no use
			if err := qemu.Waits(m); err != nil {
				return err
			}
		}
		return qemu.PrepareSecondary(ctx, m, caps, fo.Disks, fo.Own)
	}, func(err error) {
		if re.preparing = false; err == nil {
			re.ready, re.caps = true, caps
			close(re.prepared)
			return
		}
		wait, why := re.prepAgain.take(), "QEMU is not ready for a primary: "+err.Error()
		if !re.d.peer.linkUp && re.d.peer.linkErr != why {
			re.d.peer.linkErr = why
			re.d.log.Error("QEMU is not ready for a primary", "err", err, "again_in", wait)
		}
		time.AfterFunc(wait, func() { re.d.post(re.prepare) })
	})
}

// checkSizes refuses a secondary whose disks are not of the primary's sizes.
func checkSizes(disks []qemu.Disk, own, peer []int64) error {
	if len(own) != len(peer) {
		return fmt.Errorf("%d disks here, %d there", len(own), len(peer))
	}
	for i := range own {
		if own[i] != peer[i] {
			return fmt.Errorf("disk %s has %d bytes here and %d there: they must be of one size", disks[i].ID, own[i], peer[i])
		}
	}
	return nil
}

// diskSizes are those of this host's disks, which do not change while they are in use.
// Sessions are made on several goroutines.
func (re *replicator) diskSizes() ([]int64, error) {
	re.sizing.Lock()
	defer re.sizing.Unlock()
	if re.sizes == nil {
		spec := qemu.Spec{Guest: qemu.Guest{Disks: re.d.failover.Disks}}
		sizes, err := spec.DiskSizes()
		if err != nil {
			return nil, err
		}
		re.sizes = sizes
	}
	return re.sizes, nil
}
