// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/lockstep-ft/lockstep/control/qmp"
)

// A point is a moment from which a primary's QEMU records what is written to the disks,
// in a dirty bitmap of each disk's quorum. There QEMU marks a write when it has ended on
// both replicas, also where it failed on one of them or on both. So a secondary's images
// that are known to hold everything from before a point differ from this host's, if at
// all, in what the point's bitmaps name, and only that has to be copied.
//
// The bitmaps are in QEMU's memory: they outlive the daemon, and a new QEMU has none.

const (
	pointPrefix = "lockstep-point-"
	// changedBitmap has what a copy still has to do. The point's own bitmap goes on recording,
	// and loses nothing before the secondary has made durable what was copied.
	changedBitmap = "lockstep-changed"
)

const pointTime = "20060102T150405Z"

// NewPoint returns the name of a point that begins now. No other point ever has it.
func NewPoint(now time.Time) string { return now.UTC().Format(pointTime) + "-" + rand.Text() }

// PointTime returns when a point began; the zero Time: that is no point's name.
func PointTime(point string) time.Time {
	at, _, _ := strings.Cut(point, "-")
	t, err := time.Parse(pointTime, at)
	if err != nil {
		return time.Time{}
	}
	return t
}

type bitmap struct {
	Name         string
	Recording    bool
	Inconsistent bool
	Count        int64 // dirty bytes
}

// bitmaps returns those of each disk, in the disks' order.
func bitmaps(m *qmp.Monitor, disks []Disk) ([][]bitmap, error) {
	if len(disks) == 0 {
		return nil, nil
	}
	g, err := blockGraph(m)
	if err != nil {
		return nil, err
	}
	list := make([][]bitmap, len(disks))
	for i := range disks {
		n, err := quorumNode(m, &g, &disks[i])
		if err != nil {
			return nil, fmt.Errorf("disk %s: %w", disks[i].ID, err)
		}
		list[i] = n.Bitmaps
	}
	return list, nil
}

func bitmapCommand(m *qmp.Monitor, command string, d *Disk, name string) error {
	err := m.Execute("block-dirty-bitmap-"+command, map[string]any{"node": d.ID, "name": name}, nil)
	if err != nil {
		return fmt.Errorf("disk %s: %w", d.ID, err)
	}
	return nil
}

// AddPoint makes a point: what is written to the disks from now on is recorded.
func AddPoint(m *qmp.Monitor, disks []Disk, point string) error {
	for i := range disks {
		if err := bitmapCommand(m, "add", &disks[i], pointPrefix+point); err != nil {
			return err
		}
	}
	return nil
}

// KeepPoints removes all points but those named, and what an interrupted copy has left.
func KeepPoints(m *qmp.Monitor, disks []Disk, points ...string) error {
	have, err := bitmaps(m, disks)
	if err != nil {
		return err
	}
	var errs []error
	for i := range have {
		for _, b := range have[i] {
			point, is := strings.CutPrefix(b.Name, pointPrefix)
			if is && !slices.Contains(points, point) || b.Name == changedBitmap {
				errs = append(errs, bitmapCommand(m, "remove", &disks[i], b.Name))
			}
		}
	}
	return errors.Join(errs...)
}

// hasPoint reports whether a point has recorded what was written to every disk.
func hasPoint(m *qmp.Monitor, disks []Disk, point string) (bool, error) {
	have, err := bitmaps(m, disks)
	if err != nil {
		return false, err
	}
	for i := range have {
		if !slices.ContainsFunc(have[i], func(b bitmap) bool {
			return b.Name == pointPrefix+point && b.Recording && !b.Inconsistent
		}) {
			return false, nil
		}
	}
	return len(disks) > 0 && !PointTime(point).IsZero(), nil
}
