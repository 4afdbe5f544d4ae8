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

	"github.com/lockstep-ft/lockstep/control/qmp"
)

// OverlaySpace is the room on a file system that holds a secondary's overlays.
type OverlaySpace struct {
	Dir   string   // overlay_dir of the first of the disks
	Disks []string // IDs of the disks whose overlays are there
	Used  int64    // bytes that the overlays take
	Free  int64    // bytes free on the file system
}

// Overlays returns the room on each file system that holds overlays. A folder that does
// not exist yet counts to the file system it will be on.
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

// existing returns the folder, or its closest parent that exists.
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

// MinOverlayRoom is how many bytes have to be free for one disk's overlays when QEMU is
// started. They grow with what the guest writes between two checkpoints.
const MinOverlayRoom = 4 << 20

// OverlayError means that a secondary's overlays cannot be made in an overlay_dir.
type OverlayError struct {
	Dir   string
	Disks []string
	Why   string
}

func (e *OverlayError) Error() string {
	return fmt.Sprintf("overlay_dir %s, of disk %s: %s; free some of it, or name a larger overlay_dir", e.Dir, strings.Join(e.Disks, ", "), e.Why)
}

// roomForOverlays removes the overlays of an earlier secondary and checks that there is
// room for new ones.
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

// makeOverlays makes the secondary's overlays anew: earlier ones lie over another state
// of the image. They have lazy refcounts, with which qcow2 marks a file as dirty from its
// first write until QEMU closes it ([MergeOverlays] needs that). Where the folder is the
// cause, the error is an [*OverlayError].
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

// Merged reports whether the overlays of a guest that took over are merged into its
// images, which QEMU does in the background. Until then the images alone are incomplete.
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

// MergeOverlays merges the overlays of a guest that took over into its images while no
// QEMU runs. It takes as long as there is to merge, and ends early with ctx. It may be
// repeated, and starts a merge anew that was interrupted. Overlays that are not marked as
// dirty are left out: QEMU has closed them after a merge of its own, and the images are
// newer.
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
		// The overlays do not name their backing files: QEMU gets those as options.
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
