// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/lockstep-ft/lockstep/control/program"
)

// DiskSizes returns the sizes of the disks as the guest sees them, in bytes and in their
// order. The images may be in use.
func (s *Spec) DiskSizes() ([]int64, error) {
	sizes := make([]int64, len(s.Disks))
	var errs []error
	for i := range s.Disks {
		var err error
		sizes[i], err = s.Disks[i].size(true)
		errs = append(errs, err)
	}
	return sizes, errors.Join(errs...)
}

// size is what the guest sees of the disk, in bytes. Unless shared, an image that another
// process has locked is an error.
func (d *Disk) size(shared bool) (int64, error) {
	args := []string{"info", "--output=json", "-f", d.format()}
	if shared {
		args = append(args, "-U")
	}
	out, err := qemuImg(append(args, d.Image)...)
	if err != nil {
		return 0, fmt.Errorf("disk %s: %w", d.ID, err)
	}
	var info imageInfo
	if err := json.Unmarshal(out, &info); err != nil {
		return 0, fmt.Errorf("disk %s: qemu-img info: %w", d.ID, err)
	}
	return info.Size, nil
}

// imageInfo is some of what `qemu-img info` prints.
type imageInfo struct {
	Size  int64 `json:"virtual-size"`
	Dirty bool  `json:"dirty-flag"` // qcow2 with lazy refcounts: it was written to and not closed
}

// storageTimeout bounds what may wait for storage that does not answer, or for a process that
// is stopped. Tests shorten it.
var storageTimeout = 10 * time.Second

// qemuImg runs qemu-img and returns what it prints. If it fails, the error is what it
// printed to standard error.
func qemuImg(args ...string) ([]byte, error) {
	ctx, done := context.WithTimeout(context.Background(), storageTimeout)
	defer done()
	return qemuImgUntil(ctx, args...)
}

// qemuImgUntil is qemuImg with the caller's bound in place of storageTimeout.
func qemuImgUntil(ctx context.Context, args ...string) ([]byte, error) {
	out, said, err := program.Output(ctx, "qemu-img", args...)
	switch {
	case errors.Is(err, program.ErrGivenUp):
		return nil, fmt.Errorf("`qemu-img %s` does not end: %w; is the storage there that the image is on?", strings.Join(args, " "), err)
	case errors.As(err, new(*exec.ExitError)) && said != "":
		return nil, errors.New(strings.Join(strings.Fields(said), " "))
	case err != nil:
		return nil, fmt.Errorf("qemu-img: %w", err)
	}
	return []byte(out), nil
}
