// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/journal"
	"github.com/lockstep-ft/lockstep/control/nicloop"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/qemu"
)

// A secondary's overlays hold what the guests wrote since the last checkpoint, which
// empties them. S watches the room that they have, and asks P for a checkpoint in time:
// full overlays stop the SVM, or lose what the PVM wrote.

// overlayRoom knows how much room there is for overlays.
type overlayRoom struct {
	d        *Daemon
	overlays []api.OverlayStatus // the secondary's
	own      []api.OverlayStatus // P: those that are not merged yet
	pause    *backoff            // S: before the next one may begin; nil: at once
}

const (
	overlayEvery  = 250 * time.Millisecond // between two looks at the room
	overlayReport = time.Second            // between two reports to P
	// overlayAhead is how long the room has to last for a checkpoint to come in time:
	// one under way may fail first.
	overlayAhead = 3 * time.Second
	// overlayFull is a room in which QEMU may find no place for what it has to write next.
	overlayFull = 1 << 20
	// overlayForget is how long after its end a trouble is reported.
	overlayForget = 10 * time.Minute
)

// overlayWatch estimates how long the overlays' room lasts.
type overlayWatch struct {
	node  string
	at    int64 // boottime ns of the last sample; 0: none
	used  map[string]int64
	rate  map[string]float64
	asked map[string]int64
	least map[string]int64 // ever used: of empty overlays

	never bool // mutation, only tests set it: nothing is asked for
}

// sample takes in what is there now. ask: a checkpoint is wanted, because of the
// overlay_dir it names.
func (w *overlayWatch) sample(now int64, spaces []qemu.OverlaySpace) (all []api.OverlayStatus, ask string) {
	if w.used == nil {
		w.used, w.rate, w.asked, w.least = make(map[string]int64), make(map[string]float64), make(map[string]int64), make(map[string]int64)
	}
	dt := float64(now-w.at) / 1e9
	for _, o := range spaces {
		before, known := w.used[o.Dir]
		w.used[o.Dir] = o.Used
		switch grown := float64(o.Used - before); {
		case !known || dt <= 0:
		case grown < 0: // emptied: what was written meanwhile is not known
			delete(w.asked, o.Dir)
		default:
			// Bursts are believed soon and forgotten slowly.
			settle := 5.0
			if grown/dt > w.rate[o.Dir] {
				settle = 0.5
			}
			w.rate[o.Dir] += (grown/dt - w.rate[o.Dir]) * (1 - math.Exp(-dt/settle))
		}
		s := api.OverlayStatus{Node: w.node, Dir: o.Dir, Disks: o.Disks, UsedBytes: o.Used, FreeBytes: o.Free, BytesPerSecond: math.Round(w.rate[o.Dir])}
		lasts := math.Inf(1)
		if s.BytesPerSecond > 0 {
			lasts = float64(o.Free) / s.BytesPerSecond
			s.LastsSeconds = &lasts
		}
		all = append(all, s)
		if least, known := w.least[o.Dir]; !known || o.Used < least {
			w.least[o.Dir] = o.Used
		}
		// Where somebody else has taken the room, a checkpoint frees next to nothing.
		frees := o.Used - w.least[o.Dir]
		worth := frees >= max(overlayFull, (frees+o.Free)/10)
		low := o.Free < (frees+o.Free)/4 || lasts < overlayAhead.Seconds()
		if asked, before := w.asked[o.Dir]; worth && low && !w.never && (!before || now-asked >= int64(time.Second)) {
			w.asked[o.Dir] = now
			ask = o.Dir
		}
	}
	w.at = now
	return all, ask
}

// Setback is what a node remembers of secondaries whose overlays found no room: one after
// the other may end so, and each copies the disks anew.
type Setback struct {
	dir, why string // "": there was none, or long ago
	at       time.Time
	pause    backoff
}

// note takes in a trouble, and returns how long to wait before the next secondary begins.
func (s *Setback) note(dir, why string) *backoff {
	if s.why == "" {
		s.pause = backoff{first: time.Second, last: 5 * time.Minute}
	}
	s.dir, s.why, s.at = dir, why, time.Now()
	return &s.pause
}

// trouble is what there is to report of a folder.
func (s *Setback) trouble(dir string) string {
	if s.dir != dir {
		return ""
	}
	return s.why
}

// watchOverlays looks at this host's overlays now and then, until ctx ends.
func (ov *overlayRoom) watchOverlays(ctx context.Context) {
	tick := time.NewTicker(overlayEvery)
	defer tick.Stop()
	watch := overlayWatch{node: ov.d.opt.Node}
	var reported int64
	failed := ""
	for {
		spaces, err := ov.d.failover.Guest.Overlays()
		if err != nil {
			if why := err.Error(); failed != why {
				failed = why
				ov.d.log.Warn("the room of the overlays is not known", "err", err)
			}
		} else {
			now := ov.d.now()
			all, ask := watch.sample(now, spaces)
			report := ask != "" || now-reported >= int64(overlayReport)
			if report {
				reported = now
			}
			ov.d.post(func() { ov.overlaysAre(all, ask, report) })
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// overlaysAre takes what was seen of the overlays, and reports it to P (S). A host that took over
// has them until they are merged, and no checkpoint empties them.
func (ov *overlayRoom) overlaysAre(all []api.OverlayStatus, ask string, report bool) {
	fo := ov.d.failover
	if fo.p != nil {
		if ov.own = nil; fo.state.Unmerged {
			ov.own = all
		}
		return
	}
	if fo.s.Covered() && time.Since(fo.Setback.at) > overlayForget {
		fo.Setback.why = ""
	}
	for i := range all {
		all[i].Trouble = fo.Setback.trouble(all[i].Dir)
	}
	ov.overlays = all
	if ov.d.qmp.info.state == "io-error" {
		ov.outOfRoom("") // the event may have come while nobody listened
	}
	if !report || !ov.d.peer.linkUp {
		return
	}
	m := peerlink.Overlays{All: all}
	if ask != "" {
		m.Cause = fmt.Sprintf("%s's overlay_dir %s is filling up", ov.d.opt.Node, ask)
		ov.d.log.Info("a checkpoint is asked for", "cause", m.Cause, "overlays", describeOverlays(all))
	}
	ov.d.peer.send(m)
}

// peersOverlays takes what overlaysAre reports (P).
func (ov *overlayRoom) peersOverlays(m peerlink.Overlays) {
	fo := ov.d.failover
	for _, o := range m.All {
		known := slices.ContainsFunc(ov.overlays, func(k api.OverlayStatus) bool { return k.Trouble == o.Trouble })
		if o.Trouble != "" && !known {
			ov.d.log.Error("the secondary has no room", "why", o.Trouble)
			ov.d.event(journal.Disk, o.Trouble, nil)
		}
	}
	ov.overlays = m.All
	if m.Cause != "" && fo.p.State() == failover.PrimaryPair {
		ov.d.checkpoints.want(nicloop.Request{At: time.Now(), NIC: -1, Reason: m.Cause})
	}
}

func describeOverlays(all []api.OverlayStatus) string {
	var words []string
	for i := range all {
		words = append(words, all[i].String())
	}
	return strings.Join(words, "; ")
}

// noRoom notes that a secondary's overlays find none (S).
func (ov *overlayRoom) noRoom(dir, why string) *backoff {
	why = ov.d.opt.Node + ": " + why
	ov.d.log.Error("the secondary has no room", "why", why)
	ov.d.event(journal.Disk, why, nil)
	return ov.d.failover.Setback.note(dir, why)
}

// outOfRoom ends a secondary whose guest stopped because a write of it found no room: at
// once, because nothing leaves P until it goes alone. Where P is gone, the secondary is all
// there is, and the write is tried again once it has taken over. disk is "" where it is not
// known.
func (ov *overlayRoom) outOfRoom(disk string) {
	fo := ov.d.failover
	if fo == nil || fo.s == nil || fo.s.State() > failover.SecondaryPair && fo.s.State() != failover.SecondaryFenced {
		return // on a host that takes over or transmits it is the guest that counts
	}
	if ov.noteFull(disk) {
		ov.d.failover.step(failover.Event{Kind: failover.EvGuestFailed})
	}
}

// noteFull reports whether an overlay_dir is full, to the caller and to P (S).
func (ov *overlayRoom) noteFull(disk string) bool {
	fo := ov.d.failover
	if fo.Guest == nil || ov.pause != nil {
		return false
	}
	spaces, err := fo.Guest.Overlays()
	if err != nil {
		ov.d.log.Warn("the room of the overlays is not known", "err", err)
		return false
	}
	for _, o := range spaces {
		if o.Free >= overlayFull || disk != "" && !slices.Contains(o.Disks, disk) {
			continue
		}
		full := qemu.OverlayError{Dir: o.Dir, Disks: o.Disks, Why: fmt.Sprintf("it is full, and the secondary came to its end; its overlays had %.1f MiB", float64(o.Used)/(1<<20))}
		ov.pause = ov.noRoom(o.Dir, full.Error())
		all, _ := new(overlayWatch).sample(ov.d.now(), spaces)
		for i := range all {
			all[i].Node, all[i].Trouble = ov.d.opt.Node, fo.Setback.trouble(all[i].Dir)
		}
		ov.overlays = all
		ov.d.peer.send(peerlink.Overlays{All: all})
		return true
	}
	return false
}

// statusOfOverlays adds what is known of the secondary's overlays.
func (ov *overlayRoom) statusOfOverlays(s *api.Status) {
	s.Overlays = append(s.Overlays, ov.own...)
	for _, o := range ov.overlays {
		if ov.d.failover.p == nil || s.Peer.Connected || o.Trouble != "" {
			s.Overlays = append(s.Overlays, o)
		}
		if o.Trouble != "" && !s.Covered {
			s.Detail = strings.TrimPrefix(s.Detail+"; "+o.Trouble, "; ")
		}
	}
}
