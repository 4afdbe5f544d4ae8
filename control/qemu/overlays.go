// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"lockstep/control/qmp"
)

// OverlaySpace is a file system that holds a secondary's overlays.
type OverlaySpace struct {
	Dir   string   // overlay_dir of the first of the disks
	Disks []string // whose overlays are there
	Used  int64    // bytes that the overlays take
	Free  int64    // bytes that are left for them, or for anybody
}

// Overlays looks at the overlays, and at the room around them. A folder that is not
// there yet counts as what it will be in.
func (s *Spec) Overlays() ([]OverlaySpace, error) {
	var all []OverlaySpace
	at := make(map[uint64]int) // device → index
	for i := range s.Disks {
		d := &s.Disks[i]
		dir, err := existing(d.OverlayDir)
		if err != nil {
			return nil, fmt.Errorf("disk %s: overlay_dir: %w", d.ID, err)
		}
		var st unix.Stat_t
		var room unix.Statfs_t
		if err := errors.Join(unix.Stat(dir, &st), unix.Statfs(dir, &room)); err != nil {
			return nil, fmt.Errorf("disk %s: overlay_dir %s: %w", d.ID, d.OverlayDir, err)
		}
		k, known := at[st.Dev]
		if !known {
			k = len(all)
			at[st.Dev] = k
			all = append(all, OverlaySpace{Dir: d.OverlayDir, Free: int64(room.Bavail) * room.Bsize})
		}
		all[k].Disks = append(all[k].Disks, d.ID)
		for _, kind := range overlayKinds {
			if err := unix.Stat(s.overlay(d, kind), &st); err == nil {
				all[k].Used += st.Blocks * 512
			}
		}
	}
	return all, nil
}

// existing is the folder, or what is there of the way to it.
func existing(dir string) (string, error) {
	for {
		_, err := os.Stat(dir)
		if up := filepath.Dir(dir); errors.Is(err, fs.ErrNotExist) && up != dir {
			dir = up
			continue
		}
		return dir, err
	}
}

var overlayKinds = []string{"active", "hidden"}

// MinOverlayRoom is how many bytes there have to be for one disk's overlays, or QEMU is
// not started over them. They grow with what the guest writes between two checkpoints.
const MinOverlayRoom = 4 << 20

// OverlayError is about an overlay_dir in which a secondary's overlays cannot be.
type OverlayError struct {
	Dir   string
	Disks []string
	Why   string
}

func (e *OverlayError) Error() string {
	return fmt.Sprintf("overlay_dir %s, of disk %s: %s; free some of it, or name a larger overlay_dir", e.Dir, strings.Join(e.Disks, ", "), e.Why)
}

// roomForOverlays takes away what an earlier secondary left and finds out whether there
// is room for new ones.
func (s *Spec) roomForOverlays() error {
	for i := range s.Disks {
		d := &s.Disks[i]
		if err := onStorage(d.OverlayDir, func() error {
			if _, err := os.Stat(d.OverlayDir); !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			return errors.Join(os.MkdirAll(d.OverlayDir, 0o700), give(s.User, d.OverlayDir))
		}); err != nil {
			return &OverlayError{d.OverlayDir, []string{d.ID}, err.Error()}
		}
		for _, kind := range overlayKinds {
			if err := os.Remove(s.overlay(d, kind)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return &OverlayError{d.OverlayDir, []string{d.ID}, err.Error()}
			}
		}
	}
	spaces, err := s.Overlays()
	if err != nil {
		return err
	}
	for _, o := range spaces {
		if need := MinOverlayRoom * int64(len(o.Disks)); o.Free < need {
			return &OverlayError{o.Dir, o.Disks, fmt.Sprintf("it is full: %d KiB are left, and the secondary's overlays need at least %d KiB", o.Free>>10, need>>10)}
		}
	}
	return nil
}

func (s *Spec) overlay(d *Disk, kind string) string {
	return filepath.Join(d.OverlayDir, s.VM+"-"+s.Node+"-"+d.ID+"-"+kind+".qcow2")
}

// makeOverlays makes the secondary's overlays anew: what they held was against
// another state of the image. With lazy refcounts one is marked as dirty from its first
// write on until QEMU closes it. What the folder does not let it do is an
// [*OverlayError].
func (s *Spec) makeOverlays() error {
	if err := s.roomForOverlays(); err != nil {
		return err
	}
	for i := range s.Disks {
		d := &s.Disks[i]
		size, err := d.size(false)
		if err != nil {
			return err
		}
		for _, kind := range overlayKinds {
			if _, err := qemuImg("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", s.overlay(d, kind), strconv.FormatInt(size, 10)); err != nil {
				return &OverlayError{d.OverlayDir, []string{d.ID}, err.Error()}
			}
			if err := give(s.User, s.overlay(d, kind)); err != nil {
				return fmt.Errorf("disk %s: overlay: %w", d.ID, err)
			}
		}
	}
	return nil
}

// Merged reports whether a guest that took over has merged what it wrote into its
// images, as it does in the background. Until then the images alone are of
// no use: the overlays hold the rest.
func Merged(m *qmp.Monitor, disks []Disk) (bool, error) {
	have, err := nodes(m)
	if err != nil {
		return false, err
	}
	for i := range disks {
		if have[activeNode(i)] {
			return false, nil
		}
	}
	return true, nil
}

// MergeOverlays merges, while no QEMU runs, what a guest that took over wrote into its
// images. It takes as long as there is to merge, and ends early with ctx; it may be
// repeated: a merge that was cut off begins anew. One that QEMU has made is not made
// again, because the image is newer than the overlays then: QEMU closes them behind it.
func MergeOverlays(ctx context.Context, s *Spec) error {
	for i := range s.Disks {
		d := &s.Disks[i]
		active, hidden := s.overlay(d, "active"), s.overlay(d, "hidden")
		out, err := qemuImg("info", "--output=json", "-f", "qcow2", active)
		var info imageInfo
		if err == nil {
			err = json.Unmarshal(out, &info)
		}
		if err != nil {
			return fmt.Errorf("disk %s: what the guest wrote since it took over may be in %s: %w", d.ID, active, err)
		}
		if !info.Dirty {
			continue
		}
		// Until then the overlays do not name what they lie over: QEMU was told.
		for _, args := range [][]string{
			{"rebase", "-u", "-f", "qcow2", "-F", d.format(), "-b", d.Image, hidden},
			{"rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", hidden, active},
			{"commit", "-q", "-d", "-f", "qcow2", "-b", d.Image, active},
		} {
			if _, err := qemuImgUntil(ctx, args...); err != nil {
				return fmt.Errorf("disk %s: what the guest wrote since it took over is in %s and %s, and cannot be merged into %s: %w", d.ID, active, hidden, d.Image, err)
			}
		}
	}
	return nil
}
