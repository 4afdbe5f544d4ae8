// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lockstep-ft/lockstep/control/qmp"
)

// Copied is how much of a disk was copied to a secondary.
type Copied struct {
	Disk  string
	Bytes int64     // a block that the guest wrote meanwhile counts again
	Size  int64     // the disk's
	Since time.Time // only what changed since was copied; zero: everything was
	Why   string    // everything was, though the secondary's images are known: why
}

func (c Copied) String() string {
	s := fmt.Sprintf("resync of %s: %s of %s", c.Disk, mebibytes(c.Bytes), mebibytes(c.Size))
	switch {
	case !c.Since.IsZero():
		s += fmt.Sprintf(" (only what changed since %s)", c.Since.Local().Format(time.DateTime))
	case c.Why != "":
		s += fmt.Sprintf(" (everything: %s)", c.Why)
	}
	return s
}

func mebibytes(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

// lastChanges is how many bytes may be left when the guest is stopped for the rest. Tests
// lower it.
var lastChanges int64 = 4 << 20

// stalledChanges is how long a copy of changes may make no progress at most: what the guest
// writes to a block that is not copied yet waits until that is.
const stalledChanges = 5 * time.Second

// changes copies what changed since a point.
type changes struct {
	m      *qmp.Monitor
	disks  []Disk
	o      Options
	copied []int64 // of each disk, in the passes that have ended
	first  time.Time
}

// begin notes what is to be copied.
func (c *changes) begin() error {
	for i := range c.disks {
		d := &c.disks[i]
		if err := bitmapCommand(c.m, "add", d, changedBitmap); err != nil {
			return err
		}
		// What is written from here on is in both.
		if err := c.m.Execute("block-dirty-bitmap-merge", map[string]any{
			"node": d.ID, "target": changedBitmap, "bitmaps": []string{pointPrefix + c.o.Since}}, nil); err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
	}
	c.copied = make([]int64, len(c.disks))
	return nil
}

// left is how many bytes there are to copy.
func (c *changes) left() (sum int64, err error) {
	have, err := bitmaps(c.m, c.disks)
	for i := range have {
		for _, b := range have[i] {
			if b.Name == changedBitmap {
				sum += b.Count
			}
		}
	}
	return sum, err
}

// live copies, while the guest runs, until little is left.
func (c *changes) live(ctx context.Context) error {
	c.o.Stalled = min(c.o.Stalled, stalledChanges)
	for {
		left, err := c.left()
		if err != nil || left <= lastChanges {
			return err
		}
		if !c.first.IsZero() && time.Since(c.first) > c.o.Timeout {
			return fmt.Errorf("the guest has written for %v as fast as what it wrote is copied, with %s left; a faster link, a higher migration.bandwidth or less load ends that",
				c.o.Timeout, mebibytes(left))
		}
		if err := c.pass(ctx); err != nil {
			return err
		}
		if c.first.IsZero() {
			c.first = time.Now()
		}
	}
}

// rest copies what is left. The guest is stopped, so that both sides are the same
// afterwards.
func (c *changes) rest(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, maxPause, errors.New("the guest is stopped for it, and the secondary does not take the rest of its disk"))
	defer cancel()
	c.o.Bandwidth = 0
	err := c.pass(ctx)
	if err == nil {
		var left int64
		if left, err = c.left(); err == nil && left > 0 {
			err = fmt.Errorf("%d bytes of the disks changed while the guest was stopped", left)
		}
	}
	return err
}

// pass copies what changed before it. What the guest writes meanwhile is left to the next
// one: QEMU copies a block as it was before it lets the guest write to it.
func (c *changes) pass(ctx context.Context) error {
	for i := range c.disks {
		d := &c.disks[i]
		args := map[string]any{
			"job-id": mirrorJob(d), "device": d.ID, "target": nbdNode(i), "sync": "bitmap", "bitmap": changedBitmap, "bitmap-mode": "on-success", "auto-dismiss": false,
		}
		if c.o.Bandwidth > 0 {
			args["speed"] = c.o.Bandwidth
		}
		if err := guarded(c.m, c.disks, func() error { return c.m.ExecuteWithin(ioTimeout, "blockdev-backup", args, nil) }); err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
	}
	still := make([]stall, len(c.disks))
	speed := make([]meter, len(c.disks))
	for i := range still {
		still[i].limit = c.o.Stalled
	}
	return until(ctx, "what changed is copied", func() (bool, error) {
		jobs, err := mirrors(c.m, c.disks)
		if err != nil {
			return false, err
		}
		all := true
		now := time.Now()
		for i, j := range jobs {
			if j == nil || j.finished() && j.Error != "" {
				return false, mirrorFailed(&c.disks[i], j)
			}
			c.o.Progress(Progress{What: c.disks[i].ID, Done: c.copied[i] + j.Current, Total: c.copied[i] + j.Total, Rate: speed[i].measure(now, j.Current)})
			if !j.finished() {
				all = false
				if still[i].spent(now, j.Current) {
					return false, fmt.Errorf("disk %s: copying what changed to the secondary has made no progress for %v", c.disks[i].ID, c.o.Stalled)
				}
			}
		}
		if !all {
			return false, nil
		}
		for i, j := range jobs {
			c.copied[i] += j.Current
			if err := c.m.Execute("job-dismiss", map[string]string{"id": j.ID}, nil); err != nil {
				return false, err
			}
		}
		return true, nil
	})
}

// end reports what was copied, and forgets what was to be.
func (c *changes) end() error {
	sizes, err := diskSizes(c.m, c.disks)
	for i := range sizes {
		c.o.Copied(Copied{Disk: c.disks[i].ID, Bytes: c.copied[i], Size: sizes[i], Since: PointTime(c.o.Since)})
	}
	for i := range c.disks {
		err = errors.Join(err, bitmapCommand(c.m, "remove", &c.disks[i], changedBitmap))
	}
	return err
}

// diskSizes are the disks' sizes in bytes.
func diskSizes(m *qmp.Monitor, disks []Disk) ([]int64, error) {
	g, err := blockGraph(m)
	if err != nil {
		return nil, err
	}
	sizes := make([]int64, len(disks))
	for i := range disks {
		n, err := quorumNode(m, &g, &disks[i])
		if err != nil {
			return nil, err
		}
		sizes[i] = n.Image.Size
	}
	return sizes, nil
}
