// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
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
			return errors.Join(os.MkdirAll(d.OverlayDir, 0o700), s.give(d.OverlayDir))
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
