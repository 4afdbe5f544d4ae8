// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"math"
	"time"

	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/journal"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qmp"
	"github.com/lockstep-ft/lockstep/control/replica"
)

// A secondary that comes back gets only what its images lack (R29). P's QEMU records what
// is written since a point; S notes the point once its images hold, durably, all that was
// written before it. Every checkpoint stops the guest, and there QEMU flushes the disks on
// both hosts. So what was written before a point is durable on S at the commit of a
// checkpoint that began after it, unless a flush failed. That is reported up to a second
// late, and ends the pair: the commit of one more checkpoint shows that it did not.

const (
	// pointEvery is between two points: what lies that far back may be copied in vain.
	pointEvery = int64(10 * time.Second)
	// flushReport is more than QEMU takes to report a flush that failed.
	flushReport = int64(2 * time.Second)
)

// points are a primary's.
type points struct {
	next    string // is recorded, and not yet given to S; "": none
	nextAt  int64  // since when, at the latest
	flushed int64  // when the first checkpoint behind it was committed; 0: none was
	given   string // S notes it; "": none
	kept    int64  // when S noted the last one
	busy    bool   // QEMU is asked for a new one

	early bool // mutation, only tests set it: a point counts before anything is flushed
}

// committed takes a commit of a checkpoint that began at began. make: a new point is
// wanted. give: S may note this one; "": none.
func (p *points) committed(now, began int64) (make bool, give string) {
	switch {
	case p.busy || p.given != "":
	case p.next == "":
		return now-p.kept >= pointEvery, ""
	case p.early:
		give = p.next
	case p.flushed == 0:
		if began > p.nextAt {
			p.flushed = now
		}
	case began > p.flushed+flushReport:
		give = p.next
	}
	if give != "" {
		p.given, p.next, p.flushed = give, "", 0
	}
	return false, give
}

// made: a point is recorded since now.
func (p *points) made(now int64, point string) {
	p.next, p.nextAt, p.flushed, p.busy = point, now, 0, false
}

// noted: S has; false: that was not the one.
func (p *points) noted(now int64, point string) bool {
	if point == "" || point != p.given {
		return false
	}
	p.given, p.kept = "", now
	return true
}

// lost: what S was given may not have reached it.
func (p *points) lost() {
	if p.given != "" {
		p.next, p.given, p.flushed = p.given, "", 0
	}
}

// openNote is the note of what this host's images are; nil: somebody else starts QEMU.
func openNote(o *Failover) *replica.Note {
	if o.Guest == nil {
		return nil
	}
	var images []string
	for i := range o.Disks {
		images = append(images, o.Disks[i].Image)
	}
	return replica.Open(o.Store.Note(), images)
}

// pointsCommitted follows a commit (P).
func (re *replicator) pointsCommitted(began int64) {
	fo := re.d.failover
	if fo == nil || fo.p == nil || fo.p.State() != failover.PrimaryPair || len(fo.Disks) == 0 || !re.hello.Notes {
		return
	}
	add, give := re.points.committed(re.d.now(), began)
	if give != "" {
		re.d.peer.send(peerlink.Replica{Point: give})
	}
	if !add {
		return
	}
	re.points.busy = true
	point, peer := qemu.NewPoint(time.Now()), re.d.peer.link
	re.d.qmp.procedure("begin to record what is written", func(_ context.Context, m *qmp.Monitor) error {
		return qemu.AddPoint(m, fo.Disks, point)
	}, func(err error) {
		if err != nil {
			re.d.log.Warn("what is written is not recorded anew: a secondary that comes back may get more than it lacks", "err", err)
			re.points.busy = false
			return
		}
		if re.d.peer.link == peer && fo.p.State() == failover.PrimaryPair {
			re.points.made(re.d.now(), point)
		}
	})
}

// kept: S has noted a point, and no earlier one is needed (P).
func (re *replicator) kept(point string) {
	if !re.points.noted(re.d.now(), point) {
		return
	}
	disks := re.d.failover.Disks
	re.points.busy = true // or a new one might be removed
	re.d.qmp.procedure("forget what was written", func(_ context.Context, m *qmp.Monitor) error {
		return qemu.KeepPoints(m, disks, point)
	}, func(err error) {
		re.points.busy = false
		if err != nil {
			re.d.log.Warn("what was written before the last point is still recorded", "err", err)
		}
	})
}

// copied reports what was copied to S (P).
func (re *replicator) copied(c qemu.Copied) {
	re.d.log.Info(c.String())
	re.d.event(journal.Sync, c.String(), map[string]any{"disk": c.Disk, "bytes": c.Bytes, "size": c.Size})
	re.resyncs = append(re.resyncs, c.String())
}

// noteReplica notes what S's images are (S).
func (re *replicator) noteReplica(point string) {
	fo, peer := re.d.failover, re.d.peer.link
	if fo.note == nil || fo.s.State() != failover.SecondaryPair {
		return
	}
	re.d.work.Go(func() {
		err := fo.note.Save(point)
		re.d.post(func() {
			if err != nil {
				re.d.log.Warn("what this host's images are is not noted: should it come back, they are copied whole", "err", err)
			} else if re.d.peer.link == peer {
				re.d.peer.send(peerlink.Kept{Point: point})
			}
		})
	})
}

// touchNote has the note's time follow QEMU's, until ctx ends (S).
func (re *replicator) touchNote(ctx context.Context) {
	tick := time.NewTicker(replica.TouchEvery)
	defer tick.Stop()
	for {
		has := false
		if err := re.d.ask(ctx, func() { has = re.d.qmp.conn != nil }); err != nil {
			return
		}
		if has { // without a QEMU anybody may write to the images
			if err := re.d.failover.note.Touch(); err != nil {
				re.d.log.Warn("the note of what this host's images are", "err", err)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// neverKept is before any point was.
const neverKept = math.MinInt64 / 2
