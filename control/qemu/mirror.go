// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/lockstep-ft/lockstep/control/qmp"
)

func connectNBD(m *qmp.Monitor, i int, to Incoming) error {
	return m.ExecuteWithin(ioTimeout, "blockdev-add", to.TLS.nbd(map[string]any{
		"driver": "nbd", "node-name": nbdNode(i), "export": parentNode(i), "open-timeout": nbdTimeout,
		"server": map[string]string{"type": "inet", "host": to.NBD.Addr().String(), "port": strconv.Itoa(int(to.NBD.Port()))},
	}), nil)
}

func mirrorJob(d *Disk) string { return "resync-" + d.ID }

type job struct {
	ID      string
	Status  string
	Current int64 `json:"current-progress"`
	Total   int64 `json:"total-progress"`
	Error   string
}

func (j *job) ready() bool    { return j.Status == "ready" }
func (j *job) finished() bool { return j.Status == "concluded" }

// mirrors returns the disks' mirror jobs, in the disks' order; nil: that disk has none.
func mirrors(m *qmp.Monitor, disks []Disk) ([]*job, error) {
	if len(disks) == 0 {
		return nil, nil
	}
	var all []job
	if err := m.Execute("query-jobs", nil, &all); err != nil {
		return nil, err
	}
	list := make([]*job, len(disks))
	for i := range disks {
		for k := range all {
			if all[k].ID == mirrorJob(&disks[i]) {
				list[i] = &all[k]
			}
		}
	}
	return list, nil
}

// mirror copies the disks and returns when both sides are the same, but for what
// the guest writes meanwhile. It is blockdev-mirror and not drive-mirror, so that the
// target is a node whose name is known and whose connection can be cut.
func mirror(ctx context.Context, m *qmp.Monitor, disks []Disk, o Options) error {
	for i := range disks {
		d := &disks[i]
		args := map[string]any{
			"job-id": mirrorJob(d), "device": d.ID, "target": nbdNode(i), "sync": "full", "auto-dismiss": false,
		}
		if o.Bandwidth > 0 {
			args["speed"] = o.Bandwidth
		}
		if err := guarded(m, disks, func() error { return m.ExecuteWithin(ioTimeout, "blockdev-mirror", args, nil) }); err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
	}
	copies := make([]diskCopy, len(disks))
	for i := range copies {
		copies[i].still.limit = o.Stalled
	}
	return until(ctx, "the disks are copied", func() (bool, error) {
		jobs, err := mirrors(m, disks)
		if err != nil {
			return false, err
		}
		all := true
		for i, j := range jobs {
			if j == nil || j.finished() {
				return false, mirrorFailed(&disks[i], j)
			}
			p, err := copies[i].look(time.Now(), &disks[i], j, o.Limits)
			if err != nil {
				return false, err
			}
			o.Progress(p)
			all = all && j.ready()
		}
		return all, nil
	})
}

// diskCopy follows the copy of one disk, and decides when it has to be given up.
type diskCopy struct {
	still stall
	speed meter
	size  int64     // bytes of the first pass; 0: QEMU does not know yet
	first time.Time // end of the first pass: from then on what the guest writes is copied; zero: not yet
}

// look takes the state of the job. An error means that the copy has to be given up.
func (c *diskCopy) look(now time.Time, d *Disk, j *job, l Limits) (Progress, error) {
	if c.size == 0 {
		c.size = j.Total
	}
	if c.first.IsZero() && c.size != 0 && j.Current >= c.size {
		c.first = now
	}
	p := Progress{What: d.ID, Done: j.Current, Total: j.Total, Rate: c.speed.measure(now, j.Current)}
	switch still := c.still.spent(now, j.Current); {
	case j.ready():
	case still:
		return p, fmt.Errorf("disk %s: copying it to the secondary has made no progress for %v, at %d of %d MiB", d.ID, l.Stalled, p.Done>>20, p.Total>>20)
	case !c.first.IsZero() && now.Sub(c.first) > l.Timeout:
		return p, fmt.Errorf("disk %s: the guest has written for %v as fast as its disk is copied, at %s; a faster link, a higher migration.bandwidth or less load ends that",
			d.ID, l.Timeout, perSecond(p.Rate))
	}
	return p, nil
}

func mirrorFailed(d *Disk, j *job) error {
	why := "the job is gone"
	if j != nil && j.Error != "" {
		why = j.Error
	}
	return fmt.Errorf("disk %s: copying it to the secondary failed: %s", d.ID, why)
}

// endMirror completes the jobs. The guest is stopped, so that both sides are the same
// afterwards.
func endMirror(ctx context.Context, m *qmp.Monitor, disks []Disk, o Options) error {
	sizes, err := diskSizes(m, disks)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, maxPause, errors.New("the guest is stopped for it, and the secondary does not take the rest of its disk"))
	defer cancel()
	for i := range disks {
		// Cancelling a job that is ready copies the rest and completes it.
		if err := guarded(m, disks, func() error {
			return m.ExecuteWithin(ioTimeout, "block-job-cancel", map[string]any{"device": mirrorJob(&disks[i])}, nil)
		}); err != nil {
			return fmt.Errorf("disk %s: %w", disks[i].ID, err)
		}
	}
	return until(ctx, "the copies are complete", func() (bool, error) {
		jobs, err := mirrors(m, disks)
		if err != nil {
			return false, err
		}
		all := true
		for i, j := range jobs {
			switch {
			case j == nil:
			case !j.finished():
				all = false
			case j.Error != "":
				return false, mirrorFailed(&disks[i], j)
			default:
				c := Copied{Disk: disks[i].ID, Bytes: j.Current, Size: sizes[i]}
				if o.Since != "" {
					c.Why = "this QEMU has not recorded what changed"
				}
				o.Copied(c)
				if err := m.Execute("job-dismiss", map[string]string{"id": j.ID}, nil); err != nil {
					return false, err
				}
			}
		}
		return all, nil
	})
}
